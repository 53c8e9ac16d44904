"""Both halves of a visit of a dense cell: one kernel for Hopper GPUs.

Either half is a product of the entries, turned by XLA for the gradient, with a
table that streams past, and one of their squares with one column. A warpgroup
holds 64 rows of sums in registers; entries come through shared memory into
registers, where their squares are made and gone.

Numbers are split into three bfloat16 numbers, and six of the nine products are
summed: all that float32 keeps.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import hopper, lowering

_PARTS = 3  # Numbers of 16 bits to a float.
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
  steps, parts = hopper.shares(pl.cdiv(n, hopper.HELD), m)
  length = steps * parts * hopper.STREAMED
  pad = lambda x, rows, columns: jnp.pad(
    x, ((0, rows - x.shape[0]), (0, columns - x.shape[1]))
  )
  rows = pl.cdiv(n, hopper.HELD) * hopper.HELD
  entries = pad(entries, rows, length)
  tables = hopper.split(pad(table, length, width), _PARTS)
  columns = hopper.split(pad(column[:, None], length, _SQUARED), _PARTS)
  out = [
    jax.ShapeDtypeStruct((parts, rows, size), jnp.float32)
    for size in (width, _SQUARED)
  ]

  def entry(entry_ref, *refs):
    streamed, out_refs = refs[: 2 * _PARTS], refs[2 * _PARTS :]
    part, block = jax.lax.axis_index('part'), jax.lax.axis_index('block')

    def context(pipeline):
      carry = [
        jnp.zeros((hopper.HELD, s), jnp.float32) for s in (width, _SQUARED)
      ]
      own = pl.ds(block * hopper.HELD, hopper.HELD)
      for result, ref in zip(pipeline(tuple(carry)), out_refs, strict=True):
        ref[part, own] = result

    def step(_, *args):
      tile, *tiles, (sums, squares) = args
      x = tile[...]
      parts_of = lambda x: hopper.split_in_registers(x, _PARTS)
      sums = hopper.accumulate(sums, parts_of(x), tiles[:_PARTS], interpret)
      squares = hopper.accumulate(
        squares, parts_of(x * x), tiles[_PARTS:], interpret
      )
      return sums, squares

    stream = lambda size: plgpu.BlockSpec(
      (hopper.STREAMED, size), lambda j: (part * steps + j, 0)
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
        plgpu.BlockSpec(
          (hopper.HELD, hopper.STREAMED), lambda j: (block, part * steps + j)
        )
      ]
      + [stream(width)] * _PARTS
      + [stream(_SQUARED)] * _PARTS,
    )(entry_ref, *streamed)

  outs = plgpu.kernel(
    entry,
    out_type=out,
    grid=(parts, rows // hopper.HELD),
    grid_names=('part', 'block'),
    num_threads=2,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )(entries, *tables, *columns)
  outs = hopper.vary_like(outs, entries)
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
