"""Collapsed variational inference of LDA, of zeroth order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments, ring
from emc2 import mesh as mesh_lib
from emc2.topics import checks
from emc2.topics.lda import cells as cells_lib
from emc2.topics.lda import expectations, responsibilities, sweep


class State(NamedTuple):
  """Responsibilities, and the tokens by topic that they add up to."""

  documents: jax.Array  # (D, K).
  words: jax.Array  # (B, V / B, K).
  totals: jax.Array  # (K,): of all words.
  phi: jax.Array  # (W, B * L, T, K): of each pair.
  count: jax.Array  # (), int32: finished passes.


class Info(NamedTuple):
  """What a reader may log of one pass."""

  loss: jax.Array  # (): -log p(token | the others), mean over tokens.


def init(
  key: jax.Array,
  cells: cells_lib.Cells,
  *,
  num_topics: int,
  num_words: int,
  concentration: float = 0.0,
  axis_name: str | None = None,
) -> State:
  """Draws responsibilities and adds them up; see :func:`cvb0`."""
  local = responsibilities.Local.of(
    key, cells, num_topics, num_words, axis_name
  )
  phi = responsibilities.remember(
    local, lambda i: responsibilities.draw_tile(local, i, concentration)
  )
  documents, by_word = responsibilities.add_up(local, phi, lambda own: own)
  words = responsibilities.share_words(by_word, axis_name)
  totals = responsibilities.total(words, axis_name)
  return State(documents, words, totals, phi[None], jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  cells: cells_lib.Cells,
  *,
  num_topics: int,
  num_words: int,
  alpha: jax.typing.ArrayLike = 0.1,
  eta: jax.typing.ArrayLike = 0.01,
  refresh_every: int = 50,
  axis_name: str | None = None,
) -> tuple[State, Info]:
  """One pass over all pairs; see :func:`cvb0`."""
  local = responsibilities.Local.of(
    key, cells, num_topics, num_words, axis_name
  )
  alpha, eta = (jnp.asarray(x, state.documents.dtype) for x in (alpha, eta))
  # Tokens of a document do not change.
  lengths = jnp.sum(state.documents, 1)

  def update(carry, phi, tile):
    documents, block, totals, log_likelihood = carry
    ids, word_ids, counts = tile
    # One token, or what there is of it.
    one = jnp.minimum(counts, 1)
    own = one[:, None] * phi
    new = (
      (sweep.gather(documents, ids) - own + alpha)
      * (sweep.gather(block, word_ids) - own + eta)
      / (totals[None] - own + num_words * eta)
    )
    # Rounding may take a token from where there is none.
    new = jnp.maximum(new, 0)
    scores = sweep.row_sums(new) + expectations.TINY
    new *= 1 / scores
    change = counts[:, None] * (new - phi)
    documents = sweep.scatter_add(documents, ids, change)
    block = sweep.scatter_add(block, word_ids, change)
    totals += jnp.sum(change, 0)
    norms = lengths[ids] - one + num_topics * alpha
    log_likelihood += jnp.sum(counts * jnp.log(scores[:, 0] / norms))
    return (documents, block, totals, log_likelihood), new

  def visit(resident, own, block, number):
    documents, totals, phi, log_likelihood = resident
    before = totals
    carry = documents, block, *mesh_lib.vary_alike(totals, documents)[:1]
    carry, phi = sweep.visit_tiles(
      update,
      (*carry, log_likelihood),
      phi,
      local.tiles(number),
      number * local.tiles_per_block,
    )
    documents, block, totals, log_likelihood = carry
    if axis_name is not None:
      totals = before + jax.lax.psum(totals - before, axis_name)
    return (documents, totals, phi, log_likelihood), own, block

  zero = jnp.zeros_like(state.documents, shape=())
  resident = state.documents, state.totals, state.phi[0], zero
  resident, _, words = ring.rotate(
    visit, resident, (), state.words, axis_name=axis_name
  )
  documents, totals, phi, log_likelihood = resident

  def refresh(*sums):
    del sums
    documents, by_word = responsibilities.add_up(local, phi, lambda own: own)
    words = responsibilities.share_words(by_word, axis_name)
    return documents, words, responsibilities.total(words, axis_name)

  count = state.count + 1
  sums = documents, words, totals
  if refresh_every:
    due = count % refresh_every == 0
    sums = jax.lax.cond(due, refresh, lambda *sums: sums, *sums)
  loss = jnp.stack([-log_likelihood, jnp.sum(local.cells.counts)])
  if axis_name is not None:
    loss = jax.lax.psum(loss, axis_name)
  return State(*sums, phi[None], count), Info(loss[0] / loss[1])


def shardings() -> State:
  """How a state is split over a ring, as a tree of `PartitionSpec`."""
  spec, ring_axis = jax.sharding.PartitionSpec, mesh_lib.RING
  return State(
    spec(ring_axis), spec(ring_axis), spec(), spec(ring_axis), spec()
  )


def cvb0(
  num_topics: int,
  num_words: int,
  *,
  alpha: float = 0.1,
  eta: float = 0.01,
  concentration: float = 0.0,
  refresh_every: int = 50,
  axis_name: str | None = None,
) -> algorithm.Algorithm:
  r"""CVB0 for latent Dirichlet allocation.

  With :math:`N_{dk}`, :math:`N_{wk}` and :math:`N_k` the expected tokens of
  topic k in a document, of a word and in all, and :math:`\neg` for 'without one
  token of this pair',

  .. math::
    \phi_{dwk} \propto \frac{(N_{dk}^\neg + \alpha) (N_{wk}^\neg + \eta)}
                            {N_k^\neg + V \eta}.

  A step takes the :class:`~emc2.topics.lda.cells.Cells` of a corpus, without
  dense words, and passes over all of them. The sums follow each tile of pairs
  at once, so small tiles in random order learn in fewer passes. Documents stay
  on their devices and blocks of words go round the ring as in
  :func:`~emc2.topics.lda.esvi.esvi`.

  Args:
    num_topics: K, at least 2. Static.
    num_words: V, without padding. Static.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    concentration: Of the symmetric Dirichlet distribution from which the first
      responsibilities are drawn; 0 gives each pair one topic, which is the
      cheapest draw and as good a start.
    refresh_every: Passes after which the sums are made anew from the
      responsibilities, since float32 drifts; 0 for never. Static.
    axis_name: The mesh axis of the ring, or None. Static.

  Returns:
    `init(key, cells)` and `step(key, state, cells)`; a step ignores its key.

  Raises:
    ValueError: If an argument breaks its rule.

  .. note::
    The tokens of a pair share their responsibilities, and the sums follow each
    tile and not each token. On a ring :math:`N_k` is exact between visits; in
    one, a device knows its own changes only.

  References:
    Asuncion, Welling, Smyth, Teh, `On Smoothing and Inference for Topic Models
    <https://arxiv.org/abs/1205.2662>`_, 2009, section 2.4.
  """
  checks.check_model(num_topics, num_words, alpha, eta, concentration)
  arguments.check_at_least('refresh_every', refresh_every, 0)
  shared = dict(num_topics=num_topics, num_words=num_words, axis_name=axis_name)

  def init_fn(key, cells):
    checks.check_cells(cells, axis_name, dense=False)
    return init(key, cells, concentration=concentration, **shared)

  def step_fn(key, state, cells):
    checks.check_cells(cells, axis_name, dense=False)
    return step(
      key,
      state,
      cells,
      alpha=alpha,
      eta=eta,
      refresh_every=refresh_every,
      **shared,
    )

  return algorithm.Algorithm(init_fn, step_fn)
