"""Ratings as text: a line `user item rating`, and a time perhaps, for each.

Tabs, `::`, semicolons, commas or spaces stand between the fields, as the first
line tells; if its rating is no number it is a header. Users and items may be
any words.
"""

import csv
import dataclasses
import pathlib
import re

import numpy as np

from emc2.experiments.data import examples, scanning
from emc2.separable import rows as rows_lib

DELIMITERS = ('\t', '::', ';', ',', None)
"""The first of these in the first line is that of the file; None: spaces."""

_ID = rb'(?:0|[1-9]\d{0,14}+)'  # As a number stands for it and for no other.
_NUMBER = rb'[+-]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][+-]?+\d++)?+'


@dataclasses.dataclass(frozen=True)
class Ratings:
  """Who gave what how many stars.

  Attributes:
    users: (N,) int32 in [0, number of users).
    items: (N,) int32 in [0, number of items).
    values: (N,) float32, finite.
    user_names: The name of each user, sorted, numbers by their value.
    item_names: The name of each item, likewise.
  """

  users: np.ndarray
  items: np.ndarray
  values: np.ndarray
  user_names: tuple[str, ...]
  item_names: tuple[str, ...]

  @property
  def num_ratings(self) -> int:
    """N."""
    return self.values.size

  @property
  def num_users(self) -> int:
    """Those of other files read with this one included."""
    return len(self.user_names)

  @property
  def num_items(self) -> int:
    """Those of other files read with this one included."""
    return len(self.item_names)


def read(*paths: str | pathlib.Path) -> tuple[Ratings, ...]:
  """Reads one file, or several whose users and items are the same.

  Args:
    *paths: Files, such as one to train on and one to test, gzip or not.

  Returns:
    The ratings of each file, in its order.

  Raises:
    ValueError: If a file is missing, empty or broken; it names the file and, if
      there is one, the line.
  """
  if not paths:
    raise ValueError('paths must name at least one file, got none.')
  parts = [_parse(scanning.existing(path)) for path in paths]
  cuts = np.cumsum([len(values) for _, _, values in parts])[:-1]
  users, user_names = _number([names for part in parts for names in part[0]])
  items, item_names = _number([names for part in parts for names in part[1]])
  return tuple(
    Ratings(users, items, values.astype(np.float32), user_names, item_names)
    for users, items, (_, _, values) in zip(
      np.split(users, cuts), np.split(items, cuts), parts, strict=True
    )
  )


def one_hot(ratings: Ratings) -> examples.Examples:
  """Two features of value 1 for each rating: its user, then its item.

  Args:
    ratings: N of them.

  Returns:
    N rows of as many features as users and items together; the labels are the
    values.

  Examples:
    >>> one = np.ones(1, np.int32)
    >>> ratings = Ratings(one, 0 * one, np.float32([4.5]), ('a', 'b'), ('c',))
    >>> found = one_hot(ratings)
    >>> found.rows.to_dense().tolist(), found.labels.tolist()
    ([[0.0, 1.0, 1.0]], [4.5])
  """
  size, num_users = ratings.num_ratings, ratings.num_users
  ids = np.stack([ratings.users, ratings.items + np.int32(num_users)], axis=1)
  rows = rows_lib.SparseRows(
    starts=2 * np.arange(size + 1, dtype=np.int64),
    ids=ids.astype(np.int32).ravel(),
    values=np.ones(2 * size, np.float32),
    num_features=num_users + ratings.num_items,
  )
  return examples.Examples(rows, ratings.values)


def split(
  ratings: Ratings, held_out: float = 0.1, *, seed: int = 0
) -> tuple[Ratings, Ratings]:
  """Holds out ratings at random; each part keeps their order.

  Args:
    ratings: Two or more.
    held_out: The part that is held out, in (0, 1).
    seed: At least 0.

  Returns:
    The ratings to train on, and the others; both know all users and items.

  Raises:
    ValueError: If a part has no rating.

  Examples:
    >>> ten = np.arange(10, dtype=np.int32)
    >>> names = tuple('abcdefghij')
    >>> train, test = split(Ratings(ten, ten, ten / 2, names, names))
    >>> train.num_ratings, test.num_ratings, test.num_users
    (9, 1, 10)
  """
  numbers = examples.split_numbers(ratings.num_ratings, held_out, seed=seed)
  return tuple(
    dataclasses.replace(
      ratings,
      users=ratings.users[part],
      items=ratings.items[part],
      values=ratings.values[part],
    )
    for part in numbers
  )


