"""Tests of the product of a linear model's Hessian with a vector."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import lowering
from emc2.kernels.glm_hvp import (
  blocked,
  glm_hvp,
  glm_hvp_padded,
  pallas_gpu,
  pallas_tpu,
  reference,
  tpu_takes_padded,
)
from emc2.kernels.glm_hvp.specs import PADDED_SPECS, SPECS, Spec

from tests.kernels import devices

P = jax.sharding.PartitionSpec


def problem(n, d, dtype='float32', seed=0):
  """Features, curvatures of both signs and a vector."""
  rng = np.random.default_rng(seed)
  wide = 'float64' if dtype == 'float64' else 'float32'
  return (
    jnp.asarray(rng.normal(size=(n, d)), dtype),
    jnp.asarray(rng.normal(size=n), wide),
    jnp.asarray(rng.normal(size=d), wide),
  )


def sparse_problem(w, n, d, ids='uint16', values='float32', seed=0):
  """Padded rows of up to w entries, some twice; values of padding are large."""
  rng = np.random.default_rng(seed)
  places = rng.integers(0, d, (w, n))
  places[:, rng.random(n) < 0.1] = d
  places[1:][rng.random((w - 1, n)) < 0.3] = d
  if values is not None:
    values = np.where(places == d, 1e3, rng.normal(size=(w, n)))
    values = jnp.asarray(values, jnp.float32)
  return (
    jnp.asarray(places, ids),
    values,
    jnp.asarray(rng.normal(size=n), jnp.float32),
    jnp.asarray(rng.normal(size=d), jnp.float32),
  )


def oracle(features, curvature, vector):
  """Image and scores in float64."""
  a, c, v = (np.asarray(x, np.float64) for x in (features, curvature, vector))
  return a.T @ (c * (a @ v)), a @ v


def widen(ids, values, num_features):
  """The dense matrix of padded rows, by a loop, in float64."""
  w, n = ids.shape
  found = np.zeros((n, num_features + 1))
  for k in range(w):
    for i in range(n):
      found[i, int(ids[k, i])] += 1 if values is None else values[k, i]
  return found[:, :-1]


def sparse_oracle(ids, values, curvature, vector):
  values = None if values is None else np.asarray(values, np.float64)
  wide = widen(np.asarray(ids), values, len(vector))
  return oracle(wide, curvature, vector)


def assert_close(got, want, tolerance=2e-6):
  """Compares to a tolerance relative to the largest entry wanted."""
  for name, g, w in zip(('image', 'scores'), got, want, strict=True):
    bound = tolerance * max(1.0, np.abs(w).max(initial=0))
    np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=name)


def run(fn, *args, **settings):
  return jax.jit(functools.partial(fn, **settings))(*args)


@jax.jit
def plain(features, curvature, vector):
  scores = features @ vector
  return features.T @ (curvature * scores), scores


def error(got, want):
  return np.linalg.norm(np.asarray(got, np.float64) - want)


def small_tiles(self):
  """Lets every shape that fits have several tiles of the TPU and the CPU."""
  for module, sizes in (
    (pallas_tpu, dict(_TILE_BYTES=1, _TURNED_BYTES=1, _ROWS=128)),
    (blocked, dict(_CACHE_BYTES=4096)),
  ):
    self.enter_context(mock.patch.multiple(module, **sizes))


class DenseTest(parameterized.TestCase):
  """All that runs here; kernels are interpreted in classes of their own."""

  @parameterized.product(
    shape=((1, 1), (300, 9), (1000, 30)),
    dtype=('float32', 'bfloat16'),
    implementation=('xla', 'blocked'),
  )
  def test_matches_float64(self, shape, dtype, implementation):
    small_tiles(self)
    args = problem(*shape, dtype)
    if blocked.dense_unsupported(*args) and implementation == 'blocked':
      with self.assertRaises(NotImplementedError):
        glm_hvp(*args, implementation=implementation)
      return
    got = run(glm_hvp, *args, implementation=implementation)
    assert_close(got, oracle(*args))
    self.assertEqual({x.dtype.name for x in got}, {'float32'})

  @parameterized.parameters('xla', 'blocked')
  def test_float64(self, implementation):
    small_tiles(self)
    with jax.enable_x64(True):
      args = problem(300, 7, 'float64')
      got = run(glm_hvp, *args, implementation=implementation)
      assert_close(got, oracle(*args), 1e-14)

  def test_a_cpu_takes_tiles_where_they_pay(self):
    for shape, reason in (
      ((49_749, 300), None),
      ((8_192, 4_096), None),
      ((1_440, 65), 'want at least 4032 rows of 65 features, got 1440'),
      ((9_000, 10_000), 'want at most 8192 features of float32, got 10000'),
    ):
      got = blocked.dense_unsupported(*Spec(*shape, 'float32').args())
      if reason is None:
        self.assertIsNone(got)
      else:
        self.assertIn(reason, got)

  def test_auto_takes_the_tiles(self):
    args = SPECS['w8a'].args()
    text = lambda **how: (
      jax.jit(functools.partial(glm_hvp, **how)).lower(*args).as_text()
    )
    with mock.patch.object(lowering, 'is_whole', return_value=True):
      self.assertIn('stablehlo.while', text())
      self.assertNotIn('stablehlo.while', text(implementation='xla'))
    # An array that may be split over these devices is not cut.
    self.assertNotIn('stablehlo.while', text())

  def test_curvature_of_zero_is_no_hessian(self):
    features, curvature, vector = problem(60, 5)
    got = glm_hvp(features, 0 * curvature, vector)
    np.testing.assert_array_equal(got.image, 0)
    want = oracle(features, curvature, vector)[1]
    np.testing.assert_allclose(got.scores, want, atol=1e-5)

  def test_tiles_err_no_more_than_plain_jax(self):
    args = [jnp.abs(x) for x in problem(20_000, 20)]
    want = oracle(*args)
    got = run(glm_hvp, *args, implementation='blocked')
    for mine, other, w in zip(got, plain(*args), want, strict=True):
      self.assertLess(error(mine, w), 2 * error(other, w))


class VmapTest(parameterized.TestCase):
  @parameterized.product(
    axes=((0, 0, 0), (None, 0, 0), (0, None, None)),
    implementation=('auto', 'blocked'),
  )
  def test_each_equals_its_own(self, axes, implementation):
    small_tiles(self)
    sets = [problem(300, 7, seed=seed) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*sets, strict=True)]
    args = [x if a == 0 else x[0] for x, a in zip(stacked, axes, strict=True)]
    fn = functools.partial(glm_hvp, implementation=implementation)
    got = jax.jit(jax.vmap(fn, axes))(*args)
    for i in range(3):
      one = [x if a is None else x[i] for x, a in zip(args, axes, strict=True)]
      assert_close([x[i] for x in got], oracle(*one))

  def test_vectors_that_share_features_make_products_of_matrices(self):
    features, curvature, vector = SPECS['embeddings'].args()
    vectors = jax.ShapeDtypeStruct((10, *vector.shape), vector.dtype)
    fn = jax.vmap(glm_hvp, (None, None, 0))
    with mock.patch.object(lowering, 'is_whole', return_value=True):
      for platform in ('cpu', 'tpu', 'cuda'):
        text = lowering.lower_for(
          fn, features, curvature, vectors, platform=platform
        ).as_text()
        self.assertEqual(text.count('stablehlo.dot_general'), 2)
        self.assertNotIn('custom_call', text)

  @parameterized.parameters('tpu', 'cuda')
  def test_problems_share_a_kernel(self, platform):
    args = [
      jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
      for x in SPECS['embeddings'].args()
    ]
    with mock.patch.object(lowering, 'is_whole', return_value=True):
      text = lowering.lower_for(
        jax.vmap(glm_hvp), *args, platform=platform
      ).as_text()
    self.assertEqual(text.count(TARGETS[platform]), 1)
    self.assertNotIn('stablehlo.while', text)

  def test_kernel_of_many(self):
    small_tiles(self)
    fn = functools.partial(pallas_tpu.dense, interpret=True)
    sets = [problem(200, 20, seed=seed) for seed in range(2)]
    got = jax.jit(jax.vmap(fn))(*map(jnp.stack, zip(*sets, strict=True)))
    for i, args in enumerate(sets):
      assert_close([x[i] for x in got], oracle(*args))

  def test_padded(self):
    sets = [sparse_problem(3, 50, 9, seed=seed) for seed in range(3)]
    stacked = [jnp.stack(x) for x in zip(*sets, strict=True)]
    got = jax.jit(jax.vmap(glm_hvp_padded))(*stacked)
    for i, args in enumerate(sets):
      assert_close([x[i] for x in got], sparse_oracle(*args))


class PaddedTest(parameterized.TestCase):
  @parameterized.product(
    shape=((1, 1, 1), (5, 300, 70)),
    ids=('uint16', 'int32'),
    values=('float32', None),
  )
  def test_matches_float64(self, shape, ids, values):
    args = sparse_problem(*shape, ids, values)
    got = run(glm_hvp_padded, *args)
    assert_close(got, sparse_oracle(*args))

  def test_narrow_values(self):
    ids, values, *rest = sparse_problem(3, 50, 9)
    args = ids, values.astype(jnp.bfloat16), *rest
    got = run(glm_hvp_padded, *args)
    assert_close(got, sparse_oracle(*args))
    self.assertEqual(got.image.dtype, jnp.float32)

  def test_float64(self):
    with jax.enable_x64(True):
      args = sparse_problem(3, 50, 9)
      wide = (args[0], *(x.astype(jnp.float64) for x in args[1:]))
      got = run(glm_hvp_padded, *wide)
      assert_close(got, sparse_oracle(*args), 1e-14)
      got = run(glm_hvp_padded, wide[0], None, *wide[2:])
      assert_close(got, sparse_oracle(args[0], None, *args[2:]), 1e-14)

  @pytest.mark.slow
  def test_errs_no_more_than_plain_jax(self):
    args = sparse_problem(4, 3000, 12)
    want = sparse_oracle(*args)
    dense = jnp.asarray(widen(*map(np.asarray, args[:2]), 12), jnp.float32)
    others = plain(dense, *args[2:])
    for fn in (
      glm_hvp_padded,
      functools.partial(pallas_tpu.padded, interpret=True),
    ):
      for mine, other, w in zip(run(fn, *args), others, want, strict=True):
        self.assertLess(error(mine, w), 2 * error(other, w))


class ShardMapTest(parameterized.TestCase):
  @parameterized.parameters((True, 'auto'), (False, 'auto'), (True, 'xla'))
  def test_eight_devices_equal_one(self, check_vma, implementation):
    small_tiles(self)
    args, sparse = problem(1600, 7), sparse_problem(3, 1600, 7)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ('data',), axis_types=(auto,))
    rows, columns = P('data'), P(None, 'data')

    @jax.jit
    @jax.shard_map(
      mesh=mesh,
      in_specs=((rows, rows, P()), (columns, columns, rows, P())),
      out_specs=((P(), rows), (P(), rows)),
      check_vma=check_vma,
    )
    def local(dense, sparse):
      found = (
        glm_hvp(*dense, implementation=implementation),
        glm_hvp_padded(*sparse, implementation=implementation),
      )
      return tuple((jax.lax.psum(x.image, 'data'), x.scores) for x in found)

    got, got_sparse = local(args, sparse)
    assert_close(got, oracle(*args))
    assert_close(got_sparse, sparse_oracle(*sparse))

  @parameterized.parameters(
    ('tpu', True, 2), ('tpu', False, 2), ('cuda', True, 1), ('cuda', False, 1)
  )
  def test_kernels_lower_inside(self, platform, check_vma, count):
    chip = jax.sharding.AbstractDevice(lowering.KINDS[platform], 1, platform)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh(
      (8,), ('data',), axis_types=(auto,), abstract_device=chip
    )
    rows, columns = P('data'), P(None, 'data')
    local = jax.shard_map(
      lambda dense, sparse: (
        tuple(glm_hvp(*dense)),
        tuple(glm_hvp_padded(*sparse)),
      ),
      mesh=mesh,
      in_specs=((rows, rows, P()), (columns, columns, rows, P())),
      out_specs=P('data'),
      check_vma=check_vma,
    )
    args = jax.eval_shape(lambda: (problem(800, 64), sparse_problem(3, 80, 9)))
    with jax.sharding.use_abstract_mesh(mesh):
      traced = jax.jit(local).trace(*args)
      text = traced.lower(lowering_platforms=(platform,)).as_text()
    self.assertEqual(text.count(TARGETS[platform]), count)
    self.assertNotIn('all_gather', text)
    self.assertNotIn('all_reduce', text)


class TpuKernelTest(parameterized.TestCase):
  """Interpreted: what lies beyond the ends of an array is NaN."""

  @parameterized.parameters(
    (1, 1, 'float32', False),
    (300, 130, 'float32', True),  # One part with a tile less than the other.
    (384, 65, 'bfloat16', True),
    (384, 128, 'float32', False),  # And all tiles full.
    (140, 256, 'bfloat16', False),
  )
  def test_dense(self, n, d, dtype, turned):
    small_tiles(self)
    self.assertEqual(pallas_tpu._is_turned(n, d), turned)
    args = problem(n, d, dtype)
    got = run(pallas_tpu.dense, *args, interpret=True)
    assert_close(got, oracle(*args))
    assert_close(got, run(reference.dense, *args))

  @parameterized.parameters(
    (5, 300, 70, 'uint16', 'float32'),
    (1, 128, 5, 'uint32', None),
  )
  def test_padded(self, w, n, d, ids, values):
    small_tiles(self)
    args = sparse_problem(w, n, d, ids, values)
    got = run(pallas_tpu.padded, *args, interpret=True)
    assert_close(got, sparse_oracle(*args))
    assert_close(got, run(reference.padded, *args))

  @pytest.mark.slow
  def test_errs_no_more_than_plain_jax(self):
    for d in (128, 20):  # Both of the two kernels.
      args = [jnp.abs(x) for x in problem(3000, d)]
      want = oracle(*args)
      got = run(pallas_tpu.dense, *args, interpret=True)
      for mine, other, w in zip(got, plain(*args), want, strict=True):
        # The interpreter sums 128 numbers one by one, which no chip does.
        self.assertLess(error(mine, w), 4 * error(other, w))

  @parameterized.product(
    n=(1, 128, 10**5), d=(1, 300, 4096, 8192), dtype=('float32', 'bfloat16')
  )
  def test_plan(self, n, d, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    rows, parts, steps = pallas_tpu._plan(n, 2**22 // (d * itemsize))
    # Every row is met, and no part is empty.
    self.assertGreaterEqual(rows * parts * steps, n)
    self.assertLess(rows * steps * (parts - 1), n)
    self.assertEqual(rows % 128, 0)
    if rows > 128:
      self.assertLessEqual(rows * d * itemsize, 2**22)

  def test_unsupported(self):
    for shape, dtype, reason in (
      ((4, 8193), 'float32', 'want at most 8192 features of float32, got 8193'),
      ((4, 16385), 'bfloat16', 'want at most 16384 features of bfloat16'),
      ((4, 3), 'float16', 'want float32 or bfloat16, got float16'),
    ):
      args = Spec(*shape, dtype).args()
      self.assertIn(reason, pallas_tpu.dense_unsupported(*args))
    for shape, ids, reason in (
      ((1, 2, 4097), 'uint16', 'want at most 4096 features, got 4097'),
      ((257, 2, 4), 'uint16', 'want at most 256 entries of a row, got 257'),
      ((1, 2, 4), 'uint8', 'want ids of uint16, int32 or uint32, got uint8'),
    ):
      ids, values, _, vector = sparse_problem(*shape, ids)
      reasons = pallas_tpu.padded_unsupported(ids, values, vector)
      self.assertIn(reason, reasons)
      self.assertFalse(tpu_takes_padded(ids, values, vector))
    wide = jax.ShapeDtypeStruct((4,), 'float64')
    reason = pallas_tpu.padded_unsupported(ids.astype('int32'), wide, wide)
    self.assertIn('want float32 or bfloat16, got float64', reason)


def gpu_interpreter():
  """Parameters of Mosaic GPU's interpreter, which JAX 0.10 does not export."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


