"""What kernels for Hopper GPUs share: exact products and streams of tiles.

The matrix units take 16 bits. A number is split into the bfloat16 numbers that
add up to it, and of the products of parts those are summed that the precision
of the whole keeps: with two parts of a float32, its products err by about
2^-16, and with three by no more than float32 does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

PROCESSORS = 132
HELD = 64  # Rows that a warpgroup's matrix instruction takes.
STREAMED = 64
BLOCKS = 4 * PROCESSORS  # Enough to keep all of them evenly busy.
MIN_TILES = 4  # Of a share; fewer do not repay its start.


def split(x: jax.Array, parts: int) -> list[jax.Array]:
  """So many bfloat16 arrays that add up to x, outside a kernel."""
  if x.dtype == jnp.bfloat16:
    return [x]
  found, x = [], x.astype(jnp.float32)
  for _ in range(parts):
    # XLA may drop a cast to bfloat16 and back, and with it the lower parts.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    found.append(high.astype(jnp.bfloat16))
    x = x - high
  return found


def split_in_registers(x: jax.Array, parts: int) -> list[jax.Array]:
  """As :func:`split`, of float32, inside a kernel."""
  found = []
  for _ in range(parts):
    found.append(x.astype(jnp.bfloat16))
    x = x - found[-1].astype(jnp.float32)
  return found


def pairs(xs: Sequence[Any], ys: Sequence[Any]) -> list[tuple[Any, Any]]:
  """The products of parts that the whole keeps, the least first."""
  most = max(len(xs), len(ys))
  kept = [
    (i, j) for i in range(len(xs)) for j in range(len(ys)) if i + j < most
  ]
  return [(xs[i], ys[j]) for i, j in sorted(kept, key=sum, reverse=True)]


def inner_products(
  xs: Sequence[Any], ys: Sequence[Any], interpret: Any
) -> jax.Array:
  """Those of the rows of two tiles in shared memory, in registers."""
  if interpret:
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return sum(dot(x[...], y[...].T) for x, y in pairs(xs, ys))

  def compute(acc_ref):
    for x, y in pairs(xs, ys):
      plgpu.wgmma(acc_ref, x, y.transpose((1, 0)))
    return acc_ref[...]

  shape = (xs[0].shape[0], ys[0].shape[0])
  return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def accumulate(
  acc: jax.Array, xs: Sequence[jax.Array], ys: Sequence[Any], interpret: Any
) -> jax.Array:
  """Adds x, in registers, times y, in shared memory."""
  if interpret:
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return acc + sum(dot(x, y[...]) for x, y in pairs(xs, ys))

  def compute(acc_ref):
    for x, y in pairs(xs, ys):
      plgpu.wgmma(acc_ref, x, y)

  return pl.run_state(compute)(plgpu.ACC.init(acc))


def pad(x: jax.Array, multiple: int, value: Any = 0) -> jax.Array:
  """Fills up the rows of x to a multiple, and features to that of a swizzle."""
  widths = [(0, -x.shape[0] % multiple)]
  widths += [(0, -k % 64) for k in x.shape[1:]]
  return jnp.pad(x, widths, constant_values=value)


def along_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Broadcasts what belongs to the rows of a tile."""
  return jax.lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Broadcasts what belongs to the columns of a tile."""
  return jax.lax.broadcast_in_dim(x, shape, [1])


def shares(blocks: int, length: int) -> tuple[int, int]:
  """Of a stream that blocks too few for the chip would take as a whole.

  Args:
    blocks: how many hold different rows.
    length: rows that stream past each.

  Returns:
    Tiles of a share, and shares.
  """
  tiles = pl.cdiv(length, STREAMED)
  count = pl.cdiv(BLOCKS, blocks)
  steps = pl.cdiv(tiles, min(count, pl.cdiv(tiles, MIN_TILES)))
  return steps, pl.cdiv(tiles, steps)


def vary_like(outs: Any, x: jax.Array) -> Any:
  """Outputs, of which a kernel forgets over which mesh axes they vary."""
  axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
  return jax.lax.pcast(outs, axes, to='varying') if axes else outs


def stream(
  x: Sequence[jax.Array],
  y: Sequence[jax.Array],
  x_stats: Sequence[jax.Array],
  y_stats: Sequence[jax.Array],
  *,
  carry: Callable[[], Any],
  body: Callable[..., Any],
  finish: Callable[[Any], tuple[jax.Array, ...]],
  out: Sequence[jax.ShapeDtypeStruct],
  groups: int,
  flight: int,
  shares: int,
  name: str,
  interpret: Any,
) -> list[jax.Array]:
  """Runs `body` on all tiles of y for each block of x.

  A warpgroup holds 64 rows of x in shared memory; a further warpgroup streams
  tiles of y past them through the bulk copy engine.

  Args:
    x: parts of (n, d), n a multiple of what a block holds and d of 64.
    y: parts of (c, d), c a multiple of what the shares stream.
    x_stats: arrays (n,).
    y_stats: arrays (c,).
    carry: makes the first carry.
    body: maps parts and stats of a block of x, those of a tile of y, and the
      carry to the next carry.
    finish: maps the last carry to what is written of the block.
    out: shapes and dtypes of the outputs, (n, ...) each.
    groups: warpgroups that share each streamed tile.
    flight: tiles in flight, at most.
    shares: of y, each for blocks of its own.
    name: of the kernel.
    interpret: static.

  Returns:
    The outputs, (shares, n, ...) each.
  """
  (n, d), steps = x[0].shape, y[0].shape[0] // (shares * STREAMED)

  def entry(*refs):
    refs = list(refs)
    take = lambda k: [refs.pop(0) for _ in range(k)]
    x_refs, y_refs = take(len(x) + len(x_stats)), take(len(y) + len(y_stats))
    out_refs = take(len(out))
    x_smems = take(len(x_refs))
    (barriers,) = refs
    group, share = jax.lax.axis_index('wg'), jax.lax.axis_index('share')
    base = (jax.lax.axis_index('block') * groups + group) * HELD
    own = pl.ds(base, HELD)

    def context(pipeline):
      for ref, smem in zip(x_refs, x_smems, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[own], smem.at[group], barriers.at[group])
      plgpu.barrier_wait(barriers.at[group])
      stats = [smem.at[group][...] for smem in x_smems[len(x) :]]
      state, *_ = pipeline((carry(), *stats))
      for result, ref in zip(finish(state), out_refs, strict=True):
        ref[share, own] = result

    def step(_, *args):
      *tile, (state, *stats) = args
      held = [smem.at[group] for smem in x_smems[: len(x)]]
      state = body(
        held, stats, tile[: len(y)], [ref[...] for ref in tile[len(y) :]], state
      )
      return (state, *stats)

    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(steps,),
      max_concurrent_steps=min(flight, steps),
      num_compute_wgs=groups,
      memory_registers=40,
      wg_axis='wg',
      compute_context=context,
      in_specs=[
        plgpu.BlockSpec((STREAMED, d), lambda j: (share * steps + j, 0))
      ]
      * len(y)
      + [plgpu.BlockSpec((STREAMED,), lambda j: (share * steps + j,))]
      * len(y_stats),
    )(*y_refs)

  shared = lambda a: plgpu.SMEM((groups, HELD, *a.shape[1:]), a.dtype)
  outs = plgpu.kernel(
    entry,
    out_type=[jax.ShapeDtypeStruct((shares, *o.shape), o.dtype) for o in out],
    scratch_types=[
      *map(shared, [*x, *x_stats]),
      plgpu.Barrier(num_arrivals=len(x) + len(x_stats), num_barriers=groups),
    ],
    grid=(shares, n // (groups * HELD)),
    grid_names=('share', 'block'),
    num_threads=groups + 1,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )(*x, *x_stats, *y, *y_stats)
  return vary_like(outs, x[0])
