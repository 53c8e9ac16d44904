r"""Extreme stochastic variational inference of LDA.

Documents stay on their devices and blocks of words go round a ring. Each visit
of a block is an exact coordinate ascent, so the bound never falls, and nothing
is global but the K sums over all words.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments, ring
from emc2 import mesh as mesh_lib
from emc2.topics import checks
from emc2.topics.lda import cells as cells_lib
from emc2.topics.lda import expectations, responsibilities, sweep

STORAGES = ('cell', 'phi', 'topk')
PI_SYNCS = ('rotation', 'epoch')
TAILS = ('mean', 'meanfield')


class State(NamedTuple):
  """Sums of expected tokens by topic, without the priors."""

  documents: jax.Array  # (D, K): gamma - alpha.
  words: jax.Array  # (B, V / B, K): lambda - eta.
  totals: jax.Array  # (K,): their sums over all words.
  memory: Any  # What each cell gave so far, by `storage`.
  count: jax.Array  # (), int32: finished passes.


class CellMemory(NamedTuple):
  """The sums that each cell gave; `storage='cell'`."""

  documents: jax.Array  # (B, D, K).
  words: jax.Array  # (W, B, V / B, K).


class PhiMemory(NamedTuple):
  """The responsibilities of each pair; `storage='phi'`."""

  # Flat, since a TPU would pad a last axis to a multiple of 128.
  phi: jax.Array  # (W, B * L, T * K).


class TopkMemory(NamedTuple):
  """The largest responsibilities of each pair; `storage='topk'`."""

  # Flat, likewise.
  topics: jax.Array  # (W, B * L, T * C), int32.
  phi: jax.Array  # (W, B * L, T * C); the others share the rest.


class Info(NamedTuple):
  """What a reader may log of one pass."""

  loss: jax.Array  # (): -log sum_k T B, mean over tokens as they were visited.


def init(
  key: jax.Array,
  cells: cells_lib.Cells,
  *,
  num_topics: int,
  num_words: int,
  storage: str = 'cell',
  top_c: int | None = None,
  concentration: float = 1.0,
  axis_name: str | None = None,
) -> State:
  """Draws responsibilities and adds them up; see :func:`esvi`."""
  local = responsibilities.Local.of(
    key, cells, num_topics, num_words, axis_name
  )
  if storage == 'cell':
    sums = responsibilities.draw_sums(local, concentration)
    memory = CellMemory(sums[0], sums[1][None])
    documents, by_word = jnp.sum(sums[0], 0), sums[1]
  else:
    unpack = functools.partial(_unpack, storage, num_topics, top_c)

    def make(number):
      phi = responsibilities.draw_tile(local, number, concentration)
      return _pack(storage, top_c, 'mean', phi)

    memory = responsibilities.remember(local, make)
    documents, by_word = responsibilities.add_up(local, memory, unpack)
    memory = jax.tree.map(lambda x: x[None], memory)
  words = responsibilities.share_words(by_word, axis_name)
  return State(
    documents=documents,
    words=words,
    totals=responsibilities.total(words, axis_name),
    memory=memory,
    count=jnp.zeros([], jnp.int32),
  )


def step(
  key: jax.Array,
  state: State,
  cells: cells_lib.Cells,
  *,
  num_topics: int,
  num_words: int,
  alpha: jax.typing.ArrayLike = 0.1,
  eta: jax.typing.ArrayLike = 0.01,
  storage: str = 'cell',
  top_c: int | None = None,
  tail: str = 'mean',
  pi_sync: str = 'rotation',
  active_prob: float = 1.0,
  refresh_every: int = 50,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> tuple[State, Info]:
  """One pass over all cells; see :func:`esvi`."""
  local = responsibilities.Local.of(
    key, cells, num_topics, num_words, axis_name
  )
  pack = functools.partial(_pack, storage, top_c, tail)
  unpack = functools.partial(_unpack, storage, num_topics, top_c)

  def visit_sums(resident, own, block, number):
    """Storage of sums: the cell at once, by matrix products."""
    documents, totals, memory = resident
    weights = expectations.document_weights(documents, alpha)
    others = expectations.word_weights(block, totals, eta, num_words)
    new = sweep.add_up(
      weights, others, local.cell(number), implementation=implementation
    )
    documents = jnp.maximum(documents + (new.documents - own.documents), 0)
    block = jnp.maximum(block + (new.words - own.words), 0)
    own = CellMemory(new.documents, new.words)
    return (documents, totals, memory), own, block, new.log_likelihood

  def visit_pairs(resident, own, block, number):
    """Storage of responsibilities: pair by pair."""
    documents, totals, memory = resident
    weights = expectations.document_weights(documents, alpha)
    others = expectations.word_weights(block, totals, eta, num_words)

    def update(carry, own, tile):
      documents, block, log_likelihood = carry
      ids, word_ids, counts = tile
      old = unpack(own)
      phi = sweep.gather(weights, ids) * sweep.gather(others.scaled, word_ids)
      scores = sweep.row_sums(phi) + expectations.TINY
      own = pack(phi / scores)
      change = counts[:, None] * (unpack(own) - old)
      documents = sweep.scatter_add(documents, ids, change)
      block = sweep.scatter_add(block, word_ids, change)
      logs = jnp.log(scores[:, 0]) + sweep.gather(others.logs, word_ids)
      log_likelihood += jnp.sum(counts * logs)
      return (documents, block, log_likelihood), own

    carry = documents, block, jnp.zeros_like(documents, shape=())
    carry, memory = sweep.visit_tiles(
      update,
      carry,
      memory,
      local.tiles(number),
      number * local.tiles_per_block,
    )
    documents, block, log_likelihood = carry
    documents, block = jnp.maximum(documents, 0), jnp.maximum(block, 0)
    return (documents, totals, memory), own, block, log_likelihood

  visit_cell = visit_sums if storage == 'cell' else visit_pairs

  # Losses add up as pairs, so that one collective carries both.
  def visit_and_count(resident, own, block, number):
    resident, own, block, gained = visit_cell(resident, own, block, number)
    cell = local.cell(number)
    tokens = jnp.sum(cell.counts) + jnp.sum(cell.dense)
    return resident, own, block, jnp.stack([-gained, tokens])

  def pass_by(resident, own, block, number):
    del number
    return resident, own, block, jnp.zeros_like(resident[0], shape=(2,))

  def visit(carry, own, block, number):
    resident, losses = carry
    operands = resident, own, block, number
    if active_prob < 1:
      chance = jax.random.fold_in(local.key, number)
      active = jax.random.bernoulli(chance, active_prob)
      visited = jax.lax.cond(active, visit_and_count, pass_by, *operands)
    else:
      visited = visit_and_count(*operands)
    (documents, totals, memory), own, new, gained = visited
    change = jnp.sum(new - block, 0)
    if pi_sync == 'rotation' and axis_name is not None:
      change = jax.lax.psum(change, axis_name)
    resident = documents, totals + change, memory
    return (resident, losses + gained), own, new

  documents, words, totals, memory, count = state
  if pi_sync == 'epoch':
    totals = mesh_lib.vary_alike(totals, documents)[0]
  # What is split by shards comes with an axis of this shard alone.
  if storage == 'cell':
    kept, memory = CellMemory(memory.documents, memory.words[0]), ()
  else:
    kept, memory = (), jax.tree.map(lambda x: x[0], memory)
  carry = (documents, totals, memory), jnp.zeros_like(documents, shape=(2,))
  carry, kept, words = ring.rotate(
    visit, carry, kept, words, axis_name=axis_name
  )
  (documents, totals, memory), losses = carry
  if pi_sync == 'epoch' and axis_name is not None:
    totals = state.totals + jax.lax.psum(totals - state.totals, axis_name)

  def refresh(documents, words, totals):
    del documents, words, totals
    if storage == 'cell':
      documents, by_word = jnp.sum(kept.documents, 0), kept.words
    else:
      documents, by_word = responsibilities.add_up(local, memory, unpack)
    words = responsibilities.share_words(by_word, axis_name)
    return documents, words, responsibilities.total(words, axis_name)

  count = count + 1
  if refresh_every:
    documents, words, totals = jax.lax.cond(
      count % refresh_every == 0,
      refresh,
      lambda *sums: sums,
      documents,
      words,
      totals,
    )
  if axis_name is not None:
    losses = jax.lax.psum(losses, axis_name)
  if storage == 'cell':
    memory = CellMemory(kept.documents, kept.words[None])
  else:
    memory = jax.tree.map(lambda x: x[None], memory)
  state = State(documents, words, totals, memory, count)
  # All devices may have passed.
  return state, Info(loss=losses[0] / jnp.maximum(losses[1], 1))


def shardings(storage: str = 'cell') -> State:
  """How a state is split over a ring, as a tree of `PartitionSpec`."""
  spec = jax.sharding.PartitionSpec
  memory = {
    'cell': CellMemory(spec(None, mesh_lib.RING), spec(mesh_lib.RING)),
    'phi': PhiMemory(spec(mesh_lib.RING)),
    'topk': TopkMemory(spec(mesh_lib.RING), spec(mesh_lib.RING)),
  }
  return State(
    documents=spec(mesh_lib.RING),
    words=spec(mesh_lib.RING),
    totals=spec(),
    memory=memory[storage],
    count=spec(),
  )


def esvi(
  num_topics: int,
  num_words: int,
  *,
  alpha: float = 0.1,
  eta: float = 0.01,
  storage: str = 'cell',
  top_c: int | None = None,
  tail: str = 'mean',
  pi_sync: str = 'rotation',
  active_prob: float = 1.0,
  concentration: float = 1.0,
  refresh_every: int = 50,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> algorithm.Algorithm:
  r"""ESVI for latent Dirichlet allocation.

  With :math:`\gamma_d = \alpha + \sum_w n_{dw} \phi_{dw}`,
  :math:`\lambda_v = \eta + \sum_d n_{dv} \phi_{dv}` and
  :math:`\pi = \sum_v \lambda_v`, a visit of the word block :math:`b` on a
  device sets, for the pairs of its documents and the words of the block,

  .. math::
    \phi_{dwk} \propto
      e^{\psi(\gamma_{dk}) + \psi(\lambda_{wk}) - \psi(\pi_k)}

  and then :math:`\gamma`, the block's :math:`\lambda` and :math:`\pi`. All
  devices do so at once, on documents and words that none shares with another.

  A step takes the :class:`~emc2.topics.lda.cells.Cells` of a corpus and passes
  over all of them. On one device the blocks follow one another; on a ring
  (`axis_name`) init and step run inside `jax.shard_map`, which
  :func:`emc2.topics.lda.on_ring` arranges.

  Args:
    num_topics: K, at least 2. Static.
    num_words: V, without padding. Static.
    alpha: Prior of a document's topics, above 0.
    eta: Prior of a topic's words, above 0.
    storage: What is remembered, to be replaced at the next visit. `'cell'`: the
      sums of each cell, 4 B D K + 4 V K bytes on a device of D documents.
      `'phi'`: all responsibilities, 4 K bytes a pair. `'topk'`: the `top_c`
      largest of each pair, 8 C bytes. Static.
    top_c: C, for `'topk'` only; a quarter of the topics by default. Static.
    tail: What the other topics of a pair are given with `'topk'`: `'mean'`,
      equal shares of what the largest leave, which is the paper's rule, or
      `'meanfield'`, the best member of that family. Static.
    pi_sync: `'rotation'` adds up the change of :math:`\pi` after every visit,
      which is exact; `'epoch'` once a pass, and in between each device knows
      its own changes only: the bound may then fall. Static.
    active_prob: Chance with which a device works on a block that visits it; the
      others pass, as stragglers do. In (0, 1]. Static.
    concentration: Of the symmetric Dirichlet distribution from which the first
      responsibilities are drawn; 0 gives each pair one topic.
    refresh_every: Passes after which the sums are made anew from the memory,
      since float32 drifts; 0 for never. Static.
    axis_name: The mesh axis of the ring, or None. Static.
    implementation: Of :func:`emc2.kernels.topic_tile.topic_tile`.

  Returns:
    `init(key, cells)` and `step(key, state, cells)`; the key of a step matters
    only where `active_prob` is below 1.

  Raises:
    ValueError: If an argument breaks its rule.

  .. note::
    The paper leaves the first responsibilities open and sums to the reader; its
    printed loop updates word by word, asynchronously. Equal responsibilities
    stay equal for ever, so they are drawn. Dense words
    (:func:`~emc2.topics.lda.cells.cut`) need `storage='cell'`.

  References:
    Zhang, Raman, Ji, Yu, Vishwanathan, Dhillon, `Extreme Stochastic Variational
    Inference: Distributed Inference for Large Scale Mixture Models
    <https://arxiv.org/abs/1605.09499>`_, 2019, algorithm 5 and section 5.3.
  """
  checks.check_model(num_topics, num_words, alpha, eta, concentration)
  arguments.check_one_of('storage', storage, STORAGES)
  arguments.check_one_of('pi_sync', pi_sync, PI_SYNCS)
  arguments.check_one_of('tail', tail, TAILS)
  arguments.check_at_least('refresh_every', refresh_every, 0)
  if not 0 < active_prob <= 1:
    raise ValueError(f'active_prob must lie in (0, 1], got {active_prob}.')
  if storage != 'topk' and top_c is not None:
    raise ValueError(f"top_c goes with storage='topk', got {storage=}.")
  if storage == 'topk':
    top_c = max(1, num_topics // 4) if top_c is None else top_c
    if not 1 <= top_c <= num_topics:
      raise ValueError(
        f'top_c must lie in [1, {num_topics}], the number of topics, got '
        f'{top_c}.'
      )
  shared = dict(
    num_topics=num_topics,
    num_words=num_words,
    storage=storage,
    top_c=top_c,
    axis_name=axis_name,
  )

  def init_fn(key, cells):
    checks.check_cells(cells, axis_name, dense=storage == 'cell')
    return init(key, cells, concentration=concentration, **shared)

  def step_fn(key, state, cells):
    checks.check_cells(cells, axis_name, dense=storage == 'cell')
    return step(
      key,
      state,
      cells,
      alpha=alpha,
      eta=eta,
      tail=tail,
      pi_sync=pi_sync,
      active_prob=active_prob,
      refresh_every=refresh_every,
      implementation=implementation,
      **shared,
    )

  return algorithm.Algorithm(init_fn, step_fn)


def _pack(storage, top_c, tail, phi):
  """The memory of a tile's responsibilities (T, K)."""
  if storage == 'phi':
    return PhiMemory(phi.reshape(-1))
  num_topics = phi.shape[-1]
  values, topics = jax.lax.top_k(phi, top_c)
  if tail == 'meanfield' and top_c < num_topics:
    chosen = _scatter(jnp.zeros_like(phi), topics, jnp.ones_like(values))
    logs = jnp.log(jnp.maximum(phi, expectations.TINY)) * (1 - chosen)
    others = num_topics - top_c
    rest = others * jnp.exp(jnp.sum(logs, -1, keepdims=True) / others)
    values /= jnp.sum(values, -1, keepdims=True) + rest
  return TopkMemory(topics.reshape(-1), values.reshape(-1))


def _unpack(storage, num_topics, top_c, memory):
  """The responsibilities (T, K) that a tile's memory stands for."""
  if storage == 'phi':
    return memory.phi.reshape(-1, num_topics)
  topics, values = (x.reshape(-1, top_c) for x in memory)
  rest = 1 - jnp.sum(values, -1, keepdims=True)
  rest = jnp.maximum(rest, 0) / max(1, num_topics - top_c)
  rest = jnp.broadcast_to(rest, (len(topics), num_topics))
  return _scatter(rest, topics, values)


def _scatter(table, columns, values):
  rows = jnp.arange(table.shape[0])[:, None]
  return table.at[rows, columns].set(
    values, mode='promise_in_bounds', unique_indices=True
  )
