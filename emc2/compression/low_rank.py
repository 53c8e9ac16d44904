"""Codes of low rank, for arrays that are read as matrices."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments, mesh
from emc2.compression import collectives, compressor

ERRORS = ('local', 'mean')
"""What counts as sent: the worker's own projection, or the mean of all."""

METHODS = ('qr', 'gram_schmidt')
"""How columns are made orthonormal."""

# Up to here, sums of outer products in one pass over the matrix are faster on
# a CPU than a product that a second pass subtracts.
_UNROLLED_RANK = 8


class Factors(NamedTuple):
  """A payload of low rank: the matrix is left right^T.

  Attributes:
    left: (n, r), dtype of the array.
    right: (m, r), dtype of the array.
  """

  left: jax.Array
  right: jax.Array


class AlternatingState(NamedTuple):
  """What :func:`alternating` keeps.

  Attributes:
    factors: The last of each side.
    count: (), int32: products made.
  """

  factors: Factors
  count: jax.Array


def power_sgd(
  rank: int = 4,
  *,
  warm_start: bool = True,
  orthogonalize_first: bool = False,
  error: str = 'local',
  eps: float = 1e-8,
  method: str = 'qr',
  at_most: bool = False,
) -> compressor.Compressor:
  r"""Sends two factors, found by one step of power iteration (PowerSGD).

  For worker i's matrix :math:`M^i` (n, m) and the factor :math:`Q` (m, r) of
  the last step, the same on all workers,

  .. math::
    P = \operatorname{orth}\Bigl(\sum_i M^i Q\Bigr), \quad
    Q^i = (M^i)^\top P, \quad Q \leftarrow \frac{1}{N} \sum_i Q^i, \quad
    \bar M = P Q^\top,

  and the worker has sent :math:`P (Q^i)^\top`, the projection of its matrix on
  the columns of P, so that :math:`\|M^i - P (Q^i)^\top\| \leq \|M^i\|`. On a
  constant mean, the steps converge to its best approximation of rank r.

  Workers exchange the P of all arrays, then the Q of all.

  .. note::
    An array is the matrix of two neighbouring groups of axes that has the
    fewest rows and columns. For a kernel as PyTorch lays it out, (out, in, h,
    w), that is (out, in h w), as in the paper; for one as Flax does, (h, w, in,
    out), it is (h w in, out).

  .. note::
    A column of zeros, as a zero matrix leaves in Q, is replaced by a random one
    before it is used again, for no step would leave 0.

  Args:
    rank: r, in [1, min(n, m)]. Static.
    warm_start: Whether a step starts from the last Q; otherwise from a random
      one. Static.
    orthogonalize_first: Whether Q is made orthonormal before it is used. It
      changes results by rounding only. Static.
    error: What is taken off a memory: 'local', the worker's own projection; or
      'mean', the mean of all, as the authors' code has it. The mean over
      workers is the same. Static.
    eps: What 'gram_schmidt' adds to norms, at least 0.
    method: 'qr', by Householder reflections; or 'gram_schmidt', modified, in
      the order of columns. Static.
    at_most: Whether a smaller matrix has the rank min(n, m), at which nothing
      is lost and more is sent than without a code; otherwise it is refused.

  Returns:
    A code with 32 r (n + m) bits. What it keeps of the norm depends on the
    array: :math:`\|P^\top M\|^2 / \|M\|^2`, at least 0.

  Raises:
    ValueError: If `rank` is below 1, `eps` below 0, or a name unknown; by
      `init`, if `rank` is greater than min(n, m).

  References:
    Vogels, Karimireddy and Jaggi, `PowerSGD: Practical Low-Rank Gradient
    Compression for Distributed Optimization
    <https://arxiv.org/abs/1905.13727>`_, 2019, Algorithm 1.
  """
  _check_rank(rank)
  arguments.check_one_of('error', error, ERRORS)
  arguments.check_at_least('eps', eps, 0)
  arguments.check_one_of('method', method, METHODS)
  orthonormal = functools.partial(_orthonormal, method=method, eps=eps)

  def begin(shape, dtype, key):
    _check_fits(shape, rank, at_most)
    if not warm_start:
      return ()
    return _normal(key, matrix_shape(shape)[1], _rank(shape, rank), dtype)

  def reduce(states, xs, keys, axis_name):
    matrices = [x.reshape(matrix_shape(x.shape)) for x in xs]
    right = [
      _start(state, key, matrix, _rank(x.shape, rank))
      for state, key, matrix, x in zip(states, keys, matrices, xs, strict=True)
    ]
    if orthogonalize_first:
      right = orthonormal(right)
    left = list(map(_times, matrices, right))
    if axis_name is not None:
      left = collectives.total(left, axis_name)
    left = orthonormal(left)
    own = list(map(_transposed_times, matrices, left))
    right = own if axis_name is None else collectives.mean(own, axis_name)
    mean, sent = _build(left, right, xs), None
    if error == 'local' and axis_name is not None:
      sent = _build(left, own, xs)
    after = right if warm_start else list(states)
    return compressor.Reduced(mean if sent is None else sent, mean, after)

  def compress(state, x, key):
    matrix = x.reshape(matrix_shape(x.shape))
    right = [_start(state, key, matrix, _rank(x.shape, rank))]
    if orthogonalize_first:
      right = orthonormal(right)
    (left,) = orthonormal([_times(matrix, right[0])])
    right = _transposed_times(matrix, left)
    return Factors(left, right), right if warm_start else state

  return compressor.Compressor(
    name=f'PowerSGD, rank {rank}',
    init=begin,
    compress=compress,
    decompress=_decompress,
    bits=lambda shape: 32 * _rank(shape, rank) * sum(matrix_shape(shape)),
    delta=lambda shape: 1.0 if rank >= min(matrix_shape(shape)) else 0.0,
    reduce=reduce,
  )


