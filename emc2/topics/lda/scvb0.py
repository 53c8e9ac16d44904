"""Stochastic collapsed variational inference of LDA, of order zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.topics import checks
from emc2.topics.lda import documents as documents_lib
from emc2.topics.lda import expectations, fading, responsibilities, sweep

State = fading.State
word_sums = fading.word_sums
shardings = fading.shardings


class Info(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (): -log sum_k theta beta, mean over tokens as visited.
  step_size: jax.Array  # (): what was given to the minibatch.


def init(
  key: jax.Array,
  word_sums: jax.typing.ArrayLike | None = None,
  *,
  num_topics: int,
  num_words: int,
  num_tokens: float,
  concentration: float = 1.0,
) -> State:
  """Shares the tokens out among topics, or takes sums; see :func:`scvb0`."""
  if word_sums is None:
    dtype = jnp.zeros([]).dtype
    shape = num_words, num_topics
    word_sums = responsibilities.draw(key, shape, concentration, dtype)
    word_sums *= num_tokens / num_words
  return fading.start(word_sums)


def step(
  key: jax.Array,
  state: State,
  batch: documents_lib.Batch,
  *,
  num_tokens: float,
  step_size: float | fading.Schedule,
  document_step_size: float | fading.Schedule,
  alpha: jax.typing.ArrayLike = 0.1,
  eta: jax.typing.ArrayLike = 0.01,
  burn_in: int = 1,
  axis_name: str | None = None,
) -> tuple[State, Info]:
  """One step of :func:`scvb0`."""
  del key
  words, totals, count = state
  num_words, num_topics = words.rows.shape
  dtype = totals.dtype
  alpha, eta = jnp.asarray(alpha, dtype), jnp.asarray(eta, dtype)
  # Words of a document follow one another, documents stand side by side.
  word_ids = jnp.asarray(batch.word_ids).T
  counts = jnp.asarray(batch.counts, dtype).T[:, :, None]
  beta = fading.take(words, word_ids) + eta
  beta /= (totals + num_words * eta)[None, None, :]
  lengths = jnp.sum(counts, 0)

  def visit(carry, pair):
    sums, seen = carry
    beta, counts = pair
    phi = beta * (sums + alpha)
    scores = sweep.row_sums(phi) + expectations.TINY
    phi /= scores
    rate = fading.rate(document_step_size, seen, seen)
    # As many times as the word stands there.
    kept = (1 - rate) ** counts
    sums = kept * sums + (1 - kept) * lengths * phi
    return (sums, seen + counts), (counts * phi, counts * jnp.log(scores))

  def forget(carry, pair):
    return visit(carry, pair)[0], None

  carry = (
    jnp.broadcast_to(lengths / num_topics, (lengths.shape[0], num_topics)),
    jnp.zeros_like(lengths),
  )
  pairs = beta, counts
  carry = jax.lax.fori_loop(
    0,
    burn_in,
    lambda _, carry: jax.lax.scan(forget, carry, pairs)[0],
    carry,
  )
  _, (updates, logs) = jax.lax.scan(visit, carry, pairs)
  logs = jnp.sum(logs) - jnp.sum(
    lengths * jnp.log(lengths + num_topics * alpha)
  )
  found, gained = jnp.sum(lengths), jnp.sum(updates, (0, 1))
  if axis_name is not None:
    table = jnp.zeros_like(updates, shape=words.rows.shape)
    updates = table.at[word_ids].add(updates, mode='promise_in_bounds')
    word_ids = jnp.arange(num_words, dtype=jnp.int32)
    sums = logs, found, gained, updates
    logs, found, gained, updates = jax.lax.psum(sums, axis_name)
  found += expectations.TINY
  share = num_tokens / found
  rate = fading.rate(step_size, count, totals)
  state = State(
    words=fading.mix(words, rate, word_ids, share * updates),
    totals=(1 - rate) * totals + rate * share * gained,
    count=count + 1,
  )
  return state, Info(loss=-logs / found, step_size=rate)


def scvb0(
  num_topics: int,
  num_words: int,
  *,
  num_tokens: float,
  alpha: float = 0.1,
  eta: float = 0.01,
  step_size: float | fading.Schedule | None = None,
  document_step_size: float | fading.Schedule | None = None,
  burn_in: int = 1,
  concentration: float = 1.0,
  axis_name: str | None = None,
) -> algorithm.Algorithm:
  r"""SCVB0, which goes through each document word by word.

  With expected tokens by topic of a document :math:`N_d`, of a word
  :math:`N_w` and of all words :math:`N`, each token of a document of
  :math:`C_d` tokens gives

  .. math::
    \phi_k \propto (N_{dk} + \alpha) \frac{N_{wk} + \eta}{N_k + V \eta}, \quad
    N_d \leftarrow (1 - \rho) N_d + \rho C_d \phi,

  and a word that stands there m times does so at once,
  :math:`N_d \leftarrow (1 - \rho)^m N_d + (1 - (1 - \rho)^m) C_d \phi`. After
  some passes over the document that serve :math:`N_d` only, a last one gives
  the sums of a minibatch of M tokens, of the corpus's C:

  .. math::
    N_w \leftarrow (1 - \rho') N_w + \rho' \frac{C}{M} \sum \phi, \quad
    N \leftarrow (1 - \rho') N + \rho' \frac{C}{M} \sum \phi.

  Args:
    num_topics: K, at least 2. Static.
    num_words: V.
    num_tokens: C, above 0.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    step_size: :math:`\rho'` in (0, 1], or a function of the number of finished
      steps; :math:`10 / (1000 + t)^{0.9}` by default.
    document_step_size: :math:`\rho`, likewise, a function of the tokens of the
      document that were gone through at this visit;
      :math:`1 / (10 + t)^{0.9}` by default.
    burn_in: Passes over a document before the last one.
    concentration: Of the Dirichlet distribution from which the topics of each
      word's C / V tokens are drawn at first; 0 gives each word one topic.
    axis_name: The mesh axis over which a batch is split, inside
      `jax.shard_map`, where sums by word, (V, K), are added up; or None, also
      under `jax.jit` with sharded arrays.

  Returns:
    `init(key, word_sums=None)`, which takes sums (V, K) to start from; and
    `step(key, state, batch)` with a
    :class:`~emc2.topics.lda.documents.Batch`; no step draws.

  Raises:
    ValueError: If an argument breaks its rule.

  .. note::
    The update, its form for repeated words and both schedules are the paper's.
    Reconstructed: :math:`N_d` begins with equal shares and t = 0 at every
    visit, so that nothing of a document need be kept between visits, where the
    paper draws it once; and the first :math:`N_w` are draws, for which the
    paper has no rule that we know of. Words come in the order of the batch.

  References:
    Foulds, Boyles, DuBois, Smyth, Welling, `Stochastic Collapsed Variational
    Bayesian Inference for Latent Dirichlet Allocation
    <https://arxiv.org/abs/1305.2452>`_, 2013, algorithm 1.
  """
  checks.check_model(num_topics, num_words, alpha, eta, concentration)
  arguments.check_positive('num_tokens', num_tokens)
  arguments.check_at_least('burn_in', burn_in, 0)
  if step_size is None:
    step_size = fading.power(0.9, 1_000.0, 10.0)
  if document_step_size is None:
    document_step_size = fading.power(0.9, 10.0)
  fading.check_step_size('step_size', step_size)
  fading.check_step_size('document_step_size', document_step_size)
  settings = dict(
    num_tokens=num_tokens,
    step_size=step_size,
    document_step_size=document_step_size,
    alpha=alpha,
    eta=eta,
    burn_in=burn_in,
    axis_name=axis_name,
  )

  def init_fn(key, word_sums=None):
    if word_sums is not None:
      checks.check_word_sums(word_sums, num_words, num_topics)
    return init(
      key,
      word_sums,
      num_topics=num_topics,
      num_words=num_words,
      num_tokens=num_tokens,
      concentration=concentration,
    )

  def step_fn(key, state, batch):
    checks.check_batch(batch)
    return step(key, state, batch, **settings)

  return algorithm.Algorithm(init_fn, step_fn)
