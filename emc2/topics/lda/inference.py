"""Topics of documents under topics that stay: unseen documents, E-steps."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments
from emc2 import mesh as mesh_lib
from emc2.topics import checks
from emc2.topics.lda import documents as documents_lib
from emc2.topics.lda import expectations

MAX_GATHERED = 1 << 22
"""Numbers of the rows gathered at once: 16 MiB in float32.

A batch goes through them twice a step, so the cache should hold them.
"""

GROUP = 8
"""Documents that a CPU works on at once, until the last of them stays."""


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
    word_weights: B, (V, K), as
      :func:`~emc2.topics.lda.expectations.word_weights` scales it; a factor
      common to a word's topics makes no difference.
    alpha: Prior of a document's topics, above 0.
    max_steps: At least 1.
    tolerance: 0 for exactly `max_steps` steps.
    start: (batch, K), :math:`\gamma - \alpha` at first; None shares the tokens
      of a document equally among its topics.

  Returns:
    In the dtype of `word_weights`.

  Raises:
    ValueError: If `batch` is not (batch, width).
  """
  checks.check_batch(batch)
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
  counts: jax.typing.ArrayLike,
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
  start = jnp.asarray(start, rows.dtype)
  ascend = functools.partial(
    _ascend, alpha=alpha, max_steps=max_steps, tolerance=tolerance
  )
  if counts.shape[0] <= GROUP or counts.shape[0] % GROUP:
    return ascend(counts, rows, start)
  return jax.lax.platform_dependent(
    counts,
    rows,
    start,
    cpu=functools.partial(_in_groups, ascend),
    default=ascend,
  )


def _in_groups(ascend, counts, rows, start):
  """Few documents after few: each group stops by itself, at its own width."""
  width = counts.shape[1]
  widths = [width >> i for i in range(4) if not i or width >> i >= 16]
  split = lambda x: x.reshape(-1, GROUP, *x.shape[1:])

  def narrow(width):
    return lambda counts, rows, start: ascend(
      counts[:, :width], rows[:, :width], start
    )

  def visit(group):
    places = jnp.arange(1, width + 1, dtype=jnp.int32)
    filled = jnp.max(jnp.where(jnp.any(group[0] > 0, 0), places, 0))
    fits = filled <= jnp.asarray(widths[1:], jnp.int32)
    place = jnp.sum(fits, dtype=jnp.int32)
    return jax.lax.switch(place, [narrow(w) for w in widths], *group)

  found = jax.lax.map(visit, jax.tree.map(split, (counts, rows, start)))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def _ascend(counts, rows, start, *, alpha, max_steps, tolerance):
  """Coordinate ascent of all documents at once."""
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

  start, moving, steps, *_ = mesh_lib.vary_alike(
    start,
    jnp.ones(counts.shape[:1], bool),
    jnp.zeros(counts.shape[:1], jnp.int32),
    counts,
    rows,
  )
  carry = jnp.zeros([], jnp.int32), start, start, moving, steps
  _, sums, weights, _, steps = jax.lax.while_loop(is_open, update, carry)
  return Inferred(sums, weights, steps)


def gather(table: jax.Array, word_ids: jax.typing.ArrayLike) -> jax.Array:
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


