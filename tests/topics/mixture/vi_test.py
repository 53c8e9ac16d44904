"""VI against its loop in NumPy, and over a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.topics import mixture

from tests.topics.mixture import fitting, oracle


class ViTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'float64')
  def test_matches_numpy(self, dtype):
    tolerance = 1e-9 if dtype == 'float64' else 2e-3
    with jax.enable_x64(dtype == 'float64'):
      x, z, data = fitting.problem(dtype=dtype)
      method = fitting.method('vi')
      state = method.init(jax.random.key(0), data, z)
      for _ in range(8):
        z = oracle.softmax(oracle.diagonal_scores(x, z))
        last = state
        state, info = method.step(jax.random.key(0), state, data)
        self.assertEqual(state.statistics.moments.dtype, dtype)
        np.testing.assert_allclose(
          state.statistics.count, z.sum(0), rtol=tolerance
        )
        np.testing.assert_allclose(
          state.statistics.moments[:, 2:], z.T @ x**2, rtol=tolerance
        )
      bound = fitting.elbo()(last.statistics, data)
      np.testing.assert_allclose(info.elbo, bound, rtol=tolerance / 1_000)
    self.assertEqual(state.count, 8)

  @parameterized.parameters('gaussian_diagonal', 'gaussian_full', 'multinomial')
  @pytest.mark.slow
  def test_is_monotone_and_finds_the_clusters(self, name):
    x, which = oracle.points(2, 300, 3, num_clusters=3)
    if name == 'multinomial':
      rates = np.eye(3)[which] * 30 + 1
      x = np.random.default_rng(0).poisson(rates).astype(float)
      family = mixture.multinomial(3)
    else:
      family = getattr(mixture, name)(3, degrees=4.0, scale=1.0)
    with jax.enable_x64(True):
      model = mixture.make(family, 6, concentration=0.1)
      method = mixture.vi.vi(model)
      data = jnp.asarray(x)
      state = jax.jit(method.init)(jax.random.key(1), data)
      step, bounds = jax.jit(method.step), []
      for _ in range(60):
        state, info = step(jax.random.key(0), state, data)
        bounds.append(float(info.elbo))
    self.assertGreaterEqual(np.diff(bounds).min(), -1e-12 * np.abs(bounds[-1]))
    self.assertGreater(bounds[-1], bounds[0] + 50)

  def test_permuted_components_stay_permuted(self):
    order, method = np.array([3, 0, 4, 1, 2]), fitting.method('vi')
    with jax.enable_x64(True):
      _, z, data = fitting.problem()
      states = [
        method.init(jax.random.key(0), data, z[:, o])
        for o in (np.arange(5), order)
      ]
      for _ in range(5):
        states = [method.step(jax.random.key(0), s, data)[0] for s in states]
    np.testing.assert_allclose(
      states[0].statistics.moments[order],
      states[1].statistics.moments,
      rtol=1e-9,
    )

  def test_compiles_once_and_donates(self):
    _, _, data = fitting.problem(dtype='float32')
    method = mixture.vi.vi(fitting.make_model(), row_batch=16)
    abstract = jax.eval_shape(method.init, jax.random.key(0), data)
    state = jax.jit(method.init)(jax.random.key(0), data)
    step = jax.jit(method.step, donate_argnums=1)
    self.assertEqual(fitting.types(abstract), fitting.types(state))
    for number in range(3):
      before = state
      state, _ = step(jax.random.key(number), state, data)
      self.assertTrue(before.statistics.moments.is_deleted())
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(fitting.types(abstract), fitting.types(state))

  def test_8_devices_equal_1_by_one_all_reduce(self):
    mesh = mesh_lib.make(ring=8)
    spec = jax.sharding.PartitionSpec(mesh_lib.RING)
    with jax.enable_x64(True):
      _, z, data = fitting.problem()
      split = mesh_lib.place(data, mesh, spec)
      start = fitting.method('vi').init(jax.random.key(0), data, z)
      found = []
      for given, rows in ((None, data), (mesh, split)):
        settings = {} if given is None else {'mesh': given}
        step, state = fitting.method('vi', **settings).step, start
        if given is not None:
          state = mesh_lib.place(state, mesh, mixture.vi.shardings(mesh))
        for _ in range(6):
          state, info = step(jax.random.key(0), state, rows)
        found.append((jax.device_get(state), float(info.elbo)))
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *found
      )
      text = step.lower(jax.random.key(0), state, rows).compile().as_text()
    kinds = re.findall(
      r' (all-gather|all-reduce|reduce-scatter|all-to-all|'
      r'collective-permute)(?:-start)?\(',
      text,
    )
    self.assertEqual(kinds, ['all-reduce'])

  @parameterized.named_parameters(
    ('components', dict(model=fitting.make_model(1)), 'num_components'),
    ('row_batch', dict(row_batch=0), 'row_batch'),
  )
  def test_refuses(self, given, match):
    with self.assertRaisesRegex(ValueError, f'^{match} must'):
      mixture.vi.vi(**(dict(model=fitting.make_model()) | given))

  def test_refuses_what_no_mesh_can_split(self):
    with self.assertRaisesRegex(ValueError, "^mesh must have an axis 'ring'"):
      mixture.vi.vi(fitting.make_model(), mesh=mesh_lib.make(data=8))
    method = mixture.vi.vi(fitting.make_model(), mesh=mesh_lib.make(ring=8))
    data = jnp.zeros((12, 2))
    state = jax.eval_shape(method.init, jax.random.key(0), data)
    with self.assertRaisesRegex(ValueError, '^data must have a multiple of 8'):
      method.step(jax.random.key(0), state, data)

  def test_refuses_a_bad_start(self):
    method, data = mixture.vi.vi(fitting.make_model()), jnp.zeros((4, 2))
    for z, match in (
      (np.full((4, 5), 0.2), 'apart'),
      (np.eye(5)[:4] * 1.1, 'simplex'),
      (np.eye(5), 'a row for each of 4'),
    ):
      with self.assertRaisesRegex(ValueError, match):
        method.init(jax.random.key(0), data, z)
