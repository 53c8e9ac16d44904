"""The mean of workers' gradients through a lossy code, with memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import arguments, compression, mesh
from emc2.compression import collectives, memories


class CompressedMeanState(NamedTuple):
  """State of :func:`compressed_mean`.

  Leaves of `codes` and `memories` have a leading axis of 1 on each device.
  """

  count: jax.Array  # (), int32: means taken.
  skipped: jax.Array  # (), int32: means given up, for a number was not finite.
  words: jax.Array  # (2,), uint32: what a plain and a coded mean send, in 32 b.
  key: jax.Array  # (): the source of all draws; the same on all workers.
  codes: optax.Updates  # What the code keeps; the same on all workers.
  memories: optax.Updates  # What this worker's code has lost.


def compressed_mean(
  compressor: compression.Compressor,
  *,
  memory: memories.Memory | None = None,
  axis_name: str | None = 'data',
  min_compression_rate: float = 1.0,
  codes_leaf: Callable[[jax.ShapeDtypeStruct], bool] | None = None,
  start_step: int = 0,
  learning_rate: optax.ScalarOrSchedule | None = None,
  skip_nonfinite: bool = True,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Averages the workers' own gradients, sending codes instead of them.

  For worker i with gradient :math:`g^i`, memory :math:`e^i` and code Q,

  .. math::
    p^i = g^i + e^i, \quad \bar\Delta = \frac{1}{N} \sum_i Q(p^i), \quad
    e^i \leftarrow p^i - Q(p^i);

  other memories than :func:`emc2.compression.memories.full` change the first
  and the last. It stands first in a chain, inside :func:`jax.shard_map`, and
  all after it sees :math:`\bar\Delta`, the same on all workers.

  .. note::
    Inside `shard_map`, the gradient for an argument that all workers share is
    their sum already. Cast the params before differentiating:
    `jax.lax.pcast(params, 'data', to='varying')`.

  .. note::
    A memory keeps gradients. When the learning rate falls, what it holds goes
    out at the lower rate. The papers' theorems have it keep updates, which go
    out as large as they came in: that is what `learning_rate` is for.

  Args:
    compressor: Q, from :mod:`emc2.compression`.
    memory: The worker's memory; by default the whole residual.
    axis_name: The mesh axis of the workers; None for a single one.
    min_compression_rate: A leaf with two axes or more is coded if its bits
      times this number stay below those of the leaf in 32 bits; other leaves
      are averaged as they are. PowerSGD's authors take 2. Static.
    codes_leaf: In place of that rule, tells by its shape and dtype whether a
      leaf is coded.
    start_step: How many means are taken of all leaves as they are, before the
      first code. Static.
    learning_rate: If given, a number or a schedule, as the optimiser behind
      has it: the memory is then kept in units of updates. At a rate of 0
      coded leaves are given 0, and memories stay.
    skip_nonfinite: Whether a step in which any worker has a number that is not
      finite gives zeros, and leaves the state as it was but for its count of
      such steps. Static.
    key: A random key, the same on all workers; `jax.random.key(0)` by default.

  Returns:
    The transform. Leaves are float arrays; codes and memories hold float32,
    or float64 for such leaves. `init` has to run inside `shard_map` too, with
    :func:`compressed_mean_specs` as `out_specs`. In
    :func:`optax.inject_hyperparams` name `key`, `codes_leaf`,
    `min_compression_rate` and `start_step` in `static_args`.

  Raises:
    ValueError: If a number is out of range. By `init`, if a leaf is not float
      or the code does not take its shape. By `update`, if a leaf is not as it
      was in `init`, if `axis_name` is not an axis in scope, or if gradients do
      not differ between workers, being averaged already; that is only seen
      while `check_vma` is on.

  Examples:
    One worker that sends the largest entry:

    >>> from emc2.compression import sparse
    >>> tx = compressed_mean(sparse.top_k(1), axis_name=None)
    >>> g = {'w': jnp.array([[3.0, 2.0, 0.0]])}
    >>> state = tx.init(g)
    >>> for _ in range(2):
    ...   updates, state = tx.update(g, state)
    ...   print(updates['w'])
    [[3. 0. 0.]]
    [[0. 4. 0.]]

  References:
    Li, Zheng, Raman, Shrivastava and Giannakis, `Contractive Error Feedback for
    Gradient Compression <https://arxiv.org/abs/2312.08538>`_, 2023. Vogels,
    Karimireddy and Jaggi, `PowerSGD <https://arxiv.org/abs/1905.13727>`_, 2019,
    Algorithm 2.
  """
  arguments.check_positive('min_compression_rate', min_compression_rate)
  arguments.check_at_least('start_step', start_step, 0)
  if memory is None:
    memory = memories.full()

  def is_coded(leaf):
    if codes_leaf is not None:
      return codes_leaf(leaf)
    if len(leaf.shape) < 2:
      return False
    size = int(np.prod(leaf.shape))
    return compressor.bits(leaf.shape) * min_compression_rate < 32 * size

  def begin(leaf, key):
    """The states of the code and of the memory for one leaf."""
    if not is_coded(leaf):
      return (), ()
    shape, dtype = leaf.shape, _wide(leaf.dtype)
    of_code, of_memory = jax.random.split(key)
    states = (
      compressor.init(shape, dtype, of_code),
      memory.begin(shape, dtype, of_memory),
    )
    return jax.tree.map(lambda x: jnp.asarray(x)[None], states)

  def words(leaves):
    """What a plain mean and a coded mean send."""
    plain, coded = 0, 0
    for leaf in leaves:
      raw = 8 * int(np.prod(leaf.shape)) * leaf.dtype.itemsize
      plain += raw
      coded += (
        compression.wire_bits(compressor, leaf.shape, _wide(leaf.dtype))
        if is_coded(leaf)
        else raw
      )
    # The count of workers that have what is not finite is a float too.
    flag = 32 * int(skip_nonfinite)
    return jnp.array([-(-(n + flag) // 32) for n in (plain, coded)], jnp.uint32)

  def init_fn(params):
    _check_float(params)
    leaves, structure = jax.tree.flatten(_shapes(params))
    root = jax.random.key(0) if key is None else key
    of_leaves, following = jax.random.split(root)
    states = [
      begin(leaf, jax.random.fold_in(of_leaves, i))
      for i, leaf in enumerate(leaves)
    ]
    return CompressedMeanState(
      count=jnp.zeros([], jnp.int32),
      skipped=jnp.zeros([], jnp.int32),
      words=words(leaves),
      key=following,
      codes=structure.unflatten([code for code, _ in states]),
      memories=structure.unflatten([kept for _, kept in states]),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    if axis_name is not None:
      mesh.axis_size(axis_name)
      for path, leaf in jax.tree.leaves_with_path(updates):
        name = f'gradient {jax.tree_util.keystr(path)}'
        mesh.check_own(jnp.asarray(leaf), axis_name, name)
    _check_float(updates)
    leaves, structure = jax.tree.flatten(updates)
    codes, kept = (
      structure.flatten_up_to(tree) for tree in (state.codes, state.memories)
    )
    shapes = jax.tree.leaves(_shapes(updates))
    _check_alike(begin, shapes, codes, kept, updates)
    where = [i for i, leaf in enumerate(shapes) if is_coded(leaf)]
    rest = [i for i in range(len(leaves)) if i not in where]
    gradients = [leaves[i].astype(_wide(leaves[i].dtype)) for i in where]
    first = lambda trees: [
      jax.tree.map(lambda x: x[0], trees[i]) for i in where
    ]
    before = first(codes), first(kept)

    rate = learning_rate
    if callable(learning_rate):
      rate = learning_rate(state.count)
    bad = _is_bad(leaves) if skip_nonfinite else None
    others = [leaves[i] for i in rest]
    if axis_name is not None:
      others, bad = collectives.mean((others, bad), axis_name)

    def plain(states):
      if axis_name is None:
        return gradients, states
      return collectives.mean(gradients, axis_name), states

    def coded(states):
      codes, kept = states
      scaled = gradients
      if rate is not None:
        scaled = [g * jnp.asarray(rate, g.dtype) for g in gradients]
      step_key = jax.random.fold_in(state.key, state.count)
      keys = [jax.random.split(jax.random.fold_in(step_key, i)) for i in where]
      of_codes, of_memories = ([pair[j] for pair in keys] for j in (0, 1))
      if axis_name is not None:
        worker = jax.lax.axis_index(axis_name)
        of_memories = [jax.random.fold_in(one, worker) for one in of_memories]
      carried = list(map(memory.carry, kept, scaled))
      done = compression.reduce(compressor, codes, carried, of_codes, axis_name)
      kept = list(
        map(memory.write, kept, carried, done.sent, scaled, of_memories)
      )
      if rate is None:
        return done.mean, (done.states, kept)
      idle = jnp.asarray(rate) == 0
      mean = [x / jnp.asarray(rate, x.dtype) for x in done.mean]
      mean = _unless(idle, mean, optax.tree.zeros_like(mean))
      return mean, _unless(idle, (done.states, kept), states)

    if start_step:
      mean, after = jax.lax.cond(state.count < start_step, plain, coded, before)
    else:
      mean, after = coded(before)

    given = dict(zip([*where, *rest], [*mean, *others], strict=True))
    count, skipped = optax.safe_increment(state.count), state.skipped
    if bad is not None:
      bad = _anywhere(bad) > 0
      count = jnp.where(bad, state.count, count)
      skipped = jnp.where(bad, optax.safe_increment(skipped), skipped)
      after = _unless(bad, after, before)
      given = _unless(bad, given, optax.tree.zeros_like(given))
    codes, kept = (
      structure.unflatten(_put(where, len(leaves), states)) for states in after
    )
    given = [given[i].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return structure.unflatten(given), state._replace(
      count=count, skipped=skipped, codes=codes, memories=kept
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def compressed_mean_specs(
  params_specs: Any = None, axis_name: str | None = 'data'
) -> CompressedMeanState:
  """How the state of :func:`compressed_mean` lies on a mesh.

  A worker's memory is its own: it is split over the axis of the workers, and
  never replicated. Where params are split over other axes, each shard has a
  memory and a state of the code.

  Args:
    params_specs: A tree of `PartitionSpec`, a prefix of the params, that tells
      how they, and the gradients, are split; replicated by default.
    axis_name: As in :func:`compressed_mean`.

  Returns:
    A tree of `PartitionSpec` that is a prefix of the state: for `in_specs` and
    `out_specs` of :func:`jax.shard_map`, and for
    :func:`emc2.mesh.place`.

  Raises:
    ValueError: If params are split over the axis of the workers.

  Examples:
    >>> specs = compressed_mean_specs({'w': jax.P('fsdp', None), 'b': jax.P()})
    >>> specs.memories['w'] == jax.P(('data', 'fsdp'))
    True
  """
  if params_specs is None:
    params_specs = jax.P()
  is_spec = lambda x: isinstance(x, jax.P)

  def leading(spec, *more):
    axes = []
    for part in spec:
      axes += [part] if isinstance(part, str) else list(part or ())
    if axis_name in axes:
      raise ValueError(
        f'params_specs must not split params over {axis_name!r}, the axis of '
        f'the workers, got {spec}.'
      )
    axes = (*more, *axes)
    return jax.P(axes) if axes else jax.P()

  more = () if axis_name is None else (axis_name,)
  each = lambda *more: jax.tree.map(
    lambda spec: leading(spec, *more), params_specs, is_leaf=is_spec
  )
  return CompressedMeanState(
    count=jax.P(),
    skipped=jax.P(),
    words=jax.P(),
    key=jax.P(),
    codes=each(),
    memories=each(*more),
  )


def sent_bits(state: CompressedMeanState, *, start_step: int = 0) -> int:
  """Counts what a worker has handed to collectives so far.

  The arrays that travel count, with codes padded to whole words, and 32 bits a
  step for whether all numbers were finite. Steps that were skipped count too.

  Args:
    state: Of a finished step, not traced.
    start_step: As in :func:`compressed_mean`.

  Returns:
    Bits, an exact integer; for :func:`emc2.compression.low_rank.alternating`
    twice what travels.
  """
  plain, coded = (int(n) for n in np.asarray(state.words))
  count, skipped = int(state.count), int(state.skipped)
  dense = min(count, start_step)
  # A skipped step sends what the one that follows it would have sent.
  coded_steps = count - dense + (skipped if count >= start_step else 0)
  dense += skipped if count < start_step else 0
  return 32 * (dense * plain + coded_steps * coded)


def reset_memory(state: CompressedMeanState) -> CompressedMeanState:
  """Forgets what codes have lost, as may be wise when a learning rate falls.

  Args:
    state: Of :func:`compressed_mean`; it may be traced.

  Returns:
    The same with memories that feed nothing back.
  """

  def clear(leaf):
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if is_float else leaf

  return state._replace(memories=jax.tree.map(clear, state.memories))


def _wide(dtype: Any) -> np.dtype:
  """In what codes and memories work: float64 for such a leaf, else float32."""
  return np.promote_types(dtype, np.float32)


def _shapes(tree: Any) -> Any:
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)),
    tree,
  )


def _put(where: list[int], size: int, values: list[Any]) -> list[Any]:
  """Leads states of leaves, each with an axis more, to where they belong."""
  found = dict(zip(where, values, strict=True))
  lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
  return [lead(found[i]) if i in found else () for i in range(size)]


def _is_bad(leaves: list[jax.Array]) -> jax.Array:
  """(), float32: 1 if any entry is not finite, else 0."""
  # NaN is greater than all, and one pass over each leaf is enough.
  largest = [jnp.max(jnp.abs(leaf), initial=0) for leaf in leaves]
  finite = [jnp.isfinite(x) for x in largest]
  return 1 - jnp.all(jnp.stack(finite)).astype(jnp.float32)


def _unless(condition: jax.Array, tree: Any, otherwise: Any) -> Any:
  """The tree, or another one of the same types where the condition holds."""
  keep = lambda x, other: jnp.where(condition, other, x)
  return jax.tree.map(keep, tree, otherwise)


def _anywhere(bad: jax.Array) -> jax.Array:
  """Adds over all axes that hold shards of the same gradients."""
  axes = jax.typeof(bad).manual_axis_type.varying
  return jax.lax.psum(bad, tuple(sorted(axes))) if axes else bad


def _check_float(tree: Any) -> None:
  for path, leaf in jax.tree.leaves_with_path(tree):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'leaf {jax.tree_util.keystr(path)} must be float to be compressed, '
        f'got {dtype}; mask it out by optax.masked.'
      )


def _check_alike(begin, shapes, codes, kept, updates) -> None:
  """Refuses leaves that are not as they were when the state was made."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  paths = [path for path, _ in jax.tree.leaves_with_path(updates)]
  for path, leaf, *got in zip(paths, shapes, codes, kept, strict=True):
    want = jax.eval_shape(lambda key, leaf=leaf: begin(leaf, key), key)
    if types(tuple(got)) != types(want):
      raise ValueError(
        f'leaf {jax.tree_util.keystr(path)} must have the shape and dtype that '
        f'it had in init, got {leaf.dtype} of shape {leaf.shape}.'
      )
