"""The format of svmlight and LIBSVM: a row per line, `LABEL INDEX:VALUE ...`.

Indices rise within a line and count from 1, or from 0 where some index is 0.
`qid:NUMBER` after the label and comments that begin with `#` are passed over,
as are lines that hold nothing else.
"""

import pathlib
import re
from typing import NamedTuple

import numpy as np
import scipy.sparse

from emc2.experiments.data import examples, scanning
from emc2.separable import rows as rows_lib

Examples = examples.Examples

LABELS = ('classes', 'numbers')

MAX_INDEX = np.iinfo(np.int32).max
"""The largest index."""

_NUMBER = rb'[+-]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][+-]?+\d++)?+'
_PAIR = rb'\d{1,15}+:' + _NUMBER
_LINES = re.compile(
  rb'(?:[ \t]*+(?:%b(?:[ \t]++%b)*+)?+[ \t\r]*+\n)*+' % (_NUMBER, _PAIR)
)
_COMMENT = re.compile(rb'#[^\n]*')
_QUERY = re.compile(rb'^([ \t]*[^\s:]+)[ \t]+qid:\d+(?=\s)', re.MULTILINE)
_NOT_FINITE = re.compile(r'[+-]?(?:nan|inf|infinity)', re.IGNORECASE)
_COLON_TO_SPACE = bytes.maketrans(b':', b' ')


class _Part(NamedTuple):
  """What stands in one file; indices as they stand there."""

  path: pathlib.Path
  labels: np.ndarray  # (N,) float64.
  sizes: np.ndarray  # (N,) int64: pairs of each row.
  indices: np.ndarray  # (nnz,) int32.
  values: np.ndarray  # (nnz,) float32.
  lines: np.ndarray  # (N,) int64: where each row stands.


def read(
  *paths: str | pathlib.Path,
  labels: str = 'classes',
  first_index: int | None = None,
  num_features: int | None = None,
) -> tuple[examples.Examples, ...]:
  """Reads one file, or several that share features and classes.

  Checks and parses some 15 MB a second, as scikit-learn does, which cannot
  tell the line of an error.

  Args:
    *paths: Files, such as one to train on and one to test, gzip or not.
    labels: What they are: 'classes', any whole numbers, of which the smallest
      becomes class 0; or 'numbers', which stay as they are.
    first_index: The index of the first feature, 0 or 1; None takes 0 if the
      files hold it, else 1.
    num_features: D; None takes the largest index of all files.

  Returns:
    The examples of each file.

  Raises:
    ValueError: If a file is missing, empty or broken; it names the file and, if
      there is one, the line.

  References:
    Joachims, "SVMlight", 2008, https://www.cs.cornell.edu/people/tj/svm_light;
    Chang, Lin, "LIBSVM", 2011, https://www.csie.ntu.edu.tw/~cjlin/libsvm
  """
  if not paths:
    raise ValueError('paths must name at least one file, got none.')
  if labels not in LABELS:
    raise ValueError(f'labels must be one of {LABELS}, got {labels!r}.')
  if first_index not in (None, 0, 1):
    raise ValueError(f'first_index must be 0, 1 or None, got {first_index}.')
  if num_features is not None and num_features < 1:
    raise ValueError(f'num_features must be at least 1, got {num_features}.')
  parts = [_parse(scanning.existing(path), labels) for path in paths]
  if first_index is None:
    low = min(part.indices.min(initial=1) for part in parts)
    first_index = int(low > 0)
  most = max(int(part.indices.max(initial=0)) for part in parts)
  if num_features is None:
    num_features = max(1, most + 1 - first_index)
  for part in parts:
    _check_indices(part, first_index, num_features + first_index - 1)
  targets = [part.labels.astype(np.float32) for part in parts]
  names = ()
  if labels == 'classes':
    classes = np.unique(np.concatenate([part.labels for part in parts]))
    targets = [
      np.searchsorted(classes, part.labels).astype(np.int32) for part in parts
    ]
    names = tuple(str(int(label)) for label in classes)
  return tuple(
    examples.Examples(_rows(part, first_index, num_features), found, names)
    for part, found in zip(parts, targets, strict=True)
  )


def _rows(part: _Part, first_index: int, num_features: int):
  starts = np.concatenate([[0], np.cumsum(part.sizes)])
  ids = part.indices - np.int32(first_index)
  shape = part.sizes.size, num_features
  return rows_lib.from_csr(
    scipy.sparse.csr_array((part.values, ids, starts), shape)
  )


def is_svmlight(path: str | pathlib.Path) -> bool:
  """Whether the first line that is not blank has this form, or the name does.

  Args:
    path: A file, gzip or not.

  Returns:
    True for `.svm`, `.svmlight` and `.libsvm`, before a `.gz` or not.

  Raises:
    ValueError: If there is no such file.
  """
  path = scanning.existing(path)
  name = path.name.removesuffix('.gz')
  if name.endswith(('.svm', '.svmlight', '.libsvm')):
    return True
  for lines in scanning.read_lines(path):
    text = _stripped(lines.text).lstrip()
    if text:
      return bool(_LINES.fullmatch(text.split(b'\n', 1)[0] + b'\n'))
  return False


def _stripped(text: bytes) -> bytes:
  """Text without comments and queries; lines stay."""
  if b'#' in text:
    text = _COMMENT.sub(b'', text)
  if b'qid:' in text:
    text = _QUERY.sub(rb'\1', text)
  return text


