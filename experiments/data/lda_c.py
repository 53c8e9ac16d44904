"""The format of Blei's lda-c: a document per line, `M id:count id:count ...`.

`M` is the number of different words of the document, word ids begin at 0, and
`0` alone is an empty document.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from emc2.experiments.data import corpus, scanning

_LINES = re.compile(rb'(?:\d{1,18}+(?: ++\d{1,18}+:\d{1,18}+)*+[ \t\r]*+\n)*+')
_EXPECTED = "a document 'M id:count id:count ...'"
_SUFFIXES = ('.gz', '.txt', '.dat', '.ldac', '.lda-c')


def read(
  path: str | pathlib.Path, vocabulary: str | pathlib.Path | None = None
) -> corpus.Corpus:
  """Reads all documents.

  Args:
    path: The file, gzip or not.
    vocabulary: A file with a word per line. None looks beside `NAME.dat` (or
      `.ldac`, `.lda-c`, `.txt`, with `.gz` or not) for `NAME_vocab.txt`,
      `NAME.vocab`, `NAME.tokens`, `vocab.NAME.txt` and `vocab.txt`; without any
      there are as many words as the ids ask for.

  Returns:
    The documents.

  Raises:
    ValueError: If a file is missing or a line broken, or no document has a
      word; it names the file and, if there is one, the line.

  References:
    Blei, Ng, Jordan, "Latent Dirichlet Allocation", 2003, the C implementation,
    https://github.com/blei-lab/lda-c
  """
  path = scanning.existing(path)
  words = _words(path, vocabulary)
  blocks = _scan(path, words, None, True)
  return corpus.Corpus(scanning.join(blocks, path), words)


def scan(
  path: str | pathlib.Path,
  vocabulary: str | pathlib.Path | None = None,
  start: scanning.Position | None = None,
  *,
  shows_progress: bool = False,
) -> Iterator[scanning.Block]:
  """Yields the documents of a file that need not fit in memory.

  Args:
    path: As in `read`.
    vocabulary: As in `read`.
    start: Where to begin, `start` of an earlier block; None for the beginning.
    shows_progress: Whether a long file has a progress bar.

  Yields:
    A megabyte of the file at a time.

  Raises:
    ValueError: As `read` does, once it comes to what is broken.
  """
  path = scanning.existing(path)
  yield from _scan(path, _words(path, vocabulary), start, shows_progress)


def _words(path: pathlib.Path, vocabulary: str | pathlib.Path | None):
  stem = path.name
  for suffix in _SUFFIXES:
    stem = stem.removesuffix(suffix)
  names = (
    f'{stem}_vocab.txt',
    f'{stem}.vocab',
    f'{stem}.tokens',
    f'vocab.{stem}.txt',
    'vocab.txt',
  )
  return scanning.find_words(path, names, vocabulary)


def _scan(path, words, start, shows_progress):
  start = start or scanning.Position(0, 1, 0)
  num_words = None if words is None else len(words)
  parts = scanning.read_lines(
    path, start.offset, start.line, shows_progress=shows_progress
  )
  for lines in parts:
    values = scanning.integers(lines, _LINES, path, _EXPECTED)
    text = np.frombuffer(lines.text, np.uint8)
    colons = np.flatnonzero(text == ord(':'))
    ends = np.flatnonzero(text == ord('\n'))
    upto = np.searchsorted(colons, ends)
    sizes = np.diff(upto, prepend=0)
    heads = 2 * (upto - sizes) + np.arange(sizes.size)
    wrong = np.flatnonzero(values[heads] != sizes)
    if wrong.size:
      first = wrong[0]
      raise ValueError(
        f'{path}:{lines.first + first}: expected {values[heads[first]]} pairs '
        f'id:count, as the line begins, got {sizes[first]}.'
      )
    pairs = np.delete(values, heads).reshape(-1, 2)

    def where(pair, lines=lines, upto=upto):
      return f'{path}:{lines.first + np.searchsorted(upto, pair, "right")}'

    word_ids, counts = scanning.sorted_pairs(
      sizes,
      pairs[:, 0],
      pairs[:, 1],
      num_words=num_words,
      base=0,
      where=where,
    )
    document = start.document + lines.first - start.line
    position = scanning.Position(lines.offset, lines.first, document)
    yield scanning.Block(sizes, word_ids, counts, num_words, position)
