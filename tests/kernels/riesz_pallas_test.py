"""Tests of the kernels of the Riesz energies, interpreted and lowered."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import lowering
from emc2.kernels.riesz import pair, pallas_gpu, pallas_tpu, riesz
from emc2.kernels.riesz.specs import SPECS

P = jax.sharding.PartitionSpec

# A TPU has no float64.
FOR_TPU = [name for name in sorted(SPECS) if 'float64' not in name]


def oracle(rows, columns, exponent):
  """Potential and gradient in float64, one row at a time."""
  rows = np.asarray(rows, np.float64)
  columns = None if columns is None else np.asarray(columns, np.float64)
  potential, gradient = np.zeros(rows.shape[:-1]), np.zeros(rows.shape)
  for *batch, i in np.ndindex(rows.shape[:-1]):
    batch = tuple(batch)
    if columns is None:
      others = np.delete(rows[batch], i, axis=0)
    else:
      others = columns[batch]
    apart = rows[*batch, i] - others
    r = np.sqrt((apart * apart).sum(axis=-1))[:, None]
    if exponent == 0:
      potential[*batch, i] = -np.log(r).sum()
      gradient[*batch, i] = -(apart / r**2).sum(axis=0)
    else:
      potential[*batch, i] = (r**-exponent).sum()
      force = exponent * apart * r ** (-exponent - 2)
      gradient[*batch, i] = -force.sum(axis=0)
  return potential, gradient


def problem(n, m=None, k=3, batch=(), dtype='float32', seed=0):
  """Points on a sphere, and m others or None."""
  rng = np.random.default_rng(seed)

  def draw(size):
    x = rng.normal(size=(*batch, size, k))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.asarray(x, dtype)

  return draw(n), None if m is None else draw(m)


def assert_close(got, want, tolerance):
  """Compares to a tolerance relative to the largest entry wanted."""
  for name, g, w in zip(('potential', 'gradient'), got, want, strict=True):
    g = np.asarray(g, np.float64)
    bound = tolerance * np.abs(w).max()
    np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=name)


def gpu_interpreter():
  """Parameters of Mosaic GPU's interpreter, which JAX 0.10 does not export."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


def run(module, rows, columns, exponent):
  """The kernel of `module`, interpreted."""
  interpret = True if module is pallas_tpu else gpu_interpreter()
  fn = functools.partial(module.forward, exponent=exponent, interpret=interpret)
  return jax.jit(fn)(rows, columns)


class PairTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 7.0, 12.0, 12.5)
  def test_matches_powers(self, exponent):
    r = np.linspace(0.1, 2, 50)
    inverse = jnp.asarray(1 / r, jnp.float32)
    r2 = jnp.asarray(r * r, jnp.float32)
    potential, weight = pair.terms(r2, inverse, exponent)
    want = r**-exponent if exponent else -np.log(r)
    # An error of r2 counts s / 2 times, and again in the powers.
    tolerance = 4e-7 * (1 + exponent)
    np.testing.assert_allclose(
      potential, want, rtol=tolerance, atol=0 if exponent else 1e-7
    )
    np.testing.assert_allclose(weight, r ** (-exponent - 2), rtol=tolerance)

  @parameterized.parameters((0.0, 1), (1.0, 0), (6.0, 0), (0.5, 1))
  def test_whole_exponents_take_no_logarithm(self, exponent, count):
    r2 = jnp.ones(3)
    text = str(
      jax.make_jaxpr(functools.partial(pair.terms, exponent=exponent))(r2, r2)
    )
    self.assertEqual(text.count(' log '), count)