def transform(
  word_sums: jax.typing.ArrayLike,
  documents: documents_lib.Documents,
  *,
  alpha: float,
  eta: float,
  max_steps: int = 100,
  tolerance: float = 1e-3,
) -> np.ndarray:
  r"""Shares of topics in documents, those that were seen or others.

  Compiles once for each width of a batch, and there are few.

  Args:
    word_sums: (V, K), :math:`\lambda - \eta`: tokens by word and topic.
    documents: D of them, over the same V words.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    max_steps: As in :func:`infer`.
    tolerance: As in :func:`infer`.

  Returns:
    (D, K), :math:`\gamma_{dk} / \sum_k \gamma_{dk}`; equal shares where a
    document has no token.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  arguments.check_positive('alpha', alpha)
  arguments.check_positive('eta', eta)
  arguments.check_at_least('max_steps', max_steps, 1)
  arguments.check_at_least('tolerance', tolerance, 0)
  word_sums = jnp.asarray(word_sums)
  checks.check_word_sums(word_sums, documents.num_words)
  num_topics = word_sums.shape[1]
  weights = _word_weights(word_sums, eta)
  found = []
  for ids, batch in documents_lib.batches(
    documents, max_places=MAX_GATHERED // num_topics
  ):
    sums = _infer(batch, weights, alpha, max_steps, tolerance)
    found.append((ids, sums))
  shape = documents.num_documents, num_topics
  gamma = np.full(shape, alpha, word_sums.dtype)
  for ids, sums in found:
    gamma[ids[ids >= 0]] += np.asarray(sums)[ids >= 0]
  return gamma / np.sum(gamma, -1, keepdims=True)


def perplexity(
  word_sums: jax.typing.ArrayLike,
  observed: documents_lib.Documents,
  evaluated: documents_lib.Documents,
  *,
  alpha: float,
  eta: float,
  num_steps: int = 200,
) -> float:
  r"""How well the one half of documents foretells the other.

  With :math:`\bar\theta_d = \gamma_d / \sum_k \gamma_{dk}` of the observed
  tokens, :math:`\bar\beta_{vk} = \lambda_{vk} / \pi_k` and the counts
  :math:`n_{dv}` of the evaluated ones,

  .. math::
    \exp \left( - \frac{\sum_{dv} n_{dv} \log \sum_k \bar\theta_{dk}
      \bar\beta_{vk}}{\sum_{dv} n_{dv}} \right).

  Args:
    word_sums: (V, K), :math:`\lambda - \eta`: tokens by word and topic.
    observed: D documents, over the same V words.
    evaluated: Other tokens of the same D documents.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    num_steps: Of :func:`infer`, without a tolerance.

  Returns:
    The perplexity: 1 at least, and V for topics that know nothing.

  Raises:
    ValueError: If an argument breaks its rule.

  .. note::
    The paper plots a "test perplexity" without saying what it is; this is
    document completion, with half of the tokens of each document drawn at
    random on either side.
  """
  word_sums = np.asarray(word_sums)
  checks.check_word_sums(word_sums, evaluated.num_words)
  if evaluated.num_documents != observed.num_documents:
    raise ValueError(
      f'evaluated must have the {observed.num_documents} documents of '
      f'observed, got {evaluated.num_documents}.'
    )
  if not evaluated.num_tokens:
    raise ValueError('evaluated must have at least one token, got none.')
  theta = transform(
    word_sums,
    observed,
    alpha=alpha,
    eta=eta,
    max_steps=num_steps,
    tolerance=0.0,
  )
  num_words, num_topics = word_sums.shape
  totals = np.sum(word_sums, 0, dtype=np.float64) + num_words * eta
  theta /= totals.astype(theta.dtype)
  of_pair = evaluated.document_ids
  total, size = 0.0, max(1, MAX_GATHERED // num_topics)
  for first in range(0, len(of_pair), size):
    pairs = slice(first, first + size)
    rows = word_sums[evaluated.word_ids[pairs]] + word_sums.dtype.type(eta)
    shares = np.einsum('pk,pk->p', theta[of_pair[pairs]], rows)
    logs = np.log(shares, dtype=np.float64)
    total += np.dot(evaluated.counts[pairs], logs)
  return float(np.exp(-total / evaluated.num_tokens))


@jax.jit
def _word_weights(word_sums, eta):
  totals = jnp.sum(word_sums, 0)
  found = expectations.word_weights(word_sums, totals, eta, len(word_sums))
  return found.scaled


@jax.jit
def _infer(batch, weights, alpha, max_steps, tolerance):
  return infer(
    batch,
    weights,
    alpha=alpha,
    max_steps=max_steps,
    tolerance=tolerance,
  ).documents
