"""Text files of numbers, block by block, for corpora of any size.

A block is checked by one regular expression and parsed at once; only a wrong
line is looked at by itself.
"""

import contextlib
import gzip
import io
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse
import tqdm

MAX_COUNT = np.iinfo(np.int32).max
"""The largest word id, number of documents, and count of a word."""

_BLOCK = 2**20  # Bytes read at a time; larger ones leave the cache.
_DELAY = 3  # Seconds after which the work shows its progress.
_BROKEN = (EOFError, OSError, zlib.error)
_COLON_TO_SPACE = bytes.maketrans(b':', b' ')


class Position(NamedTuple):
  """Where a document begins in a file; None of these for the beginning."""

  offset: int  # Bytes before it, decompressed.
  line: int  # The number of its line, from 1.
  document: int  # Its own number, from 0.


class Block(NamedTuple):
  """Whole documents, in the order of their file."""

  sizes: np.ndarray  # (documents,) int64: different words of each.
  word_ids: np.ndarray  # (pairs,) int32, rising within a document.
  counts: np.ndarray  # (pairs,) int32, at least 1.
  num_words: int | None  # Of the vocabulary, if that is known.
  start: Position  # Of the first document.


class Lines(NamedTuple):
  """Whole lines of a file."""

  text: bytes
  offset: int  # Bytes before them, decompressed.
  first: int  # The number of the first, from 1.

  def number_at(self, offset: int) -> int:
    """The number of the line that holds a byte of `text`."""
    return self.first + self.text.count(b'\n', 0, offset)


def existing(path: str | pathlib.Path) -> pathlib.Path:
  """Gives the path of a file; raises ValueError where there is none."""
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f'{path}: expected a file, got none.')
  return path


def read_lines(
  path: pathlib.Path,
  offset: int = 0,
  first: int = 1,
  *,
  shows_progress: bool = False,
) -> Iterator[Lines]:
  """Yields a file, gzip or not, in parts of whole lines.

  Args:
    path: An existing file.
    offset: Decompressed bytes to pass over. A gzip file is decompressed up to
      there, a plain one not read.
    first: The number of the line that begins there, for errors.
    shows_progress: Whether a long one has a progress bar.

  Yields:
    The lines, each with its end; the last one gets an end if it has none.

  Raises:
    ValueError: If a gzip file is cut short or damaged.
  """
  with contextlib.ExitStack() as stack:
    raw = stack.enter_context(path.open('rb'))
    file = raw
    if raw.peek(2)[:2] == b'\x1f\x8b':
      file = stack.enter_context(gzip.GzipFile(fileobj=raw))
    bar = stack.enter_context(
      tqdm.tqdm(
        desc=f'Reading {path.name}',
        total=path.stat().st_size,
        unit='B',
        unit_scale=True,
        delay=_DELAY,
        disable=not shows_progress,
      )
    )
    _guarded(path, first, lambda: file.seek(offset))
    rest = b''
    while block := _guarded(path, first, lambda: file.read(_BLOCK)):
      whole, end, begun = (rest + block).rpartition(b'\n')
      rest = begun
      if end:
        lines = Lines(whole + end, offset, first)
        yield lines
        offset += len(lines.text)
        first += lines.text.count(b'\n')
      bar.update(raw.tell() - bar.n)
    if rest:
      yield Lines(rest + b'\n', offset, first)


def _guarded(path: pathlib.Path, line: int, work: Callable):
  try:
    return work()
  except _BROKEN as error:
    raise ValueError(
      f'{path}:{line}: expected a whole file, got one that is cut short or '
      f'damaged here or later ({error}).'
    ) from error


def first_lines(path: pathlib.Path, count: int) -> list[bytes]:
  """The first lines of a file, gzip or not, with their ends; fewer at its end.

  A line of more than 80 bytes is cut there.
  """
  found = []
  for lines in read_lines(path):
    file = io.BytesIO(lines.text)
    while len(found) < count and (line := file.readline(81)):
      found.append(line[:80])
    if len(found) == count:
      break
  return found


def integers(
  lines: Lines, pattern: re.Pattern[bytes], path: pathlib.Path, expected: str
) -> np.ndarray:
  """Parses numbers between spaces, colons and line ends.

  Args:
    lines: What to parse.
    pattern: Of any number of right lines, which hold no numbers that int64
      cannot.
    path: For errors.
    expected: What a right line is, for errors.

  Returns:
    (numbers,) int64.

  Raises:
    ValueError: If a line does not match.
  """
  end = pattern.match(lines.text).end()
  if end < len(lines.text):
    raise ValueError(
      f'{path}:{lines.number_at(end)}: expected {expected}, got '
      f'{shown(lines.text[end:])}.'
    )
  text = lines.text.translate(_COLON_TO_SPACE)
  return np.fromstring(text, np.int64, sep=' ')


def shown(text: bytes) -> str:
  """The first line of a text for an error, cut if it is long."""
  line = text[:60].split(b'\n')[0].rstrip(b'\r')
  return repr(line.decode('utf-8', 'replace'))


