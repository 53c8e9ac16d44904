"""What cubic Newton methods have in common: states, products, decisions.

A method offers a space of directions; here its model is searched, the point
moves and its scores follow without a product of the whole matrix.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments
from emc2 import mesh as mesh_lib
from emc2.linalg import cubic
from emc2.newton import features as features_lib
from emc2.newton import losses
from emc2.newton import problem as problem_lib
from emc2.newton import regularization as regularization_lib

Result = regularization_lib.Result


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  x: jax.Array  # (d,)
  scores: jax.Array  # (n,): A x, of the rows as the problem orders them.
  objective: jax.Array  # (): f(x).
  regularization: jax.Array  # (): M, of the last trial; in M/6.
  shift: jax.Array  # (): M/2 times the length of the last step.
  count: jax.Array  # (), int32: finished steps.
  result: jax.Array  # (), int32: a `Result`; `OK` unless the last step failed.


class Info(NamedTuple):
  """What a reader may log of one step."""

  objective: jax.Array  # (): at the new point.
  gradient_norm: jax.Array  # (): at the old point.
  decrease: jax.Array  # (): that the model has promised.
  regularization: jax.Array  # (): M of the last trial, in M/6.
  num_trials: jax.Array  # (), int32: of M.
  num_hvps: jax.Array  # (), int32: products by the Hessian.
  quality: jax.Array  # (): rho of a Krylov space, 0 if it is exact; else 0.


class Settings(NamedTuple):
  """What factories were told; static, but for numbers that may be traced."""

  loss: str
  regularization: jax.typing.ArrayLike | None
  adaptive: bool
  shrink: float
  max_trials: int
  gradient_tol: jax.typing.ArrayLike
  refresh_every: int
  mesh: jax.sharding.Mesh | None


class Axes(NamedTuple):
  """Mesh axes in scope, or None for those that are not."""

  data: str | None  # Rows are split over it.
  tensor: str | None  # Columns are.


class Move(NamedTuple):
  """What a method has found in its space."""

  search: regularization_lib.Search
  x: jax.Array  # (d,): the point after the step.
  change: jax.Array  # (n,): of scores.
  gradient_norm: jax.Array  # ()
  num_hvps: jax.Array  # (), int32
  quality: jax.Array  # ()


def check(
  *,
  loss: str,
  regularization: jax.typing.ArrayLike | None,
  convention: str,
  adaptive: bool,
  shrink: float,
  max_trials: int,
  gradient_tol: jax.typing.ArrayLike,
  refresh_every: int,
  mesh: jax.sharding.Mesh | None,
) -> Settings:
  """Settings that make sense, with M of M/6.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  known = lambda x: not isinstance(x, jax.core.Tracer)
  arguments.check_one_of('loss', loss, tuple(losses.LOSSES))
  if regularization is not None:
    if known(regularization):
      arguments.check_positive('regularization', regularization)
    regularization = regularization_lib.to_sixth(regularization, convention)
  if not 0 < shrink < 1:
    raise ValueError(f'shrink must lie in (0, 1), got {shrink}.')
  arguments.check_at_least('max_trials', max_trials, 1)
  if known(gradient_tol):
    arguments.check_at_least('gradient_tol', gradient_tol, 0)
  arguments.check_at_least('refresh_every', refresh_every, 1)
  if mesh is not None:
    _check_mesh(mesh)
  return Settings(
    loss=loss,
    regularization=regularization,
    adaptive=adaptive,
    shrink=shrink,
    max_trials=max_trials,
    gradient_tol=gradient_tol,
    refresh_every=refresh_every,
    mesh=mesh,
  )


def shardings(mesh: jax.sharding.Mesh) -> State:
  """How a state lies on a mesh: points by columns, scores by rows.

  Args:
    mesh: Has the axes `data`, `tensor` or both.

  Returns:
    A `State` of `PartitionSpec`.
  """
  axes, spec = _axes(mesh), jax.sharding.PartitionSpec
  return State(
    x=spec(axes.tensor),
    scores=spec(axes.data),
    objective=spec(),
    regularization=spec(),
    shift=spec(),
    count=spec(),
    result=spec(),
  )