def alternating(
  rank: int = 4, iterations: int = 1, *, at_most: bool = False
) -> compressor.Compressor:
  r"""Sends one factor per product, of either side in turn.

  Product by product, from :math:`P` (n, r) and :math:`Q` (m, r) of the last
  ones and with the residual :math:`M^i`, at first the matrix,

  .. math::
    \text{even:}\quad P \leftarrow \operatorname{orth}(P), \quad
    Q^i = (M^i)^\top P, \qquad
    \text{odd:}\quad Q \leftarrow \operatorname{orth}(Q), \quad
    P^i = M^i Q,

  then the new factor becomes the mean of the workers', and each worker takes
  the product of its own off its residual. What was sent is the sum of those.

  Args:
    rank: r, in [1, min(n, m)]. Static.
    iterations: How many products each call makes, at least 1. Static.
    at_most: As in :func:`power_sgd`.

  Returns:
    A code with 16 `iterations` r (n + m) bits, the mean over calls if
    `iterations` is odd.

  Raises:
    ValueError: If a number is below 1; by `init`, if `rank` is greater than
      min(n, m).

  References:
    Vogels, Karimireddy and Jaggi, `PowerSGD
    <https://arxiv.org/abs/1905.13727>`_, 2019: the authors' later package.
  """
  _check_rank(rank)
  arguments.check_at_least('iterations', iterations, 1)

  def begin(shape, dtype, key):
    _check_fits(shape, rank, at_most)
    rows, columns = matrix_shape(shape)
    kept = _rank(shape, rank)
    of_left, of_right = jax.random.split(key)
    factors = Factors(
      _normal(of_left, rows, kept, dtype),
      _normal(of_right, columns, kept, dtype),
    )
    return AlternatingState(factors, jnp.zeros([], jnp.int32))

  def multiply(even, residuals, factors, keys, axis_name):
    """One product of each matrix: the new factors, and the workers' own."""
    lefts = [one.left for one in factors]
    rights = [one.right for one in factors]
    fixed = list(map(_refill, lefts if even else rights, keys))
    fixed = _orthonormal(fixed, 'qr', 0.0)
    times = _transposed_times if even else _times
    own = list(map(times, residuals, fixed))
    mean = own if axis_name is None else collectives.mean(own, axis_name)

    def pair(fixed, new):
      # Of one type, whichever side was multiplied.
      fixed, new = mesh.vary_alike(fixed, new)
      return Factors(*((fixed, new) if even else (new, fixed)))

    return list(map(pair, fixed, mean)), list(map(pair, fixed, own))

  def run(states, xs, keys, axis_name):
    """The workers' own factors, their means, and the states."""
    matrices = [x.reshape(matrix_shape(x.shape)) for x in xs]
    factors = [state.factors for state in states]
    residuals, owns, means = matrices, [], []
    count = states[0].count if states else 0
    for i in range(iterations):
      work = functools.partial(
        multiply,
        residuals=residuals,
        factors=factors,
        keys=keys,
        axis_name=axis_name,
      )
      if iterations % 2 == 0:
        factors, own = work(i % 2 == 0)
      else:
        sides = [functools.partial(work, even) for even in (True, False)]
        factors, own = jax.lax.cond((count + i) % 2 == 0, *sides)
      residuals = [
        x - _outer(*pair) for x, pair in zip(residuals, own, strict=True)
      ]
      owns.append(own)
      means.append(factors)
    after = [
      AlternatingState(pair, state.count + iterations)
      for pair, state in zip(factors, states, strict=True)
    ]
    return list(zip(*owns, strict=True)), list(zip(*means, strict=True)), after

  def add_up(state, payload, like):
    del state
    terms = [_outer(*factors) for factors in payload]
    return sum(terms[1:], start=terms[0]).reshape(like.shape)

  def reduce(states, xs, keys, axis_name):
    own, mean, after = run(states, xs, keys, axis_name)
    sent = list(map(add_up, after, own, xs))
    if axis_name is None:
      return compressor.Reduced(sent, sent, after)
    return compressor.Reduced(sent, list(map(add_up, after, mean, xs)), after)

  def compress(state, x, key):
    own, _, after = run([state], [x], [key], None)
    return own[0], after[0]

  def num_sent(shape):
    """Entries of both factors of each product; the new one travels."""
    return iterations * _rank(shape, rank) * sum(matrix_shape(shape))

  return compressor.Compressor(
    name=f'alternating, rank {rank}',
    init=begin,
    compress=compress,
    decompress=add_up,
    bits=lambda shape: 16 * num_sent(shape),
    wire=lambda shape, dtype: 4 * jnp.dtype(dtype).itemsize * num_sent(shape),
    delta=lambda shape: 1.0 if rank >= min(matrix_shape(shape)) else 0.0,
    reduce=reduce,
  )


