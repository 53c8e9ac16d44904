"""A block of classes in plain JAX; fast on a CPU, and the oracle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NORMALIZERS = ('frozen', 'floor', 'joint')

TILE = 1 << 17
"""Scores that are held at once, so that they stay in the cache."""


class Visit(NamedTuple):
  """What a block of classes is told by some rows."""

  gradient: jax.Array  # (D, K): sum_i omega_i x_i (p_ik - y_ik).
  logsumexp: jax.Array  # (n,): over the block's classes.
  label_scores: jax.Array  # (n,): of the label; 0 where another block has it.


class Scored(NamedTuple):
  """What some rows are told by a block of classes."""

  logsumexp: jax.Array  # (n,).
  label_scores: jax.Array  # (n,).


def reference(
  features: jax.Array,
  weights: jax.Array,
  normalizers: jax.Array,
  labels: jax.Array,
  row_weights: jax.Array,
  num_valid: jax.Array,
  *,
  normalizer: str,
) -> Visit:
  """See :func:`emc2.kernels.softmax_block.softmax_block`."""

  def visit(total, tile):
    x, normalizers, labels, row_weights = tile
    errors, scored = compare(
      x @ weights, normalizers, labels, row_weights, num_valid, normalizer
    )
    return total + x.T @ errors, scored

  tiles = features, normalizers, labels, row_weights
  gradient, scored = _over_tiles(
    visit, jnp.zeros_like(weights), tiles, weights.shape[1]
  )
  return Visit(gradient, *scored)


def reference_scores(
  features: jax.Array,
  weights: jax.Array,
  labels: jax.Array,
  num_valid: jax.Array,
) -> Scored:
  """See :func:`emc2.kernels.softmax_block.score_block`."""

  def visit(total, tile):
    x, labels = tile
    return total, summarize(x @ weights, labels, num_valid)[1]

  tiles = features, labels
  return _over_tiles(visit, (), tiles, weights.shape[1])[1]


def summarize(
  scores: jax.Array, labels: jax.Array, num_valid: jax.Array
) -> tuple[jax.Array, Scored]:
  """Scores (n, K) with padded classes at -inf, and what rows keep of them."""
  classes = jnp.arange(scores.shape[1], dtype=jnp.int32)
  scores = jnp.where((classes < num_valid)[None], scores, -jnp.inf)
  largest = jnp.max(scores, axis=1)
  shift = jnp.where(jnp.isfinite(largest), largest, 0)
  total = jnp.sum(jnp.exp(scores - shift[:, None]), axis=1)
  chosen = labels[:, None] == classes[None]
  label_scores = jnp.sum(jnp.where(chosen, scores, 0), axis=1)
  return scores, Scored(shift + jnp.log(total), label_scores)


def compare(
  scores: jax.Array,
  normalizers: jax.Array,
  labels: jax.Array,
  row_weights: jax.Array,
  num_valid: jax.Array,
  normalizer: str,
) -> tuple[jax.Array, Scored]:
  """Weighted probabilities less labels (n, K), and what rows keep."""
  scores, scored = summarize(scores, labels, num_valid)
  normalizers = normalize(normalizers, scored.logsumexp, normalizer)
  classes = jnp.arange(scores.shape[1], dtype=jnp.int32)
  chosen = (labels[:, None] == classes[None]).astype(scores.dtype)
  errors = jnp.exp(scores - normalizers[:, None]) - chosen
  return row_weights[:, None] * errors, scored


def normalize(
  normalizers: jax.Array, logsumexp: jax.Array, normalizer: str
) -> jax.Array:
  """The log-normaliser that a visit uses, by its mode."""
  if normalizer == 'frozen':
    return normalizers
  if normalizer == 'floor':
    return jnp.maximum(normalizers, logsumexp)
  return jnp.logaddexp(normalizers, logsumexp)


def _over_tiles(visit, total, arrays, width):
  """Adds up over tiles of rows; the last may be shorter."""
  num_rows = arrays[0].shape[0]
  height = max(8, TILE // max(1, width))
  full = num_rows // height if num_rows > height else 0
  if not full:
    return visit(total, arrays)
  split = lambda x: x[: full * height].reshape(full, height, *x.shape[1:])
  total, kept = jax.lax.scan(visit, total, jax.tree.map(split, arrays))
  kept = jax.tree.map(lambda x: x.reshape(full * height), kept)
  if full * height == num_rows:
    return total, kept
  rest = jax.tree.map(lambda x: x[full * height :], arrays)
  total, last = visit(total, rest)
  join = lambda x, y: jnp.concatenate([x, y])
  return total, jax.tree.map(join, kept, last)
