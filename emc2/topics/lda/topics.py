"""What topics say: their first words, and whether these belong together."""

import numpy as np

from emc2.topics import checks
from emc2.topics.lda import documents as documents_lib

_DOCUMENTS = 1 << 16
"""Documents whose words are held as bits at once."""


def top_words(word_sums: np.typing.ArrayLike, num: int = 10) -> np.ndarray:
  r"""The words of which each topic has most.

  Args:
    word_sums: (V, K), tokens by word and topic, or any scores.
    num: From 1 to V.

  Returns:
    (K, num), int64: ids of words, most first; of equal ones the lower id.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> top_words(np.array([[1.0, 0.0], [5.0, 2.0], [1.0, 3.0]]), 2)
    array([[1, 0],
           [2, 1]])
  """
  word_sums = np.asarray(word_sums)
  checks.check_word_sums(word_sums, len(word_sums) if word_sums.ndim else 0)
  num_words = len(word_sums)
  if not 1 <= num <= num_words:
    raise ValueError(
      f'num must lie in [1, {num_words}], the number of words, got {num}.'
    )
  if np.isnan(word_sums).any():
    raise ValueError('word_sums must not be NaN.')
  found = np.empty((word_sums.shape[1], num), np.int64)
  for topic, sums in enumerate(word_sums.T):
    sums = np.ascontiguousarray(sums)
    least = np.partition(sums, num_words - num)[num_words - num]
    # More than `num` where several words equal the last of them.
    ids = np.flatnonzero(sums >= least)
    found[topic] = ids[np.argsort(-sums[ids], kind='stable')[:num]]
  return found


def coherence(
  top_ids: np.typing.ArrayLike, documents: documents_lib.Documents
) -> np.ndarray:
  r"""How much more often than by chance a topic's words share a document.

  With the share :math:`p_v` of documents that hold word v and :math:`p_{vw}`
  that of those that hold both, the mean over the pairs of a topic's words of

  .. math::
    \frac{\log p_{vw} - \log p_v p_w}{-\log p_{vw}} \in [-1, 1],

  normalised pointwise mutual information: 1 for words that come together only,
  0 for independent ones. It is -1 where no document holds both, a word that
  never occurs included, and 1 where all do: the limits.

  Args:
    top_ids: (K, num), ids of different words, at least 2; see
      :func:`top_words`.
    documents: From which documents are counted; others than those that the
      topics were learned from may serve.

  Returns:
    (K,), float64.

  Raises:
    ValueError: If an argument breaks its rule.

  .. note::
    Whole documents are counted, and nothing is added to the shares. Röder et
    al. and gensim count sliding windows of ten words for their `c_npmi`, which
    bags of words do not tell, and add 1e-12 to :math:`p_{vw}`: pairs that never
    meet are there a little above -1, and those that always do at -1.

  References:
    Röder, Both, Hinneburg, `Exploring the Space of Topic Coherence Measures
    <https://doi.org/10.1145/2684822.2685324>`_, 2015.
  """
  top_ids = np.asarray(top_ids)
  _check_ids(top_ids, documents)
  words, places = np.unique(top_ids, return_inverse=True)
  places = places.reshape(top_ids.shape)
  first, second = np.triu_indices(top_ids.shape[1], 1)
  single = np.zeros(len(words), np.int64)
  both = np.zeros((len(top_ids), len(first)), np.int64)
  for bits in _document_bits(words, documents):
    single += np.sum(np.bitwise_count(bits), 1, dtype=np.int64)
    for topic, place in enumerate(places):
      own = bits[place]
      shared = np.bitwise_count(own[first] & own[second])
      both[topic] += np.sum(shared, 1, dtype=np.int64)
  found = _npmi(both, single[places], first, second, documents.num_documents)
  return np.mean(found, 1)


def _npmi(both, single, first, second, num_documents):
  inside = (both > 0) & (both < num_documents)
  # Where the value is a limit, logarithms of harmless numbers.
  share = np.where(inside, both / num_documents, 0.5)
  apart = single[:, first] * single[:, second] / num_documents**2
  ratio = np.log(share / np.where(inside, apart, 0.5))
  return np.where(inside, ratio / -np.log(share), np.sign(both - 0.5))


def _document_bits(words, documents):
  """Which documents hold each word, (words, documents / 64), a part at once."""
  numbers = np.full(documents.num_words, -1)
  numbers[words] = np.arange(len(words))
  for start in range(0, documents.num_documents, _DOCUMENTS):
    stop = min(start + _DOCUMENTS, documents.num_documents)
    pairs = slice(documents.starts[start], documents.starts[stop])
    rows = numbers[documents.word_ids[pairs]]
    columns = np.repeat(
      np.arange(stop - start), np.diff(documents.starts[start : stop + 1])
    )
    rows, columns = rows[rows >= 0], columns[rows >= 0]
    bits = np.zeros((len(words), -(-(stop - start) // 64)), np.uint64)
    ones = np.uint64(1) << (columns % 64).astype(np.uint64)
    np.bitwise_or.at(
      bits.reshape(-1), rows * bits.shape[1] + columns // 64, ones
    )
    yield bits


def _check_ids(top_ids, documents):
  if top_ids.ndim != 2 or top_ids.shape[1] < 2:
    raise ValueError(
      f'top_ids must be (topics, at least 2 words), got {top_ids.shape}.'
    )
  if top_ids.dtype.kind not in 'iu':
    raise ValueError(f'top_ids must be integers, got {top_ids.dtype}.')
  if top_ids.size and not (
    0 <= top_ids.min() <= top_ids.max() < documents.num_words
  ):
    raise ValueError(
      f'top_ids must lie in [0, {documents.num_words}), got '
      f'{top_ids.min()} to {top_ids.max()}.'
    )
  ordered = np.sort(top_ids, 1)
  if np.any(ordered[:, 1:] == ordered[:, :-1]):
    raise ValueError('top_ids must not name a word twice in a topic.')
  if not documents.num_documents:
    raise ValueError('documents must be at least one, got none.')
