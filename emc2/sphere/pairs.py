r"""Stochastic gradients of the Riesz energy, from some of the pairs.

A step costs as much as it draws pairs, down to one, and keeps nothing but the
points. At equal work it does not beat the full gradient: it is for points so
many that one pass over all their pairs takes too long.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm
from emc2.sphere import manifold, schedules


class Estimate(NamedTuple):
  """What :func:`estimate` returns."""

  energy: jax.Array  # ()
  gradient: jax.Array  # (n, k), in R^k: not projected.


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  points: jax.Array  # (n, k), unit rows.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one step; all before the points have moved."""

  loss: jax.Array  # (), dtype of the points: the estimate of the energy.
  gradient_norm: jax.Array  # (), of the tangent estimate, over all points.
  limited: jax.Array  # (): the share of the points whose move was cut short.


def draw_pairs(key: jax.Array, num_points: int, num_pairs: int) -> jax.Array:
  """Draws pairs of distinct points, independent and uniform.

  Args:
    key: PRNG key.
    num_points: n, at least 2. Static.
    num_pairs: B, at least 1. Static.

  Returns:
    (2, B), int32: the two points of each pair, which may come again.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> draw_pairs(jax.random.key(0), 2, 4).sum(axis=0)
    Array([1, 1, 1, 1], dtype=int32)
  """
  _check_num_points(num_points)
  if num_pairs < 1:
    raise ValueError(f'num_pairs must be at least 1, got {num_pairs}.')
  first_key, step_key = jax.random.split(key)
  first = jax.random.randint(first_key, (num_pairs,), 0, num_points, jnp.int32)
  step = jax.random.randint(step_key, (num_pairs,), 1, num_points, jnp.int32)
  return jnp.stack([first, (first + step) % num_points])


def draw_matching(key: jax.Array, num_points: int) -> jax.Array:
  """Draws a perfect matching, all of them alike: each point gets one partner.

  Args:
    key: PRNG key.
    num_points: n, at least 2; if it is odd, one point is left out. Static.

  Returns:
    (2, n // 2), int32: the two points of each pair.

  Raises:
    ValueError: If there are fewer than 2 points.

  Examples:
    >>> pairs = draw_matching(jax.random.key(0), 6)
    >>> jnp.sort(pairs.ravel())
    Array([0, 1, 2, 3, 4, 5], dtype=int32)
  """
  _check_num_points(num_points)
  half = num_points // 2
  points = jnp.arange(num_points, dtype=jnp.int32)
  return jax.random.permutation(key, points)[: 2 * half].reshape(2, half)


def estimate(
  points: jax.typing.ArrayLike, pairs: jax.typing.ArrayLike, exponent: float
) -> Estimate:
  r"""Estimates the energy and its gradient from some pairs.

  For B pairs, each of them uniform among all,

  .. math::
    \hat E = \frac{n (n - 1)}{2 B} \sum_{(a, b)} r_{ab}^{-s}, \quad
    \hat G = \frac{n (n - 1)}{2 B} \sum_{(a, b)}
             \frac{-s (x_a - x_b)}{r_{ab}^{s + 2}} (e_a - e_b)^\top

  are unbiased, with :math:`-\log r` for :math:`r^{-s}` and
  :math:`-(x_a - x_b) / r^2` for the force where :math:`s = 0`. The factor is
  :math:`n - 1` for a perfect matching, :math:`n` for one that leaves a point
  out, and 1 for all the pairs.

  .. note::
    A force of two points closer than some :math:`10^{-19/(s + 2)}` in float32,
    :math:`10^{-154/(s + 2)}` in float64, is cut to what does not overflow, and
    coincident points exert none; their energy is infinite.

  Args:
    points: (n, k), unit rows.
    pairs: (2, B), int, B at least 1: two distinct points each.
    exponent: :math:`s`, at least 0; 0 means the logarithmic energy. Static.

  Returns:
    :math:`\hat E`, (), and :math:`\hat G`, (n, k). As every pair pulls its
    points apart with one force, the rows of the gradient sum to 0.

  Raises:
    ValueError: If a shape or the exponent is wrong.

  Examples:
    >>> points = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> opposite = estimate(points, jnp.array([[0, 1], [2, 3]]), 2.0)
    >>> opposite.energy, opposite.gradient[0]
    (Array(1.5, dtype=float32), Array([-0.75,  0.  ], dtype=float32))

  References:
    Raman and Yang, `Optimization on the Surface of the (Hyper)-Sphere
    <https://arxiv.org/abs/1909.06463>`_, 2019, section on stochastic gradients,
    for single pairs.
  """
  points, pairs = jnp.asarray(points), jnp.asarray(pairs)
  _check_exponent(exponent)
  if points.ndim != 2:
    raise ValueError(f'points must be (n, k), got shape {points.shape}.')
  if pairs.ndim != 2 or pairs.shape[0] != 2 or pairs.shape[1] < 1:
    raise ValueError(
      f'pairs must be (2, B) with B at least 1, got shape {pairs.shape}.'
    )
  scale = _scale(points.shape[0], pairs.shape[1])
  return _sum_pairs(points, pairs, jnp.full(pairs.shape[1:], scale), exponent)


