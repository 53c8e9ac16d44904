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
    `init(params, *args) -> state`, which evaluates once, and `step(params,
    state, *args) -> (params, state, value)`, the value being that of the new
    parameters. Both are jitted; `step` takes over the memory of `params` and
    `state`.

  Raises:
    ValueError: If `memory` is below 1.

  Examples:
    >>> init, step = lbfgs(lambda x, a: jnp.sum((x - a) ** 2))
    >>> x, target = jnp.zeros(3), jnp.arange(3.0)
    >>> state = init(x, target)
    >>> for _ in range(3):
    ...   x, state, value = step(x, state, target)
    >>> bool(value < 1e-12)
    True
  """
  if memory < 1:
    raise ValueError(f'memory must be at least 1, got {memory}.')
  tx = optax.lbfgs(memory_size=memory)

  @jax.jit
  def init(params, *args):
    value, gradient = jax.value_and_grad(objective)(params, *args)
    return optax.tree.set(tx.init(params), value=value, grad=gradient)

  def copy_and_init(params, *args):
    # Leaves that share a buffer could not be donated.
    return jax.tree.map(jnp.copy, init(params, *args))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, *args):
    gradient = optax.tree.get(state, 'grad')
    with jax.numpy_dtype_promotion('standard'):  # Optax mixes dtypes.
      updates, state = tx.update(
        gradient,
        state,
        params,
        value=optax.tree.get(state, 'value'),
        grad=gradient,
        value_fn=lambda params: objective(params, *args),
      )
    params = optax.apply_updates(params, updates)
    return params, state, optax.tree.get(state, 'value')

  return copy_and_init, step
