"""How runs start, stop and go on, in float32 unless it says otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.newton import krylov, problem, regularization, solve

from tests.newton import oracle, trains_newton

Result = regularization.Result
KEY = jax.random.key(0)
OBJECTIVE = oracle.logistic(50, 12, ridge=1e-2)
X = np.full(12, 0.5)


def _data(**changes):
  return trains_newton.make(OBJECTIVE._replace(**changes), dtype=np.float32)


@functools.cache
def _runner():
  """A compiled run of 60 steps, from a state, to a tolerance."""

  def run(state, data, gradient_tol):
    method = krylov.krylov_cubic_newton(6, gradient_tol=gradient_tol)
    return solve.run(KEY, method, state, data, num_steps=60)

  return jax.jit(run)


@functools.cache
def _hopeless_step():
  """A compiled step that ends after three trials of a tiny M."""
  method = krylov.krylov_cubic_newton(6, max_trials=3, regularization=1e-9)
  return jax.jit(method.step)


def _start(data, x, regularization=2e-3):
  method = krylov.krylov_cubic_newton(6, regularization=regularization)
  return method.init(KEY, data, x)


class ResultTest(parameterized.TestCase):
  def test_converged(self):
    data = _data()
    state, infos = _runner()(_start(data, X), data, 1e-3)
    self.assertEqual(state.result, Result.CONVERGED)
    count = int(state.count)
    self.assertLess(count, 40)
    self.assertTrue(np.all(infos.gradient_norm[:count] > 1e-3))
    last = np.linalg.norm(OBJECTIVE.gradient(np.float64(state.x)))
    self.assertLess(last, 1.001e-3)
    # The step that stopped has looked at the gradient and done no more.
    np.testing.assert_allclose(infos.gradient_norm[count], last, rtol=1e-3)
    self.assertEqual(infos.objective[count], state.objective)
    self.assertEqual(infos.num_hvps[count] + infos.num_trials[count], 0)
    for leaf in infos:
      self.assertFalse(np.any(leaf[count + 1 :]))

  @parameterized.parameters(
    (0.0, 0.0, Result.CONVERGED, 0),
    (1.0, np.nan, Result.NON_FINITE, 0),
    (1.0, 1e30, Result.NON_FINITE, 0),
    (1.0, 20.0, Result.SEARCH_FAILED, 3),
  )
  def test_stays(self, scale, x, result, num_trials):
    data = _data(features=scale * OBJECTIVE.features)
    state = _start(data, np.full(12, x), 1e-9)
    after, info = _hopeless_step()(KEY, state, data)
    self.assertEqual(after.result, result)
    self.assertEqual(info.num_trials, num_trials)
    same = after._replace(result=state.result)
    jax.tree.map(np.testing.assert_array_equal, same, state)

  def test_goes_on_after_a_stop(self):
    data = _data()
    stuck, _ = _hopeless_step()(KEY, _start(data, 40 * X, 1e-9), data)
    self.assertEqual(stuck.result, Result.SEARCH_FAILED)
    state, _ = _runner()(stuck, data, 1e-3)
    self.assertEqual(state.result, Result.CONVERGED)
    self.assertGreater(state.count, 0)


class RunTest(parameterized.TestCase):
  def test_equals_steps_of_keys_by_count(self):
    method = trains_newton.METHODS['coordinates']()
    key, data = jax.random.key(7), _data()
    state, step = method.init(key, data, X), jax.jit(method.step)
    seen = []
    for number in range(4):
      state, info = step(jax.random.fold_in(key, number), state, data)
      seen.append((state, info))
    start = seen[0][0]
    whole, infos = jax.jit(
      lambda state: solve.run(key, method, state, data, num_steps=3)
    )(start)
    jax.tree.map(np.testing.assert_array_equal, whole, state)
    for place, (_, info) in enumerate(seen[1:]):
      now = jax.tree.map(lambda x, place=place: x[place], infos)
      jax.tree.map(np.testing.assert_array_equal, info, now)

  def test_batched(self):
    """Lanes stop at different steps, and change no more."""
    objectives = [oracle.logistic(50, 12, 0.01 * 4**i, i) for i in range(5)]
    each = [trains_newton.make(one, dtype=np.float32) for one in objectives]
    starts = [_start(data, X) for data in each]
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    over = jax.jit(jax.vmap(_runner(), in_axes=(0, 0, None)))
    found = over(stack(starts), stack(each), 1e-3)
    for i, (start, data) in enumerate(zip(starts, each, strict=True)):
      want = _runner()(start, data, 1e-3)
      lane = jax.tree.map(lambda x, i=i: x[i], found)
      close = lambda x, y: np.testing.assert_allclose(x, y, 1e-3, 1e-5)
      jax.tree.map(close, lane, want)
    self.assertGreater(len(set(found[0].count.tolist())), 1)

  def test_refuses(self):
    data = _data()
    method = krylov.krylov_cubic_newton(4)
    with self.assertRaisesRegex(ValueError, 'num_steps'):
      solve.run(KEY, method, _start(data, X), data, num_steps=0)


class OptionsTest(parameterized.TestCase):
  def test_refresh_ends_drift(self):
    data = _data()
    method = krylov.krylov_cubic_newton(4, refresh_every=2)
    state, step = _start(data, X), jax.jit(method.step)
    state = state._replace(scores=state.scores + 0.1)
    for count, is_exact in ((0, False), (1, True)):
      # An odd number of finished steps: the next one refreshes.
      state = state._replace(count=jnp.int32(count))
      after, _ = step(KEY, state, data)
      drift = after.scores - data.features.array @ after.x
      self.assertEqual(bool(np.abs(drift).max() < 1e-5), is_exact)
      each = jax.nn.softplus((1 - 2 * data.labels) * after.scores)
      want = data.weights @ each + 0.005 * after.x @ after.x
      np.testing.assert_allclose(after.objective, want, rtol=1e-5)

  def test_conventions(self):
    data = _data()
    sixth = krylov.krylov_cubic_newton(4, regularization=2e-3)
    third = krylov.krylov_cubic_newton(
      4, regularization=1e-3, convention='third'
    )
    one, other = sixth.init(KEY, data, X), third.init(KEY, data, X)
    self.assertEqual(one.regularization, other.regularization)
    self.assertAlmostEqual(float(one.regularization), 2e-3, delta=1e-9)

  def test_regularization_by_default_is_a_bound(self):
    data = _data()
    method = krylov.krylov_cubic_newton(4, regularization=None, adaptive=False)
    state = method.init(KEY, data, X)
    want = problem.curvature_bound(data, 'logistic')
    np.testing.assert_allclose(state.regularization, want, rtol=1e-6)
    after, info = jax.jit(method.step)(KEY, state, data)
    self.assertEqual(info.regularization, state.regularization)
    # A bound never needs a second trial.
    self.assertLessEqual(after.objective, state.objective - info.decrease)


class PrecisionTest(parameterized.TestCase):
  def test_float32_ends_at_its_noise(self):
    data = _data(ridge=1e-4)
    state, infos = _runner()(_start(data, X), data, 0.0)
    self.assertEqual(state.result, Result.OK)
    self.assertLess(np.max(infos.gradient_norm[30:]), 1e-6)
    self.assertLess(np.max(infos.regularization[10:]), 1e-2)
    value, x = oracle.minimum(OBJECTIVE._replace(ridge=1e-4), X, 40)
    self.assertAlmostEqual(float(state.objective), value, delta=1e-6)
    np.testing.assert_allclose(state.x, x, atol=1e-2)
