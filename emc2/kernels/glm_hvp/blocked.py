"""Both products of a Hessian on a CPU, one tile of rows at a time.

A tile comes from main memory once and stays in the second-level cache for the
second product, which is what the two loops that XLA makes of the reference read
twice. One core of an EPYC with 512 KiB takes 5.8 ms where the reference takes
13.1 for 49,749 x 300 numbers of float32, and 18.6 for 33.1 for 65,536 x 768; it
takes 11.7 for 12.4 for 8,192 x 4,096, where a tile has few rows. Where all
features fit in the cache there is nothing to win.
"""

import jax
import jax.numpy as jnp

from emc2.kernels.glm_hvp import reference

_CACHE_BYTES = 2**19
_MIN_ROWS = 16  # Of a tile: of fewer, the sums of rows take too long to store.
_MIN_TILES = 4


def _num_rows(d, dtype):
  """Rows of a tile that takes half of the cache."""
  return max(_MIN_ROWS, _CACHE_BYTES // (2 * d * dtype.itemsize))


def dense_unsupported(features, curvature, vector):
  """Why the loop does not take these arguments, or None."""
  del curvature
  (n, d), dtype = features.shape, vector.dtype
  most = _CACHE_BYTES // (_MIN_ROWS * dtype.itemsize)
  if d > most:
    return f'want at most {most} features of {dtype}, got {d}.'
  least = _MIN_TILES * _num_rows(d, dtype)
  if n < least:
    return f'want at least {least} rows of {d} features, got {n}.'
  return None


def dense(
  features: jax.Array, curvature: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """As `reference.dense`."""
  n, d = features.shape
  rows = _num_rows(d, vector.dtype)

  def body(i, carry):
    image, scores = carry
    # The last tile begins earlier, and its first rows do not count again.
    start = jnp.minimum(i * rows, n - rows)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows)
    slopes = cut(curvature)
    slopes = jnp.where(start + jnp.arange(rows) < i * rows, 0, slopes)
    more, tile = reference.dense(cut(features), slopes, vector)
    scores = jax.lax.dynamic_update_slice_in_dim(scores, tile, start, 0)
    return image + more, scores

  # All scores are written.
  first = jnp.zeros_like(vector), curvature
  return jax.lax.fori_loop(0, -(-n // rows), body, first)
