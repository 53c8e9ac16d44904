r"""What every contrastive method is: a memory, and a loss to differentiate.

All methods estimate the gradient of one objective, the global contrastive loss
of :mod:`emc2.contrastive.objective`, on one scale: the mean over the `2B` rows
of a batch, with the inverse temperature :math:`\beta`. They see a sample only
as a *view*, the pair (index, view id), and only through an `embed_fn`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import algorithm as algorithm_lib
from emc2 import mesh as mesh_lib

PLAIN_VIEW = np.uint32(2**32 - 1)
"""The view id of a sample as it is, without augmentation."""


@runtime_checkable
class EmbedFn(Protocol):
  """Embeds views of samples; `data` is whatever it reads them from."""

  def __call__(
    self, params: Any, data: Any, index: jax.Array, view: jax.Array
  ) -> jax.Array:
    """Maps index (n,) int32 and view (n,) uint32 to unit rows (n, d)."""


class Batch(NamedTuple):
  """One step's samples, each seen twice."""

  index: jax.Array  # (B,), int32: which samples; all distinct.
  view: jax.Array  # (2, B), uint32: the two augmentations of each.
  data: Any = ()  # What `embed_fn` reads the samples from.


class Estimator(NamedTuple):
  """A contrastive method.

  Attributes:
    init: `(key, params) -> Memory`, what the method keeps of past steps.
    surrogate: `(key, memory, params, batch, embed_fn) -> (value, (memory,
      info))`. The gradient of `value` in `params` is the estimate of the
      gradient of the global loss; `value` itself is not that loss. The first
      field of `info` is `loss`, a number worth watching.
    pending: `(key, memory, params, batch, embed_fn) -> (n,) int32`, the samples
      beside the batch that `surrogate` will embed, for a loader that must
      fetch them first. `n` is static and may be 0.
    shardings: `(mesh) -> Memory` of `PartitionSpec`.
  """

  init: Callable[..., Any]
  surrogate: Callable[..., tuple[jax.Array, tuple[Any, Any]]]
  pending: Callable[..., jax.Array]
  shardings: Callable[[jax.sharding.Mesh], Any]


class State(NamedTuple):
  """A training run: what the next step needs, and nothing else."""

  params: Any  # Pytree of the encoder's parameters.
  opt_state: Any  # Of the optax transform.
  memory: Any  # Of the estimator.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one training step."""

  loss: jax.Array  # (), float32: the estimator's own loss of the batch.
  gradient_norm: jax.Array  # (), float32: Euclidean, over all parameters.
  memory: Any  # The estimator's own Info.


class Views(NamedTuple):
  """The embedded batch, as one device sees it."""

  rows: jax.Array  # (2b, d): this device's; first views, then second views.
  columns: jax.Array  # (2B, d): everyone's, in the same order.
  position: jax.Array  # (2b,), int32: the column that each row is.


def embed_batch(
  params: Any, batch: Batch, embed_fn: EmbedFn, axis_name: str | None = None
) -> Views:
  """Embeds both views of a batch and gathers them along the mesh axis.

  Args:
    params: Of the encoder.
    batch: The whole batch, or under `jax.shard_map` this device's part of it.
    embed_fn: The encoder.
    axis_name: The mesh axis that splits the batch, or None.

  Returns:
    The rows and the columns of the similarity matrix.
  """
  size = batch.index.shape[0]
  index = jnp.concatenate([batch.index, batch.index])
  rows = embed_fn(params, batch.data, index, batch.view.reshape(2 * size))
  position = jnp.arange(2 * size, dtype=jnp.int32)
  if axis_name is None:
    return Views(rows=rows, columns=rows, position=position)
  pairs = rows.reshape(2, size, rows.shape[1])
  columns = jax.lax.all_gather(pairs, axis_name, axis=1, tiled=True)
  total = columns.shape[1]
  first = jax.lax.axis_index(axis_name) * size
  position = first + position % size + jnp.where(position < size, 0, total)
  columns = columns.reshape(2 * total, rows.shape[1])
  return Views(rows=rows, columns=columns, position=position)


