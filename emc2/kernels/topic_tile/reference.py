"""The fused tile of a topic model, in plain `jax.numpy`.

Written for a CPU. Documents are taken a few hundred at a time, so that scores
and ratios stay in the caches: as wholes they would be mapped and zeroed anew by
each call. The sums of words are kept transposed, since a product that contracts
the leading axis of the ratios turns them first. Blocks of words as well gain
nothing here: their many small products repay no traffic.
"""

import jax
import jax.numpy as jnp

# A score that is no larger counts as no score at all.
TINY = 1e-30

_ROWS = 256  # Documents of a block, but no more than fit in so many scores.
_ENTRIES = 2**22
_MIN_ROWS = 32


def _matmul(x, y):
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def ratio(counts: jax.Array, scores: jax.Array) -> jax.Array:
  """Counts over scores, and 0 where there is no score; float32 both."""
  # A count of 0 over a score is 0, and needs no question of its own.
  return jnp.where(scores > TINY, counts / scores, 0.0)


def log_terms(counts: jax.Array, scores: jax.Array) -> jax.Array:
  """What each pair adds to the log-likelihood; 0 where the count is 0."""
  return counts * jnp.log(jnp.maximum(scores, TINY))


def _block_size(n_d, n_v):
  """Documents of a block: almost all blocks are then full."""
  most = max(_MIN_ROWS, min(_ROWS, _ENTRIES // n_v))
  return -(-n_d // -(-n_d // most))


def forward(
  doc_weights: jax.Array,
  word_weights: jax.Array,
  counts: jax.Array,
  *,
  log_likelihood: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """All sums of a tile.

  Args:
    doc_weights: (n_d, K), float32.
    word_weights: (n_v, K), float32.
    counts: (n_d, n_v), float or integer.
    log_likelihood: static; whether to take logarithms.

  Returns:
    `doc_sums` (n_d, K), `word_sums` (n_v, K) and `log_likelihood` (n_d,), or
    None without; float32.
  """
  (n_d, n_v), words = counts.shape, word_weights.T
  rows = _block_size(n_d, n_v)

  def body(i, carry):
    doc_sums, word_sums, logs = carry
    # The last block starts early enough to be full. Its first documents have
    # been met: they are written again, and must not count again for words.
    start = jnp.minimum(i * rows, n_d - rows)
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows)
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
    weights, block = take(doc_weights), take(counts).astype(jnp.float32)
    scores = _matmul(weights, words)
    pulls = ratio(block, scores)
    doc_sums = put(doc_sums, weights * _matmul(pulls, word_weights))
    new = start + jnp.arange(rows) >= i * rows
    word_sums += _matmul(jnp.where(new[:, None], weights, 0.0).T, pulls)
    if log_likelihood:
      logs = put(logs, jnp.sum(log_terms(block, scores), axis=1))
    return doc_sums, word_sums, logs

  empty = (
    jnp.zeros_like(doc_weights),
    jnp.zeros_like(words),
    jnp.zeros_like(doc_weights[:, 0]) if log_likelihood else None,
  )
  doc_sums, word_sums, logs = jax.lax.fori_loop(0, -(-n_d // rows), body, empty)
  return doc_sums, word_weights * word_sums.T, logs
