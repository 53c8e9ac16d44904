"""Optimisers on products of spheres against formulas and known minima."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms

from tests.transforms import coulomb

MAPS = ('retraction', 'exponential')


def _params():
  return {
    'one': coulomb.uniform(0, 4),
    'many': coulomb.uniform(1, 5, 3),
    'batch': coulomb.uniform(2, 2, 3, 5),
  }


def _grads():
  rng = np.random.default_rng(3)
  draw = lambda p: rng.normal(size=p.shape).astype(np.float32)
  return jax.tree.map(draw, _params())


def _update(tx, updates, params=None):
  as_arrays = lambda tree: jax.tree.map(jnp.asarray, tree)
  params = None if params is None else as_arrays(params)
  state = tx.init(as_arrays(updates) if params is None else params)
  update = lambda *args: tx.update(*args)[0]
  return jax.jit(update)(as_arrays(updates), state, params)


def _run(tx, points, steps, energy=coulomb.energy):
  """The points after so many updates; starts along leading axes together."""

  def run(points):
    def step(carry, _):
      points, state = carry
      grads = jax.grad(energy)(points)
      updates, state = tx.update(grads, state, points)
      return (optax.apply_updates(points, updates), state), None

    carry = points, tx.init(points)
    return jax.lax.scan(step, carry, length=steps)[0][0]

  for _ in range(points.ndim - 2):
    run = jax.vmap(run)
  return jax.jit(run)(points)


class Float64TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))


class ProjectTangentTest(parameterized.TestCase):
  def test_matches_a_loop(self):
    params, grads = _params(), _grads()
    got = _update(transforms.project_tangent(), grads, params)
    for name in params:
      want = coulomb.project(params[name], grads[name])
      np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)


class CapRowsTest(parameterized.TestCase):
  def test_matches_a_loop(self):
    updates = _grads()
    got = _update(transforms.cap_rows(1.5), updates)
    shortened = 0
    for name in updates:
      for at in np.ndindex(updates[name].shape[:-1]):
        row = updates[name][at].astype(np.float64)
        norm = np.linalg.norm(row)
        shortened += norm > 1.5
        want = row * min(1, 1.5 / norm)
        np.testing.assert_allclose(got[name][at], want, rtol=1e-5)
    self.assertBetween(shortened, 1, 11)

  def test_what_is_short_is_untouched(self):
    updates = _grads()
    updates['many'][0] = 0
    got = _update(transforms.cap_rows(100.0), updates)
    jax.tree.map(np.testing.assert_array_equal, got, updates)

  def test_huge_rows_keep_their_direction(self):
    rows = jnp.array([[3e30, 4e30]])
    got = _update(transforms.cap_rows(0.5), rows)
    np.testing.assert_allclose(got, [[0.3, 0.4]], rtol=1e-6)

  @parameterized.parameters(0, -1.0)
  def test_refuses(self, max_norm):
    with self.assertRaisesRegex(ValueError, 'max_norm must be positive'):
      transforms.cap_rows(max_norm)


class RetractTest(parameterized.TestCase):
  @parameterized.parameters(*MAPS)
  def test_lands_on_the_sphere(self, map):
    self._check_landing(np.float32, map)

  @parameterized.parameters(*MAPS)
  @pytest.mark.slow
  def test_lands_on_the_sphere_in_float64(self, map):
    self._check_landing(np.float64, map)

  def _check_landing(self, dtype, map):
    with jax.enable_x64(True):
      points = coulomb.uniform(0, 500, 3, dtype=dtype)
      vectors = coulomb.project(points, coulomb.uniform(1, 500, 3))
      vectors *= np.geomspace(1e-12, 2, 500)[:, None]
      vectors = jnp.asarray(vectors, dtype)
      updates = _update(transforms.retract(map), vectors, points)
      self.assertEqual(updates.dtype, dtype)
      ends = np.asarray(optax.apply_updates(points, updates))
    eps = np.finfo(dtype).eps
    want = coulomb.follow(map, points, vectors)
    np.testing.assert_allclose(ends, want, rtol=0, atol=2 * eps)
    norms = np.linalg.norm(ends.astype(np.longdouble), axis=-1)
    # One unit for each coordinate's rounding, and one for the norm's.
    np.testing.assert_allclose(norms.astype(float), 1, rtol=0, atol=2 * eps)

  def test_stays_there_for_ever(self):
    """No rounding adds up: not of radii, not of vectors half tangent."""
    for map in MAPS:
      tx = transforms.retract(map)

      def step(points, _, tx=tx):
        vectors = 0.1 * jnp.roll(points, 1, axis=1)
        updates, _ = tx.update(vectors, tx.init(points), points)
        return optax.apply_updates(points, updates), None

      points = jnp.asarray(coulomb.uniform(0, 50, 3))
      points = jax.lax.scan(step, points, length=2000)[0]
      norms = np.linalg.norm(np.asarray(points, np.float64), axis=-1)
      np.testing.assert_allclose(norms, 1, atol=3e-7)

  def test_names_of_maps(self):
    for make in (
      transforms.retract,
      lambda map: transforms.riemannian(optax.sgd(1.0), map=map),
      lambda map: transforms.search_on_sphere(optax.identity(), map),
    ):
      with self.assertRaisesRegex(ValueError, "map must be .* got 'straight'"):
        make('straight')


class OwnState(NamedTuple):
  """A state that the package does not know."""

  speed: Any
  square: Any


def _own():
  zeros = optax.tree.zeros_like

  def update_fn(updates, state, params=None):
    del params
    speed = optax.tree.add(updates, state.speed)
    return speed, OwnState(speed=speed, square=state.square)

  return optax.GradientTransformation(
    lambda params: OwnState(speed=zeros(params), square=zeros(params)),
    update_fn,
  )


class TransportMomentumTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('trace', optax.trace(0.9), ('trace',)),
    ('adam', optax.scale_by_adam(), ('mu',)),
    ('ademamix', optax.contrib.scale_by_ademamix(), ('m1', 'm2')),
    ('row_adam', transforms.scale_by_row_adam(), ('mu',)),
  )
  def test_what_moves(self, inner, fields):
    self._check_what_moves(inner, fields)

  @parameterized.named_parameters(
    ('ema', optax.ema(0.9), ('ema',)),
    ('adan', optax.scale_by_adan(), ('m', 'v', 'g')),
    ('amsgrad', optax.scale_by_amsgrad(), ('mu',)),
    ('belief', optax.scale_by_belief(), ('mu',)),
    ('lion', optax.scale_by_lion(), ('mu',)),
    ('novograd', optax.scale_by_novograd(), ('mu',)),
    ('sm3', optax.scale_by_sm3(), ('nu',)),
    ('simple', optax.contrib.scale_by_simplified_ademamix(), ('m',)),
    ('stddev', optax.scale_by_stddev(), ()),
    ('rms', optax.scale_by_rms(), ()),
    ('lbfgs', optax.scale_by_lbfgs(2), ()),
  )
  @pytest.mark.slow
  def test_what_moves_in_others(self, inner, fields):
    self._check_what_moves(inner, fields)

  def _check_what_moves(self, inner, fields):
    """Gives the inner optimiser the state that a hand would have made."""
    # Some of optax multiplies by counters as Python would.
    self.enterContext(jax.numpy_dtype_promotion('standard'))
    self.enterContext(jax.numpy_rank_promotion('allow'))
    params = jax.tree.map(jnp.asarray, _params())
    state = inner.init(params)
    rng = np.random.default_rng(0)
    fill = lambda leaf: (
      jnp.asarray(1 + rng.uniform(size=leaf.shape), leaf.dtype)
      if jnp.issubdtype(leaf.dtype, jnp.floating)
      else leaf + 3
    )
    state = jax.tree.map(fill, state)
    by_hand = state._replace(
      **{
        field: jax.tree.map(
          lambda p, m: jnp.asarray(coulomb.project(p, m), m.dtype),
          params,
          getattr(state, field),
        )
        for field in fields
      }
    )
    grads = jax.tree.map(jnp.asarray, _grads())
    plain = jax.jit(inner.update)
    want = plain(grads, by_hand, params)
    tx = transforms.transport_momentum(inner)
    got = jax.jit(tx.update)(grads, state, params)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, got, want)
    if fields:
      idle = plain(grads, state, params)[0]
      gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), idle, got[0])
      self.assertGreater(max(jax.tree.leaves(gaps)), 1e-2)

  @parameterized.named_parameters(
    ('chain', lambda tx: optax.chain(optax.identity(), optax.chain(tx))),
    (
      'inject_hyperparams',
      lambda tx: optax.inject_hyperparams(lambda x: optax.chain(tx))(x=1.0),
    ),
    (
      'masked',
      lambda tx: optax.masked(tx, {'one': True, 'many': True, 'batch': False}),
    ),
    (
      'partition',
      lambda tx: optax.partition(
        {'here': tx, 'there': optax.set_to_zero()},
        {'one': 'here', 'many': 'here', 'batch': 'there'},
      ),
    ),
  )
  def test_goes_through(self, wrap):
    self._check_goes_through(wrap)

  @parameterized.named_parameters(
    (
      'multi_steps',
      lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    ),
    ('if_finite', lambda tx: optax.apply_if_finite(tx, 3)),
  )
  @pytest.mark.slow
  def test_goes_through_elsewhere(self, wrap):
    self._check_goes_through(wrap)

  def _check_goes_through(self, wrap):
    # MultiSteps divides by its counter.
    self.enterContext(jax.numpy_dtype_promotion('standard'))
    tx = transforms.transport_momentum(wrap(optax.trace(decay=0.5)))
    params = jax.tree.map(jnp.asarray, _params())
    grads = jax.tree.map(jnp.asarray, _grads())
    there = jax.tree.map(lambda p: jnp.roll(p, 1, axis=-1), params)
    _, state = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(grads, state, there)
    for name in ('one', 'many'):
      want = grads[name] + 0.5 * coulomb.project(there[name], grads[name])
      np.testing.assert_allclose(updates[name], want, rtol=1e-4, atol=1e-5)

  @pytest.mark.slow
  def test_goes_into_a_mask(self):
    mask = {'one': True, 'many': True, 'batch': False}
    tx = optax.masked(transforms.transport_momentum(optax.trace(0.5)), mask)
    params, grads = jax.tree.map(jnp.asarray, (_params(), _grads()))
    _, state = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(grads, state, params)
    want = grads['one'] + 0.5 * coulomb.project(params['one'], grads['one'])
    np.testing.assert_allclose(updates['one'], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(updates['batch'], grads['batch'])

  @pytest.mark.slow
  def test_momentum_of_another_dtype(self):
    self.enterContext(jax.numpy_dtype_promotion('standard'))
    tx = transforms.transport_momentum(optax.trace(0.5, False, jnp.bfloat16))
    points, push = jnp.eye(3), jnp.ones((3, 3))
    _, state = tx.update(push, tx.init(points), points)
    updates, state = tx.update(jnp.zeros((3, 3)), state, points)
    self.assertEqual(state.trace.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(updates, 0.5 * (1 - np.eye(3)))

  def test_states_of_ones_own(self):
    points, push = jnp.eye(3), jnp.ones((3, 3))
    for buffers, want in (
      ({OwnState: ('speed',)}, 1 - np.eye(3)),
      ({}, np.ones((3, 3))),
    ):
      tx = transforms.transport_momentum(_own(), buffers)
      _, state = tx.update(push, tx.init(points), points)
      updates, _ = tx.update(0 * push, state, points)
      np.testing.assert_array_equal(updates, want)

  def test_searches_below_a_buffer(self):
    inner = optax.chain(optax.trace(0.5))
    tx = transforms.transport_momentum(
      optax.GradientTransformation(
        lambda params: OwnState(inner.init(params), inner.init(params)),
        lambda updates, state, params: (state.square[0].trace, state),
      ),
      {OwnState: (), **transforms.MOMENTUM_BUFFERS},
    )
    points = jnp.eye(3)
    state = jax.tree.map(jnp.ones_like, tx.init(points))
    updates, _ = tx.update(points, state, points)
    np.testing.assert_array_equal(updates, 1 - np.eye(3))

  @parameterized.parameters(OwnState, dict)
  def test_refuses(self, kind):
    with self.assertRaisesRegex(ValueError, "buffers .* has no field 'mass'"):
      transforms.transport_momentum(_own(), {kind: ('mass',)})


class SearchOnSphereTest(Float64TestCase):
  @parameterized.product(
    map=MAPS,
    search=(
      optax.scale_by_zoom_linesearch(20),
      optax.scale_by_backtracking_linesearch(20, store_grad=True),
    ),
  )
  @pytest.mark.slow
  def test_keeps_what_is_true_where_it_ends(self, map, search):
    points = jnp.asarray(coulomb.uniform(0, 8, 3, dtype=np.float64))
    tx = transforms.riemannian(optax.sgd(0.5), line_search=search, map=map)
    value, grad = jax.value_and_grad(coulomb.energy)(points)
    step = lambda grad, state, points, value: tx.update(
      grad, state, points, value=value, grad=grad, value_fn=coulomb.energy
    )
    updates, state = jax.jit(step)(grad, tx.init(points), points, value)
    ends = points + updates
    self.assertGreater(jnp.linalg.norm(updates), 0.1)
    self.assertLess(coulomb.energy(ends), value)
    got = optax.tree.get(state, 'value')
    np.testing.assert_allclose(got, coulomb.energy(ends), rtol=1e-12)
    want = coulomb.project(ends, coulomb.gradient(ends))
    got = optax.tree.get(state, 'grad')
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)

  @pytest.mark.slow
  def test_still_points_stay(self):
    """The gradient of a row that has not moved is that of its point."""
    search = optax.scale_by_backtracking_linesearch(9, store_grad=True)
    for map in MAPS:
      tx = transforms.search_on_sphere(search, map)
      points = jnp.asarray(coulomb.uniform(0, 4, 3, dtype=np.float64))
      value, grad = jax.value_and_grad(coulomb.energy)(points)
      down = jnp.asarray(-coulomb.project(points, grad)).at[0].set(0)
      step = lambda grad, state, value, tx=tx, points=points, down=down: (
        tx.update(
          0.01 * down,
          state,
          points,
          value=value,
          grad=grad,
          value_fn=coulomb.energy,
        )
      )
      updates, state = jax.jit(step)(grad, tx.init(points), value)
      np.testing.assert_array_equal(updates[0], 0)
      ends = coulomb.follow(map, points, updates)
      want = coulomb.project(ends, coulomb.gradient(ends))
      np.testing.assert_allclose(state.grad, want, rtol=1e-9, atol=1e-9)

  def test_hands_on_what_the_objective_takes(self):
    search = optax.scale_by_backtracking_linesearch(20)
    tx = transforms.search_on_sphere(search)
    points = jnp.asarray(coulomb.uniform(0, 4, 3, dtype=np.float64))
    fn = lambda points, target: jnp.sum((points - target) ** 2)
    target = jnp.roll(points, 1, axis=0)
    value, grad = jax.value_and_grad(fn)(points, target)
    updates, state = tx.update(
      -0.1 * grad,
      tx.init(points),
      points,
      value=value,
      grad=grad,
      value_fn=fn,
      target=target,
    )
    self.assertIsNone(state.grad)
    want = np.sum((coulomb.normalize(points + updates) - target) ** 2)
    np.testing.assert_allclose(state.value, want, rtol=1e-12)

  @pytest.mark.slow
  def test_lbfgs_finds_the_icosahedron(self):
    # L-BFGS adds indices of two widths.
    self.enterContext(jax.numpy_dtype_promotion('standard'))
    step = optax.chain(optax.scale_by_lbfgs(memory_size=20), optax.scale(-1))
    search = optax.scale_by_zoom_linesearch(20, initial_guess_strategy='one')
    tx = transforms.riemannian(step, line_search=search, max_step=0.3)
    fn = coulomb.energy

    def update(carry, _):
      points, state = carry
      value, grad = optax.value_and_grad_from_state(fn)(points, state=state)
      updates, state = tx.update(
        grad, state, points, value=value, grad=grad, value_fn=fn
      )
      return (optax.apply_updates(points, updates), state), None

    points = jnp.asarray(coulomb.uniform(0, 12, 3, dtype=np.float64))
    carry = points, tx.init(points)
    points = jax.jit(lambda c: jax.lax.scan(update, c, length=50))(carry)[0][0]
    np.testing.assert_allclose(fn(points), coulomb.MINIMA[12], rtol=1e-9)
    slope = coulomb.project(points, coulomb.gradient(points))
    self.assertLess(np.abs(slope).max(), 1e-6)


class RiemannianTest(Float64TestCase):
  def test_matches_a_loop(self):
    """Momentum on spheres, written out."""
    points = coulomb.uniform(0, 6, 3, dtype=np.float64)
    target = coulomb.uniform(1, 6, 3, dtype=np.float64)
    fn = lambda x: jnp.sum((x - target) ** 4)
    for options in (
      {},
      {'transport': False},
      {'max_step': 0.1},
      {'map': 'exponential'},
    ):
      tx = transforms.riemannian(optax.sgd(0.1, momentum=0.9), **options)
      got = _run(tx, jnp.asarray(points), 20, fn)
      x, m = points, np.zeros_like(points)
      for _ in range(20):
        g = coulomb.project(x, 4 * (x - target) ** 3)
        if options.get('transport', True):
          m = coulomb.project(x, m)
        m = g + 0.9 * m
        v = coulomb.project(x, -0.1 * m)
        longest = options.get('max_step', np.inf)
        v *= np.minimum(1, longest / np.linalg.norm(v, axis=1, keepdims=True))
        x = coulomb.follow(options.get('map', 'retraction'), x, v)
      np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)

  def test_each_option_counts(self):
    """The cases above end in places of their own."""
    points = jnp.asarray(coulomb.uniform(0, 6, 3, dtype=np.float64))
    target = coulomb.uniform(1, 6, 3, dtype=np.float64)
    fn = lambda x: jnp.sum((x - target) ** 4)
    ends = [
      _run(
        transforms.riemannian(optax.sgd(0.1, momentum=0.9), **options),
        points,
        20,
        fn,
      )
      for options in (
        {},
        {'transport': False},
        {'max_step': 0.1},
        {'map': 'exponential'},
      )
    ]
    for i, first in enumerate(ends):
      for second in ends[:i]:
        self.assertGreater(np.abs(first - second).max(), 1e-4)

  @pytest.mark.slow
  def test_takes_any_gradient_of_the_energy(self):
    """In space, tangent, or of the energy of normalised rows."""
    points = jnp.asarray(coulomb.uniform(0, 7, 3, dtype=np.float64))
    in_space = jnp.asarray(coulomb.gradient(points))
    scaled = lambda y: coulomb.energy(
      y / jnp.linalg.norm(y, axis=1, keepdims=True)
    )
    tx = transforms.riemannian(optax.sgd(0.1))
    want = _update(tx, in_space, points)
    for grads in (coulomb.project(points, in_space), jax.grad(scaled)(points)):
      np.testing.assert_allclose(
        _update(tx, grads, points), want, rtol=1e-10, atol=1e-12
      )

  @pytest.mark.slow
  def test_lengths_without_retraction(self):
    """Energies of directions: gradients are tangent, and rows only grow."""
    rng = np.random.default_rng(0)
    fn = lambda y: coulomb.energy(y / jnp.linalg.norm(y, axis=1, keepdims=True))
    tx = optax.sgd(0.1)
    rows = jnp.asarray(rng.normal(size=(9, 3)))
    state = tx.init(rows)
    for _ in range(5):
      grads = jax.grad(fn)(rows)
      radial = np.sum(np.asarray(rows * grads), axis=1)
      np.testing.assert_allclose(radial, 0, atol=1e-13)
      updates, state = tx.update(grads, state, rows)
      following = optax.apply_updates(rows, updates)
      growth = jnp.sum(following**2, axis=1) - jnp.sum(rows**2, axis=1)
      want = 0.1**2 * np.sum(np.asarray(grads) ** 2, axis=1)
      np.testing.assert_allclose(growth, want, rtol=1e-10, atol=1e-13)
      rows = following

  @parameterized.named_parameters(
    ('sgd', optax.sgd(0.02), True),
    ('momentum', optax.sgd(0.01, momentum=0.9, nesterov=True), True),
    (
      'row_adam',
      optax.chain(transforms.scale_by_row_adam(), optax.scale(-0.02)),
      True,
    ),
    ('adam', optax.chain(optax.scale_by_adam(), optax.scale(-0.02)), False),
  )
  def test_turns_with_the_points(self, inner, turns):
    points = coulomb.uniform(0, 12, 3, dtype=np.float64)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    tx = transforms.riemannian(inner, max_step=0.1)
    self.enterContext(jax.numpy_dtype_promotion('standard'))
    first = _run(tx, jnp.asarray(points), 50) @ turn
    second = _run(tx, jnp.asarray(points @ turn), 50)
    gap = np.abs(first - second).max()
    if turns:
      self.assertLess(gap, 1e-9)
    else:
      self.assertGreater(gap, 1e-3)

  @parameterized.parameters(12, 32)
  @pytest.mark.slow
  def test_descent_finds_the_minimum(self, n):
    points = coulomb.uniform(0, 3, n, 3, dtype=np.float64)
    tx = transforms.riemannian(
      optax.sgd(4 * n**-1.5), max_step=0.5 / np.sqrt(n)
    )
    ends = _run(tx, jnp.asarray(points), 2000)
    energies = jax.vmap(coulomb.energy)(ends)
    np.testing.assert_allclose(energies, coulomb.MINIMA[n], rtol=1e-9)

  def test_two_charges(self):
    """Their angle, step after step, in closed form."""
    angle, rate = 0.3, 0.05
    points = jnp.array([[1.0, 0.0, 0.0], [np.cos(0.3), np.sin(0.3), 0.0]])
    tx = transforms.riemannian(optax.sgd(rate))
    step = jax.jit(
      lambda x: x + tx.update(jax.grad(coulomb.energy)(x), tx.init(x), x)[0]
    )
    while angle < 2.9:
      push = np.cos(angle / 2) / (4 * np.sin(angle / 2) ** 2)
      angle += 2 * np.arctan(rate * push)
      points = step(points)
      got = np.arccos(np.sum(np.asarray(points[0] * points[1])))
      np.testing.assert_allclose(got, angle, atol=1e-12)

  @parameterized.parameters(0, -0.5)
  def test_refuses(self, max_step):
    with self.assertRaisesRegex(ValueError, 'max_step must be positive'):
      transforms.riemannian(optax.sgd(1.0), max_step=max_step)
