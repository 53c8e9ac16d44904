"""Sparse matrices in slices of equal width, and their products.

Rows lie side by side in slices of 8, as wide as the longest of them, so that a
product reads whole rows of the other matrix and adds them up in the cache. The
layout is known as SELL-C-sigma.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib

HEIGHT = 8
"""Rows of a slice: their sums stay in the first-level cache."""

UNROLL = 8


class Sliced(NamedTuple):
  """Sparse matrices (R, C) of equal shapes, rows in falling order of length.

  Slices of one width lie together; shapes, not values, say how matrices are
  cut, so all of a stack share them.
  """

  # A last axis as short as HEIGHT would be padded to 128 on a TPU.
  ids: tuple[Any, ...]  # Each (..., slices, width * HEIGHT), int32: columns.
  values: tuple[Any, ...]  # Each likewise, float32; 0 in the padding.
  rows: tuple[Any, ...]  # Each (..., slices, HEIGHT), int32; R for no row.


def add_matmul(total: jax.Array, matrix: Sliced, table: jax.Array) -> jax.Array:
  """Adds the product of a sparse matrix with a dense one.

  Args:
    total: (R, n).
    matrix: (R, C), without leading axes.
    table: (C, n).

  Returns:
    (R, n).

  References:
    Kreutzer, Hager, Wellein, Fehske, Bishop, `A unified sparse matrix data
    format for efficient general sparse matrix-vector multiplication
    <https://arxiv.org/abs/1307.6209>`_, 2014.
  """
  total, table, _ = mesh_lib.vary_alike(total, table, matrix.ids[0])

  def add(sums, ids, values):
    for i in range(ids.shape[0] // HEIGHT):
      lanes = slice(i * HEIGHT, (i + 1) * HEIGHT)
      found = table.at[ids[lanes]].get(mode='promise_in_bounds')
      sums += values[lanes, None] * found
    return sums

  def multiply(total, slice_):
    ids, values, rows = slice_
    width = ids.shape[0] // HEIGHT
    sums = jnp.zeros_like(total, shape=(HEIGHT, table.shape[1]))
    if width <= UNROLL:
      sums = add(sums, ids, values)
    else:

      def follow(number, sums):
        size = UNROLL * HEIGHT
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size)
        return add(sums, cut(ids), cut(values))

      sums = jax.lax.fori_loop(0, width // UNROLL, follow, sums)
    return total.at[rows].add(sums, mode='drop', unique_indices=True), None

  for slices in zip(matrix.ids, matrix.values, matrix.rows, strict=True):
    total, _ = jax.lax.scan(multiply, total, slices)
  return total


def cut(
  rows: np.ndarray,
  ids: np.ndarray,
  values: np.ndarray,
  parts: np.ndarray,
  num_rows: int,
  num_parts: int,
) -> Sliced:
  """Cuts entries of several matrices into slices of common widths.

  Args:
    rows: (nnz,), the row of each entry.
    ids: (nnz,), its column.
    values: (nnz,).
    parts: (nnz,), the matrix that it belongs to.
    num_rows: Of each matrix.
    num_parts: How many matrices.

  Returns:
    NumPy arrays with a leading axis of `num_parts`.
  """
  place = parts.astype(np.int64) * num_rows + rows
  lengths = np.bincount(place, minlength=num_parts * num_rows)
  lengths = lengths.reshape(num_parts, num_rows)
  # The rows of each part, long before short; where each row has come to lie.
  order = np.argsort(-lengths, axis=1, kind='stable')
  rank = np.argsort(order, axis=1)
  num_slices = max(1, -(-int(np.max(np.sum(lengths > 0, 1))) // HEIGHT))
  padded = np.full((num_parts, num_slices * HEIGHT), num_rows, np.int32)
  kept = min(num_rows, num_slices * HEIGHT)
  padded[:, :kept] = order[:, :kept]
  padded = padded.reshape(num_parts, num_slices, HEIGHT)
  longest = np.max(np.take_along_axis(lengths, order, 1)[:, ::HEIGHT], 0)
  widths = _round_up(longest[:num_slices])

  by_row = np.argsort(place, kind='stable')
  place, ids, values = place[by_row], ids[by_row], values[by_row]
  first = np.cumsum(lengths.reshape(-1)) - lengths.reshape(-1)
  slot = np.arange(len(place)) - first[place]
  part = place // num_rows
  slice_, lane = np.divmod(rank.reshape(-1)[place], HEIGHT)
  found = [], [], []
  for width in np.unique(widths)[::-1]:
    members = np.flatnonzero(widths == width)
    shape = (num_parts, len(members), width, HEIGHT)
    inside = widths[slice_] == width
    at = part[inside], slice_[inside] - members[0], slot[inside], lane[inside]
    run = np.zeros(shape, np.int32), np.zeros(shape, values.dtype)
    run[0][at], run[1][at] = ids[inside], values[inside]
    run = tuple(x.reshape(*shape[:2], -1) for x in run)
    for kept, new in zip(found, (*run, padded[:, members]), strict=True):
      kept.append(new)
  return Sliced(*map(tuple, found))


def _round_up(lengths):
  """To few widths with little padding, that `UNROLL` divides beyond itself."""
  steps = [1, 2, 3, 4, 6, UNROLL, 2 * UNROLL]
  while steps[-1] < lengths.max(initial=1):
    steps += [3 * steps[-1] // 2, 2 * steps[-1]]
  steps = np.array(steps)
  return steps[np.searchsorted(steps, np.maximum(lengths, 1))]
