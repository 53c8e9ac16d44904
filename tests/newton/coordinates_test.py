"""Steps on random coordinates, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.newton import coordinates, regularization

from tests.newton import oracle, trains_newton

NUM_STEPS = 6


class OracleTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_step_by_step(self, sparse):
    objective, x = trains_newton.sparse_logistic(60, 12), np.full(12, 0.5)
    key = jax.random.key(3)
    now = lambda k: jax.random.fold_in(key, k)
    draw = lambda k: coordinates.draw(now(k), 4, 12)
    want = oracle.coordinates(objective, x, NUM_STEPS, draw)
    with jax.enable_x64(True):
      data = trains_newton.make(objective, sparse)
      method = coordinates.subspace_cubic_newton(4)
      state, infos = trains_newton.run(method, data, x, NUM_STEPS, key)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    close(state.x, want.xs[-1])
    close(infos.objective, want.values[1:])
    falls = -np.diff(infos.objective)
    self.assertTrue(np.all(falls >= infos.decrease[1:] - 1e-12))
    close(infos.decrease, want.decreases)
    close(infos.regularization, want.regularizations)
    np.testing.assert_array_equal(infos.num_trials, want.trials)
    drawn = [
      np.linalg.norm(objective.gradient(x)[np.asarray(draw(k))])
      for k, x in enumerate(want.xs[:-1])
    ]
    close(infos.gradient_norm, drawn)

  def test_tolerance_is_of_the_whole_gradient(self):
    objective, x = trains_newton.sparse_logistic(60, 12), np.full(12, 0.5)
    first = np.linalg.norm(objective.gradient(x))
    data = trains_newton.make(objective, dtype=np.float32)
    method = coordinates.subspace_cubic_newton(4, gradient_tol=first / 20)
    state, infos = trains_newton.run(method, data, x, 200)
    self.assertEqual(state.result, regularization.Result.CONVERGED)
    np.testing.assert_allclose(infos.gradient_norm[0], first, rtol=1e-5)
    last = np.linalg.norm(objective.gradient(np.float64(state.x)))
    self.assertLess(last, first / 20 * 1.001)
    self.assertEqual(infos.num_trials[state.count], 0)


class DrawTest(parameterized.TestCase):
  def test_all_sets_alike(self):
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = jax.vmap(lambda key: coordinates.draw(key, 3, 5))(keys)
    drawn = np.sort(drawn, axis=1)
    sets = list(itertools.combinations(range(5), 3))
    counts = [np.all(drawn == one, axis=1).sum() for one in sets]
    self.assertEqual(sum(counts), 10_000)
    # Ten sets: 1000 each, with a standard deviation of 30.
    self.assertLess(np.abs(np.array(counts) - 1000).max(), 120)

  def test_all(self):
    drawn = coordinates.draw(jax.random.key(1), 7, 7)
    np.testing.assert_array_equal(jnp.sort(drawn), np.arange(7))
