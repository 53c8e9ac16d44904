"""Cubic-regularised Newton steps on random coordinates: SSCN."""

import functools

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.linalg import cubic
from emc2.newton import features as features_lib
from emc2.newton import losses, steps
from emc2.newton import problem as problem_lib


def subspace_cubic_newton(
  subspace_dim: int,
  *,
  loss: str = 'logistic',
  regularization: jax.typing.ArrayLike | None = 2e-3,
  convention: str = 'sixth',
  adaptive: bool = True,
  shrink: float = 0.5,
  max_trials: int = 64,
  gradient_tol: float = 0.0,
  refresh_every: int = 50,
  mesh: jax.sharding.Mesh | None = None,
) -> algorithm.Algorithm:
  r"""Minimises a cubic model over coordinates drawn at random.

  Each step draws a set :math:`I` of m coordinates, all sets alike, and takes

  .. math::
    s = \arg\min_{s \in \mathbb{R}^m} g_I^T s + \tfrac12 s^T H_{II} s
      + \tfrac M6 \|s\|^3, \quad x_I \leftarrow x_I + s,

  with the M of :func:`~emc2.newton.krylov.krylov_cubic_newton`. It reads m
  columns of the matrix and no others, and needs the more steps the smaller m is
  beside the number of features: it is the baseline that a Krylov space beats.

  .. note::
    The gradient norm of Info is that of the m coordinates, unless
    `gradient_tol` is above 0: then it is of all, which costs a product of the
    transposed matrix in each step.

  Args:
    subspace_dim: m, from 1 to the number of features. Static.
    loss: 'logistic', 'squared' or 'poisson'.
    regularization: M before the first step, as there.
    convention: 'sixth' or 'third', as there.
    adaptive: Whether M is searched.
    shrink: In (0, 1).
    max_trials: Of M in a step, before it fails. Static.
    gradient_tol: The run is converged at a norm of the whole gradient of at
      most this; 0 does not look. Static.
    refresh_every: After so many steps scores are computed anew. Static.
    mesh: Has axes `data` for rows, `tensor` for columns, or both.

  Returns:
    `init(key, problem, x=None)` and `step(key, state, problem)`.

  Raises:
    ValueError: If an argument breaks its rule; by `init`, if the point does not
      fit the problem; by `step`, if there are fewer features than m.

  References:
    Hanzely, Doikov, Nesterov and Richtarik, `Stochastic Subspace Cubic Newton
    Method <https://arxiv.org/abs/2002.09526>`_, 2020, algorithm 1.
  """
  arguments.check_at_least('subspace_dim', subspace_dim, 1)
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
    functools.partial(step, subspace_dim=subspace_dim, settings=settings),
  )


def step(
  key: jax.Array,
  state: steps.State,
  problem: problem_lib.Problem,
  *,
  subspace_dim: int,
  settings: steps.Settings,
) -> tuple[steps.State, steps.Info]:
  """One step of :func:`subspace_cubic_newton`."""
  steps.check_dim(subspace_dim, problem)

  def body(key, state, problem, axes):
    # Padding stands behind all features.
    size = steps.total(jnp.sum(problem.mask), axes.tensor).astype(jnp.int32)
    ids = draw(key, subspace_dim, size)
    # Unknown until columns are read, which a step is for.
    norm = jnp.full_like(state.objective, jnp.inf)
    if settings.gradient_tol > 0:
      norm = steps.differentiate(problem, state, settings, axes)[1]
    move = lambda: _move(ids, state, problem, norm, settings, axes)
    return steps.advance(
      state, problem, norm, move, settings=settings, axes=axes
    )

  return steps.on_mesh(body, key, state, problem, settings.mesh)


def draw(key: jax.Array, num: int, size: jax.typing.ArrayLike) -> jax.Array:
  """Draws numbers without replacement, all sets alike, by Floyd's algorithm.

  Args:
    key: PRNG key.
    num: How many. Static.
    size: They lie in [0, size), (), int32; below `num` it counts as `num`.

  Returns:
    (num,), int32, in no order; num^2 comparisons and no array of `size`.

  References:
    Bentley and Floyd, `Programming pearls: a sample of brilliance
    <https://doi.org/10.1145/30401.315746>`_, 1987.
  """
  rest = jnp.maximum(jnp.asarray(size, jnp.int32) - num, 0)
  tops = rest + jnp.arange(num, dtype=jnp.int32)
  drawn = jax.random.randint(key, (num,), 0, tops + 1, jnp.int32)

  def put(i, taken):
    is_new = jnp.all(taken != drawn[i])
    return taken.at[i].set(jnp.where(is_new, drawn[i], tops[i]))

  return jax.lax.fori_loop(0, num, put, jnp.full_like(tops, -1))


def _move(ids, state, problem, norm, settings, axes):
  """In coordinates `ids` (m,) of all devices."""
  width, here = len(state.x), ids
  if axes.tensor is not None:
    here = ids - width * jax.lax.axis_index(axes.tensor)
  mine = (here >= 0) & (here < width)
  near = jnp.clip(here, 0, width - 1)
  keep = lambda x: steps.total(jnp.where(mine, x, 0), axes.tensor)
  columns = features_lib.columns(problem.features, near)
  columns = steps.total(jnp.where(mine[None], columns, 0), axes.tensor)
  slopes = problem.weights * losses.LOSSES[settings.loss].slope(
    state.scores, problem.labels
  )
  curvature = steps.curvature(problem, state, settings)
  sides = jnp.concatenate(
    [curvature[:, None] * columns, slopes[:, None]], axis=1
  )
  both = jnp.matmul(columns.T, sides, precision='highest')
  both = steps.total(both, axes.data)
  size = len(ids)
  matrix = both[:, :size] + problem.ridge * jnp.eye(size, dtype=both.dtype)
  gradient = both[:, size] + problem.ridge * keep(state.x[near])
  found = steps.search_for(
    cubic.spectrum(matrix, gradient, convex=True),
    state,
    problem,
    lambda step: jnp.matmul(columns, step, precision='highest'),
    settings=settings,
    axes=axes,
  )
  # What is not here falls off the end.
  place = jnp.where(mine, here, width)
  return steps.Move(
    search=found,
    x=state.x.at[place].add(found.step, mode='drop'),
    change=jnp.matmul(columns, found.step, precision='highest'),
    gradient_norm=jnp.where(
      jnp.isfinite(norm), norm, jnp.linalg.norm(gradient)
    ),
    num_hvps=jnp.zeros([], jnp.int32),
    quality=jnp.zeros_like(norm),
  )
