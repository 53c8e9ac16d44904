"""Tests of the visit of a block of classes."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import hopper, lowering
from emc2.kernels.softmax_block import (
  pallas_gpu,
  pallas_tpu,
  reference,
  score_block,
  softmax_block,
)
from emc2.kernels.softmax_block.specs import SPECS

from tests.kernels import devices

P = jax.sharding.PartitionSpec
MODES = reference.NORMALIZERS


def oracle(
  features, weights, normalizers, labels, row_weights, num_valid, normalizer
):
  """Row by row, in float64."""
  x, w, u, omega = (
    np.asarray(z, np.float64)
    for z in (features, weights, normalizers, row_weights)
  )
  gradient = np.zeros_like(w)
  kept, label_scores = np.full(len(x), -np.inf), np.zeros(len(x))
  for i, label in enumerate(np.asarray(labels)):
    scores = x[i] @ w[:, : int(num_valid)]
    kept[i] = np.logaddexp.reduce(scores)
    given = {
      'frozen': u[i],
      'floor': max(u[i], kept[i]),
      'joint': np.logaddexp(u[i], kept[i]),
    }[normalizer]
    errors = np.exp(scores - given)
    if 0 <= label < num_valid:
      errors[label] -= 1
      label_scores[i] = scores[label]
    gradient[:, : len(scores)] += omega[i] * np.outer(x[i], errors)
  return gradient, kept, label_scores


def problem(n, d, k, num_valid=None, dtype='float32', seed=0, wide='float32'):
  """Some labels are of other blocks, some rows of weight 0."""
  rng = np.random.default_rng(seed)
  features = jnp.asarray(rng.normal(size=(n, d))).astype(dtype)
  weights = jnp.asarray(rng.normal(size=(d, k)) / d**0.5, wide)
  normalizers = jnp.asarray(np.log(k) + rng.normal(size=n), wide)
  labels = jnp.asarray(rng.integers(-2, k + 2, size=n), jnp.int32)
  row_weights = jnp.asarray(rng.integers(0, 3, size=n), wide)
  valid = jnp.int32(max(1, k - 2) if num_valid is None else num_valid)
  return features, weights, normalizers, labels, row_weights, valid


def assert_close(got, want, tolerance=3e-6):
  """Compares to a tolerance relative to the largest entry wanted."""
  names = 'gradient', 'logsumexp', 'label_scores'
  for name, g, w in zip(names[-len(want) :], got, want, strict=True):
    w = np.asarray(w, np.float64)
    finite = np.isfinite(w)
    bound = tolerance * max(1.0, np.abs(w[finite]).max(initial=0))
    np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=name)


def scores_only(args):
  features, weights, _, labels, _, num_valid = args
  return features, weights, labels, num_valid


class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters(
    # Rows, features, classes, which of them are no padding; tiles of 8 rows.
    ((1, 1, 1, 1), 'joint', False),
    *(((30, 5, 7, 4), normalizer, True) for normalizer in MODES),
    ((64, 3, 20, 20), 'frozen', True),
  )
  def test_matches_float64(self, shape, normalizer, tiled):
    args = problem(*shape)
    tile = 1 if tiled else reference.TILE
    with mock.patch.object(reference, 'TILE', tile):
      fn = functools.partial(softmax_block, normalizer=normalizer)
      got = jax.jit(fn)(*args)
      kept = jax.jit(score_block)(*scores_only(args))
    want = oracle(*args, normalizer)
    assert_close(got, want)
    assert_close(kept, want[1:])

  @parameterized.parameters(*MODES)
  @pytest.mark.slow
  def test_float64(self, normalizer):
    with jax.enable_x64(True), mock.patch.object(reference, 'TILE', 1):
      args = problem(30, 5, 7, wide='float64', dtype='float64')
      fn = functools.partial(softmax_block, normalizer=normalizer)
      got = jax.jit(fn)(*args)
      self.assertEqual({x.dtype.name for x in got}, {'float64'})
      assert_close(got, oracle(*args, normalizer), 1e-13)

  @pytest.mark.slow
  def test_narrow_features_are_widened(self):
    args = problem(30, 5, 7, dtype='bfloat16')
    fn = jax.jit(softmax_block)
    got = fn(*args)
    want = fn(args[0].astype(jnp.float32), *args[1:])
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def test_narrow_weights(self):
    x, w, *rest = problem(30, 5, 7, dtype='bfloat16')
    got = jax.jit(softmax_block)(x, w.astype(jnp.bfloat16), *rest)
    kinds = [z.dtype.name for z in got]
    self.assertEqual(kinds, ['bfloat16', 'float32', 'float32'])
    want = oracle(x, w.astype(jnp.bfloat16), *rest, 'frozen')
    assert_close(got[1:], want[1:])
    assert_close(got[:1], want[:1], 2**-8)

  @pytest.mark.slow
  def test_is_the_gradient_of_a_block_alone(self):
    x, w, _, labels, omega, valid = problem(30, 5, 7)
    labels = labels % valid

    def loss(w):
      scores = jnp.matmul(x, w)[:, : int(valid)]
      chosen = jnp.take_along_axis(scores, labels[:, None], 1)[:, 0]
      return jnp.sum(omega * (jax.nn.logsumexp(scores, axis=1) - chosen))

    nothing = jnp.full_like(omega, -jnp.inf)
    args = x, w, nothing, labels, omega, valid
    for normalizer in ('floor', 'joint'):
      fn = functools.partial(softmax_block, normalizer=normalizer)
      got = jax.jit(fn)(*args)
      np.testing.assert_allclose(got.gradient, jax.grad(loss)(w), atol=1e-5)

  def test_floor_is_safe(self):
    x, w, u, *rest = problem(30, 5, 7)
    stale = u - 1000
    for normalizer, safe in (('frozen', False), ('floor', True)):
      fn = functools.partial(softmax_block, normalizer=normalizer)
      found = jax.jit(fn)(x, w, stale, *rest)
      self.assertEqual(bool(jnp.isfinite(found.gradient).all()), safe)

  def test_rows_of_weight_0_have_no_say(self):
    x, *rest = problem(30, 5, 7)
    omega = rest[3]
    changed = jnp.where((omega == 0)[:, None], 0.0, x)
    self.assertGreater(jnp.sum(changed != x), 0)
    fn = jax.jit(softmax_block)
    got, want = fn(changed, *rest), fn(x, *rest)
    np.testing.assert_array_equal(got.gradient, want.gradient)

  def test_errs_no_more_than_plain_jax(self):
    args = x, w, u, labels, omega, valid = problem(100, 40, 60, 60)
    chosen = jax.nn.one_hot(labels, 60)
    errors = omega[:, None] * (jnp.exp(jnp.matmul(x, w) - u[:, None]) - chosen)
    want = oracle(*args, 'frozen')[0]
    error = lambda g: np.abs(np.asarray(g, np.float64) - want).max()
    got = jax.jit(softmax_block)(*args).gradient
    self.assertLess(error(got), 1.5 * error(jnp.matmul(x.T, errors)))

  def test_scores_are_never_whole(self):
    spec = SPECS['embeddings']
    compiled = jax.jit(softmax_block).lower(*spec.args()).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    self.assertLess(temporary, 4 * spec.num_rows * spec.num_classes / 4)

  def test_workers_by_vmap(self):
    sets = [problem(20, 5, 7, valid, seed=valid) for valid in (3, 7, 0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    fn = jax.vmap(softmax_block, axis_name='ring')
    got = jax.jit(fn)(*stacked)
    for i, args in enumerate(sets):
      assert_close([x[i] for x in got], oracle(*args, 'frozen'))


class PaddingTest(parameterized.TestCase):
  """A block of padding, where rows know other classes or none."""

  def _assert_empty(self, fn, known):
    x, w, u, *rest = problem(10, 5, 7, 0)
    u = jnp.where(known, u, -jnp.inf)
    found = fn(x, w, u, *rest)
    np.testing.assert_array_equal(found.gradient, 0)
    np.testing.assert_array_equal(found.logsumexp, -np.inf)
    np.testing.assert_array_equal(found.label_scores, 0)

  @parameterized.parameters(('frozen', True), ('floor', False))
  def test_empty_block(self, normalizer, known):
    self._check_empty_block(normalizer, known)

  @parameterized.parameters(('joint', True), ('joint', False))
  @pytest.mark.slow
  def test_empty_block_elsewhere(self, normalizer, known):
    self._check_empty_block(normalizer, known)

  def _check_empty_block(self, normalizer, known):
    for fn in (plain, tpu):
      self._assert_empty(functools.partial(fn, normalizer=normalizer), known)

  def test_weights_of_padding_are_not_used(self):
    x, w, *rest = problem(10, 5, 7, 4)
    for fn in (plain, tpu):
      fn = functools.partial(fn, normalizer='joint')
      got, want = fn(x, w.at[:, 4:].set(jnp.inf), *rest), fn(x, w, *rest)
      jax.tree.map(np.testing.assert_array_equal, got, want)
      np.testing.assert_array_equal(got.gradient[:, 4:], 0)


class ShardMapTest(parameterized.TestCase):
  @parameterized.product(
    check_vma=(True, False), implementation=('auto', 'xla')
  )
  def test_eight_devices_equal_one(self, check_vma, implementation):
    args = problem(64, 5, 7)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ('ring',), axis_types=(auto,))
    rows = P('ring')

    @jax.jit
    @jax.shard_map(
      mesh=mesh,
      in_specs=(rows, P(), rows, rows, rows, P()),
      out_specs=(P(), rows, rows),
      check_vma=check_vma,
    )
    def local(*args):
      found = softmax_block(*args, implementation=implementation)
      return jax.lax.psum(found.gradient, 'ring'), *found[1:]

    with mock.patch.object(reference, 'TILE', 1):
      assert_close(local(*args), oracle(*args, 'frozen'))

  @parameterized.parameters(('tpu', 1, True), ('tpu', 1, False), ('cuda', 2, 1))
  def test_kernels_lower_inside(self, platform, count, check_vma):
    chip = jax.sharding.AbstractDevice(lowering.KINDS[platform], 1, platform)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh(
      (8,), ('ring',), axis_types=(auto,), abstract_device=chip
    )
    rows, classes = P('ring'), P(None, 'ring')
    local = jax.shard_map(
      lambda *args: tuple(softmax_block(*args)),
      mesh=mesh,
      in_specs=(rows, classes, rows, rows, rows, P()),
      out_specs=(classes, rows, rows),
      check_vma=bool(check_vma),
    )
    args = jax.eval_shape(lambda: problem(800, 20, 160))
    with jax.sharding.use_abstract_mesh(mesh):
      traced = jax.jit(local).trace(*args)
      text = traced.lower(lowering_platforms=(platform,)).as_text()
    self.assertEqual(text.count(TARGETS[platform]), count)
    self.assertNotIn('all_gather', text)
    self.assertNotIn('all_reduce', text)


TARGETS = {'tpu': '@tpu_custom_call', 'cuda': '@mosaic_gpu'}


def shapes(text):
  """Of all tensors that the lowered text names."""
  found = re.findall(r'tensor<((?:\d+x)+)\w+>', text)
  return {tuple(int(size) for size in f[:-1].split('x')) for f in found}


def holds_scores(text, spec):
  """Whether a tensor has an axis of rows and one of classes, or a bit more."""
  within = lambda sizes, low: any(low <= s <= low + 128 for s in sizes)
  return any(
    within(shape[:i] + shape[i + 1 :], spec.num_classes)
    for shape in shapes(text)
    for i, size in enumerate(shape)
    if spec.num_rows <= size <= spec.num_rows + 128
  )


class LoweringTest(parameterized.TestCase):
  """What the real shapes become on chips that are not here."""

  def _text(self, name, platform, kind=None, fn=softmax_block, **settings):
    spec = SPECS[name]
    args = spec.score_args() if fn is score_block else spec.args()
    fn = functools.partial(fn, **settings)
    return lowering.lower_for(fn, *args, platform=platform, kind=kind).as_text()

  @parameterized.parameters(
    *((name, 'TPU v5 lite') for name in sorted(SPECS)),
    ('youtube8m', 'TPU v6 lite'),
  )
  def test_tpu(self, name, kind):
    # A block too large for one sweep makes its scores first, where it must.
    before = int(name == 'youtube8m_whole')
    text = self._text(name, 'tpu', kind, normalizer='joint')
    count = lambda name: text.count(f'kernel_name = "{name}"')
    self.assertEqual(count('softmax_block'), 1)
    self.assertEqual(count('softmax_block_scores'), before)
    self.assertEqual(text.count('@tpu_custom_call'), 1 + before)

  @parameterized.parameters('youtube8m', 'youtube8m_whole')
  def test_tpu_frozen_is_one_sweep(self, name):
    text = self._text(name, 'tpu', implementation='pallas_tpu')
    self.assertEqual(text.count('@tpu_custom_call'), 1)

  def test_gpu(self):
    kind, name = 'NVIDIA H100 80GB HBM3', 'pallas_gpu'
    text = self._text('digits', 'cuda', kind, implementation=name)
    calls = [line for line in text.splitlines() if '@mosaic_gpu' in line]
    self.assertLen(calls, 2)
    count = sum('softmax_block_scores' in call for call in calls)
    self.assertEqual(count, 1)

  @parameterized.parameters(('tpu', 'youtube8m'), ('cuda', 'embeddings'))
  def test_scores_alone(self, platform, name):
    text = self._text(name, platform, fn=score_block)
    self.assertEqual(text.count(TARGETS[platform]), 1)
    self.assertIn('softmax_block_scores', text)

  @parameterized.parameters(('tpu', 'embeddings'), ('cpu', 'embeddings'))
  def test_no_array_of_scores(self, platform, name):
    self._check_no_array_of_scores(platform, name)

  @parameterized.parameters(
    ('tpu', 'youtube8m'),
    ('tpu', 'youtube8m_whole'),
    ('cuda', 'embeddings'),
    ('cpu', 'youtube8m'),
  )
  @pytest.mark.slow
  def test_no_array_of_scores_elsewhere(self, platform, name):
    self._check_no_array_of_scores(platform, name)

  def _check_no_array_of_scores(self, platform, name):
    spec = SPECS[name]
    text = self._text(name, platform, normalizer='joint')
    self.assertFalse(holds_scores(text, spec))
    whole = lambda x, w, *_: jnp.exp(jnp.matmul(x.astype(w.dtype), w)).sum()
    text = lowering.lower_for(whole, *spec.args(), platform=platform).as_text()
    self.assertTrue(holds_scores(text, spec))

  @parameterized.named_parameters(
    ('cpu', 'embeddings', 'cpu', None),
    ('older_gpu', 'embeddings', 'cuda', 'NVIDIA A100-SXM4-80GB'),
    ('gpu_many_features', 'youtube8m', 'cuda', None),
    ('older_tpu', 'youtube8m', 'tpu', 'TPU v4'),
  )
  def test_auto_takes_the_reference(self, name, platform, kind):
    text = self._text(name, platform, kind)
    self.assertNotIn('custom_call @mosaic_gpu', text)
    self.assertNotIn('tpu_custom_call', text)
    # Not in one pass of 16 bits.
    self.assertIn('precision = [HIGHEST, HIGHEST]', text)

  @parameterized.product(
    platform=('tpu', 'cuda'), fn=(softmax_block, score_block)
  )
  def test_named_xla_is_no_kernel(self, platform, fn):
    text = self._text('embeddings', platform, fn=fn, implementation='xla')
    self.assertNotIn(TARGETS[platform], text)

  @parameterized.parameters(
    ('pallas_gpu', 'embeddings', 'cuda', 'NVIDIA A100', 'want a Hopper'),
    ('pallas_gpu', 'youtube8m', 'cuda', None, '256 features, got 1152'),
    ('pallas_tpu', 'digits', 'tpu', 'TPU v4', 'fifth generation or later'),
  )
  def test_named_kernel_raises(self, name, spec, platform, kind, message):
    for fn in (softmax_block, score_block):
      with self.assertRaisesRegex(NotImplementedError, f'{name}: .*{message}'):
        self._text(spec, platform, kind, fn=fn, implementation=name)

  def test_workers_share_their_kernels(self):
    self._check_workers_share_their_kernels('tpu', 1)

  @pytest.mark.slow
  def test_workers_share_their_kernels_for_a_gpu(self):
    self._check_workers_share_their_kernels('cuda', 2)

  def _check_workers_share_their_kernels(self, platform, count):
    args = jax.eval_shape(lambda: problem(80, 20, 70))
    stacked = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in args]
    fn = jax.vmap(softmax_block, axis_name='ring')
    text = lowering.lower_for(fn, *stacked, platform=platform).as_text()
    self.assertEqual(text.count(TARGETS[platform]), count)
    self.assertNotIn('stablehlo.while', text)


def plain(*args, **settings):
  return jax.jit(functools.partial(reference.visit, **settings))(*args)


def tpu(*args, **settings):
  fn = functools.partial(pallas_tpu.visit, interpret=True, **settings)
  return jax.jit(fn)(*args)


class TpuKernelTest(parameterized.TestCase):
  """Interpreted: what lies beyond the ends of an array is NaN."""

  @parameterized.parameters((1, 1, 1, 1), (300, 130, 30, 27))
  def test_matches_reference(self, *shape):
    self._check_reference(shape, 'joint')

  @parameterized.product(
    shape=((1, 1, 1, 1), (300, 130, 30, 27)), normalizer=('frozen', 'floor')
  )
  @pytest.mark.slow
  def test_matches_reference_elsewhere(self, shape, normalizer):
    self._check_reference(shape, normalizer)

  def _check_reference(self, shape, normalizer):
    args = problem(*shape)
    with mock.patch.object(pallas_tpu, '_MAX_ROWS', 128):
      got = tpu(*args, normalizer=normalizer)
    want = plain(*args, normalizer=normalizer)
    assert_close(got, want)

  @parameterized.parameters(*MODES)
  @pytest.mark.slow
  def test_groups_of_classes(self, normalizer):
    patch = mock.patch.multiple(pallas_tpu, _RESIDENT=128 * 32, _MAX_ROWS=128)
    self.enter_context(patch)
    # The last group is padding, and ends beyond the array.
    self.assertEqual(pallas_tpu._plan(140, 5, 71), (128, 24, 3))
    args = problem(140, 5, 71, 45)
    want = plain(*args, normalizer=normalizer)
    assert_close(tpu(*args, normalizer=normalizer), want)
    score = functools.partial(pallas_tpu.score, interpret=True)
    got = jax.jit(score)(*scores_only(args))
    assert_close(got, want[1:])

  @parameterized.parameters('float32', 'bfloat16')
  @pytest.mark.slow
  def test_narrow_features(self, dtype):
    x, w, *rest = problem(70, 20, 30, dtype='bfloat16')
    args = x, w.astype(dtype), *rest
    got = tpu(*args, normalizer='joint')
    want = plain(*args, normalizer='joint')
    self.assertEqual(got.gradient.dtype, dtype)
    assert_close(got[1:], want[1:])
    assert_close(got[:1], want[:1], 3e-6 if dtype == 'float32' else 2**-7)

  def test_workers_by_vmap(self):
    sets = [problem(20, 5, 7, valid, seed=valid) for valid in (3, 7, 0)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sets)
    visit = functools.partial(
      pallas_tpu.visit, normalizer='floor', interpret=True
    )
    got = jax.jit(jax.vmap(visit))(*stacked)
    for i, args in enumerate(sets):
      want = plain(*args, normalizer='floor')
      assert_close([x[i] for x in got], want)

  @parameterized.product(
    n=(1, 140, 10**5),
    d=(1, 1152, 8192),
    k=(1, 295, 5000, 10**5),
  )
  def test_plan(self, n, d, k):
    rows, width, groups = pallas_tpu._plan(n, d, k)
    # Every class is met, and no group is empty.
    self.assertGreaterEqual(width * groups, k)
    self.assertLess(width * (groups - 1), k)
    self.assertTrue(width == k or width % 8 == 0)
    self.assertTrue(rows == n or rows % 128 == 0)
    self.assertLessEqual(max(d, 128) * width, pallas_tpu._RESIDENT)

  @parameterized.parameters(
    (8193, 'float32', 'want at most 8192 features, got 8193'),
    (3, 'float16', 'want float32 or bfloat16, got float16'),
  )
  def test_unsupported(self, d, dtype, reason):
    x, w, *_ = problem(4, d, 4, dtype=dtype)
    self.assertRegex(pallas_tpu.unsupported(x, w), reason)


def gpu_interpreter():
  """Parameters of Mosaic GPU's interpreter, which JAX 0.10 does not export."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


