"""SVI: its limit is VI, its step is the paper's."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.topics import mixture

from tests.topics.mixture import oracle, vi_test


class SviTest(parameterized.TestCase):
  def test_all_rows_and_a_whole_step_are_vi(self):
    x, z = oracle.points(0, 60, 2)[0], oracle.starts(1, 60, 5)
    model = vi_test.make_model()
    with jax.enable_x64(True):
      data = jnp.asarray(x)
      svi = mixture.svi.svi(model, num_rows=60, step_size=1.0)
      vi = mixture.vi.vi(model)
      ours = svi.init(jax.random.key(0), data, z)
      theirs = vi.init(jax.random.key(0), data, z)
      for _ in range(4):
        ours, info = svi.step(jax.random.key(0), ours, data)
        theirs, want = vi.step(jax.random.key(0), theirs, data)
        np.testing.assert_allclose(info.elbo, want.elbo, rtol=1e-14)
    np.testing.assert_array_equal(
      ours.statistics.moments, theirs.statistics.moments
    )

  @parameterized.parameters('float32', 'float64')
  def test_matches_numpy(self, dtype):
    """With the N that the printed lines have, on the parameters themselves."""
    x, z = oracle.points(0, 60, 2)[0], oracle.starts(1, 60, 5)
    tolerance = 1e-10 if dtype == 'float64' else 1e-3
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == 'float64'):
      method = mixture.svi.svi(
        vi_test.make_model(), num_rows=60, step_size=mixture.svi.power(0.6, 2.0)
      )
      state = method.init(jax.random.key(0), jnp.asarray(x, dtype), z)
      step = jax.jit(method.step)
      count, sums, squares = z.sum(0), z.T @ x, z.T @ x**2
      for t in range(5):
        rows = rng.choice(60, 12, replace=False)
        # A data set with the same sums gives the oracle its posteriors.
        u = _scores_of_sums(x[rows], count, sums, squares)
        share = oracle.softmax(u)
        rate = (2.0 + t) ** -0.6
        mix = lambda old, new, rate=rate: (1 - rate) * old + rate * 5 * new
        count = mix(count, share.sum(0))
        sums = mix(sums, share.T @ x[rows])
        squares = mix(squares, share.T @ x[rows] ** 2)
        state, info = step(
          jax.random.key(0), state, jnp.asarray(x[rows], dtype)
        )
        np.testing.assert_allclose(info.step_size, rate, rtol=1e-6)
      np.testing.assert_allclose(state.statistics.count, count, rtol=tolerance)
      np.testing.assert_allclose(
        state.statistics.moments,
        np.concatenate([sums, squares], axis=1),
        rtol=tolerance,
        atol=tolerance,
      )
    self.assertEqual(step._cache_size(), 1)

  def test_estimated_bound_is_unbiased(self):
    x, z = oracle.points(0, 60, 2)[0], oracle.starts(1, 60, 5)
    model = vi_test.make_model()
    with jax.enable_x64(True):
      data = jnp.asarray(x)
      method = mixture.svi.svi(model, num_rows=60, step_size=0.5)
      state = method.init(jax.random.key(0), data, z)
      bounds = [
        method.step(jax.random.key(0), state, data[i : i + 12])[1].elbo
        for i in range(0, 60, 12)
      ]
      want = mixture.elbo(model, state.statistics, data)
    np.testing.assert_allclose(np.mean(bounds), want, rtol=1e-12)

  def test_hoffmans_schedule_beats_the_papers(self):
    """The printed step sizes sum to 0.1 log t: they hardly move."""
    x = oracle.points(0, 2_000, 2)[0]
    data, model = jnp.float32(x), vi_test.make_model(8)
    found = []
    for schedule in (mixture.svi.inverse_time(), mixture.svi.power()):
      method = mixture.svi.svi(model, num_rows=2_000, step_size=schedule)
      state = method.init(jax.random.key(0), data)
      start = float(mixture.elbo(model, state.statistics, data))
      step = jax.jit(method.step)
      for number in range(200):
        key = jax.random.key(number)
        rows = jax.random.choice(key, 2_000, (100,), replace=False)
        state, _ = step(key, state, data[rows])
      found.append(float(mixture.elbo(model, state.statistics, data)))
    self.assertGreater(found[0], start)
    self.assertGreater(found[1], found[0] + 300)

  def test_same_types_abstract_and_donated(self):
    data = jnp.float32(oracle.points(0, 60, 2)[0])
    method = mixture.svi.svi(
      vi_test.make_model(), num_rows=60, step_size=mixture.svi.inverse_time()
    )
    types = lambda tree: jax.tree.map(
      lambda x: (x.shape, x.dtype, x.weak_type), tree
    )
    abstract = jax.eval_shape(method.init, jax.random.key(0), data)
    state = method.init(jax.random.key(0), data)
    self.assertEqual(types(abstract), types(state))
    step = jax.jit(method.step, donate_argnums=1)
    after, _ = step(jax.random.key(0), state, data[:10])
    self.assertTrue(state.statistics.moments.is_deleted())
    self.assertEqual(types(abstract), types(after))

  @parameterized.named_parameters(
    ('rows', dict(num_rows=0), 'num_rows'),
    ('step', dict(step_size=0.0), 'step_size'),
    ('big_step', dict(step_size=1.5), 'step_size'),
    ('components', dict(model=vi_test.make_model(1)), 'num_components'),
  )
  def test_refuses(self, given, match):
    settings = dict(model=vi_test.make_model(), num_rows=3, step_size=0.1)
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
