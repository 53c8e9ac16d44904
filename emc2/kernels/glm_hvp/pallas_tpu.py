"""Both products of a Hessian in one pass over the features: TPU kernels.

A tile of rows lies in VMEM while both products are made of it, so the memory
is read once, and of two operations to a number the vector unit makes enough:
the matrix unit, which keeps float32 in six passes, would be slower than the
memory.

XLA stores a matrix whose features do not fill lanes turned, and would copy it
for a kernel that wants it otherwise; so there are two. With features along
sublanes and rows along lanes, scores lie as they are stored. With features
along lanes, the sums of 128 rows are turned, and their slopes turned back.

Padded-sparse rows are laid out as dense tiles there, features along sublanes.
Lanes have no addresses of their own, so an entry finds its place by comparing
its id with all features: three operations each, which bounds their number.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_SUBLANES = 8
_TILE_BYTES = 2**22  # Of features; two are there, of 16 MiB in the least chip.
_PARTS = 2  # Chips of some generations have two cores.
_TURNED_BYTES = 2**21  # Of a tile with its features along sublanes.
_ROWS = 1024  # Of a tile of padded-sparse rows.
_DEPTH = 64  # Features along sublanes that are met at once.
# Along sublanes: each takes a register's 128 lanes of its sums.
_MAX_FEATURES = 4096
_MAX_WIDTH = 256  # Entries of a padded-sparse row.


def dense_unsupported(features, curvature, vector):
  """Why the kernel does not take these arguments, or None."""
  del curvature, vector
  if features.dtype not in (jnp.float32, jnp.bfloat16):
    return f'want float32 or bfloat16, got {features.dtype}.'
  d, itemsize = features.shape[1], features.dtype.itemsize
  most = _TILE_BYTES // (_LANES * itemsize)
  if d > most:
    return f'want at most {most} features of {features.dtype}, got {d}.'
  return None


def padded_unsupported(ids, values, vector):
  """Why the kernel does not take these arguments, or None."""
  if ids.dtype not in (jnp.uint16, jnp.int32, jnp.uint32):
    return f'want ids of uint16, int32 or uint32, got {ids.dtype}.'
  for x in (vector, values):
    if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
      return f'want float32 or bfloat16, got {x.dtype}.'
  if vector.shape[0] > _MAX_FEATURES:
    return f'want at most {_MAX_FEATURES} features, got {vector.shape[0]}.'
  if ids.shape[0] > _MAX_WIDTH:
    return f'want at most {_MAX_WIDTH} entries of a row, got {ids.shape[0]}.'
  return None


def _up(n, multiple):
  return pl.cdiv(n, multiple) * multiple


def _plan(n, rows):
  """Rows of a tile, about as many as asked; parts; and tiles of a part."""
  rows = min(max(rows // _LANES, 1) * _LANES, _up(n, _LANES))
  tiles = pl.cdiv(n, rows)
  parts = min(_PARTS, tiles)
  return rows, parts, pl.cdiv(tiles, parts)


def _fold(x):
  """Sums of rows, eight apart."""
  return jnp.sum(x.reshape(-1, _SUBLANES, x.shape[1]), axis=0)


def _mask_lanes(x, left):
  """Keeps the first rows; beyond its ends, an array holds anything."""
  rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  return jnp.where(rows < left, x, 0.0)


def _spread(vector, depth):
  """Entries along sublanes, on all lanes."""
  vector = jnp.pad(vector, (0, depth - vector.shape[0]))
  return jnp.broadcast_to(vector[:, None], (depth, _LANES))


def _is_turned(n, d):
  """Whether XLA lays rows of features along lanes, which wastes less."""
  wasted = _up(d, _LANES) * _up(n, _SUBLANES)
  return d <= _MAX_FEATURES and _up(d, _SUBLANES) * _up(n, _LANES) < wasted


def _begin(image_ref, rows, n):
  """Clears a part's sums; the tile's first row, and if any tile ends early."""
  part, step = pl.program_id(0), pl.program_id(1)

  @pl.when(step == 0)
  def _():
    image_ref[...] = jnp.zeros_like(image_ref)

  _, parts, steps = _plan(n, rows)
  return (part * steps + step) * rows, parts * steps * rows > n


def _dense_kernel(
  feature_ref, curvature_ref, vector_ref, image_ref, score_ref, *, shape
):
  (n, d), (rows, width) = shape, feature_ref.shape
  first, ragged = _begin(image_ref, rows, n)
  columns = range(0, width, _LANES)
  square = (_LANES, _LANES)

  def meet(i, _):
    own = pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES)
    # Beyond its ends, the array holds anything.
    left = n - first - i * _LANES

    def read(start):
      x = feature_ref[own, pl.ds(start, _LANES)].astype(jnp.float32)
      if start + _LANES > d:
        lanes = jax.lax.broadcasted_iota(jnp.int32, square, 1)
        x = jnp.where(lanes < d - start, x, 0.0)
      return x

    sums = jnp.zeros(square, jnp.float32)
    for start in columns:
      sums += read(start) * vector_ref[:, pl.ds(start, _LANES)]
    scores = jnp.sum(sums.T, axis=0, keepdims=True)
    score_ref[:, own] = scores
    slopes = jnp.broadcast_to(curvature_ref[:, own] * scores, square).T
    inside = jax.lax.broadcasted_iota(jnp.int32, square, 0) < left
    for start in columns:
      terms = read(start) * slopes
      if ragged:
        terms = jnp.where(inside, terms, 0.0)
      image_ref[:, pl.ds(start, _LANES)] += _fold(terms)

  jax.lax.fori_loop(0, rows // _LANES, meet, None)


def _turned_kernel(
  feature_ref, curvature_ref, vector_ref, image_ref, score_ref, *, shape
):
  (n, d), (depth, rows) = shape, feature_ref.shape
  first, ragged = _begin(image_ref, rows, n)
  chunks = [pl.ds(i, min(_DEPTH, depth - i)) for i in range(0, depth, _DEPTH)]

  def meet(i, _):
    own = pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES)
    within = functools.partial(_mask_lanes, left=n - first - i * _LANES)

    def read(chunk):
      x = feature_ref[chunk, own].astype(jnp.float32)
      if chunk.start + chunk.size > d:
        features = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        x = jnp.where(features < d - chunk.start, x, 0.0)
      return x

    sums = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
    for chunk in chunks:
      sums += _fold(read(chunk) * vector_ref[chunk])
    scores = jnp.sum(sums, axis=0, keepdims=True)
    score_ref[:, own] = scores
    slopes = curvature_ref[:, own] * scores
    for chunk in chunks:
      terms = read(chunk) * slopes
      image_ref[chunk] += within(terms) if ragged else terms

  jax.lax.fori_loop(0, rows // _LANES, meet, None)


def _padded_kernel(*refs, shape, weighted):
  id_ref, *refs = refs
  value_ref = refs.pop(0) if weighted else None
  curvature_ref, vector_ref, image_ref, score_ref, dense_ref = refs
  (w, n), rows, depth = shape, id_ref.shape[1], dense_ref.shape[0]
  first, _ = _begin(image_ref, rows, n)
  chunk = lambda j: pl.ds(pl.multiple_of(j * _DEPTH, _DEPTH), _DEPTH)

  def meet(i, _):
    own = pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES)
    within = functools.partial(_mask_lanes, left=n - first - i * _LANES)
    ids = id_ref[:, own].astype(jnp.int32)
    if weighted:
      values = within(value_ref[:, own].astype(jnp.float32))

    def lay(j, sums):
      features = jax.lax.broadcasted_iota(jnp.int32, (_DEPTH, _LANES), 0)
      features += j * _DEPTH
      x = jnp.zeros((_DEPTH, _LANES), jnp.float32)
      for k in range(w):
        value = values[k : k + 1] if weighted else 1.0
        x += jnp.where(ids[k : k + 1] == features, value, 0.0)
      dense_ref[chunk(j)] = x
      return sums + _fold(x * vector_ref[chunk(j)])

    sums = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
    sums = jax.lax.fori_loop(0, depth // _DEPTH, lay, sums)
    scores = jnp.sum(sums, axis=0, keepdims=True)
    score_ref[:, own] = scores
    slopes = within(curvature_ref[:, own] * scores)

    def add(j, _):
      image_ref[chunk(j)] += dense_ref[chunk(j)] * slopes

    jax.lax.fori_loop(0, depth // _DEPTH, add, None)

  jax.lax.fori_loop(0, rows // _LANES, meet, None)


def _call(
  kernel, arrays, stats, *, n, plan, image, cost, name, interpret, scratch=()
):
  """Runs a kernel on all tiles.

  Args:
    kernel: of the tiles, the image and the scores.
    arrays: what has rows along lanes, each with the height of a tile; None
      where it has them along sublanes.
    stats: what each tile gets as a whole.
    n: rows.
    plan: of `_plan`.
    image: shape of the sums of a part.
    cost: operations and bytes.
    name: of the kernel.
    interpret: static.
    scratch: shapes.

  Returns:
    The sums, (parts, *image), and scores (n,).
  """
  rows, parts, steps = plan
  last = pl.cdiv(n, rows) - 1
  shape = functools.partial(
    jax.ShapeDtypeStruct,
    dtype=jnp.float32,
    manual_axis_type=jax.typeof(arrays[0][0]).manual_axis_type,
  )

  def spec(height):
    # A part may have a tile less, and then meets its last one again, in vain.
    at = lambda p, s: jnp.minimum(p * steps + s, last)
    if height is None:
      return pl.BlockSpec((rows, image[1]), lambda p, s: (at(p, s), 0))
    return pl.BlockSpec((height, rows), lambda p, s: (0, at(p, s)))

  images, scores = pl.pallas_call(
    kernel,
    grid=(parts, steps),
    in_specs=[
      *(spec(height) for _, height in arrays),
      *(pl.BlockSpec(x.shape, lambda p, s: (0, 0)) for x in stats),
    ],
    out_specs=[
      pl.BlockSpec((None, *image), lambda p, s: (p, 0, 0)),
      pl.BlockSpec((1, rows), lambda p, s: (0, p * steps + s)),
    ],
    out_shape=[shape((parts, *image)), shape((1, parts * steps * rows))],
    scratch_shapes=list(scratch),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=cost[0], bytes_accessed=cost[1], transcendentals=0
    ),
    interpret=interpret,
    name=name,
  )(*(x for x, _ in arrays), *stats)
  return images, scores[0, :n]


def dense(
  features: jax.Array,
  curvature: jax.Array,
  vector: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.dense`."""
  (n, d), itemsize = features.shape, features.dtype.itemsize
  call = functools.partial(
    _call,
    n=n,
    cost=(4 * n * d, n * d * itemsize + 8 * n),
    name='glm_hvp',
    interpret=interpret,
  )
  if _is_turned(n, d):
    depth = _up(d, 4 * _SUBLANES // itemsize)
    image, scores = call(
      functools.partial(_turned_kernel, shape=(n, d)),
      [(features.T, depth), (curvature[None], 1)],
      [_spread(vector, depth)],
      plan=_plan(n, _TURNED_BYTES // (depth * itemsize)),
      image=(depth, _LANES),
    )
    return jnp.sum(image, axis=(0, 2))[:d], scores
  width = _up(d, _LANES)
  image, scores = call(
    functools.partial(_dense_kernel, shape=(n, d)),
    [(features, None), (curvature[None], 1)],
    [jnp.pad(vector, (0, width - d))[None]],
    plan=_plan(n, _TILE_BYTES // (width * itemsize)),
    image=(_SUBLANES, width),
  )
  return jnp.sum(image, axis=(0, 1))[:d], scores


def padded(
  ids: jax.Array,
  values: jax.Array | None,
  curvature: jax.Array,
  vector: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As `reference.padded`."""
  (w, n), d = ids.shape, vector.shape[0]
  depth = _up(d, _DEPTH)
  tables = [ids] if values is None else [ids, values]
  image, scores = _call(
    functools.partial(
      _padded_kernel, shape=(w, n), weighted=values is not None
    ),
    [*((x, w) for x in tables), (curvature[None], 1)],
    [_spread(vector, depth)],
    n=n,
    plan=_plan(n, _ROWS),
    image=(depth, _LANES),
    cost=(
      (3 * w + 4) * n * depth,
      n * (8 + w * sum(x.dtype.itemsize for x in tables)),
    ),
    name='glm_hvp_padded',
    interpret=interpret,
    scratch=[pltpu.VMEM((depth, _LANES), jnp.float32)],
  )
  return jnp.sum(image, axis=(0, 2))[:d], scores
