r"""EMC²: negatives drawn by one Metropolis-Hastings chain per anchor.

An anchor x needs negatives from a softmax over the whole data set,
:math:`p_x(z) \propto \exp(\beta\,\phi(x)^\top\phi(z))`. Each anchor keeps the
last state of a chain whose law is :math:`p_x`; a visit scores that state anew,
proposes the other samples of the batch one after another and averages the
gradient over the states after burn-in. The partition function never appears.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.contrastive import estimator
from emc2.kernels import metropolis
from emc2.kernels.metropolis import reference

OUT_OF_BATCH = ('reencode', 'drop', 'cached')
PROPOSALS = ('batch', 'uniform', 'resample')

# A CPU makes floats of this many counts at a time, or of as many as so many
# columns have: a larger array is mapped and zeroed anew by each call.
_BLOCK_ENTRIES = 2**20
_MIN_COLUMNS = 128


class Memory(NamedTuple):
  """The chains: one per view of each sample, or one per sample (A = 1)."""

  index: jax.Array  # (m, A), int32: sample of the state, -1 = never visited.
  view: jax.Array  # (m, A), uint32: its view.
  logit: jax.Array | None  # (m, A), float32: its score when it was accepted.
  embedding: jax.Array | None  # (m, A, d): its embedding at that time.


class Info(NamedTuple):
  """What a reader may log of one visit."""

  loss: jax.Array  # (), float32: beta times mean (negative - positive) score.
  acceptance_rate: jax.Array  # (): of the proposals in the retained steps.
  stay: jax.Array  # (): share of the retained steps at the states of old.
  overflow: jax.Array  # (): share of chains whose old state lost its weight.


class Settings(NamedTuple):
  """What `surrogate` needs to know; :func:`emc2` explains each field."""

  num_samples: int
  inverse_temperature: float
  burn_in: float
  num_views: int | None
  out_of_batch: str
  capacity: int | None
  proposals: str
  released: bool
  axis_name: str | None
  implementation: str


class _Visit(NamedTuple):
  """The batch and its chains, as one device sees them; c = 1 or 2 per sample.

  With fixed views every row has its own chain; else the two rows of a sample
  share one, and the second row goes on where the first one ended.
  """

  views: estimator.Views
  index: jax.Array  # (b,), int32: this device's samples.
  view: jax.Array  # (2b,), uint32: and the view behind each row.
  slots: tuple[jax.Array, jax.Array]  # Of (c b,): where the chains are kept.
  state_index: jax.Array  # (c b,), int32: incoming states, -1 = none.
  state_view: jax.Array  # (c b,), uint32.
  legs: tuple[slice, ...]  # The rows that walk together.


class _Walk(NamedTuple):
  """What the chains of a visit brought back."""

  value: jax.Array  # (): sum over the rows of their negatives' scores.
  state_index: jax.Array  # (c b,), int32.
  state_view: jax.Array  # (c b,), uint32.
  logit: jax.Array  # (c b,), float32.
  last: jax.Array  # (c b,), int32: column of the state, -1 = out of batch.
  accepted: jax.Array  # (): share of accepted proposals.
  stay: jax.Array  # ()
  overflow: jax.Array  # ()


def init(
  key: jax.Array,
  params: Any,
  *,
  num_samples: int,
  num_views: int | None = None,
  keep_logit: bool = False,
  embedding_size: int | None = None,
) -> Memory:
  """Makes chains that have no state yet.

  Args:
    key: Unused; every `init` takes one.
    params: Unused; every estimator's `init` takes them.
    num_samples: m, static.
    num_views: A, static; None keeps one chain per sample.
    keep_logit: Whether the last scores are stored.
    embedding_size: d, to store the embeddings of the states; else None.

  Returns:
    The memory: 8 bytes a chain, 4 more for a score, 4 d for an embedding.
  """
  del key, params
  shape = (num_samples, num_views or 1)
  logit = jnp.full(shape, -jnp.inf, jnp.float32) if keep_logit else None
  embedding = None
  if embedding_size is not None:
    embedding = jnp.zeros((*shape, embedding_size), jnp.float32)
  return Memory(
    index=jnp.full(shape, -1, jnp.int32),
    view=jnp.zeros(shape, jnp.uint32),
    logit=logit,
    embedding=embedding,
  )


def surrogate(
  key: jax.Array,
  memory: Memory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  settings: Settings,
) -> tuple[jax.Array, tuple[Memory, Info]]:
  r"""The function whose gradient is the EMC² estimate; moves the chains.

  With :math:`W_{aj}` the share of the retained steps of row a at column j,
  :math:`w_a` the share at the incoming state :math:`G_a`, both held constant,

  .. math::
    J = \frac{1}{2B} \sum_a \Big[-\beta F_a^\top F_{part(a)}
        + \beta \sum_j W_{aj} F_a^\top F_j + \beta w_a F_a^\top G_a\Big].

  Args:
    key: Draws the acceptances; each row its own, by its place in the batch.
    memory: The chains.
    params: Of the encoder.
    batch: B distinct samples in two views; this device's under `shard_map`.
    embed_fn: The encoder.
    settings: See :func:`emc2`.

  Returns:
    J (this device's part of the sum), and the moved chains with what to log.
  """
  visit = _start_visit(memory, params, batch, embed_fn, settings)
  walks = {'batch': _walk, 'uniform': _walk_uniform, 'resample': _resample}
  walk = walks[settings.proposals](
    key, memory, params, batch, embed_fn, settings, visit
  )
  num_columns = visit.views.columns.shape[0]
  alignment = jnp.sum(estimator.positives(visit.views.rows))
  value = (walk.value - settings.inverse_temperature * alignment) / num_columns
  share = value * (num_columns / visit.views.rows.shape[0])
  info = Info(share, walk.accepted, walk.stay, walk.overflow)
  info = estimator.mean(jax.lax.stop_gradient(info), settings.axis_name)
  return value, (_write_back(memory, batch, visit, walk, settings), info)


def pending(
  key: jax.Array,
  memory: Memory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  settings: Settings,
) -> jax.Array:
  """The samples of the incoming states, each sample's together; see Estimator.

  A chain without a state names its own sample, which is loaded anyway.

  Args:
    key: The same as for `surrogate`.
    memory: The chains.
    params: Unused.
    batch: The whole batch; its `data` may be missing.
    embed_fn: Unused.
    settings: See :func:`emc2`.

  Returns:
    (n,) int32.
  """
  del params, embed_fn
  size = batch.index.shape[0]
  if settings.proposals == 'uniform':
    index = jnp.concatenate([batch.index, batch.index])
    position = jnp.arange(2 * size, dtype=jnp.int32)
    steps = 2 * size - 2
    return _draw_uniform(key, index, position, steps, settings)[0].reshape(-1)
  if settings.out_of_batch != 'reencode':
    return jnp.zeros((0,), jnp.int32)
  slots = _slots(batch, settings)
  state = memory.index[slots].reshape(-1, size)
  state = jnp.where(state < 0, batch.index[None, :], state)
  return state.T.reshape(-1)


def emc2(
  num_samples: int,
  *,
  inverse_temperature: float,
  burn_in: float = 0.0,
  num_views: int | None = None,
  out_of_batch: str = 'reencode',
  capacity: int | None = None,
  proposals: str = 'batch',
  embedding_size: int | None = None,
  released: bool = False,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> estimator.Estimator:
  """EMC²: MCMC negative sampling, 8 bytes a chain.

  Args:
    num_samples: m, the size of the data set; at least 2.
    inverse_temperature: beta > 0.
    burn_in: Share in [0, 1) of the `n = 2B - 2` steps of a visit whose states
      are not used; `floor(burn_in n)` steps.
    num_views: How many fixed views each sample has (one chain per view), or
      None when every visit augments anew (one chain per sample, shared by its
      two rows).
    out_of_batch: What becomes of an incoming state. `'reencode'` embeds its
      very view at the current parameters: exact. `'cached'` keeps the
      embedding of the time it was accepted, without gradient, for 4 d bytes a
      chain. `'drop'` embeds nothing, compares with the old score and leaves
      the weight out: what the released code comes to.
    capacity: At most so many incoming states are embedded on a device, those
      whose old scores make them likeliest to last; the others are treated as
      by `'drop'`, which matters only where `info.overflow` counts them. Costs
      4 bytes a chain for the scores. None embeds all. Only for `'reencode'`
      with proposals from the batch.
    proposals: `'batch'` proposes the batch's other samples in turn. `'uniform'`
      draws independently from the data set, as the theory does, and embeds
      all `2B (2B - 2)` of them. `'resample'` weighs the batch and both views
      of the incoming state by their softmax and draws the next state from it
      (iterated sampling-importance-resampling): no burn-in, and the chain's
      law is exact for any batch size.
    embedding_size: d; only and always for `'cached'`.
    released: Does what the authors' released code does instead: scores of the
      incoming states are never refreshed, one step too few is retained, and
      their weight is lost (with fixed views: given to the last column).
    axis_name: The mesh axis that splits the batch, under `jax.shard_map`.
    implementation: Of the sampler: `'auto'`, or one that
      :func:`emc2.kernels.metropolis.metropolis` names.

  Returns:
    The estimator. Its memory is replicated over the mesh.

  Raises:
    ValueError: If an argument is out of its range, or does not go with another.

  Examples:
    >>> method = emc2(100, inverse_temperature=5.0)
    >>> method.init(jax.random.key(0), None).index.shape
    (100, 1)

  .. note::
    The paper's proposals are independent of the state; those from the batch
    are not, which leaves a bias of about a fifth of SimCLR's. `'resample'` is
    not in the paper and has none.

  References:
    Yau, Wai, Raman, Sarkar, Hong, `EMC2: Efficient MCMC Negative Sampling for
    Contrastive Learning with Global Convergence
    <https://arxiv.org/abs/2404.10575>`_, 2024, Algorithm 1.
  """
  estimator.check_size(num_samples)
  estimator.check_positive('inverse_temperature', inverse_temperature)
  if not 0 <= burn_in < 1:
    raise ValueError(f'burn_in must lie in [0, 1), got {burn_in}.')
  if num_views is not None and num_views < 2:
    raise ValueError(f'num_views must be None or at least 2, got {num_views}.')
  if out_of_batch not in OUT_OF_BATCH:
    raise ValueError(
      f'out_of_batch must be one of {OUT_OF_BATCH}, got {out_of_batch!r}.'
    )
  if proposals not in PROPOSALS:
    raise ValueError(
      f'proposals must be one of {PROPOSALS}, got {proposals!r}.'
    )
  if (embedding_size is not None) != (out_of_batch == 'cached'):
    raise ValueError(
      "embedding_size goes with out_of_batch='cached' and with nothing else, "
      f'got {embedding_size=}, {out_of_batch=}.'
    )
  if capacity is not None and capacity < 1:
    raise ValueError(f'capacity must be None or at least 1, got {capacity}.')
  plain = out_of_batch == 'reencode' and proposals == 'batch' and not released
  if capacity is not None and not plain:
    raise ValueError(
      "capacity goes with out_of_batch='reencode' and proposals='batch', got "
      f'{out_of_batch=}, {proposals=}, {released=}.'
    )
  if proposals != 'batch' and (out_of_batch != 'reencode' or released):
    raise ValueError(
      f"proposals={proposals!r} goes with out_of_batch='reencode', got "
      f'{out_of_batch=}, {released=}.'
    )
  if proposals == 'resample' and burn_in:
    raise ValueError(
      f"burn_in must be 0 with proposals='resample', got {burn_in}."
    )
  if released and out_of_batch != 'reencode':
    raise ValueError(
      f"released goes with out_of_batch='reencode', got {out_of_batch!r}."
    )
  settings = Settings(
    num_samples=num_samples,
    inverse_temperature=inverse_temperature,
    burn_in=burn_in,
    num_views=num_views,
    out_of_batch=out_of_batch,
    capacity=capacity,
    proposals=proposals,
    released=released,
    axis_name=axis_name,
    implementation=implementation,
  )
  keep_logit = released or out_of_batch == 'drop' or capacity is not None

  def init_fn(key, params):
    return init(
      key,
      params,
      num_samples=num_samples,
      num_views=num_views,
      keep_logit=keep_logit,
      embedding_size=embedding_size,
    )

  def surrogate_fn(key, memory, params, batch, embed_fn):
    return surrogate(key, memory, params, batch, embed_fn, settings)

  def pending_fn(key, memory, params, batch, embed_fn):
    return pending(key, memory, params, batch, embed_fn, settings)

  def shardings(mesh):
    del mesh
    spec = jax.sharding.PartitionSpec()
    return Memory(
      index=spec,
      view=spec,
      logit=spec if keep_logit else None,
      embedding=None if embedding_size is None else spec,
    )

  return estimator.Estimator(init_fn, surrogate_fn, pending_fn, shardings)


def _slots(batch, settings):
  """Where the chains of a batch are kept, view by view."""
  if settings.num_views is None:
    return batch.index, jnp.zeros_like(batch.index)
  index = jnp.concatenate([batch.index, batch.index])
  return index, batch.view.reshape(-1).astype(jnp.int32)


def _start_visit(memory, params, batch, embed_fn, settings):
  """Embeds the batch and fetches its chains."""
  views = estimator.embed_batch(params, batch, embed_fn, settings.axis_name)
  slots = _slots(batch, settings)
  size = batch.index.shape[0]
  legs = (slice(0, 2 * size),)
  if settings.num_views is None:
    legs = (slice(0, size), slice(size, 2 * size))
  return _Visit(
    views=views,
    index=batch.index,
    view=batch.view.reshape(-1),
    slots=slots,
    state_index=memory.index[slots],
    state_view=memory.view[slots],
    legs=legs,
  )


def _batch_ids(batch, settings):
  """Sample and view behind every column, (2B,) each; gathers B ids."""
  ids = jnp.stack([batch.index.astype(jnp.uint32), *batch.view])
  if settings.axis_name is not None:
    ids = jax.lax.all_gather(ids, settings.axis_name, axis=1, tiled=True)
  index = ids[0].astype(jnp.int32)
  return jnp.concatenate([index, index]), ids[1:].reshape(-1)


def _embed_states(params, batch, embed_fn, visit, chosen=None, view=None):
  """Embeds the incoming states; those without one, their own first view."""
  own = visit.slots[0]
  has = visit.state_index >= 0
  index = jnp.where(has, visit.state_index, own)
  view = jnp.where(
    has, visit.state_view if view is None else view, jnp.uint32(0)
  )
  if chosen is not None:
    index, view = index[chosen], view[chosen]
  return embed_fn(params, batch.data, index, view)


def _scores(rows, others, settings):
  """The logits of rows (n, d) with their own other (n, d)."""
  return settings.inverse_temperature * estimator.inner(rows, others)


def _sample(key, visit, leg, start, settings):
  """One leg of the visit: the chains of its rows go past all columns."""
  num_steps = visit.views.columns.shape[0] - 2
  discard = math.floor(settings.burn_in * num_steps)
  return metropolis.metropolis(
    jax.random.bits(key, (2,), jnp.uint32),
    jax.lax.stop_gradient(visit.views.rows[leg]),
    jax.lax.stop_gradient(visit.views.columns),
    visit.views.position[leg],
    start,
    inverse_temperature=settings.inverse_temperature,
    discard=discard + settings.released,
    own_steps=settings.released and settings.num_views is None,
    implementation=settings.implementation,
  )


def _incoming(key, memory, params, batch, embed_fn, settings, visit):
  """Embeddings of the incoming states, and which chains have a valid one."""
  has = visit.state_index >= 0
  if settings.released and settings.num_views is None:
    plain = jnp.full_like(visit.state_view, estimator.PLAIN_VIEW)
    states = _embed_states(params, batch, embed_fn, visit, view=plain)
    return states, jnp.zeros_like(has)
  if settings.released or settings.out_of_batch == 'drop':
    return jnp.zeros_like(visit.views.rows[: has.size]), jnp.zeros_like(has)
  if settings.out_of_batch == 'cached':
    return memory.embedding[visit.slots].astype(visit.views.rows.dtype), has
  if settings.capacity is None or settings.capacity >= has.size:
    return _embed_states(params, batch, embed_fn, visit), has
  # A chain stays where it was as long as its state's score beats the peak.
  none = jnp.full(has.shape, -jnp.inf, jnp.float32)
  peak = _sample(key, visit, visit.legs[0], none, settings).peak
  _, chosen = jax.lax.top_k(memory.logit[visit.slots] - peak, settings.capacity)
  some = _embed_states(params, batch, embed_fn, visit, chosen)
  states = jnp.zeros((has.size, some.shape[1]), some.dtype).at[chosen].set(some)
  return states, has & jnp.zeros_like(has).at[chosen].set(True)


def _pull(counts, rows, columns):
  """Gradients of `_weighted_scores`: to rows (n, d) and to columns (c, d)."""
  wide = np.promote_types(rows.dtype, np.float32)
  matmul = functools.partial(jnp.matmul, preferred_element_type=wide)
  weights = counts.astype(rows.dtype)
  return matmul(weights, columns), matmul(weights.T, rows)


def _pull_blocks(counts, rows, columns):
  """The same for a CPU, by blocks of columns, as the sampler lays counts there.

  The sum over columns goes to the transposed rows: a matmul that contracts the
  leading axis of the larger array takes twice the time.
  """
  wide = np.promote_types(rows.dtype, np.float32)
  matmul = functools.partial(jnp.matmul, preferred_element_type=wide)
  n, c = counts.shape
  num_blocks = -(-c // max(_MIN_COLUMNS, _BLOCK_ENTRIES // n))
  size = -(-c // num_blocks)
  fill = [(0, num_blocks * size - c), (0, 0)]
  split = lambda x: jnp.pad(x, fill).reshape(num_blocks, size, x.shape[1])

  def block(d_rows, xs):
    counts, columns = xs
    weights = counts.astype(rows.dtype)
    return d_rows + matmul(columns.T, weights), matmul(weights, rows)

  d_rows, d_columns = jax.lax.scan(
    block, jnp.zeros_like(rows.T, wide), (split(counts.T), split(columns))
  )
  return d_rows.T, d_columns.reshape(-1, rows.shape[1])[:c]


@jax.custom_vjp
def _weighted_scores(counts, rows, columns):
  """Sum of rows (n, d) times columns (c, d), each `counts` (n, c) times: ()."""
  return _weighted_scores_fwd(counts, rows, columns)[0]


def _weighted_scores_fwd(counts, rows, columns):
  d_rows, d_columns = jax.lax.platform_dependent(
    counts, rows, columns, cpu=_pull_blocks, default=_pull
  )
  value = jnp.sum(rows.astype(d_rows.dtype) * d_rows)
  return value, (d_rows.astype(rows.dtype), d_columns.astype(columns.dtype))


def _weighted_scores_bwd(pulls, cotangent):
  pull = lambda x: (cotangent * x.astype(cotangent.dtype)).astype(x.dtype)
  return None, *map(pull, pulls)


_weighted_scores.defvjp(_weighted_scores_fwd, _weighted_scores_bwd)


def _walk(key, memory, params, batch, embed_fn, settings, visit):
  """Proposes the columns of the batch, in order."""
  views, constant = visit.views, jax.lax.stop_gradient
  num_columns = views.columns.shape[0]
  num_steps = num_columns - 2
  discard = math.floor(settings.burn_in * num_steps)
  retained = num_steps - discard
  states, known = _incoming(
    key, memory, params, batch, embed_fn, settings, visit
  )
  logit = jnp.full(known.shape, -jnp.inf, jnp.float32)
  if memory.logit is not None:
    logit = memory.logit[visit.slots]
  last = jnp.full(known.shape, -1, jnp.int32)
  value, accepted, stay, overflow = 0.0, 0.0, 0.0, 0.0
  for leg in visit.legs:
    rows = views.rows[leg]
    inside = last >= 0
    current = jnp.where(inside[:, None], views.columns[last], states)
    score = constant(_scores(rows, current, settings))
    start = jnp.where(inside | known, score, logit)
    if settings.released:
      start = logit
    draws = _sample(key, visit, leg, start, settings)
    stay_weight = draws.stay.astype(score.dtype) * (1 / retained)
    if settings.released and settings.num_views is not None:
      current = jnp.broadcast_to(views.columns[-1], rows.shape)
    elif settings.released:
      extra = jnp.maximum(draws.stay - discard, 0).astype(score.dtype)
      stay_weight = jnp.where(inside, stay_weight, extra * (1 / num_steps))
    else:
      stay_weight = jnp.where(inside | known, stay_weight, 0)
    weighted = _weighted_scores(draws.counts, rows, views.columns)
    value += settings.inverse_temperature / retained * weighted
    value += jnp.sum(stay_weight * _scores(rows, current, settings))
    accepted += jnp.mean(draws.accepted, dtype=jnp.float32) / retained
    outside = jnp.where(inside, 0, draws.stay)
    stay += jnp.mean(outside, dtype=jnp.float32) / retained
    lost = (outside > 0) & ~known
    overflow += jnp.mean(lost, dtype=jnp.float32)
    logit = draws.last_logit
    last = jnp.where(draws.last >= 0, draws.last, last)
  index, view = _batch_ids(batch, settings)
  moved = last >= 0
  return _Walk(
    value=value,
    state_index=jnp.where(moved, index[last], visit.state_index),
    state_view=jnp.where(moved, view[last], visit.state_view),
    logit=logit,
    last=last,
    accepted=accepted / len(visit.legs),
    stay=stay / len(visit.legs),
    overflow=overflow / len(visit.legs),
  )


def _row_keys(key, position):
  """One key for each row, by its place in the whole batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, position)


