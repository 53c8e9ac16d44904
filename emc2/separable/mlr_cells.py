"""How the rows of softmax regression lie on the workers."""

from typing import Any, NamedTuple

import jax
import numpy as np

from emc2 import arguments
from emc2.separable import rows as rows_lib
from emc2.separable import sliced


class SparseFeatures(NamedTuple):
  """The rows of each minibatch, by row and by feature."""

  rows: sliced.Sliced  # (P, m, ...): n rows, of D columns.
  columns: sliced.Sliced  # (P, m, ...): D rows, of n columns.


class Batch(NamedTuple):
  """N rows on P workers in m minibatches of n; the last are padding."""

  features: Any  # (P, m, n, D), float32, or SparseFeatures.
  labels: Any  # (P, m, n), int32: K / Q times the block, plus the place in it.
  weights: Any  # (P, m, n), float32; 0 for padding.
  classes: Any  # (Q, K / Q), int32: classes of each block; -1 for padding.
  sizes: Any  # (P, Q), int32: how many of each block are no padding.


class Layout(NamedTuple):
  """Which row, feature and class lies where; on the host."""

  row_ids: np.ndarray  # (P, m, n), int32; -1 for padding.
  feature_ids: np.ndarray  # (D,), int32: of sparse rows, the frequent first.
  class_ids: np.ndarray  # (Q, K / Q), int32; -1 for padding.
  num_rows: int
  num_features: int
  num_classes: int

  def sort_rows(self, values: Any) -> np.ndarray:
    """Values by row, (P, m, n, ...), in the order of the data, (N, ...)."""
    values = np.asarray(values)
    kept = self.row_ids >= 0
    found = np.empty((self.num_rows, *values.shape[3:]), values.dtype)
    found[self.row_ids[kept]] = values[kept]
    return found

  def sort_weights(self, weights: Any) -> np.ndarray:
    """Weights (Q, D, K / Q) as (D, K) in the order of the data."""
    weights = np.asarray(weights)
    found = np.empty((self.num_features, self.num_classes), weights.dtype)
    blocks, slots = np.nonzero(self.class_ids >= 0)
    classes = self.class_ids[blocks, slots]
    chosen = weights[blocks, :, slots].T
    found[self.feature_ids[:, None], classes[None]] = chosen
    return found

  def place_weights(self, weights: Any) -> np.ndarray:
    """Weights (D, K) in the order of the data as (Q, D, K / Q)."""
    weights = np.asarray(weights)
    expected = self.num_features, self.num_classes
    if weights.shape != expected:
      raise ValueError(
        f'weights must have shape {expected}, got {weights.shape}.'
      )
    placed = weights[self.feature_ids][:, self.class_ids]
    placed[:, self.class_ids < 0] = 0
    return np.ascontiguousarray(np.moveaxis(placed, 1, 0))

  def classes(self, numbers: Any) -> np.ndarray:
    """Classes of the data, by what :class:`Batch` calls them."""
    return self.class_ids.reshape(-1)[np.asarray(numbers)]


