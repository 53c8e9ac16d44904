r"""Basin hopping: a Metropolis walk over the minima of an energy."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm
from emc2.kernels import riesz
from emc2.sphere import manifold

MOVES = ('reinsert', 'kick', 'kick_cap', 'rotate_cap')
"""The moves, in the order of `move_probabilities`."""

_PROBABILITIES = (0.35, 0.25, 0.25, 0.15)
_MAX_REINSERTED = 4
_NUM_SITES = 40


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  points: jax.Array  # (n, k): the minimum the walk is at.
  energy: jax.Array  # (): its energy.
  best_points: jax.Array  # (n, k): the lowest minimum so far.
  best_energy: jax.Array  # ()
  num_rejected: jax.Array  # (), int32: refused moves since the last accepted.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (): the energy of the proposed minimum.
  best_energy: jax.Array  # ()
  accepted: jax.Array  # (), bool.
  restarted: jax.Array  # (), bool.
  move: jax.Array  # (), int32: which of MOVES.


Minimize = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Points (n, k) to those of a minimum nearby, and its energy ()."""


def propose(
  key: jax.Array,
  points: jax.typing.ArrayLike,
  *,
  exponent: float = 1.0,
  move_probabilities: Sequence[float] | jax.Array = _PROBABILITIES,
) -> tuple[jax.Array, jax.Array]:
  r"""Moves points out of the basin they are in.

  With the spacing :math:`a = \sqrt{4 \pi / n}`, one of

  - `reinsert`: 1 to 4 points, each the one of highest potential among 8 drawn
    at random or, half of the time, any, go one after another to the best of 40
    random places;
  - `kick`: Gaussian noise of 0.1 to 0.55 `a` for all points;
  - `kick_cap`: the same for the points in a random cap;
  - `rotate_cap`: a random cap turns by a random angle, about its centre where
    k = 3, and in a random plane across it where k > 3.

  Args:
    key: PRNG key.
    points: (n, k), unit rows.
    exponent: of the energy whose potential `reinsert` compares; static.
    move_probabilities: (4,), of `MOVES`; they need not sum to 1. On a circle
      a cap cannot turn, and `rotate_cap` kicks it instead.

  Returns:
    The moved points (n, k), and which move it was, (), int32.
  """
  points = jnp.asarray(points)
  which_key, key = jax.random.split(key)
  odds = jnp.log(jnp.asarray(move_probabilities, points.dtype))
  which = jax.random.categorical(which_key, odds).astype(jnp.int32)
  moves = (
    functools.partial(_reinsert, exponent=exponent),
    _kick,
    _kick_cap,
    _rotate_cap if points.shape[1] > 2 else _kick_cap,
  )
  return jax.lax.switch(which, moves, key, points), which


def _reinsert(key, points, *, exponent):
  n, k = points.shape
  num_key, how_key, key = jax.random.split(key, 3)
  most = min(_MAX_REINSERTED, n - 1)
  number = jax.random.randint(num_key, (), 1, most + 1)
  by_potential = jax.random.bernoulli(how_key)

  def body(i, points):
    draw_key, site_key = jax.random.split(jax.random.fold_in(key, i))
    drawn = jax.random.randint(draw_key, (min(8, n),), 0, n)
    high = riesz.riesz(points, exponent=exponent).potential[drawn]
    taken = drawn[jnp.where(by_potential, jnp.argmax(high), 0)]
    sites = manifold.draw_uniform(site_key, _NUM_SITES, k, points.dtype)
    # The point that leaves must not repel its new places.
    apart = jnp.sum((sites[:, None] - points[None]) ** 2, axis=-1)
    apart = jnp.maximum(apart, jnp.finfo(points.dtype).tiny)
    push = -jnp.log(apart) if exponent == 0 else apart ** (-exponent / 2)
    cost = jnp.sum(push, axis=1) - push[:, taken]
    moved = points.at[taken].set(sites[jnp.argmin(cost)])
    return jnp.where(i < number, moved, points)

  return jax.lax.fori_loop(0, _MAX_REINSERTED, body, points)


def _kick(key, points):
  size_key, noise_key = jax.random.split(key)
  spacing = math.sqrt(4 * math.pi / points.shape[0])
  size = jax.random.uniform(size_key, (), points.dtype, 0.1, 0.55) * spacing
  noise = size * jax.random.normal(noise_key, points.shape, points.dtype)
  return manifold.retract(points, manifold.project(points, noise))


def _draw_cap(key, points):
  """The centre (k,) of a random cap, and whether each point is in it."""
  centre_key, size_key = jax.random.split(key)
  centre = manifold.draw_uniform(centre_key, 1, points.shape[1], points.dtype)[
    0
  ]
  height = jax.random.uniform(size_key, (), points.dtype, -0.2, 0.9)
  return centre, points @ centre > height


def _kick_cap(key, points):
  cap_key, kick_key = jax.random.split(key)
  _, inside = _draw_cap(cap_key, points)
  return jnp.where(inside[:, None], _kick(kick_key, points), points)