class GpuKernelTest(parameterized.TestCase):
  """Interpreted: all but the copy engine and the layouts of registers."""

  @parameterized.parameters(
    (5, 72, 'bfloat16', 1),  # All chunks and all tiles overlap.
    (40, 36, 'float32', 2),  # The last block has a tile less.
  )
  def test_matches_float64(self, n, d, dtype, blocks):
    patch = mock.patch.multiple(pallas_gpu, _BLOCKS=1, _TILE_BYTES=1)
    self.enter_context(patch)
    self.enter_context(
      mock.patch.object(pallas_gpu.hopper, 'PROCESSORS', blocks)
    )
    args = problem(n, d, dtype)
    got = pallas_gpu.dense(*args, interpret=gpu_interpreter())
    assert_close(got, oracle(*args))
    assert_close(got, run(reference.dense, *args))

  @parameterized.product(n=(4, 10**5), d=(32, 40, 300, 4096), itemsize=(2, 4))
  def test_plan(self, n, d, itemsize):
    plan = pallas_gpu._plan(n, d, itemsize)
    width, chunks, group, rows, stages = plan
    self.assertEqual((width % 32, group % 4, rows % group), (0, 0, 0))
    self.assertBetween(width * chunks, d, d + width - 1)
    self.assertBetween(rows, 4, min(n, 256))
    shared = stages * rows * chunks * width * itemsize + 4 * chunks * width
    self.assertLessEqual(shared, pallas_gpu._SHARED_BYTES)


