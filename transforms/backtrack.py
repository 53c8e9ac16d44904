"""A line search of one evaluation per update, for many chains at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emc2.sphere import manifold
from emc2.transforms import rows


class BacktrackState(NamedTuple):
  """State of :func:`backtrack`; its scalars are at least float32."""

  params: optax.Params  # The last accepted points.
  gradient: optax.Updates  # As params: the Riemannian gradient there.
  direction: optax.Updates  # As params: tangent, the move of step size 1.
  value: jax.Array  # (): the objective at the accepted points.
  slope: jax.Array  # (): its derivative along the direction there.
  step_size: jax.Array  # (): how far along the direction the trial is.
  num_shrinks: jax.Array  # (), int32: trials refused since the last accepted.
  count: jax.Array  # (), int32: points accepted, the first one included.
  is_fresh: jax.Array  # (), bool: whether the inner state knows no step yet.
  is_stalled: jax.Array  # (), bool: whether the search has given up.
  inner_state: optax.OptState


def backtrack(
  inner: optax.GradientTransformation,
  *,
  max_step: jax.typing.ArrayLike,
  first_step: jax.typing.ArrayLike | None = None,
  slope_rtol: jax.typing.ArrayLike = 1e-4,
  value_rtol: jax.typing.ArrayLike = 1e-6,
  shrink: jax.typing.ArrayLike = 0.4,
  max_shrinks: jax.typing.ArrayLike = 20,
  map: str = 'retraction',
) -> optax.GradientTransformationExtraArgs:
  r"""Searches on spheres along an optimiser's moves, one evaluation at a time.

  The params are a trial :math:`y = R_x(t d)` from the last accepted points
  :math:`x`. An update reads its value and gradient. With
  :math:`\varphi(t) = E(R_x(t d))`, it accepts the trial if

  .. math::
    \varphi(t) \le \varphi(0) + c\, t\, \varphi'(0)
    \quad \text{or} \quad
    |\varphi(t) - \varphi(0)| \le \epsilon |\varphi(0)|, \;
    \varphi'(t) \le (2 c - 1) \varphi'(0),

  the second since near a minimum the differences of values are lost in
  rounding long before those of slopes. Then `inner` makes of the Riemannian
  gradient a new direction :math:`d`, shortened as a whole until its longest row
  is `max_step`, and the next trial is at :math:`t = 1`. Otherwise
  :math:`t \leftarrow 0.4\, t`. A direction that does not descend is replaced
  by :math:`-g`, and `inner` starts anew.

  The line searches of optax evaluate the objective in a loop within one
  update; under :func:`jax.vmap` each chain waits for the longest loop. Here
  each update of each chain is one evaluation, made outside, and nothing waits.

  .. note::
    :func:`optax.scale_by_lbfgs` keeps pairs of negative curvature, which this
    search does not rule out. They are rare, and a direction that they spoil is
    caught as one that does not descend. A refused trial leaves nothing in the
    state of `inner`; for L-BFGS no copy of its memory is made for this, as the
    place of the last pair is written again before it is read.

  Args:
    inner: What turns a gradient into a move, its sign included, such as
      `optax.chain(optax.scale_by_lbfgs(20), optax.scale(-1))`.
    max_step: The longest move of a row, positive.
    first_step: The same while `inner` knows no step, so at the start and after
      a restart, positive; None means `max_step`.
    slope_rtol: :math:`c`, in (0, 1/2).
    value_rtol: :math:`\epsilon`, at least 0; 0 leaves the first test alone.
    shrink: What a refused step size is multiplied by, in (0, 1).
    max_shrinks: After so many refusals in a row the search gives up: it goes
      back to the last accepted points, stays there and sets `is_stalled`.
    map: The map :math:`R`, 'retraction' or 'exponential'; see :func:`retract`.
      Static.

  Returns:
    The transform; nothing may follow it. Its update takes the gradient in space
    or its projection, needs `params`, as the last update left them, and the
    objective there as `value`. The result of a run is `state.params` and
    `state.value`; the params are a trial.

  Raises:
    ValueError: If a number lies outside its range, `map` has no such name, or
      `params` is None.

  Examples:
    >>> step = optax.chain(optax.scale_by_lbfgs(5), optax.scale(-1))
    >>> tx = backtrack(step, max_step=0.5)
    >>> E = lambda x: jnp.sum(x**2 @ jnp.array([1.0, 2.0, 3.0]))
    >>> points = jnp.array([[0.48, 0.6, 0.64]])
    >>> state = tx.init(points)
    >>> for _ in range(12):
    ...   value, grads = jax.value_and_grad(E)(points)
    ...   updates, state = tx.update(grads, state, points, value=value)
    ...   points = optax.apply_updates(points, updates)
    >>> state.value.round(5)
    Array(1., dtype=float32)

  References:
    Hager and Zhang, `A New Conjugate Gradient Method with Guaranteed Descent
    and an Efficient Line Search <https://doi.org/10.1137/030601880>`_, 2005,
    section 4: the approximate Wolfe test. Absil, Mahony and Sepulchre,
    `Optimization Algorithms on Matrix Manifolds
    <https://press.princeton.edu/absil>`_, 2008, section 4.2.
  """
  if first_step is None:
    first_step = max_step
  rows.check_map(map)
  rows.check_positive(max_step, 'max_step')
  rows.check_positive(first_step, 'first_step')
  _check_range(slope_rtol, 0, 0.5, 'slope_rtol')
  _check_range(shrink, 0, 1, 'shrink')
  if not isinstance(value_rtol, jax.core.Tracer) and not value_rtol >= 0:
    raise ValueError(f'value_rtol must be at least 0, got {value_rtol}.')
  if not isinstance(max_shrinks, jax.core.Tracer) and not max_shrinks >= 1:
    raise ValueError(f'max_shrinks must be at least 1, got {max_shrinks}.')
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    dtype = rows.wide_dtype(*jax.tree.leaves(params))
    return BacktrackState(
      # A copy, and arrays of their own, for all of them may be donated.
      params=jax.tree.map(jnp.copy, params),
      gradient=optax.tree.zeros_like(params),
      direction=optax.tree.zeros_like(params),
      # Any finite value is accepted from here.
      value=jnp.full([], jnp.inf, dtype),
      slope=jnp.zeros([], dtype),
      step_size=jnp.zeros([], dtype),
      num_shrinks=jnp.zeros([], jnp.int32),
      count=jnp.zeros([], jnp.int32),
      is_fresh=jnp.ones([], jnp.bool),
      is_stalled=jnp.zeros([], jnp.bool),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, *, value, **extra_args):
    rows.check_params(params, 'backtrack')
    dtype = state.value.dtype
    scalar = lambda number: jnp.asarray(number).astype(dtype)
    value, c = scalar(value), scalar(slope_rtol)
    gradient = rows.project(params, updates)

    slope = _slope(map, state, gradient)
    change = value - state.value
    accept = change <= c * state.step_size * state.slope
    is_flat = jnp.abs(change) <= scalar(value_rtol) * jnp.abs(state.value)
    accept |= is_flat & (slope <= (2 * c - 1) * state.slope)
    accept &= jnp.isfinite(value) & jnp.isfinite(slope) & ~state.is_stalled

    direction, inner_state = inner.update(
      gradient, state.inner_state, params, value=value, **extra_args
    )
    direction = rows.project(params, direction)
    restart = ~(_dot(gradient, direction, dtype) < 0)
    steepest = optax.tree.scale(-1, gradient)
    direction = optax.tree.where(restart, steepest, direction)
    bound = jnp.where(
      restart | state.is_fresh, scalar(first_step), scalar(max_step)
    )
    direction = _shorten(direction, bound)
    accepted = state._replace(
      params=params,
      gradient=gradient,
      direction=direction,
      value=value,
      slope=_dot(gradient, direction, dtype),
      step_size=jnp.ones_like(value),
      num_shrinks=jnp.zeros_like(state.num_shrinks),
      count=optax.safe_increment(state.count),
      is_fresh=restart,
    )

    num_shrinks = optax.safe_increment(state.num_shrinks)
    is_stalled = state.is_stalled | (num_shrinks > max_shrinks)
    step_size = scalar(shrink) * state.step_size
    refused = state._replace(
      step_size=jnp.where(is_stalled, 0, step_size),
      num_shrinks=num_shrinks,
      is_stalled=is_stalled,
    )

    inner_state = _follow(
      accept, restart, state.inner_state, inner_state, inner.init(params)
    )
    state = optax.tree.where(
      accept,
      accepted._replace(inner_state=()),
      refused._replace(inner_state=()),
    )._replace(inner_state=inner_state)
    vectors = jax.tree.map(
      lambda d: state.step_size.astype(d.dtype) * d, state.direction
    )
    trial = rows.move(map, state.params, vectors)
    return rows.subtract(trial, params), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_range(value, low, high, name):
  """Refuses a number outside an open interval; a traced one passes."""
  if not isinstance(value, jax.core.Tracer) and not low < value < high:
    raise ValueError(f'{name} must lie in ({low}, {high}), got {value}.')


def _dot(a, b, dtype):
  """Multiplies two trees, in the dtype of the scalars."""
  # Not by `vdot`, which is ambiguous where axes of a mesh are explicit.
  product = lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype))
  return optax.tree.sum(jax.tree.map(product, a, b))


def _slope(map, state, gradient):
  """The derivative of the objective along the curve where the trial is."""
  t = state.step_size

  def leaf(x, d, g):
    x, d, g = (array.astype(t.dtype) for array in (x, d, g))
    square = manifold.inner(d, d)
    if map == 'retraction':
      # Of the velocity, what the curve's bend adds is across the gradient.
      speed = manifold.inner(g, d) / jnp.sqrt(1 + t * t * square)
    else:
      rate = jnp.sqrt(square)
      speed = manifold.inner(g, d) * jnp.cos(t * rate)
      speed -= manifold.inner(g, x) * rate * jnp.sin(t * rate)
    return jnp.sum(speed)

  slopes = jax.tree.map(leaf, state.params, state.direction, gradient)
  return optax.tree.sum(slopes)


def _shorten(direction, bound):
  """Scales all rows alike, so that the longest is no longer than the bound."""
  leaves = [leaf.astype(bound.dtype) for leaf in jax.tree.leaves(direction)]
  largest = lambda arrays: functools.reduce(jnp.maximum, map(jnp.max, arrays))
  # Squares of a huge gradient would overflow.
  unit = jnp.maximum(largest(jnp.abs(leaf) for leaf in leaves), bound)
  squares = largest(manifold.inner(leaf / unit, leaf / unit) for leaf in leaves)
  longest = unit * jnp.sqrt(squares)
  factor = jnp.where(longest > bound, bound / longest, 1)
  return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, direction)


def _follow(accept, restart, old, new, fresh):
  """The inner state after an update: the new one, an empty one or the old."""
  is_lbfgs = lambda node: isinstance(node, optax.ScaleByLBFGSState)

  def pick(old, new, fresh):
    if not is_lbfgs(old):
      return jnp.where(accept, jnp.where(restart, fresh, new), old)
    # The next update writes the last pair anew before it reads any, so that of
    # a refused one the counter tells nothing; and pairs without weight are
    # none. Copies of the memory would cost as much as its use.
    picked = {
      name: jax.tree.map(pick, *(getattr(s, name) for s in (old, new, fresh)))
      for name in ('count', 'params', 'updates')
    }
    weights = jnp.where(accept & restart, 0, new.weights_memory)
    return new._replace(weights_memory=weights, **picked)

  return jax.tree.map(pick, old, new, fresh, is_leaf=is_lbfgs)