def init(
  key: jax.Array,
  problem: problem_lib.Problem,
  x: jax.typing.ArrayLike | None = None,
  *,
  settings: Settings,
) -> State:
  """Where a run of any of the methods starts.

  Args:
    key: Not used.
    problem: What to minimise.
    x: (d,), as the problem orders features; zeros by default.
    settings: Of the method.

  Returns:
    The state.

  Raises:
    ValueError: If the point does not fit the problem.
  """
  del key
  x = jnp.zeros_like(problem.mask) if x is None else jnp.asarray(x)
  if x.shape != problem.mask.shape:
    raise ValueError(f'x must be of shape {problem.mask.shape}, got {x.shape}.')
  x = x.astype(problem.mask.dtype)

  def prepare(problem, x, axes):
    value = functools.partial(objective, settings=settings, axes=axes)
    scores = multiply(problem, x, axes)
    return scores, value(problem, x, scores)

  if settings.mesh is None:
    scores, value = prepare(problem, x, Axes(None, None))
  else:
    specs = shardings(settings.mesh)
    scores, value = jax.shard_map(
      lambda problem, x: prepare(_own(problem), x, _axes(settings.mesh)),
      mesh=settings.mesh,
      in_specs=(problem_lib.shardings(problem, settings.mesh), specs.x),
      out_specs=(specs.scores, specs.objective),
    )(problem, x)
  bound = settings.regularization
  if bound is None:
    bound = problem_lib.curvature_bound(problem, settings.loss)
  return State(
    x=x,
    scores=scores,
    objective=value,
    regularization=jnp.asarray(bound, x.dtype),
    shift=jnp.zeros([], x.dtype),
    count=jnp.zeros([], jnp.int32),
    result=jnp.zeros([], jnp.int32),
  )


def check_dim(subspace_dim: int, problem: problem_lib.Problem) -> None:
  """Refuses a space of more dimensions than a problem has features."""
  if subspace_dim > len(problem.mask):
    raise ValueError(
      f'subspace_dim must be at most {len(problem.mask)}, the number of '
      f'features, got {subspace_dim}.'
    )


def on_mesh(
  body: Callable[..., tuple[State, Info]],
  key: jax.Array,
  state: State,
  problem: problem_lib.Problem,
  mesh: jax.sharding.Mesh | None,
) -> tuple[State, Info]:
  """Runs `body(key, state, problem, axes)` on a mesh, or as it is.

  Args:
    body: A step, of what a device has.
    key: PRNG key, the same on all devices.
    state: Global.
    problem: Global; cut into as many blocks as the mesh has.
    mesh: None for one device.

  Returns:
    What `body` does.
  """
  if mesh is None:
    return body(key, state, problem, Axes(None, None))
  specs = shardings(mesh)
  return jax.shard_map(
    lambda key, state, problem: body(key, state, _own(problem), _axes(mesh)),
    mesh=mesh,
    in_specs=(
      jax.sharding.PartitionSpec(),
      specs,
      problem_lib.shardings(problem, mesh),
    ),
    out_specs=(specs, jax.sharding.PartitionSpec()),
  )(key, state, problem)


def multiply(
  problem: problem_lib.Problem, x: jax.Array, axes: Axes
) -> jax.Array:
  """A x, (n,)."""
  return total(features_lib.matvec(problem.features, x), axes.tensor)


def differentiate(
  problem: problem_lib.Problem, state: State, settings: Settings, axes: Axes
) -> tuple[jax.Array, jax.Array]:
  """The gradient (d,), and its norm."""
  slopes = problem.weights * losses.LOSSES[settings.loss].slope(
    state.scores, problem.labels
  )
  gradient = total(features_lib.rmatvec(problem.features, slopes), axes.data)
  gradient += problem.ridge * state.x
  return gradient, jnp.sqrt(dot(gradient, gradient, axes))


def curvature(
  problem: problem_lib.Problem, state: State, settings: Settings
) -> jax.Array:
  """(n,): second derivatives of the loss, times weights."""
  second = losses.LOSSES[settings.loss].curvature(state.scores, problem.labels)
  return problem.weights * second


def hvp(
  problem: problem_lib.Problem,
  curvature: jax.Array,
  vector: jax.Array,
  axes: Axes,
) -> tuple[jax.Array, jax.Array]:
  """The Hessian's product (d,), and A v (n,), which it needs on its way."""
  if axes.tensor is None:
    product, image = features_lib.hvp(problem.features, curvature, vector)
  else:
    image = multiply(problem, vector, axes)
    product = features_lib.rmatvec(problem.features, curvature * image)
  return total(product, axes.data) + problem.ridge * vector, image


def objective(
  problem: problem_lib.Problem,
  x: jax.Array,
  scores: jax.Array,
  *,
  settings: Settings,
  axes: Axes,
) -> jax.Array:
  """f(x), whose scores are known."""
  each = losses.LOSSES[settings.loss].value(scores, problem.labels)
  mean = total(problem.weights @ each, axes.data)
  return mean + 0.5 * problem.ridge * dot(x, x, axes)