def _rotate_cap(key, points):
  cap_key, plane_key, angle_key = jax.random.split(key, 3)
  centre, inside = _draw_cap(cap_key, points)
  across = jax.random.normal(plane_key, (2, points.shape[1]), points.dtype)
  u, v = jnp.linalg.qr(jnp.stack([centre, *across], axis=1))[0].T[1:]
  angle = jax.random.uniform(angle_key, (), points.dtype, 0, 2 * math.pi)
  a, b = (points @ u)[:, None], (points @ v)[:, None]
  cosine, sine = jnp.cos(angle), jnp.sin(angle)
  turned = points + (a * (cosine - 1) - b * sine) * u[None]
  turned += (b * (cosine - 1) + a * sine) * v[None]
  return jnp.where(inside[:, None], turned, points)


def init(
  key: jax.Array, points: jax.typing.ArrayLike, *, minimize: Minimize
) -> State:
  """Starts the walk at the minimum near the points.

  Args:
    key: Not used.
    points: (n, k), unit rows.
    minimize: As for :func:`basin_hopping`.

  Returns:
    The state.
  """
  del key
  points, energy = minimize(jnp.asarray(points))
  # Anything found is better than a start that could not be minimised.
  energy = jnp.where(jnp.isfinite(energy), energy, jnp.inf)
  zero = jnp.zeros([], jnp.int32)
  return State(points, energy, points, energy, num_rejected=zero, count=zero)


def step(
  key: jax.Array,
  state: State,
  batch: object = None,
  *,
  minimize: Minimize,
  temperature: jax.typing.ArrayLike,
  max_rejected: jax.typing.ArrayLike,
  exponent: float,
  move_probabilities: Sequence[float] | jax.Array,
) -> tuple[State, Info]:
  """One step of :func:`basin_hopping`."""
  del batch
  move_key, accept_key, restart_key = jax.random.split(key, 3)
  moved, which = propose(
    move_key,
    state.points,
    exponent=exponent,
    move_probabilities=move_probabilities,
  )
  restarts = state.num_rejected >= max_rejected
  fresh = manifold.draw_uniform(
    restart_key, *state.points.shape, state.points.dtype
  )
  points, energy = minimize(jnp.where(restarts, fresh, moved))

  threshold = jax.random.exponential(accept_key, (), energy.dtype)
  rise = energy - state.energy
  warm = rise <= jnp.asarray(temperature, energy.dtype) * threshold
  # A minimisation that failed gives NaN, which no comparison lets in.
  accepted = (warm | restarts) & jnp.isfinite(energy)
  better = energy < state.best_energy
  pick = lambda condition, new, old: jnp.where(condition, new, old)
  following = State(
    points=pick(accepted, points, state.points),
    energy=pick(accepted, energy, state.energy),
    best_points=pick(better, points, state.best_points),
    best_energy=pick(better, energy, state.best_energy),
    num_rejected=pick(accepted, 0, state.num_rejected + 1),
    count=state.count + 1,
  )
  info = Info(energy, following.best_energy, accepted, restarts, which)
  return following, info


def basin_hopping(
  minimize: Minimize,
  *,
  temperature: jax.typing.ArrayLike = 0.02,
  max_rejected: jax.typing.ArrayLike = 60,
  exponent: float = 1.0,
  move_probabilities: Sequence[float] | jax.Array = _PROBABILITIES,
) -> algorithm.Algorithm:
  r"""Global search: perturb, minimise, accept as Metropolis does.

  From the minimum :math:`X` with energy :math:`E` to the minimum :math:`X'`
  that is found near a proposal of :func:`propose`, with probability
  :math:`\min(1, e^{-(E' - E) / T})`. After `max_rejected` refusals in a row
  the walk starts anew at uniform points. Under `jax.vmap` over keys and states
  many walks go on side by side.

  Args:
    minimize: (n, k) -> ((n, k), ()): a local minimum and its energy, pure;
      :func:`emc2.sphere.minimize` with its settings bound, say.
    temperature: :math:`T`, at least 0, in units of the energy.
    max_rejected: at least 1.
    exponent: of the energy; static.
    move_probabilities: (4,), of `MOVES`, at least 0.

  Returns:
    `init(key, points) -> State` and `step(key, state, batch) -> (State, Info)`;
    the batch is not read.

  Raises:
    ValueError: if a number is out of its range.

  References:
    Wales and Doye, `Global Optimization by Basin-Hopping
    <https://arxiv.org/abs/cond-mat/9803344>`_, 1997.
  """
  if isinstance(temperature, int | float) and not temperature >= 0:
    raise ValueError(f'temperature must be at least 0, got {temperature}.')
  if isinstance(max_rejected, int) and max_rejected < 1:
    raise ValueError(f'max_rejected must be at least 1, got {max_rejected}.')
  if len(move_probabilities) != len(MOVES):
    raise ValueError(
      f'move_probabilities must be one for each of {MOVES}, got'
      f' {len(move_probabilities)}.'
    )
  return algorithm.Algorithm(
    functools.partial(init, minimize=minimize),
    functools.partial(
      step,
      minimize=minimize,
      temperature=temperature,
      max_rejected=max_rejected,
      exponent=exponent,
      move_probabilities=move_probabilities,
    ),
  )
