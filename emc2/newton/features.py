r"""Feature matrices A (n, d), dense or sparse, and their products.

A sparse matrix is laid out for gathers, once for :math:`A v` and once for
:math:`A^\top t`, as scatters are slow on every kind of chip. Sums of like
length share a bucket, whose k-th ids lie side by side, so that a product is,
for each bucket, a sum of a few gathers of whole arrays. A sum that is longer
than `max_width` is cut into pieces, and these are summed in the same way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import csr
from emc2 import mesh as meshes
from emc2.kernels import glm_hvp, lowering

MAX_WIDTH = 16
"""How many entries one piece of a sum has at most."""

_CHUNK = 4096
"""How many entries of columns are taken out at once."""

_BUCKET_COST = 8192
"""What one more bucket costs, in gathered entries."""


class Bucket(NamedTuple):
  """`count` sums over `width` entries of a vector each."""

  ids: jax.Array  # (width, count), unsigned; the vector's length is padding.
  values: jax.Array | None  # (width, count), 0 for padding; None if all are 1.


class Sums(NamedTuple):
  """Sums over entries of a vector, the long ones first."""

  pieces: tuple[Bucket, ...]  # Of the long sums.
  joined: 'Sums | None'  # The long sums over their pieces; None without.
  whole: tuple[Bucket, ...]  # The other sums.
  order: jax.Array | None  # (num_sums,): where each one stands; None if there.
  spans: jax.Array | None  # (2, num_long): first piece of each, and how many.


class Dense(NamedTuple):
  """A matrix as it stands."""

  array: jax.Array  # (n, d).


class Sparse(NamedTuple):
  """A matrix by its entries."""

  rows: Sums  # n sums over entries of v, for A v.
  columns: Sums  # d sums over entries of t, for A't.


def matvec(features: Dense | Sparse, v: jax.Array) -> jax.Array:
  """A v.

  Args:
    features: A, (n, d).
    v: (d,), of the dtype of A.

  Returns:
    (n,).

  Examples:
    >>> matvec(Dense(jnp.array([[1.0, 2.0]])), jnp.array([3.0, 4.0]))
    Array([11.], dtype=float32)
  """
  if isinstance(features, Dense):
    return jnp.matmul(features.array, v, precision='highest')
  if not _lead(features):
    return _sums(features.rows, v)
  v = v.reshape(_lead(features)[1], -1)
  parts = jax.vmap(jax.vmap(_sums), (0, None))(features.rows, v)
  return jnp.sum(parts, axis=1).reshape(-1)


def rmatvec(features: Dense | Sparse, t: jax.Array) -> jax.Array:
  """A't.

  Args:
    features: A, (n, d).
    t: (n,), of the dtype of A.

  Returns:
    (d,).

  Examples:
    >>> rmatvec(Dense(jnp.array([[1.0, 2.0]])), jnp.array([3.0]))
    Array([3., 6.], dtype=float32)
  """
  if isinstance(features, Dense):
    return jnp.matmul(t, features.array, precision='highest')
  if not _lead(features):
    return _sums(features.columns, t)
  t = t.reshape(_lead(features)[0], -1)
  each = jax.vmap(jax.vmap(_sums, (0, None)))
  return jnp.sum(each(features.columns, t), axis=0).reshape(-1)


def columns(features: Dense | Sparse, ids: jax.Array) -> jax.Array:
  """Some columns of A; of a sparse one, at the cost of their entries.

  Args:
    features: A, (n, d), not in blocks.
    ids: (m,) integers in [0, d).

  Returns:
    (n, m), of float32 where all entries are 1.

  Examples:
    >>> columns(Dense(jnp.array([[1.0, 2.0]])), jnp.array([1]))
    Array([[2.]], dtype=float32)
  """
  if isinstance(features, Dense):
    return features.array.at[:, ids].get(mode='promise_in_bounds')
  sums = features.columns
  buckets = (*sums.pieces, *sums.whole)
  flat = lambda parts: jnp.concatenate([part.reshape(-1) for part in parts])
  entries = flat([bucket.ids for bucket in buckets])
  values = buckets[0].values
  if values is not None:
    values = flat([bucket.values for bucket in buckets])

  num_rows = _num_sums(features.rows)
  dtype = jnp.float32 if values is None else values.dtype
  out = jnp.zeros((num_rows, ids.size), dtype)
  if not entries.size:
    return out

  # Where the chosen columns lie; pieces and whole columns are numbered on.
  widths, counts = np.array([bucket.ids.shape for bucket in buckets]).T
  ends, sizes = np.cumsum(counts), widths * counts
  skipped = np.cumsum(sizes) - sizes - (ends - counts)
  rank = ids if sums.order is None else _take(sums.order, ids)
  rank = rank.astype(jnp.int32)
  num_pieces = sum(bucket.ids.shape[1] for bucket in sums.pieces)
  first, across = rank + num_pieces, jnp.ones_like(rank)
  if sums.spans is not None:
    num_long = sums.spans.shape[1]
    first, spans = first - num_long, sums.spans.T.at[rank].get(mode='clip')
    is_long = rank < num_long
    first = jnp.where(is_long, spans[:, 0], first)
    across = jnp.where(is_long, spans[:, 1], across)
  table = jnp.asarray(np.stack([widths, counts, skipped], 1), jnp.int32)
  of = jnp.searchsorted(jnp.asarray(ends, jnp.int32), first, side='right')
  width, stride, skip = table[of].T
  stops = jnp.cumsum(width * across)

  def fill(carry):
    start, out = carry
    entry = start + jnp.arange(_CHUNK, dtype=jnp.int32)
    column = jnp.searchsorted(stops, entry, side='right')
    is_one = column < ids.size
    column = jnp.minimum(column, ids.size - 1)
    within = entry - stops[column] + (width * across)[column]
    turn, piece = jnp.divmod(within, across[column])
    where = (first + skip)[column] + turn * stride[column] + piece
    where = jnp.where(is_one, where, 0)
    row = jnp.where(is_one, _take(entries, where).astype(jnp.int32), num_rows)
    value = 1 if values is None else _take(values, where)
    return start + _CHUNK, out.at[row, column].set(value, mode='drop')

  start, out, stops, _ = meshes.vary_alike(
    jnp.zeros([], jnp.int32), out, stops, entries
  )
  return jax.lax.while_loop(
    lambda carry: carry[0] < stops[-1], fill, (start, out)
  )[1]


def hvp(
  features: Dense | Sparse, curvature: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A'(c * (A v)), and A v.

  A dense matrix is read once, where it is large enough for that to pay. So is a
  sparse one on a TPU, if its rows are not cut; else it is gathered from twice.

  Args:
    features: A, (n, d).
    curvature: c, (n,).
    v: (d,).

  Returns:
    (d,) and (n,).

  Examples:
    >>> features = Dense(jnp.array([[1.0, 2.0]]))
    >>> hvp(features, jnp.array([0.5]), jnp.array([1.0, 1.0]))
    (Array([1.5, 3. ], dtype=float32), Array([3.], dtype=float32))
  """
  if isinstance(features, Dense):
    found = glm_hvp.glm_hvp(features.array, curvature, v)
    return found.image, found.scores
  if not _suits_tpu(features, v):
    return _hvp_by_gathers(features, curvature, v)
  return jax.lax.platform_dependent(
    features, curvature, v, tpu=_hvp_on_tpu, default=_hvp_by_gathers
  )


