"""Qsparse-local-SGD: local steps, coded uploads, and a memory of what is lost.

Workers are a leading axis of the state, of whatever length: all of them on one
device, or one or some on each device of a mesh axis.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import algorithm, arguments, compression
from emc2 import mesh as mesh_lib
from emc2.compression import collectives
from emc2.consensus import schedules

MOMENTUM = ('keep', 'zero', 'average')
ON_LR_DROP = ('keep', 'zero', 'rescale')
EXCHANGE = ('auto', 'payload', 'dense')

_WORKER = 'qsparse_worker'
"""The axis of the workers of one device, where a code reduces by itself."""


class State(NamedTuple):
  """What the next step needs, and nothing else.

  Leaves that are a worker's own have a leading axis of all R workers; within
  :func:`jax.shard_map`, of those of the device.
  """

  params: Any  # The master's model, as `init` got it.
  anchor: Any  # (R, ...): the models received last; () if all are `params`.
  progress: Any  # (R, ...): anchor less local model; float32 at least.
  memory: Any  # (R, ...): what uploads have lost, as progress; () for none.
  inner: Any  # (R, ...): of the inner optimiser.
  codes: list[Any]  # Of the code, one for each leaf, equal on all workers.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one step; an entry for each worker."""

  loss: jax.Array  # (R,): of the worker's batch, at its model before the step.
  uploads: jax.Array  # (R,), bool: whether it has uploaded.
  skipped: jax.Array  # (R,), bool: whether it was due, but not finite.
  bits: jax.Array  # (R,), float32: what it has sent.


class Settings(NamedTuple):
  """What :func:`qsparse_local` was told; static."""

  loss_fn: Callable[[Any, Any], jax.Array]
  inner: Any
  compressor: compression.Compressor
  sync_fn: Callable[[jax.Array], jax.Array]
  num_workers: int
  asynchronous: bool
  error_feedback: bool
  momentum: str
  on_lr_drop: str
  learning_rate: Callable[[jax.Array], jax.typing.ArrayLike] | None
  exchange: str
  axis_name: str | None


