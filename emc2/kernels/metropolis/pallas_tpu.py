"""The sampler as one TPU kernel: similarities never leave the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2.kernels.metropolis import reference

# A program holds LANES chains and meets TILE columns at a time; TILE is one
# block of counters, and one word keeps the flags of WORD columns.
LANES = 128
TILE = reference.BLOCK
WORD = 32
# Two copies of the rows and of a column tile (the next is fetched meanwhile)
# may take this many of the 16 MiB that a TPU v5e lends one kernel by default.
VMEM_BYTES = 10 * 2**20


def misfit(rows: jax.Array, columns: jax.Array) -> str | None:
  """Why the kernel cannot take these shapes; None where it can."""
  del columns
  if rows.dtype not in (jnp.float32, jnp.bfloat16):
    return f'pallas_tpu takes float32 or bfloat16 rows, got {rows.dtype}.'
  need = 2 * (LANES + TILE) * rows.shape[1] * rows.dtype.itemsize
  if need > VMEM_BYTES:
    return (
      f'pallas_tpu keeps {need} bytes of rows and columns in VMEM for '
      f'width {rows.shape[1]}, over its limit of {VMEM_BYTES}.'
    )
  return None


def _kernel(
    key, beta, rows, columns, position, start,
    counts, stay, last, last_logit, accepted, peak,
    logit, high, flags, count,
    *, tiles: int, total: int, width: int, discard: int, own_steps: bool,
):  # fmt: skip
  """Forward over the tiles, then back: program (row block, visit)."""
  visit = pl.program_id(1)
  tile = jnp.where(visit < tiles, visit, 2 * tiles - 1 - visit)
  half = width // 2
  own = jax.lax.rem(position[...], jnp.full_like(position[...], half))
  steps = functools.partial(
    reference.step_number, own=own, half=half, own_steps=own_steps
  )

  @pl.when(visit == 0)
  def _():
    last_logit[...] = start[...]
    peak[...] = jnp.full_like(peak, -jnp.inf)
    last[...] = jnp.full_like(last, -1)
    accepted[...] = jnp.zeros_like(accepted)

  @pl.when(visit < tiles)
  def _():
    exact = rows.dtype == jnp.float32
    logit[...] = beta[0] * jax.lax.dot_general(
      columns[...],
      rows[...],
      (((1,), (1,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST if exact else None,
      preferred_element_type=jnp.float32,
    )
    low = TILE // 2
    offset = jax.lax.broadcasted_iota(jnp.int32, (low, LANES), 0)
    words = reference.threefry(
      (key[0], key[1]),
      jnp.broadcast_to(position[...], (low, LANES)).astype(jnp.uint32),
      (offset + tile * low).astype(jnp.uint32),
    )
    for i, word in enumerate(words):
      column = offset + (tile * TILE + i * low)
      part = pl.ds(i * low, low)
      h = logit[part, :] + reference.exponential(word)
      apart = column - own
      closed = (apart == 0) | (apart == half) | (column >= width)
      h = jnp.where(closed, -jnp.inf, h)
      high[part, :] = h
      early = jnp.where(steps(column) <= discard, h, -jnp.inf)
      top = jnp.max(early, axis=0, keepdims=True)
      peak[...] = jnp.maximum(peak[...], top)

    def walk(w, now):
      w = w.astype(jnp.int32)
      word = jnp.zeros((1, LANES), jnp.int32)
      for k in range(WORD):
        at = pl.ds(w * WORD + k, 1)
        accept = now < high[at, :]
        now = jnp.where(accept, logit[at, :], now)
        bit = np.uint32(1 << k).astype(np.int32)
        word = word | jnp.where(accept, bit, 0)
      flags[pl.ds(tile * (TILE // WORD) + w, 1), :] = word
      return now

    last_logit[...] = jax.lax.fori_loop(0, TILE // WORD, walk, last_logit[...])

  # `stay` holds the step of the next acceptance on the way back.
  @pl.when(visit == tiles)
  def _():
    stay[...] = jnp.full_like(stay, total)

  @pl.when(visit >= tiles)
  def _():
    def walk(i, carry):
      w = TILE // WORD - 1 - i.astype(jnp.int32)
      following, final, moves = carry
      word = flags[pl.ds(tile * (TILE // WORD) + w, 1), :]
      for k in reversed(range(WORD)):
        column = tile * TILE + w * WORD + k
        accept = (word & np.uint32(1 << k).astype(np.int32)) != 0
        step = steps(column)
        spent = reference.dwell(step, following, discard)
        count[pl.ds(w * WORD + k, 1), :] = jnp.where(accept, spent, 0)
        following = jnp.where(accept, step, following)
        final = jnp.where(accept, jnp.maximum(final, column), final)
        moves = moves + jnp.where(accept & (step >= discard), 1, 0)
      return following, final, moves

    stay[...], last[...], accepted[...] = jax.lax.fori_loop(
      0, TILE // WORD, walk, (stay[...], last[...], accepted[...])
    )
    counts[...] = count[...].T.astype(counts.dtype)

  @pl.when(visit == 2 * tiles - 1)
  def _():
    stay[...] = jnp.maximum(stay[...] - discard, 0)


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
  interpret: bool | pltpu.InterpretParams = False,
) -> reference.Draws:
  """The chains, 128 to a program; ragged ends are padded.

  A program goes over the column tiles twice. Forward: logits of a tile from
  the matrix unit, the words, the walk, and one flag per proposal, 32 to a
  word. Backward: the flags alone give the counts, for a column holds the state
  until the next acceptance. See :func:`emc2.kernels.metropolis.metropolis`.

  Raises:
    NotImplementedError: rows too wide for VMEM, or of another dtype.
  """
  if reason := misfit(rows, columns):
    raise NotImplementedError(reason)
  (n, d), c = rows.shape, columns.shape[0]
  blocks, tiles = pl.cdiv(n, LANES), pl.cdiv(c, TILE)
  extra = blocks * LANES - n
  rows = jnp.pad(rows, ((0, extra), (0, 0)))
  position = jnp.pad(position, (0, extra))[None, :]
  start = jnp.pad(start, (0, extra))[None, :]
  columns = jnp.pad(columns, ((0, tiles * TILE - c), (0, 0)))

  lane = pl.BlockSpec((1, LANES), lambda i, j: (0, i))
  scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
  varying = jax.typeof(rows).manual_axis_type
  shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=varying)
  per_row = lambda dtype: shape((1, blocks * LANES), dtype)
  out = pl.pallas_call(
    functools.partial(
      _kernel,
      tiles=tiles,
      total=c if own_steps else c - 2,
      width=c,
      discard=discard,
      own_steps=own_steps,
    ),
    grid=(blocks, 2 * tiles),
    in_specs=[
      scalar,
      scalar,
      pl.BlockSpec((LANES, d), lambda i, j: (i, 0)),
      pl.BlockSpec((TILE, d), lambda i, j: (jnp.minimum(j, tiles - 1), 0)),
      lane,
      lane,
    ],
    out_specs=[
      # Held at the last tile until the way back begins there.
      pl.BlockSpec(
        (LANES, TILE),
        lambda i, j: (i, jnp.minimum(tiles - 1, 2 * tiles - 1 - j)),
      ),
      *[lane] * 5,
    ],
    out_shape=[
      shape((blocks * LANES, tiles * TILE), jnp.uint16),
      per_row(jnp.int32),
      per_row(jnp.int32),
      per_row(jnp.float32),
      per_row(jnp.int32),
      per_row(jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((TILE, LANES), jnp.float32),
      pltpu.VMEM((TILE, LANES), jnp.float32),
      pltpu.VMEM((tiles * (TILE // WORD), LANES), jnp.int32),
      pltpu.VMEM((TILE, LANES), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='metropolis',
  )(key, beta[None], rows, columns, position, start)
  return reference.Draws(out[0][:n, :c], *[x[0, :n] for x in out[1:]])
