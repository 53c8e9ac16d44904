"""The one interface of all codes, and how workers reduce what they coded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.compression import collectives


def _no_state(shape: Sequence[int], dtype: Any, key: jax.Array) -> tuple[()]:
  """The state of a code that keeps nothing."""
  del shape, dtype, key
  return ()


def _unknown(shape: Sequence[int]) -> None:
  """The constant of a code that has none."""
  del shape


class Compressor(NamedTuple):
  """A lossy code for one array, as data: write these functions and it is one.

  An array has any shape and dtype float32 or float64. A state is a pytree of
  arrays that are equal on all workers, () if there is nothing to keep; no
  function of a code names a mesh axis, but for `reduce`.

  Attributes:
    name: What it is called in figures and errors.
    compress: `(state, x, key) -> (payload, state)`; a payload is a pytree of
      arrays whose shapes depend on the shape of `x` alone.
    decompress: `(state, payload, like) -> x_hat`, of the shape and dtype of
      `like`, a `jax.ShapeDtypeStruct`.
    bits: `shape -> int`: what one worker sends for a float32 array, as the
      table of the paper counts it; payloads may be padded to whole words.
    init: `(shape, dtype, key) -> state`. Raises ValueError for a shape that it
      does not take.
    delta: `shape -> float | None`: the greatest known d in [0, 1] such that
      E|Q(x) - x|^2 <= (1 - d) |x|^2 for all x; None if there is none.
    omega: `shape -> float | None`: the least known w such that E Q(x) = x and
      E|Q(x) - x|^2 <= w |x|^2 for all x; None for a biased code.
    unbiased: Whether E Q(x) = x.
    allreducible: Whether payloads of one state and key may be averaged before
      they are decompressed.
    shared_key: Whether all workers must draw alike; else each draws its own.
    accumulate: `(state, payloads, like) -> x_hat`: the sum of what payloads,
      stacked along a new leading axis, decompress to; None where one after the
      other is as good.
    reduce: `(states, xs, keys, axis_name) -> Reduced`, for a code that
      communicates between two phases; None for all others.
    wire: `(shape, dtype) -> int`: bits of what `reduce` hands to collectives,
      where that is not the payload; None where it is.
  """

  name: str
  compress: Callable[[Any, jax.Array, jax.Array], tuple[Any, Any]]
  decompress: Callable[[Any, Any, jax.ShapeDtypeStruct], jax.Array]
  bits: Callable[[Sequence[int]], int]
  init: Callable[[Sequence[int], Any, jax.Array], Any] = _no_state
  delta: Callable[[Sequence[int]], float | None] = _unknown
  omega: Callable[[Sequence[int]], float | None] = _unknown
  unbiased: bool = False
  allreducible: bool = False
  shared_key: bool = True
  accumulate: Callable[[Any, Any, jax.ShapeDtypeStruct], jax.Array] | None = (
    None
  )
  reduce: Callable[..., 'Reduced'] | None = None
  wire: Callable[[Sequence[int], Any], int] | None = None


class Reduced(NamedTuple):
  """What workers hold after they have exchanged their codes.

  Attributes:
    sent: For each array, what this worker's own payload decompresses to.
    mean: For each array, the mean of that over workers, equal on all.
    states: For each array, the state for the next time.
  """

  sent: list[jax.Array]
  mean: list[jax.Array]
  states: list[Any]


def reduce(
  compressor: Compressor,
  states: Sequence[Any],
  xs: Sequence[jax.Array],
  keys: Sequence[jax.Array],
  axis_name: str | None = None,
) -> Reduced:
  """Compresses arrays, exchanges them over an axis and averages.

  Args:
    compressor: The code.
    states: One for each array, from `compressor.init` or the last call.
    xs: This worker's arrays, float32 or float64.
    keys: One for each array, the same on all workers.
    axis_name: The mesh axis of the workers, in :func:`jax.shard_map`; None for
      a single worker and no collective.

  Returns:
    Own and mean decompressed arrays, and the states for the next call.
  """
  if compressor.reduce is not None:
    return compressor.reduce(states, xs, keys, axis_name)
  if axis_name is not None and not compressor.shared_key:
    worker = jax.lax.axis_index(axis_name)
    keys = [jax.random.fold_in(key, worker) for key in keys]
  coded = [
    compressor.compress(*one) for one in zip(states, xs, keys, strict=True)
  ]
  payloads = [payload for payload, _ in coded]
  new_states = [state for _, state in coded]
  likes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs]
  decode = lambda fn, payloads: [
    fn(*one) for one in zip(new_states, payloads, likes, strict=True)
  ]
  sent = decode(compressor.decompress, payloads)
  if axis_name is None:
    return Reduced(sent, sent, new_states)
  if compressor.allreducible:
    mean = decode(compressor.decompress, collectives.mean(payloads, axis_name))
    return Reduced(sent, mean, new_states)
  gathered = collectives.gather(payloads, axis_name)
  num_workers = jax.lax.axis_size(axis_name)
  add = compressor.accumulate or _one_after_the_other(compressor.decompress)
  mean = [total / num_workers for total in decode(add, gathered)]
  return Reduced(sent, mean, new_states)


def wire_bits(
  compressor: Compressor, shape: Sequence[int], dtype: Any = jnp.float32
) -> int:
  """Bits of the arrays that one worker hands to collectives for one array.

  It is `compressor.bits` with the padding to whole words.
  """
  shape = tuple(shape)
  if compressor.wire is not None:
    return compressor.wire(shape, dtype)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def payload(x, key):
    state = compressor.init(shape, dtype, key)
    return compressor.compress(state, x, key)[0]

  arrays = jax.eval_shape(payload, jax.ShapeDtypeStruct(shape, dtype), key)
  leaves = jax.tree.leaves(arrays)
  return sum(8 * leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _one_after_the_other(decompress):
  """Adds up what payloads decompress to, holding one at a time."""

  def accumulate(state, payloads, like):
    one = lambda i: jax.tree.map(lambda leaf: leaf[i], payloads)
    count = jax.tree.leaves(payloads)[0].shape[0]
    add = lambda i, total: total + decompress(state, one(i), like)
    return jax.lax.fori_loop(1, count, add, decompress(state, one(0), like))

  return accumulate
