"""Sparse matrices in compressed rows, as SciPy has them, on the host."""

from typing import Any

import numpy as np


def check(
  matrix: Any, columns: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The entries of a matrix, once it is known to be one.

  Args:
    matrix: Has `indptr`, `indices`, `data` and `shape`, as a
      `scipy.sparse.csr_array` does.
    columns: What errors call its columns.

  Returns:
    Rows, columns and values, (nnz,) each.

  Raises:
    ValueError: If an index lies outside of its range, or the row pointers do
      not rise from 0 to the number of values.
  """
  num_rows, num_columns = matrix.shape
  starts = np.asarray(matrix.indptr, np.int64)
  ids, values = np.asarray(matrix.indices), np.asarray(matrix.data)
  if len(starts) != num_rows + 1 or len(ids) != len(values):
    raise ValueError(
      f'matrix must have {num_rows + 1} row pointers and as many indices as '
      f'data, got {len(starts)}, {len(ids)} and {len(values)}.'
    )
  if starts[0] != 0 or starts[-1] != len(values) or np.any(np.diff(starts) < 0):
    raise ValueError(
      f'matrix must have row pointers that rise from 0 to {len(values)}.'
    )
  if len(ids) and not 0 <= ids.min() <= ids.max() < num_columns:
    raise ValueError(
      f'matrix must have {columns} in [0, {num_columns}), got {ids.min()} to '
      f'{ids.max()}.'
    )
  return np.repeat(np.arange(num_rows), np.diff(starts)), ids, values


def merge(
  rows: np.ndarray,
  ids: np.ndarray,
  values: np.ndarray,
  shape: tuple[int, int],
  *,
  dtype: Any = np.float32,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Compressed rows whose columns rise, without zeros.

  Args:
    rows: (nnz,); an entry that stands twice is added up.
    ids: (nnz,), columns.
    values: (nnz,).
    shape: Of the matrix.
    dtype: Of the merged values.

  Returns:
    Where rows start, int64; columns, int32; and values.

  Examples:
    >>> entries = np.array([0, 0, 1]), np.array([2, 2, 0]), np.ones(3)
    >>> starts, ids, values = merge(*entries, (2, 3))
    >>> starts.tolist(), ids.tolist(), values.tolist()
    ([0, 1, 2], [2, 0], [2.0, 1.0])
  """
  num_rows, num_columns = shape
  order = rows * num_columns + ids.astype(np.int64)
  if np.any(np.diff(order) <= 0):
    order, place = np.unique(order, return_inverse=True)
    values = np.bincount(place, values)
    rows, ids = np.divmod(order, num_columns)
  kept = values != 0
  lengths = np.bincount(rows[kept], minlength=num_rows)
  starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  return starts, ids[kept].astype(np.int32), values[kept].astype(dtype)