TARGETS = {'tpu': '@tpu_custom_call', 'cuda': '@mosaic_gpu'}


class LoweringTest(parameterized.TestCase):
  """What the real shapes become on chips that are not here."""

  def setUp(self):
    super().setUp()
    self.enter_context(
      mock.patch.object(lowering, 'is_whole', return_value=True)
    )

  def _text(self, name, platform, kind=None, fn=glm_hvp, **settings):
    specs = SPECS if fn is glm_hvp else PADDED_SPECS
    args = specs[name].args() if isinstance(name, str) else name
    fn = functools.partial(fn, **settings)
    return lowering.lower_for(fn, *args, platform=platform, kind=kind).as_text()

  def _assert_one(self, text, platform, name):
    calls = [line for line in text.splitlines() if TARGETS[platform] in line]
    self.assertLen(calls, 1)
    self.assertIn(name, calls[0])

  @parameterized.parameters(
    *(('tpu', name) for name in sorted(SPECS)),
    *(('cuda', name) for name in ('w8a', 'embeddings_bfloat16', 'wide')),
  )
  def test_dense(self, platform, name):
    text = self._text(name, platform)
    self._assert_one(text, platform, 'glm_hvp')
    # A kernel takes the features as they are, or turned, as XLA has them then.
    n, d, _ = SPECS[name]
    made = [x for x in text.splitlines() if f'-> tensor<{n}x{d}x' in x]
    self.assertEmpty([x for x in made if 'func' not in x])

  @parameterized.parameters(*sorted(PADDED_SPECS))
  def test_padded(self, name):
    text = self._text(name, 'tpu', fn=glm_hvp_padded)
    self._assert_one(text, 'tpu', 'glm_hvp_padded')

  @parameterized.parameters(
    ('digits', 'cuda', None),  # 65 features are no whole 16 bytes.
    ('w8a', 'cuda', 'NVIDIA A100-SXM4-80GB'),
    ('w8a', 'cpu', None),
  )
  def test_auto_takes_no_kernel(self, name, platform, kind):
    text = self._text(name, platform, kind)
    self.assertNotIn('custom_call', text)

  def test_padded_takes_no_kernel(self):
    wide = sparse_problem(1, 4, 5000)
    for text in (
      self._text('w8a', 'cuda', fn=glm_hvp_padded),
      self._text('w8a', 'cpu', fn=glm_hvp_padded),
      self._text(wide, 'tpu', fn=glm_hvp_padded),
    ):
      self.assertNotIn('custom_call', text)
      self.assertIn('stablehlo.scatter', text)

  @parameterized.product(platform=('tpu', 'cuda'), fn=(glm_hvp, glm_hvp_padded))
  def test_named_xla_is_no_kernel(self, platform, fn):
    text = self._text('w8a', platform, fn=fn, implementation='xla')
    self.assertNotIn(TARGETS[platform], text)

  def test_split_features_are_left_to_xla(self):
    with mock.patch.object(lowering, 'is_whole', return_value=False):
      for fn in (glm_hvp, glm_hvp_padded):
        self.assertNotIn(TARGETS['tpu'], self._text('w8a', 'tpu', fn=fn))

  @parameterized.parameters(
    ((8, 30), 'float32', None, 'want 32 to 4096 features, got 30'),
    ((8, 5000), 'float32', None, 'want 32 to 4096 features, got 5000'),
    ((3, 64), 'float32', None, 'want at least 4 rows, got 3'),
    ((8, 65), 'float32', None, 'want features by 4 as float32, got 65'),
    ((8, 300), 'bfloat16', None, 'want features by 8 as bfloat16, got 300'),
    ((8, 64), 'float16', None, 'want float32 or bfloat16, got float16'),
    ((8, 64), 'float32', 'NVIDIA A100-SXM4-80GB', 'want a Hopper GPU'),
  )
  def test_what_a_gpu_refuses(self, shape, dtype, kind, message):
    args = problem(*shape, dtype)
    with self.assertRaisesRegex(NotImplementedError, f'pallas_gpu: {message}'):
      self._text(args, 'cuda', kind, implementation='pallas_gpu')
    self.assertNotIn('@mosaic_gpu', self._text(args, 'cuda', kind))

  def test_what_others_refuse(self):
    for name in ('pallas_tpu', 'blocked'):
      with self.assertRaisesRegex(NotImplementedError, f'{name}: want at most'):
        glm_hvp(*problem(1, 20_000), implementation=name)
    args = sparse_problem(1, 4, 5000)
    with self.assertRaisesRegex(NotImplementedError, 'pallas_tpu: want at mos'):
      glm_hvp_padded(*args, implementation='pallas_tpu')
    with self.assertRaisesRegex(NotImplementedError, 'pallas_gpu: want dense'):
      glm_hvp_padded(*args, implementation='pallas_gpu')


