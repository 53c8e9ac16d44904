"""Sparse rows of features, on the host."""

from typing import Any, NamedTuple

import numpy as np

from emc2 import csr


class SparseRows(NamedTuple):
  """N rows of D features in compressed form, on the host.

  What a `scipy.sparse.csr_array` holds, so :func:`from_csr` takes one.
  """

  starts: np.ndarray  # (N + 1,), int64: where each row starts.
  ids: np.ndarray  # (nnz,), int32: features, rising within a row.
  values: np.ndarray  # (nnz,), float32: finite, not 0.
  num_features: int  # D.

  @property
  def num_rows(self) -> int:
    """N."""
    return len(self.starts) - 1

  @property
  def shape(self) -> tuple[int, int]:
    """(N, D)."""
    return self.num_rows, self.num_features

  @property
  def row_ids(self) -> np.ndarray:
    """(nnz,), int32: the row of each entry."""
    ids = np.arange(self.num_rows, dtype=np.int32)
    return np.repeat(ids, np.diff(self.starts))

  def take(self, rows: np.ndarray) -> 'SparseRows':
    """Some rows, in the order of their numbers."""
    lengths = np.diff(self.starts)[rows]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    place += np.repeat(self.starts[rows], lengths)
    return SparseRows(
      starts, self.ids[place], self.values[place], self.num_features
    )

  def to_dense(self) -> np.ndarray:
    """(N, D), float32."""
    dense = np.zeros(self.shape, self.values.dtype)
    dense[self.row_ids, self.ids] = self.values
    return dense


def from_csr(matrix: Any) -> SparseRows:
  """Takes a sparse matrix in compressed rows.

  Args:
    matrix: Has `indptr`, `indices`, `data` and `shape` (N, D), as a
      `scipy.sparse.csr_array` does.

  Returns:
    The rows, without the zeros of the matrix and with what it lists twice added
    up.

  Raises:
    ValueError: If a value is not finite, an index lies outside of its range, or
      the row pointers do not rise from 0 to the number of values.

  Examples:
    >>> import types
    >>> matrix = types.SimpleNamespace(
    ...     shape=(2, 3), indptr=[0, 2, 3], indices=[2, 0, 1],
    ...     data=[5.0, 6.0, 7.0])
    >>> from_csr(matrix).to_dense()
    array([[6., 0., 5.],
           [0., 7., 0.]], dtype=float32)
  """
  rows, ids, values = csr.check(matrix, 'features')
  check_finite('matrix', values, rows)
  merged = csr.merge(rows, ids, values, matrix.shape)
  return SparseRows(*merged, num_features=int(matrix.shape[1]))


def from_dense(matrix: np.ndarray) -> SparseRows:
  """Takes the entries of a matrix (N, D) that are not 0.

  Raises:
    ValueError: If it is not finite or has not two axes.
  """
  matrix = np.asarray(matrix)
  if matrix.ndim != 2:
    raise ValueError(f'matrix must have shape (N, D), got {matrix.shape}.')
  rows, ids = np.nonzero(matrix)
  values = matrix[rows, ids]
  check_finite('matrix', values, rows)
  lengths = np.bincount(rows, minlength=len(matrix))
  return SparseRows(
    starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    ids=ids.astype(np.int32),
    values=values.astype(np.float32),
    num_features=matrix.shape[1],
  )


def check_finite(name: str, values: np.ndarray, rows: np.ndarray) -> None:
  """Refuses NaN and infinity, naming the row of the first."""
  bad = np.flatnonzero(~np.isfinite(values))
  if len(bad):
    raise ValueError(
      f'{name} must be finite, got {values[bad[0]]} in row {rows[bad[0]]}.'
    )
