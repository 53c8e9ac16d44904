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

  Sum c is of `values[c, t] * table[ids[c, t]]`. An owner may have many bags.
  """

  ids: Any  # (C, T), int32: rows of the table; 0 in the padding.
  values: Any  # (C, T), float: 0 in the padding.
  owners: Any  # (C,), int32, rising; or (0,): bag c belongs to owner c.


def _matmul(x, y):
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _take(table, ids):
  return table.at[ids].get(mode='promise_in_bounds')


def _deal(sums, bags, num_owners):
  """Adds the sums of bags up by their owners."""
  if not bags.owners.shape[0]:
    return sums
  empty = jnp.zeros_like(sums, shape=(num_owners, *sums.shape[1:]))
  return empty.at[bags.owners].add(
    sums, mode='promise_in_bounds', indices_are_sorted=True
  )


def _add_rows(table, ids, weights):
  """Sums of weighted rows, (C, T) to (C, K)."""
  terms = [
    weights[:, t, None] * _take(table, ids[:, t]) for t in range(ids.shape[1])
  ]
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
    weights = cell.values * _take(multipliers, cell.ids)
    linear = jnp.sum(weights, axis=1)
    squares = jnp.sum(cell.values * weights, axis=1)
    linear, squares = _deal(
      jnp.stack([linear, squares], axis=1), cell, num_features
    ).T
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
    terms = _take(linear, cell.ids) - cell.values * _take(squares, cell.ids)
    rest = _deal(jnp.sum(cell.values * terms, axis=1), cell, num_rows)
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
  counts = jnp.sum(cell.values != 0, axis=1).astype(cell.values.dtype)
  return _deal(counts, cell, num_features)