def _draw_uniform(key, index, position, num_steps, settings):
  """Independent proposals for each row: (n, num_steps) samples and views."""

  def draw(key, own):
    index_key, view_key = jax.random.split(key)
    shape = (num_steps,)
    other = jax.random.randint(index_key, shape, 0, settings.num_samples - 1)
    other += (other >= own).astype(other.dtype)
    if settings.num_views is None:
      return other, jax.random.bits(view_key, shape) >> jnp.uint32(1)
    view = jax.random.randint(view_key, shape, 0, settings.num_views)
    return other, view.astype(jnp.uint32)

  return jax.vmap(draw)(_row_keys(key, position), index)


def _walk_uniform(key, memory, params, batch, embed_fn, settings, visit):
  """Proposes samples drawn independently from the whole data set."""
  del memory
  constant = jax.lax.stop_gradient
  num_steps = visit.views.columns.shape[0] - 2
  discard = math.floor(settings.burn_in * num_steps)
  retained = num_steps - discard
  states = _embed_states(params, batch, embed_fn, visit)
  has = visit.state_index >= 0
  old = jnp.ones_like(has)
  state_index, state_view = visit.state_index, visit.state_view
  value, accepted, stay = 0.0, 0.0, 0.0
  for leg in visit.legs:
    rows, position = visit.views.rows[leg], visit.views.position[leg]
    own = visit.index[jnp.arange(rows.shape[0]) % visit.index.size]
    index, view = _draw_uniform(key, own, position, num_steps, settings)
    flat = (index.reshape(-1), view.reshape(-1))
    proposed = embed_fn(params, batch.data, *flat)
    proposed = proposed.reshape(*index.shape, rows.shape[1])
    logits = constant(_scores(rows[:, None, :], proposed, settings)).T
    acceptance_keys = _row_keys(jax.random.fold_in(key, 1), position)
    uniform = jax.vmap(lambda k: jax.random.uniform(k, (num_steps,)))
    heights = logits - jnp.log1p(-uniform(acceptance_keys)).T
    start = constant(_scores(rows, states, settings))
    start = jnp.where(has, start, -jnp.inf)
    step = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
    accept, _ = reference.walk(logits, heights, start)
    held, _ = reference.hold(accept, step, num_steps, discard)
    weights = held.T.astype(rows.dtype) * (1 / retained)
    left = 1 - jnp.sum(weights, axis=1)
    negatives = jnp.einsum('at,atd->ad', constant(weights), proposed)
    negatives += constant(left)[:, None] * states
    value += jnp.sum(_scores(rows, negatives, settings))
    accepted += jnp.mean(accept[discard:], dtype=jnp.float32)
    stay += jnp.mean(jnp.where(old, left, 0), dtype=jnp.float32)
    last = jnp.max(jnp.where(accept, step, -1), axis=0)
    moved = last >= 0
    row = jnp.arange(last.size, dtype=jnp.int32)
    state_index = jnp.where(moved, index[row, last], state_index)
    state_view = jnp.where(moved, view[row, last], state_view)
    states = jnp.where(moved[:, None], proposed[row, last], states)
    has |= moved
    old &= ~moved
  return _Walk(
    value=value,
    state_index=state_index,
    state_view=state_view,
    logit=None,
    last=None,
    accepted=accepted / len(visit.legs),
    stay=stay / len(visit.legs),
    overflow=jnp.float32(0),
  )


