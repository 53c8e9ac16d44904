"""Arrays of which few rows are not zero, as those rows and their numbers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexedSlices:
  """Rows of an array, and which they are; `make` checks what it is given.

  Rows of one number add up. A number outside of [0, V) counts for nothing; V
  itself is what fills the places that a static shape leaves over.

  Attributes:
    values: (n, ...), the rows.
    indices: (n,) int32, the number of each.
    dense_shape: (V, ...), static: the shape of the array that they stand for.
  """

  values: Any
  indices: Any
  dense_shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))

  @property
  def num_slices(self) -> int:
    """n, those that count for nothing included."""
    return self.values.shape[0]

  @property
  def dtype(self) -> np.dtype:
    """Of the values."""
    return self.values.dtype


def is_slices(x: Any) -> bool:
  """Whether something is an :class:`IndexedSlices`; an `is_leaf` for trees."""
  return isinstance(x, IndexedSlices)


def make(
  values: jax.typing.ArrayLike,
  indices: jax.typing.ArrayLike,
  dense_shape: Sequence[int],
) -> IndexedSlices:
  """Makes slices whose parts fit each other.

  Args:
    values: (n, ...), of a float dtype.
    indices: (n,), integers; of those outside of [0, V) rows are dropped.
    dense_shape: (V, ...), with the same axes after the first.

  Returns:
    The slices, their indices as int32.

  Raises:
    TypeError: If values are no floats or indices no integers.
    ValueError: If shapes do not fit, or V is no int32.

  Examples:
    >>> slices = make(
    ...   np.float32([[1, 2], [3, 4], [5, 6]]), np.array([2, 0, 2]), (3, 2)
    ... )
    >>> to_dense(slices)
    Array([[3., 4.],
           [0., 0.],
           [6., 8.]], dtype=float32)
  """
  values, indices = jnp.asarray(values), jnp.asarray(indices)
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise TypeError(f'values must be floats, got {values.dtype}.')
  if not jnp.issubdtype(indices.dtype, jnp.integer):
    raise TypeError(f'indices must be integers, got {indices.dtype}.')
  dense_shape = tuple(map(int, dense_shape))
  if indices.dtype.itemsize > 4 and dense_shape:
    # Cut to 32 bits, a number far outside might come to lie inside.
    num_rows = dense_shape[0]
    inside = (indices >= 0) & (indices < num_rows)
    indices = jnp.where(inside, indices, num_rows)
  slices = IndexedSlices(values, indices.astype(jnp.int32), dense_shape)
  check(slices)
  return slices


def check(slices: IndexedSlices, name: str = 'slices') -> None:
  """Refuses slices whose parts do not fit each other.

  Args:
    slices: Of arrays or shapes.
    name: What an error calls them.

  Raises:
    TypeError: If values are no floats or indices are not int32.
    ValueError: If shapes do not fit, or V is no int32.
  """
  values, indices, shape = slices.values, slices.indices, slices.dense_shape
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise TypeError(f'{name}.values must be floats, got {values.dtype}.')
  if indices.dtype != jnp.int32:
    raise TypeError(f'{name}.indices must be int32, got {indices.dtype}.')
  if indices.ndim != 1 or values.shape[:1] != indices.shape:
    raise ValueError(
      f'{name}.values and {name}.indices must be (n, ...) and (n,), got '
      f'{values.shape} and {indices.shape}.'
    )
  if not shape or values.shape[1:] != shape[1:]:
    raise ValueError(
      f'{name}.dense_shape must be (V, ...) with the axes of rows of values '
      f'{values.shape}, got {shape}.'
    )
  if not 0 < shape[0] < 2**31:
    raise ValueError(
      f'{name}.dense_shape must have 1 to 2^31 - 1 rows, got {shape[0]}.'
    )


def from_dense(x: jax.Array) -> IndexedSlices:
  """All rows of an array (V, ...), zeros too."""
  return make(x, jnp.arange(x.shape[0], dtype=jnp.int32), x.shape)


def to_dense(
  slices: IndexedSlices, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
  """The array that slices stand for; no slice at all stands for zeros.

  Sums of 16-bit values are made in float32. XLA adds each row in place, in no
  more time than it takes to fill the array with zeros, and sorted rows are no
  faster.

  Args:
    slices: n rows.
    dtype: Of the result; that of the values by default.

  Returns:
    The array, of shape `dense_shape`.
  """
  wide = _wide(slices.dtype)
  dense = add(
    jnp.zeros(slices.dense_shape, wide),
    dataclasses.replace(slices, values=slices.values.astype(wide)),
  )
  return dense.astype(slices.dtype if dtype is None else dtype)


def add(x: jax.Array, slices: IndexedSlices) -> jax.Array:
  """Adds slices to an array of their `dense_shape`, which keeps its dtype.

  Only the rows that the slices name are read and written where the array may be
  overwritten: in a compiled function that is given it to keep.

  Args:
    x: (V, ...).
    slices: Of the same shape when dense.

  Returns:
    The sum.

  Raises:
    ValueError: If the shapes differ.
  """
  if x.shape != slices.dense_shape:
    raise ValueError(
      f'x must have the dense_shape of slices, {slices.dense_shape}, got '
      f'{x.shape}.'
    )
  return x.at[slices.indices].add(
    slices.values.astype(x.dtype), mode='drop', wrap_negative_indices=False
  )


def concatenate(parts: Sequence[IndexedSlices]) -> IndexedSlices:
  """The sum of several slices, as all their rows one after another.

  Args:
    parts: At least one, all with one dtype and `dense_shape`.

  Returns:
    Their rows, of which some may be of one number.

  Raises:
    ValueError: If there is none, or they differ in dtype or shape.
  """
  if not parts:
    raise ValueError('parts must be at least one, got none.')
  kinds = {(part.dtype, part.dense_shape) for part in parts}
  if len(kinds) > 1:
    raise ValueError(
      'parts must have one dtype and dense_shape, got '
      f'{sorted(kinds, key=str)}.'
    )
  return IndexedSlices(
    jnp.concatenate([part.values for part in parts]),
    jnp.concatenate([part.indices for part in parts]),
    parts[0].dense_shape,
  )


def dedup(slices: IndexedSlices, size: int | None = None) -> IndexedSlices:
  """Adds up the rows of one number.

  Args:
    slices: n rows.
    size: How many rows the result has, static: at least as many as there are
      different numbers, for of more the greatest are lost. min(n, V) by
      default, which always suffices.

  Returns:
    `size` rows whose numbers rise; those left over are zero and of number V.

  Raises:
    ValueError: If `size` is below 1.

  Examples:
    >>> slices = make(np.float32([[1], [2], [4]]), np.array([2, 0, 2]), (9, 1))
    >>> found = dedup(slices)
    >>> found.indices, found.values[:, 0]
    (Array([0, 2, 9], dtype=int32), Array([2., 5., 0.], dtype=float32))
  """
  num_rows = slices.dense_shape[0]
  if size is None:
    size = min(slices.num_slices, num_rows)
  elif size < 1:
    raise ValueError(f'size must be at least 1, got {size}.')
  if slices.num_slices == 0:
    return slices
  inside = (slices.indices >= 0) & (slices.indices < num_rows)
  indices, places = jnp.unique(
    jnp.where(inside, slices.indices, num_rows),
    size=size,
    fill_value=num_rows,
    return_inverse=True,
  )
  wide = _wide(slices.dtype)
  values = jnp.zeros((size, *slices.values.shape[1:]), wide)
  # What is no row of the array must not fill the places of number V.
  places = jnp.where(inside, places, size)
  values = values.at[places].add(slices.values.astype(wide), mode='drop')
  return IndexedSlices(values.astype(slices.dtype), indices, slices.dense_shape)


def norm(slices: IndexedSlices) -> jax.Array:
  """The Frobenius norm of the array that slices stand for, () float32 or 64.

  The norm of the values is another where rows share a number.
  """
  rows = dedup(slices).values
  return jnp.sqrt(jnp.sum(jnp.square(rows.astype(_wide(rows.dtype)))))


def shard(
  slices: IndexedSlices, number: jax.typing.ArrayLike, num_shards: int
) -> IndexedSlices:
  """Slices of one of the equal parts in which an array's rows lie.

  Args:
    slices: n rows of an array (V, ...).
    number: (), int32 in [0, num_shards), which part; may be traced.
    num_shards: A divisor of V.

  Returns:
    n slices of an array (V / num_shards, ...); rows of other parts count for
    nothing.

  Raises:
    ValueError: If `num_shards` does not divide V.
  """
  num_rows, *rest = slices.dense_shape
  if num_shards < 1 or num_rows % num_shards:
    raise ValueError(
      f'num_shards must divide the {num_rows} rows, got {num_shards}.'
    )
  local = num_rows // num_shards
  indices = slices.indices - jnp.asarray(number, jnp.int32) * local
  inside = (indices >= 0) & (indices < local)
  return IndexedSlices(
    slices.values, jnp.where(inside, indices, local), (local, *rest)
  )


def num_bytes(dense_shape: Sequence[int], dtype: jax.typing.DTypeLike) -> int:
  """Bytes of a dense array."""
  return math.prod(dense_shape) * np.dtype(dtype).itemsize


def _wide(dtype: np.dtype) -> np.dtype:
  """What sums of a dtype are made in."""
  return np.promote_types(dtype, np.float32)
