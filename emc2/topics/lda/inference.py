r"""Topics of documents under topics that stay: held-out documents, E-steps."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.topics.lda import checks, expectations
from emc2.topics.lda import documents as documents_lib

MAX_GATHERED = 1 << 24
"""Numbers of all rows gathered for a batch: 64 MiB in float32."""


class Inferred(NamedTuple):
  """What :func:`infer` returns."""

  documents: jax.Array  # (batch, K): gamma - alpha.
  weights: jax.Array  # (batch, K): the T of the phi that `documents` adds up.
  steps: jax.Array  # (batch,), int32: those that each document took.


def infer(
  batch: documents_lib.Batch,
  word_weights: jax.Array,
  *,
  alpha: jax.typing.ArrayLike,
  max_steps: jax.typing.ArrayLike = 100,
  tolerance: jax.typing.ArrayLike = 1e-3,
  start: jax.Array | None = None,
) -> Inferred:
  r"""Finds the topics of documents by coordinate ascent.

  With the weights :math:`B_{vk} = e^{E[\log \beta_{kv}]}` of the words and the
  counts :math:`n_{dw}`, each step is

  .. math::
    T_{dk} = e^{\psi(\gamma_{dk}) - \psi(\sum_k \gamma_{dk})}, \quad
    R_{dw} = \frac{n_{dw}}{(T B^\top)_{dw}}, \quad
    \gamma_{dk} \leftarrow \alpha + T_{dk} (R B)_{dk},

  until the mean of :math:`|\Delta \gamma_d|` over topics falls below the
  tolerance. A document stays from there on, so that the others of the batch
  make no difference to it. Each step is two matrix products with rows that are
  gathered once.

  Args:
    batch: Documents (batch, width); one without a token gets gamma = alpha.
    word_weights: B, (V, K), as :func:`expectations.word_weights` makes it; a
      factor common to a word's topics makes no difference.
    alpha: Prior of a document's topics, above 0.
    max_steps: At least 1.
    tolerance: 0 for exactly `max_steps` steps.
    start: (batch, K), :math:`\gamma - \alpha` at first; None shares the tokens
      of a document equally among its topics.

  Returns:
    In the dtype of `word_weights`.
  """
  rows = gather(word_weights, batch.word_ids)
  return infer_from_rows(
    batch.counts,
    rows,
    alpha=alpha,
    max_steps=max_steps,
    tolerance=tolerance,
    start=start,
  )


def infer_from_rows(
  counts: jax.Array,
  rows: jax.Array,
  *,
  alpha: jax.typing.ArrayLike,
  max_steps: jax.typing.ArrayLike = 100,
  tolerance: jax.typing.ArrayLike = 1e-3,
  start: jax.Array | None = None,
) -> Inferred:
  """What :func:`infer` does, on word weights gathered before.

  Args:
    counts: (batch, width).
    rows: (batch, width, K), the weights of each pair's word.
    alpha: As in `infer`.
    max_steps: As in `infer`.
    tolerance: As in `infer`.
    start: As in `infer`.

  Returns:
    As `infer`.
  """
  counts = jnp.asarray(counts, rows.dtype)
  num_topics = rows.shape[-1]
  if start is None:
    share = jnp.sum(counts, -1, keepdims=True) / num_topics
    start = jnp.broadcast_to(share, (counts.shape[0], num_topics))
  tolerance = jnp.asarray(tolerance, rows.dtype)

  def is_open(carry):
    number, _, _, moving, _ = carry
    return (number < max_steps) & jnp.any(moving)

  def update(carry):
    number, sums, weights, moving, steps = carry
    new_weights = expectations.document_weights(sums, alpha)
    ratio = counts / (scores(rows, new_weights) + expectations.TINY)
    new = new_weights * add_rows(ratio, rows)
    change = jnp.mean(jnp.abs(new - sums), -1)
    keep = lambda new, old: jnp.where(moving[:, None], new, old)
    sums, weights = keep(new, sums), keep(new_weights, weights)
    steps += moving.astype(jnp.int32)
    return number + 1, sums, weights, moving & (change >= tolerance), steps

  start = jnp.asarray(start, rows.dtype)
  # Made of `start`, so that all vary over the same mesh axes.
  nothing = jnp.sum(start + rows[:, 0], -1) * 0
  start += nothing[:, None]
  carry = (
    jnp.zeros([], jnp.int32),
    start,
    start,
    nothing == 0,
    nothing.astype(jnp.int32),
  )
  _, sums, weights, _, steps = jax.lax.while_loop(is_open, update, carry)
  return Inferred(sums, weights, steps)


def gather(table: jax.Array, word_ids: jax.Array) -> jax.Array:
  """Rows of a table (V, K) by word, (batch, width, K)."""
  return table.at[word_ids].get(mode='promise_in_bounds')


def scores(rows: jax.Array, weights: jax.Array) -> jax.Array:
  """(batch, width, K) times (batch, K): the T B' of each pair."""
  return jnp.einsum(
    'dwk,dk->dw', rows, weights, precision=jax.lax.Precision.HIGHEST
  )


def add_rows(ratio: jax.Array, rows: jax.Array) -> jax.Array:
  """(batch, width) times (batch, width, K): the R B of each document."""
  return jnp.einsum(
    'dw,dwk->dk', ratio, rows, precision=jax.lax.Precision.HIGHEST
  )