def _parse(path: pathlib.Path, labels: str) -> _Part:
  """Reads one file; all is checked but the range of the indices."""
  blocks = [_Part(path, *_no_rows())]
  for lines in scanning.read_lines(path, shows_progress=True):
    blocks.append(_parse_block(path, lines, labels))
  part = _Part(path, *map(np.concatenate, list(zip(*blocks, strict=True))[1:]))
  if not part.labels.size:
    raise ValueError(
      f"{path}: expected rows 'LABEL INDEX:VALUE ...', got an empty file."
    )
  return part


def _no_rows():
  wide = np.zeros(0, np.int64)
  pairs = np.zeros(0, np.int32), np.zeros(0, np.float32)
  return np.zeros(0), wide, *pairs, wide


def _parse_block(path, lines, labels):
  text = _stripped(lines.text)
  end = _LINES.match(text).end()
  if end < len(text):
    line = lines.first + text.count(b'\n', 0, end)
    raise ValueError(f'{path}:{line}: {_fault(text[end:])}')
  if text.isspace():  # Of which NumPy would make a number.
    return _Part(path, *_no_rows())
  numbers = np.fromstring(text.translate(_COLON_TO_SPACE), np.float64, sep=' ')
  characters = np.frombuffer(text, np.uint8)
  ends = np.flatnonzero(characters == ord('\n'))
  colons = np.flatnonzero(characters == ord(':'))
  sizes = np.diff(np.searchsorted(colons, ends), prepend=0)
  written = np.searchsorted(np.flatnonzero(characters > ord(' ')), ends)
  kept = np.diff(written, prepend=0) > 0
  sizes, where = sizes[kept], lines.first + np.flatnonzero(kept)
  heads = 2 * (np.cumsum(sizes) - sizes) + np.arange(sizes.size)
  targets = numbers[heads]
  pairs = np.delete(numbers, heads).reshape(-1, 2)
  _check_labels(path, where, targets, labels)
  _check_pairs(path, np.repeat(where, sizes), pairs)
  with np.errstate(under='ignore'):
    values = pairs[:, 1].astype(np.float32)
  return _Part(
    path, targets, sizes, pairs[:, 0].astype(np.int32), values, where
  )


def _fault(text: bytes) -> str:
  """What is wrong with the first line of a text."""
  line = text.split(b'\n', 1)[0].decode('utf-8', 'replace')
  label, *fields = line.split()
  number = re.compile(_NUMBER.decode())
  if _NOT_FINITE.fullmatch(label):
    return f'expected a finite number as label, got {_shown(label)}.'
  if ',' in label and all(map(number.fullmatch, label.split(','))):
    return (
      f'expected one label, got several, {_shown(label)}; files of many labels '
      'in a row are not read.'
    )
  if ':' in label:
    return f'expected a label before the pairs, got {_shown(label)}.'
  if not number.fullmatch(label):
    return f'expected a number as label, got {_shown(label)}.'
  for field in fields:
    index, colon, value = field.partition(':')
    if not colon or not value or not index:
      break
    if re.fullmatch(r'[+-]?\d+', index):
      if _NOT_FINITE.fullmatch(value):
        return f'expected a finite value, got {_shown(field)}.'
      if not re.fullmatch(r'\d{1,15}', index):
        return f'expected an index from 0 to {MAX_INDEX}, got {_shown(field)}.'
    if not re.fullmatch(_PAIR.decode(), field):
      break
  else:
    return f'expected LABEL INDEX:VALUE ..., got {_shown(line)}.'
  return f'expected INDEX:VALUE, got {_shown(field)}.'


def _shown(text: str) -> str:
  return repr(text if len(text) <= 60 else text[:57] + '...')


def _check_labels(path, lines, targets, labels):
  wrong = np.flatnonzero(np.abs(targets) > np.finfo(np.float32).max)
  expected = 'a label that float32 holds'
  if labels == 'classes' and not wrong.size:
    wrong = np.flatnonzero((targets % 1 != 0) | (np.abs(targets) >= 2**53))
    expected = 'a whole number as label of a class'
  if wrong.size:
    raise ValueError(
      f'{path}:{lines[wrong[0]]}: expected {expected}, got '
      f'{targets[wrong[0]]:.17g}.'
    )


def _check_pairs(path, lines, pairs):
  indices, values = pairs.T
  wrong = np.flatnonzero(indices > MAX_INDEX)
  if wrong.size:
    raise ValueError(
      f'{path}:{lines[wrong[0]]}: expected an index from 0 to {MAX_INDEX}, got '
      f'{indices[wrong[0]]:.0f}.'
    )
  wrong = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
  if wrong.size:
    i = wrong[0]
    raise ValueError(
      f'{path}:{lines[i]}: expected a value that float32 holds, got '
      f'{values[i]:g} of index {indices[i]:.0f}.'
    )
  wrong = np.flatnonzero(
    (lines[1:] == lines[:-1]) & (indices[1:] <= indices[:-1])
  )
  if wrong.size:
    i = wrong[0]
    raise ValueError(
      f'{path}:{lines[i]}: expected indices that rise, got '
      f'{indices[i + 1]:.0f} after {indices[i]:.0f}.'
    )


def _check_indices(part, first, last):
  wrong = np.flatnonzero((part.indices < first) | (part.indices > last))
  if wrong.size:
    i = wrong[0]
    row = np.searchsorted(np.cumsum(part.sizes), i, 'right')
    raise ValueError(
      f'{part.path}:{part.lines[row]}: expected an index from {first} to '
      f'{last}, got {part.indices[i]}.'
    )