def unbiased(rank: int = 4) -> compressor.Compressor:
  r"""Sends the products with r random vectors: unbiased, without memory.

  .. math:: Q(M) = \frac{1}{r} (M U) U^\top, \quad U \in \mathbb{R}^{m \times
    r} \text{ of independent standard normal entries},

  which all workers draw alike. It is what PowerSGD is measured against.

  .. note::
    The authors' code leaves out 1 / r, and so sends r times too much.

  Args:
    rank: r, at least 1. Static.

  Returns:
    A code with omega = (m + 1) / r and 32 n r bits.

  Raises:
    ValueError: If `rank` is below 1.

  References:
    Vogels, Karimireddy and Jaggi, `PowerSGD
    <https://arxiv.org/abs/1905.13727>`_, 2019, Section 4.1.
  """
  _check_rank(rank)
  draw = lambda key, x: _normal(key, matrix_shape(x.shape)[1], rank, x.dtype)

  def compress(state, x, key):
    del state
    matrix = x.reshape(matrix_shape(x.shape))
    # The key is all that it takes to draw U again.
    return _times(matrix, draw(key, x)), key

  def decompress(state, payload, like):
    whole = _outer(payload / rank, draw(state, like))
    return whole.reshape(like.shape)

  return compressor.Compressor(
    name=f'unbiased, rank {rank}',
    init=lambda shape, dtype, key: key,
    compress=compress,
    decompress=decompress,
    bits=lambda shape: 32 * rank * matrix_shape(shape)[0],
    omega=lambda shape: (matrix_shape(shape)[1] + 1) / rank,
    unbiased=True,
    allreducible=True,
  )


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
  """(n, m): groups of the first and of the last axes, with the least n + m."""
  splits = [
    (math.prod(shape[:i]), math.prod(shape[i:])) for i in range(len(shape) + 1)
  ]
  return min(splits, key=sum)


