"""Row log-sum-exp over the negatives of a batch, in plain `jax.numpy`.

Written for a CPU. The similarities are made in blocks of rows small enough to
stay in the heap and near the cache (an array of tens of megabytes is mapped
and zeroed anew by each call, which costs more than its matmul), and no
similarity or weight is ever transposed: a transpose of 2048 x 2048 floats
takes five times the matmul that made them.
"""

import functools

import jax
import jax.numpy as jnp

# Blocks hold this many similarities, or as many as `_MIN_ROWS` rows have: each
# block packs all columns again for its matmul, which few rows cannot repay.
_BLOCK_ENTRIES = 2**20
_MIN_ROWS = 256


def _similarity(rows, columns):
  """Inner products in float32 of (n, d) with (c, d): (n, c)."""
  return jax.lax.dot_general(
    rows,
    columns,
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _matmul(x, y):
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def column_image(c):
  """The image that each of `c` columns shows, (c,) int32."""
  return jnp.arange(c, dtype=jnp.int32) % (c // 2)


def _to_blocks(xs, n, c):
  """Splits arrays of n rows into blocks, the last filled up with zeros."""
  count = -(-n // max(_MIN_ROWS, _BLOCK_ENTRIES // c))
  size = -(-n // count)
  fill = lambda x: jnp.pad(x, [(0, count * size - n)] + [(0, 0)] * (x.ndim - 1))
  return [fill(x).reshape(count, size, *x.shape[1:]) for x in xs]


def _from_blocks(xs, n):
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], xs)


def _fits_one_block(n, c):
  return n <= max(_MIN_ROWS, _BLOCK_ENTRIES // c)


def _forward_block(columns, block):
  rows, image, scale = block
  own = image[:, None] == column_image(columns.shape[0])[None, :]
  s = _similarity(rows, columns)
  logits = jnp.where(own, -jnp.inf, scale[:, None] * s)
  # The true maximum: a bound from norms may lie so far above it that every
  # exponential underflows, and finding it takes 3 % of the forward pass.
  top = jnp.max(logits, axis=1)
  p = jnp.exp(logits - top[:, None])
  total = jnp.sum(p, axis=1)
  mean = jnp.sum(p * s, axis=1) / total
  return top + jnp.log(total), mean


def forward(rows, columns, image, scale):
  """Values and means.

  Args:
    rows: (n, d), any float dtype.
    columns: (c, d) of the same dtype; None if the rows are all the columns.
    image: (n,), int32: position of the row modulo c / 2.
    scale: (n,), float32.

  Returns:
    `value` (n,) and `mean` (n,), float32.
  """
  columns = rows if columns is None else columns
  n, c = rows.shape[0], columns.shape[0]
  block = functools.partial(_forward_block, columns)
  if _fits_one_block(n, c):
    return block((rows, image, scale))
  blocks = _to_blocks((rows, image, scale), n, c)
  return _from_blocks(jax.lax.map(block, tuple(blocks)), n)


def _pull_rows(rows, image, scale, value, weight, block):
  """d_rows of one block where rows are columns too: their two roles at once."""
  own = block[1][:, None] == image[None, :]
  s = _similarity(block[0], rows)
  _, _, block_scale, block_value, block_weight = block
  as_row = jnp.exp(block_scale[:, None] * s - block_value[:, None])
  as_column = jnp.exp(scale[None, :] * s - value[None, :])
  pull = block_weight[:, None] * as_row + weight[None, :] * as_column
  d_rows = _matmul(jnp.where(own, 0.0, pull), rows.astype(jnp.float32))
  return d_rows.astype(rows.dtype)


def _pull_both(columns, d_columns, block):
  """d_rows of one block; adds its part to the transposed d_columns."""
  rows, image, scale, value, weight = block
  own = image[:, None] == column_image(columns.shape[0])[None, :]
  s = _similarity(rows, columns)
  p = jnp.exp(scale[:, None] * s - value[:, None])
  pull = jnp.where(own, 0.0, weight[:, None] * p)
  d_rows = _matmul(pull, columns.astype(jnp.float32))
  d_columns += _matmul(rows.T.astype(jnp.float32), pull)
  return d_columns, d_rows.astype(rows.dtype)


def backward(rows, columns, image, scale, value, cotangent):
  """Gradients of `sum(cotangent * value)`.

  Args:
    rows: (n, d), as for `forward`.
    columns: (c, d) or None, as for `forward`.
    image: (n,), int32, as for `forward`.
    scale: (n,), float32, as for `forward`.
    value: (n,), float32: what `forward` returned.
    cotangent: (n,), float32.

  Returns:
    d_rows (n, d) and d_columns (c, d), or None where columns are None; in the
    dtype of the embeddings.
  """
  n = rows.shape[0]
  stats = (rows, image, scale, value, cotangent * scale)
  if columns is None:
    block = functools.partial(_pull_rows, *stats)
    if _fits_one_block(n, n):
      return block(stats), None
    blocks = _to_blocks(stats, n, n)
    return _from_blocks(jax.lax.map(block, tuple(blocks)), n), None
  c = columns.shape[0]
  block = functools.partial(_pull_both, columns)
  d_columns = jnp.zeros_like(columns.T, dtype=jnp.float32)
  if _fits_one_block(n, c):
    d_columns, d_rows = block(d_columns, stats)
  else:
    blocks = _to_blocks(stats, n, c)
    d_columns, d_rows = jax.lax.scan(block, d_columns, tuple(blocks))
    d_rows = _from_blocks(d_rows, n)
  return d_rows, d_columns.T.astype(columns.dtype)
