"""What the specification claims of Krylov spaces; float64."""

import functools
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized

from emc2.newton import features, krylov, problem, solve

from tests.newton import oracle, trains_newton

KEY = jax.random.key(0)
OBJECTIVE = oracle.logistic(400, 60, ridge=1e-3, decay=0.3)
X = np.full(60, 0.5)
NUM_STEPS = 85


@functools.cache
def _minimum():
  return oracle.minimum(OBJECTIVE, X, 40)


@functools.cache
def _runner(subspace_dim, adaptive):
  """A compiled run from a state."""
  method = krylov.krylov_cubic_newton(subspace_dim, adaptive=adaptive)
  return jax.jit(
    lambda state, data: solve.run(KEY, method, state, data, num_steps=NUM_STEPS)
  )


def _run(data, x=X, subspace_dim=10, adaptive=True, regularization=2e-3):
  """A run as NumPy has it; called where float64 is on."""
  method = krylov.krylov_cubic_newton(
    subspace_dim, regularization=regularization
  )
  state = method.init(KEY, data, x)
  found = _runner(subspace_dim, adaptive)(state, data)
  return jax.tree.map(np.asarray, found)


class RateTest(parameterized.TestCase):
  @parameterized.parameters((10, 15), (3, 20), (1, 80))
  def test_fixed_bound(self, subspace_dim, num_steps):
    """T7 at each step, and T10."""
    best, x = _minimum()
    with jax.enable_x64(True):
      data = trains_newton.make(OBJECTIVE)
      bound = float(problem.curvature_bound(data, 'logistic'))
      state, infos = _run(data, X, subspace_dim, False, bound)
    np.testing.assert_array_equal(infos.num_trials, 1)
    np.testing.assert_array_equal(infos.regularization, bound)
    gaps = infos.objective - best
    k = np.arange(1, NUM_STEPS + 1)
    rho = np.maximum.accumulate(infos.quality)
    self.assertTrue(np.all(rho > 0))
    # Of all points seen, the first is farthest from the minimum.
    distance = np.linalg.norm(X - x)
    rate = 9 * rho * distance**2 / (4 * (k + 2))
    rate += 9 * bound * distance**3 / ((k + 1) * (k + 2))
    self.assertTrue(np.all(gaps <= rate))
    self.assertLess(gaps[num_steps - 1], 1e-15)

  def test_search(self):
    """T8, and float64 to the end."""
    with jax.enable_x64(True):
      state, infos = _run(trains_newton.make(OBJECTIVE))
    falls = -np.diff(infos.objective)
    self.assertTrue(np.all(falls >= infos.decrease[1:] - 1e-12))
    last = OBJECTIVE.gradient(state.x)
    self.assertLess(np.linalg.norm(last), 1e-10)
    self.assertEqual(state.result, 0)


class InvarianceTest(parameterized.TestCase):
  """T11."""

  def _compare(self, found, want, scale=1.0):
    early = slice(0, 6)
    np.testing.assert_allclose(
      found.objective[early], scale * want.objective[early], rtol=1e-10
    )
    np.testing.assert_allclose(
      found.regularization[early],
      scale * want.regularization[early],
      rtol=1e-10,
    )

  def test_scale_of_the_objective(self):
    with jax.enable_x64(True):
      data = trains_newton.make(OBJECTIVE)
      one, want = _run(data)
      scaled = data._replace(weights=3 * data.weights, ridge=3 * data.ridge)
      other, found = _run(scaled, regularization=6e-3)
    self._compare(found, want, 3.0)
    np.testing.assert_allclose(one.x, other.x, rtol=1e-7)

  def test_rotation(self):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 60)))[0]
    turned = OBJECTIVE._replace(features=OBJECTIVE.features @ turn)
    with jax.enable_x64(True):
      one, want = _run(trains_newton.make(OBJECTIVE))
      other, found = _run(trains_newton.make(turned), turn.T @ X)
    self._compare(found, want)
    np.testing.assert_allclose(turn.T @ one.x, other.x, atol=1e-7)


class SpaceTest(parameterized.TestCase):
  def test_whole_space_gives_the_full_step(self):
    """T2."""
    objective, x = oracle.logistic(40, 12, ridge=1e-2), np.full(12, 0.5)
    with jax.enable_x64(True):
      data = trains_newton.make(objective)
      method = krylov.krylov_cubic_newton(12)
      state = method.init(KEY, data, x)
      after, info = jax.jit(method.step)(KEY, state, data)
      after, info = jax.tree.map(np.asarray, (after, info))
    step = after.x - x
    bend = info.regularization / 2 * np.linalg.norm(step)
    rest = objective.hessian(x) @ step + objective.gradient(x) + bend * step
    self.assertLess(np.linalg.norm(rest), 1e-10)

  def test_costs(self):
    """T9: m products and a gradient a step, whatever the number of trials."""
    counts = dict.fromkeys(('hvp', 'matvec', 'rmatvec'), 0)

    def counted(name):
      product = getattr(features, name)

      def count(*args):
        jax.debug.callback(
          lambda: counts.update({name: counts[name] + 1}), ordered=False
        )
        return product(*args)

      return count

    data = trains_newton.make(oracle.logistic(40, 12, 1e-2), dtype=np.float32)
    method = krylov.krylov_cubic_newton(5, regularization=1e-9)
    with mock.patch.multiple(
      features, **{name: counted(name) for name in counts}
    ):
      run = jax.jit(
        lambda x: solve.run(
          KEY, method, method.init(KEY, data, x), data, num_steps=3
        )
      )
      _, infos = jax.block_until_ready(run(np.full(12, 20.0, np.float32)))
      jax.effects_barrier()
    self.assertGreater(infos.num_trials.sum(), 3)
    np.testing.assert_array_equal(infos.num_hvps, 5)
    self.assertEqual(counts, {'hvp': 3 * 5, 'matvec': 1, 'rmatvec': 3})
