"""The contract of every pure update, and how a run of it is scanned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Algorithm(NamedTuple):
  """A pure update: two functions and nothing else.

  `init(key, ...) -> State` and `step(key, state, batch) -> (State, Info)`.
  State and Info are NamedTuples of arrays; no step ever reads an Info.
  """

  init: Callable[..., Any]
  step: Callable[[jax.Array, Any, Any], tuple[Any, Any]]


def scan(
  key: jax.Array,
  state: Any,
  batches: Any,
  step: Callable[[jax.Array, Any, Any], tuple[Any, Any]],
  *,
  start: jax.typing.ArrayLike = 0,
) -> tuple[Any, Any]:
  """Runs one step per leading entry of `batches`, in one compiled loop.

  Step `t` draws from `jax.random.fold_in(key, t)`, so a run that is cut at any
  step and taken up there with the same `key` continues bit for bit.

  Args:
    key: The root key of the run; it is the same for every call.
    state: What `step` carries.
    batches: Pytree whose leaves have a leading axis of `num_steps`.
    step: `(key, state, batch) -> (state, info)`.
    start: (), int32: the number of steps done before this call.

  Returns:
    The last state, and the infos stacked on a leading axis of `num_steps`.

  Examples:
    >>> def step(key, state, batch):
    ...   return state + batch, state
    >>> scan(jax.random.key(0), jnp.zeros(()), jnp.arange(3.0), step)
    (Array(3., dtype=float32), Array([0., 0., 1.], dtype=float32))
  """
  num_steps = jax.tree.leaves(batches)[0].shape[0]

  def body(state, numbered):
    number, batch = numbered
    return step(jax.random.fold_in(key, number), state, batch)

  numbers = jnp.asarray(start, jnp.int32) + jnp.arange(
    num_steps, dtype=jnp.int32
  )
  return jax.lax.scan(body, state, (numbers, batches))