def qsparse_local(
  loss_fn: Callable[[Any, Any], jax.Array],
  inner: Any,
  compressor: compression.Compressor,
  schedule: Any,
  *,
  num_workers: int,
  error_feedback: bool = True,
  momentum: str = 'keep',
  on_lr_drop: str = 'keep',
  learning_rate: Callable[[jax.Array], jax.typing.ArrayLike] | None = None,
  exchange: str = 'auto',
  axis_name: str | None = None,
) -> algorithm.Algorithm:
  r"""Local steps of workers, who at times upload a code of their progress.

  Worker :math:`r` makes steps of its own from the model :math:`x^r` that it
  received last. When it is due, with its progress :math:`x^r - \hat x^r`, its
  memory :math:`m^r` and a code :math:`C`,

  .. math::
    \Delta^r = m^r + x^r - \hat x^r, \quad g^r = C(\Delta^r), \quad
    m^r \leftarrow \Delta^r - g^r,

  the master subtracts what the set :math:`S` of workers uploads, and these
  workers replace their models by its own:

  .. math::
    x \leftarrow x - \frac 1 R \sum_{r \in S} g^r, \quad
    x^r = \hat x^r = x \text{ for } r \in S.

  The division is by R, not by the size of S. With a table of one column all
  upload together, and this is the paper's algorithm 1; with one of R columns it
  is algorithm 2. Steps without an upload communicate nothing.

  It contains local SGD (the identity as code), SGD with memory (H = 1), and
  SGD of the mean gradient (both). A memory stays bounded if the code contracts
  (`delta`): of codes that scale up to be unbiased it need not.

  .. note::
    The learning rate lies inside of :math:`\Delta`, so memories are in units
    of parameters. State holds :math:`x^r - \hat x^r`, added up from updates,
    in place of :math:`\hat x^r`: it is exact where the difference of two
    models would cancel, and lets `params` be bfloat16, though the master then
    rounds each mean. This is no gradient transformation: a synchronised worker
    replaces its parameters, the loss is taken at parameters that differ between
    workers, and what one evaluates is neither but :attr:`State.params`.
    Statistics of batches that a model keeps are not covered.

  Args:
    loss_fn: `(params, batch) -> ()`, of one worker's model and batch.
    inner: The local optimiser, with `init(params)` and `update(gradients,
      state, params) -> (updates, state)`, as of Optax.
    compressor: :math:`C`, applied to each leaf. For k = min(d, 1000) entries of
      each, as the authors have it: `sparse.top_k(1000, at_most=True)`.
    schedule: A bool table (num_steps,) or (num_steps, num_workers) of
      :mod:`emc2.consensus.schedules`; or a function of the number of finished
      steps, (), int32, that returns a row of one, () or (num_workers,).
    num_workers: R, at least 1.
    error_feedback: Whether lost parts are remembered; without, biased codes
      need not converge.
    momentum: What becomes of a worker's moments when it uploads: of all leaves
      of the inner state that come in trees of the form and shapes of `params`.
      'keep' (the authors' code), 'zero', or 'average' over the workers who
      upload, which costs 32 bits for each entry.
    on_lr_drop: What becomes of memories when `learning_rate` falls from one
      step to the next, since they were made at the old one: 'keep', for smooth
      schedules; 'zero' (the authors' code); 'rescale' by the ratio.
    learning_rate: A function of the number of finished steps, the same as of
      `inner`; needed unless `on_lr_drop` is 'keep'.
    exchange: 'payload' gathers codes or averages them, as the code can be;
      'dense' averages what they decompress to; 'auto' takes, for each leaf,
      what moves less: gathering R payloads costs less than a ring's all-reduce
      if they have fewer bits than two arrays. On a device with several workers
      only 'auto' and 'dense' are known. No choice changes the result, or what
      is counted as sent.
    axis_name: The mesh axis of the workers, if `step` runs in
      :func:`jax.shard_map`; None if all are on one device.

  Returns:
    `init(key, params) -> State`, of all workers, and `step(key, state, batch)
    -> (State, Info)`. Leaves of a batch have a leading axis of workers. In
    `shard_map` the specs of the state are :func:`shardings`, those of batch and
    info `P(axis_name)`.

  Raises:
    ValueError: If an argument breaks its rule; by `init`, if params are not
      floating or the code refuses a shape; by `step`, if `axis_name` is not
      bound, or there are other workers than `num_workers`.
    NotImplementedError: By `step`, if several workers of a device of a mesh
      were to exchange payloads, or have a code that reduces by itself.

  Examples:
    Two workers pull one number to different sides; with a step size of 1/2
    each comes half of the way before all upload.

    >>> class Sgd(NamedTuple):
    ...   init: Callable = lambda params: ()
    ...   update: Callable = lambda g, state, params: (-g / 2, state)
    >>> from emc2.compression import identity
    >>> method = qsparse_local(
    ...   lambda x, target: 0.5 * (x - target) ** 2,
    ...   Sgd(),
    ...   identity.identity(),
    ...   schedules.every(2, 2),
    ...   num_workers=2,
    ... )
    >>> key = jax.random.key(0)
    >>> state = method.init(key, jnp.zeros([]))
    >>> state, info = method.step(key, state, jnp.array([-1.0, 4.0]))
    >>> local_params(state), info.bits
    (Array([-0.5,  2. ], dtype=float32), Array([0., 0.], dtype=float32))
    >>> state, info = method.step(key, state, jnp.array([-1.0, 4.0]))
    >>> state.params, info.bits
    (Array(1.125, dtype=float32), Array([32., 32.], dtype=float32))

  References:
    Basu, Data, Karakus and Diggavi, `Qsparse-local-SGD: Distributed SGD with
    Quantization, Sparsification, and Local Computations
    <https://arxiv.org/abs/1906.02367>`_, 2019, algorithms 1 and 2.
  """
  arguments.check_at_least('num_workers', num_workers, 1)
  arguments.check_one_of('momentum', momentum, MOMENTUM)
  arguments.check_one_of('on_lr_drop', on_lr_drop, ON_LR_DROP)
  arguments.check_one_of('exchange', exchange, EXCHANGE)
  if on_lr_drop != 'keep' and learning_rate is None:
    raise ValueError(
      f'learning_rate must be given with on_lr_drop={on_lr_drop!r}, got None.'
    )
  sync_fn = schedule if callable(schedule) else _look_up(schedule)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  row = jax.eval_shape(sync_fn, count).shape
  if row not in ((), (num_workers,)):
    raise ValueError(
      f'schedule must have rows of shape () or ({num_workers},), got {row}.'
    )
  settings = Settings(
    loss_fn=loss_fn,
    inner=inner,
    compressor=compressor,
    sync_fn=sync_fn,
    num_workers=num_workers,
    asynchronous=row != (),
    error_feedback=error_feedback,
    momentum=momentum,
    on_lr_drop=on_lr_drop,
    learning_rate=learning_rate,
    exchange=exchange,
    axis_name=axis_name,
  )
  return algorithm.Algorithm(
    functools.partial(init, settings=settings),
    functools.partial(step, settings=settings),
  )


