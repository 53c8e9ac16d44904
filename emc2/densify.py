"""Gradients of few rows: added, exchanged, and made dense where that pays.

JAX makes the gradient of `table[ids]` dense at once. Here
:func:`embedding_grad_slices` keeps its rows apart, :func:`accumulate` adds
gradients of one array, and :func:`reduce_slices` averages them over workers in
the cheaper of two ways.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments, indexed_slices, mesh
from emc2.compression import collectives

STRATEGIES = (
  'tf',
  'densify_if_any_dense',
  'sparse_as_dense',
  'dedup',
  'auto',
)
"""How gradients of one array are added."""

EXCHANGES = ('auto', 'gather', 'dense')
"""How workers average slices."""

OBJECTIVES = ('bytes', 'memory')

MAX_DENSE_BYTES = 2**31

Gradient = jax.Array | indexed_slices.IndexedSlices


def choose(
  num_rows: int,
  width: int,
  num_slices: int,
  num_workers: int,
  value_bytes: int = 4,
  index_bytes: int = 4,
  objective: str = 'bytes',
  *,
  sharded: bool = False,
) -> str:
  r"""Says how workers should average slices of an array: static, from shapes.

  With V rows of h values, n slices on each of P workers, b bytes for a value
  and b_I for an index, a worker receives

  .. math::
    (P - 1) n (h b + b_I) \text{ by a gather}, \quad
    2 \tfrac{P - 1}{P} V h b \text{ by a ring of a dense sum},

  so that a gather wins where n P (h b + b_I) < 2 V h b. In memory, where it
  holds n P rows against V, it wins where n P < V. Where rows of the array lie
  on the workers, a dense sum is scattered: it receives the half and holds V / P
  rows. One worker receives nothing; then memory decides.

  Args:
    num_rows: V, at least 1.
    width: h, values of a row, at least 1.
    num_slices: n, on one worker, at least 0; distinct ones if deduplicated.
    num_workers: P, at least 1.
    value_bytes: b, at least 1.
    index_bytes: b_I, at least 0.
    objective: 'bytes' or 'memory'.
    sharded: Whether each worker keeps V / P rows of the result.

  Returns:
    'gather' or 'dense', which wins a tie.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> [choose(1000, 64, n, 8) for n in (246, 247)]
    ['gather', 'dense']

  References:
    Cavdar et al., `Densifying Assumed-sparse Tensors
    <https://arxiv.org/abs/1905.04035>`_, 2019. The model is our own.
  """
  arguments.check_one_of('objective', objective, OBJECTIVES)
  for name, value, least in (
    ('num_rows', num_rows, 1),
    ('width', width, 1),
    ('num_slices', num_slices, 0),
    ('num_workers', num_workers, 1),
    ('value_bytes', value_bytes, 1),
    ('index_bytes', index_bytes, 0),
  ):
    arguments.check_at_least(name, value, least)
  gathered = num_slices * num_workers
  if objective == 'memory' or num_workers == 1:
    held_by = num_workers if sharded else 1
    return 'gather' if gathered * held_by < num_rows else 'dense'
  row_bytes = width * value_bytes
  passes = 1 if sharded else 2
  wins = gathered * (row_bytes + index_bytes) < passes * num_rows * row_bytes
  return 'gather' if wins else 'dense'


def accumulate(
  grads: Sequence[Gradient],
  strategy: str = 'densify_if_any_dense',
  *,
  max_dense_bytes: int = MAX_DENSE_BYTES,
) -> Gradient:
  """Adds the gradients of one array, each an array or slices.

  A single gradient is returned as it is, arrays alone add up to an array, and
  else the strategy decides:

  * 'tf': what TensorFlow did. All become slices and are put one after another;
    an array gives all of its V rows.
  * 'densify_if_any_dense': what the paper proposes. An array if one is there;
    else slices, one after another.
  * 'sparse_as_dense', 'dedup': always an array, as in Horovod and OpenSeq2Seq,
    by the latter from slices whose rows of one number were added before.
  * 'auto': as the paper proposes, and slices are deduplicated.

  Args:
    grads: At least one, of one shape and dtype.
    strategy: One of `STRATEGIES`, static.
    max_dense_bytes: No array of more bytes is made of slices.

  Returns:
    The sum, an array or slices.

  Raises:
    ValueError: If there is none, shapes or dtypes differ, the strategy has no
      such name, or an array would be too large.
    TypeError: If one is no array or slices of floats.

  References:
    Cavdar et al., `Densifying Assumed-sparse Tensors
    <https://arxiv.org/abs/1905.04035>`_, 2019; tensorflow issue 21243, Horovod
    pull request 570, OpenSeq2Seq pull request 249.
  """
  arguments.check_one_of('strategy', strategy, STRATEGIES)
  if not grads:
    raise ValueError('grads must be at least one, got none.')
  kinds = {_kind(grad, f'grads[{i}]') for i, grad in enumerate(grads)}
  if len(kinds) > 1:
    raise ValueError(
      f'grads must have one shape and dtype, got {sorted(kinds, key=str)}.'
    )
  if len(grads) == 1:
    return grads[0]
  sparse = [grad for grad in grads if indexed_slices.is_slices(grad)]
  dense = [grad for grad in grads if not indexed_slices.is_slices(grad)]
  if not sparse:
    return sum(dense)
  if strategy == 'tf':
    return indexed_slices.concatenate([_as_slices(grad) for grad in grads])
  merged = indexed_slices.concatenate(sparse)
  if strategy in ('dedup', 'auto'):
    merged = indexed_slices.dedup(merged)
  if not dense and strategy in ('densify_if_any_dense', 'auto'):
    return merged
  if not dense:
    return to_dense(merged, max_dense_bytes)
  wide = np.promote_types(merged.dtype, np.float32)
  total = indexed_slices.add(sum(dense).astype(wide), merged)
  return total.astype(merged.dtype)


def to_dense(
  slices: indexed_slices.IndexedSlices,
  max_dense_bytes: int = MAX_DENSE_BYTES,
  name: str = 'slices',
) -> jax.Array:
  """The array that slices stand for, if it is not too large.

  Args:
    slices: n rows.
    max_dense_bytes: The most that the array may take.
    name: What an error calls the slices.

  Returns:
    The array, of the dtype of the values.

  Raises:
    ValueError: If the array would be larger.
  """
  size = indexed_slices.num_bytes(slices.dense_shape, slices.dtype)
  if size > max_dense_bytes:
    raise ValueError(
      f'{name} of shape {slices.dense_shape} must take at most '
      f'max_dense_bytes={max_dense_bytes} when dense, got {size}.'
    )
  return indexed_slices.to_dense(slices)


def reduce_slices(
  grads: Any,
  axis_name: str | None,
  strategy: str = 'auto',
  *,
  average: bool = True,
  objective: str = 'bytes',
  wire_dtype: jax.typing.DTypeLike | None = None,
  max_dense_bytes: int = MAX_DENSE_BYTES,
) -> Any:
  """Averages gradients over the workers of a mesh axis, in `jax.shard_map`.

  An array is summed by a collective. Slices are either made dense and then
  summed, or gathered, values and indices: two collectives and n P rows, none of
  them merged. Small arrays of a tree travel together.

  Args:
    grads: A tree of arrays and slices, those of this worker alone. Rows are
      cheap to deduplicate before, which also makes n smaller.
    axis_name: The mesh axis, or None for a single worker and no collective.
    strategy: What is done to slices: 'gather', 'dense', or 'auto', as
      :func:`choose` says; static.
    average: Whether sums are divided by the number of workers.
    objective: Of :func:`choose`.
    wire_dtype: A float dtype in which values travel; their own by default.
      Dense sums are made in it.
    max_dense_bytes: No array of more bytes is made of slices.

  Returns:
    The tree with an array or slices for each leaf, equal on all workers, and of
    the dtypes that came.

  Raises:
    ValueError: If the axis has no such name, a gradient was summed over it
      before, an array would be too large, or an argument breaks its rule.
    TypeError: If a leaf is no array or slices of floats.
  """
  check_exchange(strategy, objective, wire_dtype)
  leaves, structure = jax.tree.flatten(grads, is_leaf=indexed_slices.is_slices)
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(
      grads, is_leaf=indexed_slices.is_slices
    )
  ]
  num_workers = _num_workers(axis_name)
  whole, rows = {}, {}
  for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
    name = f'grads{name}'
    _kind(leaf, name)
    if axis_name is not None:
      _check_local(leaf, axis_name, name)
    if not indexed_slices.is_slices(leaf):
      whole[i] = leaf
    elif _way(leaf, num_workers, strategy, objective, wire_dtype) == 'dense':
      whole[i] = to_dense(leaf, max_dense_bytes, name)
    else:
      rows[i] = leaf
  factor = num_workers if average else 1
  cast = lambda x: x if wire_dtype is None else x.astype(wire_dtype)
  if axis_name is None:
    done = whole | rows
  else:
    sums = collectives.total(jax.tree.map(cast, whole), axis_name)
    done = {i: x.astype(whole[i].dtype) / factor for i, x in sums.items()}
    pairs = {
      i: tuple(mesh.vary_alike(cast(x.values), x.indices))
      for i, x in rows.items()
    }
    gathered = collectives.gather(pairs, axis_name)
    for i, (values, indices) in gathered.items():
      values = values.reshape(-1, *values.shape[2:]).astype(rows[i].dtype)
      done[i] = indexed_slices.IndexedSlices(
        values / factor, indices.reshape(-1), rows[i].dense_shape
      )
  return structure.unflatten([done[i] for i in range(len(leaves))])


def reduce_scatter_slices(
  grad: Gradient,
  axis_name: str,
  strategy: str = 'auto',
  *,
  average: bool = True,
  objective: str = 'bytes',
  wire_dtype: jax.typing.DTypeLike | None = None,
  max_dense_bytes: int = MAX_DENSE_BYTES,
) -> Gradient:
  """Averages a gradient of an array whose rows lie on the same mesh axis.

  Worker i gets rows [i V / P, (i + 1) V / P) alone: of a dense sum that is
  scattered, or of gathered slices, where what belongs to others counts for
  nothing.

  Args:
    grad: Of this worker alone, with all V rows: an array or slices.
    axis_name: The mesh axis of the workers and of the rows.
    strategy: As in :func:`reduce_slices`.
    average: Likewise.
    objective: Likewise.
    wire_dtype: Likewise.
    max_dense_bytes: Likewise.

  Returns:
    An array (V / P, ...), or slices of one.

  Raises:
    ValueError: As :func:`reduce_slices`, and if P does not divide V.
    TypeError: If `grad` is no array or slices of floats.
  """
  check_exchange(strategy, objective, wire_dtype)
  shape, _ = _kind(grad, 'grad')
  num_workers = _num_workers(axis_name)
  _check_local(grad, axis_name, 'grad')
  if shape[0] % num_workers:
    raise ValueError(
      f'axis {axis_name!r} of size {num_workers} must divide the rows of grad, '
      f'got {shape[0]}.'
    )
  factor = num_workers if average else 1
  if indexed_slices.is_slices(grad):
    way = _way(grad, num_workers, strategy, objective, wire_dtype, sharded=True)
    if way == 'gather':
      everywhere = reduce_slices(
        grad, axis_name, 'gather', average=average, wire_dtype=wire_dtype
      )
      worker = jax.lax.axis_index(axis_name)
      return indexed_slices.shard(everywhere, worker, num_workers)
    grad = to_dense(grad, max_dense_bytes, 'grad')
  sent = grad if wire_dtype is None else grad.astype(wire_dtype)
  rows = jax.lax.psum_scatter(sent, axis_name, scatter_dimension=0, tiled=True)
  return rows.astype(grad.dtype) / factor


def check_exchange(
  strategy: str, objective: str, wire_dtype: jax.typing.DTypeLike | None
) -> None:
  """Refuses what :func:`reduce_slices` would, before there are gradients."""
  arguments.check_one_of('strategy', strategy, EXCHANGES)
  arguments.check_one_of('objective', objective, OBJECTIVES)
  if wire_dtype is not None and not jnp.issubdtype(wire_dtype, jnp.floating):
    raise ValueError(f'wire_dtype must be a float dtype, got {wire_dtype}.')


def embedding_grad_slices(
  loss_from_rows: Callable[..., jax.Array],
  table: jax.Array,
  ids: jax.Array,
  *args: Any,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Any, ...]]:
  """Differentiates a loss with respect to the rows that it looks up.

  The gradient of `table[ids]` never becomes an array of the table's shape. In
  `jax.shard_map` it is this worker's own where `ids` are, also if the table is
  replicated; of replicated `args` JAX gives the sum over workers, unless they
  are cast by `jax.lax.pcast(..., to='varying')` before.

  Args:
    loss_from_rows: `(rows, *args) -> ()`, rows (*ids.shape, ...).
    table: (V, ...), float.
    ids: Integers in [0, V), of any shape; one outside gives rows of NaN, or an
      error if its value is known.
    *args: Trees of float arrays, differentiated too. With tied weights the
      table is one: `accumulate` adds its gradient and the slices.
    mask: Bools of the shape of `ids`: which of them learn. Padding should not:
      it is many rows of one number.

  Returns:
    The loss, and a tuple: the gradient of the table by its rows, as slices, and
    the gradients of `args`.

  Raises:
    ValueError: If `mask` has another shape, or an id is outside of [0, V).
    TypeError: If `ids` are no integers.

  Examples:
    >>> loss = lambda rows: jnp.sum(rows**2)
    >>> ids = jnp.array([1, 1])
    >>> _, (slices,) = embedding_grad_slices(loss, jnp.ones((3, 2)), ids)
    >>> slices.indices, indexed_slices.to_dense(slices)[:, 0]
    (Array([1, 1], dtype=int32), Array([0., 4., 0.], dtype=float32))
  """
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f'ids must be integers, got {ids.dtype}.')
  num_rows = table.shape[0]
  if not isinstance(ids, jax.core.Tracer) and ids.size:
    low, high = int(np.min(ids)), int(np.max(ids))
    if low < 0 or high >= num_rows:
      raise ValueError(
        f'ids must lie in [0, {num_rows}), got {low if low < 0 else high}.'
      )
  rows = table.at[ids].get(
    mode='fill', fill_value=jnp.nan, wrap_negative_indices=False
  )
  count = len(args) + 1
  loss, (of_rows, *others) = jax.value_and_grad(
    loss_from_rows, argnums=tuple(range(count))
  )(rows, *args)
  if mask is not None:
    if mask.shape != ids.shape:
      raise ValueError(
        f'mask must have the shape of ids, {ids.shape}, got {mask.shape}.'
      )
    ids = jnp.where(mask, ids, jnp.asarray(num_rows, ids.dtype))
    spread = mask.reshape(*mask.shape, *(1,) * (table.ndim - 1))
    of_rows = jnp.where(spread, of_rows, 0)
  slices = indexed_slices.make(
    of_rows.reshape(-1, *table.shape[1:]), ids.reshape(-1), table.shape
  )
  return loss, (slices, *others)


def _kind(grad: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype of a gradient, which is one."""
  if indexed_slices.is_slices(grad):
    indexed_slices.check(grad, name)
    return grad.dense_shape, grad.dtype
  dtype = getattr(grad, 'dtype', None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f'{name} must be an array or slices of floats, got '
      f'{type(grad).__name__ if dtype is None else dtype}.'
    )
  return grad.shape, grad.dtype


def _as_slices(grad: Gradient) -> indexed_slices.IndexedSlices:
  if indexed_slices.is_slices(grad):
    return grad
  return indexed_slices.from_dense(grad)


def _num_workers(axis_name: str | None) -> int:
  return 1 if axis_name is None else mesh.axis_size(axis_name)


def _check_local(grad: Gradient, axis_name: str, name: str) -> None:
  """Refuses what is equal on all workers, where types tell."""
  values = grad.values if indexed_slices.is_slices(grad) else grad
  mesh.check_own(values, axis_name, name)


def _way(slices, num_workers, strategy, objective, wire_dtype, sharded=False):
  """'gather' or 'dense', for what :func:`reduce_slices` is told."""
  if strategy != 'auto':
    return strategy
  dtype = np.dtype(slices.dtype if wire_dtype is None else wire_dtype)
  num_rows, *row = slices.dense_shape
  return choose(
    num_rows,
    max(1, int(np.prod(row))),
    slices.num_slices,
    num_workers,
    dtype.itemsize,
    objective=objective,
    sharded=sharded,
  )
