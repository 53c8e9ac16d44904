"""How strongly a model is bounded: conventions, and a search for the least."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments, mesh
from emc2.linalg import cubic

CONVENTIONS = ('sixth', 'third')
"""What a coefficient multiplies: |s|^3 / 6, as in papers, or |s|^3 / 3."""


class Result(enum.IntEnum):
  """How a step ended, as a state holds it."""

  OK = 0
  CONVERGED = 1
  SEARCH_FAILED = 2
  NON_FINITE = 3


class Search(NamedTuple):
  """A step that the objective confirms, or 0.

  Attributes:
    step: (m,); 0 if none was accepted.
    regularization: (): M of the last trial.
    shift: (): lambda of the last trial.
    decrease: (): what the model promises at least; 0 if none was accepted.
    excess: (): of the objective, f(x + s) - f(x) - g's; 0 likewise.
    num_trials: (), int32.
    accepted: (), bool.
  """

  step: jax.Array
  regularization: jax.Array
  shift: jax.Array
  decrease: jax.Array
  excess: jax.Array
  num_trials: jax.Array
  accepted: jax.Array


def to_sixth(
  regularization: jax.typing.ArrayLike, convention: str
) -> jax.typing.ArrayLike:
  """Turns a coefficient of either convention into M of M / 6.

  Args:
    regularization: The coefficient, of any shape.
    convention: 'sixth', in which it multiplies |s|^3 / 6 and bounds the
      Lipschitz constant of the Hessian; or 'third', |s|^3 / 3, as in the
      authors' code, where it is half of that.

  Returns:
    M.

  Raises:
    ValueError: If the convention is unknown.

  Examples:
    >>> to_sixth(1e-3, 'third')
    0.002
  """
  arguments.check_one_of('convention', convention, CONVENTIONS)
  return regularization if convention == 'sixth' else 2 * regularization


def search(
  spectrum: cubic.Spectrum,
  regularization: jax.typing.ArrayLike,
  excess_fn: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  *,
  shrink: float = 0.5,
  max_trials: int = 64,
  adaptive: bool = True,
) -> Search:
  r"""Finds a coefficient M whose model is above the objective at its minimum.

  The first trial is at b M, so that M may fall; each refusal divides it by b.
  The minimiser s of the model is accepted if

  .. math::
    f(x + s) - f(x) - g^\top s \leq \tfrac12 s^\top H s + \tfrac M6 \|s\|^3,

  which is :math:`f(x + s) \leq f(x) - \Delta` for the decrease :math:`\Delta`
  of the model, but between two small numbers that are known to their own
  relative precision. Any M above the Lipschitz constant of the Hessian passes.

  Args:
    spectrum: The Hessian and the gradient in the basis of the step.
    regularization: M of the last step, above 0, in the convention M / 6.
    excess_fn: Maps a step (m,) to the left-hand side, and to the rounding that
      it may have: ((), ()).
    shrink: b, in (0, 1).
    max_trials: At least 1. Static.
    adaptive: Whether to search; otherwise there is one trial, at M, and any
      finite objective is accepted. Static.

  Returns:
    The step, and the M and the shift to go on from. M is at least 1e-12 times
    1 + the greatest eigenvalue, for it would underflow otherwise.

  Raises:
    ValueError: If a setting is out of range.
  """

  def solve(trial, shift, memory):
    del shift
    return cubic.solve_cubic(spectrum, trial), memory

  found, _ = search_by(
    solve,
    regularization,
    excess_fn,
    (),
    like=spectrum.coefficients,
    largest=spectrum.values[-1],
    shrink=shrink,
    max_trials=max_trials,
    adaptive=adaptive,
  )
  return found


def search_by(
  solve: Callable[[jax.Array, jax.Array, Any], tuple[cubic.CubicStep, Any]],
  regularization: jax.typing.ArrayLike,
  excess_fn: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  memory: Any,
  *,
  like: jax.Array,
  largest: jax.Array,
  shrink: float = 0.5,
  max_trials: int = 64,
  adaptive: bool = True,
) -> tuple[Search, Any]:
  """As :func:`search`, of a model that something else minimises.

  Args:
    solve: Maps M, the shift of the last trial and a memory to the minimiser and
      the next memory.
    regularization: As there.
    excess_fn: As there.
    memory: Of the first trial.
    like: (m,): of the shape and type of a step.
    largest: (): about the greatest eigenvalue.
    shrink: As there.
    max_trials: As there.
    adaptive: As there.

  Returns:
    The step, and the last memory.

  Raises:
    ValueError: If a setting is out of range.
  """
  if not 0 < shrink < 1:
    raise ValueError(f'shrink must lie in (0, 1), got {shrink}.')
  arguments.check_at_least('max_trials', max_trials, 1)
  dtype = like.dtype
  regularization = jnp.asarray(regularization, dtype)
  least = 1e-12 * (1 + jnp.maximum(largest, 0))
  if adaptive:
    regularization = jnp.maximum(shrink * regularization, least)

  def advance(carry):
    trial, found, memory = carry
    solved, memory = solve(trial, found.shift, memory)
    excess, slack = (x.astype(dtype) for x in excess_fn(solved.step))
    accepted = jnp.isfinite(excess)
    if adaptive:
      accepted &= excess <= solved.excess + slack
    keep = lambda x: jnp.where(accepted, x, 0)
    found = Search(
      step=keep(solved.step),
      regularization=trial,
      shift=solved.shift,
      decrease=keep(solved.decrease),
      excess=keep(excess),
      num_trials=found.num_trials + 1,
      accepted=accepted,
    )
    return trial / shrink, found, memory

  def goes_on(carry):
    _, found, _ = carry
    return ~found.accepted & (found.num_trials < max_trials)

  zero = jnp.zeros([], dtype)
  found = Search(
    step=jnp.zeros_like(like),
    regularization=zero,
    shift=zero,
    decrease=zero,
    excess=zero,
    num_trials=jnp.zeros([], jnp.int32),
    accepted=jnp.zeros([], jnp.bool_),
  )
  leaves = jax.tree.leaves((regularization, found))
  *leaves, _ = mesh.vary_alike(*leaves, like)
  trial, *leaves = leaves
  carry = trial, Search(*leaves), memory
  if adaptive:
    carry = jax.lax.while_loop(goes_on, advance, carry)
  else:
    carry = advance(carry)
  return carry[1:]