class GpuKernelTest(parameterized.TestCase):
  """Interpreted: all but the matrix instructions themselves."""

  def _assert_matches(self, args, normalizer):
    got = pallas_gpu.visit(
      *args, normalizer=normalizer, interpret=gpu_interpreter()
    )
    # As exact as float32, of numbers of 16 bits.
    assert_close(got, plain(*args, normalizer=normalizer))

  @pytest.mark.slow
  def test_matches_reference(self):
    self._assert_matches(problem(10, 20, 7), 'joint')

  @parameterized.parameters(('frozen', 'float32'), ('joint', 'bfloat16'))
  @pytest.mark.slow
  def test_shares_and_groups(self, normalizer, dtype):
    self.enter_context(mock.patch.object(hopper, 'MIN_TILES', 1))
    self.assertEqual(pallas_gpu._plan(70, 130, 64, 3, 3), (2, 2, 1, 3))
    # All classes of one share of the stream are padding.
    self._assert_matches(problem(70, 20, 130, 60, dtype), normalizer)

  @parameterized.product(
    n=(1, 64, 10**5), m=(1, 10**5), d=(64, 256), parts=((3, 3), (3, 1), (1, 3))
  )
  def test_plan(self, n, m, d, parts):
    groups, flight, steps, shares = pallas_gpu._plan(n, m, d, *parts)
    # Every row is met, and no share is empty.
    self.assertGreaterEqual(64 * steps * shares, m)
    self.assertLess(64 * steps * (shares - 1), m)
    rows = groups * parts[0] + flight * parts[1]
    self.assertLessEqual(2 * 64 * d * rows, pallas_gpu._SHARED_BYTES)

  @parameterized.parameters(
    (257, 'float32', 'want at most 256 features, got 257'),
    (3, 'float16', 'want float32 or bfloat16, got float16'),
    (3, 'float32', 'want a Hopper GPU'),
  )
  def test_unsupported(self, d, dtype, reason):
    if lowering.is_hopper() and 'Hopper' in reason:
      self.skipTest('There is one.')
    x, w, *_ = problem(4, d, 4, dtype=dtype)
    self.assertRegex(pallas_gpu.unsupported(x, w), reason)


