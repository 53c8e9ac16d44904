"""How the data of a factorisation machine lie: rows by workers, features too.

Worker p holds its rows, cut by the Q blocks of features, and within a cell by
the mini-batches of a visit.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.kernels import fm_visit
from emc2.separable import rows as rows_lib

LOSSES = ('squared', 'logistic')

DENSE_SHARE = 0.25
"""Share of entries from which matrix products beat gathers on a CPU."""

_SIZES = (1, 2, 4, 8, 16)
# What adding up a bag costs, in gathers.
_BAG_COST = 1.5


class Cells(NamedTuple):
  """Rows and labels of P workers, each of S batches of B rows."""

  labels: Any  # (P, S, B), float.
  present: Any  # (P, S, B), float: 1 for a row, 0 for padding.
  num_rows: Any  # (P,), float: N, the rows of all workers together.
  feature_ids: Any  # (Q, D_q), int32: which features; -1 for padding.
  by_row: Any  # (P, Q, ...): bags of the S * B rows, or () if dense.
  by_feature: Any  # (P, Q, S, ...): bags of a batch; dense, (P, Q, S, B, D_q).


class Layout(NamedTuple):
  """Which row and which feature lies where; on the host."""

  row_ids: np.ndarray  # (P, S, B), int32; -1 for padding.
  feature_ids: np.ndarray  # (Q, D_q), int32; -1 for padding.
  num_rows: int
  num_features: int
  # Places that cells hold for each entry of the data, by row and by feature.
  padding: tuple[float, float]

  def sort_rows(self, values: Any) -> np.ndarray:
    """Values by row, (P, S, B, ...), in the order of the data, (N, ...)."""
    return _undo(self.row_ids, values, self.num_rows)

  def sort_features(self, values: Any) -> np.ndarray:
    """Values by feature, (Q, D_q, ...), in the order of the data, (D, ...)."""
    return _undo(self.feature_ids, values, self.num_features)

  def place_features(self, values: Any) -> np.ndarray:
    """Values in the order of the data, (D, ...), as (Q, D_q, ...)."""
    values = np.asarray(values)
    placed = values[self.feature_ids]
    placed[self.feature_ids < 0] = 0
    return placed


def cut(
  features: rows_lib.SparseRows | np.ndarray,
  labels: np.ndarray,
  *,
  loss: str,
  num_workers: int = 1,
  slots: int = 1,
  steps_per_visit: int = 1,
  dense: bool | None = None,
) -> tuple[Cells, Layout]:
  """Cuts data into cells of about equal size.

  Rows are dealt to workers by their number of entries and features to blocks by
  theirs, so that the shapes, which are those of the largest cell, hold little
  padding; within a worker and a block they keep their order. The rows of a
  worker make `steps_per_visit` batches of one size, or sizes that differ by 1.

  Args:
    features: (N, D), sparse or dense, finite.
    labels: (N,), finite; -1 and 1 for the logistic loss.
    loss: 'squared' or 'logistic', for which labels are checked.
    num_workers: P, at most N.
    slots: Blocks for each worker, L + 1; there are Q = P slots, at most D.
    steps_per_visit: S, batches that the rows of a worker make.
    dense: Whether cells are kept with their zeros; by default where a share of
      `DENSE_SHARE` is no zero.

  Returns:
    The cells, of NumPy arrays of the dtype of the values, and the layout.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> features = np.eye(4, 6, dtype=np.float32)
    >>> cells, layout = cut(features, np.arange(4.0), loss='squared',
    ...                     num_workers=2)
    >>> cells.labels.shape, cells.feature_ids.shape
    ((2, 1, 2), (2, 3))
  """
  features, labels = _check(
    features, labels, loss, num_workers, slots, steps_per_visit
  )
  num_rows, num_features = features.shape
  num_blocks = num_workers * slots
  of_entry = features.row_ids
  frequency = np.bincount(features.ids, minlength=num_features)
  rows = _deal(np.diff(features.starts), num_workers)
  feature_ids = _deal(frequency, num_blocks)
  shortest = int((rows >= 0).sum(1).min())
  if steps_per_visit > shortest:
    raise ValueError(
      f'steps_per_visit must be at most {shortest}, the rows of a worker, got '
      f'{steps_per_visit}.'
    )
  row_ids = np.stack([_batches(own, steps_per_visit) for own in rows])
  _, _, batch_size = row_ids.shape
  worker, batch, row = _places(row_ids, num_rows)
  block, feature = _places(feature_ids, num_features)
  # Of each entry.
  worker, batch, row = worker[of_entry], batch[of_entry], row[of_entry]
  block, feature = block[features.ids], feature[features.ids]
  cell = worker * num_blocks + block
  size = batch_size, feature_ids.shape[1]
  shape = num_workers, num_blocks, steps_per_visit
  share = len(features.ids) / max(1, num_rows * num_features)
  if dense is None:
    dense = share >= DENSE_SHARE
  if dense:
    by_row = ()
    by_feature = np.zeros((*shape, *size), features.values.dtype)
    by_feature[worker, block, batch, row, feature] = features.values
    places = by_feature.size, by_feature.size
  else:
    by_row = _bag(
      cell,
      batch * batch_size + row,
      feature,
      features.values,
      shape[:2],
      steps_per_visit * batch_size,
    )
    by_feature = _bag(
      cell * steps_per_visit + batch,
      feature,
      row,
      features.values,
      shape,
      size[1],
    )
    places = by_row.ids.size, by_feature.ids.size
  dtype = features.values.dtype
  present = (row_ids >= 0).astype(dtype)
  cells = Cells(
    labels=np.where(row_ids >= 0, labels[row_ids], 0).astype(dtype),
    present=present,
    num_rows=np.full(num_workers, num_rows, dtype),
    feature_ids=feature_ids,
    by_row=by_row,
    by_feature=by_feature,
  )
  padding = tuple(count / max(1, len(features.ids)) for count in places)
  layout = Layout(row_ids, feature_ids, num_rows, num_features, padding)
  return cells, layout


def specs() -> Any:
  """How cells are split over a ring: all of them by their first axis."""
  return jax.sharding.PartitionSpec(mesh_lib.RING)


def check_labels(labels: np.ndarray, loss: str) -> None:
  """Refuses labels that the loss does not know.

  Raises:
    ValueError: If a label is not finite, or neither -1 nor 1 where the loss is
      logistic, or if there is no such loss.
  """
  if loss not in LOSSES:
    raise ValueError(f'loss must be one of {LOSSES}, got {loss!r}.')
  rows_lib.check_finite('labels', labels, np.arange(len(labels)))
  wrong = np.flatnonzero(np.abs(labels) != 1)
  if loss == 'logistic' and len(wrong):
    raise ValueError(
      'labels must be -1 or 1 for the logistic loss, got '
      f'{labels[wrong[0]]} in row {wrong[0]}.'
    )


def _check(features, labels, loss, num_workers, slots, steps_per_visit):
  """Sparse rows and labels, checked."""
  counts = dict(
    num_workers=num_workers, slots=slots, steps_per_visit=steps_per_visit
  )
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}.')
  features = as_rows(features)
  rows_lib.check_finite('features', features.values, features.row_ids)
  num_rows, num_features = features.shape
  labels = np.asarray(labels)
  if labels.shape != (num_rows,):
    raise ValueError(
      f'labels must have shape ({num_rows},), one for each row, got '
      f'{labels.shape}.'
    )
  check_labels(labels, loss)
  if num_rows < num_workers:
    raise ValueError(
      f'features must have a row for each of the {num_workers} workers, got '
      f'{num_rows}.'
    )
  if num_features < num_workers * slots:
    raise ValueError(
      f'features must have at least {num_workers * slots} columns, one for '
      f'each block, got {num_features}.'
    )
  return features, labels


def as_rows(features: rows_lib.SparseRows | np.ndarray) -> rows_lib.SparseRows:
  """Sparse rows of any features, of the same dtype."""
  if isinstance(features, rows_lib.SparseRows):
    return features
  features = np.asarray(features)
  rows = rows_lib.from_dense(features)
  if features.dtype == np.float64:
    rows = rows._replace(values=features[rows.row_ids, rows.ids])
  return rows


def _deal(sizes, num_hands):
  """Deals things by falling size, there and back; a hand keeps their order."""
  order = np.argsort(-sizes, kind='stable').astype(np.int32)
  last = np.iinfo(np.int32).max
  order = np.pad(order, (0, -len(order) % num_hands), constant_values=last)
  rounds = order.reshape(-1, num_hands)
  rounds[1::2] = rounds[1::2, ::-1]
  hands = np.sort(rounds.T, axis=1)
  hands[hands == last] = -1
  return hands


def _batches(ids, num_batches):
  """The rows of a worker in batches, (S, B)."""
  size = -(-len(ids) // num_batches)
  parts = np.array_split(ids[ids >= 0], num_batches)
  batches = np.full((num_batches, size), -1, np.int32)
  for batch, part in zip(batches, parts, strict=True):
    batch[: len(part)] = part
  return batches


def _places(ids, total):
  """Where each thing lies, along each axis of `ids`."""
  found = np.nonzero(ids >= 0)
  places = np.empty((ids.ndim, total), np.int64)
  places[:, ids[found]] = found
  return places


def _bag(cell, owner, ids, values, shape, num_owners):
  """Bags of the entries of each cell, all cells with equally many.

  Args:
    cell: (nnz,), the number of each entry's cell.
    owner: (nnz,), to whose sum it belongs.
    ids: (nnz,), the row of the table.
    values: (nnz,).
    shape: The axes of the cells.
    num_owners: In a cell.

  Returns:
    `fm_visit.Bags` with leading axes `shape`.
  """
  num_cells = int(np.prod(shape))
  key = cell * num_owners + owner
  order = np.argsort(key, kind='stable')
  keys, counts = np.unique(key, return_counts=True)
  of_key = keys // num_owners

  def bags_of(size):
    """Bags of each key, and of the cell that has most."""
    bags = -(-counts // size)
    per_cell = np.bincount(of_key, bags, minlength=num_cells).astype(np.int64)
    return bags, max(1, int(per_cell.max(initial=0)))

  most = max(1, int(counts.max(initial=0)))
  costs = {size: bags_of(size)[1] * (size + _BAG_COST) for size in _SIZES}
  size = min(costs, key=costs.get)
  direct = most <= max(_SIZES) and num_owners * most <= costs[size]
  if direct:
    size, first, total = most, keys % num_owners, num_owners
    bags = np.ones_like(counts)
  else:
    bags, total = bags_of(size)
    before = np.cumsum(bags) - bags
    start = np.searchsorted(of_key, np.arange(num_cells))
    padded = np.append(before, bags.sum())
    first = before - padded[start][of_key]
  rank = np.arange(len(key)) - np.repeat(np.cumsum(counts) - counts, counts)
  row = np.repeat(of_key, counts), np.repeat(first, counts) + rank // size
  place = row[0], rank % size, row[1]
  out_ids = np.zeros((num_cells, size, total), np.int32)
  out_values = np.zeros((num_cells, size, total), values.dtype)
  out_ids[place], out_values[place] = ids[order], values[order]
  owners = np.zeros((num_cells, 0), np.int32)
  if not direct:
    # Padding belongs to the last owner: owners rise.
    owners = np.full((num_cells, total), num_owners - 1, np.int32)
    owners[row] = np.repeat(keys % num_owners, counts)
  spread = lambda x: x.reshape(*shape, *x.shape[1:])
  return fm_visit.Bags(spread(out_ids), spread(out_values), spread(owners))


def _undo(ids, values, total):
  values = np.asarray(values)
  values = values.reshape(ids.size, *values.shape[ids.ndim :])
  ids = ids.ravel()
  out = np.empty((total, *values.shape[1:]), values.dtype)
  out[ids[ids >= 0]] = values[ids >= 0]
  return out
