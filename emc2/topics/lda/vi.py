"""Batch variational inference of LDA: all documents, then all topics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2 import mesh as mesh_lib
from emc2.topics import checks
from emc2.topics.lda import cells as cells_lib
from emc2.topics.lda import expectations, responsibilities, sweep


class State(NamedTuple):
  """Sums of expected tokens by topic, without the priors."""

  documents: jax.Array  # (D, K): gamma - alpha.
  words: jax.Array  # (B, V / B, K): lambda - eta.
  count: jax.Array  # (), int32: finished passes.


class Info(NamedTuple):
  """What a reader may log of one pass."""

  loss: jax.Array  # (): -log sum_k T B, mean over tokens.


def init(
  key: jax.Array,
  cells: cells_lib.Cells,
  *,
  num_topics: int,
  num_words: int,
  concentration: float = 1.0,
  axis_name: str | None = None,
) -> State:
  """Draws responsibilities and adds them up; see :func:`vi`."""
  local = responsibilities.Local.of(
    key, cells, num_topics, num_words, axis_name
  )
  by_document, by_word = responsibilities.draw_sums(local, concentration)
  if axis_name is not None:
    by_word = jax.lax.psum(by_word, axis_name)
  return State(jnp.sum(by_document, 0), by_word, jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  cells: cells_lib.Cells,
  *,
  num_words: int,
  alpha: jax.typing.ArrayLike = 0.1,
  eta: jax.typing.ArrayLike = 0.01,
  document_steps: int = 1,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> tuple[State, Info]:
  """One pass over all cells; see :func:`vi`."""
  del key
  cells = jax.tree.map(lambda x: jnp.asarray(x)[0], cells)
  totals = jnp.sum(state.words, (0, 1))
  others = expectations.word_weights(state.words, totals, eta, num_words)
  zeros = jnp.zeros_like(state.documents)

  def pass_over(documents):
    weights = expectations.document_weights(documents, alpha)

    def visit(carry, cell):
      documents, log_likelihood = carry
      block, cell = cell
      new = sweep.add_up(weights, block, cell, implementation=implementation)
      log_likelihood += new.log_likelihood
      return (documents + new.documents, log_likelihood), new.words

    carry = zeros, jnp.zeros_like(documents, shape=())
    carry, words = jax.lax.scan(visit, carry, (others, cells))
    return *carry, words

  documents = state.documents
  for _ in range(document_steps - 1):
    documents = pass_over(documents)[0]
  documents, log_likelihood, words = pass_over(documents)
  tokens = jnp.sum(cells.counts) + jnp.sum(cells.dense)
  loss = jnp.stack([-log_likelihood, tokens])
  if axis_name is not None:
    words, loss = jax.lax.psum((words, loss), axis_name)
  return State(documents, words, state.count + 1), Info(loss[0] / loss[1])


def shardings() -> State:
  """How a state is split over a ring, as a tree of `PartitionSpec`."""
  spec = jax.sharding.PartitionSpec
  return State(documents=spec(mesh_lib.RING), words=spec(), count=spec())


def vi(
  num_topics: int,
  num_words: int,
  *,
  alpha: float = 0.1,
  eta: float = 0.01,
  document_steps: int = 1,
  concentration: float = 1.0,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> algorithm.Algorithm:
  r"""Batch variational inference for latent Dirichlet allocation.

  A step sets all responsibilities, and then :math:`\gamma` and :math:`\lambda`:

  .. math::
    \phi_{dwk} \propto
      e^{\psi(\gamma_{dk}) + \psi(\lambda_{wk}) - \psi(\pi_k)}, \quad
    \gamma_d = \alpha + \sum_w n_{dw} \phi_{dw}, \quad
    \lambda_v = \eta + \sum_d n_{dv} \phi_{dv}.

  A step takes the :class:`~emc2.topics.lda.cells.Cells` of a corpus; into how
  many blocks it is cut does not matter. On a mesh (`axis_name`) each device has
  a shard of the documents and all words, whose sums are added up once a step:
  what the paper calls distributed VI.

  Args:
    num_topics: K, at least 2. Static.
    num_words: V, without padding. Static.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    document_steps: How often :math:`\gamma` is set before :math:`\lambda` is,
      once. More cost as much again and find better topics. Static.
    concentration: Of the symmetric Dirichlet distribution from which the first
      responsibilities are drawn; 0 gives each pair one topic.
    axis_name: The mesh axis that splits the documents, or None. Static.
    implementation: Of :func:`emc2.kernels.topic_tile.topic_tile`.

  Returns:
    `init(key, cells)` and `step(key, state, cells)`; a step ignores its key.

  Raises:
    ValueError: If an argument breaks its rule.

  References:
    Blei, Ng, Jordan, `Latent Dirichlet Allocation
    <https://www.jmlr.org/papers/v3/blei03a.html>`_, 2003, section 5.
  """
  checks.check_model(num_topics, num_words, alpha, eta, concentration)
  arguments.check_at_least('document_steps', document_steps, 1)

  def init_fn(key, cells):
    checks.check_cells(cells, axis_name, dense=True)
    return init(
      key,
      cells,
      num_topics=num_topics,
      num_words=num_words,
      concentration=concentration,
      axis_name=axis_name,
    )

  def step_fn(key, state, cells):
    checks.check_cells(cells, axis_name, dense=True)
    return step(
      key,
      state,
      cells,
      num_words=num_words,
      alpha=alpha,
      eta=eta,
      document_steps=document_steps,
      axis_name=axis_name,
      implementation=implementation,
    )

  return algorithm.Algorithm(init_fn, step_fn)
