"""Bags of words for topic models: any format, and what is held out."""

import pathlib
import re
import types

import numpy as np
import scipy.sparse

from emc2.experiments.data import corpus as corpus_lib
from emc2.experiments.data import (
  lda_c,
  scanning,
  uci_bag_of_words,
)
from emc2.experiments.data import (
  vocabulary as vocabulary_lib,
)

Corpus = corpus_lib.Corpus

_TOKENS = 2**22  # Of the documents that are split at a time.


def read(
  name_or_path: str | pathlib.Path,
  vocabulary: str | pathlib.Path | None = None,
) -> corpus_lib.Corpus:
  """Reads a corpus by its name.

  Args:
    name_or_path: 'docstrings' (of installed packages, no download); or a file
      of lda-c or of UCI's bags of words, gzip or not.
    vocabulary: A file with a word per line; None looks beside the file.

  Returns:
    The documents.

  Raises:
    ValueError: If something is missing or broken, in one line that names the
      file, the line, what was expected and what came.
  """
  if str(name_or_path) == 'docstrings':
    if vocabulary is not None:
      raise ValueError(
        f'vocabulary must be None for docstrings, got {vocabulary}.'
      )
    return vocabulary_lib.count_docstrings()
  return file_format(name_or_path).read(name_or_path, vocabulary)


def file_format(path: str | pathlib.Path) -> types.ModuleType:
  """Tells the format of a file by its name and its first line.

  Args:
    path: The file, gzip or not.

  Returns:
    The module that reads it: `uci_bag_of_words` for `docword.*`, and where the
    first line is one positive number, else `lda_c`.

  Raises:
    ValueError: If there is no such file, or nothing in it.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(
      f"{path}: expected 'docstrings' or a file of lda-c or of UCI's bags of "
      'words, got neither.'
    )
  lines = scanning.first_lines(path, 1)
  if not lines:
    raise ValueError(f'{path}: expected documents, got an empty file.')
  if path.name.startswith('docword.'):
    return uci_bag_of_words
  alone = re.fullmatch(rb'\s*0*[1-9]\d*\s*', lines[0])
  return uci_bag_of_words if alone else lda_c


def split_documents(
  corpus: corpus_lib.Corpus, held_out: float = 0.1, *, seed: int = 0
) -> tuple[corpus_lib.Corpus, corpus_lib.Corpus]:
  """Holds out documents at random; each part keeps their order.

  Args:
    corpus: Two or more documents.
    held_out: The part that is held out, in (0, 1).
    seed: At least 0.

  Returns:
    The documents to train on, and the others.

  Raises:
    ValueError: If a part has no document or no token.

  Examples:
    >>> corpus = corpus_lib.make(np.eye(10))
    >>> train, test = split_documents(corpus, 0.2)
    >>> train.num_documents, test.num_documents, test.num_words
    (8, 2, 10)
  """
  if not 0 < held_out < 1:
    raise ValueError(f'held_out must lie in (0, 1), got {held_out}.')
  size = corpus.num_documents
  num_held_out = round(held_out * size)
  if not 0 < num_held_out < size:
    raise ValueError(
      f'held_out must leave a document in each part, got {held_out} of {size} '
      'documents.'
    )
  order = np.random.default_rng(seed).permutation(size)
  parts = np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
  return tuple(_take(corpus, part) for part in parts)


def _take(corpus: corpus_lib.Corpus, rows: np.ndarray) -> corpus_lib.Corpus:
  return corpus_lib.Corpus(
    corpus.counts[rows],
    corpus.words,
    None if corpus.labels is None else corpus.labels[rows],
    corpus.class_names,
  )


def split_tokens(
  counts: scipy.sparse.csr_array, *, seed: int = 0
) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
  """Splits the tokens of each document in two halves at random.

  For document completion: topics of the one half predict the other. All halves
  of a document are equally likely; of an odd number of tokens, one or the other
  half gets one more.

  Args:
    counts: (documents, words) int32, as `Corpus.counts`.
    seed: At least 0.

  Returns:
    Two matrices of the same form, the observed and the evaluated half; together
    they are `counts`. A document of one token is empty in one of them.

  Examples:
    >>> corpus = corpus_lib.make(np.array([[4, 0, 2], [0, 1, 3]]))
    >>> observed, evaluated = split_tokens(corpus.counts)
    >>> observed.sum(axis=1).tolist(), evaluated.sum(axis=1).tolist()
    ([3, 2], [3, 2])
    >>> (observed + evaluated - corpus.counts).nnz
    0
  """
  rng = np.random.default_rng(seed)
  pairs = counts.indptr.astype(np.int64)
  tokens = np.concatenate([[0], np.cumsum(counts.data, dtype=np.int64)])[pairs]
  observed = np.empty_like(counts.data)
  first = 0
  while first < counts.shape[0]:
    # At least one document: the last that begins within as many tokens.
    stop = np.searchsorted(tokens, tokens[first] + _TOKENS, 'right') - 1
    stop = max(int(stop), first + 1)
    part = slice(pairs[first], pairs[stop])
    sizes = np.diff(tokens[first : stop + 1])
    observed[part] = _observed(rng, sizes, counts.data[part])
    first = stop
  return tuple(
    _without_zeros(counts, data) for data in (observed, counts.data - observed)
  )


def _observed(
  rng: np.random.Generator, sizes: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """Draws how many tokens of each pair are observed.

  Args:
    rng: Source of the draw.
    sizes: (documents,) int64: tokens of each.
    counts: (pairs,) int32.

  Returns:
    (pairs,) int64.
  """
  documents = np.repeat(np.arange(sizes.size), sizes)
  pair_of_token = np.repeat(np.arange(counts.size), counts)
  # Tokens in a random order, document by document: the first half is observed.
  # One key for both sorts ten times faster than two.
  keys = (documents << 32) | rng.integers(0, 2**32, documents.size)
  order = np.argsort(keys)
  halves = sizes // 2 + (sizes % 2) * rng.integers(0, 2, sizes.size)
  rank = np.arange(documents.size) - (np.cumsum(sizes) - sizes)[documents]
  chosen = order[rank < halves[documents]]
  return np.bincount(pair_of_token[chosen], minlength=counts.size)


def _without_zeros(counts: scipy.sparse.csr_array, data: np.ndarray):
  """The matrix of the same places with other counts."""
  kept = data > 0
  upto = np.concatenate([[0], np.cumsum(kept)])
  indptr = upto[counts.indptr]
  arrays = (data[kept], counts.indices[kept], indptr)
  return scipy.sparse.csr_array(arrays, counts.shape)