def _hvp_by_gathers(features, curvature, v):
  scores = matvec(features, v)
  return rmatvec(features, curvature * scores), scores


def _suits_tpu(features: Sparse, v: jax.Array) -> bool:
  """Whether a kernel takes each bucket of rows; an empty one needs none."""
  rows = features.rows
  if _lead(features) or rows.pieces or rows.order is not None:
    return False
  return lowering.is_whole() and all(
    glm_hvp.tpu_takes_padded(bucket.ids, bucket.values, v)
    for bucket in rows.whole
    if bucket.ids.shape[0]
  )


def _hvp_on_tpu(features, curvature, v):
  image, scores, start = jnp.zeros_like(v), [], 0
  for bucket in features.rows.whole:
    width, count = bucket.ids.shape
    own = curvature[start : start + count]
    start += count
    if not width:
      scores.append(jnp.zeros_like(own))
      continue
    found = glm_hvp.glm_hvp_padded(
      bucket.ids, bucket.values, own, v, implementation='pallas_tpu'
    )
    image += found.image
    scores.append(found.scores)
  return image, jnp.concatenate(scores)


def own_block(features: Dense | Sparse) -> Dense | Sparse:
  """Of a device's shard of a matrix in blocks, the block.

  Inside :func:`jax.shard_map` a block has leading axes (1, 1), which the
  products would take for those of a matrix of one block.
  """
  if isinstance(features, Dense) or not _lead(features):
    return features
  return jax.tree.map(lambda x: x[0, 0], features)


