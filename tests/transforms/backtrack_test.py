"""The line search against a loop in NumPy and the minima of charges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import transforms

from tests.transforms import coulomb


def _lbfgs(memory_size=20):
  return optax.chain(optax.scale_by_lbfgs(memory_size), optax.scale(-1))


def _two_loops(g, pairs):
  """Minus the L-BFGS direction; `pairs` from the oldest to the newest."""
  if not pairs:
    return g * min(1, 1 / np.linalg.norm(g))
  q, alphas = g.copy(), []
  for s, y in reversed(pairs):
    alphas.append(np.sum(s * q) / np.sum(s * y))
    q -= alphas[-1] * y
  s, y = pairs[-1]
  q *= np.sum(s * y) / np.sum(y * y)
  for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
    q += (alpha - np.sum(y * q) / np.sum(s * y)) * s
  return q


def _velocity(map, x, d, t):
  """The derivative of the curve, by a formula of its own."""
  if map == 'retraction':
    norm = np.linalg.norm(x + t * d, axis=1, keepdims=True)
    y = (x + t * d) / norm
    return (d - np.sum(d * y, axis=1, keepdims=True) * y) / norm
  rate = np.linalg.norm(d, axis=1, keepdims=True)
  return d * np.cos(t * rate) - x * rate * np.sin(t * rate)


def _loop(
  fn,
  points,
  steps,
  *,
  max_step,
  first_step=None,
  slope_rtol=1e-4,
  value_rtol=1e-6,
  shrink=0.4,
  max_shrinks=20,
  map='retraction',
  memory_size=5,
):
  """The trials, in float64; `fn` gives values and gradients in space."""
  first_step = max_step if first_step is None else first_step
  trials, trial = [], points
  x, value, slope, t, shrinks = points, np.inf, 0.0, 0.0, 0
  d, last, pairs, fresh, stalled = 0 * points, None, [], True, False
  for _ in range(steps):
    new, g = fn(trial)
    g = coulomb.project(trial, g)
    along = np.sum(g * _velocity(map, x, d, t))
    good = new <= value + slope_rtol * t * slope
    flat = abs(new - value) <= value_rtol * abs(value)
    good = good or (flat and along <= (2 * slope_rtol - 1) * slope)
    if good and not stalled:
      if last is not None:
        pairs = [*pairs, (trial - last[0], g - last[1])][-memory_size:]
      x, value, t, shrinks, last = trial, new, 1.0, 0, (trial, g)
      d = coulomb.project(x, -_two_loops(g, pairs))
      restart = np.sum(d * g) >= 0
      if restart:
        d, last, pairs = -g, None, []
      bound = first_step if fresh or restart else max_step
      d = d * min(1, bound / np.linalg.norm(d, axis=1).max())
      slope, fresh = np.sum(d * g), restart
    else:
      shrinks += 1
      stalled = stalled or shrinks > max_shrinks
      t = 0.0 if stalled else shrink * t
    trial = coulomb.follow(map, x, t * d)
    trials.append(trial)
  return np.stack(trials), value, stalled


def _quartic(seed=1):
  """A bumpy function of 4 points, where whole steps often go too far."""
  rng = np.random.default_rng(seed)
  matrix = rng.normal(size=(12, 12))

  def fn(x):
    z = matrix @ x.reshape(-1)
    return (z**4).sum() + (10 * z).sum()

  def value_and_grad(x):
    z = matrix @ x.reshape(-1)
    return fn(x), (matrix.T @ (4 * z**3 + 10)).reshape(x.shape)

  return fn, value_and_grad


def _run(tx, fn, points, steps):
  """The trials and the states."""

  def step(carry, _):
    points, state = carry
    value, grads = jax.value_and_grad(fn)(points)
    updates, state = tx.update(grads, state, points, value=value)
    points = optax.apply_updates(points, updates)
    kept = state._replace(inner_state=())
    return (points, state), (points, kept)

  carry = points, tx.init(points)
  return jax.lax.scan(step, carry, length=steps)[1]


OPTIONS = {
  'plain': {'max_step': 1.0},
  'max_step': {'max_step': 0.2},
  'first_step': {'max_step': 1.0, 'first_step': 0.01},
  'slope_rtol': {'max_step': 1.0, 'slope_rtol': 0.4},
  'value_rtol': {'max_step': 1.0, 'slope_rtol': 0.4, 'value_rtol': 10.0},
  'shrink': {'max_step': 1.0, 'shrink': 0.7},
  'max_shrinks': {'max_step': 1.0, 'shrink': 0.9, 'max_shrinks': 1},
  'map': {'max_step': 1.0, 'map': 'exponential'},
}


class BacktrackTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    # L-BFGS adds indices of two widths.
    self.enterContext(jax.numpy_dtype_promotion('standard'))

  @parameterized.parameters('plain', 'map')
  def test_matches_a_loop(self, name):
    self._check_loop(name)

  @parameterized.parameters(*sorted(OPTIONS.keys() - {'plain', 'map'}))
  @pytest.mark.slow
  def test_matches_a_loop_elsewhere(self, name):
    self._check_loop(name)

  def _check_loop(self, name):
    fn, value_and_grad = _quartic()
    points = coulomb.uniform(0, 4, 3, dtype=np.float64)
    want, value, stalled = _loop(value_and_grad, points, 40, **OPTIONS[name])
    tx = transforms.backtrack(_lbfgs(5), **OPTIONS[name])
    run = jax.jit(lambda points: _run(tx, fn, points, 40))
    got, states = run(jnp.asarray(points))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(states.value[-1], value, rtol=1e-9)
    self.assertEqual(states.is_stalled[-1], stalled)
    self.assertGreater(np.sum(states.num_shrinks > 0), 0)

  def test_each_option_counts(self):
    """The cases above end elsewhere without the option that names them."""
    _, value_and_grad = _quartic()
    points = coulomb.uniform(0, 4, 3, dtype=np.float64)
    run = lambda options: _loop(value_and_grad, points, 40, **options)[0]
    for name in set(OPTIONS) - {'plain'}:
      options = dict(OPTIONS[name])
      ends = run(options)
      del options[name]
      gap = np.abs(ends - run({'max_step': 1.0, **options})).max()
      self.assertGreater(gap, 1e-3, msg=name)

  @parameterized.parameters(
    (12, 'retraction'),
    (32, 'retraction'),
    (50, 'retraction'),
    (50, 'exponential'),
  )
  @pytest.mark.slow
  def test_finds_the_minimum_of_charges(self, n, map):
    """To slopes far below what differences of energies can show."""
    points = coulomb.uniform(0, 4, n, 3, dtype=np.float64)
    tx = transforms.backtrack(
      _lbfgs(), max_step=0.6 / np.sqrt(n), first_step=0.1 / np.sqrt(n), map=map
    )
    run = lambda points: _run(tx, coulomb.energy, points, 300)[1]
    states = jax.jit(jax.vmap(run))(jnp.asarray(points))
    values = np.asarray(states.value)
    reached = np.min(np.max(np.abs(states.gradient), axis=(2, 3)), axis=1)
    self.assertLess(reached.max(), 1e-10)
    np.testing.assert_allclose(values[:, -1], coulomb.MINIMA[n], rtol=1e-9)
    for chain in range(4):
      ends = np.asarray(states.params[chain, -1])
      slope = coulomb.project(ends, coulomb.gradient(ends))
      self.assertLess(np.abs(slope).max(), 1e-9)
      norms = np.linalg.norm(ends, axis=1)
      np.testing.assert_allclose(norms, 1, atol=5e-16)

  @pytest.mark.slow
  def test_values_alone_end_early(self):
    """Without the test on slopes rounding refuses the last steps."""
    points = jnp.asarray(coulomb.uniform(0, 50, 3, dtype=np.float64))
    reached = []
    for value_rtol in (1e-6, 0.0):
      tx = transforms.backtrack(_lbfgs(), max_step=0.08, value_rtol=value_rtol)
      run = jax.jit(lambda x, tx=tx: _run(tx, coulomb.energy, x, 250)[1])
      states = run(points)
      reached.append(np.min(np.max(np.abs(states.gradient), axis=(1, 2))))
    self.assertLess(reached[0], 1e-10)
    self.assertGreater(reached[1], 10 * reached[0])

  @pytest.mark.slow
  def test_chains_do_not_mix(self):
    fn, _ = _quartic()
    points = jnp.asarray(coulomb.uniform(0, 3, 4, 3, dtype=np.float64))
    tx = transforms.backtrack(_lbfgs(5), max_step=1.0)
    run = jax.jit(lambda points: _run(tx, fn, points, 30)[0])
    together = jax.jit(jax.vmap(lambda points: _run(tx, fn, points, 30)[0]))
    alone = jnp.stack([run(start) for start in points])
    np.testing.assert_allclose(together(points), alone, atol=1e-6)

  @pytest.mark.slow
  def test_refused_trials_leave_no_trace(self):
    """The memory of L-BFGS is not copied; other states are."""

    def hide(tx):
      """The same, in a state whose type the search does not know."""
      return optax.GradientTransformation(
        lambda params: {'hidden': tuple(tx.init(params))},
        lambda updates, state, params: (
          lambda result: (result[0], {'hidden': tuple(result[1])})
        )(
          tx.update(updates, optax.ScaleByLBFGSState(*state['hidden']), params)
        ),
      )

    fn, _ = _quartic()
    points = jnp.asarray(coulomb.uniform(0, 4, 3, dtype=np.float64))
    inner = optax.scale_by_lbfgs(3)
    trials = []
    for lbfgs in (inner, hide(inner)):
      tx = transforms.backtrack(
        optax.chain(lbfgs, optax.scale(-1)), max_step=1.0
      )
      got, states = jax.jit(lambda x, tx=tx: _run(tx, fn, x, 60))(points)
      self.assertGreater(np.sum(states.num_shrinks > 0), 2)
      trials.append(got)
    np.testing.assert_array_equal(*trials)

  def test_restarts_where_the_direction_climbs(self):
    """L-BFGS upside down: its memory is emptied, and descent takes over."""
    tx = transforms.backtrack(
      optax.scale_by_lbfgs(3), max_step=0.4, first_step=0.1
    )
    points = jnp.asarray(coulomb.uniform(0, 6, 3, dtype=np.float64))
    state, step = tx.init(points), jax.jit(tx.update)
    for _ in range(3):
      value, grads = jax.value_and_grad(coulomb.energy)(points)
      updates, state = step(grads, state, points, value=value)
      self.assertTrue(state.is_fresh)
      jax.tree.map(
        np.testing.assert_array_equal,
        (state.inner_state.count, state.inner_state.weights_memory),
        (0, np.zeros(3)),
      )
      g = coulomb.project(points, coulomb.gradient(points))
      want = -0.1 * g / np.linalg.norm(g, axis=1).max()
      np.testing.assert_allclose(state.direction, want, rtol=1e-9, atol=1e-12)
      points = optax.apply_updates(points, updates)

  def test_bad_values_are_refused(self):
    tx = transforms.backtrack(_lbfgs(3), max_step=0.4, max_shrinks=3)
    start = jnp.asarray(coulomb.uniform(0, 6, 3, dtype=np.float64))
    step = jax.jit(tx.update)
    good, grads = jax.value_and_grad(coulomb.energy)(start)
    first, begun = step(grads, tx.init(start), start, value=good)
    for value, grad in (
      (np.nan, 1.0),
      (np.inf, 1.0),
      (-np.inf, 1.0),
      (0.0, np.nan),
      (0.0, np.inf),
    ):
      points, state = start + first, begun
      for shrinks in range(1, 5):
        grads = jnp.full_like(points, grad)
        value = jnp.asarray(value, good.dtype)
        updates, state = step(grads, state, points, value=value)
        points += updates
        self.assertEqual(state.is_stalled, shrinks > 3)
        t = 0.0 if shrinks > 3 else 0.4**shrinks
        want = coulomb.follow('retraction', start, t * state.direction)
        np.testing.assert_allclose(points, want, rtol=0, atol=1e-15)
      # It has given up, and a better trial changes nothing.
      updates, state = step(0 * points, state, points, value=good - 10)
      np.testing.assert_allclose(updates, 0, atol=1e-15)
      self.assertEqual(state.count, 1)

  def test_bad_start_stays(self):
    tx = transforms.backtrack(_lbfgs(3), max_step=0.4, max_shrinks=3)
    points = jnp.asarray(coulomb.uniform(0, 6, 3, dtype=np.float64))
    state, step = tx.init(points), jax.jit(tx.update)
    for _ in range(5):
      updates, state = step(points, state, points, value=jnp.float64(np.nan))
      np.testing.assert_allclose(updates, 0, atol=1e-15)
    self.assertTrue(state.is_stalled)
    self.assertEqual(state.count, 0)

  def test_at_a_minimum(self):
    """No gradient at all: no division by it."""
    tx = transforms.backtrack(_lbfgs(3), max_step=0.4)
    points = jnp.eye(3, dtype=jnp.float64)
    state, step = tx.init(points), jax.jit(tx.update)
    for _ in range(3):
      updates, state = step(0 * points, state, points, value=jnp.float64(1.0))
      np.testing.assert_array_equal(updates, 0)
    self.assertFalse(state.is_stalled)

  def test_huge_gradients(self):
    """Squares above the range of float32 do not stop the first step."""
    tx = transforms.backtrack(_lbfgs(3), max_step=0.5)
    points = jnp.eye(3, dtype=jnp.float32)
    grads = jnp.roll(jnp.eye(3, dtype=jnp.float32), 1, axis=1) * 1e30
    updates, _ = jax.jit(tx.update)(
      grads, tx.init(points), points, value=jnp.float32(1.0)
    )
    want = coulomb.follow(
      'retraction', np.eye(3), -0.5 * np.roll(np.eye(3), 1, axis=1)
    )
    np.testing.assert_allclose(points + updates, want, atol=1e-6)

  @parameterized.parameters(
    ({'max_step': 0.0}, 'max_step must be positive'),
    ({'first_step': -1.0}, 'first_step must be positive'),
    ({'slope_rtol': 0.5}, 'slope_rtol must lie in'),
    ({'value_rtol': -1e-9}, 'value_rtol must be at least 0'),
    ({'shrink': 1.0}, 'shrink must lie in'),
    ({'max_shrinks': 0}, 'max_shrinks must be at least 1'),
    ({'map': 'straight'}, "map must be .* got 'straight'"),
  )
  def test_refuses(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      transforms.backtrack(_lbfgs(), **{'max_step': 1.0, **options})


class ShardedTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_lbfgs_equals_one_device(self):
    tx = transforms.backtrack(_lbfgs(3), max_step=0.1)
    points = jnp.asarray(coulomb.uniform(0, 16, 3))
    spec = jax.sharding.PartitionSpec('data')
    placed = mesh_lib.place(points, mesh_lib.make(data=8), spec)
    ends, energy = [], jax.jit(jax.value_and_grad(coulomb.energy))
    for x in (points, placed):
      state, step = tx.init(x), jax.jit(tx.update)
      for _ in range(6):
        value, grads = energy(x)
        updates, state = step(grads, state, x, value=value)
        x = optax.apply_updates(x, updates)
      ends.append(x)
    np.testing.assert_allclose(*ends, atol=1e-5)
    self.assertEqual(ends[1].sharding.spec, spec)
    self.assertEqual(state.direction.sharding.spec, spec)
