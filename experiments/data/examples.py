"""What every reader of labelled rows gives."""

import dataclasses
import pathlib

import numpy as np
import scipy.sparse

from emc2.separable import rows as rows_lib


@dataclasses.dataclass(frozen=True)
class Examples:
  """Sparse rows and what is to be foretold of each.

  Attributes:
    rows: N rows of features.
    labels: (N,), int32 in [0, number of classes), or float32 numbers.
    class_names: The name of each class; empty where labels are numbers.

  Raises:
    ValueError: If there are not as many labels as rows, or a class has no name.
  """

  rows: rows_lib.SparseRows
  labels: np.ndarray
  class_names: tuple[str, ...] = ()

  def __post_init__(self):
    if self.labels.shape != (self.rows.num_rows,):
      raise ValueError(
        f'labels must be one for each of the {self.rows.num_rows} rows, got '
        f'shape {self.labels.shape}.'
      )
    if self.class_names and self.labels.size:
      low, high = self.labels.min(), self.labels.max()
      if low < 0 or high >= len(self.class_names):
        raise ValueError(
          f'labels must lie in [0, {len(self.class_names)}), the number of '
          f'class_names, got {low if low < 0 else high}.'
        )

  @property
  def num_rows(self) -> int:
    """N."""
    return self.labels.size

  @property
  def num_classes(self) -> int:
    """K; 0 where labels are numbers."""
    return len(self.class_names)


def to_csr(rows: rows_lib.SparseRows) -> scipy.sparse.csr_array:
  """The same rows as a matrix of SciPy, (N, D) float32."""
  return scipy.sparse.csr_array(
    (rows.values, rows.ids, rows.starts), rows.shape
  )


def take(examples: Examples, numbers: np.ndarray) -> Examples:
  """The examples of some rows, in the order of their numbers, (n,)."""
  return Examples(
    examples.rows.take(numbers), examples.labels[numbers], examples.class_names
  )


def with_constant(examples: Examples) -> Examples:
  """The examples with a last feature that is 1 in all rows.

  Examples:
    >>> rows = rows_lib.from_dense(np.array([[0, 2.0], [3, 0]]))
    >>> with_constant(Examples(rows, np.arange(2))).rows.to_dense().tolist()
    [[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]
  """
  rows = examples.rows
  ends = rows.starts[1:]
  shifted = rows_lib.SparseRows(
    starts=rows.starts + np.arange(rows.num_rows + 1),
    ids=np.insert(rows.ids, ends, rows.num_features),
    values=np.insert(rows.values, ends, 1),
    num_features=rows.num_features + 1,
  )
  return dataclasses.replace(examples, rows=shifted)


def split(
  examples: Examples, held_out: float = 0.2, *, seed: int = 0
) -> tuple[Examples, Examples]:
  """Holds out rows at random; each part keeps their order.

  Args:
    examples: Two or more rows.
    held_out: The part that is held out, in (0, 1).
    seed: At least 0.

  Returns:
    The examples to train on, and the others.

  Raises:
    ValueError: If a part has no row.

  Examples:
    >>> rows = rows_lib.from_dense(np.eye(10))
    >>> train, test = split(Examples(rows, np.arange(10)), 0.3)
    >>> train.num_rows, test.num_rows, test.rows.num_features
    (7, 3, 10)
  """
  parts = split_numbers(examples.num_rows, held_out, seed=seed)
  return tuple(take(examples, part) for part in parts)


def split_numbers(
  size: int, held_out: float, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """The numbers below `size` in two parts, drawn at random, each sorted.

  Args:
    size: At least 2.
    held_out: The share of the second part, in (0, 1).
    seed: At least 0.

  Returns:
    Two arrays of int64.

  Raises:
    ValueError: If a part is empty.
  """
  if not 0 < held_out < 1:
    raise ValueError(f'held_out must lie in (0, 1), got {held_out}.')
  count = round(held_out * size)
  if not 0 < count < size:
    raise ValueError(
      f'held_out must leave a row in each part, got {held_out} of {size} rows.'
    )
  order = np.random.default_rng(seed).permutation(size)
  return np.sort(order[count:]), np.sort(order[:count])


def paths_of(text: str) -> list[pathlib.Path]:
  """Reads the name of a file, or of two with a comma between.

  Args:
    text: `FILE`, or `TRAIN,TEST`.

  Returns:
    One path or two; whether there are such files is not asked, but for a file
    that has a comma in its name.

  Raises:
    ValueError: If it is empty or names more than two.
  """
  if pathlib.Path(text).expanduser().is_file():
    return [pathlib.Path(text)]
  names = text.split(',')
  if len(names) > 2 or not all(names):
    raise ValueError(
      f"data must name a file or two, 'TRAIN,TEST', got {text!r}."
    )
  return list(map(pathlib.Path, names))