def sorted_pairs(
  sizes: np.ndarray,
  word_ids: np.ndarray,
  counts: np.ndarray,
  *,
  num_words: int | None,
  base: int,
  where: Callable[[int], str],
) -> tuple[np.ndarray, np.ndarray]:
  """Checks the pairs of documents and sorts them within each.

  Args:
    sizes: (documents,) int64: pairs of each.
    word_ids: (pairs,) int64, from 0.
    counts: (pairs,) int64.
    num_words: Of the vocabulary, if that is known.
    base: What the file calls word 0, for errors.
    where: Maps the number of a pair to its file and line, for errors.

  Returns:
    The ids and counts, both int32.

  Raises:
    ValueError: If an id or count is out of range, or a word stands twice in a
      document.
  """
  last = (MAX_COUNT if num_words is None else num_words) - 1
  for name, values, low, high, shift in (
    ('a word id', word_ids, 0, last, base),
    ('a count', counts, 1, MAX_COUNT, 0),
  ):
    wrong = np.flatnonzero((values < low) | (values > high))
    if wrong.size:
      raise ValueError(
        f'{where(wrong[0])}: expected {name} from {low + shift} to '
        f'{high + shift}, got {values[wrong[0]] + shift}.'
      )
  # One number for both: below 2**31 words, and documents of one block.
  documents = np.repeat(np.arange(sizes.size), sizes)
  keys = documents * (last + 1) + word_ids
  if (keys[1:] <= keys[:-1]).any():
    order = np.argsort(keys)
    if (np.diff(keys[order]) == 0).any():
      order = np.argsort(keys, kind='stable')  # Slower; tells which is second.
      second = order[1:][np.diff(keys[order]) == 0].min()
      raise ValueError(
        f'{where(second)}: expected each word once in a document, got word '
        f'{word_ids[second] + base} again.'
      )
    word_ids, counts = word_ids[order], counts[order]
  return word_ids.astype(np.int32), counts.astype(np.int32)


def join(blocks: Iterable[Block], path: pathlib.Path) -> scipy.sparse.csr_array:
  """Joins blocks to a matrix; takes its memory one and a half times.

  Args:
    blocks: Of one file, all of them.
    path: For errors.

  Returns:
    (documents, words) int32. The words are those of the vocabulary, or as many
    as there are ids.

  Raises:
    ValueError: If there are no documents or no tokens.
  """
  sizes, word_ids, counts, num_words = [], [], [], None
  for block in blocks:
    sizes.append(block.sizes)
    word_ids.append(block.word_ids)
    counts.append(block.counts)
    num_words = block.num_words
  num_documents = sum(part.size for part in sizes)
  check_tokens(path, num_documents, sum(part.size for part in counts))
  sizes, word_ids = np.concatenate(sizes), np.concatenate(word_ids)
  counts = np.concatenate(counts)  # By now the parts of the ids are free.
  if num_words is None:
    num_words = int(word_ids.max()) + 1
  indptr = np.concatenate([[0], np.cumsum(sizes)])
  shape = (num_documents, num_words)
  joined = scipy.sparse.csr_array((counts, word_ids, indptr), shape)
  joined.has_canonical_format = True  # As `sorted_pairs` left it.
  return joined


def check_tokens(
  path: pathlib.Path, num_documents: int, num_pairs: int
) -> None:
  """Raises ValueError where a file holds no documents, or only empty ones."""
  if not num_pairs:
    raise ValueError(
      f'{path}: expected at least one word in at least one document, got '
      f'{num_documents} documents, all empty.'
    )


def read_words(path: str | pathlib.Path) -> tuple[str, ...]:
  """Reads a vocabulary: one word per line, UTF-8, gzip or not.

  Args:
    path: The file.

  Returns:
    The words.

  Raises:
    ValueError: If the file is missing or empty, not UTF-8, or has a line
      without a word; it names the file and the line.
  """
  path = existing(path)
  words = []
  for lines in read_lines(path):
    for number, line in enumerate(lines.text.splitlines(), lines.first):
      try:
        word = line.decode('utf-8').strip()
      except UnicodeDecodeError as error:
        raise ValueError(
          f'{path}:{number}: expected UTF-8, got {shown(line)}.'
        ) from error
      if not word:
        raise ValueError(f'{path}:{number}: expected a word, got none.')
      words.append(word)
  if not words:
    raise ValueError(f'{path}: expected one word per line, got an empty file.')
  return tuple(words)


def find_words(
  path: pathlib.Path,
  names: Iterable[str],
  vocabulary: str | pathlib.Path | None,
) -> tuple[str, ...] | None:
  """Reads the vocabulary given, or the first of `names` beside a file.

  Args:
    path: The file with the counts.
    names: Of files that may stand beside it.
    vocabulary: A file, or None to look for one.

  Returns:
    The words, or None if there are none.

  Raises:
    ValueError: As `read_words` does.
  """
  if vocabulary is not None:
    return read_words(vocabulary)
  for name in dict.fromkeys(names):
    found = path.parent / name
    if found != path and found.is_file():
      return read_words(found)
  return None