class TpuKernelTest(parameterized.TestCase):
  """Interpreted."""

  def setUp(self):
    super().setUp()
    # Loops not unrolled compile in a quarter of the time.
    self.enter_context(mock.patch.object(pallas_tpu, '_UNROLL', 1))

  @parameterized.named_parameters(
    ('tiles', 600, None, 3, (), 1.0),
    ('visitors', 130, 700, 3, (), 1.0),
    ('logarithmic', 300, None, 3, (), 0.0),
    ('products_in_tiles', 600, None, 24, (), 1.0),
  )
  def test_matches_float64(self, n, m, k, batch, exponent):
    self._check_matches_float64(n, m, k, batch, exponent)

  @parameterized.named_parameters(
    ('two_points', 2, None, 3, (), 1.0),
    ('chains', 70, None, 3, (2, 3), 1.0),
    ('few_visitors', 520, 3, 3, (2,), 1.0),
    ('fractional', 40, 30, 2, (), 2.5),
    ('last_by_differences', 130, None, 8, (), 1.0),
    ('first_by_products', 130, None, 9, (), 1.0),
    ('products_of_visitors', 30, 550, 24, (2,), 3.0),
    ('logarithmic_products', 300, None, 12, (), 0.0),
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n, m, k, batch, exponent):
    self._check_matches_float64(n, m, k, batch, exponent)

  def _check_matches_float64(self, n, m, k, batch, exponent):
    rows, columns = problem(n, m, k, batch, seed=n)
    got = run(pallas_tpu, rows, columns, exponent)
    assert_close(got, oracle(rows, columns, exponent), 4e-6)

  def test_close_points_keep_their_digits(self):
    # Inner products would lose 4 of 7 digits of the distance.
    rows, _ = problem(1)
    columns = rows + jnp.asarray([[1e-2, 2e-2, 0], [0, 0, 1e-2]])
    got = run(pallas_tpu, rows, columns, 1.0)
    assert_close(got, oracle(rows, columns, 1.0), 1e-6)

  @parameterized.parameters(3, 12)
  def test_rows_given_as_columns_meet_themselves(self, k):
    rows, _ = problem(5, k=k)
    potential, _ = run(pallas_tpu, rows, rows, 1.0)
    self.assertGreater(np.asarray(potential).min(), 1e3)

  @pytest.mark.slow
  def test_bfloat16_is_computed_in_float32(self):
    rows, columns = problem(40, 30, dtype='bfloat16')
    got = run(pallas_tpu, rows, columns, 1.0)
    for g in got:
      self.assertEqual(g.dtype, jnp.bfloat16)
    assert_close(got, oracle(rows, columns, 1.0), 2**-8)

  def test_tiles_do_not_matter(self):
    rows, _ = problem(300)
    want = run(pallas_tpu, rows, None, 1.0)
    self.enter_context(mock.patch.object(pallas_tpu, '_HELD', 128))
    self.enter_context(mock.patch.object(pallas_tpu, '_STREAMED', 128))
    self.enter_context(mock.patch.object(pallas_tpu, '_UNROLL', 4))
    got = run(pallas_tpu, rows, None, 1.0)
    assert_close(got, [np.asarray(w, np.float64) for w in want], 1e-6)

  @parameterized.named_parameters(
    ('float64', np.zeros((4, 3)), 'want float32 or bfloat16, got float64'),
    ('float16', np.zeros((4, 3), 'e'), 'want float32 or bfloat16, got float16'),
    ('dim', np.zeros((4, 513), 'f'), 'want at most 512 dimensions, got 513'),
  )
  def test_unsupported(self, rows, reason):
    self.assertIn(reason, pallas_tpu.unsupported(rows, None, 1.0))