def split(
  features: Any,
  labels: np.ndarray,
  num_classes: int,
  *,
  num_workers: int = 1,
  slots: int = 1,
  num_minibatches: int = 1,
  row_weights: np.ndarray | None = None,
  like: Layout | None = None,
  allow_empty: bool = False,
  seed: int = 0,
) -> tuple[Batch, Layout]:
  """Deals rows and classes to workers, at random.

  Args:
    features: (N, D) array, kept dense, or
      :class:`~emc2.separable.rows.SparseRows`.
    labels: (N,), int: 0 to K - 1.
    num_classes: K, at least the number of blocks.
    num_workers: P.
    slots: Blocks of each worker; there are Q, the product of the two.
    num_minibatches: m, into which a worker's rows are cut.
    row_weights: (N,), at least 0; ones by default.
    like: The layout of features and classes to share, that of the training
      rows for test rows.
    allow_empty: Whether a row may have no feature, and a class no row.
    seed: Of the order of rows and classes.

  Returns:
    NumPy arrays, and the layout. Sparse features are kept twice, by row and by
    feature, 8 bytes an entry each.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  is_sparse = isinstance(features, rows_lib.SparseRows)
  if not is_sparse:
    features = np.asarray(features)
    if features.ndim != 2:
      raise ValueError(
        f'features must have shape (N, D), got {features.shape}.'
      )
  labels, row_weights = _check(
    features, labels, num_classes, row_weights, allow_empty or like is not None
  )
  arguments.check_at_least('num_workers', num_workers, 1)
  arguments.check_at_least('slots', slots, 1)
  arguments.check_at_least('num_minibatches', num_minibatches, 1)
  num_rows, num_features = features.shape
  num_blocks, parts = num_workers * slots, num_workers * num_minibatches
  if num_classes < num_blocks:
    raise ValueError(
      f'num_classes must be at least the {num_blocks} blocks, got '
      f'{num_classes}.'
    )
  if num_rows < parts:
    raise ValueError(
      f'features must have a row for each of the {parts} minibatches, got '
      f'{num_rows}.'
    )
  rng = np.random.default_rng(seed)
  row_ids = _deal(rng.permutation(num_rows), parts)
  class_ids = _deal(rng.permutation(num_classes), num_blocks)
  if like is not None:
    fits = like.class_ids.shape == class_ids.shape
    if not fits or like.num_features != num_features:
      raise ValueError(
        f'like must have {num_features} features and {num_blocks} blocks of '
        f'{class_ids.shape[1]} classes, got {like.num_features} and '
        f'{like.class_ids.shape}.'
      )
    class_ids, feature_ids = like.class_ids, like.feature_ids
  elif is_sparse:
    counts = np.bincount(features.ids, minlength=num_features)
    feature_ids = np.argsort(-counts, kind='stable')
    feature_ids = feature_ids.astype(np.int32)
  else:
    feature_ids = np.arange(num_features, dtype=np.int32)
  place = np.empty(num_classes, np.int64)
  kept = class_ids >= 0
  place[class_ids[kept]] = np.flatnonzero(kept)
  shape = num_workers, num_minibatches, row_ids.shape[1]
  row_ids = row_ids.reshape(shape)
  inside = row_ids >= 0
  if is_sparse:
    dealt = _cut(features, row_ids, feature_ids)
  else:
    dealt = features[row_ids].astype(features.dtype, copy=False)
    dealt[~inside] = 0
  batch = Batch(
    features=dealt,
    labels=np.where(inside, place[labels][row_ids], 0).astype(np.int32),
    weights=np.where(inside, row_weights[row_ids], 0),
    classes=class_ids,
    sizes=np.tile(np.sum(class_ids >= 0, 1, dtype=np.int32), (num_workers, 1)),
  )
  layout = Layout(
    row_ids, feature_ids, class_ids, num_rows, num_features, num_classes
  )
  return batch, layout


def _cut(features, row_ids, feature_ids):
  """Entries by row and by feature, of every minibatch."""
  num_workers, num_minibatches, height = row_ids.shape
  place = np.empty(features.num_rows, np.int64)
  inside = row_ids >= 0
  place[row_ids[inside]] = np.flatnonzero(inside)
  part, row = np.divmod(place[features.row_ids], height)
  column = np.empty(features.num_features, np.int64)
  column[feature_ids] = np.arange(len(column))
  columns = column[features.ids]

  def cut(rows, ids, num_rows):
    matrix = sliced.cut(
      rows,
      ids.astype(np.int32),
      features.values,
      part,
      num_rows,
      num_workers * num_minibatches,
    )
    split_parts = lambda x: x.reshape(
      num_workers, num_minibatches, *x.shape[1:]
    )
    return jax.tree.map(split_parts, matrix)

  return SparseFeatures(
    cut(row, columns, height), cut(columns, row, features.num_features)
  )


def _deal(ids, parts):
  """Ids dealt to parts of equal length, -1 where there are too few."""
  length = -(-len(ids) // parts)
  dealt = np.full((length, parts), -1, np.int32)
  dealt.reshape(-1)[: len(ids)] = ids
  return np.ascontiguousarray(dealt.T)


def _check(features, labels, num_classes, row_weights, allow_empty):
  is_sparse = isinstance(features, rows_lib.SparseRows)
  num_rows = features.shape[0]
  labels = np.asarray(labels)
  if labels.shape != (num_rows,) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'labels must be {num_rows} integers, got {labels.dtype} of shape '
      f'{labels.shape}.'
    )
  if num_rows and not 0 <= labels.min() <= labels.max() < num_classes:
    row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
    raise ValueError(
      f'labels must lie in [0, {num_classes}), got {labels[row]} in row {row}.'
    )
  if is_sparse:
    rows_lib.check_finite('features', features.values, features.row_ids)
    filled = np.diff(features.starts) > 0
  else:
    row_ids = np.arange(num_rows)
    bad = row_ids[~np.all(np.isfinite(features), axis=1)]
    if len(bad):
      raise ValueError(
        f'features must be finite, got row {bad[0]} that is not.'
      )
    filled = np.any(features != 0, axis=1)
  if not allow_empty:
    if not np.all(filled):
      raise ValueError(
        f'features must not be 0 in a whole row, got row {np.argmin(filled)}: '
        'add a constant feature, or allow_empty=True.'
      )
    counts = np.bincount(labels, minlength=num_classes)
    if not np.all(counts):
      raise ValueError(
        f'labels must have a row of every class, got none of class '
        f'{np.argmin(counts)}: number the classes anew, or allow_empty=True.'
      )
  if row_weights is None:
    return labels, np.ones(num_rows, np.float32)
  row_weights = np.asarray(row_weights, np.float32)
  fits = row_weights.shape == (num_rows,) and np.all(np.isfinite(row_weights))
  if not fits or np.any(row_weights < 0) or not np.any(row_weights):
    raise ValueError(
      f'row_weights must be {num_rows} finite numbers of at least 0, not all '
      f'0, got shape {row_weights.shape}.'
    )
  return labels, row_weights
