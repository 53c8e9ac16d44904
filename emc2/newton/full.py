"""Cubic-regularised Newton steps in the whole space."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.linalg import cubic
from emc2.newton import features as features_lib
from emc2.newton import problem as problem_lib
from emc2.newton import regularization as regularization_lib
from emc2.newton import steps

SOLVERS = ('dense', 'cg')

DENSE_BELOW = 500
"""Number of features from which the Hessian is not formed by default."""

_ROUNDS = 20


def cubic_newton(
  *,
  solver: str | None = None,
  loss: str = 'logistic',
  regularization: jax.typing.ArrayLike | None = 2e-3,
  convention: str = 'sixth',
  adaptive: bool = True,
  shrink: float = 0.5,
  max_trials: int = 64,
  gradient_tol: jax.typing.ArrayLike = 0.0,
  refresh_every: int = 50,
  mesh: jax.sharding.Mesh | None = None,
) -> algorithm.Algorithm:
  r"""Minimises a cubic model over all directions.

  A step takes, with the M of
  :func:`~emc2.newton.krylov.krylov_cubic_newton`,

  .. math::
    s = \arg\min_{s \in \mathbb{R}^d}
      g^T s + \tfrac12 s^T H s + \tfrac M6 \|s\|^3, \quad x \leftarrow x + s,

  and :math:`f(x_k) - f^\star \le 9 L D^3 / ((k + 1)(k + 2))` at fixed
  :math:`M = L`. It needs the fewest steps of all, and the dearest.

  Args:
    solver: 'dense' forms the Hessian and finds its eigenvectors; 'cg' solves
      with the shifted Hessian by conjugate gradients to a residual of 1e-8
      (ten times rounding if that is more), twice for each shift that it tries,
      in the memory of a few vectors. None takes 'dense' below `DENSE_BELOW`
      features. Static.
    loss: 'logistic', 'squared' or 'poisson'.
    regularization: M before the first step, as there.
    convention: 'sixth' or 'third', as there.
    adaptive: Whether M is searched.
    shrink: In (0, 1).
    max_trials: Of M in a step, before it fails. Static.
    gradient_tol: The run is converged at a gradient norm of at most this.
    refresh_every: After so many steps scores are computed anew. Static.
    mesh: Has axes `data` for rows, `tensor` for columns, or both. Each device
      holds the whole Hessian, or the whole vectors of conjugate gradients.

  Returns:
    `init(key, problem, x=None)` and `step(key, state, problem)`; keys are not
    used.

  Raises:
    ValueError: If an argument breaks its rule; by `init`, if the point does not
      fit the problem.

  References:
    Nesterov and Polyak, `Cubic regularization of Newton method and its global
    performance <https://doi.org/10.1007/s10107-006-0706-8>`_, 2006.
  """
  if solver is not None:
    arguments.check_one_of('solver', solver, SOLVERS)
  settings = steps.check(
    loss=loss,
    regularization=regularization,
    convention=convention,
    adaptive=adaptive,
    shrink=shrink,
    max_trials=max_trials,
    gradient_tol=gradient_tol,
    refresh_every=refresh_every,
    mesh=mesh,
  )
  return algorithm.Algorithm(
    functools.partial(steps.init, settings=settings),
    functools.partial(step, solver=solver, settings=settings),
  )


def step(
  key: jax.Array,
  state: steps.State,
  problem: problem_lib.Problem,
  *,
  solver: str | None,
  settings: steps.Settings,
) -> tuple[steps.State, steps.Info]:
  """One step of :func:`cubic_newton`."""
  if solver is None:
    solver = 'dense' if len(problem.mask) < DENSE_BELOW else 'cg'

  def body(key, state, problem, axes):
    del key
    gradient, norm = steps.differentiate(problem, state, settings, axes)
    move = lambda: _move(state, problem, gradient, norm, solver, settings, axes)
    return steps.advance(
      state, problem, norm, move, settings=settings, axes=axes
    )

  return steps.on_mesh(body, key, state, problem, settings.mesh)


def _move(state, problem, gradient, norm, solver, settings, axes):
  """In the coordinates of all features, which each device has."""
  own = functools.partial(_own, width=len(gradient), axes=axes)
  gather = functools.partial(_gather, axes=axes)
  curvature = steps.curvature(problem, state, settings)
  spread = lambda step: steps.multiply(problem, own(step), axes)
  multiply = lambda v: gather(steps.hvp(problem, curvature, own(v), axes)[0])
  gradient = gather(gradient)
  if solver == 'dense':
    matrix = _hessian(problem, curvature, multiply, len(gradient), axes)
    model = cubic.spectrum(matrix, gradient, convex=True)
    found = steps.search_for(
      model, state, problem, spread, settings=settings, axes=axes
    )
    num_hvps = jnp.asarray(len(gradient), jnp.int32)
  else:
    found, num_hvps = _search_cg(
      state, problem, gradient, multiply, spread, settings, axes
    )
  return steps.Move(
    search=found,
    x=state.x + own(found.step),
    change=spread(found.step),
    gradient_norm=norm,
    num_hvps=num_hvps,
    quality=jnp.zeros_like(norm),
  )


def _hessian(problem, curvature, multiply, size, axes):
  """(d, d)."""
  unit = jnp.eye(size, dtype=curvature.dtype)
  features = problem.features
  if axes.tensor is not None or not isinstance(features, features_lib.Dense):
    return jax.lax.map(multiply, unit)
  scaled = curvature[:, None] * features.array
  gram = jnp.matmul(features.array.T, scaled, precision='highest')
  return steps.total(gram, axes.data) + problem.ridge * unit


class _Memory(NamedTuple):
  """What a search by conjugate gradients keeps from trial to trial."""

  step: jax.Array  # (d,): of the last trial, where the next one starts.
  count: jax.Array  # (), int32: products by the Hessian.


def _search_cg(state, problem, gradient, multiply, spread, settings, axes):
  """As `steps.search_for`, and the number of products."""
  product = multiply(gradient)
  largest = gradient @ product / (gradient @ gradient)

  def solve(trial, shift, memory):
    return _minimize_cg(multiply, gradient, trial, shift, memory)

  excess_fn = steps.excess_fn(
    state, problem, spread, largest, settings=settings, axes=axes
  )
  memory = _Memory(jnp.zeros_like(gradient), jnp.ones([], jnp.int32))
  found, memory = regularization_lib.search_by(
    solve,
    state.regularization,
    excess_fn,
    memory,
    like=gradient,
    largest=largest,
    shrink=settings.shrink,
    max_trials=settings.max_trials,
    adaptive=settings.adaptive,
  )
  return found, memory.count


def _minimize_cg(multiply, gradient, regularization, shift, memory):
  """The minimiser of a model whose Hessian is semidefinite, by products.

  As :func:`emc2.linalg.cubic.solve_cubic` it takes the inverse norm of the step
  for linear in the shift, but solves two systems to learn it and its slope.
  """
  eps = float(jnp.finfo(gradient.dtype).eps)
  tol = max(1e-8, 10 * eps)
  highest = jnp.sqrt(regularization * jnp.linalg.norm(gradient) / 2)
  shift = jnp.where(shift > 0, jnp.minimum(shift, highest), highest)

  def shifted(shift):
    return lambda v: multiply(v) + shift * v

  def advance(carry):
    shift, step, count, rounds, _ = carry
    step, used = _solve_cg(shifted(shift), -gradient, step, tol)
    norm = jnp.linalg.norm(step)
    wanted = jnp.abs(regularization * norm - 2 * shift) > 4 * tol * shift

    def improve():
      slope, more = _solve_cg(shifted(shift), step, step / shift, tol)
      kappa = (step @ slope) / norm**2
      inside = 1 - jnp.minimum(kappa * shift, 1)
      pull = regularization * norm
      new = pull / (inside + jnp.sqrt(inside**2 + 2 * kappa * pull))
      return new, more

    stay = lambda: (shift, jnp.zeros_like(used))
    shift, more = jax.lax.cond(wanted, improve, stay)
    return shift, step, count + used + more, rounds + 1, wanted

  def goes_on(carry):
    *_, rounds, wanted = carry
    return wanted & (rounds < _ROUNDS)

  rounds = jnp.zeros([], jnp.int32)
  begin = shift, memory.step, memory.count, rounds, rounds == 0
  shift, step, count, *_ = jax.lax.while_loop(goes_on, advance, begin)
  norm = jnp.linalg.norm(step)
  bend = 0.5 * (step @ multiply(step)) + regularization / 6 * norm**3
  found = cubic.CubicStep(
    step=step, shift=shift, norm=norm, slope=gradient @ step, excess=bend
  )
  return found, _Memory(step, count + 1)


def _solve_cg(multiply, target, start, tol):
  """Conjugate gradients for a definite system; the number of products, too."""
  rest = target - multiply(start)
  square = rest @ rest
  enough = tol**2 * (target @ target)

  def advance(carry):
    x, rest, direction, square, count = carry
    product = multiply(direction)
    size = square / (direction @ product)
    x, rest = x + size * direction, rest - size * product
    before, square = square, rest @ rest
    direction = rest + square / before * direction
    return x, rest, direction, square, count + 1

  def goes_on(carry):
    *_, square, count = carry
    return (square > enough) & (count < 2 * len(target))

  begin = start, rest, rest, square, jnp.ones([], jnp.int32)
  x, *_, count = jax.lax.while_loop(goes_on, advance, begin)
  return x, count


def _own(x, *, width, axes):
  """The entries of a device, of those of all."""
  if axes.tensor is None:
    return x
  first = width * jax.lax.axis_index(axes.tensor)
  return jax.lax.dynamic_slice(x, (first,), (width,))


def _gather(x, *, axes):
  """The entries of all devices, (d,), the same on each."""
  if axes.tensor is None:
    return x
  return jax.lax.all_gather(x, axes.tensor, tiled=True, to='invarying')
