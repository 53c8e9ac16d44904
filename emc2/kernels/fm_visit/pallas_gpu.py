"""Both halves of a visit of a dense cell: one kernel for Hopper GPUs.

Either half is a product of the entries, turned by XLA for the gradient, with a
table that streams past, and one of their squares with one column. A warpgroup
holds 64 rows of sums in registers; entries come through shared memory into
registers, where their squares are made and gone.

The matrix units take 16 bits. A number is split into the three bfloat16 numbers
that add up to it, and six of the nine products are summed: all that float32
keeps.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import lowering

_HELD = 64  # Rows that a warpgroup's matrix instruction takes.
_STREAMED = 64
_PARTS = 3  # Numbers of 16 bits to a float.
_BLOCKS = 4 * 132  # Enough to keep all processors evenly busy.
_MIN_TILES = 4  # Of a part; fewer do not repay its start.
_SQUARED = 64  # Columns of the table of the squares; one is used.
# A warpgroup accumulates in registers: 64 + 64 a thread.
_MAX_RANK = 127


def unsupported(cell, *args):
  """Why the kernel does not take these arguments, or None."""
  rank = args[-1].shape[1]
  if rank > _MAX_RANK:
    return f'want a rank of at most {_MAX_RANK}, got {rank}.'
  if {x.dtype.name for x in (cell, *args)} != {'float32'}:
    return f'want float32, got {sorted(x.dtype.name for x in (cell, *args))}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _plan(n, m):
  """Tiles of a part of the stream, and parts."""
  tiles = pl.cdiv(m, _STREAMED)
  parts = pl.cdiv(_BLOCKS, pl.cdiv(n, _HELD))
  steps = pl.cdiv(tiles, min(parts, pl.cdiv(tiles, _MIN_TILES)))
  return steps, pl.cdiv(tiles, steps)


def _split(x):
  """Three bfloat16 arrays that add up to x, outside a kernel."""
  parts = []
  for _ in range(_PARTS):
    # XLA may drop a cast to bfloat16 and back, and with it the lower parts.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(high.astype(jnp.bfloat16))
    x = x - high
  return parts


def _split_in_registers(x):
  parts = []
  for _ in range(_PARTS):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def _accumulate(acc, entries, tables, interpret):
  """Adds entries, in registers, times a table, in shared memory."""
  entries = _split_in_registers(entries)
  pairs = [(i, j) for i in range(_PARTS) for j in range(_PARTS - i)]
  # The least first.
  pairs = sorted(pairs, key=sum, reverse=True)
  pairs = [(entries[i], tables[j]) for i, j in pairs]
  if interpret:
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return acc + sum(dot(x, y[...]) for x, y in pairs)

  def compute(acc_ref):
    for x, y in pairs:
      plgpu.wgmma(acc_ref, x, y)

  return pl.run_state(compute)(plgpu.ACC.init(acc))


def _multiply(entries, table, column, name, interpret):
  """Entries @ table and entries**2 @ column.

  Args:
    entries: (n, m).
    table: (m, L).
    column: (m,).
    name: of the kernel.
    interpret: static.

  Returns:
    (n, L) and (n,).
  """
  (n, m), width = entries.shape, pl.cdiv(table.shape[1], 64) * 64
  steps, parts = _plan(n, m)
  length = steps * parts * _STREAMED
  pad = lambda x, rows, columns: jnp.pad(
    x, ((0, rows - x.shape[0]), (0, columns - x.shape[1]))
  )
  rows = pl.cdiv(n, _HELD) * _HELD
  entries = pad(entries, rows, length)
  tables = _split(pad(table, length, width))
  columns = _split(pad(column[:, None], length, _SQUARED))
  out = [
    jax.ShapeDtypeStruct((parts, rows, size), jnp.float32)
    for size in (width, _SQUARED)
  ]

  def entry(entry_ref, *refs):
    streamed, out_refs = refs[: 2 * _PARTS], refs[2 * _PARTS :]
    part, block = jax.lax.axis_index('part'), jax.lax.axis_index('block')

    def context(pipeline):
      carry = [jnp.zeros((_HELD, s), jnp.float32) for s in (width, _SQUARED)]
      own = pl.ds(block * _HELD, _HELD)
      for result, ref in zip(pipeline(tuple(carry)), out_refs, strict=True):
        ref[part, own] = result

    def step(_, *args):
      tile, *tiles, (sums, squares) = args
      x = tile[...]
      sums = _accumulate(sums, x, tiles[:_PARTS], interpret)
      squares = _accumulate(squares, x * x, tiles[_PARTS:], interpret)
      return sums, squares

    stream = lambda size: plgpu.BlockSpec(
      (_STREAMED, size), lambda j: (part * steps + j, 0)
    )
    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(steps,),
      max_concurrent_steps=min(2, steps),
      num_compute_wgs=1,
      memory_registers=40,
      wg_axis='wg',
      compute_context=context,
      in_specs=[
        plgpu.BlockSpec((_HELD, _STREAMED), lambda j: (block, part * steps + j))
      ]
      + [stream(width)] * _PARTS
      + [stream(_SQUARED)] * _PARTS,
    )(entry_ref, *streamed)

  outs = plgpu.kernel(
    entry,
    out_type=out,
    grid=(parts, rows // _HELD),
    grid_names=('part', 'block'),
    num_threads=2,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )(entries, *tables, *columns)
  # The kernel forgets over which mesh axes its arguments vary.
  axes = tuple(sorted(jax.typeof(entries).manual_axis_type.varying))
  outs = jax.lax.pcast(outs, axes, to='varying') if axes else outs
  sums, squares = (jnp.sum(o, axis=0)[:n] for o in outs)
  return sums[:, : table.shape[1]], squares[:, 0]


def gradient(cell, multipliers, sums, factors, *, interpret=False):
  """As `reference.gradient`."""
  rank = factors.shape[1]
  table = multipliers[:, None] * sums
  table = jnp.concatenate([table, multipliers[:, None]], axis=1)
  pulled, squares = _multiply(
    cell.T, table, multipliers, 'fm_visit_gradient', interpret
  )
  return pulled[:, rank], pulled[:, :rank] - squares[:, None] * factors


def accumulate(cell, linear, squares, factors, *, interpret=False):
  """As `reference.accumulate`."""
  rank = factors.shape[1]
  table = jnp.concatenate([factors, linear[:, None]], axis=1)
  sums, rest = _multiply(
    cell, table, 0.5 * squares, 'fm_visit_accumulate', interpret
  )
  return sums[:, :rank], sums[:, rank] - rest
