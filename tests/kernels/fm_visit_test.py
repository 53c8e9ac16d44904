"""Tests of both halves of a visit of a factorisation machine."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import fm_visit, hopper, lowering
from emc2.kernels.fm_visit import pallas_gpu, pallas_tpu
from emc2.kernels.fm_visit.specs import SPECS

from tests.kernels import devices

P = jax.sharding.PartitionSpec


def problem(n, d, k, density=0.3, seed=0):
  """Entries, slopes, sums, linear weights, squares and factors."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) * (rng.random((n, d)) < density)
  draw = lambda *shape: rng.normal(size=shape).astype('f')
  x[: n // 2, d // 2 :] = 0
  factors = draw(d, k)
  return (
    jnp.asarray(x, jnp.float32),
    draw(n),
    draw(n, k),
    draw(d),
    np.sum(factors**2, axis=1),
    factors,
  )


def oracle(x, slopes, sums, linear, squares, factors):
  """Both halves in float64."""
  x, slopes, sums, linear, squares, factors = (
    np.asarray(z, np.float64)
    for z in (x, slopes, sums, linear, squares, factors)
  )
  pulled = x.T @ (slopes[:, None] * sums)
  pulled -= factors * ((x * x).T @ slopes)[:, None]
  rest = x @ linear - 0.5 * (x * x) @ squares
  return x.T @ slopes, pulled, x @ factors, rest


def run(module_or_api, cell, by_row, args, **settings):
  """Both halves by some implementation."""
  _, slopes, sums, linear, squares, factors = args
  first = jax.jit(functools.partial(module_or_api.gradient, **settings))
  if module_or_api is fm_visit:
    settings['num_rows'] = len(slopes)
  second = jax.jit(functools.partial(module_or_api.accumulate, **settings))
  return (
    *first(cell, slopes, sums, factors),
    *second(by_row, linear, squares, factors),
  )


def bags(x, size, direct):
  """Bags of the rows of x, by loops."""
  ids, values, owners = [], [], []
  for owner, row in enumerate(np.asarray(x)):
    found = np.flatnonzero(row)
    for start in range(0, max(len(found), direct), size):
      part = found[start : start + size]
      padding = size - len(part)
      ids.append(np.pad(part, (0, padding)))
      values.append(np.pad(row[part], (0, padding)))
      owners.append(owner)
  owners = [] if direct else owners
  return fm_visit.Bags(
    jnp.asarray(ids, jnp.int32).T,
    jnp.asarray(values, jnp.float32).T,
    jnp.asarray(owners, jnp.int32),
  )


def assert_close(got, want, tolerance=2e-6):
  """Compares to a tolerance relative to the largest entry wanted."""
  for g, w in zip(got, want, strict=True):
    bound = tolerance * max(1.0, np.abs(w).max(initial=0))
    np.testing.assert_allclose(g, w, rtol=0, atol=bound)


class ReferenceTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, 1), (40, 30, 5), (30, 40, 0), (64, 7, 20))
  def test_dense_matches_float64(self, n, d, k):
    args = problem(n, d, k)
    assert_close(run(fm_visit, args[0], args[0], args), oracle(*args))

  @parameterized.parameters((40, 30, 5, 4, False), (40, 30, 5, 30, True))
  def test_bags_match_float64(self, n, d, k, size, direct):
    self._check_bags_match_float64(n, d, k, size, direct)

  @pytest.mark.slow
  def test_bags_match_float64_elsewhere(self):
    self._check_bags_match_float64(30, 40, 0, 2, False)

  def _check_bags_match_float64(self, n, d, k, size, direct):
    args = problem(n, d, k)
    size = max(n, d) if direct else size
    cells = (bags(x, size, direct) for x in (args[0].T, args[0]))
    assert_close(run(fm_visit, *cells, args), oracle(*args))

  def test_padding_may_name_any_row(self):
    args = problem(6, 5, 2)
    cell = bags(args[0].T, 4, False)
    moved = cell._replace(ids=jnp.where(cell.values == 0, 3, cell.ids))
    got, want = (
      fm_visit.gradient(c, *args[1:3], args[5]) for c in (moved, cell)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def test_counts(self):
    x = problem(40, 30, 1)[0]
    want = np.count_nonzero(x, axis=0)
    for cell in (x, bags(x.T, 4, False), bags(x.T, 40, True)):
      np.testing.assert_array_equal(fm_visit.count(cell, 30), want)

  def test_tables_are_stored_before_they_are_read(self):
    # What makes a table stays out of the loops that gather from it.
    args = problem(400, 30, 8)
    cell = bags(args[0].T, 4, False)

    def fn(cell, slopes, sums):
      return fm_visit.gradient(cell, jnp.tanh(slopes), sums, args[5])

    text = jax.jit(fn).lower(cell, args[1], args[2]).compile().as_text()
    fused = [x for x in text.split('\n}\n') if '%fused' in x.split('{')[0]]
    self.assertTrue(any('gather(' in x for x in fused))
    for computation in fused:
      self.assertFalse('tanh(' in computation and 'gather(' in computation)

  def test_many_by_vmap(self):
    sets = [problem(20, 15, 4, seed=seed) for seed in range(3)]
    x, slopes, sums, linear, squares, factors = (
      jnp.stack(z) for z in zip(*sets, strict=True)
    )
    got = (
      *jax.vmap(fm_visit.gradient)(x, slopes, sums, factors),
      *jax.vmap(functools.partial(fm_visit.accumulate, num_rows=20))(
        x, linear, squares, factors
      ),
    )
    for i, args in enumerate(sets):
      assert_close([z[i] for z in got], oracle(*args))


class TpuKernelTest(parameterized.TestCase):
  """Interpreted: what lies beyond the ends of an array is NaN."""

  @parameterized.parameters((70, 200, 5), (300, 130, 0))
  def test_matches_float64(self, n, d, k):
    self._check_matches_float64(n, d, k)

  @parameterized.parameters((1, 1, 1), (300, 600, 130))
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n, d, k):
    self._check_matches_float64(n, d, k)

  def _check_matches_float64(self, n, d, k):
    args = problem(n, d, k)
    got = run(pallas_tpu, args[0], args[0], args, interpret=True)
    assert_close(got, oracle(*args))

  def test_empty_tiles_are_skipped(self):
    patch = mock.patch.multiple(pallas_tpu, _ROWS=8, _FEATURES=128)
    self.enter_context(patch)
    x, *rest, factors = problem(16, 256, 3)
    args = x, *rest, factors
    bad = factors.copy()
    x = np.array(x)
    x[:, 128:] = 0
    bad[128:] = np.nan
    got = pallas_tpu.accumulate(jnp.asarray(x), *rest[2:], bad, interpret=True)
    want = oracle(x, *args[1:])[2:]
    assert_close(got, want)

  def test_unsupported(self):
    for args, reason in (
      (problem(4, 4, 512), 'rank of at most 511, got 512'),
      ([jnp.asarray(z, 'bfloat16') for z in problem(4, 4, 2)], 'want float32'),
    ):
      self.assertRegex(pallas_tpu.unsupported(args[0], *args[3:]), reason)


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
    self.enter_context(mock.patch.object(hopper, 'MIN_TILES', 1))
    args = problem(70, 90, 6)
    self.assertEqual(hopper.shares(2, 90), (1, 2))
    _, slopes, sums, linear, squares, factors = args
    how = dict(interpret=gpu_interpreter())
    got = (
      *pallas_gpu.gradient(args[0], slopes, sums, factors, **how),
      *pallas_gpu.accumulate(args[0], linear, squares, factors, **how),
    )
    assert_close(got, oracle(*args))

  @parameterized.product(n=(1, 64, 10**5), m=(1, 10**5))
  def test_plan(self, n, m):
    steps, parts = hopper.shares(-(-n // hopper.HELD), m)
    # Every column is met, and no part is empty.
    self.assertGreaterEqual(64 * steps * parts, m)
    self.assertLess(64 * steps * (parts - 1), m)


TARGETS = {'tpu': '@tpu_custom_call', 'cuda': '@mosaic_gpu'}


class LoweringTest(parameterized.TestCase):
  """What the real shapes become on chips that are not here."""

  def _text(self, half, name, platform, kind=None, **settings):
    fn, spec = getattr(fm_visit, half), SPECS[name]
    args = getattr(spec, f'{half}_args')()
    if half == 'accumulate':
      settings['num_rows'] = spec.num_rows
    fn = functools.partial(fn, **settings)
    return lowering.lower_for(fn, *args, platform=platform, kind=kind).as_text()

  @parameterized.product(
    half=('gradient', 'accumulate'), platform=('tpu', 'cuda')
  )
  def test_kernels(self, half, platform):
    self._check_kernels(half, 'synthetic', platform)

  @parameterized.product(
    half=('gradient', 'accumulate'),
    name=('embeddings', 'wide_block'),
    platform=('tpu', 'cuda'),
  )
  @pytest.mark.slow
  def test_kernels_elsewhere(self, half, name, platform):
    self._check_kernels(half, name, platform)

  def _check_kernels(self, half, name, platform):
    text = self._text(half, name, platform)
    calls = [x for x in text.splitlines() if TARGETS[platform] in x]
    self.assertLen(calls, 1)
    self.assertIn(f'fm_visit_{half}', calls[0])

  @parameterized.parameters(('cpu', None), ('cuda', 'NVIDIA A100-SXM4-80GB'))
  def test_auto_takes_the_reference(self, platform, kind):
    text = self._text('gradient', 'synthetic', platform, kind)
    self.assertNotIn('custom_call @mosaic_gpu', text)
    self.assertNotIn('tpu_custom_call', text)

  @parameterized.parameters('tpu', 'cuda')
  def test_named_xla_is_no_kernel(self, platform):
    text = self._text('gradient', 'synthetic', platform, implementation='xla')
    self.assertNotIn(TARGETS[platform], text)

  @parameterized.parameters(('tpu', True), ('tpu', False), ('cuda', True))
  def test_kernels_lower_in_shard_map(self, platform, check_vma):
    chip = jax.sharding.AbstractDevice(lowering.KINDS[platform], 1, platform)
    mesh = jax.sharding.AbstractMesh(
      (8,),
      ('ring',),
      axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=chip,
    )

    def both(x, slopes, sums, linear, squares, factors):
      return (
        *fm_visit.gradient(x, slopes, sums, factors),
        *fm_visit.accumulate(x, linear, squares, factors, len(x)),
      )

    local = jax.shard_map(
      both,
      mesh=mesh,
      in_specs=(P('ring'), P('ring'), P('ring'), P(), P(), P()),
      out_specs=P('ring'),
      check_vma=check_vma,
    )
    args = jax.eval_shape(lambda: tuple(map(jnp.asarray, problem(80, 30, 4))))
    with jax.sharding.use_abstract_mesh(mesh):
      traced = jax.jit(local).trace(*args)
      text = traced.lower(lowering_platforms=(platform,)).as_text()
    self.assertEqual(text.count(TARGETS[platform]), 2)


class ErrorTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('cell', dict(cell=np.ones((4, 2), 'f')), r'cell must be \(4, 3\)'),
    ('sums', dict(sums=np.ones((5, 2), 'f')), r'sums must be \(4, K\)'),
    ('rank', dict(sums=np.ones((4, 1), 'f')), 'the rank 2 of factors, got 1'),
    ('name', dict(implementation='cuda'), "'cuda' is not one of"),
  )
  def test_gradient(self, wrong, message):
    given = dict(
      cell=np.ones((4, 3), 'f'),
      multipliers=np.ones(4, 'f'),
      sums=np.ones((4, 2), 'f'),
      factors=np.ones((3, 2), 'f'),
    )
    with self.assertRaisesRegex(ValueError, message):
      fm_visit.gradient(**(given | wrong))

  @parameterized.named_parameters(
    ('cell', dict(cell=np.ones((4, 2), 'f')), r'cell must be \(4, 3\)'),
    ('linear', dict(linear=np.ones(2, 'f')), r'must be \(3,\)'),
    ('squares', dict(squares=np.ones((3, 1), 'f')), r'must be \(3,\)'),
    ('name', dict(implementation='cuda'), "'cuda' is not one of"),
  )
  def test_accumulate(self, wrong, message):
    given = dict(
      cell=np.ones((4, 3), 'f'),
      linear=np.ones(3, 'f'),
      squares=np.ones(3, 'f'),
      factors=np.ones((3, 2), 'f'),
      num_rows=4,
    )
    with self.assertRaisesRegex(ValueError, message):
      fm_visit.accumulate(**(given | wrong))

  def test_bags_have_no_kernel(self):
    args = problem(4, 4, 2)
    cell = bags(args[0], 2, False)
    for name, error in (
      ('pallas_tpu', NotImplementedError),
      ('pallas_gpu', NotImplementedError),
      ('cuda', ValueError),
    ):
      with self.assertRaisesRegex(error, name):
        fm_visit.gradient(cell, *args[1:3], args[5], implementation=name)
      with self.assertRaisesRegex(error, name):
        fm_visit.accumulate(cell, *args[3:], 4, implementation=name)


class DeviceTest(parameterized.TestCase):
  """Each named implementation, compiled and run where its chip is here."""

  @parameterized.parameters(
    (*which, *shape)
    for which in devices.runnable()
    for shape in ((64, 64, 16), (300, 700, 100))
  )
  def test_matches_float64(self, name, platform, n, d, k):
    with jax.default_device(jax.devices(platform)[0]):
      args = [jnp.asarray(z) for z in problem(n, d, k)]
      got = run(fm_visit, args[0], args[0], args, implementation=name)
      assert_close(got, oracle(*args), 4e-6)