def _scale(num_points, num_pairs):
  return num_points * (num_points - 1) / (2 * num_pairs)


def _sum_pairs(points, pairs, weight, exponent):
  """The energy and the gradient of weighted pairs; `weight` is (B,)."""
  difference = points[pairs[0]] - points[pairs[1]]
  square = jnp.sum(difference * difference, axis=-1)
  if exponent == 0:
    potential, strength = -jnp.log(square) / 2, 1 / square
  else:
    potential = square ** (-exponent / 2)
    strength = exponent * potential / square
  # A force that is not finite has no direction left that a step could limit.
  bound = math.sqrt(float(jnp.finfo(points.dtype).max))
  strength = jnp.minimum(strength, bound)
  weight = weight.astype(points.dtype)
  energy = jnp.sum(jnp.where(weight > 0, weight * potential, 0))
  force = (-weight * strength)[:, None] * difference
  gradient = jnp.zeros_like(points).at[pairs[0]].add(force)
  return Estimate(energy, gradient.at[pairs[1]].add(-force))


def _sum_own_pairs(points, pairs, exponent, axis_name):
  """`estimate`, each device of the axis taking its part of the pairs."""
  num_pairs = pairs.shape[1]
  scale = _scale(points.shape[0], num_pairs)
  size = -(-num_pairs // jax.lax.axis_size(axis_name))
  number = jax.lax.axis_index(axis_name) * size + jnp.arange(size)
  # The last devices may have none left: what they take instead weighs nothing.
  weight = jnp.where(number < num_pairs, scale, 0.0)
  own = pairs[:, jnp.minimum(number, num_pairs - 1)]
  part = _sum_pairs(points, own, weight, exponent)
  # One message instead of two.
  flat = jnp.concatenate([part.energy[None], part.gradient.ravel()])
  flat = jax.lax.psum(flat, axis_name)
  return Estimate(flat[0], flat[1:].reshape(points.shape))


def init(key: jax.Array, points: jax.typing.ArrayLike) -> State:
  """Starts at the points (n, k), which :func:`manifold.check_points` checks.

  Args:
    key: Not used.
    points: (n, k), unit rows.

  Returns:
    The state.
  """
  del key
  return State(points=jnp.asarray(points), count=jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  batch: object = None,
  *,
  exponent: float,
  step_size: jax.typing.ArrayLike | schedules.Schedule,
  num_pairs: int | None = None,
  max_step: jax.typing.ArrayLike | None = None,
  axis_name: str | None = None,
) -> tuple[State, Info]:
  """One step of :func:`pair_sgd`."""
  del batch
  points = state.points
  num_points = points.shape[0]
  if num_pairs is None:
    pairs = draw_matching(key, num_points)
  else:
    pairs = draw_pairs(key, num_points, num_pairs)
  if axis_name is None:
    energy, gradient = estimate(points, pairs, exponent)
  else:
    energy, gradient = _sum_own_pairs(points, pairs, exponent, axis_name)
  gradient = manifold.project(points, gradient)
  rate = schedules.evaluate(step_size, state.count, points.dtype)
  moved, limited = manifold.move(points, -rate * gradient, max_step)
  info = Info(
    loss=energy, gradient_norm=jnp.linalg.norm(gradient), limited=limited
  )
  return State(points=moved, count=state.count + 1), info


def pair_sgd(
  exponent: float,
  *,
  step_size: jax.typing.ArrayLike | schedules.Schedule,
  num_pairs: int | None = None,
  max_step: jax.typing.ArrayLike | None = None,
  axis_name: str | None = None,
) -> algorithm.Algorithm:
  r"""Riemannian gradient descent on minibatches of pairs.

  With the estimate :math:`\hat G` of :func:`estimate`, from pairs that are
  drawn anew in each step,

  .. math::
    u_i = -\eta_t P_{x_i} \hat G_i, \quad
    x_i \leftarrow R_{x_i}\big(u_i \min(1, c / \|u_i\|)\big).

  The bound :math:`c` is needed: the force of one pair of uniform points has no
  variance on the ordinary sphere.

  .. note::
    The paper draws one pair in a step, minimises
    :math:`\sum_{i<j} r_{ij}^{-2} + \frac{\lambda}{2} \sum_i (\|x_i\|^2 - 1)^2`
    over all of :math:`R^k`, and bounds no move: its points end off the sphere,
    where the energy is below that of any points on it, and a close pair can
    throw them out for good. Its Algorithm 1 uses :math:`\nabla_{il}` for both
    points; the second must get :math:`\nabla_{li} = -\nabla_{il}`, or both move
    the same way. It also prints half the gradient of the penalty. Its step
    :math:`\gamma (n - 1)` is ours with `num_pairs=1`, `exponent=2.0` and
    :math:`\eta = 2 \gamma / n`.

  Args:
    exponent: :math:`s`, at least 0; 0 means the logarithmic energy. Static.
    step_size: :math:`\eta_t`, positive, or a function of the number of finished
      steps; :func:`default_step_size` makes one.
    num_pairs: How many pairs to draw, independent of each other; None draws a
      perfect matching, which has less variance and in which every point moves
      (but one, if they are odd). Static.
    max_step: :math:`c`, the largest move of a point, in radius; None means
      :math:`0.5 / \sqrt n`, infinity bounds nothing.
    axis_name: The mesh axis that splits the pairs under `jax.shard_map`, or
      None. Points and keys are replicated; the energy and the gradient are
      summed in one message. The number of pairs need not be a multiple of the
      size of the axis.

  Returns:
    `init(key, points) -> State` and `step(key, state, batch) -> (State, Info)`.
    The batch is not read: the pairs come from the key.

  Raises:
    ValueError: If a static argument, or one given as a number, is out of its
      range.

  Examples:
    >>> points = manifold.draw_uniform(jax.random.key(0), 12, 3)
    >>> sgd = pair_sgd(1.0, step_size=default_step_size(12, 2_000))
    >>> state = sgd.init(jax.random.key(1), points)
    >>> state, infos = algorithm.scan(
    ...   jax.random.key(2), state, jnp.arange(2_000), sgd.step
    ... )
    >>> everything = jnp.stack(jnp.triu_indices(12, 1))
    >>> estimate(state.points, everything, 1.0).energy < 50  # At least 49.17.
    Array(True, dtype=bool)

  References:
    Raman and Yang, `Optimization on the Surface of the (Hyper)-Sphere
    <https://arxiv.org/abs/1909.06463>`_, 2019, Algorithm 1; Bonnabel,
    `Stochastic Gradient Descent on Riemannian Manifolds
    <https://arxiv.org/abs/1111.5280>`_, 2013, for the projection and the
    retraction.
  """
  _check_exponent(exponent)
  if num_pairs is not None and num_pairs < 1:
    raise ValueError(f'num_pairs must be None or at least 1, got {num_pairs}.')
  if isinstance(step_size, int | float):
    schedules.check_positive('step_size', step_size)
  manifold.check_max_step(max_step)
  return algorithm.Algorithm(
    init,
    functools.partial(
      step,
      exponent=exponent,
      step_size=step_size,
      num_pairs=num_pairs,
      max_step=max_step,
      axis_name=axis_name,
    ),
  )


def default_step_size(
  num_points: int,
  num_steps: int,
  *,
  exponent: float = 1.0,
  start: float = 0.1,
  stop: float = 1e-3,
) -> schedules.Schedule:
  r"""A falling step size that fits the curvature of the energy.

  .. math::
    \eta_t = c_0 n^{-(s + 2) / 2} (c_1 / c_0)^{\min(t / T, 1)}

  The largest curvature at a minimum grows as :math:`n^{(s + 2) / 2}` on the
  ordinary sphere; the constants were chosen for :math:`s = 1`.

  Args:
    num_points: n, at least 2.
    num_steps: T, at least 1.
    exponent: :math:`s`, at least 0.
    start: :math:`c_0 > 0`.
    stop: :math:`c_1 > 0`.

  Returns:
    The schedule.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> schedule = default_step_size(100, 1_000)
    >>> [round(1e6 * float(schedule(t))) for t in (0, 500, 1_000)]
    [100, 10, 1]
  """
  _check_num_points(num_points)
  _check_exponent(exponent)
  schedules.check_positive('start', start)
  schedules.check_positive('stop', stop)
  unit = num_points ** (-(exponent + 2) / 2)
  return schedules.geometric(start * unit, stop * unit, num_steps)


def _check_num_points(num_points):
  if num_points < 2:
    raise ValueError(f'num_points must be at least 2, got {num_points}.')


def _check_exponent(exponent):
  if not (math.isfinite(exponent) and exponent >= 0):
    raise ValueError(f'exponent must be finite and at least 0, got {exponent}.')
