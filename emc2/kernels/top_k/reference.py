"""The largest entries by magnitude, in plain `jax.numpy`."""

import jax
import jax.numpy as jnp


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k entries of largest magnitude, the largest first.

  Args:
    x: (d,), float.
    k: 1 to d; static.

  Returns:
    Values (k,) and indices (k,), int32.
  """
  _, indices = jax.lax.top_k(jnp.abs(x), k)
  return x[indices], indices
