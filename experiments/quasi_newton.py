"""L-BFGS over an objective whose gradient is dear and brings the value along.

`optax.lbfgs` keeps value and gradient of the last point in its state, so a step
costs what its line search asks: one evaluation, once the scale is known.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def lbfgs(
  objective: Callable[..., jax.Array], *, memory: int = 4
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Makes the two functions of a run.

  Args:
    objective: `(params, *args) -> ()`.
    memory: Pairs of differences that are kept, at least 1.

  Returns:
    `init(params) -> state` and `step(params, state, *args) -> (params, state,
    value)`, the value being that of the new parameters; it is jitted, and takes
    over the memory of `params` and `state`.

  Raises:
    ValueError: If `memory` is below 1.

  Examples:
    >>> init, step = lbfgs(lambda x, a: jnp.sum((x - a) ** 2))
    >>> x = jnp.zeros(3)
    >>> state = init(x)
    >>> for _ in range(3):
    ...   x, state, value = step(x, state, jnp.arange(3.0))
    >>> bool(value < 1e-12)
    True
  """
  if memory < 1:
    raise ValueError(f'memory must be at least 1, got {memory}.')
  tx = optax.lbfgs(memory_size=memory)

  def init(params):
    # Leaves that share a buffer could not be donated.
    return jax.tree.map(jnp.copy, tx.init(params))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, *args):
    value_fn = lambda params: objective(params, *args)
    with jax.numpy_dtype_promotion('standard'):  # Optax mixes dtypes.
      value, gradient = optax.value_and_grad_from_state(value_fn)(
        params, state=state
      )
      updates, state = tx.update(
        gradient,
        state,
        params,
        value=value,
        grad=gradient,
        value_fn=value_fn,
      )
    params = optax.apply_updates(params, updates)
    return params, state, optax.tree_utils.tree_get(state, 'value')

  return init, step
