"""Insertion into a count sketch on a CPU, a few rows at a time.

A scatter into the columns of a matrix takes each entry by itself. Here a block
of rows is turned, so that a column of the matrix is a short vector that is
added to another one, and all of them stay in the caches.
"""

import jax
import jax.numpy as jnp

from emc2 import mesh

ROWS = 8


def insert(
  v: jax.Array, buckets: jax.Array, signs: jax.Array, width: int
) -> jax.Array:
  """As :func:`reference.insert`."""
  n = v.shape[0]
  rows = min(ROWS, n)

  def body(i, table):
    # The last block starts early enough to be full, and writes some rows twice.
    start = jnp.minimum(i * rows, n - rows)
    block = jax.lax.dynamic_slice_in_dim(v, start, rows).T * signs[:, None]
    sums = jnp.zeros((width, rows), v.dtype)
    sums = sums.at[buckets].add(block, mode='promise_in_bounds')
    return jax.lax.dynamic_update_slice_in_dim(table, sums.T, start, 0)

  v, buckets, signs, table = mesh.vary_alike(
    v, buckets, signs, jnp.zeros((n, width), v.dtype)
  )
  return jax.lax.fori_loop(0, -(-n // rows), body, table)