class DeviceTest(parameterized.TestCase):
  """Each named implementation, compiled and run where its chip is here."""

  @parameterized.parameters(
    (*which, *case)
    for which in devices.runnable()
    for case in (
      (64, 64, 64, 'float32', 'frozen'),
      (300, 65, 130, 'float32', 'joint'),
      (130, 250, 70, 'bfloat16', 'floor'),
    )
  )
  @pytest.mark.slow
  def test_matches_float64(self, name, platform, n, d, k, dtype, normalizer):
    with jax.default_device(jax.devices(platform)[0]):
      args = problem(n, d, k, dtype=dtype)
      fn = functools.partial(
        softmax_block, normalizer=normalizer, implementation=name
      )
      got = jax.jit(fn)(*args)
      want = oracle(*args, normalizer)
      assert_close(got, want, 1e-5)
      score = functools.partial(score_block, implementation=name)
      assert_close(jax.jit(score)(*scores_only(args)), want[1:], 1e-5)


class ErrorTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('rank', {0: np.ones(4, 'f')}, r'features \(n, D\) and weights'),
    ('features', {1: np.ones((2, 5), 'f')}, r'got \(4, 3\) and \(2, 5\)'),
    ('no_classes', {1: np.ones((3, 0), 'f')}, r'got \(4, 3\) and \(3, 0\)'),
    ('integers', {0: np.ones((4, 3), 'i')}, 'features must be floats, got int'),
    ('narrow', {1: np.ones((3, 5), 'e')}, 'at least as wide as features, floa'),
    ('normalizers', {2: np.ones(3, 'f')}, r'normalizers must be float32 of sh'),
    (
      'their_type',
      {2: np.ones(4, 'e')},
      'normalizers must be float32 .* got f',
    ),
    ('labels', {3: np.ones(3, 'i')}, r'labels must be int32 of shape \(4,\)'),
    ('labels_dtype', {3: np.ones(4, 'f')}, 'labels must be int32 .* got float'),
    ('row_weights', {4: np.ones((4, 1), 'f')}, 'row_weights must be float32'),
    ('valid_shape', {5: np.ones(1, 'i')}, 'num_valid must be one int32, got'),
    ('valid_dtype', {5: np.float32(2)}, 'num_valid must be one int32, got flo'),
    ('mode', {'normalizer': 'table'}, "one of .*'joint'.*, got 'table'"),
    ('implementation', {'implementation': 'cuda'}, "'cuda' is not one of auto"),
  )
  def test_wrong_input(self, wrong, message):
    right = [
      np.ones((4, 3), 'f'),
      np.ones((3, 5), 'f'),
      np.ones(4, 'f'),
      np.ones(4, 'i'),
      np.ones(4, 'f'),
      np.int32(5),
    ]
    args = [jnp.asarray(wrong.get(i, x)) for i, x in enumerate(right)]
    settings = {key: x for key, x in wrong.items() if isinstance(key, str)}
    with self.assertRaisesRegex(ValueError, message):
      softmax_block(*args, **settings)
    if not settings.keys() & {'normalizer'} and not wrong.keys() & {2, 4}:
      with self.assertRaisesRegex(ValueError, message):
        score_block(args[0], args[1], args[3], args[5], **settings)
