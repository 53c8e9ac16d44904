"""Ways to spread points on a sphere, for :mod:`emc2.experiments.thomson`.

Each is a `Method` of one chain: many run side by side under `jax.vmap`. A step
is one energy with its gradient, or the same number of pairs, save in basin
hopping, where it is a hop. So no chain waits for another's line search: only
the hops are loops that last until their slowest chain has ended.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import sphere, transforms
from emc2.kernels import riesz
from emc2.sphere import basin_hopping, manifold, minimize, pairs

MEMORY = 20
"""Pairs that L-BFGS keeps."""


class Problem(NamedTuple):
  """What the methods are made for."""

  num_points: int
  dim: int
  exponent: float
  num_steps: int
  hops: int
  push: float  # The median force outwards of the points at the start.

  @property
  def spacing(self) -> float:
    """The side of a cube as large as a point's share of the sphere."""
    half = self.dim / 2
    area = 2 * math.pi**half / math.gamma(half)
    return (area / self.num_points) ** (1 / (self.dim - 1))

  @property
  def step_size(self) -> float:
    r"""What gradient descent takes near a minimum: 0.9 over the curvature.

    Neighbours at the spacing :math:`a` make the largest curvature about
    :math:`5 w / a^{s + 2}` with :math:`w = s (s + 1)`, or 1 for the logarithm,
    in proportion to k - 1 where k > 3; but it is at least the push outwards. So
    on the ordinary sphere the step size is :math:`4 n^{-3/2}` for s = 1 and
    :math:`4.7 n^{-2}` for s = 2. Measured curvatures for k from 2 to 16 and s
    from 0 to 4 are below 1.1 over it, and descent is stable below 2.
    """
    s = self.exponent
    weight = s * (s + 1) if s > 0 else 1.0
    near = 5 * max(1.0, (self.dim - 1) / 2) * weight
    return 0.9 / max(near * self.spacing ** -(s + 2), self.push)

  def energy(self, points: jax.Array) -> jax.Array:
    """Of points (n, k), ()."""
    return sphere.energy(points, self.exponent)


class Method(NamedTuple):
  """A way to minimise; of one chain."""

  init: Callable[..., Any]  # (key, points) -> state.
  step: Callable[..., Any]
  """(key, state, number of steps done) -> (state, points, energy): of points on
  the sphere, with NaN for an energy that was not measured in this step."""
  num_steps: int


def make_lbfgs(problem: Problem) -> optax.GradientTransformationExtraArgs:
  """L-BFGS on the sphere, which evaluates once in an update."""
  return transforms.backtrack(
    optax.chain(optax.scale_by_lbfgs(MEMORY), optax.scale(-1)),
    max_step=0.17 * problem.spacing,
    first_step=0.03 * problem.spacing,
  )


def _transform(problem, make):
  """A method from `make(key)`, a transform whose updates land on the sphere."""

  def init(key, points):
    return points, make(key).init(points)

  def step(key, state, number):
    del number
    points, inner = state
    value, gradient = jax.value_and_grad(problem.energy)(points)
    updates, inner = make(key).update(gradient, inner, points, value=value)
    return (optax.apply_updates(points, updates), inner), points, value

  return Method(init, step, problem.num_steps)


def _lbfgs(problem):
  return _transform(problem, lambda key: make_lbfgs(problem))


def _riemannian(problem, inner):
  bounded = functools.partial(
    transforms.riemannian, max_step=0.14 * problem.spacing
  )
  return _transform(problem, lambda key: bounded(inner(key)))