class DeviceTest(parameterized.TestCase):
  """Each named implementation, compiled and run where its chip is here."""

  @parameterized.parameters(
    (*which, *shape)
    for which in devices.runnable()
    for shape in (
      (5, 64, 'float32'),
      (5000, 300, 'float32'),
      (3000, 768, 'bfloat16'),
      (500, 4096, 'float32'),
    )
  )
  def test_dense(self, name, platform, n, d, dtype):
    with jax.default_device(jax.devices(platform)[0]):
      args = problem(n, d, dtype)
      got = run(glm_hvp, *args, implementation=name)
      assert_close(got, oracle(*args))

  @parameterized.parameters(
    (*which, *shape)
    for which in devices.runnable()
    for shape in ((3, 700, 300, None), (16, 700, 4000, 'float32'))
  )
  def test_padded(self, name, platform, w, n, d, values):
    if name == 'pallas_gpu':
      name = 'xla'
    with jax.default_device(jax.devices(platform)[0]):
      args = sparse_problem(w, n, d, values=values)
      got = run(glm_hvp_padded, *args, implementation=name)
      assert_close(got, sparse_oracle(*args))


class ErrorTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('rank', dict(features=np.ones(4, 'f')), r'got float32 of shape \(4,\)'),
    ('empty', dict(features=np.ones((0, 3), 'f')), r'of shape \(0, 3\)'),
    ('integers', dict(features=np.ones((4, 3), 'i')), 'got int32 of shape'),
    ('rows', dict(curvature=np.ones(3, 'f')), r'curvature must be .* \(4,\)'),
    ('narrow', dict(curvature=np.ones(4, 'e')), 'be float32 .* got float16'),
    ('columns', dict(vector=np.ones(4, 'f')), r'vector must be .* \(3,\), got'),
    ('matrix', dict(vector=np.ones((3, 2), 'f')), r'got float32 of shape \(3'),
    ('name', dict(implementation='cuda'), "'cuda' is not one of auto, xla, bl"),
  )
  def test_dense(self, wrong, message):
    given = dict(
      features=np.ones((4, 3), 'f'),
      curvature=np.ones(4, 'f'),
      vector=np.ones(3, 'f'),
    )
    with self.assertRaisesRegex(ValueError, message):
      glm_hvp(**(given | wrong))

  @parameterized.named_parameters(
    ('rank', dict(ids=np.ones(4, 'i')), r'ids must be .* of shape \(4,\)'),
    ('empty', dict(ids=np.ones((0, 4), 'i')), r'ids must be .* shape \(0, 4\)'),
    ('floats', dict(ids=np.ones((2, 4), 'f')), 'ids must be .* got float32'),
    ('narrow', dict(vector=np.ones(300, 'f')), 'the id 300 of padding, got ui'),
    ('values', dict(values=np.ones((2, 3), 'f')), r'values must .* \(2, 3\)'),
    ('counts', dict(values=np.ones((2, 4), 'i')), 'values must .* got int32'),
    ('rows', dict(curvature=np.ones(3, 'f')), r'curvature must be .* \(4,\)'),
    ('matrix', dict(vector=np.ones((3, 2), 'f')), r'vector must be .* \(3, 2'),
    ('integers', dict(vector=np.ones(3, 'i')), 'vector must be float32 .* got'),
    ('name', dict(implementation='cuda'), "'cuda' is not one of auto, xla, pa"),
  )
  def test_padded(self, wrong, message):
    given = dict(
      ids=np.ones((2, 4), 'uint8'),
      values=None,
      curvature=np.ones(4, 'f'),
      vector=np.ones(3, 'f'),
    )
    with self.assertRaisesRegex(ValueError, message):
      glm_hvp_padded(**(given | wrong))
