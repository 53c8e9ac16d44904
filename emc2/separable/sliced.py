"""Sparse matrices in slices of equal width, and their products.

Rows lie side by side in slices of 8, as wide as the longest of them, so that a
product reads whole rows of the other matrix and adds them up in the cache. The
layout is known as SELL-C-sigma.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HEIGHT = 8
"""Rows of a slice: their sums stay in the first-level cache."""

UNROLL = 4


class Sliced(NamedTuple):
  """Some equal-sized sparse matrices of few distinct widths of slices.

  Slices of one width lie together; shapes, not values, say how the matrices are
  cut, so all share them.
  """

  ids: tuple[Any, ...]  # Each (..., slices, width, HEIGHT), int32.
  values: tuple[Any, ...]  # Each likewise, float32; 0 in the padding.

  @property
  def num_rows(self) -> int:
    """Of each matrix, padded to a multiple of `HEIGHT`."""
    return HEIGHT * sum(x.shape[-3] for x in self.ids)


def matmul(matrix: Sliced, table: jax.Array) -> jax.Array:
  """Multiplies one sparse matrix with a dense one.

  Args:
    matrix: (rows, n) without leading axes.
    table: (n, columns).

  Returns:
    (rows, columns).

  References:
    Kreutzer, Hager, Wellein, Fehske, Bishop, `A unified sparse matrix data
    format for efficient general sparse matrix-vector multiplication
    <https://arxiv.org/abs/1307.6209>`_, 2014.
  """

  def add(total, ids, values):
    for i in range(ids.shape[0]):
      rows = table.at[ids[i]].get(mode='promise_in_bounds')
      total += values[i, :, None] * rows
    return total

  def multiply(_, slice_):
    ids, values = slice_
    width = ids.shape[0]
    total = jnp.zeros_like(table, shape=(HEIGHT, table.shape[1]))
    if width <= UNROLL:
      return None, add(total, ids, values)

    # Sliced inside the loop: cutting beforehand would copy the indices.
    def step(number, total):
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, number * UNROLL, UNROLL)
      return add(total, cut(ids), cut(values))

    return None, jax.lax.fori_loop(0, width // UNROLL, step, total)

  products = [
    jax.lax.scan(multiply, None, slices)[1].reshape(-1, table.shape[1])
    for slices in zip(matrix.ids, matrix.values, strict=True)
  ]
  return jnp.concatenate(products)


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
    rows: (nnz,), the row of each entry. Rows should come in falling order of
      their lengths: a slice is as wide as its longest row in any part.
    ids: (nnz,), its column.
    values: (nnz,).
    parts: (nnz,), the matrix that it belongs to.
    num_rows: Of each matrix.
    num_parts: How many matrices.

  Returns:
    NumPy arrays with a leading axis of `num_parts`.
  """
  num_slices = max(1, -(-num_rows // HEIGHT))
  place = parts.astype(np.int64) * (num_slices * HEIGHT) + rows
  order = np.argsort(place, kind='stable')
  place, ids, values = place[order], ids[order], values[order]
  lengths = np.bincount(place, minlength=num_parts * num_slices * HEIGHT)
  first = np.cumsum(lengths) - lengths
  slot = np.arange(len(place)) - first[place]
  longest = lengths.reshape(num_parts, num_slices, HEIGHT).max(axis=(0, 2))
  # Never rising, so that slices of one width are neighbours.
  longest = np.maximum.accumulate(longest[::-1])[::-1]
  widths = _round_up(longest)
  part, row = np.divmod(place, num_slices * HEIGHT)
  slice_, lane = np.divmod(row, HEIGHT)
  found_ids, found_values = [], []
  for width in np.unique(widths)[::-1]:
    members = np.flatnonzero(widths == width)
    shape = (num_parts, len(members), width, HEIGHT)
    inside = widths[slice_] == width
    at = part[inside], slice_[inside] - members[0], slot[inside], lane[inside]
    run_ids = np.zeros(shape, np.int32)
    run_values = np.zeros(shape, values.dtype)
    run_ids[at], run_values[at] = ids[inside], values[inside]
    found_ids.append(run_ids)
    found_values.append(run_values)
  return Sliced(tuple(found_ids), tuple(found_values))


def _round_up(lengths):
  """To 1, 2, 3, 4, 8, 12, 16, 24, 32, 48, ...: few widths, little padding."""
  steps = [1, 2, 3, 4, 8, 12]
  while steps[-1] < lengths.max(initial=1):
    steps.append(2 * steps[-2])
  steps = np.array(steps)
  return steps[np.searchsorted(steps, np.maximum(lengths, 1))]
