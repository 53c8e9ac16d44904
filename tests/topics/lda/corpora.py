"""Corpora that were drawn from known topics."""

from typing import NamedTuple

import numpy as np

from emc2.topics.lda import documents as documents_lib


class Drawn(NamedTuple):
  """A corpus and the topics it was drawn from."""

  documents: documents_lib.Documents
  topics: np.ndarray  # (K, V): probabilities of words.


def draw(
  num_documents: int,
  num_words: int,
  num_topics: int,
  *,
  length: int = 100,
  alpha: float = 0.1,
  eta: float = 0.05,
  seed: int = 0,
  num_empty: int = 0,
) -> Drawn:
  """Draws documents of about `length` tokens from the model itself.

  Args:
    num_documents: D.
    num_words: V.
    num_topics: K.
    length: Mean number of tokens of a document, of Poisson's distribution.
    alpha: Prior of a document's topics.
    eta: Prior of a topic's words.
    seed: Of everything.
    num_empty: The first documents that are left without a token.

  Returns:
    The corpus.
  """
  rng = np.random.default_rng(seed)
  topics = rng.dirichlet(np.full(num_words, eta), num_topics)
  shares = rng.dirichlet(np.full(num_topics, alpha), num_documents)
  lengths = np.maximum(1, rng.poisson(length, num_documents))
  lengths[:num_empty] = 0
  counts = rng.multinomial(lengths, _normalize(shares @ topics))
  return Drawn(from_dense(counts), topics)


def from_dense(counts: np.ndarray) -> documents_lib.Documents:
  """Documents of a matrix of counts, (D, V)."""
  rows, columns = np.nonzero(counts)
  lengths = np.bincount(rows, minlength=len(counts))
  return documents_lib.Documents(
    starts=np.concatenate([[0], np.cumsum(lengths)]),
    word_ids=columns.astype(np.int32),
    counts=counts[rows, columns].astype(np.float32),
    num_words=counts.shape[1],
  )


def to_dense(documents: documents_lib.Documents) -> np.ndarray:
  """The matrix of counts, (D, V), float64."""
  dense = np.zeros((documents.num_documents, documents.num_words))
  dense[documents.document_ids, documents.word_ids] = documents.counts
  return dense


def _normalize(rows):
  # Draws want sums of at most 1.
  return rows / (rows.sum(1, keepdims=True) * (1 + 1e-12))
