"""A step of an optimiser on given params, for the benchmarks of several."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax


def repeat(
  tx: optax.GradientTransformation, params: Any, grads: Any
) -> Callable[[], None]:
  """A call that makes one step, with the same gradients each time.

  Params and state are donated, and the next call goes on from what this one
  left.
  """

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  carry = params, jax.jit(tx.init)(params)

  def call():
    nonlocal carry
    carry = jax.block_until_ready(step(*carry, grads))

  return call
