"""The bag-of-words format of the UCI repository: `docword.NAME.txt`.

Three lines with the numbers of documents, words and pairs, then a line
`document word count` for each pair, both numbered from 1. All pairs of a
document stand together, and documents in their order; one that is left out is
empty.
"""

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from emc2.experiments.data import corpus, scanning

_LINES = re.compile(rb'(?:\d{1,18}+ ++\d{1,18}+ ++\d{1,18}+[ \t\r]*+\n)*+')
_EXPECTED = "a pair 'document word count'"
_HEADER = {  # The first three lines, and what each may be at most.
  'documents': scanning.MAX_COUNT,
  'words': scanning.MAX_COUNT,
  'pairs': 10**18 - 1,
}


def read(
  path: str | pathlib.Path, vocabulary: str | pathlib.Path | None = None
) -> corpus.Corpus:
  """Reads all documents.

  Args:
    path: The file, gzip or not.
    vocabulary: A file with a word per line. None looks beside
      `docword.NAME.txt` for `vocab.NAME.txt` and `vocab.txt`.

  Returns:
    The documents.

  Raises:
    ValueError: If a file is missing or a line broken, the first three lines do
      not tell what follows, or no document has a word; it names the file and,
      if there is one, the line.

  References:
    Newman, "Bag of Words", 2008, UCI Machine Learning Repository,
    https://doi.org/10.24432/C5ZG6P
  """
  path = scanning.existing(path)
  words, header, begin = _open(path, vocabulary)
  blocks = _scan(path, header, begin, begin, True)
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
  _, header, begin = _open(path, vocabulary)
  yield from _scan(path, header, begin, start or begin, shows_progress)


def _open(path: pathlib.Path, vocabulary: str | pathlib.Path | None):
  """Gives the words, the three numbers, and where the pairs begin."""
  lines = scanning.first_lines(path, len(_HEADER))
  header = []
  for i, (name, limit) in enumerate(_HEADER.items()):
    line = lines[i] if i < len(lines) else b''
    number = int(line) if re.fullmatch(rb'\s*\d{1,18}\s*\n', line) else 0
    if not 1 <= number <= limit:
      raise ValueError(
        f'{path}:{i + 1}: expected the number of {name}, from 1 to {limit}, '
        f'got {scanning.shown(line)}.'
      )
    header.append(number)
  stem = path.name.removesuffix('.gz').removesuffix('.txt')
  names = (f'vocab.{stem.removeprefix("docword.")}.txt', 'vocab.txt')
  words = scanning.find_words(path, names, vocabulary)
  if words is not None and len(words) != header[1]:
    raise ValueError(
      f'{path}:2: expected the number of words of its vocabulary, '
      f'{len(words)}, got {header[1]}.'
    )
  begin = scanning.Position(sum(map(len, lines)), len(_HEADER) + 1, 0)
  return words, header, begin


def _scan(path, header, begin, start, shows_progress):
  num_documents, num_words, num_pairs = header
  parts = scanning.read_lines(
    path, start.offset, start.line, shows_progress=shows_progress
  )
  held = np.zeros((0, 3), np.int64)  # Of the document that may go on.
  num_lines = start.line - begin.line

  def block(pairs, stop):
    """The documents from `start` up to `stop`."""
    sizes = np.bincount(
      pairs[:, 0] - start.document, minlength=stop - start.document
    )
    word_ids, counts = scanning.sorted_pairs(
      sizes,
      pairs[:, 1],
      pairs[:, 2],
      num_words=num_words,
      base=1,
      where=lambda pair: f'{path}:{start.line + pair}',
    )
    return scanning.Block(sizes, word_ids, counts, num_words, start)

  for lines in parts:
    read = scanning.integers(lines, _LINES, path, _EXPECTED).reshape(-1, 3)
    read[:, :2] -= 1
    num_lines += len(read)
    if num_lines > num_pairs:
      raise ValueError(
        f'{path}:{begin.line + num_pairs}: expected no more than {num_pairs} '
        f'pairs, as line 3 says, got another.'
      )
    _check_documents(path, lines.first, read[:, 0], start, held, num_documents)
    pairs = np.concatenate([held, read])
    last = int(pairs[-1, 0])
    cut = int(np.searchsorted(pairs[:, 0], last))
    held = pairs[cut:]
    if last > start.document:
      yield block(pairs[:cut], last)
      # Where the document that is held begins: here, or it began earlier.
      line = start.line + cut
      ends = np.flatnonzero(np.frombuffer(lines.text, np.uint8) == ord('\n'))
      before = line - lines.first
      offset = lines.offset + (int(ends[before - 1]) + 1 if before else 0)
      start = scanning.Position(offset, line, last)
  if num_lines != num_pairs:
    raise ValueError(
      f'{path}:{begin.line + num_lines}: expected {num_pairs} pairs, as line 3 '
      f'says, got the end of the file after {num_lines}.'
    )
  if num_documents > start.document:
    yield block(held, num_documents)


def _check_documents(path, first, documents, start, held, num_documents):
  """Checks the range and the order of the documents of some lines."""
  before = held[-1, 0] if len(held) else start.document
  previous = np.concatenate([[before], documents[:-1]])
  wrong = np.flatnonzero((documents < previous) | (documents >= num_documents))
  if wrong.size:
    i = wrong[0]
    raise ValueError(
      f'{path}:{first + i}: expected a document from {previous[i] + 1} (they '
      f'stand in order) to {num_documents}, got {documents[i] + 1}.'
    )
