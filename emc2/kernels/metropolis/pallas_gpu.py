"""The sampler as one kernel for Hopper GPUs.

The matrix units take 16 bits. A bfloat16 array goes in as it is; any other is
split into the two bfloat16 numbers that add up to it best, and three of the
four products are summed: a similarity of unit rows then errs by about 2^-16,
against 2^-9 for one bfloat16 and 2^-11 for the units' own TF32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels.metropolis import reference

_PROCESSORS = 132
# Of the 227 KiB that a block may hold; the rest is for barriers and reductions.
_SHARED_BYTES = 216 * 1024
# A tile is one matrix instruction high, two tiles share a range of counters.
_TILE = 64
_WORD = 32  # Flags to a word.
_DEPTH = 64  # Features to a chunk: one row of the widest swizzle.
_STAGES = 4  # Chunks of columns in flight.
_CHAINS = (8, 16, 32, 64)
_UNROLL = 4
# Of two interfaces: before JAX 0.11 a load takes an index beside its reference,
# stores need no leave to go in pieces, and the interpreter knows no layouts and
# no matrix instruction on a transposed operand.
_FIRST_INTERFACE = not hasattr(plgpu, 'store')


def _parts(dtype: Any) -> int:
  return 1 if dtype == jnp.bfloat16 else 2


def _shared_bytes(chains: int, d: int, c: int, dtype: Any) -> int:
  """What a block of so many chains keeps in shared memory."""
  held = _parts(dtype) * 2 * _DEPTH
  chunks = pl.cdiv(d, _DEPTH) * chains + _STAGES * _TILE
  flags = pl.cdiv(c, reference.BLOCK) * (reference.BLOCK // _WORD)
  return held * chunks + 4 * chains * (2 * _TILE + flags)


def _chains(n: int, d: int, c: int, dtype: Any) -> int | None:
  """Chains to a block: few, so that all processors work; None: none fit."""
  fits = [r for r in _CHAINS if _shared_bytes(r, d, c, dtype) <= _SHARED_BYTES]
  enough = [r for r in fits if pl.cdiv(n, r) <= _PROCESSORS]
  return (enough or fits[-1:] or [None])[0]


def misfit(rows: jax.Array, columns: jax.Array) -> str | None:
  """Why the kernel cannot take these shapes; None where it can."""
  (n, d), c = rows.shape, columns.shape[0]
  if _chains(n, d, c, rows.dtype) is None:
    need = _shared_bytes(_CHAINS[0], d, c, rows.dtype)
    return (
      f'pallas_gpu keeps {need} bytes in shared memory for {d} features and '
      f'{c} columns, over its limit of {_SHARED_BYTES}.'
    )
  return None


def _split(x: jax.Array) -> list[jax.Array]:
  """One or two bfloat16 arrays that add up to x."""
  high = x.astype(jnp.bfloat16)
  if _parts(x.dtype) == 1:
    return [high]
  low = x.astype(jnp.float32) - high.astype(jnp.float32)
  return [high, low.astype(jnp.bfloat16)]


def _load(ref: Any, index: Any, layout: Any) -> jax.Array:
  """Loads into registers, in whatever pieces it takes."""
  if layout is None:
    return ref[index]
  if _FIRST_INTERFACE:
    return plgpu.load(ref, index, layout=layout, optimized=False)
  return plgpu.load(ref.at[index], layout=layout, optimized=False)


def _store(ref: Any, index: Any, value: jax.Array) -> None:
  """Stores from registers, in whatever pieces it takes."""
  if _FIRST_INTERFACE:
    ref[index] = value
  else:
    plgpu.store(ref.at[index], value, optimized=False)


def _kernel(
  key,
  beta,
  position,
  start,
  *refs,
  parts: int,
  blocks: int,
  total: int,
  width: int,
  discard: int,
  own_steps: bool,
  layouts: bool,
):
  """One warpgroup walks `chains` rows over all columns, and back."""
  refs = list(refs)
  take = lambda k: [refs.pop(0) for _ in range(k)]
  rows, columns = take(parts), take(parts)
  counts, stay, last, last_logit, accepted, peak = take(6)
  held, chunks = take(parts), take(parts)
  logit, high, flags, held_barrier, chunk_barriers = refs
  depth, chains, _ = held[0].shape
  half, low = width // 2, reference.BLOCK // 2
  mine = pl.ds(jax.lax.axis_index('rows') * chains, chains)
  stages = chunks[0].shape[0]
  reads = 2 * blocks * depth
  tile_shape = (_TILE, chains)

  # All vectors over the chains lie as the matrix instruction lays its columns.
  layout = plgpu.Layout.WGMMA.reduce(0) if layouts else None
  lay = lambda x: plgpu.layout_cast(x, layout) if layouts else x
  read = functools.partial(_load, layout=layout)
  along = lambda x: jax.lax.broadcast_in_dim(x, tile_shape, [1])
  full = lambda value, dtype: lay(jnp.full((chains,), value, dtype))

  def fetch(number):
    """Starts the copy of chunk `number`, counted over tiles and depth."""
    stage = jax.lax.rem(number, stages)
    tile, k = jax.lax.div(number, depth), jax.lax.rem(number, depth)
    for source, target in zip(columns, chunks, strict=True):
      plgpu.copy_gmem_to_smem(
        source.at[pl.ds(tile * _TILE, _TILE), pl.ds(k * _DEPTH, _DEPTH)],
        target.at[stage],
        chunk_barriers.at[stage],
      )

  for k in range(depth):
    for source, target in zip(rows, held, strict=True):
      plgpu.copy_gmem_to_smem(
        source.at[mine, pl.ds(k * _DEPTH, _DEPTH)],
        target.at[k],
        held_barrier,
      )
  for number in range(min(stages, reads)):
    fetch(jnp.int32(number))
  place = read(position, mine)
  own = jax.lax.rem(place, full(half, jnp.int32))
  steps = functools.partial(
    reference.step_number, half=half, own_steps=own_steps
  )
  plgpu.barrier_wait(held_barrier)

  def similarity(tile):
    """Columns of a tile times the rows, (tile, chains), in registers."""

    def multiply(acc):
      total = jnp.zeros(tile_shape, jnp.float32)
      for k in range(depth):
        number = tile * depth + k
        stage = jax.lax.rem(number, stages)
        plgpu.barrier_wait(chunk_barriers.at[stage])
        for i, x in enumerate(chunks):
          for y in held[: parts - i]:
            if layouts:
              plgpu.wgmma(acc, x.at[stage], y.at[k].transpose((1, 0)))
            else:
              total += jnp.dot(
                x[stage], y[k].T, preferred_element_type=jnp.float32
              )
        plgpu.wgmma_wait(0)
        # All threads must be done with the stage before it is overwritten.
        plgpu.commit_smem()
        pl.when(number + stages < reads)(lambda n=number: fetch(n + stages))
      return acc[...] if layouts else total

    return pl.run_scoped(multiply, plgpu.ACC(tile_shape, jnp.float32))

  def walk_word(base, now):
    """Walks the columns of one word, from row `base` of the tile on."""

    def some(i, carry):
      now, word = carry
      for k in range(_UNROLL):
        at = i.astype(jnp.int32) * _UNROLL + k
        accept = now < read(high, base + at)
        now = jnp.where(accept, read(logit, base + at), now)
        bit = jax.lax.shift_left(jnp.int32(1), at)
        word = word | jnp.where(accept, bit, 0)
      return now, word

    return jax.lax.fori_loop(
      0, _WORD // _UNROLL, some, (now, full(0, jnp.int32))
    )

  def forward(block, carry):
    now, top = carry
    block = block.astype(jnp.int32)
    offset = plgpu.broadcasted_iota(
      jnp.int32, tile_shape, 0, layout=plgpu.Layout.WGMMA if layouts else None
    )
    words = reference.threefry(
      (key[0], key[1]),
      along(place).astype(jnp.uint32),
      (offset + block * low).astype(jnp.uint32),
    )
    for i, word in enumerate(words):
      tile = 2 * block + i
      column = offset + tile * _TILE
      l = beta[0] * similarity(tile)
      h = l + reference.exponential(word)
      apart = column - along(own)
      closed = (apart == 0) | (apart == half) | (column >= width)
      h = jnp.where(closed, -jnp.inf, h)
      early = jnp.where(steps(column, along(own)) <= discard, h, -jnp.inf)
      top = jnp.maximum(top, jnp.max(early, axis=0))
      _store(logit, ..., l)
      _store(high, ..., h)
      for w in range(_TILE // _WORD):
        now, flag = walk_word(w * _WORD, now)
        _store(flags, tile * (_TILE // _WORD) + w, flag)
    return now, top

  # What is read from outside varies over the axes of a shard_map, what is
  # computed here does not, and a loop wants one of the two: hence an operation.
  low_end = full(-jnp.inf, jnp.float32)
  now, top = jax.lax.fori_loop(
    0, blocks, forward, (jnp.maximum(read(start, mine), low_end), low_end)
  )
  _store(last_logit, mine, now)
  _store(peak, mine, top)

  def backward(i, carry):
    w = blocks * (reference.BLOCK // _WORD) - 1 - i.astype(jnp.int32)
    word = read(flags, w)

    def pair(j, carry):
      following, final, moves = carry
      j = _WORD // 2 - 1 - j.astype(jnp.int32)
      packed = full(0, jnp.int32)
      for odd in (1, 0):
        column = w * _WORD + 2 * j + odd
        accept = (word & jax.lax.shift_left(jnp.int32(1), 2 * j + odd)) != 0
        step = steps(column, own)
        spent = reference.dwell(step, following, discard)
        packed = (packed << 16) | jnp.where(accept, spent, 0)
        following = jnp.where(accept, step, following)
        final = jnp.where(accept, jnp.maximum(final, column), final)
        moves = moves + jnp.where(accept & (step >= discard), 1, 0)
      _store(counts, (w * (_WORD // 2) + j, mine), packed)
      return following, final, moves

    return jax.lax.fori_loop(0, _WORD // 2, pair, carry)

  following, final, moves = jax.lax.fori_loop(
    0,
    blocks * (reference.BLOCK // _WORD),
    backward,
    (full(total, jnp.int32), full(-1, jnp.int32), full(0, jnp.int32)),
  )
  _store(stay, mine, jnp.maximum(following - discard, 0))
  _store(last, mine, final)
  _store(accepted, mine, moves)


def metropolis(
  key: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  position: jax.Array,
  start: jax.Array,
  beta: jax.Array,
  *,
  discard: int,
  own_steps: bool,
  interpret: Any = None,
) -> reference.Draws:
  """The chains, 8 to 64 to a block of one warpgroup; ragged ends are padded.

  A block streams the columns through the matrix unit, 64 at a time, adds the
  words, lays logits and perturbed logits in shared memory, walks them, and
  keeps one flag per proposal. The way back over the flags gives the counts, two
  columns to a word. See :func:`emc2.kernels.metropolis.metropolis`.

  Raises:
    NotImplementedError: rows or columns too many for shared memory.
  """
  if reason := misfit(rows, columns):
    raise NotImplementedError(reason)
  (n, d), c = rows.shape, columns.shape[0]
  chains = _chains(n, d, c, rows.dtype)
  extra, parts = -n % chains, _parts(rows.dtype)
  blocks, depth = pl.cdiv(c, reference.BLOCK), pl.cdiv(d, _DEPTH)
  stages = min(_STAGES, 2 * blocks * depth)
  wide = depth * _DEPTH - d
  xs = _split(jnp.pad(rows, ((0, extra), (0, wide))))
  ys = _split(jnp.pad(columns, ((0, blocks * reference.BLOCK - c), (0, wide))))
  shape = jax.ShapeDtypeStruct
  per_row = functools.partial(shape, (n + extra,))
  # As the matrix unit wants its operands to lie.
  operand = functools.partial(
    plgpu.SMEM,
    dtype=jnp.bfloat16,
    transforms=(
      plgpu.TilingTransform((8, _DEPTH)),
      plgpu.SwizzleTransform(2 * _DEPTH),
    ),
  )
  pairs, *out = plgpu.kernel(
    functools.partial(
      _kernel,
      parts=parts,
      blocks=blocks,
      total=c if own_steps else c - 2,
      width=c,
      discard=discard,
      own_steps=own_steps,
      layouts=not (interpret and _FIRST_INTERFACE),
    ),
    out_type=[
      shape((blocks * reference.BLOCK // 2, n + extra), jnp.int32),
      per_row(jnp.int32),
      per_row(jnp.int32),
      per_row(jnp.float32),
      per_row(jnp.int32),
      per_row(jnp.float32),
    ],
    scratch_types=[
      *[operand((depth, chains, _DEPTH))] * parts,
      *[operand((stages, _TILE, _DEPTH))] * parts,
      plgpu.SMEM((_TILE, chains), jnp.float32),
      plgpu.SMEM((_TILE, chains), jnp.float32),
      plgpu.SMEM((blocks * reference.BLOCK // _WORD, chains), jnp.int32),
      plgpu.Barrier(num_arrivals=parts * depth),
      plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
    ],
    grid=((n + extra) // chains,),
    grid_names=('rows',),
    kernel_name='metropolis',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(
    key,
    beta[None],
    jnp.pad(position, (0, extra)),
    jnp.pad(start, (0, extra)),
    *xs,
    *ys,
  )
  # (c / 2, n) words to (c / 2, n, 2) counts to (n, c).
  counts = jax.lax.bitcast_convert_type(pairs, jnp.uint16)
  counts = counts.transpose(1, 0, 2).reshape(n + extra, -1)
  draws = reference.Draws(counts[:n, :c], *[x[:n] for x in out])
  # The kernel forgets over which axes of a shard_map its rows vary.
  axes = tuple(sorted(jax.typeof(rows).manual_axis_type.varying))
  return jax.lax.pcast(draws, axes, to='varying') if axes else draws
