"""Both halves of a visit of a dense cell: Pallas kernels for TPU.

Each reads the entries once: a tile meets the matrix unit, and its squares,
which are never stored, the vector unit. The linear weights ride as one more
column of the factors, in lanes that a rank below 128 leaves empty anyway. Tiles
that hold nothing but zeros are skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_MAX_RANK = 511  # With the linear weights, 512 columns.
_ROWS, _FEATURES = 256, 512


def unsupported(cell, *args):
  """Why the kernels do not take these arguments, or None."""
  rank = args[-1].shape[1]
  if rank > _MAX_RANK:
    return f'want a rank of at most {_MAX_RANK}, got {rank}.'
  if {x.dtype.name for x in (cell, *args)} != {'float32'}:
    return f'want float32, got {sorted(x.dtype.name for x in (cell, *args))}.'
  return None


def _up(n, multiple):
  return pl.cdiv(n, multiple) * multiple


def _dot(x, y, contract):
  return jax.lax.dot_general(
    x,
    y,
    ((contract[:1], contract[1:]), ((), ())),
    # One pass of the matrix unit keeps 8 bits of a weight.
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _read(cell_ref, shape, row_block, feature_block):
  """A tile; beyond its ends, the array holds anything."""
  tile = cell_ref[...]
  rows, features = (
    jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) for axis in (0, 1)
  )
  inside = rows < shape[0] - row_block * tile.shape[0]
  inside &= features < shape[1] - feature_block * tile.shape[1]
  return jnp.where(inside, tile, 0.0)


def _gradient_kernel(cell_ref, table_ref, sum_ref, square_ref, *, shape, rank):
  block, step = pl.program_id(0), pl.program_id(1)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)
    square_ref[...] = jnp.zeros_like(square_ref)

  tile = _read(cell_ref, shape, step, block)

  @pl.when(jnp.max(jnp.abs(tile)) > 0)
  def _():
    table = table_ref[...]
    sum_ref[...] += _dot(table, tile, (0, 0))
    squares = tile * tile * table[:, rank : rank + 1]
    square_ref[...] += jnp.sum(squares, axis=0, keepdims=True)


def _accumulate_kernel(cell_ref, table_ref, half_ref, out_ref, *, shape, rank):
  block, step = pl.program_id(0), pl.program_id(1)

  @pl.when(step == 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  tile = _read(cell_ref, shape, block, step)

  @pl.when(jnp.max(jnp.abs(tile)) > 0)
  def _():
    sums = _dot(tile, table_ref[...], (1, 0))
    squares = jnp.sum(tile * tile * half_ref[...], axis=1, keepdims=True)
    lanes = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    out_ref[...] += sums - jnp.where(lanes == rank, squares, 0.0)


def _plan(cell, rank):
  """Rows and features of a tile, and columns of a table."""
  rows = min(_ROWS, _up(cell.shape[0], 8))
  features = min(_FEATURES, _up(cell.shape[1], _LANES))
  return rows, features, _up(rank + 1, _LANES)


def _table(matrix, column, length, width):
  """The columns of a matrix and one more, padded by zeros."""
  table = jnp.concatenate([matrix, column[:, None]], axis=1)
  pads = (0, length - table.shape[0]), (0, width - table.shape[1])
  return jnp.pad(table, pads)


def _call(kernel, cell, grid, in_specs, out_specs, out_shapes, name, interpret):
  shape = functools.partial(
    jax.ShapeDtypeStruct,
    dtype=jnp.float32,
    manual_axis_type=jax.typeof(cell).manual_axis_type,
  )
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=[shape(s) for s in out_shapes],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name=name,
  )


def gradient(cell, multipliers, sums, factors, *, interpret=False):
  """As `reference.gradient`."""
  (num_rows, num_features), rank = cell.shape, factors.shape[1]
  rows, features, width = _plan(cell, rank)
  length = _up(num_rows, rows)
  table = _table(multipliers[:, None] * sums, multipliers, length, width)
  total = _up(num_features, features)
  call = _call(
    functools.partial(_gradient_kernel, shape=cell.shape, rank=rank),
    cell,
    (total // features, length // rows),
    [
      pl.BlockSpec((rows, features), lambda i, j: (j, i)),
      pl.BlockSpec((rows, width), lambda i, j: (j, 0)),
    ],
    [
      pl.BlockSpec((width, features), lambda i, j: (0, i)),
      pl.BlockSpec((1, features), lambda i, j: (0, i)),
    ],
    [(width, total), (1, total)],
    'fm_visit_gradient',
    interpret,
  )
  pulled, squares = call(cell, table)
  pulled, squares = pulled[:, :num_features], squares[0, :num_features]
  return pulled[rank], pulled[:rank].T - squares[:, None] * factors


def accumulate(cell, linear, squares, factors, *, interpret=False):
  """As `reference.accumulate`."""
  (num_rows, num_features), rank = cell.shape, factors.shape[1]
  rows, features, width = _plan(cell, rank)
  length, total = _up(num_rows, rows), _up(num_features, features)
  table = _table(factors, linear, total, width)
  half = jnp.pad(0.5 * squares, (0, total - num_features))[None]
  call = _call(
    functools.partial(_accumulate_kernel, shape=cell.shape, rank=rank),
    cell,
    (length // rows, total // features),
    [
      pl.BlockSpec((rows, features), lambda i, j: (i, j)),
      pl.BlockSpec((features, width), lambda i, j: (j, 0)),
      pl.BlockSpec((1, features), lambda i, j: (0, j)),
    ],
    [pl.BlockSpec((rows, width), lambda i, j: (i, 0))],
    [(length, width)],
    'fm_visit_accumulate',
    interpret,
  )
  (out,) = call(cell, table, half)
  return out[:num_rows, :rank], out[:num_rows, rank]