class GpuKernelTest(parameterized.TestCase):
  """Interpreted."""

  @parameterized.named_parameters(
    ('parts', 140, None, 3, (), 1.0), ('logarithmic', 40, None, 4, (), 0.0)
  )
  def test_matches_float64(self, n, m, k, batch, exponent):
    self._check_matches_float64(n, m, k, batch, exponent)

  @parameterized.named_parameters(
    ('two_points', 2, None, 3, (), 1.0),
    ('chains', 70, None, 3, (2, 1), 2.0),
    ('visitors', 20, 150, 3, (), 1.0),
    ('fractional', 30, 40, 2, (2,), 0.5),
    ('many_dimensions', 30, None, 24, (), 3.0),
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n, m, k, batch, exponent):
    self._check_matches_float64(n, m, k, batch, exponent)

  def _check_matches_float64(self, n, m, k, batch, exponent):
    rows, columns = problem(n, m, k, batch, seed=n)
    got = run(pallas_gpu, rows, columns, exponent)
    assert_close(got, oracle(rows, columns, exponent), 2e-6)

  def test_float64(self):
    self._check_float64(30, 0.0)

  @parameterized.parameters((None, 1.0), (30, 0.5))
  @pytest.mark.slow
  def test_float64_elsewhere(self, m, exponent):
    self._check_float64(m, exponent)

  def _check_float64(self, m, exponent):
    # For all threads: the interpreter calls back from others than this.
    jax.config.update('jax_enable_x64', True)
    self.addCleanup(jax.config.update, 'jax_enable_x64', False)
    rows, columns = problem(40, m, dtype='float64')
    got = run(pallas_gpu, rows, columns, exponent)
    self.assertEqual(got[0].dtype, jnp.float64)
    assert_close(got, oracle(rows, columns, exponent), 1e-13)

  @pytest.mark.slow
  def test_bfloat16_is_computed_in_float32(self):
    rows, columns = problem(40, 30, dtype='bfloat16')
    got = run(pallas_gpu, rows, columns, 1.0)
    for g in got:
      self.assertEqual(g.dtype, jnp.bfloat16)
    assert_close(got, oracle(rows, columns, 1.0), 2**-8)

  def test_rows_given_as_columns_meet_themselves(self):
    rows, _ = problem(5)
    potential, _ = run(pallas_gpu, rows, rows, 1.0)
    self.assertGreater(np.asarray(potential).min(), 1e3)

  def test_plan_does_not_matter(self):
    self._check_plan_does_not_matter(
      {'_PROCESSORS': 0, '_BLOCKS': 1, '_TILE': 64}
    )

  @parameterized.named_parameters(
    # More rows to a thread, and more than one tile to a part.
    ('rows', {'_PROCESSORS': 0}),
    ('steps', {'_BLOCKS': 1, '_TILE': 64}),
  )
  @pytest.mark.slow
  def test_plan_does_not_matter_elsewhere(self, constants):
    self._check_plan_does_not_matter(constants)

  def _check_plan_does_not_matter(self, constants):
    rows, _ = problem(140)
    plan = lambda: pallas_gpu._plan(1, 140, 140, 3, 4)
    before = plan()
    for name, value in constants.items():
      self.enter_context(mock.patch.object(pallas_gpu, name, value))
    self.assertNotEqual(plan(), before)
    got = run(pallas_gpu, rows, None, 1.0)
    assert_close(got, oracle(rows, None, 1.0), 2e-6)

  @parameterized.product(
    n=(2, 470, 4000, 100_000), m=(1, 129, 4000, 100_000), k=(2, 3, 8, 24)
  )
  def test_plan(self, n, m, k):
    for batch, itemsize in ((1, 4), (64, 4), (3, 8)):
      rows, tile, steps, parts = pallas_gpu._plan(batch, n, m, k, itemsize)
      # Every column is met, and no part is empty.
      self.assertGreaterEqual(tile * steps * parts, m)
      self.assertLess(tile * steps * (parts - 1), m)
      words = rows * (3 * k + 2) * itemsize // 4
      self.assertTrue(rows == 1 or words <= pallas_gpu._REGISTERS)
      # What parts write is of the order of the points, or of the chip.
      blocks = batch * -(-n // (128 * rows))
      self.assertLessEqual((parts - 1) * blocks, pallas_gpu._BLOCKS)

  @parameterized.named_parameters(
    ('dtype', np.zeros((4, 3), 'e'), 'bfloat16 or float64, got float16'),
    ('dim', np.zeros((4, 25), 'f'), 'want at most 24 dimensions, got 25'),
    ('chip', np.zeros((4, 3), 'f'), 'want a Hopper GPU'),
  )
  def test_unsupported(self, rows, reason):
    self.assertIn(reason, pallas_gpu.unsupported(rows, None, 1.0))


class LoweringTest(parameterized.TestCase):
  """What the real shapes become on chips that are not here."""

  def _text(self, name, platform, kind=None, **settings):
    spec = SPECS[name]
    self.enterContext(jax.enable_x64(spec.dtype == 'float64'))
    fn = functools.partial(riesz, exponent=spec.exponent, **settings)
    rows, columns = spec.args()
    args = (rows,) if columns is None else (rows, columns)
    return lowering.lower_for(fn, *args, platform=platform, kind=kind).as_text()

  @parameterized.parameters(*FOR_TPU)
  def test_tpu(self, name):
    text = self._text(name, 'tpu')
    self.assertEqual(text.count('@tpu_custom_call'), 1)
    self.assertEqual(text.count('kernel_name = "riesz"'), 1)

  @parameterized.parameters('thomson_470', 'thomson_470_float64')
  def test_gpu(self, name):
    self._check_gpu(name)

  @parameterized.parameters(*sorted(SPECS))
  @pytest.mark.slow
  def test_gpu_at_all_shapes(self, name):
    self._check_gpu(name)

  def _check_gpu(self, name):
    text = self._text(name, 'cuda', 'NVIDIA H200')
    calls = [line for line in text.splitlines() if '@mosaic_gpu' in line]
    self.assertLen(calls, 1)
    self.assertIn('riesz', calls[0])

  @parameterized.named_parameters(
    ('cpu', 'thomson_470', 'cpu', None),
    ('older_gpu', 'thomson_470', 'cuda', 'NVIDIA A100-SXM4-80GB'),
    ('tpu_without_float64', 'thomson_470_float64', 'tpu', None),
  )
  def test_auto_takes_the_reference(self, name, platform, kind):
    text = self._text(name, platform, kind)
    self.assertNotIn('custom_call @mosaic_gpu', text)
    self.assertNotIn('tpu_custom_call', text)

  @parameterized.parameters(
    ('pallas_gpu', 'thomson_470', 'cuda', 'NVIDIA A100', 'want a Hopper'),
    ('pallas_tpu', 'thomson_470_float64', 'tpu', None, 'got float64'),
  )
  def test_named_kernel_raises(self, name, spec, platform, kind, message):
    with self.assertRaisesRegex(NotImplementedError, f'{name}: .*{message}'):
      self._text(spec, platform, kind, implementation=name)

  @parameterized.parameters('tpu', 'cuda')
  def test_seeds_share_one_kernel(self, platform):
    rows = jax.ShapeDtypeStruct((5, 20, 3), jnp.float32)
    fn = jax.vmap(functools.partial(riesz, exponent=1.0))
    text = lowering.lower_for(fn, rows, platform=platform).as_text()
    target = '@tpu_custom_call' if platform == 'tpu' else '@mosaic_gpu'
    self.assertEqual(text.count(target), 1)

  @parameterized.product(
    platform=('tpu', 'cuda'), check_vma=(False, True), among=(False, True)
  )
  def test_lowers_inside_shard_map(self, platform, check_vma, among):
    chip = jax.sharding.AbstractDevice(lowering.KINDS[platform], 1, platform)
    mesh = jax.sharding.AbstractMesh(
      (8,),
      ('data',),
      axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=chip,
    )
    fn = lambda x, y: riesz(x, None if among else y, exponent=1.0)
    sharded = jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(P('data'), P()),
      out_specs=P('data'),
      check_vma=check_vma,
    )
    points = jax.ShapeDtypeStruct((800, 3), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh):
      trace = jax.jit(sharded).trace(points, points)
      text = trace.lower(lowering_platforms=(platform,)).as_text()
    target = '@tpu_custom_call' if platform == 'tpu' else '@mosaic_gpu'
    self.assertEqual(text.count(target), 1)


def runnable():
  """The kernels whose chips this machine has, with their platforms."""
  found = []
  for module, platform in ((pallas_tpu, 'tpu'), (pallas_gpu, 'cuda')):
    try:
      jax.devices(platform)
    except RuntimeError:
      continue
    if platform == 'tpu' or lowering.is_hopper():
      found.append((module.__name__.split('.')[-1], platform))
  return found


class DeviceTest(parameterized.TestCase):
  """Each kernel, compiled and run where its chip is here."""

  def test_kernels(self):
    for name, platform in runnable():
      for n, m, k, exponent in (
        (470, None, 3, 1.0),
        (4000, None, 3, 1.0),
        (300, 700, 3, 0.5),
        (240, None, 8, 0.0),
        (700, None, 24, 2.0),
      ):
        with self.subTest(f'{name}_{n}_{m}_{k}_{exponent}'):
          sets = problem(n, m, k)
          with jax.default_device(jax.devices(platform)[0]):
            sets = jax.device_put(sets)
            got = riesz(*sets, exponent=exponent, implementation=name)
          assert_close(got, oracle(*sets, exponent), 4e-6)
