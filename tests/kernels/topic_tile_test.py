"""Tests of the fused tile of a topic model."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import hopper, lowering
from emc2.kernels.topic_tile import (
  pallas_gpu,
  pallas_tpu,
  reference,
  topic_tile,
)
from emc2.kernels.topic_tile.specs import SPECS

from tests.kernels import devices

P = jax.sharding.PartitionSpec


def oracle(doc_weights, word_weights, counts):
  """All sums in float64, pair by pair."""
  t, b, x = (
    np.asarray(z, np.float64) for z in (doc_weights, word_weights, counts)
  )
  doc_sums, word_sums = np.zeros_like(t), np.zeros_like(b)
  logs = np.zeros(len(t))
  for d, w in zip(*np.nonzero(x), strict=True):
    score = t[d] @ b[w]
    shares = x[d, w] * t[d] * b[w] / score
    doc_sums[d] += shares
    word_sums[w] += shares
    logs[d] += x[d, w] * np.log(score)
  return doc_sums, word_sums, logs


def problem(n_d, n_v, k, dtype='float32', density=0.1, seed=0):
  """Weights and counts; zeros are many, in blocks too."""
  rng = np.random.default_rng(seed)
  draw = lambda n: jnp.asarray(rng.gamma(0.3, size=(n, k)) + 1e-6, jnp.float32)
  counts = rng.poisson(density, size=(n_d, n_v))
  counts[: n_d // 3, n_v // 2 :] = 0
  return draw(n_d), draw(n_v), jnp.asarray(counts).astype(dtype)


def assert_close(got, want, tolerance=2e-6):
  """Compares to a tolerance relative to the largest entry wanted."""
  names = ('docs', 'words', 'logs')[: len(want)]
  for name, g, w in zip(names, got, want, strict=True):
    bound = tolerance * max(1.0, np.abs(w).max())
    np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=name)


def error(got, want):
  """The largest errors of the two sums, relative to each entry."""
  return [
    (np.abs(np.asarray(g, np.float64) - w) / np.maximum(w, 1e-12)).max()
    for g, w in zip(got[:2], want[:2], strict=True)
  ]


def plain(doc_weights, word_weights, counts):
  """What one writes without a kernel."""
  scores = jnp.matmul(doc_weights, word_weights.T, precision='highest')
  pulls = counts.astype(jnp.float32) / scores
  dot = functools.partial(jnp.matmul, precision='highest')
  return (
    doc_weights * dot(pulls, word_weights),
    word_weights * dot(pulls.T, doc_weights),
  )


class ReferenceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('one_block', 30, 20, 5, 0.1),
    ('blocks', 600, 33, 16, 0.1),
    ('many_topics', 40, 50, 300, 0.1),
  )
  def test_matches_float64(self, n_d, n_v, k, density):
    self._check_matches_float64(n_d, n_v, k, density)

  @parameterized.named_parameters(
    ('one_pair', 1, 1, 2, 1.0),
    ('one_word', 40, 1, 3, 0.5),
    ('one_document', 1, 40, 3, 0.5),
    ('no_counts', 8, 8, 4, 0.0),
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n_d, n_v, k, density):
    self._check_matches_float64(n_d, n_v, k, density)

  def _check_matches_float64(self, n_d, n_v, k, density):
    args = problem(n_d, n_v, k, density=density)
    assert_close(jax.jit(topic_tile)(*args), oracle(*args))

  @parameterized.parameters(
    # Documents and words; documents of a block.
    (2246, 1000, 250),
    (256, 1000, 256),
    (257, 1000, 129),
    (2246, 100_000, 41),
    (2246, 10**6, 32),
    (5, 10**6, 5),
  )
  def test_blocks(self, n_d, n_v, want):
    self.assertEqual(reference._block_size(n_d, n_v), want)

  def test_blocks_do_not_matter(self):
    args = problem(101, 30, 7)
    want = topic_tile(*args)
    for rows in (1, 2, 40, 100):
      with mock.patch.multiple(reference, _ROWS=rows, _MIN_ROWS=1):
        self.assertLessEqual(reference._block_size(101, 30), rows)
        assert_close(jax.jit(topic_tile)(*args), want, 1e-6)

  @parameterized.parameters('bfloat16', 'float16', 'int32', 'uint8')
  @pytest.mark.slow
  def test_dtypes_of_counts(self, dtype):
    args = problem(300, 20, 5, dtype)
    want = topic_tile(*args[:2], args[2].astype(jnp.float32))
    got = topic_tile(*args)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for leaf in got:
      self.assertEqual(leaf.dtype, jnp.float32)

  def test_errs_no_more_than_plain_jax(self):
    self._check_errs_no_more_than_plain_jax(16)

  @pytest.mark.slow
  def test_errs_no_more_than_plain_jax_elsewhere(self):
    self._check_errs_no_more_than_plain_jax(256)

  def _check_errs_no_more_than_plain_jax(self, k):
    args = problem(300, 100, k)
    want = oracle(*args)
    for got, other in zip(
      error(topic_tile(*args), want), error(plain(*args), want), strict=True
    ):
      self.assertLess(got, 1.5 * other)

  def test_log_likelihood_is_left_out(self):
    args = problem(300, 20, 5)
    off = functools.partial(topic_tile, log_likelihood=False)
    got, want = jax.jit(off)(*args), jax.jit(topic_tile)(*args)
    self.assertIsNone(got.log_likelihood)
    assert_close(got[:2], want[:2], 1e-7)
    text = lambda fn: jax.jit(fn).lower(*args).as_text()
    self.assertNotIn('stablehlo.log', text(off))
    self.assertIn('stablehlo.log', text(topic_tile))

  def test_counts_are_kept(self):
    args = problem(200, 60, 9)
    tile = topic_tile(*args)
    for sums, axis in ((tile.doc_sums, 1), (tile.word_sums, 0)):
      np.testing.assert_allclose(
        np.sum(sums, axis=1), np.sum(args[2], axis=axis), rtol=1e-5, atol=1e-6
      )

  def test_the_scale_of_a_document_cancels(self):
    t, b, x = problem(50, 60, 9)
    # Powers of two: nothing is rounded.
    scale = jnp.asarray(np.exp2(np.arange(-25, 25))[:, None], jnp.float32)
    got, want = topic_tile(scale * t, b, x), topic_tile(t, b, x)
    np.testing.assert_array_equal(got.doc_sums, want.doc_sums)
    np.testing.assert_allclose(got.word_sums, want.word_sums, rtol=1e-5)

  @pytest.mark.slow
  def test_gradient_of_the_log_likelihood(self):
    # Sums over weights: the tile is a gradient in the logarithms of weights.
    t, b, x = problem(40, 30, 6)
    total = lambda s, c: jnp.sum(x * jnp.log(jnp.exp(s) @ jnp.exp(c).T))
    d_t, d_b = jax.grad(total, (0, 1))(jnp.log(t), jnp.log(b))
    tile = topic_tile(t, b, x)
    np.testing.assert_allclose(tile.doc_sums, d_t, atol=1e-4)
    np.testing.assert_allclose(tile.word_sums, d_b, atol=1e-4)

  def test_many_by_vmap(self):
    sets = [problem(20, 15, 4, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    got = jax.jit(jax.vmap(topic_tile))(*stacked)
    for i, args in enumerate(sets):
      assert_close([x[i] for x in got], oracle(*args))

  def test_scores_are_never_whole(self):
    # Nor are bytes ever widened as a whole.
    args = SPECS['nytimes_shard_256_topics'].args()
    off = functools.partial(topic_tile, log_likelihood=False)
    compiled = jax.jit(off).lower(*args).compile()
    scores = 4 * args[2].size
    temporary = compiled.memory_analysis().temp_size_in_bytes
    self.assertLess(temporary, scores / 8)


def without_score(dtype='float32'):
  """Weights that share no topic, or meet below what float32 holds."""
  t = jnp.asarray([[1, 0, 0], [0, 1, 0], [1e-20, 0, 0], [0, 0, 1]], dtype)
  b = jnp.asarray([[0, 0, 1], [1e-20, 0, 0], [1e-10, 0, 0], [0, 0, 1]], dtype)
  x = jnp.asarray([[3, 1, 0, 2], [5, 0, 0, 0], [0, 4, 2, 0], [1, 0, 0, 0]])
  return t, b, x.astype(dtype)


class UnderflowTest(parameterized.TestCase):
  def _assert_defined(self, got):
    """What the docstring says of scores of 1e-30 and below."""
    # Of all counts only those of (0, 1) and (3, 0) meet a score.
    docs, words = np.zeros((4, 3)), np.zeros((4, 3))
    docs[0, 0] = words[1, 0] = docs[3, 2] = words[0, 2] = 1
    np.testing.assert_allclose(got[0], docs, rtol=1e-6)
    np.testing.assert_allclose(got[1], words, rtol=1e-6)
    low = np.log(1e-30)
    logs = [5 * low + np.log(1e-20), 5 * low, 6 * low, 0]
    np.testing.assert_allclose(got[2], logs, rtol=1e-6)

  def test_reference(self):
    t, b, x = without_score()
    # The product at (2, 2) is 1e-30, which rounds to no more than the bound.
    self._assert_defined(topic_tile(t, b, x))

  def test_tpu(self):
    args = without_score()
    fn = functools.partial(
      pallas_tpu.forward, log_likelihood=True, interpret=True
    )
    self._assert_defined(jax.jit(fn)(*args))

  def test_large_ratios_are_finite(self):
    # A score just over the bound, met by many documents.
    t = jnp.ones((1000, 2))
    b = jnp.full((3, 2), 1e-30)
    tile = topic_tile(t, b, jnp.full((1000, 3), 255.0))
    np.testing.assert_allclose(tile.word_sums, 127_500.0, rtol=1e-5)
    np.testing.assert_allclose(tile.doc_sums, 382.5, rtol=1e-5)


class ShardMapTest(parameterized.TestCase):
  @parameterized.product(check_vma=(True, False), logs=(True, False))
  def test_eight_devices_equal_one(self, check_vma, logs):
    args = problem(64, 30, 7)
    mesh = jax.make_mesh(
      (8,), ('ring',), axis_types=(jax.sharding.AxisType.Auto,)
    )

    @jax.jit
    @jax.shard_map(
      mesh=mesh,
      in_specs=(P('ring'), P(), P('ring')),
      out_specs=(P('ring'), P(), P('ring')),
      check_vma=check_vma,
    )
    def local(t, b, x):
      tile = topic_tile(t, b, x, log_likelihood=logs)
      log_sums = tile.log_likelihood if logs else jnp.zeros_like(t[:, 0])
      return tile.doc_sums, jax.lax.psum(tile.word_sums, 'ring'), log_sums

    want = list(oracle(*args))
    want[2] *= logs
    assert_close(local(*args), want)

  @parameterized.parameters(('tpu', True), ('tpu', False), ('cuda', True))
  def test_kernels_lower_inside(self, platform, check_vma):
    chip = jax.sharding.AbstractDevice(lowering.KINDS[platform], 1, platform)
    mesh = jax.sharding.AbstractMesh(
      (8,),
      ('ring',),
      axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=chip,
    )
    local = jax.shard_map(
      lambda *args: tuple(topic_tile(*args)),
      mesh=mesh,
      in_specs=(P('ring'), P(), P('ring')),
      out_specs=(P('ring'), P('ring'), P('ring')),
      check_vma=check_vma,
    )
    args = jax.eval_shape(lambda: problem(800, 300, 20, 'uint8'))
    with jax.sharding.use_abstract_mesh(mesh):
      traced = jax.jit(local).trace(*args)
      text = traced.lower(lowering_platforms=(platform,)).as_text()
    target, count = TARGETS[platform]
    self.assertEqual(text.count(target), count)


# How a kernel is called, and how many there are to a tile.
TARGETS = {'tpu': ('@tpu_custom_call', 1), 'cuda': ('@mosaic_gpu', 2)}


class LoweringTest(parameterized.TestCase):
  """What the real shapes become on chips that are not here."""

  def _text(self, name, platform, kind=None, **settings):
    fn = functools.partial(topic_tile, **settings)
    args = SPECS[name].args()
    return lowering.lower_for(fn, *args, platform=platform, kind=kind).as_text()

  @parameterized.product(
    name=sorted(SPECS), implementation=('auto', 'pallas_tpu')
  )
  def test_tpu(self, name, implementation):
    text = self._text(name, 'tpu', implementation=implementation)
    self.assertEqual(text.count('@tpu_custom_call'), 1)
    self.assertEqual(text.count('kernel_name = "topic_tile"'), 1)

  def test_gpu(self):
    self._check_gpu('ap_64_topics', 'auto')

  @pytest.mark.slow
  def test_gpu_elsewhere(self):
    self._check_gpu('nytimes_shard_256_topics', 'pallas_gpu')

  def _check_gpu(self, name, implementation):
    text = self._text(name, 'cuda', implementation=implementation)
    calls = [line for line in text.splitlines() if '@mosaic_gpu' in line]
    self.assertLen(calls, 2)
    for part in ('documents', 'words'):
      self.assertEqual(sum(f'topic_tile_{part}' in c for c in calls), 1)

  @parameterized.named_parameters(
    ('cpu', 'ap_64_topics', 'cpu', None),
    ('older_gpu', 'ap_64_topics', 'cuda', 'NVIDIA A100-SXM4-80GB'),
    ('gpu_many_topics', 'umbc_shard', 'cuda', None),
  )
  def test_auto_takes_the_reference(self, name, platform, kind):
    text = self._text(name, platform, kind)
    self.assertNotIn('custom_call @mosaic_gpu', text)
    self.assertNotIn('tpu_custom_call', text)
    self.assertIn('dot_general', text)

  @parameterized.parameters('tpu', 'cuda')
  def test_named_xla_is_no_kernel(self, platform):
    text = self._text('ap_64_topics', platform, implementation='xla')
    self.assertNotIn(TARGETS[platform][0], text)

  @parameterized.parameters(
    ('pallas_gpu', 'ap_64_topics', 'cuda', 'NVIDIA A100', 'want a Hopper'),
    ('pallas_gpu', 'umbc_shard', 'cuda', None, 'at most 256 topics, got 1000'),
  )
  def test_named_kernel_raises(self, name, spec, platform, kind, message):
    with self.assertRaisesRegex(NotImplementedError, f'{name}: .*{message}'):
      self._text(spec, platform, kind, implementation=name)

  @parameterized.parameters('tpu', 'cuda')
  def test_many_share_their_kernels(self, platform):
    args = jax.eval_shape(lambda: problem(80, 70, 20))
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in args]
    fn = jax.vmap(topic_tile)
    text = lowering.lower_for(fn, *stacked, platform=platform).as_text()
    target, count = TARGETS[platform]
    self.assertEqual(text.count(target), count)


class TpuKernelTest(parameterized.TestCase):
  """Interpreted: what lies beyond the ends of an array is NaN."""

  def _run(self, *args, logs=True):
    fn = functools.partial(
      pallas_tpu.forward, log_likelihood=logs, interpret=True
    )
    return jax.jit(fn)(*args)

  @parameterized.named_parameters(
    ('ragged', 140, 600, 5, 'float32'), ('many_topics', 20, 300, 600, 'int8')
  )
  def test_matches_float64(self, n_d, n_v, k, dtype):
    self._check_matches_float64(n_d, n_v, k, dtype)

  @parameterized.named_parameters(
    ('one_pair', 1, 1, 2, 'float32'),
    ('one_tile', 128, 128, 128, 'float32'),
    ('ragged_bytes', 70, 600, 130, 'uint8'),
    ('many_blocks', 270, 70, 3, 'bfloat16'),
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n_d, n_v, k, dtype):
    self._check_matches_float64(n_d, n_v, k, dtype)

  def _check_matches_float64(self, n_d, n_v, k, dtype):
    args = problem(n_d, n_v, k, dtype)
    assert_close(self._run(*args), oracle(*args))

  def test_without_logarithms(self):
    args = problem(20, 30, 5)
    *sums, logs = self._run(*args, logs=False)
    self.assertIsNone(logs)
    assert_close(sums, oracle(*args)[:2])

  def test_groups_of_words(self):
    entries = 2 * 512 * 128
    self.enter_context(mock.patch.object(pallas_tpu, '_GROUP_ENTRIES', entries))
    # The last tile of the last group lies beyond the array.
    args = problem(140, 1100, 5)
    self.assertEqual(pallas_tpu._plan(140, 1100, 128), (256, 512, 2, 2))
    assert_close(self._run(*args), oracle(*args))

  @parameterized.product(
    n_d=(1, 10**5), n_v=(1, 10**5), topics=(128, 512, 1024)
  )
  def test_plan(self, n_d, n_v, topics):
    docs, words, steps, groups = pallas_tpu._plan(n_d, n_v, topics)
    # Every word is met, and no group is empty.
    self.assertGreaterEqual(words * steps * groups, n_v)
    self.assertLess(words * steps * (groups - 1), n_v)
    self.assertLessEqual(words * steps * topics, pallas_tpu._GROUP_ENTRIES)
    self.assertEqual((docs % 128, words % 128), (0, 0))

  def test_empty_tiles_are_skipped(self):
    # Weights of words that nobody counts are not even read.
    t, b, x = problem(100, 1030, 5)
    x = x.at[:, 512:1024].set(0)
    got = self._run(t, b.at[512:1024].set(jnp.nan), x)
    want = self._run(t, b, x)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[2], want[2])
    self.assertTrue(np.isfinite(np.asarray(got[0])).all())

  @parameterized.parameters(
    (1025, 'float32', 'want at most 1024 topics, got 1025'),
    (3, 'float16', 'want counts in one of .*, got float16'),
  )
  def test_unsupported(self, k, dtype, reason):
    args = problem(4, 4, k, dtype)
    self.assertRegex(pallas_tpu.unsupported(*args), reason)


def gpu_interpreter():
  """Parameters of Mosaic GPU's interpreter, which JAX 0.10 does not export."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