def _warm(problem):
  """The step size: shorter where points may still be close to each other."""
  full = problem.step_size
  steps = max(1, problem.num_steps // 10)
  return optax.linear_schedule(0.3 * full, full, steps)


def _gradient_descent(problem):
  return _riemannian(problem, lambda key: optax.sgd(_warm(problem)))


def _momentum(problem):
  return _riemannian(problem, lambda key: optax.sgd(_warm(problem), 0.9))


def _cosine(problem):
  """How far Adam moves a coordinate: at first as far as it may, then less."""
  return optax.cosine_decay_schedule(0.2 * problem.spacing, problem.num_steps)


def _adam(problem):
  return _riemannian(problem, lambda key: optax.adam(_cosine(problem)))


def _row_adam(problem):
  inner = optax.chain(
    transforms.scale_by_row_adam(),
    optax.scale_by_learning_rate(_cosine(problem)),
  )
  return _riemannian(problem, lambda key: inner)


def _annealing(problem):
  """Langevin dynamics that cool by equal factors, then descend without noise.

  The first temperature is a tenth of the Coulomb energy over n squared.
  """
  hot = 0.1 * problem.push / problem.num_points
  steps = max(1, int(0.8 * problem.num_steps))

  def temperature(count):
    cooled = hot * 1e-4 ** (count / steps)
    return jnp.where(count < steps, cooled, 0.0)

  rate = _warm(problem)

  def inner(key):
    noise = transforms.add_tangent_noise(key, rate, temperature)
    return optax.chain(optax.sgd(rate), noise)

  return _riemannian(problem, inner)


def _pair_sgd(problem):
  """Descent on matchings; n - 1 of them, or n, hold as many pairs as all."""
  n = problem.num_points
  count = n - 1 + n % 2
  sgd = pairs.pair_sgd(
    problem.exponent,
    step_size=pairs.default_step_size(
      n, problem.num_steps * count, exponent=problem.exponent
    ),
    max_step=0.14 * problem.spacing,
  )

  def step(key, state, number):
    del number

    def body(i, state):
      return sgd.step(jax.random.fold_in(key, i), state, None)[0]

    state = jax.lax.fori_loop(0, count, body, state)
    return state, state.points, problem.energy(state.points)

  return Method(sgd.init, step, problem.num_steps)


class Search(NamedTuple):
  """Where L-BFGS without a sphere is, and what it tries next."""

  params: jax.Array  # (n, m): the last accepted.
  direction: jax.Array  # (n, m)
  value: jax.Array  # (): there; infinite at the start.
  slope: jax.Array  # (): along the direction.
  step_size: jax.Array  # ()
  inner: optax.OptState

  @property
  def trial(self) -> jax.Array:
    """What to evaluate next, (n, m)."""
    return self.params + self.step_size * self.direction


def _start_search(params):
  zero = jnp.zeros([], params.dtype)
  return Search(
    params,
    direction=jnp.zeros_like(params),
    value=zero + jnp.inf,
    slope=zero,
    step_size=zero,
    inner=optax.scale_by_lbfgs(MEMORY).init(params),
  )


def _search(problem, state, value_fn):
  """Evaluates the trial, and takes it or a shorter one next.

  Value and slope together decide, as in :func:`emc2.transforms.backtrack`, but
  in a space that is not bent.
  """
  trial = state.trial
  value, gradient = jax.value_and_grad(value_fn)(trial)
  slope = jnp.vdot(gradient, state.direction)
  change = value - state.value
  accept = change <= 1e-4 * state.step_size * state.slope
  is_flat = jnp.abs(change) <= 1e-6 * jnp.abs(state.value)
  accept |= is_flat & (slope <= -0.9998 * state.slope)
  accept &= jnp.isfinite(value) & jnp.isfinite(slope)

  lbfgs = optax.scale_by_lbfgs(MEMORY)
  direction, inner = lbfgs.update(gradient, state.inner, trial)
  restart = ~(jnp.vdot(direction, gradient) > 0)
  is_fresh = restart | (state.inner.count == 0)
  inner = optax.tree.where(restart, lbfgs.init(trial), inner)
  direction = -jnp.where(restart, gradient, direction)
  longest = jnp.max(jnp.linalg.norm(direction, axis=1))
  bound = jnp.where(is_fresh, 0.03, 0.17) * problem.spacing
  tiny = jnp.finfo(trial.dtype).tiny
  direction *= jnp.minimum(1, bound / jnp.maximum(longest, tiny))
  taken = Search(
    trial,
    direction=direction,
    value=value,
    slope=jnp.vdot(gradient, direction),
    step_size=jnp.ones_like(value),
    inner=inner,
  )
  refused = state._replace(step_size=0.4 * state.step_size)
  return optax.tree.where(accept, taken, refused)


def _spherical_lbfgs(problem):
  """The angle from the pole, and the one round it, without bounds."""

  def place(angles):
    polar, azimuth = angles[:, 0], angles[:, 1]
    x, y = jnp.cos(azimuth), jnp.sin(azimuth)
    wide = jnp.sin(polar)
    return jnp.stack([wide * x, wide * y, jnp.cos(polar)], axis=1)

  def init(key, points):
    del key
    x, y, z = points.T
    angles = jnp.stack([jnp.arccos(z), jnp.arctan2(y, x)], axis=1)
    return _start_search(angles.astype(points.dtype))

  def step(key, state, number):
    del key, number
    value_fn = lambda angles: problem.energy(place(angles))
    state = _search(problem, state, value_fn)
    return state, place(state.params), state.value

  return Method(init, step, problem.num_steps)


class Penalised(NamedTuple):
  """Points that may leave the sphere, and what holds them."""

  search: Search
  multipliers: jax.Array  # (n,)


def _penalised(problem, *, weights, multiplies):
  r"""Minimises without a sphere what grows with the distance to it.

  .. math::
    E(Y) + \frac{\lambda}{2} \sum_i (\|y_i\|^2 - 1)^2
         - \sum_i \mu_i (\|y_i\|^2 - 1)

  In stages whose weights grow by equal factors, from the first number to the
  last, each in units of the points' push outwards; after each,
  :math:`\mu_i \leftarrow \mu_i - \lambda (\|y_i\|^2 - 1)` or nothing. The
  gradient is automatic, so that of the penalty is
  :math:`2 \lambda (\|y\|^2 - 1) y`; the paper prints half of it.
  """
  num_stages = min(25, max(1, problem.num_steps // 40))
  # The last stage has what is left over.
  length = problem.num_steps // num_stages
  first, last = weights
  off = lambda points: jnp.sum(points * points, axis=1) - 1

  def init(key, points):
    del key
    zeros = jnp.zeros_like(points[:, 0])
    return Penalised(_start_search(points), zeros)

  def step(key, state, number):
    del key
    stage = jnp.minimum(number // length, num_stages - 1)
    grown = (last / first) ** ((stage + 1) / num_stages)
    weight = (problem.push * first * grown).astype(state.multipliers.dtype)

    def value_fn(points):
      gap = off(points)
      penalty = weight / 2 * jnp.sum(gap * gap)
      return problem.energy(points) + penalty - state.multipliers @ gap

    search, multipliers = state
    search = _search(problem, search, value_fn)
    done = number + 1
    is_last = done == problem.num_steps
    ends = (done % length == 0) & (done < num_stages * length) | is_last
    points = manifold.normalize(search.params)
    # No part of the method: left out of most steps, since it takes as long.
    measured = jax.lax.cond(
      ends | (number == 0),
      problem.energy,
      lambda points: jnp.full_like(points, jnp.nan, shape=()),
      points,
    )
    if multiplies:
      moved = multipliers - weight * off(search.params)
      multipliers = jnp.where(ends, moved, multipliers)
    fresh = _start_search(search.params)
    search = optax.tree.where(ends, fresh, search)
    return Penalised(search, multipliers), points, measured

  return Method(init, step, problem.num_steps)


def _basin_hopping(problem):
  """Hops between minima; the first step only goes to the one nearby."""

  def find(points):
    eps = float(jnp.finfo(points.dtype).eps)
    scale = problem.push * math.sqrt(problem.num_points)
    found = minimize.minimize(
      points,
      problem.energy,
      make_lbfgs(problem),
      tolerance=max(1e-7, 64 * eps) * scale,
      max_evaluations=1_000,
    )
    return found.points, found.energy

  # At Coulomb's energy in three dimensions 0.02.
  walk = functools.partial(
    basin_hopping.basin_hopping,
    temperature=0.04 * problem.push / problem.num_points,
    exponent=problem.exponent,
  )

  def init(key, points):
    worst = jnp.full_like(points, jnp.inf, shape=())
    return walk(lambda points: (points, worst)).init(key, points)

  def step(key, state, number):
    start = lambda moved: jnp.where(number == 0, state.points, moved)
    hop = walk(lambda moved: find(start(moved))).step
    state, _ = hop(key, state, None)
    return state, state.best_points, state.best_energy

  return Method(init, step, problem.hops + 1)


METHODS: dict[str, Callable[[Problem], Method]] = {
  'lbfgs': _lbfgs,
  'gradient_descent': _gradient_descent,
  'momentum': _momentum,
  'adam': _adam,
  'row_adam': _row_adam,
  'pair_sgd': _pair_sgd,
  'annealing': _annealing,
  'spherical_lbfgs': _spherical_lbfgs,
  'penalty': functools.partial(
    _penalised, weights=(1.0, 1e3), multiplies=False
  ),
  'augmented_lagrangian': functools.partial(
    _penalised, weights=(1.0, 30.0), multiplies=True
  ),
  'basin_hopping': _basin_hopping,
}
"""By name: a problem to a method."""


def push_outwards(points: np.ndarray, exponent: float) -> float:
  r"""How hard the points (..., n, k) push outwards; a unit for weights.

  The median over all points of :math:`-\langle x_i, G_i \rangle`, which is
  :math:`\frac{s}{2} V_i`, or (n - 1) / 2 for s = 0; two points that happen to
  be close push without bound.
  """
  if exponent == 0:
    return (points.shape[-2] - 1) / 2
  potential = riesz.riesz(points, exponent=exponent).potential
  return exponent / 2 * float(np.median(potential))
