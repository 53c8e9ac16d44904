"""All-pairs Riesz potentials and gradients: a kernel for Hopper GPUs.

Each thread keeps some rows in registers, with their sums, and all threads of a
block walk the same columns: a coordinate of a column is one word that a whole
warp reads at once, from the first-level cache. Nothing is ever summed across
threads; where blocks of rows are too few for the chip, parts of the columns go
to blocks of their own.

In three dimensions at exponent 1 a pair takes 12 additions, multiplications and
fused multiply-adds, and one reciprocal square root. The chip makes an eighth as
many of the latter at a time, so the former set the pace.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import lowering
from emc2.kernels.riesz import pair

_THREADS = 128  # Of a warpgroup, which is a block.
_REGISTERS = 96  # A thread's for coordinates and sums; the rest work.
_MAX_ROWS = 4  # A thread's: enough to outweigh the read of a column.
_MAX_DIM = 24
_TILE = 256  # Columns whose sums are added up before all others.
_MIN_COLUMNS = 64  # Fewer do not repay the start of a block.
_PROCESSORS = 132
_BLOCKS = 16 * _PROCESSORS  # Enough to keep all of them evenly busy.


def unsupported(rows, columns, exponent):
  """Why the kernel does not take these arguments, or None."""
  del columns, exponent
  if rows.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
    return f'want float32, bfloat16 or float64, got {rows.dtype}.'
  if rows.shape[-1] > _MAX_DIM:
    return f'want at most {_MAX_DIM} dimensions, got {rows.shape[-1]}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _plan(batch, n, m, k, itemsize):
  """Rows of a thread, columns of a tile, tiles of a block, parts of columns."""
  # Coordinates, the sums over a tile, and those over all tiles.
  words = (3 * k + 2) * itemsize // 4
  most = pl.cdiv(m, _MIN_COLUMNS)
  blocks = lambda rows: batch * pl.cdiv(n, rows * _THREADS)
  rows = _MAX_ROWS
  while rows > 1 and (
    rows * words > _REGISTERS or blocks(rows) * most < 4 * _PROCESSORS
  ):
    rows //= 2
  parts = min(most, pl.cdiv(_BLOCKS, blocks(rows)))
  share = pl.cdiv(m, parts)
  tile = min(_TILE, pl.cdiv(share, _MIN_COLUMNS) * _MIN_COLUMNS)
  steps = pl.cdiv(share, tile)
  return rows, tile, steps, pl.cdiv(m, tile * steps)


def _kernel(x_ref, y_ref, out_ref, *, m, tile, steps, block, exponent, among):
  """Sums of one block of rows over one part of the columns."""
  part, point = jax.lax.axis_index('part'), jax.lax.axis_index('batch')
  first = jax.lax.axis_index('block') * block
  own = pl.ds(first, block)
  k = y_ref.shape[2]
  x = [x_ref[point, c, own] for c in range(k)]
  zeros = (jnp.zeros_like(x[0]),) * (k + 1)

  def meet(j, sums, masked):
    """Adds what column j does."""
    value, *pulls = sums
    apart = [x[c] - y_ref[point, j, c] for c in range(k)]
    r2 = functools.reduce(jnp.add, [d * d for d in apart])
    if masked:
      row = jax.lax.broadcasted_iota(jnp.int32, (block,), 0) + first
      itself = row == j
      r2 = jnp.where(itself, 1.0, r2)
    p, w = pair.terms(r2, jax.lax.rsqrt(r2), exponent)
    if masked:  # The weight is finite, and its difference 0.
      p = jnp.where(itself, 0.0, p)
    return value + p, *[g + w * d for g, d in zip(pulls, apart, strict=True)]

  def step(i, sums):
    start = (part * steps + i) * tile
    end = jnp.clip(m - start, 0, tile)
    spans = [(0, end, False)]
    if among:  # Only where rows and columns are the same, one is oneself.
      low = jnp.clip(first - start, 0, end)
      high = jnp.clip(first + block - start, 0, end)
      spans = [(0, low, False), (low, high, True), (high, end, False)]
    new = zeros
    for low, high, masked in spans:
      body = functools.partial(meet, masked=masked)
      new = jax.lax.fori_loop(start + low, start + high, body, new)
    # Sums of tiles are summed apart, for long sums lose digits.
    return tuple(a + b for a, b in zip(sums, new, strict=True))

  sums = jax.lax.fori_loop(0, steps, step, zeros)
  for c, total in enumerate(sums):
    out_ref[part, point, c, own] = total


def forward(rows, columns, exponent, *, interpret=None):
  """As `reference.forward`."""
  *batch, n, k = rows.shape
  dtype = rows.dtype
  working = jnp.float64 if dtype == jnp.float64 else jnp.float32
  among = columns is None
  x, y = (
    z.reshape(-1, *z.shape[-2:]).astype(working)
    for z in (rows, rows if among else columns)
  )
  num, m = y.shape[:2]
  held, tile, steps, parts = _plan(num, n, m, k, x.dtype.itemsize)
  block = held * _THREADS
  # Rows lie coordinate by coordinate: neighbours are read by neighbours.
  x = jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -n % block), (0, 0))), 1, 2)
  sums = plgpu.kernel(
    functools.partial(
      _kernel,
      m=m,
      tile=tile,
      steps=steps,
      block=block,
      exponent=exponent,
      among=among,
    ),
    out_type=jax.ShapeDtypeStruct((parts, num, k + 1, x.shape[2]), x.dtype),
    grid=(parts, x.shape[2] // block, num),
    grid_names=('part', 'block', 'batch'),  # The last may be long.
    kernel_name='riesz',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )(x, y)
  # The kernel forgets over which mesh axes its arguments vary.
  axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
  sums = jax.lax.pcast(sums, axes, to='varying') if axes else sums
  sums = jnp.sum(sums, axis=0)[..., :n]
  potential = sums[:, 0].reshape(*batch, n)
  gradient = pair.slope(exponent) * jnp.swapaxes(sums[:, 1:], 1, 2)
  return potential.astype(dtype), gradient.reshape(rows.shape).astype(dtype)
