"""Newton steps in a Krylov space, with a cubic in place of a step size."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import arguments, mesh
from emc2.linalg import cubic, lanczos
from emc2.newton import regularization as regularization_lib
from emc2.transforms import rows as rows_lib

_Result = regularization_lib.Result


class KrylovCubicNewtonState(NamedTuple):
  """State of :func:`krylov_cubic_newton`; its floats are at least float32."""

  regularization: jax.Array  # (): M of the last trial, or of the start; in M/6.
  shift: jax.Array  # (): lambda of the last step, 0 before the first.
  num_trials: jax.Array  # (), int32: values of M tried, one `value_fn` each.
  num_hvps: jax.Array  # (), int32: Hessian-vector products.
  result: jax.Array  # (), int32: of the last update, a `Result`; 0 is OK.
  count: jax.Array  # (), int32: steps taken; an update of zeros is none.


def krylov_cubic_newton(
  subspace_dim: int = 10,
  *,
  regularization: jax.typing.ArrayLike = 2e-3,
  convention: str = 'sixth',
  adaptive: bool = True,
  shrink: float = 0.5,
  max_trials: int = 64,
  gradient_tol: jax.typing.ArrayLike = 0.0,
  breakdown_tol: float = 1e-6,
  axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Minimises a cubic-regularised Newton model in a Krylov space.

  With the gradient g and the Hessian H of an objective f, the update is

  .. math::
    u = \operatorname*{argmin}_{s \in K_m} \; g^\top s
      + \tfrac12 s^\top H s + \tfrac M6 \|s\|^3,
    \quad K_m = \operatorname{span} \{g, H g, \dots, H^{m-1} g\}.

  H is known by m products with vectors alone, as forward derivatives of the
  gradient, and m + 3 vectors like the params are held meanwhile, none between
  updates. The space has an orthonormal basis by Lanczos, in which the model is
  solved exactly. A search finds M: from b times the last M it is divided by b
  until the objective has fallen by what the model promises,

  .. math::
    f(x + u) \leq f(x) - \Delta + 4 \varepsilon \max(|f(x)|, |f(x + u)|),
    \quad \Delta = -g^\top u - \tfrac12 u^\top H u - \tfrac M6 \|u\|^3,

  where the last term is the rounding of the values. Each trial costs one value
  of f and no derivative. Any M above the Lipschitz constant of H passes, so
  that in the long run a step takes two trials at most. Stage updates by
  :func:`jax.jit`: outside of it their loops are compiled each time.

  It is for smooth objectives whose gradients are exact: over the full batch, or
  over one large batch that stays. Where they are convex, the number of steps
  does not depend on the dimension. Where they are not, steps still descend. For
  generalised linear models :mod:`emc2.newton` is faster by far, for its trials
  read no data, and in float32 goes nearer to the minimum.

  .. note::
    The update is the whole step, sign and length included, and it is what the
    search has tried. In a chain nothing that rescales may follow it, such as
    a learning rate, decay or clipping.

  .. note::
    Where no step is to be had the update is 0, and `result` in the state tells
    why: `CONVERGED` for a gradient of norm `gradient_tol` or less, `NON_FINITE`
    for a value, gradient or Hessian with what is no number, `SEARCH_FAILED` for
    `max_trials` refusals. They are the numbers 1, 3 and 2, of
    :class:`emc2.newton.regularization.Result`. After the last the next update
    goes on from the last M, for M may have fallen far below what is needed by
    now; but not from one whose step is too short to show in f. The authors'
    code takes the last trial though it was refused, and divides by a gradient
    of 0.

  Args:
    subspace_dim: m, from 1 to the number of entries of the params. 1 is
      gradient descent with a line search, 10 does for most, and 20 pays where
      many digits are wanted. Static.
    regularization: M at the start, positive; without `adaptive`, that of every
      step.
    convention: 'sixth' if `regularization` is divided by 6 in the cubic, as in
      the paper; 'third' if by 3, as in the authors' code. The state holds M of
      the former. Static.
    adaptive: Whether M is searched; otherwise each step is taken at which the
      objective is finite. Static.
    shrink: b, in (0, 1). Static.
    max_trials: How many M a search tries, at least 1. Static.
    gradient_tol: The norm of a gradient that is 0, at least 0.
    breakdown_tol: Relative to H, the length below which what a product adds to
      the Krylov space is rounding and the space is complete, at least 0.
      Static.
    axis_name: In :func:`jax.shard_map`, the mesh axes over which any leaf is
      split. Leaves that are whole along them count once; only types tell which,
      so leave `check_vma` on. None where each device has all of the params,
      and under :func:`jax.jit` alone. `value_fn` and `hvp_fn` do their own
      sums.

  Returns:
    The transform. Its update takes the gradient, `params`, the objective there
    as `value`, and `value_fn`, which maps params alone to that. In place of
    derivatives of `value_fn`, `hvp_fn` may map what is like the params to the
    product of the Hessian at them, and is called m times. All else is done in
    float32 or wider. In :func:`optax.inject_hyperparams` name `subspace_dim`,
    `shrink`, `max_trials` and `breakdown_tol` in `static_args`.

  Raises:
    ValueError: If an argument breaks its rule; by `init`, or by `update` with
      an `axis_name`, if `subspace_dim` is larger than the number of entries; by
      `update` if `params` is None or `value_fn` needs more than params.
    TypeError: By `init`, if a leaf is not of real floats.

  Examples:
    >>> f = lambda x: jnp.sum(jnp.cosh(x * jnp.array([1.0, 2.0, 3.0])))
    >>> tx, x = krylov_cubic_newton(2), jnp.ones(3)
    >>> state = tx.init(x)
    >>> @jax.jit
    ... def step(x, state):
    ...   value, grads = jax.value_and_grad(f)(x)
    ...   updates, state = tx.update(
    ...     grads, state, x, value=value, value_fn=f
    ...   )
    ...   return optax.apply_updates(x, updates), state
    >>> for _ in range(9):
    ...   x, state = step(x, state)
    >>> f(x).round(5), state.num_hvps
    (Array(3., dtype=float32), Array(18, dtype=int32))

  References:
    Jiang, Raman, Sabach, Mokhtari, Hong and Cevher, `Krylov Cubic Regularized
    Newton: A Subspace Second-Order Method with Dimension-Free Convergence Rate
    <https://arxiv.org/abs/2401.03058>`_, 2024, and its code. Nesterov and
    Polyak, `Cubic regularization of Newton method and its global performance
    <https://doi.org/10.1007/s10107-006-0706-8>`_, 2006.
  """
  arguments.check_at_least('subspace_dim', subspace_dim, 1)
  arguments.check_at_least('max_trials', max_trials, 1)
  arguments.check_at_least('breakdown_tol', breakdown_tol, 0)
  if not 0 < shrink < 1:
    raise ValueError(f'shrink must lie in (0, 1), got {shrink}.')
  if not isinstance(regularization, jax.core.Tracer):
    arguments.check_positive('regularization', float(regularization))
  if not isinstance(gradient_tol, jax.core.Tracer):
    arguments.check_at_least('gradient_tol', float(gradient_tol), 0)
  start = regularization_lib.to_sixth(regularization, convention)
  axes = (axis_name,) if isinstance(axis_name, str) else axis_name or ()

  def init_fn(params):
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f'params must be of real floats, got {leaf.dtype}.')
    # Inside of `shard_map` or not: it cannot tell whether leaves are whole.
    if not axes:
      _check_dim(subspace_dim, sum(leaf.size for leaf in leaves))
    dtype = rows_lib.wide_dtype(*leaves)
    return KrylovCubicNewtonState(
      regularization=jnp.array(start, dtype),
      shift=jnp.zeros([], dtype),
      num_trials=jnp.zeros([], jnp.int32),
      num_hvps=jnp.zeros([], jnp.int32),
      result=jnp.zeros([], jnp.int32),
      count=jnp.zeros([], jnp.int32),
    )

  def update_fn(
    updates,
    state,
    params=None,
    *,
    value,
    value_fn,
    hvp_fn=None,
    **extra_args,
  ):
    del extra_args
    if params is None:
      raise ValueError('params must be given to krylov_cubic_newton, got None.')
    _check_value_fn(value_fn, params)
    split = _split_axes(params, axes)
    copies = jax.tree.map(lambda p: _num_copies(p, split), params)
    if axes:
      _check_dim(subspace_dim, _num_entries(params, copies, split))
    dtype = state.shift.dtype
    value = jnp.asarray(value)
    if hvp_fn is None:
      hvp_fn = jax.linearize(jax.grad(value_fn), params)[1]

    # A leaf that N devices hold whole enters sums over them N times. Divided by
    # the root of N, it counts once.
    def share(x, copies):
      x = x.astype(dtype)
      return x if copies == 1 else x / math.sqrt(copies)

    def unshare(x, p, copies):
      x = x if copies == 1 else x * math.sqrt(copies)
      return x.astype(p.dtype)

    def matvec(vector):
      vector = jax.tree.map(unshare, vector, params, copies)
      return jax.tree.map(share, hvp_fn(vector), copies)

    space = lanczos.lanczos(
      matvec,
      jax.tree.map(share, updates, copies),
      subspace_dim,
      axis_name=split or None,
      breakdown_tol=breakdown_tol,
    )
    known = (value, space.norm, space.diagonal, space.off_diagonal)
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in known]).all()
    goes = finite & (space.norm > jnp.asarray(gradient_tol).astype(dtype))
    # Where no step is to be had the model is that of a gradient of 0.
    keep = lambda x: jnp.where(goes, x, jnp.zeros_like(x))
    norm = keep(space.norm)
    spectrum = cubic.tridiagonal_spectrum(
      keep(space.diagonal), keep(space.off_diagonal), norm
    )

    def move(step):
      def leaf(rows, p, copies):
        product = jnp.tensordot(step, rows, axes=1, precision='highest')
        return unshare(keep(product), p, copies)

      return jax.tree.map(leaf, space.basis, params, copies)

    def excess_fn(step):
      trial = value_fn(optax.apply_updates(params, move(step)))
      wide = np.promote_types(trial.dtype, dtype)
      before, after = value.astype(wide), trial.astype(wide)
      excess = (after - before).astype(dtype) - norm * step[0]
      size = jnp.maximum(jnp.abs(before), jnp.abs(after)).astype(dtype)
      # Where there is nothing to search, the first trial passes.
      return keep(excess), keep(4 * float(jnp.finfo(trial.dtype).eps) * size)

    found = regularization_lib.search(
      spectrum,
      state.regularization if adaptive else start,
      excess_fn,
      shrink=shrink,
      max_trials=max_trials,
      adaptive=adaptive,
    )
    moves = goes & found.accepted
    pick = lambda new, old: jnp.where(moves, new, old)
    code = lambda result: jnp.asarray(int(result), jnp.int32)
    stays = jnp.where(finite, code(_Result.CONVERGED), code(_Result.NON_FINITE))
    ends = jnp.where(
      found.accepted, code(_Result.OK), code(_Result.SEARCH_FAILED)
    )
    # If no M was large enough the next search goes on from the last, unless its
    # step is so short that rounding hides what it does.
    length = 2 * found.shift / found.regularization
    eps = float(jnp.finfo(dtype).eps)
    hidden = ~(norm * length > 4 * eps * jnp.abs(value).astype(dtype))
    stops = ~goes | (~found.accepted & hidden)
    return move(found.step), KrylovCubicNewtonState(
      regularization=jnp.where(
        stops, state.regularization, found.regularization
      ),
      shift=pick(found.shift, state.shift),
      num_trials=state.num_trials + keep(found.num_trials),
      num_hvps=state.num_hvps + subspace_dim,
      result=jnp.where(goes, ends, stays),
      count=pick(optax.safe_increment(state.count), state.count),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_whole(leaf: jax.Array, axis: str) -> bool:
  """Whether all devices along an axis hold the same; types tell, if any do."""
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  # With `check_vma=False` they do not, not even of what differs for sure.
  told = axis in varying(jax.lax.axis_index(axis))
  return told and axis not in varying(leaf)


def _split_axes(params: Any, axes: tuple[str, ...]) -> tuple[str, ...]:
  """Those axes along which not all leaves are whole."""
  sizes = {axis: mesh.axis_size(axis) for axis in axes}
  leaves = jax.tree.leaves(params)
  whole = lambda axis: all(_is_whole(leaf, axis) for leaf in leaves)
  return tuple(axis for axis in sizes if not whole(axis))


def _num_copies(leaf: jax.Array, axes: tuple[str, ...]) -> int:
  """How many devices along the axes hold the same part of a leaf."""
  whole = [axis for axis in axes if _is_whole(leaf, axis)]
  return math.prod(jax.lax.axis_size(axis) for axis in whole)


def _num_entries(params: Any, copies: Any, axes: tuple[str, ...]) -> int:
  """Of all devices along the axes."""
  devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
  sizes = jax.tree.map(lambda p, n: p.size * devices // n, params, copies)
  return sum(jax.tree.leaves(sizes))


def _check_dim(subspace_dim: int, num_entries: int) -> None:
  if subspace_dim > num_entries:
    raise ValueError(
      f'subspace_dim must be at most {num_entries}, the number of entries of '
      f'the params, got {subspace_dim}.'
    )


def _check_value_fn(value_fn: Callable[..., Any], params: Any) -> None:
  """Refuses what needs a key or a batch, for values of each call would differ.

  Callables that do not tell what they take pass.
  """
  try:
    signature = inspect.signature(value_fn)
  except (TypeError, ValueError):
    return
  try:
    signature.bind(params)
  except TypeError:
    raise ValueError(
      'value_fn must take params alone, and give the same for them each time: '
      'bind the full batch, or a fixed large batch, and any key before; got '
      f'one that takes {signature}.'
    ) from None