class GpuKernelTest(parameterized.TestCase):
  """Interpreted: all but the matrix instructions themselves."""

  @pytest.mark.slow
  def test_matches_float64(self):
    # One pass of two warpgroups to a block, and one of two parts.
    self.enter_context(mock.patch.object(hopper, 'MIN_TILES', 1))
    self.assertEqual(pallas_gpu._plan(70, 40, 64), (2, 1, 1, 1))
    self.assertEqual(pallas_gpu._plan(40, 70, 64), (1, 1, 1, 2))
    args = problem(70, 40, 6, 'uint8')
    got = pallas_gpu.forward(
      *args, log_likelihood=True, interpret=gpu_interpreter()
    )
    # As exact as float32, of numbers of 16 bits.
    assert_close(got, oracle(*args))

  @parameterized.product(n=(1, 64, 10**5), m=(1, 10**5), topics=(64, 128, 256))
  def test_plan(self, n, m, topics):
    groups, flight, steps, parts = pallas_gpu._plan(n, m, topics)
    # Every row is met, and no part is empty.
    self.assertGreaterEqual(64 * steps * parts, m)
    self.assertLess(64 * steps * (parts - 1), m)
    self.assertLessEqual(flight, steps)
    held, weights = 64 * groups, 6 * topics
    shared = held * weights + flight * 64 * (weights + 4 * held)
    self.assertLessEqual(shared, pallas_gpu._SHARED_BYTES)

  def test_parts_add_up(self):
    x = problem(64, 1, 16)[0]
    parts = jax.jit(hopper.split, static_argnums=1)(x, 3)
    total = sum(np.asarray(part, np.float64) for part in parts)
    np.testing.assert_array_equal(total, np.asarray(x, np.float64))
    # None of them is left out by the compiler.
    for part in parts:
      self.assertGreater(np.abs(np.asarray(part, np.float64)).max(), 0)


