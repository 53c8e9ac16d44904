"""Minibatches of pairs: unbiased, equal and opposite, and the paper's sign."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import algorithm, sphere
from emc2 import mesh as mesh_lib
from emc2.sphere import pairs as pairs_lib

from tests import processes

KEY = jax.random.key(0)

draw_pairs = jax.jit(pairs_lib.draw_pairs, static_argnums=(1, 2))
draw_matching = jax.jit(pairs_lib.draw_matching, static_argnums=1)
estimate = jax.jit(pairs_lib.estimate, static_argnums=2)


def _unit(n, k, seed=0):
  rows = np.random.default_rng(seed).normal(size=(n, k))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _pair(x, y, s):
  """Energy of a pair, and its gradient in x."""
  d = x - y
  r = np.sqrt(d @ d)
  if s == 0:
    return -np.log(r), -d / r**2
  return r**-s, -s * d * r ** -(s + 2)


def _full(points, s, pairs=None):
  """Energy and gradient by a loop over pairs, all of them by default."""
  points = np.asarray(points, np.float64)
  if pairs is None:
    pairs = itertools.combinations(range(len(points)), 2)
  energy, gradient = 0.0, np.zeros_like(points)
  for a, b in pairs:
    potential, force = _pair(points[a], points[b], s)
    energy += potential
    gradient[a] += force
    gradient[b] -= force
  return energy, gradient


def _tournament(n):
  """The rounds of a round-robin; n odd leaves one player out in each."""
  seats = list(range(n)) if n % 2 == 0 else [*range(n), None]
  for _ in range(len(seats) - 1):
    half = len(seats) // 2
    games = zip(seats[:half], seats[: half - 1 : -1], strict=True)
    yield [game for game in games if None not in game]
    seats = [seats[0], seats[-1], *seats[1:-1]]


def _loop(points, pairs, s, rate, cap):
  """One step, in float64."""
  n = len(points)
  energy, gradient = _full(points, s, pairs)
  scale = n * (n - 1) / (2 * len(pairs))
  moved, norms, limited = [], [], 0
  for x, g in zip(points, scale * gradient, strict=True):
    g = g - (g @ x) * x
    u = -rate * g
    size = np.linalg.norm(u)
    if size > cap:
      u, limited = u * cap / size, limited + 1
    norms.append(g @ g)
    moved.append((x + u) / np.linalg.norm(x + u))
  info = scale * energy, np.sqrt(np.sum(norms)), limited / n
  return np.array(moved), info


def _run(method, points, num_steps, seed=1):
  state = method.init(KEY, jnp.asarray(points))
  run = jax.jit(
    lambda key, state: algorithm.scan(
      key, state, jnp.arange(num_steps), method.step
    )
  )
  return run(jax.random.key(seed), state)


class DrawTest(parameterized.TestCase):
  @parameterized.parameters(2, 5)
  def test_all_pairs_alike(self, n):
    draws = 20_000
    first, second = np.asarray(sphere.pairs.draw_pairs(KEY, n, draws))
    counts = np.zeros((n, n))
    np.add.at(counts, (first, second), 1)
    self.assertEqual(np.trace(counts), 0)
    off = counts[~np.eye(n, dtype=bool)]
    want = draws / (n * (n - 1))
    np.testing.assert_array_less(np.abs(off - want), 4.5 * np.sqrt(want))

  @parameterized.parameters((4, 3), (5, 15))
  def test_all_matchings_alike(self, n, num_matchings):
    keys = jax.random.split(KEY, 6000)
    draw = jax.vmap(lambda key: pairs_lib.draw_matching(key, n))
    drawn = np.asarray(jax.jit(draw)(keys))
    self.assertEqual((drawn.dtype, drawn.shape), (np.int32, (6000, 2, 2)))
    counts = {}
    for matching in drawn:
      which = frozenset(frozenset(pair) for pair in matching.T.tolist())
      counts[which] = counts.get(which, 0) + 1
    self.assertLen(counts, num_matchings)
    for which, count in counts.items():
      self.assertLen(frozenset().union(*which), 4)
      want = 6000 / num_matchings
      self.assertLess(abs(count - want), 4.5 * np.sqrt(want))

  @parameterized.parameters(1, 0)
  def test_refuses_few_points(self, n):
    message = f'num_points must be at least 2, got {n}'
    with self.assertRaisesRegex(ValueError, message):
      pairs_lib.draw_pairs(KEY, n, 1)
    with self.assertRaisesRegex(ValueError, message):
      pairs_lib.draw_matching(KEY, n)

  def test_refuses_no_pairs(self):
    with self.assertRaisesRegex(ValueError, 'num_pairs .* least 1, got 0'):
      pairs_lib.draw_pairs(KEY, 3, 0)


class EstimateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters((0.0, 3), (1.0, 2), (2.0, 5), (2.5, 3))
  def test_matches_a_loop(self, s, k):
    points = _unit(7, k)
    # One pair twice, one point in three pairs.
    pairs = [(0, 1), (0, 1), (2, 0), (3, 5)]
    energy, gradient = _full(points, s, pairs)
    got = estimate(points, np.transpose(pairs), s)
    scale = 7 * 6 / (2 * 4)
    np.testing.assert_allclose(got.energy, scale * energy, rtol=1e-13)
    np.testing.assert_allclose(got.gradient, scale * gradient, rtol=1e-12)

  @parameterized.parameters((0.0, 6), (1.0, 6), (1.0, 7))
  def test_single_pairs_are_unbiased(self, s, n):
    """Identity 11, first half."""
    points = _unit(n, 3)
    want_energy, want = _full(points, s)
    everything = list(itertools.combinations(range(n), 2))
    single = [estimate(points, np.transpose([p]), s) for p in everything]
    energies, gradients = zip(*single, strict=True)
    np.testing.assert_allclose(np.mean(energies), want_energy, rtol=1e-12)
    gap = np.mean(gradients, axis=0) - want
    self.assertLess(np.linalg.norm(gap), 1e-12 * np.linalg.norm(want))

  @parameterized.parameters((0.0, 6), (1.0, 6), (1.0, 7))
  def test_matchings_are_unbiased(self, s, n):
    """Identity 11, second half."""
    points = _unit(n, 3)
    want_energy, want = _full(points, s)
    rounds = list(_tournament(n))
    played = sorted(tuple(sorted(game)) for games in rounds for game in games)
    self.assertEqual(played, list(itertools.combinations(range(n), 2)))
    parts = [estimate(points, np.transpose(games), s) for games in rounds]
    energies, gradients = zip(*parts, strict=True)
    np.testing.assert_allclose(np.mean(energies), want_energy, rtol=1e-12)
    gap = np.mean(gradients, axis=0) - want
    self.assertLess(np.linalg.norm(gap), 1e-12 * np.linalg.norm(want))

  def test_all_pairs_give_the_gradient_itself(self):
    points = _unit(9, 4)
    want_energy, want = _full(points, 1.0)
    got = estimate(points, np.stack(np.triu_indices(9, 1)), 1.0)
    np.testing.assert_allclose(got.energy, want_energy, rtol=1e-13)
    np.testing.assert_allclose(got.gradient, want, rtol=1e-11)

  @parameterized.parameters((8, 7), (9, 9))
  def test_partners_pull_equally(self, n, scale):
    points, pairs = _unit(n, 3), draw_matching(KEY, n)
    gradient = np.asarray(estimate(points, pairs, 1.0).gradient)
    a, b = np.asarray(pairs)
    np.testing.assert_array_equal(gradient[a], -gradient[b])
    alone = np.setdiff1d(np.arange(n), pairs)
    np.testing.assert_array_equal(gradient[alone], 0)
    want = scale * _pair(points[a[0]], points[b[0]], 1.0)[1]
    np.testing.assert_allclose(gradient[a[0]], want, rtol=1e-13)

  @parameterized.parameters(
    (np.eye(3)[0], [[0], [1]], 1.0, r'points must be \(n, k\)'),
    (np.eye(3), [0, 1], 1.0, r'pairs must be \(2, B\)'),
    (np.eye(3), [[0, 1]], 1.0, r'pairs must be \(2, B\)'),
    (np.eye(3), [[], []], 1.0, r'B at least 1, got shape \(2, 0\)'),
    (np.eye(3), [[0], [1]], -1.0, 'exponent .* at least 0, got -1.0'),
    (np.eye(3), [[0], [1]], np.inf, 'exponent must be finite'),
  )
  def test_refuses(self, points, pairs, s, message):
    with self.assertRaisesRegex(ValueError, message):
      pairs_lib.estimate(points, np.array(pairs, int), s)


class StepTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('matching', 8, 1.0, {}),
    ('pairs', 8, 1.0, {'num_pairs': 13}),
    ('bound', 8, 1.0, {'max_step': 0.02}),
  )
  def test_matches_a_loop(self, n, s, options):
    self._check_matches_a_loop(n, s, options)

  @parameterized.named_parameters(
    ('odd', 9, 1.0, {}),
    ('logarithmic', 8, 0.0, {'k': 5}),
    ('one_pair', 8, 2.0, {'num_pairs': 1}),
    (
      'schedule',
      8,
      1.0,
      {'step_size': lambda count: 1 / (32 * (1 + count % 2))},
    ),
    ('array', 8, 1.0, {'step_size': np.float32(0.02)}),
    ('no_bound', 8, 1.0, {'max_step': np.inf}),
  )
  @pytest.mark.slow
  def test_matches_a_loop_elsewhere(self, n, s, options):
    self._check_matches_a_loop(n, s, options)

  def _check_matches_a_loop(self, n, s, options):
    with jax.enable_x64(True):
      settings = {'step_size': 0.03, **options}
      k = settings.pop('k', 3)
      points = _unit(n, k)
      method = sphere.pair_sgd(s, **settings)
      state = method.init(KEY, points)
      step = jax.jit(method.step)
      cap = settings.get('max_step', 0.5 / np.sqrt(n))
      limits = []
      for count in range(5):
        key = jax.random.key(count)
        if 'num_pairs' in settings:
          drawn = draw_pairs(key, n, settings['num_pairs'])
        else:
          drawn = draw_matching(key, n)
        rate = settings['step_size']
        rate = rate(count) if callable(rate) else float(rate)
        drawn = np.asarray(drawn).T.tolist()
        points, want = _loop(points, drawn, s, rate, cap)
        state, info = step(key, state, None)
        np.testing.assert_allclose(state.points, points, atol=1e-12)
        np.testing.assert_allclose(info, want, rtol=1e-11)
        limits.append(want[2])
      self.assertEqual(state.count, 5)
      # The default bound has been met and has not: both count in the loop.
      if not options:
        self.assertBetween(np.mean(limits), 0.01, 0.99)

  @pytest.mark.slow
  def test_spreads_a_hundred_points(self):
    """To 2e-3 above the least energy, after 51 times all the pairs."""
    points = np.float32(_unit(100, 3))
    method = sphere.pair_sgd(
      1.0, step_size=pairs_lib.default_step_size(100, 5049)
    )
    state, infos = _run(method, points, 5049)
    self.assertLess(_full(state.points, 1.0)[0], 4448.350634331 * 1.0035)
    # The estimates of the end, without bias, agree with the energy.
    error = np.std(infos.loss[-500:]) / np.sqrt(500)
    self.assertLess(abs(np.mean(infos.loss[-500:]) - 4456.0), 5 * error + 10)

  @pytest.mark.slow
  def test_sign_of_the_second_force(self):
    """As printed, Algorithm 1 moves both points of a pair the same way."""
    n, num_steps = 10, 20_000
    schedule = pairs_lib.default_step_size(
      n, num_steps, exponent=2.0, start=6e-3, stop=6e-4
    )
    points = np.float32(_unit(n, 3))
    method = sphere.pair_sgd(2.0, step_size=schedule, num_pairs=1)

    def printed(key, state, batch):
      del batch
      a, b = pairs_lib.draw_pairs(key, n, 1)[:, 0]
      d = state.points[a] - state.points[b]
      force = -2 * d / jnp.sum(d * d) ** 2 * (n * (n - 1) / 2)
      gradient = jnp.zeros_like(state.points).at[jnp.stack([a, b])].set(force)
      gradient = sphere.project(state.points, gradient)
      moved, _ = sphere.move(state.points, -schedule(state.count) * gradient)
      return pairs_lib.State(moved, state.count + 1), ()

    right, _ = _run(method, points, num_steps)
    wrong, _ = _run(
      algorithm.Algorithm(method.init, printed), points, num_steps
    )
    self.assertLess(_full(right.points, 2.0)[0], 25.5)  # The least is 25.0414.
    self.assertGreater(_full(wrong.points, 2.0)[0], 28.0)

  def test_coincident_and_close_points_stay_finite(self):
    s = 12.0
    points = np.float32(_unit(6, 3))
    points[1] = points[0]
    points[3] = points[2] + np.float32([1e-6, 0, 0])
    pairs = jnp.array([[0, 2, 4], [1, 3, 5]])
    got = estimate(points, pairs, s)
    self.assertTrue(np.all(np.isfinite(got.gradient)))
    np.testing.assert_array_equal(got.gradient[:2], 0)
    self.assertTrue(np.isinf(got.energy))
    method = sphere.pair_sgd(s, step_size=0.1, num_pairs=200)
    state, _ = _run(method, points, 3)
    norm = np.linalg.norm(state.points, axis=1)
    np.testing.assert_allclose(norm, 1.0, rtol=1e-6)

  def test_keeps_types_and_compiles_once(self):
    self._check_keeps_types_and_compiles_once(jnp.float32)

  @pytest.mark.slow
  def test_keeps_types_of_narrow_points(self):
    self._check_keeps_types_and_compiles_once(jnp.bfloat16)

  def _check_keeps_types_and_compiles_once(self, dtype):
    schedule = pairs_lib.default_step_size(10, 100)
    method = sphere.pair_sgd(1.0, step_size=schedule)
    state = method.init(KEY, jnp.asarray(_unit(10, 3), dtype))
    before = jax.tree.map(jax.typeof, state)
    step = jax.jit(method.step)
    for _ in range(2):
      state, info = step(KEY, state, None)
    self.assertEqual(jax.tree.map(jax.typeof, state), before)
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual([leaf.dtype for leaf in info], [dtype] * 3)

  @parameterized.parameters(
    (dict(exponent=-0.5), 'exponent .* got -0.5'),
    (dict(exponent=np.nan), 'exponent .* got nan'),
    (dict(step_size=0.0), 'step_size .* positive, got 0.0'),
    (dict(step_size=np.inf), 'step_size must be finite'),
    (dict(num_pairs=0), 'num_pairs .* at least 1, got 0'),
    (dict(max_step=0.0), 'max_step must be positive, got 0.0'),
  )
  def test_refuses(self, settings, message):
    settings = {'exponent': 1.0, 'step_size': 0.1, **settings}
    with self.assertRaisesRegex(ValueError, message):
      sphere.pair_sgd(settings.pop('exponent'), **settings)


class DefaultStepSizeTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, 0.1, 1e-3, 1.0),
    ({'start': 0.5}, 0.5, 1e-3, 1.0),
    ({'stop': 1e-2}, 0.1, 1e-2, 1.0),
    ({'exponent': 2.0}, 0.1, 1e-3, 2.0),
  )
  def test_closed_form(self, options, start, stop, s):
    schedule = pairs_lib.default_step_size(50, 200, **options)
    for count in (0, 30, 200, 300):
      share = min(count / 200, 1)
      want = start * 50 ** (-(s + 2) / 2) * (stop / start) ** share
      np.testing.assert_allclose(schedule(jnp.int32(count)), want, rtol=1e-5)

  @parameterized.parameters(
    ((1, 5), {}, 'num_points must be at least 2, got 1'),
    ((5, 0), {}, 'num_steps must be at least 1, got 0'),
    ((5, 5), {'exponent': -1.0}, 'exponent .* got -1.0'),
    ((5, 5), {'start': 0.0}, 'start must be finite and positive, got 0.0'),
    ((5, 5), {'stop': -1.0}, 'stop must be finite and positive, got -1.0'),
  )
  def test_refuses(self, arguments, options, message):
    with self.assertRaisesRegex(ValueError, message):
      pairs_lib.default_step_size(*arguments, **options)


def sharded_step(mesh, **settings):
  """A step on replicated points, whose pairs the devices split."""
  method = sphere.pair_sgd(1.0, step_size=0.01, axis_name='data', **settings)
  spec = jax.sharding.PartitionSpec()
  step = functools.partial(method.step, batch=None)
  step = jax.shard_map(
    step, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec)
  )
  return method.init, jax.jit(step)


class ShardedTest(parameterized.TestCase):
  def test_8_devices_equal_1(self):
    self._check_8_devices_equal_1(37, {})

  @pytest.mark.slow
  def test_8_devices_equal_1_that_has_few_pairs(self):
    self._check_8_devices_equal_1(9, {'num_pairs': 3})

  def _check_8_devices_equal_1(self, n, settings):
    points = jnp.float32(_unit(n, 3))
    init, step = sharded_step(mesh_lib.make(data=8), **settings)
    split = init(KEY, points)
    method = sphere.pair_sgd(1.0, step_size=0.01, **settings)
    whole = method.init(KEY, points)
    one = jax.jit(method.step)
    for number in range(4):
      key = jax.random.key(number)
      split, split_info = step(key, split)
      whole, whole_info = one(key, whole, None)
    for got, want in zip(
      (*split, *split_info), (*whole, *whole_info), strict=True
    ):
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_one_message(self):
    init, step = sharded_step(mesh_lib.make(data=8))
    state = init(KEY, jnp.float32(_unit(64, 3)))
    text = step.lower(KEY, state).as_text()
    kinds = ('all_gather', 'all_reduce', 'reduce_scatter', 'all_to_all')
    kinds += ('collective_permute',)
    counts = {kind: text.count(f'"stablehlo.{kind}"') for kind in kinds}
    self.assertEqual(counts.pop('all_reduce'), 1)
    self.assertEqual(set(counts.values()), {0})

  @pytest.mark.slow
  def test_2_processes_equal_1(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'points.npy'
    processes.run('tests.sphere.spreads_pairs', 2, str(path))
    start = np.float32(_unit(50, 3))
    method = sphere.pair_sgd(1.0, step_size=1e-3)
    state, _ = _run(method, start, 30)
    np.testing.assert_allclose(np.load(path), state.points, atol=1e-5)
    energies = [_full(points, 1.0)[0] for points in (start, state.points)]
    self.assertLess(energies[1], energies[0] - 10)
