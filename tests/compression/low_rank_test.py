"""PowerSGD and its relatives against a loop in NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import compression
from emc2 import mesh as mesh_lib
from emc2.compression import low_rank

N, M, R = 12, 9, 3


def _matrices(count=1, seed=0, shape=(N, M)):
  return np.random.default_rng(seed).normal(size=(count, *shape))


def _float64(test):
  test.enterContext(jax.enable_x64(True))


def _reduce(code, state, xs, key=None, workers=4):
  """Reduces an array for each worker: sent by each, the mean, the state."""
  key = jax.random.key(7) if key is None else key
  mesh = mesh_lib.make(jax.devices()[:workers], data=workers)

  def work(state, xs, key):
    done = compression.reduce(code, [state], [xs[0]], [key], 'data')
    return done.sent[0][None], done.mean[0], done.states[0]

  return jax.jit(
    jax.shard_map(
      work,
      mesh=mesh,
      in_specs=(jax.P(), jax.P('data'), jax.P()),
      out_specs=(jax.P('data'), jax.P(), jax.P()),
    )
  )(state, jnp.asarray(xs), key)


def _alone(code):
  """A jitted call for one worker: sent and the state."""

  def work(state, x, key):
    done = compression.reduce(code, [state], [x], [key])
    return done.mean[0], done.states[0]

  return jax.jit(work)


def _best(x, rank):
  u, s, v = np.linalg.svd(x)
  return (u[:, :rank] * s[:rank]) @ v[:rank]


def _orth(x):
  """Gram-Schmidt in the order of the columns."""
  x = x.copy()
  for i in range(x.shape[1]):
    for j in range(i):
      x[:, i] -= (x[:, j] @ x[:, i]) * x[:, j]
    x[:, i] /= np.linalg.norm(x[:, i])
  return x


class PowerSgdTest(parameterized.TestCase):
  @parameterized.parameters(
    ('local', 'qr', False), ('mean', 'gram_schmidt', False)
  )
  def test_matches_numpy(self, error, method, orthogonalize_first):
    self._check_matches_numpy(error, method, orthogonalize_first)

  @pytest.mark.slow
  def test_matches_numpy_where_the_first_is_orthogonal(self):
    self._check_matches_numpy('local', 'gram_schmidt', True)

  def _check_matches_numpy(self, error, method, orthogonalize_first):
    _float64(self)
    code = low_rank.power_sgd(
      R,
      error=error,
      method=method,
      orthogonalize_first=orthogonalize_first,
      eps=0.0,
    )
    state = code.init((N, M), jnp.float64, jax.random.key(1))
    q = np.asarray(state)
    for step in range(3):
      xs = _matrices(4, step)
      sent, mean, state = _reduce(code, state, xs)
      p = _orth(sum(x @ q for x in xs))
      own = [x.T @ p for x in xs]
      q = np.mean(own, axis=0)
      want = [p @ one.T for one in own] if error == 'local' else [p @ q.T] * 4
      np.testing.assert_allclose(sent, want, atol=1e-12)
      np.testing.assert_allclose(mean, p @ q.T, atol=1e-12)
      np.testing.assert_allclose(mean, np.mean(sent, axis=0), atol=1e-12)
      if error == 'local':
        left = xs - np.asarray(sent)
        np.testing.assert_allclose(p.T @ left, 0, atol=1e-12)
        norm = lambda x: np.linalg.norm(x, axis=(1, 2))
        np.testing.assert_array_less(norm(left), norm(xs))

  def test_converges_to_the_best_approximation(self):
    """At the rate (s_{r+1} / s_r)^2, and its residual never grows."""
    _float64(self)
    (x,) = _matrices(shape=(30, 20))
    code, want = low_rank.power_sgd(2), _best(x, 2)
    state = code.init(x.shape, jnp.float64, jax.random.key(0))
    step, far, left = _alone(code), [], []
    for _ in range(300):
      got, state = step(state, jnp.asarray(x), jax.random.key(0))
      far.append(np.linalg.norm(got - want) / np.linalg.norm(want))
      left.append(np.linalg.norm(x - got))
    self.assertLess(far[-1], 1e-6)
    s = np.linalg.svd(x, compute_uv=False)
    self.assertAlmostEqual(far[40] / far[39], (s[2] / s[1]) ** 2, delta=0.02)
    self.assertLess(np.max(np.diff(left)), 1e-12)

  def test_without_a_warm_start_it_stays_where_it_was(self):
    _float64(self)
    (x,) = _matrices()
    code = low_rank.power_sgd(2, warm_start=False)
    state = code.init(x.shape, jnp.float64, jax.random.key(0))
    step = _alone(code)
    keys = jax.random.split(jax.random.key(3), 20)
    far = [
      np.linalg.norm(step(state, jnp.asarray(x), key)[0] - _best(x, 2))
      for key in keys
    ]
    self.assertGreater(np.std(far), 1e-2)
    q = jax.random.normal(keys[0], (M, 2), jnp.float64)
    p = _orth(x @ np.asarray(q))
    got, _ = step(state, jnp.asarray(x), keys[0])
    np.testing.assert_allclose(got, p @ (x.T @ p).T, atol=1e-12)

  def test_is_exact_for_a_mean_of_low_rank(self):
    _float64(self)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(N, R)) @ rng.normal(size=(R, M))
    apart = _matrices(4)
    xs = mean + apart - apart.mean(0)
    code = low_rank.power_sgd(R)
    state = code.init((N, M), jnp.float64, jax.random.key(0))
    _, got, _ = _reduce(code, state, xs)
    np.testing.assert_allclose(got, mean, atol=1e-11)

  @parameterized.parameters('qr', 'gram_schmidt')
  def test_leaves_zeros_again(self, method):
    code = low_rank.power_sgd(2, method=method)
    state = code.init((N, M), jnp.float32, jax.random.key(0))
    step = _alone(code)
    got, state = step(state, jnp.zeros((N, M)), jax.random.key(1))
    np.testing.assert_array_equal(got, 0)
    (x,) = _matrices().astype(np.float32)
    for _ in range(60):
      got, state = step(state, jnp.asarray(x), jax.random.key(1))
    np.testing.assert_allclose(got, _best(x, 2), atol=2e-2)

  def test_eps_keeps_gram_schmidt_from_nan(self):
    code = low_rank.power_sgd(2, method='gram_schmidt', eps=0.0)
    state = code.init((N, M), jnp.float32, jax.random.key(0))
    got, _ = _alone(code)(state, jnp.zeros((N, M)), jax.random.key(1))
    self.assertTrue(np.isnan(got).any())

  @parameterized.parameters(
    ((64, 3, 3, 3), (64, 27)),
    ((3, 3, 16, 64), (144, 64)),
    ((5,), (1, 5)),
    ((), (1, 1)),
    ((6, 6), (6, 6)),
  )
  @pytest.mark.slow
  def test_reads_arrays_as_matrices(self, shape, want):
    self.assertEqual(low_rank.matrix_shape(shape), want)
    code = low_rank.power_sgd(100, at_most=True)
    x = jax.random.normal(jax.random.key(0), shape)
    state = code.init(shape, jnp.float32, jax.random.key(0))
    got, _ = _alone(code)(state, x, jax.random.key(1))
    np.testing.assert_allclose(got, x, atol=1e-5)
    self.assertEqual(code.bits(shape), 32 * min(want) * sum(want))

  def test_payload_is_what_bits_say(self):
    code = low_rank.power_sgd(R)
    self.assertEqual(code.bits((N, M)), 32 * R * (N + M))
    self.assertEqual(compression.wire_bits(code, (N, M)), code.bits((N, M)))
    (x,) = jnp.asarray(_matrices(), jnp.float32)
    state = code.init(x.shape, x.dtype, jax.random.key(0))
    payload, after = code.compress(state, x, jax.random.key(1))
    want, state = _alone(code)(state, x, jax.random.key(1))
    got = code.decompress(after, payload, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(after, state, atol=1e-5)

  def test_many_arrays_take_two_collectives(self):
    code = low_rank.power_sgd(2)
    shapes = [(N, M), (N, M), (4, 5), (3, 3, 2, 8)]
    mesh = mesh_lib.make(data=8)

    def work(xs, key):
      xs = [x[0] for x in xs]
      keys = [key] * len(xs)
      states = [code.init(x.shape, x.dtype, key) for x in xs]
      return compression.reduce(code, states, xs, keys, 'data').mean

    run = jax.jit(
      jax.shard_map(
        work, mesh=mesh, in_specs=(jax.P('data'), jax.P()), out_specs=jax.P()
      )
    )
    xs = [jnp.ones((8, *shape)) for shape in shapes]
    text = run.lower(xs, jax.random.key(0)).as_text()
    self.assertEqual(text.count('stablehlo.all_reduce'), 2)
    means = run(xs, jax.random.key(0))
    for mean, x in zip(means, xs, strict=True):
      np.testing.assert_allclose(mean, x[0], rtol=1e-5)

  @parameterized.parameters(
    ({'rank': 0}, 'rank must be at least 1'),
    ({'eps': -1.0}, 'eps must be at least 0'),
    ({'error': 'global'}, 'error must be one of'),
    ({'method': 'svd'}, 'method must be one of'),
  )
  def test_refuses(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      low_rank.power_sgd(**options)

  @parameterized.parameters(low_rank.power_sgd, low_rank.alternating)
  def test_refuses_a_rank_above_that_of_a_matrix(self, make):
    key = jax.random.key(0)
    make(5).init((5, 6), jnp.float32, key)
    make(6, at_most=True).init((5, 6), jnp.float32, key)
    with self.assertRaisesRegex(ValueError, r'rank must be at most 5 .* got 6'):
      make(6).init((5, 6), jnp.float32, key)


class AlternatingTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3)
  @pytest.mark.slow
  def test_matches_numpy(self, iterations):
    _float64(self)
    code = low_rank.alternating(R, iterations)
    state = code.init((N, M), jnp.float64, jax.random.key(1))
    p, q = (np.asarray(x) for x in state.factors)
    count = 0
    for step in range(3):
      xs = _matrices(4, step)
      sent, mean, state = _reduce(code, state, xs)
      left, want = xs.copy(), 0
      for _ in range(iterations):
        if count % 2 == 0:
          p = _orth(p)
          own = [p @ (p.T @ x) for x in left]
          q = np.mean([x.T @ p for x in left], axis=0)
        else:
          q = _orth(q)
          own = [(x @ q) @ q.T for x in left]
          p = np.mean([x @ q for x in left], axis=0)
        left, want, count = left - own, want + np.mean(own, axis=0), count + 1
      np.testing.assert_allclose(mean, want, atol=1e-12)
      np.testing.assert_allclose(sent, xs - left, atol=1e-12)
      self.assertEqual(state.count, count)

  def test_one_worker_alone(self):
    (x,) = jnp.asarray(_matrices(), jnp.float32)
    code = low_rank.alternating(2, 2)
    state = code.init(x.shape, x.dtype, jax.random.key(0))
    payload, after = jax.jit(code.compress)(state, x, jax.random.key(1))
    got, state = _alone(code)(state, x, jax.random.key(1))
    np.testing.assert_allclose(
      code.decompress(after, payload, x), got, atol=1e-6
    )
    self.assertEqual(code.bits((N, M)), 32 * 2 * (N + M))
    for iterations in (1, 2):
      code = low_rank.alternating(2, iterations)
      want = 32 * iterations * (N + M)
      self.assertEqual(code.bits((N, M)), want)
      self.assertEqual(compression.wire_bits(code, (N, M)), want)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'iterations must be at least 1'):
      low_rank.alternating(2, 0)


class UnbiasedTest(parameterized.TestCase):
  def test_mean_and_variance(self):
    _float64(self)
    (x,) = jnp.asarray(_matrices())
    code = low_rank.unbiased(R)

    def draw(key):
      payload, state = code.compress(key, x, key)
      return code.decompress(state, payload, x)

    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(draw))(keys))
    norm = np.sum(x**2)
    np.testing.assert_allclose(
      np.sum((drawn - np.asarray(x)) ** 2, axis=(1, 2)).mean() / norm,
      code.omega((N, M)),
      rtol=0.03,
    )
    self.assertAlmostEqual(code.omega((N, M)), (M + 1) / R)
    np.testing.assert_allclose(drawn.mean(0), x, atol=0.1)

  def test_payloads_may_be_averaged(self):
    _float64(self)
    code, xs = low_rank.unbiased(R), _matrices(4)
    state = code.init((N, M), jnp.float64, jax.random.key(0))
    sent, mean, _ = _reduce(code, state, xs)
    np.testing.assert_allclose(mean, np.mean(sent, axis=0), atol=1e-12)
    self.assertEqual(code.bits((N, M)), 32 * N * R)
    self.assertEqual(compression.wire_bits(code, (N, M)), 32 * N * R)
