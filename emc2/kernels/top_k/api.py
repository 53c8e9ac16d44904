"""The largest entries by magnitude: checks, then an implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2.kernels.top_k import reference


class TopK(NamedTuple):
  """What :func:`top_k` returns; the order of the entries is not specified."""

  values: jax.Array  # (k,): of the dtype of the array, with their signs.
  indices: jax.Array  # (k,), int32: distinct.


def top_k(x: jax.typing.ArrayLike, k: int) -> TopK:
  """The k entries of largest magnitude; of equals, those that come first.

  Args:
    x: (d,), float32 or float64.
    k: 1 to d; static.

  Returns:
    Exactly k entries and where they stand.

  Raises:
    ValueError: `x` is no such array, or `k` out of range.
  """
  x = jnp.asarray(x)
  if x.ndim != 1 or x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(
      f'x must be a vector of float32 or float64, got {x.dtype} of shape'
      f' {x.shape}.'
    )
  if not 1 <= k <= x.size:
    raise ValueError(f'k must lie in [1, {x.size}], got {k}.')
  return TopK(*reference.top_k(x, k))