def num_blocks(features: Dense | Sparse) -> tuple[int, int] | None:
  """(P, Q) of a sparse matrix; None for a dense one, which splits anyhow."""
  if isinstance(features, Dense):
    return None
  return _lead(features) or (1, 1)


def squared(features: Dense | Sparse) -> Dense | Sparse:
  """The matrix of the squares of the entries."""
  is_value = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return jax.tree.map(lambda x: x * x if is_value(x) else x, features)


def _lead(features: Sparse) -> tuple[int, ...]:
  """(P, Q) of a matrix in blocks, else ()."""
  rows = features.rows
  return (*rows.pieces, *rows.whole)[0].ids.shape[:-2]


def _sums(sums: Sums, vector: jax.Array) -> jax.Array:
  """All sums over entries of a vector, (num_sums,)."""
  # Else XLA takes the widening of the ids out of the caller's loop, and each
  # round reads twice as much.
  sums, vector = jax.lax.optimization_barrier((sums, vector))
  padded = jnp.pad(vector, (0, 1))
  parts = [_bucket(bucket, padded) for bucket in sums.whole]
  if sums.joined is not None:
    pieces = [_bucket(bucket, padded) for bucket in sums.pieces]
    parts = [_sums(sums.joined, jnp.concatenate(pieces)), *parts]
  out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
  return out if sums.order is None else _take(out, sums.order)


def _bucket(bucket: Bucket, padded: jax.Array) -> jax.Array:
  """(count,): one gather for each place in the sums."""
  width, count = bucket.ids.shape
  if width == 0:
    return jnp.zeros(count, padded.dtype)
  terms = []
  for k in range(width):
    term = _take(padded, bucket.ids[k])
    terms.append(term if bucket.values is None else term * bucket.values[k])
  return sum(terms[1:], terms[0])


def _num_sums(sums: Sums) -> int:
  """How many sums there are."""
  num_long = 0 if sums.spans is None else sums.spans.shape[-1]
  return num_long + sum(bucket.ids.shape[-1] for bucket in sums.whole)


def _take(x: jax.Array, ids: jax.Array) -> jax.Array:
  """x[ids]; all lie inside."""
  return x.at[ids].get(mode='promise_in_bounds')


def from_dense(
  array: np.ndarray,
  *,
  dtype: jax.typing.DTypeLike = np.float32,
  num_row_blocks: int = 1,
  num_column_blocks: int = 1,
) -> tuple[Dense, np.ndarray]:
  """Pads a matrix (n, d) to multiples of P and Q.

  Args:
    array: A.
    dtype: To be computed in.
    num_row_blocks: P.
    num_column_blocks: Q.

  Returns:
    The matrix, and the number of each row, n for padding.

  Raises:
    ValueError: If an entry is not finite.
  """
  array = np.asarray(array)
  with np.errstate(over='ignore'):
    array = array.astype(dtype)
  bad = np.argwhere(~np.isfinite(array))
  if len(bad):
    row, column = bad[0]
    raise ValueError(
      f'features must be finite, got {array[row, column]} in row {row}.'
    )
  num_rows, num_columns = array.shape
  padding = (
    (0, -num_rows % num_row_blocks),
    (0, -num_columns % num_column_blocks),
  )
  padded = jnp.asarray(np.pad(array, padding))
  return Dense(padded), np.minimum(np.arange(len(padded)), num_rows)


