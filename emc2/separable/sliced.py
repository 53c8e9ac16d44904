"""Sparse matrices in slices of few widths, and their products.

Rows of about equal length lie side by side, and each step of a product reads
whole rows of the other matrix and adds them up in the cache. The layout is
known as SELL-C-sigma; long rows are cut, so that there are few widths.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib

HEIGHT = 8
"""Rows of a slice: their sums stay in the first-level cache."""

WIDTHS = (8, 4, 2, 1)
"""Entries of each row of a slice; what is longer is several slices."""


class Sliced(NamedTuple):
  """Sparse matrices (R, C) of equal shapes.

  Shapes, not values, say how matrices are cut, so all of a stack share them.
  """

  # By `WIDTHS`. Flat, since a TPU would pad a last axis to a multiple of 128.
  ids: tuple[Any, ...]  # Each (..., slices * width * HEIGHT), int32: columns.
  values: tuple[Any, ...]  # Each likewise, float32; 0 in the padding.
  rows: tuple[Any, ...]  # Each (..., slices * HEIGHT), int32; R for no row.


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

  def multiply(total, slice_):
    ids, values, rows = slice_
    sums = jnp.zeros_like(total, shape=(HEIGHT, table.shape[1]))
    for start in range(0, len(ids), HEIGHT):
      lanes = slice(start, start + HEIGHT)
      found = table.at[ids[lanes]].get(mode='promise_in_bounds')
      sums += values[lanes, None] * found
    return total.at[rows].add(sums, mode='drop', unique_indices=True), None

  for width, *slices in zip(WIDTHS, *matrix, strict=True):
    sizes = width * HEIGHT, width * HEIGHT, HEIGHT
    slices = [x.reshape(-1, n) for x, n in zip(slices, sizes, strict=True)]
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
  by_row = np.argsort(place, kind='stable')
  place, ids, values = place[by_row], ids[by_row], values[by_row]
  slot = np.arange(len(place)) - (np.cumsum(lengths) - lengths)[place]
  part, row = np.divmod(place, num_rows)

  # The rows of each part, long before short, and where each has come to lie.
  lengths = lengths.reshape(num_parts, num_rows)
  order = np.argsort(-lengths, axis=1, kind='stable')
  rank = np.argsort(order, axis=1)
  group, lane = np.divmod(rank[part, row], HEIGHT)
  num_groups = -(-num_rows // HEIGHT)
  padded = np.full((num_parts, num_groups * HEIGHT), num_rows, np.int32)
  padded[:, :num_rows] = order
  padded = padded.reshape(num_parts, num_groups, HEIGHT)
  longest = np.take_along_axis(lengths, order, axis=1)[:, ::HEIGHT].max(axis=0)

  found = [], [], []
  for width in WIDTHS:
    if width == WIDTHS[0]:
      counts = -(-longest // width)
      counts[longest <= WIDTHS[1]] = 0
    else:
      counts = ((longest <= width) & (longest > width // 2)).astype(int)
    # Groups of rows, as often as they are wide.
    groups = np.repeat(np.arange(num_groups), counts)
    inside = counts[group] > 0
    cut_, column = np.divmod(slot[inside], width)
    slice_ = (np.cumsum(counts) - counts)[group[inside]] + cut_
    at = part[inside], slice_, column * HEIGHT + lane[inside]
    shape = num_parts, len(groups), width * HEIGHT
    run = np.zeros(shape, np.int32), np.zeros(shape, values.dtype)
    run[0][at], run[1][at] = ids[inside], values[inside]
    for kept, new in zip(found, (*run, padded[:, groups]), strict=True):
      kept.append(new.reshape(num_parts, -1))
  return Sliced(*map(tuple, found))
