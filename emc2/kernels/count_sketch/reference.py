"""Insertion into and query of a count sketch, in plain `jax.numpy`."""

import jax
import jax.numpy as jnp


def insert(
  v: jax.Array, buckets: jax.Array, signs: jax.Array, width: int
) -> jax.Array:
  """Adds each signed column to its bucket.

  Args:
    v: (n, m), float.
    buckets: (m,), int32, in [0, width).
    signs: (m,), of the dtype of v, 1 or -1.
    width: Buckets; static.

  Returns:
    (n, width).
  """
  zeros = jnp.zeros((v.shape[0], width), v.dtype)
  return zeros.at[:, buckets].add(v * signs[None, :], mode='promise_in_bounds')


def query(table: jax.Array, buckets: jax.Array, signs: jax.Array) -> jax.Array:
  """Reads each column's bucket, with its sign.

  Args:
    table: (n, width), float.
    buckets: (m,), int32, in [0, width).
    signs: (m,), of the dtype of the table, 1 or -1.

  Returns:
    (n, m).
  """
  taken = table.at[:, buckets].get(mode='promise_in_bounds')
  return taken * signs[None, :]