def _parse(path: pathlib.Path):
  """Gives users and items, in parts that are numbers or words, and values."""
  delimiter, fields = None, None
  users, items, values = [], [], [np.zeros(0)]
  for lines in scanning.read_lines(path, shows_progress=True):
    text, first = lines.text, lines.first
    while fields is None and text:  # Up to the first line that is not blank.
      line, _, rest = text.partition(b'\n')
      if not line.strip():
        text, first = rest, first + 1
        continue
      delimiter, fields, is_header = _form(path, first, line)
      if is_header:
        text, first = rest, first + 1
    part = _parse_numbers(text, delimiter, fields)
    if part is None:
      part = _parse_lines(path, text, first, delimiter, fields)
    for column, found in zip((users, items, values), part, strict=True):
      column.append(found)
    _check_values(path, first, text, part[2])
  values = np.concatenate(values)
  if not values.size:
    raise ValueError(
      f"{path}: expected lines 'user item rating', got an empty file."
    )
  return users, items, values


def _form(path, number, line):
  """Tells by the first line what is between fields, how many, and if a header.

  Three or four are right; a fourth is the time, and passed over.
  """
  shown = _decoded(path, number, line)
  delimiter = next(d for d in DELIMITERS if d is None or d in shown)
  fields = _fields(shown, delimiter)
  if len(fields) not in (3, 4):
    raise ValueError(
      f"{path}:{number}: expected 'user item rating' or 'user item rating "
      f"time', got {scanning.shown(line)}."
    )
  return delimiter, len(fields), _float(fields[2]) is None


def _parse_numbers(text, delimiter, fields):
  """Parses lines at once, if all of them hold nothing but numbers."""
  if not text:
    return np.zeros(0), np.zeros(0), np.zeros(0)
  between = rb'[ \t]++' if delimiter is None else re.escape(delimiter.encode())
  columns = [_ID, _ID, *[_NUMBER] * (fields - 2)]
  line = between.join(columns) + rb'[ \t\r]*+\n'
  if not re.fullmatch(rb'(?:[ \t]*+' + line + rb')*+', text):
    return None
  if delimiter is not None:
    text = text.replace(delimiter.encode(), b' ')
  numbers = np.fromstring(text, np.float64, sep=' ')
  return tuple(numbers.reshape(-1, fields)[:, :3].T)


def _parse_lines(path, text, first, delimiter, fields):
  """Parses lines one by one."""
  users, items, values = [], [], []
  for number, line in enumerate(text.split(b'\n')[:-1], first):
    if not line.strip():
      values.append(np.nan)  # Keeps the count of lines; taken out below.
      users.append('')
      items.append('')
      continue
    found = _fields(_decoded(path, number, line), delimiter)
    if len(found) != fields:
      raise ValueError(
        f'{path}:{number}: expected {fields} fields, as the first line has, '
        f'got {len(found)} in {scanning.shown(line)}.'
      )
    for name, value in zip(('user', 'item'), found[:2], strict=True):
      if not value:
        raise ValueError(
          f'{path}:{number}: expected a name of the {name}, got '
          f'{scanning.shown(line)}.'
        )
    value = _float(found[2])
    if value is None or not np.isfinite(value):
      raise ValueError(
        f'{path}:{number}: expected a finite number as rating, got '
        f'{found[2]!r}.'
      )
    users.append(found[0])
    items.append(found[1])
    values.append(value)
  values = np.array(values)
  kept = ~np.isnan(values)
  return np.array(users)[kept], np.array(items)[kept], values[kept]


def _check_values(path, first, text, values):
  """Refuses what float32 does not hold."""
  wrong = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
  if wrong.size:
    written = [i for i, line in enumerate(text.split(b'\n')) if line.strip()]
    raise ValueError(
      f'{path}:{first + written[wrong[0]]}: expected a rating that float32 '
      f'holds, got {values[wrong[0]]:g}.'
    )


def _decoded(path, number, line):
  try:
    return line.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path}:{number}: expected UTF-8, got {scanning.shown(line)}.'
    ) from error


def _fields(line: str, delimiter: str | None) -> list[str]:
  if '"' in line and delimiter is not None and len(delimiter) == 1:
    (found,) = csv.reader([line.strip('\r')], delimiter=delimiter)
  else:
    found = line.split(delimiter)
  return [field.strip() for field in found]


def _float(text: str) -> float | None:
  try:
    return float(text)
  except ValueError:
    return None


def _number(parts: list[np.ndarray]) -> tuple[np.ndarray, tuple[str, ...]]:
  """Numbers names, given as float64 or as words, in their order."""
  if any(part.dtype.kind == 'U' for part in parts):
    parts = [
      part if part.dtype.kind == 'U' else part.astype(np.int64).astype(str)
      for part in parts
    ]
  names, numbers = np.unique(np.concatenate(parts), return_inverse=True)
  if names.dtype.kind != 'U':
    names = names.astype(np.int64).astype(str)
  elif all(re.fullmatch(_ID.decode(), name) for name in names):
    order = np.argsort(names.astype(np.int64))
    names, numbers = names[order], np.argsort(order)[numbers]
  return numbers.astype(np.int32), tuple(names.tolist())
