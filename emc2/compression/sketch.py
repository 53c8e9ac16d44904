"""Count sketches: signed sums of columns that are hashed to few buckets."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments
from emc2.compression import compressor
from emc2.kernels import count_sketch as kernel

HASHINGS = ('uniform', 'balanced')
"""How columns are dealt to buckets."""


class Hashes(NamedTuple):
  """Where the columns of a matrix go, and with which sign.

  Attributes:
    buckets: (m,), int32, in [0, W).
    signs: (m,), int8: 1 or -1.
  """

  buckets: jax.Array
  signs: jax.Array


def count_sketch(
  size: float = 0.2, *, hashing: str = 'uniform'
) -> compressor.Compressor:
  r"""Sends signed sums of columns.

  For an array as matrix V (n, m), with buckets h and signs s that are drawn
  once for all rows and steps,

  .. math::
    S(V)_{ab} = \sum_{j: h(j) = b} s_j V_{aj}, \quad
    U(S(V))_{aj} = s_j S(V)_{a h(j)}.

  Both are linear, and U is the transpose of S. Over the hashes U(S(V)) has the
  mean V, and for independent buckets :math:`E\|U(S(V)) - V\|^2 =
  \frac{m - 1}{W} \|V\|^2`; for one draw of them it is no projection, but
  :math:`S(U(T))_{ab} = n_b T_{ab}` with the load :math:`n_b` of a bucket.

  Args:
    size: W / m, in (0, 1]: W = max(1, int(size m)), static.
    hashing: 'uniform' draws each bucket by itself; 'balanced' deals a random
      permutation of the columns out to the buckets in turn, so that loads
      differ by at most 1 and omega is :math:`\sum_b n_b (n_b - 1) / m`.

  Returns:
    A code with 32 n W bits, linear in the array. Its state holds the hashes.

  Raises:
    ValueError: If `size` is not in (0, 1], or `hashing` is unknown.

  References:
    Charikar, Chen and Farach-Colton, `Finding Frequent Items in Data Streams
    <https://doi.org/10.1007/3-540-45465-9_59>`_, 2002. Li, Zheng, Raman,
    Shrivastava and Giannakis, `Contractive Error Feedback for Gradient
    Compression <https://arxiv.org/abs/2312.08538>`_, 2023.
  """
  if not 0 < size <= 1:
    raise ValueError(f'size must be in (0, 1], got {size}.')
  arguments.check_one_of('hashing', hashing, HASHINGS)

  def begin(shape, dtype, key):
    del dtype
    columns, width = matrix_shape(shape)[1], table_shape(shape, size)[1]
    of_buckets, of_signs = jax.random.split(key)
    if hashing == 'uniform':
      buckets = jax.random.randint(of_buckets, (columns,), 0, width, jnp.int32)
    else:
      order = jax.random.permutation(of_buckets, columns).astype(jnp.int32)
      buckets = order % width
    signs = jax.random.rademacher(of_signs, (columns,), jnp.int8)
    return Hashes(buckets, signs)

  def compress(state, x, key):
    del key
    matrix = x.reshape(matrix_shape(x.shape))
    width = table_shape(x.shape, size)[1]
    signs = state.signs.astype(x.dtype)
    return kernel.insert(matrix, state.buckets, signs, width), state

  def decompress(state, payload, like):
    signs = state.signs.astype(like.dtype)
    return kernel.query(payload, state.buckets, signs).reshape(like.shape)

  def omega(shape):
    columns, width = matrix_shape(shape)[1], table_shape(shape, size)[1]
    if hashing == 'uniform':
      return (columns - 1) / width
    least, larger = divmod(columns, width)
    pairs = larger * (least + 1) * least + (width - larger) * least * (
      least - 1
    )
    return pairs / columns

  return compressor.Compressor(
    name='count sketch' + ', balanced' * (hashing == 'balanced'),
    init=begin,
    compress=compress,
    decompress=decompress,
    bits=lambda shape: 32 * math.prod(table_shape(shape, size)),
    omega=omega,
    unbiased=True,
    allreducible=True,
  )


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
  """(n, m): the first axis, and all others as one; a vector is one row."""
  rows = shape[0] if len(shape) > 1 else 1
  return rows, math.prod(shape) // rows


def table_shape(shape: Sequence[int], size: float) -> tuple[int, int]:
  """(n, W): of the sketch of an array."""
  rows, columns = matrix_shape(shape)
  return rows, max(1, int(size * columns))


def loads(hashes: Hashes, width: int) -> jax.Array:
  """How many columns each bucket holds: (width,), int32."""
  return jnp.bincount(hashes.buckets, length=width).astype(jnp.int32)


def max_load(hashes: Hashes, width: int) -> jax.Array:
  """The most columns of a bucket, (), int32.

  A memory by sketch with retention b is stable behind a projection while
  (1 - b) max_load <= 2.
  """
  return jnp.max(loads(hashes, width))
