"""The bound and the update of a subset, against oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.topics import mixture
from emc2.topics.mixture import model as model_lib

from tests.topics.mixture import fitting, oracle


@functools.cache
def _elbo_at():
  return jax.jit(functools.partial(mixture.elbo_at, fitting.make_model(5)))


class AscendTest(parameterized.TestCase):
  def test_theorem_1(self):
    rng = np.random.default_rng(0)
    u, z = rng.normal(size=7), rng.dirichlet(np.ones(7))
    subset = [1, 4, 6]
    mass = z[subset].sum()
    with jax.enable_x64(True):
      column = lambda x: jnp.asarray(x[subset][:, None])
      best = np.asarray(model_lib.ascend(column(z), column(u)))[:, 0]
    value = lambda z: np.sum(z * u[subset] - z * np.log(z), axis=-1)
    feasible = mass * rng.dirichlet(np.ones(3), 80_000)
    self.assertAlmostEqual(best.sum(), mass, delta=1e-15)
    self.assertGreater(value(best), value(feasible).max())
    # Near it as well, where a wrong point would be beaten.
    near = best * np.exp(0.01 * rng.normal(size=(10_000, 3)))
    near *= mass / near.sum(1, keepdims=True)
    self.assertGreater(value(best), value(near).max())
    lse = np.log(np.exp(u[subset]).sum())
    self.assertAlmostEqual(
      value(best), mass * (lse - np.log(mass)), delta=1e-12
    )

  def test_one_component_alone_stays(self):
    rng = np.random.default_rng(0)
    z = jnp.float32(rng.uniform(size=(1, 1_000)))
    u = jnp.float32(50 * rng.normal(size=(1, 1_000)))
    np.testing.assert_array_equal(model_lib.ascend(z, u), z)

  def test_no_mass_stays(self):
    found = model_lib.ascend(jnp.zeros((3, 2)), jnp.full((3, 2), 1e30))
    np.testing.assert_array_equal(found, np.zeros((3, 2)))


class BoundTest(parameterized.TestCase):
  def test_matches_the_specification(self):
    x, z = oracle.points(0, 64, 2)[0], oracle.starts(1, 64, 5)
    z[3] = [0, 0, 1, 0, 0]
    with jax.enable_x64(True):
      found = _elbo_at()(jnp.asarray(x), jnp.asarray(z))
    np.testing.assert_allclose(found, oracle.diagonal_elbo(x, z), rtol=1e-12)

  def test_best_responsibilities(self):
    """The bound with the best z is the one at that z, written out."""
    x, z = oracle.points(0, 64, 2)[0], oracle.starts(1, 64, 5)
    u = oracle.diagonal_scores(x, z)
    best = oracle.softmax(u)
    want = np.sum(best * (u - np.log(best)))
    with np.errstate(divide='ignore'):
      want += oracle.diagonal_elbo(x, z) - np.sum(z * (u - np.log(z)))
    with jax.enable_x64(True):
      data = jnp.asarray(x)
      statistics = fitting.summarize()(data, jnp.asarray(z))
      found = fitting.elbo()(statistics, data)
      found_z = fitting.responsibilities()(statistics, data)
      later = _elbo_at()(data, found_z)
    np.testing.assert_allclose(found, want, rtol=1e-12)
    np.testing.assert_allclose(found_z, best, rtol=1e-9, atol=1e-300)
    self.assertGreater(float(found), oracle.diagonal_elbo(x, z))
    self.assertGreater(float(later), float(found))

  def test_rows_at_a_time(self):
    self._check_rows_at_a_time(7)

  @parameterized.parameters(16, 100)
  @pytest.mark.slow
  def test_rows_at_a_time_elsewhere(self, row_batch):
    self._check_rows_at_a_time(row_batch)

  def _check_rows_at_a_time(self, row_batch):
    model = fitting.make_model(5)

    @jax.jit
    def parts(data, z, statistics):
      settings = dict(row_batch=row_batch)
      found = model_lib.summarize(model, data, z, **settings)
      return found, mixture.elbo(model, statistics, data, **settings)

    with jax.enable_x64(True):
      _, z, data = fitting.problem()
      whole = fitting.summarize()(data, jnp.asarray(z))
      found, bound = parts(data, jnp.asarray(z), whole)
      for a, b in zip(whole, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
      want = fitting.elbo()(whole, data)
      np.testing.assert_allclose(bound, want, rtol=1e-13)

  def test_float32_sum_over_chunks_is_compensated(self):
    x, z = oracle.points(0, 20_000, 2)[0] * 10, oracle.starts(1, 20_000, 2)
    model = fitting.make_model(2)

    @jax.jit
    def fn(data, z):
      statistics = model_lib.summarize(model, data, z)
      return mixture.elbo(model, statistics, data, row_batch=8)

    bound = []
    for dtype in ('float32', 'float64'):
      with jax.enable_x64(dtype == 'float64'):
        bound.append(float(fn(jnp.asarray(x, dtype), jnp.asarray(z, dtype))))
    np.testing.assert_allclose(bound[0], bound[1], rtol=2e-6)


class RefusesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('sum', [[0.5, 0.6], [0.3, 0.7]], 'simplex'),
    ('negative', [[1.5, -0.5], [0.3, 0.7]], 'simplex'),
    ('nan', [[np.nan, 0.5], [0.3, 0.7]], 'simplex'),
    ('symmetric', [[0.5, 0.5], [0.5, 0.5]], 'tell the components apart'),
    ('shape', [[1.0], [1.0]], 'shape'),
  )
  def test_start(self, z, match):
    with self.assertRaisesRegex(ValueError, match):
      model_lib.check_responsibilities(np.array(z), fitting.make_model(2))

  def test_drawn_starts_pass(self):
    draw = jax.jit(model_lib.draw_responsibilities, static_argnums=(1, 2))
    z = np.asarray(draw(jax.random.key(0), 500, 64))
    model_lib.check_responsibilities(z, fitting.make_model(64))
    self.assertAlmostEqual(float(np.var(z)), 63 / (64**2 * 65), delta=2e-5)

  @parameterized.parameters(
    (dict(num_components=0), 'num_components'),
    (dict(num_components=2, concentration=0.0), 'concentration'),
  )
  def test_model(self, given, match):
    with self.assertRaisesRegex(ValueError, f'^{match} must'):
      mixture.make(mixture.multinomial(3), **given)