def init(key: jax.Array, params: Any, *, settings: Settings) -> State:
  """Starts all workers at `params`, with nothing in their memories.

  Args:
    key: For what the code draws once.
    params: Pytree of floating arrays.
    settings: Of the method.

  Returns:
    The state of all workers: call it outside of :func:`jax.shard_map`.

  Raises:
    ValueError: If a leaf is not floating, or of a shape that the code refuses.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f'params must be floating, got {leaf.dtype} at '
        f'params{jax.tree_util.keystr(path)}.'
      )
  params = jax.tree.map(jnp.asarray, params)
  repeat = lambda leaf: jnp.repeat(leaf[None], settings.num_workers, axis=0)
  zeros = lambda leaf: jnp.zeros(
    (settings.num_workers, *leaf.shape), _wide(leaf.dtype)
  )
  progress = jax.tree.map(zeros, params)
  feedback, anchored = settings.error_feedback, settings.asynchronous
  codes = [
    settings.compressor.init(
      leaf.shape, _wide(leaf.dtype), jax.random.fold_in(key, i)
    )
    for i, leaf in enumerate(jax.tree.leaves(params))
  ]
  return State(
    params=params,
    anchor=jax.tree.map(repeat, params) if anchored else (),
    progress=progress,
    memory=jax.tree.map(jnp.zeros_like, progress) if feedback else (),
    inner=jax.tree.map(
      lambda leaf: repeat(jnp.asarray(leaf)), settings.inner.init(params)
    ),
    codes=codes,
    count=jnp.zeros([], jnp.int32),
  )


def step(
  key: jax.Array, state: State, batch: Any, *, settings: Settings
) -> tuple[State, Info]:
  """One step of :func:`qsparse_local`."""
  here = _workers_here(state)
  _check_here(here, batch, settings)
  each = functools.partial(_each, here)
  local = local_params(state)
  loss, grads = each(jax.value_and_grad(settings.loss_fn))(local, batch)
  updates, inner = each(settings.inner.update)(grads, state.inner, local)
  state = state._replace(
    progress=jax.tree.map(
      lambda p, u: p - u.astype(p.dtype), state.progress, updates
    ),
    memory=_after_drop(state, settings),
    inner=inner,
  )
  flags = settings.sync_fn(state.count)
  _, nobody = mesh_lib.vary_alike(loss, jnp.zeros(here, bool))
  state, uploads, skipped = jax.lax.cond(
    jnp.any(flags),
    lambda state: _synchronise(key, state, flags, settings),
    lambda state: (state, nobody, nobody),
    state,
  )
  inner = jax.tree.map(lambda x: x[0], inner)
  averaged = inner if settings.momentum == 'average' else ()
  bits = bits_per_upload(settings.compressor, state.params, averaged)
  info = Info(
    loss=loss,
    uploads=uploads,
    skipped=skipped,
    bits=jnp.where(uploads, np.float32(bits), np.float32(0)),
  )
  return state._replace(count=state.count + 1), info


def local_params(state: State) -> Any:
  """The models of the workers, (R, ...), which no step gives away.

  Args:
    state: Of a run.

  Returns:
    Of the dtypes of `state.params`.
  """
  anchor = state.params if _is_empty(state.anchor) else state.anchor

  def subtract(anchor, progress):
    wide = anchor.astype(progress.dtype)
    wide = wide if wide.ndim == progress.ndim else wide[None]
    return (wide - progress).astype(anchor.dtype)

  return jax.tree.map(subtract, anchor, state.progress)


def bits_per_upload(
  compressor: compression.Compressor, params: Any, inner: Any = ()
) -> int:
  """What one worker sends at a time, as the paper counts it.

  Args:
    compressor: The code.
    params: Pytree of arrays or their shapes.
    inner: The inner state, of one worker, if its moments are averaged.

  Returns:
    Bits; those of the code for each leaf, and 32 for each entry of a moment.
  """
  total = sum(compressor.bits(leaf.shape) for leaf in jax.tree.leaves(params))
  moments = []
  shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
  _map_moments(moments.append, inner, params, shapes)
  return total + 32 * sum(leaf.size for leaf in moments)


def shardings(axis_name: str = mesh_lib.DATA) -> State:
  """How a state lies on a mesh: each worker's own with the worker.

  Args:
    axis_name: The mesh axis of the workers.

  Returns:
    A `State` of `PartitionSpec`, a prefix of every state.
  """
  shared = jax.sharding.PartitionSpec()
  own = jax.sharding.PartitionSpec(axis_name)
  return State(
    params=shared,
    anchor=own,
    progress=own,
    memory=own,
    inner=own,
    codes=shared,
    count=shared,
  )


def _look_up(table):
  """The rows of a table, the last of them for ever."""
  if not isinstance(table, jax.core.Tracer):
    schedules.check_schedule(table)
  table = jnp.asarray(table)
  return lambda count: table[jnp.minimum(count, len(table) - 1)]


def _synchronise(key, state, flags, settings):
  """Lets those who are due upload, and gives them the new model."""
  here = _workers_here(state)
  due = jnp.broadcast_to(flags, (settings.num_workers,))
  due = due[_worker_ids(here, settings)]
  progress, structure = jax.tree.flatten(state.progress)
  carried, memory = progress, jax.tree.leaves(state.memory)
  if settings.error_feedback:
    carried = [m + p for m, p in zip(memory, progress, strict=True)]
  is_finite = lambda x: jnp.isfinite(x).reshape(here, -1).all(axis=1)
  finite = functools.reduce(jnp.logical_and, map(is_finite, carried))
  uploads, skipped = due & finite, due & ~finite
  # Every code maps zeros to zeros: so who does not upload adds nothing.
  offered = [_pick(uploads, x, jnp.zeros_like(x)) for x in carried]
  sent, mean, codes = _exchange(key, state.codes, offered, settings)
  memory = [
    _pick(uploads, x - g, m)
    for x, g, m in zip(carried, sent, memory, strict=False)
  ]
  params = jax.tree.map(
    lambda x, g: (x.astype(g.dtype) - g).astype(x.dtype),
    state.params,
    structure.unflatten(mean),
  )
  receive = lambda anchor, x: _pick(
    due, jnp.broadcast_to(x, anchor.shape), anchor
  )
  state = state._replace(
    params=params,
    anchor=jax.tree.map(receive, state.anchor, params)
    if settings.asynchronous
    else (),
    progress=structure.unflatten(
      [_pick(due, jnp.zeros_like(p), p) for p in progress]
    ),
    memory=structure.unflatten(memory) if settings.error_feedback else (),
    inner=_after_upload(state, uploads, skipped, settings),
    codes=codes,
  )
  return state, uploads, skipped


def _exchange(key, codes, xs, settings):
  """Codes arrays (n, ...); gives those sent, (n, ...), and means over all R."""
  compressor, axis_name = settings.compressor, settings.axis_name
  keys = [jax.random.fold_in(key, i) for i in range(len(xs))]
  here = xs[0].shape[0]
  if axis_name is not None and here == 1:
    return _exchange_alone(codes, xs, keys, settings)
  if settings.exchange == 'payload' or (axis_name and compressor.reduce):
    raise NotImplementedError(
      f'exchange of payloads needs one worker on each device, got {here}.'
    )
  if compressor.reduce is not None:
    reduce = lambda xs: compressor.reduce(codes, xs, keys, _WORKER)
    axes = compression.Reduced(0, None, None)
    return jax.vmap(reduce, axis_name=_WORKER, out_axes=axes)(xs)
  ids = _worker_ids(here, settings)

  def code(state, x, key):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    payload, state = compressor.compress(state, x, key)
    return compressor.decompress(state, payload, like), state

  axes = None
  if not compressor.shared_key:
    keys = [
      jax.vmap(lambda i, k=k: jax.random.fold_in(k, i))(ids) for k in keys
    ]
    axes = 0
  coded = [
    jax.vmap(code, (None, 0, axes), (0, None))(*one)
    for one in zip(codes, xs, keys, strict=True)
  ]
  sent, codes = map(list, zip(*coded, strict=True))
  mean = [x.mean(axis=0) for x in sent]
  if axis_name is not None:
    mean = collectives.mean(mean, axis_name)
  return sent, mean, codes


def _exchange_alone(codes, xs, keys, settings):
  """As `_exchange`, of one worker on each device of an axis."""
  compressor, exchange = settings.compressor, settings.exchange

  def takes_payload(x):
    if compressor.reduce is not None or exchange == 'payload':
      return True
    if exchange == 'dense':
      return False
    shape, wide = x.shape[1:], 8 * x.dtype.itemsize
    bits = compression.wire_bits(compressor, shape, x.dtype)
    size = wide * math.prod(shape)
    if compressor.allreducible:
      return bits <= size
    return settings.num_workers * bits < 2 * size

  sent, mean, new_codes = ([None] * len(xs) for _ in range(3))
  chosen = [takes_payload(x) for x in xs]
  for way, code in ((True, compressor), (False, _as_dense(compressor))):
    members = [i for i, one in enumerate(chosen) if one == way]
    if members:
      found = compression.reduce(
        code,
        [codes[i] for i in members],
        [xs[i][0] for i in members],
        [keys[i] for i in members],
        settings.axis_name,
      )
      for i, *one in zip(members, *found, strict=True):
        sent[i], mean[i], new_codes[i] = one
  return [x[None] for x in sent], mean, new_codes


def _as_dense(compressor):
  """The same code, but what travels is what it decompresses to."""

  def compress(state, x, key):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    payload, state = compressor.compress(state, x, key)
    return compressor.decompress(state, payload, like), state

  return compressor._replace(
    compress=compress,
    decompress=lambda state, payload, like: payload,
    allreducible=True,
  )


def _after_drop(state, settings):
  """The memories, once the learning rate has fallen."""
  if settings.on_lr_drop == 'keep' or not settings.error_feedback:
    return state.memory
  rate = lambda count: jnp.asarray(settings.learning_rate(count), jnp.float32)
  now, before = rate(state.count), rate(jnp.maximum(state.count - 1, 0))
  ratio = now / before if settings.on_lr_drop == 'rescale' else 0 * now
  scale = lambda memory: jax.tree.map(
    lambda m: m * ratio.astype(m.dtype), memory
  )
  return jax.lax.cond(now < before, scale, lambda memory: memory, state.memory)


def _after_upload(state, uploads, skipped, settings):
  """The inner states: moments as told, and none that were not finite."""
  moments = []
  shapes = [leaf.shape for leaf in jax.tree.leaves(state.progress)]
  over = functools.partial(
    _map_moments, inner=state.inner, params=state.params, shapes=shapes
  )
  over(moments.append)
  renew = lambda x: _pick(skipped, jnp.zeros_like(x), x)
  if settings.momentum == 'zero':
    renew = lambda x: _pick(uploads | skipped, jnp.zeros_like(x), x)
  renewed = [renew(x) for x in moments]
  if settings.momentum == 'average':
    kept = [_pick(uploads, x, jnp.zeros_like(x)).sum(axis=0) for x in renewed]
    totals = [*kept, uploads.sum(dtype=jnp.float32)]
    if settings.axis_name is not None:
      totals = collectives.total(totals, settings.axis_name)
    *totals, number = totals
    number = jnp.maximum(number, 1)
    renewed = [
      _pick(
        uploads, jnp.broadcast_to(total / number.astype(x.dtype), x.shape), x
      )
      for x, total in zip(renewed, totals, strict=True)
    ]
  following = iter(renewed)
  return over(lambda _: next(following))


def _map_moments(fn, inner, params, shapes):
  """Maps leaves of those parts of an inner state that are like params."""
  structure = jax.tree.structure(params)

  def is_moment(part):
    leaves, found = jax.tree.flatten(part)
    return found == structure and all(
      leaf.shape == shape and jnp.issubdtype(leaf.dtype, jnp.floating)
      for leaf, shape in zip(leaves, shapes, strict=True)
    )

  apply = lambda part: jax.tree.map(fn, part) if is_moment(part) else part
  return jax.tree.map(apply, inner, is_leaf=is_moment)


def _each(here, fn):
  """Maps over workers; a single one sees the very shapes of its arrays."""
  if here > 1:
    return jax.vmap(fn)

  def alone(*args):
    args = jax.tree.map(lambda x: x[0], args)
    return jax.tree.map(lambda x: x[None], fn(*args))

  return alone


def _pick(mask, x, y):
  """Takes x (n, ...) where the mask (n,) holds, else y."""
  return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _workers_here(state):
  return jax.tree.leaves(state.progress)[0].shape[0]


def _worker_ids(here, settings):
  ids = jnp.arange(here, dtype=jnp.int32)
  if settings.axis_name is None:
    return ids
  return jax.lax.axis_index(settings.axis_name) * here + ids


def _is_empty(tree):
  return isinstance(tree, tuple) and not tree


def _wide(dtype):
  """In which progress and memories are kept."""
  return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _check_here(here, batch, settings):
  """Refuses an axis that is not there, and other workers than were told."""
  num_devices = 1
  if settings.axis_name is not None:
    num_devices = mesh_lib.axis_size(settings.axis_name)
  if here * num_devices != settings.num_workers:
    raise ValueError(
      f'state must hold {settings.num_workers} workers, got {here} on each of '
      f'{num_devices} devices.'
    )
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if leaf.shape[:1] != (here,):
      raise ValueError(
        f'batch must have a leading axis of {here} workers, got '
        f'{leaf.shape} at batch{jax.tree_util.keystr(path)}.'
      )