def _rank(shape: Sequence[int], rank: int) -> int:
  return min(rank, *matrix_shape(shape))


def _check_fits(shape: Sequence[int], rank: int, at_most: bool) -> None:
  """Refuses a matrix that has fewer rows or columns than the rank."""
  matrix = matrix_shape(shape)
  if rank > min(matrix) and not at_most:
    raise ValueError(
      f'rank must be at most {min(matrix)} for the matrix {matrix} of shape '
      f'{tuple(shape)}, got {rank}; at_most=True takes what it has.'
    )


def _check_rank(rank: int) -> None:
  arguments.check_at_least('rank', rank, 1)
  if rank != int(rank):
    raise ValueError(f'rank must be a whole number, got {rank}.')


def _normal(key, size: int, rank: int, dtype: Any) -> jax.Array:
  return jax.random.normal(key, (size, rank), dtype)


def _start(state, key, matrix, rank: int) -> jax.Array:
  """The factor that a step starts from."""
  if isinstance(state, tuple):
    return _normal(key, matrix.shape[1], rank, matrix.dtype)
  return _refill(state, key)


def _refill(factor: jax.Array, key: jax.Array) -> jax.Array:
  """Replaces columns of zeros by random ones."""
  fresh = _normal(key, *factor.shape, factor.dtype)
  return jnp.where(jnp.any(factor != 0, axis=0, keepdims=True), factor, fresh)


def _orthonormal(
  factors: list[jax.Array], method: str, eps: float
) -> list[jax.Array]:
  """Makes columns orthonormal, of all matrices of one shape at once."""
  one = functools.partial(_gram_schmidt, eps=eps)
  if method == 'qr':
    one = lambda factor: jnp.linalg.qr(factor)[0]
  groups = {}
  for i, factor in enumerate(factors):
    varying = jax.typeof(factor).manual_axis_type.varying
    groups.setdefault((factor.shape, factor.dtype, varying), []).append(i)
  done = list(factors)
  for members in groups.values():
    stacked = jnp.stack([factors[i] for i in members])
    for i, factor in zip(members, jax.vmap(one)(stacked), strict=True):
      done[i] = factor
  return done


def _gram_schmidt(factor: jax.Array, eps: float) -> jax.Array:
  """Modified Gram-Schmidt in the order of the columns; r is small."""
  rest, done = list(factor.T), []
  while rest:
    column = rest.pop(0)
    column = column / (jnp.sqrt(jnp.sum(column**2)) + eps)
    rest = [other - jnp.sum(column * other) * column for other in rest]
    done.append(column)
  return jnp.stack(done, axis=1)


def _times(matrix: jax.Array, right: jax.Array) -> jax.Array:
  """M Q: (n, r)."""
  return jnp.matmul(matrix, right, precision='highest')


def _transposed_times(matrix: jax.Array, left: jax.Array) -> jax.Array:
  """M^T P: (m, r), reading the matrix in the order in which it lies."""
  # Without barriers XLA folds the transposes into a product that is slow.
  turned = jax.lax.optimization_barrier(left.T)
  product = jnp.matmul(turned, matrix, precision='highest')
  return jax.lax.optimization_barrier(product).T


def _outer(left: jax.Array, right: jax.Array) -> jax.Array:
  """P Q^T: (n, m)."""
  if left.shape[1] > _UNROLLED_RANK:
    return _product(left, right)
  return jax.lax.platform_dependent(
    left, right, cpu=_unrolled, default=_product
  )


def _product(left, right):
  return jnp.matmul(left, right.T, precision='highest')


def _unrolled(left, right):
  terms = [left[:, i, None] * right[None, :, i] for i in range(left.shape[1])]
  return sum(terms[1:], start=terms[0])


def _build(left, right, xs) -> list[jax.Array]:
  return [
    _outer(*factors).reshape(x.shape)
    for *factors, x in zip(left, right, xs, strict=True)
  ]


def _decompress(state, payload, like):
  del state
  return _outer(*payload).reshape(like.shape)
