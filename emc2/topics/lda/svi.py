"""Online LDA: stochastic variational inference on minibatches of documents."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.topics import checks
from emc2.topics.lda import documents as documents_lib
from emc2.topics.lda import expectations, fading, inference

State = fading.State
word_sums = fading.word_sums
shardings = fading.shardings


class Info(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (): -log sum_k T B, mean over tokens, before the step.
  steps: jax.Array  # (), int32: most that a document's topics took.
  step_size: jax.Array  # (): what was given to the minibatch.


def init(
  key: jax.Array,
  word_sums: jax.typing.ArrayLike | None = None,
  *,
  num_topics: int,
  num_words: int,
  eta: jax.typing.ArrayLike = 0.01,
  concentration: float = 100.0,
) -> State:
  """Draws topics, or takes some; see :func:`svi`."""
  if word_sums is None:
    shape = num_words, num_topics
    draws = jax.random.gamma(key, concentration, shape) / concentration
    word_sums = draws - jnp.asarray(eta, draws.dtype)
  return fading.start(word_sums)


def step(
  key: jax.Array,
  state: State,
  batch: documents_lib.Batch,
  start: jax.Array | None = None,
  *,
  num_documents: int,
  step_size: float | fading.Schedule,
  alpha: jax.typing.ArrayLike = 0.1,
  eta: jax.typing.ArrayLike = 0.01,
  max_steps: int = 100,
  tolerance: float = 1e-3,
  concentration: float = 100.0,
  random_start: bool = True,
  axis_name: str | None = None,
) -> tuple[State, Info]:
  """One step of :func:`svi`."""
  words, totals, count = state
  num_words = words.rows.shape[0]
  dtype = words.rows.dtype
  word_ids = jnp.asarray(batch.word_ids)
  counts = jnp.asarray(batch.counts, dtype)

  def weigh(word_ids):
    take = lambda sums: expectations.word_weights(sums, totals, eta, num_words)
    # Words that a batch lacks need no weights, unless its pairs are more than
    # there are words.
    if word_ids.size < num_words:
      return take(fading.take(words, word_ids))
    return [x[word_ids] for x in take(fading.value(words))]

  rows, logs = weigh(word_ids)
  if start is None and random_start:
    shape = counts.shape[0], totals.shape[0]
    start = _draw(key, shape, concentration, dtype, axis_name)
    start -= jnp.asarray(alpha, dtype)
  found = inference.infer_from_rows(
    counts,
    rows,
    alpha=alpha,
    max_steps=max_steps,
    tolerance=tolerance,
    start=start,
  )
  scores = inference.scores(rows, found.weights) + expectations.TINY
  log_likelihood = jnp.sum(counts * (jnp.log(scores) + logs))
  num_tokens, gained = jnp.sum(counts), jnp.sum(found.documents, 0)
  steps = jnp.max(found.steps)
  # Sums by word are made of the responsibilities that made gamma.
  ratio, weights = counts / scores, found.weights
  if axis_name is not None:
    sums = log_likelihood, num_tokens, gained
    log_likelihood, num_tokens, gained = jax.lax.psum(sums, axis_name)
    steps = jax.lax.pmax(steps, axis_name)
    gather = functools.partial(
      jax.lax.all_gather, axis_name=axis_name, tiled=True, to='invarying'
    )
    word_ids, ratio, weights = map(gather, (word_ids, ratio, weights))
    rows = weigh(word_ids)[0]
  share = num_documents / word_ids.shape[0]
  updates = share * ratio[:, :, None] * weights[:, None] * rows
  rate = fading.rate(step_size, count, totals)
  state = State(
    words=fading.mix(words, rate, word_ids, updates),
    totals=(1 - rate) * totals + rate * share * gained,
    count=count + 1,
  )
  loss = -log_likelihood / (num_tokens + expectations.TINY)
  return state, Info(loss, steps, rate)


def svi(
  num_topics: int,
  num_words: int,
  *,
  num_documents: int,
  alpha: float = 0.1,
  eta: float = 0.01,
  step_size: float | fading.Schedule | None = None,
  max_steps: int = 100,
  tolerance: float = 1e-3,
  concentration: float = 100.0,
  random_start: bool = True,
  axis_name: str | None = None,
) -> algorithm.Algorithm:
  r"""Online LDA, which follows the natural gradient of the bound.

  For a minibatch of S documents, each step finds :math:`\gamma_d` with the
  topics fixed (:func:`emc2.topics.lda.inference.infer`) and, with the
  responsibilities :math:`\phi` that made it,

  .. math::
    \hat\lambda_{vk} = \eta + \frac{D}{S} \sum_{d \in S} n_{dv} \phi_{dvk},
    \quad
    \lambda \leftarrow (1 - \rho_t) \lambda + \rho_t \hat\lambda, \quad
    \rho_t = (\tau_0 + t)^{-\kappa}.

  A step touches the words of its documents only, and not all V: the others fade
  by a common factor, which is kept apart (:class:`State`). Where many devices
  split a batch (`axis_name`), each sends the factors of its :math:`\phi` and
  not its sums by word, and adds up those of all.

  Args:
    num_topics: K, at least 2. Static.
    num_words: V.
    num_documents: D, of the whole corpus; for a stream, how many documents'
      worth the topics shall know.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    step_size: :math:`\rho_t` in (0, 1], or a function of the number t of
      finished steps; `fading.power()`, with :math:`\tau_0 = 64` and
      :math:`\kappa = 0.7`, by default.
    max_steps: Of a document's topics, as in `infer`.
    tolerance: Likewise.
    concentration: c of the distribution :math:`\Gamma(c, 1 / c)` from which the
      first :math:`\lambda` and, at every step, :math:`\gamma` are drawn.
    random_start: Whether :math:`\gamma` is drawn, as the paper does. If not, a
      document's tokens are shared equally at first, which spares the draws.
      Static.
    axis_name: The mesh axis over which a batch is split, inside
      `jax.shard_map`; or None, also under `jax.jit` with sharded arrays.

  Returns:
    `init(key, word_sums=None)`, which takes :math:`\lambda - \eta` (V, K) to
    start from; and `step(key, state, batch, start=None)` with a
    :class:`~emc2.topics.lda.documents.Batch` of S documents, of which the empty
    ones count too, and, if given, the first :math:`\gamma - \alpha` (S, K).

  Raises:
    ValueError: If an argument breaks its rule.

  .. note::
    All documents in one batch, :math:`\rho = 1` and one step from the last
    :math:`\gamma` are an iteration of batch variational inference. The authors'
    program makes :math:`\hat\lambda` of responsibilities that it computes once
    more, from the last :math:`\gamma`; the paper, and this, of those that made
    it.

  References:
    Hoffman, Blei, Bach, `Online Learning for Latent Dirichlet Allocation
    <https://papers.nips.cc/paper/3902>`_, 2010, algorithm 2.
  """
  checks.check_model(num_topics, num_words, alpha, eta)
  arguments.check_at_least('num_documents', num_documents, 1)
  arguments.check_at_least('max_steps', max_steps, 1)
  arguments.check_at_least('tolerance', tolerance, 0)
  arguments.check_positive('concentration', concentration)
  step_size = fading.power() if step_size is None else step_size
  fading.check_step_size('step_size', step_size)

  def init_fn(key, word_sums=None):
    if word_sums is not None:
      checks.check_word_sums(word_sums, num_words, num_topics)
    return init(
      key,
      word_sums,
      num_topics=num_topics,
      num_words=num_words,
      eta=eta,
      concentration=concentration,
    )

  def step_fn(key, state, batch, start=None):
    checks.check_batch(batch)
    return step(
      key,
      state,
      batch,
      start,
      num_documents=num_documents,
      step_size=step_size,
      alpha=alpha,
      eta=eta,
      max_steps=max_steps,
      tolerance=tolerance,
      concentration=concentration,
      random_start=random_start,
      axis_name=axis_name,
    )

  return algorithm.Algorithm(init_fn, step_fn)


def _draw(key, shape, concentration, dtype, axis_name):
  """Rows of Gamma draws, the same however documents are split."""
  ids = jnp.arange(shape[0], dtype=jnp.int32)
  if axis_name is not None:
    ids += shape[0] * jax.lax.axis_index(axis_name)

  def draw(number):
    own = jax.random.fold_in(key, number)
    return jax.random.gamma(own, concentration, shape[1:], dtype)

  return jax.vmap(draw)(ids) / concentration