def _resample(key, memory, params, batch, embed_fn, settings, visit):
  """Weighs the batch and the state's own pair of views by their softmax.

  Given any member of the candidates the others are equally likely, whatever the
  batch size, because the state brings a whole pair as every sample does. So it
  stands in for its sample's columns when that sample is in the batch.
  """
  del memory
  views = visit.views
  num_columns = views.columns.shape[0]
  has = visit.state_index >= 0
  partner_keys = _row_keys(key, views.position[: has.size])
  if settings.num_views is None:
    partner = jax.vmap(jax.random.bits)(partner_keys) >> jnp.uint32(1)
  else:
    draw = lambda k: jax.random.randint(k, (), 1, settings.num_views)
    step = jax.vmap(draw)(partner_keys).astype(jnp.uint32)
    partner = (visit.state_view + step) % jnp.uint32(settings.num_views)
  pair = jnp.stack(
    [
      _embed_states(params, batch, embed_fn, visit),
      _embed_states(params, batch, embed_fn, visit, view=partner),
    ]
  )
  index, view = _batch_ids(batch, settings)
  state_view = visit.state_view
  last = jnp.full(has.shape, -1, jnp.int32)
  column = jnp.arange(num_columns, dtype=jnp.int32)[None, :]
  value, accepted, stay = 0.0, 0.0, 0.0
  for leg in visit.legs:
    rows, position = views.rows[leg], views.position[leg]
    outside = has & (last < 0)
    half = num_columns // 2
    barred = column % half == position[:, None] % half
    replaced = index[None, :] == visit.state_index[:, None]
    barred |= outside[:, None] & replaced
    logits = settings.inverse_temperature * (rows @ views.columns.T)
    logits = jnp.where(barred, -jnp.inf, logits)
    pair_logits = _scores(rows[None], pair, settings)
    pair_logits = jnp.where(outside[None], pair_logits, -jnp.inf)
    logits = jnp.concatenate([logits, pair_logits.T], axis=1)
    total = jax.nn.logsumexp(logits, axis=1)
    value += jnp.sum(total)
    gumbel_keys = _row_keys(jax.random.fold_in(key, 1), position)
    gumbel = functools.partial(
      jax.random.gumbel, shape=(num_columns + 2,), dtype=logits.dtype
    )
    perturbed = logits + jax.vmap(gumbel)(gumbel_keys)
    choice = jnp.argmax(perturbed, axis=1).astype(jnp.int32)
    swapped = choice == num_columns + 1
    current = jnp.where(outside, num_columns, last)
    accepted += jnp.mean(choice != current, dtype=jnp.float32)
    share = jnp.exp(logits[:, num_columns:] - total[:, None])
    stay += jnp.mean(jnp.sum(share, axis=1), dtype=jnp.float32)
    state_view = jnp.where(swapped, partner, state_view)
    pair = jnp.where(swapped[None, :, None], pair[::-1], pair)
    partner = jnp.where(swapped, visit.state_view, partner)
    last = jnp.where(choice < num_columns, choice, last)
  moved = last >= 0
  return _Walk(
    value=value,
    state_index=jnp.where(moved, index[last], visit.state_index),
    state_view=jnp.where(moved, view[last], state_view),
    logit=None,
    last=last,
    accepted=accepted / len(visit.legs),
    stay=stay / len(visit.legs),
    overflow=jnp.float32(0),
  )


