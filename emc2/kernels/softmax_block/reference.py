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


def visit(
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
  widened = weights.astype(wide(weights))

  def step(total, tile):
    x, normalizers, labels, row_weights = tile
    x = x.astype(widened.dtype)
    errors, scored = compare(
      _matmul(x, widened),
      normalizers,
      labels,
      row_weights,
      num_valid,
      normalizer,
    )
    return total + _matmul(x.T, errors), scored

  tiles = features, normalizers, labels, row_weights
  gradient, scored = _over_tiles(
    step, jnp.zeros_like(widened), tiles, weights.shape[1]
  )
  return Visit(gradient.astype(weights.dtype), *scored)


def score(
  features: jax.Array,
  weights: jax.Array,
  labels: jax.Array,
  num_valid: jax.Array,
) -> Scored:
  """See :func:`emc2.kernels.softmax_block.score_block`."""
  widened = weights.astype(wide(weights))

  def step(total, tile):
    x, labels = tile
    scores = _matmul(x.astype(widened.dtype), widened)
    return total, summarize(scores, labels, num_valid)[1]

  tiles = features, labels
  return _over_tiles(step, (), tiles, weights.shape[1])[1]


def summarize(
  scores: jax.Array, labels: jax.Array, num_valid: jax.Array
) -> tuple[jax.Array, Scored]:
  """Scores (n, K) with padded classes at -inf, and what rows keep of them."""
  classes = jnp.arange(scores.shape[1], dtype=jnp.int32)
  labels = within(labels, num_valid)
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
  labels = within(labels, num_valid)
  chosen = (labels[:, None] == classes[None]).astype(scores.dtype)
  errors = jnp.exp(scores - normalizers[:, None]) - chosen
  return row_weights[:, None] * errors, scored


def within(labels: jax.Array, num_valid: jax.Array) -> jax.Array:
  """Labels, and -1 for those that no class of the block has."""
  return jnp.where(labels < num_valid, labels, -1)


def normalize(
  normalizers: jax.Array, logsumexp: jax.Array, normalizer: str
) -> jax.Array:
  """The log-normaliser that a visit uses, by its mode."""
  if normalizer == 'frozen':
    return normalizers
  join = jnp.maximum if normalizer == 'floor' else jnp.logaddexp
  found = join(normalizers, logsumexp)
  # A row that no class is known to has no probabilities, and no NaN.
  return jnp.where(found == -jnp.inf, 0, found)


def wide(weights: jax.Array) -> jax.typing.DTypeLike:
  """The dtype of scores and sums: that of the weights, or float32."""
  bits = jnp.finfo(weights.dtype).bits
  return weights.dtype if bits > 32 else jnp.dtype(jnp.float32)


def _matmul(x, y):
  # A score of 16 bits errs by too much for a logarithm of many of them.
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


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
