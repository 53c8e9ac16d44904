"""SVI: its limit is VI, its step is the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.topics import mixture

from tests.topics.mixture import fitting, oracle

SCHEDULE = mixture.svi.power(0.6, 2.0)


class SviTest(parameterized.TestCase):
  def test_all_rows_and_a_whole_step_are_vi(self):
    svi = fitting.method('svi', num_rows=64, step_size=1.0)
    vi = fitting.method('vi')
    with jax.enable_x64(True):
      _, z, data = fitting.problem()
      ours = theirs = vi.init(jax.random.key(0), data, z)
      ours = mixture.svi.State(*ours)
      for _ in range(4):
        ours, info = svi.step(jax.random.key(0), ours, data)
        theirs, want = vi.step(jax.random.key(0), theirs, data)
        np.testing.assert_allclose(info.elbo, want.elbo, rtol=1e-13)
    np.testing.assert_allclose(
      ours.statistics.moments, theirs.statistics.moments, rtol=1e-12
    )

  @parameterized.parameters('float32', 'float64')
  def test_matches_numpy(self, dtype):
    """With the N that the printed lines have, on the parameters themselves."""
    tolerance = 1e-10 if dtype == 'float64' else 1e-3
    rng = np.random.default_rng(0)
    method = fitting.method('svi', num_rows=64, step_size=SCHEDULE)
    with jax.enable_x64(dtype == 'float64'):
      x, z, data = fitting.problem(dtype=dtype)
      state = method.init(jax.random.key(0), data, z)
      count, sums, squares = z.sum(0), z.T @ x, z.T @ x**2
      for t in range(5):
        rows = rng.choice(64, 16, replace=False)
        # A data set with the same sums gives the oracle its posteriors.
        u = _scores_of_sums(x[rows], count, sums, squares)
        share = oracle.softmax(u)
        rate = (2.0 + t) ** -0.6
        mix = lambda old, new, rate=rate: (1 - rate) * old + rate * 4 * new
        count = mix(count, share.sum(0))
        sums = mix(sums, share.T @ x[rows])
        squares = mix(squares, share.T @ x[rows] ** 2)
        state, info = method.step(jax.random.key(0), state, data[rows])
        np.testing.assert_allclose(info.step_size, rate, rtol=1e-6)
      np.testing.assert_allclose(state.statistics.count, count, rtol=tolerance)
      np.testing.assert_allclose(
        state.statistics.moments,
        np.concatenate([sums, squares], axis=1),
        rtol=tolerance,
        atol=tolerance,
      )

  def test_estimated_bound_is_unbiased(self):
    method = fitting.method('svi', num_rows=64, step_size=SCHEDULE)
    with jax.enable_x64(True):
      _, z, data = fitting.problem()
      state = method.init(jax.random.key(0), data, z)
      bounds = [
        method.step(jax.random.key(0), state, data[i : i + 16])[1].elbo
        for i in range(0, 64, 16)
      ]
      want = fitting.elbo()(state.statistics, data)
    np.testing.assert_allclose(np.mean(bounds), want, rtol=1e-12)

  @pytest.mark.slow
  def test_hoffmans_schedule_beats_the_papers(self):
    """The printed step sizes sum to 0.1 log t: they hardly move."""
    data = jnp.float32(oracle.points(0, 2_000, 2)[0])
    model = fitting.make_model(8)
    schedules = mixture.svi.inverse_time(), mixture.svi.power()

    @jax.jit
    def fit(which):
      pick = lambda t: jnp.where(which == 0, *(each(t) for each in schedules))
      method = mixture.svi.svi(model, num_rows=2_000, step_size=pick)
      first = method.init(jax.random.key(0), data)

      def body(state, key):
        index = jax.random.randint(key, (100,), 0, 2_000)
        return method.step(key, state, data[index])

      last, _ = jax.lax.scan(
        body, first, jax.random.split(jax.random.key(1), 200)
      )
      both = jax.tree.map(lambda *x: jnp.stack(x), first, last)
      return jax.lax.map(lambda s: mixture.elbo(model, s, data), both[0])

    (start, *_), found = fit(0), [fit(which)[1] for which in (0, 1)]
    self.assertGreater(found[0], start)
    self.assertGreater(found[1], found[0] + 300)

  def test_same_types_abstract_and_donated(self):
    _, _, data = fitting.problem(dtype='float32')
    method = mixture.svi.svi(
      fitting.make_model(), num_rows=64, step_size=SCHEDULE
    )
    abstract = jax.eval_shape(method.init, jax.random.key(0), data)
    state = jax.jit(method.init)(jax.random.key(0), data)
    self.assertEqual(fitting.types(abstract), fitting.types(state))
    step = jax.jit(method.step, donate_argnums=1)
    after, _ = step(jax.random.key(0), state, data[:16])
    self.assertTrue(state.statistics.moments.is_deleted())
    self.assertEqual(fitting.types(abstract), fitting.types(after))

  @parameterized.named_parameters(
    ('rows', dict(num_rows=0), 'num_rows'),
    ('step', dict(step_size=0.0), 'step_size'),
    ('big_step', dict(step_size=1.5), 'step_size'),
    ('components', dict(model=fitting.make_model(1)), 'num_components'),
  )
  def test_refuses(self, given, match):
    settings = dict(model=fitting.make_model(), num_rows=3, step_size=0.1)
    with self.assertRaisesRegex(ValueError, f'^{match} must'):
      mixture.svi.svi(**(settings | given))

  def test_schedules(self):
    t = jnp.arange(4.0)
    np.testing.assert_allclose(
      mixture.svi.inverse_time(0.2)(t), [0.2, 0.1, 0.2 / 3, 0.05], rtol=1e-6
    )
    np.testing.assert_allclose(
      mixture.svi.power(1.0, 2.0)(t), [1 / 2, 1 / 3, 1 / 4, 1 / 5], rtol=1e-6
    )
    for make, match in (
      (lambda: mixture.svi.inverse_time(0.0), 'scale'),
      (lambda: mixture.svi.power(0.5), 'exponent'),
      (lambda: mixture.svi.power(0.7, 0.0), 'delay'),
    ):
      with self.assertRaisesRegex(ValueError, f'^{match} must'):
        make()


def _scores_of_sums(rows, count, sums, squares):
  """The oracle's scores, from the sums of a data set and not from itself."""
  beta = oracle.BETA + count
  a = (oracle.DEGREES + count) / 2
  m = (oracle.BETA * oracle.MEAN + sums) / beta[:, None]
  b = squares + oracle.BETA * oracle.MEAN**2 - beta[:, None] * m**2
  b = 1 / (2 * oracle.SCALE) + b / 2
  log_tau = oracle.special.digamma(a)[:, None] - np.log(b)
  weights = oracle.special.digamma(oracle.ALPHA + count)
  u = weights + log_tau.sum(1) / 2 - rows.shape[1] / (2 * beta)
  distance = (a[:, None] / b) * (rows[:, None, :] - m) ** 2
  return u - distance.sum(-1) / 2