def _write_back(memory, batch, visit, walk, settings):
  """Stores the last states; every device stores those of all."""
  size = batch.index.shape[0]
  fields = [*visit.slots, walk.state_index, walk.state_view]
  if memory.logit is not None:
    fields.append(walk.logit)
  if memory.embedding is not None:
    fields.append(walk.last)
  as_bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
  message = jnp.stack([as_bits(x).reshape(-1, size) for x in fields])
  if settings.axis_name is not None:
    message = jax.lax.all_gather(
      message, settings.axis_name, axis=2, tiled=True
    )
  message = message.reshape(len(fields), -1)
  as_int = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
  slots = (as_int(message[0]), as_int(message[1]))
  logit, embedding = memory.logit, memory.embedding
  if logit is not None:
    scores = jax.lax.bitcast_convert_type(message[4], jnp.float32)
    logit = logit.at[slots].set(scores)
  if embedding is not None:
    last = as_int(message[4])
    columns = jax.lax.stop_gradient(visit.views.columns)[last]
    columns = columns.astype(embedding.dtype)
    kept = jnp.where((last >= 0)[:, None], columns, embedding[slots])
    embedding = embedding.at[slots].set(kept)
  return Memory(
    index=memory.index.at[slots].set(as_int(message[2])),
    view=memory.view.at[slots].set(message[3]),
    logit=logit,
    embedding=embedding,
  )