def excess_fn(
  state: State,
  problem: problem_lib.Problem,
  spread: Callable[[jax.Array], jax.Array],
  largest: jax.Array,
  *,
  settings: Settings,
  axes: Axes,
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
  """By how much f exceeds its tangent after a step, as a search asks.

  Args:
    state: Before.
    problem: What is minimised.
    spread: Steps (m,) to changes of scores (n,).
    largest: (), about the greatest eigenvalue of the model.
    settings: Of the method.
    axes: In scope.

  Returns:
    A function of a step (m,) to the excess, and to the rounding that it and the
    model's may have: of sums over rows, and of a matrix whose entries are right
    to its norm.
  """

  def measure(step):
    change = spread(step)
    each = losses.LOSSES[settings.loss].excess(
      state.scores, change, problem.labels
    )
    square = step @ step
    found = total(problem.weights @ each, axes.data)
    found += 0.5 * problem.ridge * square
    eps = jnp.finfo(found.dtype).eps
    rounding = 2 * math.sqrt(len(each)) * found + 4 * largest * square
    return found, eps * rounding

  return measure


def advance(
  state: State,
  problem: problem_lib.Problem,
  gradient_norm: jax.Array,
  move: Callable[[], Move],
  *,
  settings: Settings,
  axes: Axes,
) -> tuple[State, Info]:
  """Moves, unless the state is converged or not finite.

  Args:
    state: Before.
    problem: What is minimised.
    gradient_norm: (); infinite if not known yet, which asks for the move.
    move: Does what a step costs.
    settings: Of the method.
    axes: In scope.

  Returns:
    The state after, which is at the same point unless its result is `OK`.
  """
  zero = jnp.zeros_like(state.objective)
  nothing = jnp.zeros([], jnp.int32)
  code = lambda result: jnp.asarray(int(result), jnp.int32)

  def stay():
    wrong = jnp.isnan(gradient_norm) | ~jnp.isfinite(state.objective)
    result = jnp.where(wrong, code(Result.NON_FINITE), code(Result.CONVERGED))
    info = Info(
      objective=state.objective,
      gradient_norm=gradient_norm,
      decrease=zero,
      regularization=state.regularization,
      num_trials=nothing,
      num_hvps=nothing,
      quality=zero,
    )
    return state._replace(result=result), info

  def go():
    found = move()
    search = found.search
    count = state.count + 1
    scores = jax.lax.cond(
      count % settings.refresh_every == 0,
      lambda: multiply(problem, found.x, axes),
      lambda: state.scores + found.change,
    )
    value = objective(problem, found.x, scores, settings=settings, axes=axes)
    fine = jnp.isfinite(found.gradient_norm)
    moved = fine & search.accepted & jnp.isfinite(value)
    pick = lambda new, old: jnp.where(moved, new, old)
    failed = jnp.where(
      fine, code(Result.SEARCH_FAILED), code(Result.NON_FINITE)
    )
    after = State(
      x=pick(found.x, state.x),
      scores=pick(scores, state.scores),
      objective=pick(value, state.objective),
      regularization=pick(search.regularization, state.regularization),
      shift=pick(search.shift, state.shift),
      count=pick(count, state.count),
      result=pick(code(Result.OK), failed),
    )
    info = Info(
      objective=after.objective,
      gradient_norm=found.gradient_norm,
      decrease=pick(search.decrease, zero),
      regularization=search.regularization,
      num_trials=search.num_trials,
      num_hvps=found.num_hvps,
      quality=found.quality,
    )
    return after, info

  goes = (gradient_norm > settings.gradient_tol) & jnp.isfinite(state.objective)
  return jax.lax.cond(goes, go, stay)


def search_for(
  spectrum: cubic.Spectrum,
  state: State,
  problem: problem_lib.Problem,
  spread: Callable[[jax.Array], jax.Array],
  *,
  settings: Settings,
  axes: Axes,
) -> regularization_lib.Search:
  """Searches M for a model by its spectrum; `spread` gives A V s of s."""
  largest = spectrum.values[-1]
  return regularization_lib.search(
    spectrum,
    state.regularization,
    excess_fn(state, problem, spread, largest, settings=settings, axes=axes),
    shrink=settings.shrink,
    max_trials=settings.max_trials,
    adaptive=settings.adaptive,
  )


def dot(x: jax.Array, y: jax.Array, axes: Axes) -> jax.Array:
  """Of vectors of features."""
  return total(x @ y, axes.tensor)


def total(x: jax.Array, axis_name: str | None) -> jax.Array:
  """Adds over a mesh axis, if there is one."""
  return x if axis_name is None else jax.lax.psum(x, axis_name)


def _own(problem):
  """What a device has of a problem, not in blocks."""
  return problem._replace(features=features_lib.own_block(problem.features))


def _axes(mesh):
  names = mesh.axis_names
  has = lambda name: name if name in names else None
  return Axes(has(mesh_lib.DATA), has(mesh_lib.TENSOR))


def _check_mesh(mesh):
  allowed = {mesh_lib.DATA, mesh_lib.TENSOR}
  if not set(mesh.axis_names) <= allowed:
    raise ValueError(
      f'mesh must have no axes but {mesh_lib.DATA!r} and {mesh_lib.TENSOR!r}, '
      f'got {tuple(mesh.axis_names)}.'
    )
