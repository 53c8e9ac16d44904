"""What every reader of documents gives: how often each holds each word."""

import dataclasses

import numpy as np
import scipy.sparse


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents as bags of words; `make` takes counts in any other form.

  Attributes:
    counts: (documents, words) int32: how often each word stands in each
      document. At least one token in all; a document may be empty. Within a row
      indices rise, and no count is zero.
    words: The vocabulary, or None where it is not known.
    labels: (documents,) int32 in [0, number of classes), or None.
    class_names: The name of each label; empty without labels.

  Raises:
    ValueError: If the counts are of another form or empty, or the rest does not
      fit them.
  """

  counts: scipy.sparse.csr_array
  words: tuple[str, ...] | None = None
  labels: np.ndarray | None = None
  class_names: tuple[str, ...] = ()

  def __post_init__(self):
    counts = self.counts
    if counts.dtype != np.int32 or not counts.has_canonical_format:
      raise ValueError(
        'counts must be int32, with indices that rise within a row, got '
        f'{counts.dtype} of which some may not; corpus.make takes any counts.'
      )
    if not counts.nnz:
      raise ValueError(
        f'counts must have at least one token, got {counts.shape[0]} documents '
        'and none.'
      )
    if counts.data.min() < 1:
      raise ValueError(
        f'counts must be at least 1 where stored, got {counts.data.min()}.'
      )
    for name, axis in (('labels', 0), ('words', 1)):
      value = getattr(self, name)
      if value is not None and len(value) != counts.shape[axis]:
        raise ValueError(
          f'{name} must be as many as counts has along axis {axis}, '
          f'{counts.shape[axis]}, got {len(value)}.'
        )

  @property
  def num_documents(self) -> int:
    """How many documents there are, empty ones included."""
    return self.counts.shape[0]

  @property
  def num_words(self) -> int:
    """Words of the vocabulary."""
    return self.counts.shape[1]

  @property
  def num_pairs(self) -> int:
    """Pairs of a document and a word that stands in it."""
    return self.counts.nnz

  @property
  def num_tokens(self) -> int:
    """The sum of all counts."""
    return int(self.counts.data.sum(dtype=np.int64))

  @property
  def max_words(self) -> int:
    """Different words of the document that has most."""
    return int(np.diff(self.counts.indptr).max())


def make(
  counts: scipy.sparse.sparray | scipy.sparse.spmatrix | np.ndarray,
  words: tuple[str, ...] | None = None,
  labels: np.ndarray | None = None,
  class_names: tuple[str, ...] = (),
) -> Corpus:
  """Makes a corpus of counts in any form, sparse or dense.

  Args:
    counts: (documents, words), whole numbers from 0 to 2**31 - 1 of any dtype;
      entries that stand for the same place are added.
    words: As in `Corpus`.
    labels: As in `Corpus`.
    class_names: As in `Corpus`.

  Returns:
    The corpus.

  Raises:
    ValueError: If a count is no such number, all are zero, or the rest does not
      fit them.

  Examples:
    >>> found = make(np.array([[2, 0, 1], [0, 0, 0]]), words=('a', 'b', 'c'))
    >>> found.num_documents, found.num_words, found.num_pairs, found.num_tokens
    (2, 3, 2, 3)
  """
  rows = scipy.sparse.csr_array(counts, copy=True)
  rows.sum_duplicates()
  rows.eliminate_zeros()
  limit = np.iinfo(np.int32).max
  wrong = ~((rows.data > 0) & (rows.data <= limit) & (rows.data % 1 == 0))
  if wrong.any():
    raise ValueError(
      f'counts must be whole numbers in [0, {limit}], got '
      f'{rows.data[wrong][0]}.'
    )
  return Corpus(rows.astype(np.int32), words, labels, class_names)