def inner(rows: jax.Array, others: jax.Array) -> jax.Array:
  """Inner products along the last axis, in float32 at least."""
  wide = jnp.finfo(rows.dtype).bits >= 32
  dtype = rows.dtype if wide else jnp.float32
  return jnp.sum(rows * others, axis=-1, dtype=dtype)


def positives(rows: jax.Array) -> jax.Array:
  """The similarity of each row (2b, d) with the other view of its sample."""
  half = rows.shape[0] // 2
  similarity = inner(rows[:half], rows[half:])
  return jnp.concatenate([similarity, similarity])


def gather(tree: Any, axis_name: str | None) -> Any:
  """Joins what each device holds of the leading axis; nothing to do on one."""
  if axis_name is None:
    return tree
  join = lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True)
  return jax.tree.map(join, tree)


def mean(values: Any, axis_name: str | None) -> Any:
  """Averages scalars over the devices that split the batch, in one message."""
  if axis_name is None:
    return values
  leaves, treedef = jax.tree.flatten(values)
  stacked = jnp.stack([leaf.astype(jnp.float32) for leaf in leaves])
  return jax.tree.unflatten(treedef, list(jax.lax.pmean(stacked, axis_name)))


def draw_views(
  key: jax.Array, batch_size: int, num_views: int | None = None
) -> jax.Array:
  """Draws the two views of each sample of a batch.

  Args:
    key: PRNG key.
    batch_size: B, static.
    num_views: How many fixed views each sample has, at least 2; the two drawn
      are distinct and in random order. None means that every id is a fresh
      augmentation. Static.

  Returns:
    View ids, (2, B) uint32, below `PLAIN_VIEW`.

  Raises:
    ValueError: If `num_views` is below 2.
  """
  if num_views is None:
    return jax.random.bits(key, (2, batch_size), jnp.uint32) >> jnp.uint32(1)
  if num_views < 2:
    raise ValueError(f'num_views must be None or at least 2, got {num_views}.')
  first_key, step_key = jax.random.split(key)
  first = jax.random.randint(first_key, (batch_size,), 0, num_views)
  step = jax.random.randint(step_key, (batch_size,), 1, num_views)
  second = (first + step) % num_views
  return jnp.stack([first, second]).astype(jnp.uint32)


def check_batch(
  index: Any, num_samples: int, view: Any = None, num_views: int | None = None
) -> None:
  """Refuses on the host what a jitted step would silently clamp or mix up.

  Args:
    index: (B,) integers, the samples of a batch.
    num_samples: m, the size of the data set.
    view: (2, B) view ids, or None to leave them unchecked.
    num_views: How many fixed views there are, or None.

  Raises:
    ValueError: If the batch has fewer than 2 samples (no negatives), holds a
      sample twice, or names a sample or view that is not there.
    NotImplementedError: If there are not exactly two views.
  """
  index = np.asarray(index)
  if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
    raise ValueError(
      'index must be a vector of integers, got shape '
      f'{index.shape} and dtype {index.dtype}.'
    )
  if index.size < 2:
    raise ValueError(
      'a batch must hold at least 2 samples, or nothing is a negative; got '
      f'{index.size}.'
    )
  outside = index[(index < 0) | (index >= num_samples)]
  if outside.size:
    raise ValueError(
      f'index must lie in [0, {num_samples}), got {int(outside[0])}.'
    )
  values, times = np.unique(index, return_counts=True)
  if times.max() > 1:
    raise ValueError(
      'the samples of a batch must be distinct, got '
      f'{int(values[times.argmax()])} {int(times.max())} times.'
    )
  if view is None:
    return
  view = np.asarray(view)
  if view.shape[:1] != (2,):
    raise NotImplementedError(
      f'a batch has exactly two views of each sample, got shape {view.shape}.'
    )
  if view.shape != (2, index.size):
    raise ValueError(f'view must be (2, {index.size}), got {view.shape}.')
  if num_views is not None and np.any(view >= num_views):
    raise ValueError(f'view must lie in [0, {num_views}), got {view.max()}.')


