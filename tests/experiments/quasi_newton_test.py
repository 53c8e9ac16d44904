"""L-BFGS on a convex problem with a known end."""

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.experiments import quasi_newton


def problem():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(40, 6)) * np.logspace(0, 1, 6)
  target = rng.normal(size=40)
  best = np.linalg.lstsq(rows, target)[0]
  return rows.astype(np.float32), target.astype(np.float32), best


def objective(x, rows, target):
  return jnp.mean((rows @ x - target) ** 2)


class LbfgsTest(parameterized.TestCase):
  @parameterized.parameters(1, 5)
  def test_finds_the_least_squares(self, steps_per_call):
    rows, target, best = problem()
    init, step = quasi_newton.lbfgs(
      objective, memory=6, steps_per_call=steps_per_call
    )
    x = jnp.zeros(6)
    state = init(x, rows, target)
    values = []
    for _ in range(30 // steps_per_call):
      x, state, found = step(x, state, rows, target)
      self.assertEqual(found.shape, (steps_per_call,))
      values += found.tolist()
    np.testing.assert_allclose(x, best, atol=2e-4)
    self.assertLess(max(np.diff(values)), 1e-6)  # It never rises.
    np.testing.assert_allclose(values[-1], objective(x, rows, target))

  def test_counts_evaluations(self):
    rows, target, _ = problem()
    calls = []

    def counted(x, rows, target):
      calls.append(None)
      return objective(x, rows, target)

    init, step = quasi_newton.lbfgs(counted)
    x = jnp.zeros(6)
    state = init(x, rows, target)
    x, state, _ = step(x, state, rows, target)
    traced = len(calls)
    for _ in range(5):
      x, state, _ = step(x, state, rows, target)
    self.assertLen(calls, traced)  # All later steps are the same program.

  @parameterized.parameters(dict(memory=0), dict(steps_per_call=0))
  def test_bad_input(self, **settings):
    with self.assertRaisesRegex(ValueError, 'must be at least 1, got 0'):
      quasi_newton.lbfgs(objective, **settings)
