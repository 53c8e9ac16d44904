"""Both products of a Hessian in one pass over the features: for Hopper GPUs.

Tiles of rows come into shared memory through the bulk copy engine, some ahead,
and are read there twice. A warp holds one row in four of a tile, its lanes the
columns: scores are summed across the lanes of a warp, and sums of rows stay in
registers until a block has met its last tile, one set to a block. XLA adds the
sets up.

Nothing is copied for the ragged ends. The last rows and the last columns come
in a tile that begins earlier, where what another tile holds too meets zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import hopper, lowering

_WARPS = 4
_LANES = 32
_VECTOR = 4  # Neighbours that a thread reads at once, at most.
_MIN_FEATURES, _MAX_FEATURES = 32, 4096
_COPIED = 16  # Bytes: the unit of the copy engine.
_SUMS = 64  # Registers of a thread for sums, where that lets rows go together.
_MAX_GROUP = 16  # Rows that go together.
_MAX_ROWS = 256  # Of a tile: no copy has more.
_STAGES = 3  # Tiles in flight; two are enough where one is large.
_TILE_BYTES = 24 * 1024
_SHARED_BYTES = 216 * 1024  # Of 227 KiB; the rest is for barriers.
_BLOCKS = 3  # To a processor, where shared memory lets them.
# Before JAX 0.11 a load takes an index beside its reference, stores need no
# leave to go in pieces, and the interpreter knows no layouts.
_FIRST_INTERFACE = not hasattr(plgpu, 'store')


def dense_unsupported(features, curvature, vector):
  """Why the kernel does not take these arguments, or None."""
  del curvature, vector
  if features.dtype not in (jnp.float32, jnp.bfloat16):
    return f'want float32 or bfloat16, got {features.dtype}.'
  n, d = features.shape
  if n < _WARPS:
    return f'want at least {_WARPS} rows, got {n}.'
  if not _MIN_FEATURES <= d <= _MAX_FEATURES:
    return f'want {_MIN_FEATURES} to {_MAX_FEATURES} features, got {d}.'
  if d * features.dtype.itemsize % _COPIED:
    unit = _COPIED // features.dtype.itemsize
    return f'want features by {unit} as {features.dtype}, got {d}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _plan(n, d, itemsize):
  """Columns of a chunk, chunks, rows of a group and of a tile, and stages."""
  vector = min(_VECTOR, d // _LANES)
  width = _LANES * (1 << vector.bit_length() - 1)
  chunks = pl.cdiv(d, width)
  group = _MAX_GROUP
  while group > _WARPS and (
    group > n or group * chunks * width > _SUMS * _LANES * _WARPS
  ):
    group //= 2
  row = chunks * width * itemsize
  rows = min(_TILE_BYTES // row, _MAX_ROWS, n)
  rows = group * max(1, rows // group)
  stages = _STAGES if (_STAGES + 1) * rows * row <= _SHARED_BYTES else 2
  return width, chunks, group, rows, stages


def _load(ref, index, layout):
  """Loads into registers, in whatever pieces it takes."""
  if layout is None:
    return ref[index]
  if _FIRST_INTERFACE:
    return plgpu.load(ref, index, layout=layout, optimized=False)
  return plgpu.load(ref.at[index], layout=layout, optimized=False)


def _store(ref, index, value):
  """Stores from registers, in whatever pieces it takes."""
  if _FIRST_INTERFACE:
    ref[index] = value
  else:
    plgpu.store(ref.at[index], value, optimized=False)


def _kernel(
  feature_ref,
  curvature_ref,
  vector_ref,
  image_ref,
  score_ref,
  tiles,
  curvatures,
  vectors,
  barriers,
  vector_barrier,
  *,
  group: int,
  steps: int,
  layouts: bool,
):
  """One block meets some tiles, one after the other."""
  (n, d), block = feature_ref.shape, jax.lax.axis_index('block')
  stages, chunks, rows, width = tiles.shape
  shape = (group, width)
  starts = [min(j * width, d - width) for j in range(chunks)]
  layout = across = down = None
  if layouts:
    vector = width // _LANES
    layout = plgpu.Layout.TILED(
      plgpu.Tiling(((_WARPS, width), (vector,))),
      warp_dims=(-3,),
      lane_dims=(-2,),
      vector_dim=-1,
    )
    down, across = layout.reduce((1,)), layout.reduce((0,))
  lay = lambda x: plgpu.layout_cast(x, layout) if layouts else x
  spread = lambda x, axis: lay(jax.lax.broadcast_in_dim(x, shape, [axis]))

  def fetch(step):
    """Starts the copies of a tile."""
    stage, tile = jax.lax.rem(step, stages), block * steps + step
    own = pl.ds(jnp.minimum(tile * rows, n - rows), rows)
    for j, start in enumerate(starts):
      plgpu.copy_gmem_to_smem(
        feature_ref.at[own, pl.ds(start, width)],
        tiles.at[stage, j],
        barriers.at[stage],
      )
    plgpu.copy_gmem_to_smem(
      curvature_ref.at[tile],
      curvatures.at[stage],
      barriers.at[stage],
    )

  plgpu.copy_gmem_to_smem(vector_ref, vectors, vector_barrier)
  for step in range(min(stages, steps)):
    fetch(jnp.int32(step))
  plgpu.barrier_wait(vector_barrier)

  def meet(step, sums):
    stage = jax.lax.rem(step, stages)
    plgpu.barrier_wait(barriers.at[stage])

    def meet_group(i, sums):
      own = pl.ds(i * group, group)
      read = lambda j: _load(
        tiles.at[stage, j], (own, slice(None)), layout
      ).astype(jnp.float32)
      total = lay(jnp.zeros(shape, jnp.float32))
      for j in range(chunks):
        total += read(j) * spread(_load(vectors, j, across), 1)
      scores = jnp.sum(total, axis=1)
      place = (block * steps + step) * rows + i * group
      _store(score_ref, pl.ds(place, group), scores)
      slopes = _load(curvatures.at[stage], own, down) * scores
      slopes = spread(slopes, 0)
      return tuple(x + read(j) * slopes for j, x in enumerate(sums))

    sums = jax.lax.fori_loop(0, rows // group, meet_group, sums)
    # All threads must be done with the stage before it is overwritten.
    plgpu.commit_smem()
    pl.when(step + stages < steps)(lambda: fetch(step + stages))
    return sums

  zeros = lay(jnp.zeros(shape, jnp.float32))
  sums = jax.lax.fori_loop(0, steps, meet, (zeros,) * chunks)
  for j, x in enumerate(sums):
    _store(image_ref, (block, j), jnp.sum(x, axis=0))


def dense(
  features: jax.Array,
  curvature: jax.Array,
  vector: jax.Array,
  *,
  interpret=None,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.dense`."""
  (n, d), itemsize = features.shape, features.dtype.itemsize
  width, chunks, group, rows, stages = _plan(n, d, itemsize)
  count = pl.cdiv(n, rows)
  shared = stages * rows * chunks * width * itemsize + 4 * chunks * width
  blocks = hopper.PROCESSORS * max(1, min(_BLOCKS, _SHARED_BYTES // shared))
  steps = pl.cdiv(count, blocks)
  blocks = pl.cdiv(count, steps)
  # What a tile that begins earlier holds of another has no curvature.
  full, extra = (count - 1) * rows, count * rows - n
  curvature = jnp.concatenate(
    [curvature[:full], jnp.zeros_like(curvature[:extra]), curvature[full:]]
  )
  tiled = jnp.pad(
    curvature.reshape(count, rows),
    ((0, blocks * steps - count), (0, -rows % _LANES)),
  )
  # Nor have columns of the last chunk that the chunk before it has.
  whole, twice = (chunks - 1) * width, chunks * width - d
  table = jnp.concatenate(
    [vector[:whole], jnp.zeros_like(vector[:twice]), vector[whole:]]
  )
  shape = jax.ShapeDtypeStruct
  outs = plgpu.kernel(
    functools.partial(
      _kernel,
      group=group,
      steps=steps,
      layouts=not (interpret and _FIRST_INTERFACE),
    ),
    out_type=[
      shape((blocks, chunks, width), jnp.float32),
      shape((blocks * steps * rows,), jnp.float32),
    ],
    scratch_types=[
      plgpu.SMEM((stages, chunks, rows, width), features.dtype),
      plgpu.SMEM((stages, tiled.shape[1]), jnp.float32),
      plgpu.SMEM((chunks, width), jnp.float32),
      plgpu.Barrier(num_arrivals=chunks + 1, num_barriers=stages),
      plgpu.Barrier(num_arrivals=1),
    ],
    grid=(blocks,),
    grid_names=('block',),
    kernel_name='glm_hvp',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(features, tiled, table.reshape(chunks, width))
  images, scores = hopper.vary_like(outs, features)
  image = jnp.sum(images, axis=0).reshape(-1)
  image = jnp.concatenate([image[:whole], image[whole + twice :]])
  scores = jnp.concatenate([scores[:full], scores[full + extra : full + rows]])
  return image, scores
