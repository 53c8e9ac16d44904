"""Which leaves a rule is for."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def has_many_axes(params: optax.Params) -> Any:
  """Marks what is a matrix or more; biases and scales are not."""
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)
