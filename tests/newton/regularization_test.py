"""The search for M: conventions, trials, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import mesh
from emc2.linalg import cubic
from emc2.newton import regularization

VALUES = np.array([0.0, 0.1, 1.0, 2.0], np.float32)
COEFFICIENTS = np.array([0.3, -0.2, 1.0, -0.7], np.float32)


def _spectrum(scale=1.0):
  return cubic.Spectrum(
    jnp.asarray(VALUES), jnp.eye(4), scale * jnp.asarray(COEFFICIENTS)
  )


def _excess_fn(lipschitz, slack=0.0, end=np.inf, beyond=0.0):
  """Of an objective that is its model at M = `lipschitz`, up to an end."""

  def excess_fn(step):
    norm = jnp.linalg.norm(step)
    bend = step @ (VALUES * step) / 2 + lipschitz / 6 * norm**3
    return jnp.where(norm < end, bend, beyond), jnp.float32(slack)

  return excess_fn


@functools.partial(
  jax.jit, static_argnames=['shrink', 'max_trials', 'adaptive']
)
def _jitted(start, scale, numbers, **options):
  return regularization.search(
    _spectrum(scale), start, _excess_fn(*numbers), **options
  )


def _search(start, *numbers, scale=1.0, **options):
  numbers = np.float32([*numbers, *(0.0, np.inf, 0.0)[len(numbers) - 1 :]])
  found = _jitted(start, scale, numbers, **options)
  return jax.tree.map(np.asarray, found)


@jax.jit
def _solve(m):
  found = cubic.solve_cubic(_spectrum(), m)
  return found, found.decrease


class ConventionTest(parameterized.TestCase):
  def test_third_is_half_of_sixth(self):
    self.assertEqual(regularization.to_sixth(3.0, 'sixth'), 3.0)
    self.assertEqual(regularization.to_sixth(3.0, 'third'), 6.0)

  @parameterized.parameters('sixth', 'third')
  def test_one_dimension(self, convention):
    """The closed form of a step along the gradient, in either."""
    a, gamma, given = 0.5, 2.0, 0.3
    m = regularization.to_sixth(given, convention)
    model = cubic.Spectrum(jnp.array([a]), jnp.eye(1), jnp.array([gamma]))
    found = jax.jit(cubic.solve_cubic)(model, m)
    four, two = {'sixth': (2, 1), 'third': (4, 2)}[convention]
    root = np.sqrt(a**2 + four * given * gamma)
    eta = (root - a) / (two * given * gamma)
    np.testing.assert_allclose(found.step, [-eta * gamma], rtol=1e-6)

  def test_refuses_others(self):
    with self.assertRaisesRegex(ValueError, 'convention must be one of'):
      regularization.to_sixth(1.0, 'half')

  def test_codes(self):
    codes = [(code.name, int(code)) for code in regularization.Result]
    names = ['OK', 'CONVERGED', 'SEARCH_FAILED', 'NON_FINITE']
    self.assertEqual(codes, list(zip(names, range(4), strict=True)))


class SearchTest(parameterized.TestCase):
  @parameterized.parameters(
    # The first trial is at half of M, and the last at 3 or above.
    (0.1, 0.5, 7, 3.2),
    (4.0, 0.5, 2, 4.0),
    (8.0, 0.5, 1, 4.0),
    (100.0, 0.5, 1, 50.0),
    (0.1, 0.1, 4, 10.0),
  )
  def test_trials(self, start, shrink, num_trials, last):
    found = _search(start, 3.0, shrink=shrink)
    self.assertTrue(found.accepted)
    self.assertEqual(found.num_trials, num_trials)
    np.testing.assert_allclose(found.regularization, last, rtol=1e-5)
    want, decrease = _solve(last)
    np.testing.assert_allclose(found.step, want.step, rtol=1e-5)
    np.testing.assert_allclose(found.shift, want.shift, rtol=1e-5)
    np.testing.assert_allclose(found.decrease, decrease, rtol=1e-5)
    excess, _ = _excess_fn(3.0)(found.step)
    np.testing.assert_allclose(found.excess, excess, rtol=1e-5)
    self.assertLess(found.excess, want.excess)

  def test_has_a_least_value(self):
    found = _search(1e-30, -1.0)
    self.assertTrue(found.accepted)
    np.testing.assert_allclose(found.regularization, 3e-12, rtol=1e-6)
    self.assertTrue(np.isfinite(found.step).all())

  @parameterized.parameters(1, 8)
  def test_bound_on_trials(self, max_trials):
    found = _search(1.0, 1e30, max_trials=max_trials)
    self.assertFalse(found.accepted)
    self.assertEqual(found.num_trials, max_trials)
    np.testing.assert_array_equal(found.step, 0)
    self.assertEqual(found.decrease, 0)
    self.assertEqual(found.excess, 0)
    last = 0.5 * 2.0 ** (max_trials - 1)
    np.testing.assert_allclose(found.regularization, last)

  @parameterized.parameters(np.inf, -np.inf, np.nan)
  def test_refuses_what_is_not_finite(self, beyond):
    """An objective that ends at a distance of 1/2."""
    found = _search(1e-3, -1.0, 0.0, 0.5, beyond)
    self.assertTrue(found.accepted)
    self.assertLess(np.linalg.norm(found.step), 0.5)
    before, _ = _solve(found.regularization / 2)
    self.assertGreaterEqual(before.norm, 0.5)

  def test_one_trial_where_it_does_not_adapt(self):
    found = _search(0.1, 1e3, adaptive=False)
    self.assertTrue(found.accepted)
    self.assertEqual(found.num_trials, 1)
    np.testing.assert_allclose(found.regularization, 0.1)
    want, _ = _solve(0.1)
    np.testing.assert_allclose(found.step, want.step, rtol=1e-6)
    found = _search(0.1, np.nan, adaptive=False)
    self.assertFalse(found.accepted)
    self.assertEqual(found.num_trials, 1)
    np.testing.assert_array_equal(found.step, 0)

  def test_slack(self):
    """Of rounding in an objective that the model just misses."""
    tight, loose = (_search(2.0, 1.01, slack) for slack in (0.0, 0.1))
    self.assertEqual(tight.num_trials, 2)
    self.assertEqual(loose.num_trials, 1)

  def test_no_gradient(self):
    found = _search(1.0, 3.0, scale=0.0)
    self.assertTrue(found.accepted)
    self.assertEqual(found.num_trials, 1)
    np.testing.assert_array_equal(found.step, 0)

  def test_types(self):
    with jax.enable_x64(True):
      model = jax.tree.map(lambda x: x.astype(jnp.float64), _spectrum())
      low = lambda step: (jnp.float32(0), jnp.float32(0))
      found = jax.eval_shape(
        lambda model: regularization.search(model, 1.0, low), model
      )
      types = {name: x.dtype for name, x in found._asdict().items()}
    self.assertEqual(types.pop('num_trials'), jnp.int32)
    self.assertEqual(types.pop('accepted'), jnp.bool_)
    self.assertEqual(set(types.values()), {jnp.dtype('float64')})

  def test_vmap_equals_a_loop(self):
    """Searches that end after different trials, and one that fails."""
    starts = np.array([0.1, 1.0, 5.0, 100.0, 0.1], 'f')
    limits = np.array([3.0, 3.0, 0.1, 1e3, np.nan], 'f')
    one = lambda start, limit: regularization.search(
      _spectrum(), start, _excess_fn(limit), max_trials=8
    )
    found = jax.jit(jax.vmap(one))(starts, limits)
    np.testing.assert_array_equal(found.num_trials, [7, 4, 1, 6, 8])
    np.testing.assert_array_equal(found.accepted, [True] * 4 + [False])
    for i in range(5):
      want = _search(starts[i], limits[i], max_trials=8)
      for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x[i], y, rtol=1e-5)

  def test_objective_of_all_devices(self):
    """Each holds a part of it; the search is the same on all."""

    def run(parts):
      def excess_fn(step):
        excess, slack = _excess_fn(3.0)(step)
        return jax.lax.psum(parts[0] * excess, mesh.DATA), slack

      return regularization.search(_spectrum(), 0.1, excess_fn)

    fn = jax.shard_map(
      run, mesh=mesh.make(data=8), in_specs=jax.P('data'), out_specs=jax.P()
    )
    found = jax.jit(fn)(np.full(8, 0.125, 'f'))
    want = _search(0.1, 3.0)
    for x, y in zip(found, want, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5)

  def test_objectives_of_their_own_on_each_device(self):
    def run(limits):
      model = _spectrum()
      own = model._replace(coefficients=model.coefficients + 0 * limits)
      found = regularization.search(own, 0.1, _excess_fn(limits[0]))
      return found.num_trials[None]

    fn = jax.shard_map(
      run,
      mesh=mesh.make(data=8),
      in_specs=jax.P('data'),
      out_specs=jax.P('data'),
    )
    limits = 0.075 * 2.0 ** np.arange(8)
    np.testing.assert_array_equal(
      jax.jit(fn)(limits.astype('f')), np.arange(8) + 2
    )

  @parameterized.parameters(
    (dict(shrink=0.0), 'shrink'),
    (dict(shrink=1.0), 'shrink'),
    (dict(max_trials=0), 'max_trials'),
  )
  def test_refuses(self, wrong, name):
    with self.assertRaisesRegex(ValueError, name):
      regularization.search(_spectrum(), 1.0, _excess_fn(1.0), **wrong)
