"""The Lanczos process: a symmetric operator in a small basis of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments, mesh


class Lanczos(NamedTuple):
  """An orthonormal basis of a Krylov space, and the operator in it.

  The operator is tridiagonal there: `diagonal`, and `off_diagonal` without its
  last entry beside it.

  Attributes:
    basis: Leaves (m, ...), float32 or wider; the vectors in order, and 0 from
      `num_steps` on.
    diagonal: (m,); 0 from `num_steps` on.
    off_diagonal: (m,): the norm of what is left after each step; 0 from the
      breakdown on.
    norm: (): of the start.
    num_steps: (), int32: the dimension of the space that was found, in [0, m];
      0 for a start of 0.
    images: What `matvec` gave besides for each vector of the basis, stacked
      (m, ...); () if it gives nothing.
  """

  basis: Any
  diagonal: jax.Array
  off_diagonal: jax.Array
  norm: jax.Array
  num_steps: jax.Array
  images: Any


def lanczos(
  matvec: Callable[[Any], Any],
  start: Any,
  num_steps: int,
  *,
  axis_name: str | tuple[str, ...] | None = None,
  breakdown_tol: float = 1e-6,
  has_aux: bool = False,
) -> Lanczos:
  r"""Builds an orthonormal basis of :math:`\{g, Hg, \dots, H^{m-1} g\}`.

  From :math:`v_1 = g / \|g\|`, :math:`v_0 = 0`, and for j = 1, ..., m,

  .. math::
    w = H v_j - \beta_{j-1} v_{j-1}, \quad
    w \leftarrow (I - V_j V_j^\top)^2 w, \quad
    \beta_j = \|w\|, \quad v_{j+1} = w / \beta_j,

  that is with full re-orthogonalisation, without which float32 loses the basis
  after some fifteen steps. What the projections take off along :math:`v_j` adds
  up to :math:`\alpha_j = v_j^\top H v_j`. A step sums over devices twice: the m
  products with the basis, and those of the second projection together with the
  norm.

  The process breaks down when the space is invariant: at :math:`\beta_j \leq
  \tau \max_{i \leq j} (|\alpha_i| + \beta_{i-1})`. All that follows is 0, and
  shapes are static.

  Args:
    matvec: Maps a vector like `start`, in float32 or wider, to H times it,
      which is symmetric; with `has_aux` to that and anything else. Traced once,
      and called `num_steps` times.
    start: g, a pytree of floating arrays.
    num_steps: m, in [1, number of entries of `start`]. Static.
    axis_name: The mesh axis, or axes, over which the entries of the vectors are
      split, inside `jax.shard_map`; None where each device has whole vectors.
    breakdown_tol: tau, at least 0.
    has_aux: Whether `matvec` gives a pair. Static.

  Returns:
    The basis and the operator in it.

  Raises:
    ValueError: If `num_steps` or `breakdown_tol` is out of range, or `start`
      holds anything but floating numbers.

  Examples:
    >>> h = jnp.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    >>> found = lanczos(lambda v: h @ v, jnp.array([3.0, 0.0, 0.0]), 3)
    >>> found.diagonal, found.off_diagonal
    (Array([2., 2., 0.], dtype=float32), Array([1., 0., 0.], dtype=float32))
    >>> found.norm, found.num_steps
    (Array(3., dtype=float32), Array(2, dtype=int32))

  References:
    Golub and Van Loan, *Matrix Computations*, 4th edition, 2013, Section 10.3.
  """
  start, dtype = _checked(start, num_steps, axis_name, breakdown_tol)
  tiny = jnp.finfo(dtype).tiny

  def total(x):
    return x if axis_name is None else jax.lax.psum(x, axis_name)

  def direction(vector, norm, runs):
    factor = jnp.where(runs, 1 / jnp.where(runs, norm, 1), 0)
    return jax.tree.map(lambda leaf: factor * leaf, vector)

  def without(vector, basis, weights):
    combine = lambda w, rows: w - _combine(rows, weights)
    return jax.tree.map(combine, vector, basis)

  def advance(carry, j):
    basis, last, vector, beta, scale = carry
    basis = jax.tree.map(lambda rows, v: rows.at[j].set(v), basis, vector)
    product, image = matvec(vector) if has_aux else (matvec(vector), ())
    rest = jax.tree.map(lambda w, v: w.astype(dtype) - beta * v, product, last)
    first = total(_products(basis, rest))
    rest = without(rest, basis, first)
    again = jnp.append(_products(basis, rest), _dot(rest, rest))
    again, square = jnp.split(total(again), [num_steps])
    rest = without(rest, basis, again)
    alpha = first[j] + again[j]
    scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
    # What was taken off the second time is at right angles to what is left.
    beta = jnp.sqrt(jnp.maximum(square[0] - jnp.sum(again**2), 0))
    runs = beta > jnp.maximum(breakdown_tol * scale, tiny)
    beta = jnp.where(runs, beta, 0)
    carry = basis, vector, direction(rest, beta, runs), beta, scale
    return carry, (alpha, beta, image)

  norm = jnp.sqrt(total(_dot(start, start)))
  nonzero = norm > 0
  vector = direction(start, norm, nonzero)
  zeros = jax.tree.map(jnp.zeros_like, vector)
  rows = lambda v: jnp.broadcast_to(v, (num_steps, *v.shape))
  zero = jnp.zeros_like(norm)
  carry = jax.tree.map(rows, zeros), zeros, vector, zero, zero
  (basis, *_), (diagonal, off_diagonal, images) = jax.lax.scan(
    advance, carry, jnp.arange(num_steps)
  )
  lasting = jnp.sum(off_diagonal[:-1] > 0, dtype=jnp.int32)
  found = jnp.where(nonzero, 1 + lasting, 0)
  return Lanczos(basis, diagonal, off_diagonal, norm, found, images)


def _checked(start, num_steps, axis_name, breakdown_tol) -> tuple[Any, Any]:
  """The start in the dtype of the basis, and that dtype."""
  arguments.check_at_least('breakdown_tol', breakdown_tol, 0)
  start = jax.tree.map(jnp.asarray, start)
  leaves = jax.tree.leaves(start)
  for leaf in leaves:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(f'start must hold floating numbers, got {leaf.dtype}.')
  size = sum(leaf.size for leaf in leaves)
  if axis_name is not None:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    for name in names:
      size *= mesh.axis_size(name)
  if not 1 <= num_steps <= size:
    raise ValueError(
      f'num_steps must lie in [1, {size}], the entries of start, got '
      f'{num_steps}.'
    )
  wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
  dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), start), dtype


def _dot(one: Any, other: Any) -> jax.Array:
  """Sum of products over all leaves: ()."""
  terms = jax.tree.map(lambda x, y: jnp.sum(x * y), one, other)
  return sum(jax.tree.leaves(terms)[1:], start=jax.tree.leaves(terms)[0])


def _products(basis: Any, vector: Any) -> jax.Array:
  """V^T w over all leaves: (m,)."""

  def one(rows, w):
    return jnp.tensordot(rows, w, axes=w.ndim, precision='highest')

  terms = jax.tree.leaves(jax.tree.map(one, basis, vector))
  return sum(terms[1:], start=terms[0])


def _combine(rows: jax.Array, weights: jax.Array) -> jax.Array:
  """The sum of (m, ...) with weights (m,): (...)."""
  return jnp.tensordot(weights, rows, axes=1, precision='highest')