def from_csr(
  matrix: Any,
  *,
  dtype: jax.typing.DTypeLike = np.float32,
  num_row_blocks: int = 1,
  num_column_blocks: int = 1,
  max_width: int = MAX_WIDTH,
) -> tuple[Sparse, np.ndarray]:
  """Lays out a sparse matrix on the host.

  Args:
    matrix: Has `indptr`, `indices`, `data` and `shape` (n, d), as a
      `scipy.sparse.csr_array` does; what it lists twice is added up.
    dtype: Of the values.
    num_row_blocks: P; rows are padded to a multiple of it.
    num_column_blocks: Q; columns are padded to a multiple of it. With P Q > 1
      each array gets leading axes (P, Q), its blocks, all laid out alike.
    max_width: Longer sums are cut into pieces of this many entries. On a TPU a
      width of the longest row, up to 256, lets a kernel take the rows.

  Returns:
    The matrix with its rows in another order, and that order: the number in
    `matrix` of each row, n for padding.

  Raises:
    ValueError: If a value is not finite, or as :func:`emc2.csr.check`.
  """
  rows, ids, values = _entries(matrix, dtype)
  num_rows, num_columns = matrix.shape
  blocks = num_row_blocks, num_column_blocks
  height, breadth = -(-num_rows // blocks[0]), -(-num_columns // blocks[1])
  # Dealt out from long to short, the blocks get rows of like lengths.
  rank = _places(np.bincount(rows, minlength=num_rows))
  slots = rank % blocks[0] * height + rank // blocks[0]
  order = np.full(blocks[0] * height, num_rows)
  order[slots] = np.arange(num_rows)

  rows = slots[rows]
  row_block, row = np.divmod(rows, height)
  column_block, column = np.divmod(ids, breadth)
  of_rows = _make_sums(
    (row_block, column_block, row),
    column,
    values,
    shape=(*blocks, height, breadth),
    max_width=max_width,
  )
  key = ids * np.int64(len(order)) + rows
  if values is None:
    key.sort()
  else:
    by_column = np.argsort(key)
    key, values = key[by_column], values[by_column]
  ids, rows = np.divmod(key, len(order))
  row_block, row = np.divmod(rows, height)
  column_block, column = np.divmod(ids, breadth)
  of_columns = _make_sums(
    (row_block, column_block, column),
    row,
    values,
    shape=(*blocks, breadth, height),
    max_width=max_width,
  )
  return jax.tree.map(jnp.asarray, Sparse(of_rows, of_columns)), order


def _entries(
  matrix: Any, dtype: jax.typing.DTypeLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Rows, which rise, columns and values that are not 0; None if all are 1."""
  rows, ids, values = csr.check(matrix, 'features')
  with np.errstate(over='ignore'):
    is_finite = np.isfinite(values.astype(dtype))
  bad = np.flatnonzero(~is_finite)
  if len(bad):
    raise ValueError(
      f'features must be finite, got {values[bad[0]]} in row {rows[bad[0]]}.'
    )
  starts, ids, values = csr.merge(rows, ids, values, matrix.shape, dtype=dtype)
  rows = np.repeat(np.arange(matrix.shape[0]), np.diff(starts))
  return rows, ids, None if np.all(values == 1) else values


class _Run(NamedTuple):
  """Sums of one bucket."""

  first: int
  count: int
  width: int


class _Layout(NamedTuple):
  """Where the entries of sums of known lengths go."""

  num_long: int  # How many of them, the first ones, are cut.
  num_pieces: np.ndarray  # (num_sums,): 1 for a whole sum.
  firsts: np.ndarray  # (num_long,): the first piece of each.
  starts: np.ndarray  # (num_sums,): where its first entry goes.
  strides: np.ndarray  # (num_sums,): from there to the next of the same piece.
  pieces: list[_Run]
  whole: list[_Run]


def _places(lengths: np.ndarray) -> np.ndarray:
  """The place of each sum from long to short, along the last axis."""
  order = np.argsort(-lengths, axis=-1, kind='stable')
  places = np.empty_like(order)
  numbers = np.broadcast_to(np.arange(lengths.shape[-1]), lengths.shape)
  np.put_along_axis(places, order, numbers, axis=-1)
  return places


def _runs(widths: np.ndarray) -> list[_Run]:
  """Buckets for sums of falling widths, so that padding and buckets cost least.

  Args:
    widths: (num_sums,).

  Returns:
    The buckets; a sum of another bucket is of another width.
  """
  distinct, counts = np.unique(-widths, return_counts=True)
  ends = np.concatenate([[0], np.cumsum(counts)])
  best, cuts = np.zeros(len(ends)), np.zeros(len(ends), int)
  for i in range(1, len(ends)):
    cost = best[:i] - distinct[:i] * (ends[i] - ends[:i]) + _BUCKET_COST
    cuts[i] = np.argmin(cost)
    best[i] = cost[cuts[i]]
  runs, i = [], len(distinct)
  while i:
    first = cuts[i]
    count = ends[i] - ends[first]
    runs.append(_Run(int(ends[first]), int(count), int(-distinct[first])))
    i = first
  return runs[::-1]


def _lay_out(lengths: np.ndarray, max_width: int) -> _Layout:
  """Finds a place for each entry of sums of falling lengths, (num_sums,)."""
  num_long = int(np.sum(lengths > max_width))
  num_pieces = np.maximum(-(-lengths // max_width), 1)
  widths = -(-lengths // num_pieces)
  # Long sums with pieces of one width share a bucket, each side by side.
  by_width = np.argsort(-widths[:num_long], kind='stable')
  spread = num_pieces[by_width]
  firsts = np.empty(num_long, np.int64)
  firsts[by_width] = np.cumsum(spread) - spread
  pieces = _runs(np.repeat(widths[by_width], spread))
  whole = _runs(lengths[num_long:])

  starts, strides = np.empty((2, len(lengths)), np.int64)
  start = 0
  for runs, numbers, at in (
    (pieces, firsts, slice(None, num_long)),
    (whole, np.arange(len(lengths) - num_long), slice(num_long, None)),
  ):
    for run in runs:
      here = (numbers >= run.first) & (numbers < run.first + run.count)
      starts[at][here] = start + numbers[here] - run.first
      strides[at][here] = run.count
      start += run.width * run.count
  return _Layout(num_long, num_pieces, firsts, starts, strides, pieces, whole)


def _make_sums(
  sums: tuple[np.ndarray, np.ndarray, np.ndarray],
  ids: np.ndarray,
  values: np.ndarray | None,
  *,
  shape: tuple[int, int, int, int],
  max_width: int,
) -> Sums:
  """Lays out sums over entries of a vector.

  Args:
    sums: Block row, block column and number in the block of the sum of each
      entry, (nnz,) each; entries of one sum follow each other.
    ids: (nnz,): which entry of the vector.
    values: (nnz,), or None.
    shape: (P, Q, num_sums, length), of the vector in one block.
    max_width: Longer sums are cut.

  Returns:
    The sums, with axes (P, Q) unless both are 1.
  """
  *blocks, num_sums, length = shape
  number = np.ravel_multi_index(sums, shape[:3])
  lengths = np.bincount(number, minlength=np.prod(shape[:3]))
  lead = () if blocks == [1, 1] else tuple(blocks)
  lengths = lengths.reshape(lead + (num_sums,))
  falls = np.all(np.diff(lengths) <= 0)
  places = None if falls else _places(lengths)
  rank = sums[2] if falls else places.reshape(-1)[number]
  profile = -np.sort(-lengths.reshape(-1, num_sums))
  layout = _lay_out(profile.max(axis=0), max_width)

  first = np.flatnonzero(np.diff(number, prepend=-1))
  within = np.arange(len(ids)) - np.repeat(
    first, np.diff(first, append=len(ids))
  )
  # Pieces take turns, so what one gather reads at once lies close together.
  turn, piece = np.divmod(within, layout.num_pieces[rank])
  runs = [*layout.pieces, *layout.whole]
  size = sum(run.width * run.count for run in runs)
  where = layout.starts[rank] + layout.strides[rank] * turn + piece
  where += number // num_sums * size

  def spread(entries, padding, dtype):
    flat = np.full(int(np.prod(blocks)) * size, padding, dtype)
    flat[where] = entries
    flat = flat.reshape(lead + (size,))
    ends = np.cumsum([run.width * run.count for run in runs])
    parts = np.split(flat, ends[:-1], axis=-1)
    return [
      part.reshape(lead + (run.width, run.count))
      for part, run in zip(parts, runs, strict=True)
    ]

  all_ids = spread(ids, length, _id_dtype(length))
  all_values = [None] * len(runs)
  if values is not None:
    all_values = spread(values, 0, values.dtype)
  buckets = [Bucket(*pair) for pair in zip(all_ids, all_values, strict=True)]

  joined = None
  if layout.num_long:
    num_pieces = layout.num_pieces[: layout.num_long]
    owner = np.repeat(np.arange(layout.num_long), num_pieces)
    skipped = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    joined = _make_sums(
      (np.zeros_like(owner), np.zeros_like(owner), owner),
      layout.firsts[owner] + np.arange(len(owner)) - skipped,
      None,
      shape=(1, 1, layout.num_long, len(owner)),
      max_width=max_width,
    )
    alike = lambda x: np.broadcast_to(x, lead + x.shape)
    joined = jax.tree.map(alike, joined)
  order = None
  if not falls:
    order = places.astype(_id_dtype(num_sums))
  split = len(layout.pieces)
  spans = None
  if layout.num_long:
    spans = np.stack([layout.firsts, layout.num_pieces[: layout.num_long]])
    spans = np.broadcast_to(spans.astype(np.int32), (*lead, *spans.shape))
  return Sums(
    tuple(buckets[:split]), joined, tuple(buckets[split:]), order, spans
  )


def _id_dtype(largest: int) -> type:
  """Unsigned, as XLA wraps negative ids and pays for it."""
  return np.uint16 if largest < 2**16 else np.uint32