class DeviceTest(parameterized.TestCase):
  """Each named implementation, compiled and run where its chip is here."""

  @parameterized.parameters(*devices.runnable())
  def test_matches_float64(self, name, platform):
    self._check_float64(name, platform, 64, 64, 16, 'float32')

  @parameterized.parameters(
    (*which, *shape)
    for which in devices.runnable()
    for shape in ((300, 700, 100, 'uint8'), (130, 70, 250, 'bfloat16'))
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, *case):
    self._check_float64(*case)

  def _check_float64(self, name, platform, n_d, n_v, k, dtype):
    with jax.default_device(jax.devices(platform)[0]):
      args = problem(n_d, n_v, k, dtype)
      got = jax.jit(functools.partial(topic_tile, implementation=name))(*args)
      want = oracle(*args)
      assert_close(got, want)
      for mine, other in zip(
        error(got, want), error(jax.jit(plain)(*args), want), strict=True
      ):
        self.assertLess(mine, 4 * other)


class ErrorTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('docs_rank', {'doc_weights': np.ones(3, 'f')}, 'doc_weights must be a'),
    ('docs_dtype', {'doc_weights': np.ones((4, 3), 'e')}, 'got float16 of'),
    ('no_docs', {'doc_weights': np.ones((0, 3), 'f')}, r'of shape \(0, 3\)'),
    ('words_rank', {'word_weights': np.ones(3, 'f')}, 'word_weights must be a'),
    ('words_dtype', {'word_weights': np.ones((5, 3), 'i')}, 'got int32 of'),
    ('topics', {'word_weights': np.ones((5, 2), 'f')}, 'the 3 topics .* got 2'),
    ('counts', {'counts': np.ones((5, 4), 'f')}, r'counts must be \(4, 5\)'),
    ('flags', {'counts': np.ones((4, 5), bool)}, 'real, got bool'),
    ('complex', {'counts': np.ones((4, 5), 'F')}, 'real, got complex64'),
    ('implementation', {'implementation': 'cuda'}, "'cuda' is not one of auto"),
  )
  def test_wrong_input(self, wrong, message):
    args = {
      'doc_weights': np.ones((4, 3), 'f'),
      'word_weights': np.ones((5, 3), 'f'),
      'counts': np.ones((4, 5), 'f'),
    } | wrong
    with self.assertRaisesRegex(ValueError, message):
      topic_tile(**args)
