"""The visit of a factorisation machine, in plain `jax.numpy`.

Written for a CPU. There, the sum of a gathered row and others runs at the rate
of the gathers as long as nothing but the sum is ever stored: the gathers of one
place of all bags are added to those of the next, in one loop. Gathering whole
bags first and reducing them takes five to ten times as long.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Bags(NamedTuple):
  """Weighted sums of rows of a table, of at most T rows each.

  Sum c is of `values[t, c] * table[ids[t, c]]`. An owner may have many bags.
  """

  # T first: a TPU pads last axes to a multiple of 128.
  ids: Any  # (T, C), int32: rows of the table; 0 in the padding.
  values: Any  # (T, C), float: 0 in the padding.
  owners: Any  # (C,), int32, rising; or (0,): bag c belongs to owner c.


def _matmul(x, y):
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _take(table, ids):
  """Rows of a table by ids (C,) that are in it, from its begin."""
  dimensions = jax.lax.GatherDimensionNumbers(
    offset_dims=tuple(range(1, table.ndim)),
    collapsed_slice_dims=(0,),
    start_index_map=(0,),
  )
  return jax.lax.gather(
    table,
    ids[:, None],
    dimensions,
    (1, *table.shape[1:]),
    mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
  )


def _store(x, ids):
  """The same, written to memory before it is gathered from.

  XLA for CPUs fuses what makes a table into its gathers, so that an entry would
  be made anew whenever it is read; an optimization barrier does not outlive the
  passes before that. A loop that never runs does, since no id is below 0.
  """
  never = jnp.minimum(ids[0, 0], 0)
  return jax.lax.fori_loop(
    0, never, lambda _, x: jax.tree.map(jnp.negative, x), x
  )


def _deal(sums, bags, num_owners):
  """Adds the sums of bags up by their owners."""
  if not bags.owners.shape[0]:
    return sums
  empty = jnp.zeros_like(sums, shape=(num_owners, *sums.shape[1:]))
  return empty.at[bags.owners].add(
    sums, mode='promise_in_bounds', indices_are_sorted=True
  )


def _add_rows(table, ids, weights):
  """Sums of weighted rows, (T, C) to (C, K)."""
  pairs = zip(weights, ids, strict=True)
  return _add([own[:, None] * _take(table, rows) for own, rows in pairs])


def _add(terms):
  return sum(terms[1:], terms[0])


def gradient(
  cell: Bags | jax.Array,
  multipliers: jax.Array,
  sums: jax.Array,
  factors: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The gradient of a block's parameters; see :func:`fm_visit.gradient`."""
  num_features, rank = factors.shape
  if isinstance(cell, Bags):
    # Of each entry: x G, for the factors and the linear weights.
    multipliers = _store(multipliers, cell.ids)
    weights = _take(multipliers, cell.ids.reshape(-1)).reshape(cell.ids.shape)
    weights = cell.values * weights
    linear = _add(list(weights))
    squares = _add(list(cell.values * weights))
    linear = _deal(linear, cell, num_features)
    squares = _deal(squares, cell, num_features)
    if not rank:
      return linear, jnp.zeros_like(factors)
    pulled = _deal(_add_rows(sums, cell.ids, weights), cell, num_features)
  else:
    linear = _matmul(multipliers, cell)
    squares = _matmul(multipliers, cell * cell)
    # The product that contracts leading axes turns the smaller operand.
    pulled = _matmul((multipliers[:, None] * sums).T, cell).T
  return linear, pulled - squares[:, None] * factors


def accumulate(
  cell: Bags | jax.Array,
  linear: jax.Array,
  squares: jax.Array,
  factors: jax.Array,
  num_rows: int,
) -> tuple[jax.Array, jax.Array]:
  """What a block adds to each row; see :func:`fm_visit.accumulate`."""
  rank = factors.shape[1]
  squares = 0.5 * squares
  if isinstance(cell, Bags):
    linear, squares, factors = _store((linear, squares, factors), cell.ids)
    pairs = zip(cell.ids, cell.values, strict=True)
    terms = [x * (_take(linear, d) - x * _take(squares, d)) for d, x in pairs]
    rest = _deal(_add(terms), cell, num_rows)
    if not rank:
      return jnp.zeros_like(factors, shape=(num_rows, 0)), rest
    sums = _deal(_add_rows(factors, cell.ids, cell.values), cell, num_rows)
  else:
    sums = _matmul(cell, factors)
    rest = _matmul(cell, linear) - _matmul(cell * cell, squares)
  return sums, rest


def count(cell: Bags | jax.Array, num_features: int) -> jax.Array:
  """Rows that have each feature, (D,), of the dtype of the cell."""
  if not isinstance(cell, Bags):
    return jnp.sum(cell != 0, axis=0).astype(cell.dtype)
  counts = jnp.sum(cell.values != 0, axis=0).astype(cell.values.dtype)
  return _deal(counts, cell, num_features)