def check_positive(name: str, value: float) -> None:
  """Refuses a number that is not finite and above zero."""
  if not (np.isfinite(value) and value > 0):
    raise ValueError(f'{name} must be finite and positive, got {value}.')


def check_size(num_samples: int) -> None:
  """Refuses a data set in which nothing is a negative."""
  if num_samples < 2:
    raise ValueError(f'num_samples must be at least 2, got {num_samples}.')


def nothing_pending(
  key: jax.Array, memory: Any, params: Any, batch: Batch, embed_fn: EmbedFn
) -> jax.Array:
  """The `pending` of a method that embeds nothing but its batch."""
  del key, memory, params, batch, embed_fn
  return jnp.zeros((0,), jnp.int32)


def algorithm(
  estimator: Estimator,
  embed_fn: EmbedFn,
  tx: Any,
  *,
  mesh: jax.sharding.Mesh | None = None,
  data_specs: Any = None,
) -> algorithm_lib.Algorithm:
  """Trains an encoder by any contrastive method and any optimiser.

  Args:
    estimator: The method; made with `axis_name='data'` if a mesh is given.
    embed_fn: The encoder.
    tx: An optax gradient transformation.
    mesh: Where the batch is split over the axis `data`; each device embeds its
      own samples. None means one device.
    data_specs: `PartitionSpec` of `batch.data`, a prefix tree; replicated by
      default.

  Returns:
    `init(key, params) -> State` and `step(key, state, batch) -> (State, Info)`.
    The batch is checked by :func:`check_batch`, on the host, by the caller.
  """
  surrogate = estimator.surrogate
  if mesh is not None:
    surrogate = shard_surrogate(estimator, mesh, data_specs)

  def init(key, params):
    return State(
      params=params,
      opt_state=tx.init(params),
      memory=estimator.init(key, params),
      count=jnp.zeros([], jnp.int32),
    )

  def step(key, state, batch):
    grad_fn = jax.value_and_grad(surrogate, argnums=2, has_aux=True)
    (value, (memory, info)), grads = grad_fn(
      key, state.memory, state.params, batch, embed_fn
    )
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, value=value
    )
    params = jax.tree.map(
      lambda p, u: (p + u).astype(p.dtype), state.params, updates
    )
    new_state = State(params, opt_state, memory, state.count + 1)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return new_state, Info(loss=info.loss, gradient_norm=norm, memory=info)

  return algorithm_lib.Algorithm(init, step)


def shard_surrogate(
  estimator: Estimator, mesh: jax.sharding.Mesh, data_specs: Any = None
) -> Callable[..., tuple[jax.Array, tuple[Any, Any]]]:
  """Splits the surrogate of an estimator over the axis `data` of a mesh.

  Args:
    estimator: The method, made with `axis_name='data'`.
    mesh: Holds the axis `data`; the batch size must be a multiple of it.
    data_specs: `PartitionSpec` of `batch.data`; replicated by default.

  Returns:
    A function like `estimator.surrogate` that takes the whole batch.
  """
  spec = jax.sharding.PartitionSpec
  batch_specs = Batch(
    index=spec(mesh_lib.DATA),
    view=spec(None, mesh_lib.DATA),
    data=spec() if data_specs is None else data_specs,
  )
  memory_specs = estimator.shardings(mesh)

  def surrogate(key, memory, params, batch, embed_fn):
    def local(key, memory, params, batch):
      value, aux = estimator.surrogate(key, memory, params, batch, embed_fn)
      return jax.lax.psum(value, mesh_lib.DATA), aux

    # The memory is the same everywhere because it is made from gathered
    # values, which the check of replication cannot see.
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(spec(), memory_specs, spec(), batch_specs),
      out_specs=(spec(), (memory_specs, spec())),
      check_vma=False,
    )(key, memory, params, batch)

  return surrogate
