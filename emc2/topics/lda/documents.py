"""Documents as bags of words, on the host."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from emc2 import csr


class Documents(NamedTuple):
  """The counts of D documents over V words, row after row.

  What a `scipy.sparse.csr_array` holds, so `from_csr` takes one.
  """

  starts: np.ndarray  # (D + 1,), int64: where the pairs of a document start.
  word_ids: np.ndarray  # (num_pairs,), int32: rising within a document.
  counts: np.ndarray  # (num_pairs,), float32: above 0.
  num_words: int  # V.

  @property
  def num_documents(self) -> int:
    """D."""
    return len(self.starts) - 1

  @property
  def num_tokens(self) -> float:
    """The sum of all counts."""
    return float(np.sum(self.counts, dtype=np.float64))

  @property
  def document_ids(self) -> np.ndarray:
    """(num_pairs,), int32: the document of each pair."""
    ids = np.arange(self.num_documents, dtype=np.int32)
    return np.repeat(ids, np.diff(self.starts))


class Batch(NamedTuple):
  """Documents of one length after padding, for a device."""

  word_ids: Any  # (batch, width), int32; 0 in the padding.
  counts: Any  # (batch, width), float32; 0 in the padding.


def from_csr(matrix: Any, *, allow_no_tokens: bool = False) -> Documents:
  """Takes the counts of a sparse matrix in compressed rows.

  Args:
    matrix: Has `indptr`, `indices`, `data` and `shape` (D, V), as a
      `scipy.sparse.csr_array` does. A document may be empty.
    allow_no_tokens: Whether all may be, as unseen documents may, and even be
      none.

  Returns:
    The documents, without the zeros of the matrix and with what it lists twice
    added up.

  Raises:
    ValueError: If a count is negative or not finite, an index lies outside of
      its range, or there is no token at all and `allow_no_tokens` is False.
  """
  rows, word_ids, counts = csr.check(matrix, 'word ids')
  if not np.all(np.isfinite(counts)):
    raise ValueError('matrix must have finite counts, got NaN or infinity.')
  if np.any(counts < 0):
    raise ValueError(f'matrix must have counts >= 0, got {counts.min()}.')
  if not allow_no_tokens and not np.any(counts):
    raise ValueError(
      f'matrix must have at least one token, got none in {matrix.shape[0]} '
      'documents.'
    )
  merged = csr.merge(rows, word_ids, counts, matrix.shape)
  return Documents(*merged, num_words=int(matrix.shape[1]))


def pad(documents: Documents, rows: np.ndarray, width: int) -> Batch:
  """Some documents as rows of equal width.

  Args:
    documents: The corpus.
    rows: (batch,) ids of documents; -1 makes an empty one.
    width: At least the number of words of the longest of them.

  Returns:
    The batch, of NumPy arrays.

  Raises:
    ValueError: If a document does not fit.
  """
  rows = np.asarray(rows)
  lengths = np.diff(documents.starts)[rows] * (rows >= 0)
  if len(rows) and lengths.max() > width:
    raise ValueError(
      f'width must be at least {lengths.max()}, the number of words of the '
      f'longest document, got {width}.'
    )
  columns = np.arange(width)
  inside = columns < lengths[:, None]
  place = (documents.starts[rows][:, None] + columns)[inside]
  batch = Batch(
    np.zeros(inside.shape, np.int32), np.zeros(inside.shape, np.float32)
  )
  batch.word_ids[inside] = documents.word_ids[place]
  batch.counts[inside] = documents.counts[place]
  return batch


def batches(
  documents: Documents,
  *,
  size: int = 256,
  min_width: int = 16,
  max_places: int | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
  """All documents in batches of few shapes: widths are powers of two.

  Args:
    documents: The corpus.
    size: Documents of a batch at most. The last batch of a width is filled up,
      and all documents of a width that are fewer to the next power of two.
    min_width: The least width.
    max_places: Documents times width at most, unless one document has more:
      batches of long documents are smaller. None for no limit.

  Yields:
    The ids of the documents, -1 where filled up, and the batch.
  """
  lengths = np.diff(documents.starts)
  widths = np.maximum(min_width, 1 << _log2_up(lengths))
  for width in np.unique(widths):
    ids = np.flatnonzero(widths == width)
    most = min(size, 1 << int(_log2_up(len(ids))))
    if max_places is not None:
      most = min(most, max(1, max_places // int(width)))
    ids = np.pad(ids, (0, -len(ids) % most), constant_values=-1)
    for rows in ids.reshape(-1, most):
      yield rows, pad(documents, rows, int(width))


def _log2_up(lengths):
  return np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
