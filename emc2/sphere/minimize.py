"""Runs an optimiser on the sphere until the gradient is small."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from emc2.sphere import manifold

CONVERGED, EXHAUSTED, STALLED, NON_FINITE = range(4)
"""Codes of `Minimum.status`."""


@runtime_checkable
class Optimizer(Protocol):
  """What optax calls a gradient transformation with extra arguments."""

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any]]


class Minimum(NamedTuple):
  """The best points that were seen, and why the search ended."""

  points: jax.Array  # (..., n, k), unit rows.
  energy: jax.Array  # (...)
  gradient_norm: jax.Array  # (...): of the tangent gradient, over all points.
  num_evaluations: jax.Array  # (...), int32: energies with their gradients.
  status: jax.Array  # (...), int32: a code above.


def minimize(
  points: jax.typing.ArrayLike,
  energy_fn: Callable[[jax.Array], jax.Array],
  optimizer: Optimizer,
  *,
  tolerance: jax.typing.ArrayLike,
  max_evaluations: jax.typing.ArrayLike,
) -> Minimum:
  r"""Minimises an energy of points on a sphere, from one start or many.

  A chain ends when the Frobenius norm of the tangent gradient is at most the
  tolerance, after `max_evaluations`, when an update moves nothing, or when an
  energy or a gradient is not finite; it gives the best points before that.
  Among energies that differ by rounding alone the smaller gradient is better.

  Chains run side by side, an evaluation of each in a step, until the last has
  ended. Starts with leading axes cost less than :func:`jax.vmap`, which would
  copy the state of each optimiser in each step to keep that of an ended chain.

  Args:
    points: (..., n, k), unit rows to start from.
    energy_fn: (n, k) -> (), pure.
    optimizer: A gradient transformation whose updates land on the sphere, such
      as those of :func:`emc2.transforms.backtrack`. It gets the tangent
      gradient, and `value`, `grad` and `value_fn`.
    tolerance: (), at least 0.
    max_evaluations: (), at least 1. What a line search inside of the optimiser
      evaluates does not count.

  Returns:
    The minimum.

  Examples:
    >>> points = manifold.draw_uniform(jax.random.key(0), 2, 3)
    >>> up = lambda x: -jnp.sum(x[:, 2])
    >>> step = optax.GradientTransformation(
    ...   lambda x: (),
    ...   lambda g, s, x: (manifold.retract(x, -0.5 * g) - x, s),
    ... )
    >>> found = minimize(
    ...   points, up, optax.with_extra_args_support(step),
    ...   tolerance=1e-3, max_evaluations=100,
    ... )
    >>> found.status, found.points[:, 2].round(3)
    (Array(0, dtype=int32), Array([1., 1.], dtype=float32))
  """
  points = jnp.asarray(points)
  *batch, n, k = points.shape
  rounding = 8 * float(jnp.finfo(points.dtype).eps)

  def is_better(new, old):
    slack = rounding * jnp.abs(old.energy)
    lower = new.energy < old.energy - slack
    level = new.energy <= old.energy + slack
    return lower | (level & (new.gradient_norm < old.gradient_norm))

  def begin(points):
    far = jnp.full_like(points, jnp.finfo(points.dtype).max, shape=())
    status = jnp.full([], EXHAUSTED, jnp.int32)
    best = Minimum(points, far, far, jnp.zeros([], jnp.int32), status)
    return points, optimizer.init(points), best

  def advance(points, state, best):
    value, gradient = jax.value_and_grad(energy_fn)(points)
    gradient = manifold.project(points, gradient)
    norm = jnp.linalg.norm(gradient)
    runs = best.status == EXHAUSTED
    count = best.num_evaluations + runs.astype(jnp.int32)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    seen = Minimum(points, value, norm, count, best.status)
    better = runs & finite & is_better(seen, best)
    best = jax.tree.map(lambda a, b: jnp.where(better, a, b), seen, best)

    updates, state = optimizer.update(
      gradient, state, points, value=value, grad=gradient, value_fn=energy_fn
    )
    code = lambda number: jnp.full_like(best.status, number)
    reasons = [best.gradient_norm <= tolerance, ~finite, ~jnp.any(updates != 0)]
    codes = [code(CONVERGED), code(NON_FINITE), code(STALLED)]
    status = jnp.select(reasons, codes, code(EXHAUSTED))
    status = jnp.where(runs, status, best.status)
    best = best._replace(num_evaluations=count, status=status)
    return points + updates, state, best

  def goes_on(carry):
    *_, best = carry
    in_time = best.num_evaluations < max_evaluations
    return jnp.any((best.status == EXHAUSTED) & in_time)

  if not batch:
    body = lambda carry: advance(*carry)
    return jax.lax.while_loop(goes_on, body, begin(points))[-1]
  body = lambda carry: jax.vmap(advance)(*carry)
  carry = jax.vmap(begin)(points.reshape(-1, n, k))
  *_, best = jax.lax.while_loop(goes_on, body, carry)
  return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), best)
