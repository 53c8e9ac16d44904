r"""Negative cache: hard negatives drawn from embeddings of earlier steps.

The draw needs no fresh embedding but that of its winner. What it costs is the
memory of the cache, and a bias by how far the encoder has moved since a row was
embedded, which :class:`NegativeCacheInfo` reports.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.contrastive import estimator

POSITIVES = ('plain', 'second')
_NEVER = np.iinfo(np.int32).max


class NegativeCacheMemory(NamedTuple):
  """The cache; rows beyond those asked for stay empty for ever."""

  embedding: jax.Array  # (K, d).
  index: jax.Array  # (K,), int32: the sample of each row; -1 if it is empty.
  view: jax.Array  # (K,), uint32: its view.
  written: jax.Array  # (K,), int32: the step that embedded it; least is oldest.
  count: jax.Array  # (), int32: finished steps.


class NegativeCacheInfo(NamedTuple):
  """What a reader may log of one step.

  The staleness is the mean of |old - new|^2 / |new|^2 over the rows that were
  embedded anew: those refreshed, or in a bounded cache those drawn.
  """

  loss: jax.Array  # (), float32: minus the log of the positive's probability.
  positive: jax.Array  # (), float32: mean probability of the positive.
  staleness: jax.Array  # (), float32: see above.
  age: jax.Array  # (), float32: mean age of the drawn rows, in steps.


class _Draw(NamedTuple):
  """Negatives of each query, and the mass from which they were drawn."""

  slot: jax.Array  # (B, k), int32: the row of the whole cache.
  index: jax.Array  # (B, k), int32: its sample.
  view: jax.Array  # (B, k), uint32: its view.
  age: jax.Array  # (B, k), int32: in steps.
  logit: jax.Array  # (B, k), float32; -inf where nothing was left to draw.
  mass: jax.Array  # (B,), float32: log-sum-exp of what could be drawn.
  total: jax.Array  # (B,), float32: log-sum-exp of all negatives in the cache.


def init(
  key: jax.Array,
  params: Any,
  *,
  num_samples: int,
  embedding_size: int,
  num_views: int | None = None,
  capacity: int | None = None,
  num_shards: int = 1,
  dtype: Any = jnp.float32,
) -> NegativeCacheMemory:
  """An empty cache; a full one will be refreshed in random order."""
  del params
  num_rows = _num_rows(num_samples, num_views, capacity)
  padded = _padded(num_rows, num_shards)
  written = jnp.full((padded,), _NEVER, jnp.int32)
  view = jnp.full((padded,), estimator.PLAIN_VIEW, jnp.uint32)
  if capacity is None:
    order = jax.random.permutation(key, num_rows).astype(jnp.int32) - num_rows
    written = written.at[:num_rows].set(order)
    if num_views is not None:
      view = jnp.arange(padded, dtype=jnp.uint32) % jnp.uint32(num_views)
  else:
    written = written.at[:num_rows].set(-1)
  return NegativeCacheMemory(
    embedding=jnp.zeros((padded, embedding_size), dtype),
    index=jnp.full((padded,), -1, jnp.int32),
    view=view,
    written=written,
    count=jnp.zeros([], jnp.int32),
  )


def warm_cache(
  memory: NegativeCacheMemory,
  params: Any,
  data: Any,
  embed_fn: estimator.EmbedFn,
  index: jax.Array,
  *,
  num_samples: int,
  num_views: int | None = None,
  axis_name: str | None = None,
) -> NegativeCacheMemory:
  """Embeds samples into the rows that a full cache keeps for them.

  Training may begin with an empty cache, but draws better from a warm one. Call
  this once for each chunk of the data set.

  Args:
    memory: Of a cache of all samples, made without `capacity`.
    params: Of the encoder.
    data: What `embed_fn` reads the chunk from.
    embed_fn: The encoder.
    index: (n,) int32: the samples of this chunk; under `jax.shard_map` this
      device's part of it.
    num_samples: As of the cache.
    num_views: As of the cache.
    axis_name: The mesh axis that splits the chunk and the cache, or None.

  Returns:
    The memory with these rows filled; the order of refreshing stays.

  Raises:
    ValueError: If the cache does not hold all samples.
  """
  slot, view = index, jnp.full(index.shape, estimator.PLAIN_VIEW, jnp.uint32)
  if num_views is not None:
    view = jnp.tile(jnp.arange(num_views, dtype=jnp.uint32), index.size)
    index = jnp.repeat(index, num_views)
    slot = index * num_views + view.astype(jnp.int32)
  parts = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  if memory.index.shape[0] * parts < num_samples * (num_views or 1):
    raise ValueError(
      f'memory must hold all {num_samples * (num_views or 1)} rows, got '
      f'{memory.index.shape[0] * parts}: a bounded cache fills itself.'
    )
  rows = jax.lax.stop_gradient(embed_fn(params, data, index, view))
  everyone = estimator.gather((slot, index, view, rows), axis_name)
  filled, _ = _write(memory, *everyone, axis_name=axis_name)
  return filled._replace(written=memory.written)


def surrogate(
  key: jax.Array,
  memory: NegativeCacheMemory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  num_samples: int,
  num_views: int | None = None,
  capacity: int | None = None,
  positive: str = 'plain',
  num_negatives: int = 1,
  num_refreshed: int = 0,
  top_k: int | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, tuple[NegativeCacheMemory, NegativeCacheInfo]]:
  """The weighted difference of similarities; see :func:`negative_cache`."""
  beta = jnp.asarray(inverse_temperature, jnp.float32)
  num_rows = _num_rows(num_samples, num_views, capacity)
  size = batch.index.shape[0]
  anchors, targets = _embed_pairs(params, batch, embed_fn, positive)
  ours = (batch.index, _views_of(batch, positive), anchors, targets)
  everyone = estimator.gather(jax.lax.stop_gradient(ours), axis_name)
  total = everyone[0].shape[0]
  if capacity is not None and total > capacity:
    raise ValueError(
      f'capacity must be at least the batch size, got {capacity=} and a '
      f'batch of {total}.'
    )
  draw, memory = _write_and_draw(
    key,
    memory,
    *everyone,
    beta=beta,
    num_rows=num_rows,
    num_views=num_views,
    bounded=capacity is not None,
    num_negatives=num_negatives,
    top_k=top_k,
    axis_name=axis_name,
  )
  mine = draw
  if axis_name is not None:
    start = jax.lax.axis_index(axis_name) * size
    part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size)
    mine = jax.tree.map(part, draw)

  drawn = _embed_some(params, batch.data, embed_fn, mine.index, mine.view)
  s_positive = beta * jnp.sum(anchors * targets, axis=1, dtype=jnp.float32)
  s_negative = beta * jnp.einsum(
    'bd,bkd->bk',
    anchors,
    drawn,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  now = jax.lax.stop_gradient(s_positive)
  normalizer = jnp.logaddexp(now, mine.total)
  rest = jnp.exp(mine.total - normalizer)  # 1 less the positive's probability.
  weight = rest[:, None] * _weights(jnp.exp(mine.logit - mine.mass[:, None]))
  # A row that was drawn from nothing may hold anything; it has no weight.
  pushed = jnp.where(weight > 0, weight * s_negative, weight * 0)
  value = jnp.sum(jnp.sum(pushed, axis=1) - rest * s_positive)
  value /= total

  if capacity is None:
    memory, staleness = _refresh(
      memory,
      params,
      batch.data,
      embed_fn,
      num_refreshed,
      num_rows,
      num_views,
      axis_name,
    )
  else:
    memory, staleness = _replace(
      memory, draw, jax.lax.stop_gradient(drawn), everyone, axis_name
    )
  info = NegativeCacheInfo(
    loss=jnp.mean(normalizer - now),
    positive=jnp.mean(jnp.exp(now - normalizer)),
    staleness=staleness,
    age=jnp.mean(mine.age, dtype=jnp.float32),
  )
  info = estimator.mean(jax.lax.stop_gradient(info), axis_name)
  return value, (memory._replace(count=memory.count + 1), info)


def pending(
  key: jax.Array,
  memory: NegativeCacheMemory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  num_samples: int,
  num_views: int | None = None,
  capacity: int | None = None,
  positive: str = 'plain',
  num_negatives: int = 1,
  num_refreshed: int = 0,
  top_k: int | None = None,
) -> jax.Array:
  """The samples that will be drawn, then those that will be refreshed."""
  num_rows = _num_rows(num_samples, num_views, capacity)
  anchors, targets = _embed_pairs(params, batch, embed_fn, positive)
  draw, memory = _write_and_draw(
    key,
    memory,
    batch.index,
    _views_of(batch, positive),
    anchors,
    targets,
    beta=jnp.asarray(inverse_temperature, jnp.float32),
    num_rows=num_rows,
    num_views=num_views,
    bounded=capacity is not None,
    num_negatives=num_negatives,
    top_k=top_k,
    axis_name=None,
  )
  if capacity is not None:
    return draw.index.reshape(-1)
  slot, _ = _oldest(memory, num_refreshed, None)
  stale = jnp.minimum(slot // (num_views or 1), num_samples - 1)
  return jnp.concatenate([draw.index.reshape(-1), stale])


def negative_cache(
  num_samples: int,
  *,
  embedding_size: int,
  inverse_temperature: float,
  capacity: int | None = None,
  num_views: int | None = None,
  positive: str | None = None,
  num_negatives: int = 1,
  refresh_fraction: float | None = None,
  top_k: int | None = None,
  num_shards: int = 1,
  dtype: Any = jnp.float32,
  axis_name: str | None = None,
) -> estimator.Estimator:
  r"""Negatives drawn from the softmax over a cache of embeddings.

  With the similarity :math:`s^+` of an anchor and its positive, the cached
  similarities :math:`s_z` of the rows :math:`C` of other samples, and

  .. math::
    Z = e^{\beta s^+} + \sum_{z \in C} e^{\beta s_z}, \quad
    p^+ = e^{\beta s^+} / Z, \quad p_z = e^{\beta s_z} / Z,

  one row :math:`z` is drawn with probability :math:`p_z / (1 - p^+)`, embedded
  anew, and the gradient is

  .. math::
    \beta (1 - p^+) \nabla (s_z - s^+),

  in the mean that of the cross entropy :math:`-\log p^+` if the cache is fresh.
  Of :math:`k` rows drawn without replacement, :math:`z_1 \dots z_k`, the
  :math:`j`-th has the weight

  .. math::
    w_j = \frac1k \Big(1 - p^+ - \sum_{i < j} p_{z_i} + (k - j) p_{z_j}\Big).

  There are two forms. Without `capacity` the cache has a row for each sample
  (or for each of its `num_views` fixed views). A step first writes its batch
  into the cache, and in the end embeds anew the rows that were embedded
  longest ago, at first in random order. With `capacity` it has that many rows;
  a step writes back what it drew, then puts its positives over the oldest rows.

  A draw takes two stages, the first over blocks of rows by their log-sum-exp
  and the second within a block, both by the Gumbel-max trick: this needs
  :math:`O(\sqrt K)` random numbers, not :math:`K`. The same blocks are what the
  devices hold, so that eight devices draw what one draws.

  .. note::
    The official code weighs the :math:`j`-th of :math:`k` negatives without
    the term :math:`(k - j) p_{z_j}`, which for :math:`k > 1` is too little:
    the weights above are those of Des Raj. `pending` is called on the whole
    batch outside of `jax.shard_map`; rounding may then, rarely, make one of
    its draws another one.

  Args:
    num_samples: m, at least 2. Static.
    embedding_size: d. Static.
    inverse_temperature: :math:`\beta = 1 / \tau > 0`.
    capacity: K in [1, m], for the bounded form; None means a row for each.
      Static.
    num_views: How many fixed views each sample has, all of which are cached;
      None means one row for each sample, and fresh augmentations. Static.
    positive: 'plain', the sample without augmentation, or 'second', the second
      view of the batch; the anchor is the first view. The default is 'plain',
      or 'second' with `num_views`. Static.
    num_negatives: k >= 1 for each anchor, drawn without replacement. Static.
    refresh_fraction: The part of the rows of a full cache to embed anew in each
      step, in (0, 1]; 0.01024 by default. Static.
    top_k: Draws only from this many rows of highest similarity; None from all.
      Rows that tie with the last are let in. Static.
    num_shards: The cache may be split over so many devices, or a divisor.
      Static.
    dtype: Of the cached embeddings.
    axis_name: The mesh axis that splits the batch and the cache, or None.

  Returns:
    An estimator whose `surrogate` embeds, beside the batch, `num_negatives` for
    each anchor and the refreshed rows.

  Raises:
    ValueError: If an argument is out of its range or two do not fit, if a mesh
      does not divide `num_shards`, or a batch is larger than `capacity`.

  References:
    Lindgren, Reddi, Guo, Kumar, `Efficient Training of Retrieval Models using
    Negative Cache <https://openreview.net/forum?id=824xC-SgWgU>`_, 2021,
    section 3; Yau et al., `EMC2 <https://arxiv.org/abs/2404.10575>`_, 2024,
    whose code has the full cache; Des Raj, Some Estimators in Sampling with
    Varying Probabilities without Replacement, 1956.
  """
  estimator.check_size(num_samples)
  estimator.check_positive('inverse_temperature', inverse_temperature)
  for name, count in (
    ('embedding_size', embedding_size),
    ('num_negatives', num_negatives),
    ('num_shards', num_shards),
  ):
    if count < 1:
      raise ValueError(f'{name} must be at least 1, got {count}.')
  if num_views is not None and num_views < 2:
    raise ValueError(f'num_views must be None or at least 2, got {num_views}.')
  if capacity is not None:
    if not 1 <= capacity <= num_samples:
      raise ValueError(
        f'capacity must lie in [1, num_samples={num_samples}], got {capacity}.'
      )
    for name, value in (
      ('num_views', num_views),
      ('refresh_fraction', refresh_fraction),
    ):
      if value is not None:
        raise ValueError(
          f'{name} is for a cache of all samples, and must be None with '
          f'capacity={capacity}; got {value}.'
        )
  if refresh_fraction is None:
    refresh_fraction = 0.01024
  if not 0 < refresh_fraction <= 1:
    raise ValueError(
      f'refresh_fraction must lie in (0, 1], got {refresh_fraction}.'
    )
  if positive is None:
    positive = 'plain' if num_views is None else 'second'
  if positive not in POSITIVES:
    raise ValueError(f'positive must be one of {POSITIVES}, got {positive!r}.')
  if num_views is not None and positive == 'plain':
    raise ValueError(
      "positive must be 'second' with num_views: the cache holds no plain "
      f'view, got {positive!r}.'
    )
  num_rows = _num_rows(num_samples, num_views, capacity)
  if top_k is not None and not 1 <= top_k <= num_rows:
    raise ValueError(
      f'top_k must lie in [1, {num_rows}], the rows of the cache, got {top_k}.'
    )
  if num_negatives > (num_rows if top_k is None else top_k):
    raise ValueError(
      'num_negatives must be at most the number of rows to draw from, '
      f'{num_rows if top_k is None else top_k}, got {num_negatives}.'
    )
  num_refreshed = max(1, int(refresh_fraction * num_rows))
  num_refreshed = -(-num_refreshed // num_shards) * num_shards
  settings = dict(
    inverse_temperature=inverse_temperature,
    num_samples=num_samples,
    num_views=num_views,
    capacity=capacity,
    positive=positive,
    num_negatives=num_negatives,
    num_refreshed=num_refreshed,
    top_k=top_k,
  )

  def init_fn(key, params):
    return init(
      key,
      params,
      num_samples=num_samples,
      embedding_size=embedding_size,
      num_views=num_views,
      capacity=capacity,
      num_shards=num_shards,
      dtype=dtype,
    )

  def surrogate_fn(key, memory, params, batch, embed_fn):
    return surrogate(
      key, memory, params, batch, embed_fn, axis_name=axis_name, **settings
    )

  def pending_fn(key, memory, params, batch, embed_fn):
    return pending(key, memory, params, batch, embed_fn, **settings)

  def shardings(mesh):
    spec = jax.sharding.PartitionSpec
    if axis_name is not None and num_shards % mesh.shape[axis_name]:
      raise ValueError(
        f'num_shards must be a multiple of the {mesh.shape[axis_name]} '
        f'devices along {axis_name!r}, got {num_shards}.'
      )
    rows = spec(axis_name)
    return NegativeCacheMemory(
      embedding=rows, index=rows, view=rows, written=rows, count=spec()
    )

  return estimator.Estimator(init_fn, surrogate_fn, pending_fn, shardings)


def _num_rows(num_samples, num_views, capacity):
  return num_samples * (num_views or 1) if capacity is None else capacity


def _block_size(num_rows):
  """A power of two near the root: as many blocks as there are rows in one."""
  return 2 ** (math.isqrt(num_rows).bit_length() - 1)


def _padded(num_rows, num_shards):
  step = _block_size(num_rows) * num_shards
  return -(-num_rows // step) * step


def _views_of(batch, positive):
  """The views of anchors and positives, (B, 2)."""
  second = batch.view[1]
  if positive == 'plain':
    second = jnp.full_like(second, estimator.PLAIN_VIEW)
  return jnp.stack([batch.view[0], second], axis=1)


def _embed_pairs(params, batch, embed_fn, positive):
  """Anchors and positives, (B, d) each, in one call of the encoder."""
  index = jnp.concatenate([batch.index, batch.index])
  view = _views_of(batch, positive).T.reshape(-1)
  return jnp.split(embed_fn(params, batch.data, index, view), 2)


def _embed_some(params, data, embed_fn, index, view):
  """Embeds (b, k) views: (b, k, d)."""
  rows = embed_fn(params, data, index.reshape(-1), view.reshape(-1))
  return rows.reshape(*index.shape, rows.shape[-1])


def _weights(q):
  """What each of k draws counts, given their probabilities (B, k)."""
  num_negatives = q.shape[1]
  left = 1 - (jnp.cumsum(q, axis=1) - q)
  later = num_negatives - 1 - jnp.arange(num_negatives, dtype=q.dtype)
  return (jnp.maximum(left, 0) + later[None, :] * q) / num_negatives


def _write_and_draw(
  key,
  memory,
  index,
  view,
  anchors,
  targets,
  *,
  beta,
  num_rows,
  num_views,
  bounded,
  num_negatives,
  top_k,
  axis_name,
):
  """Puts the batch into a full cache, then draws for its anchors."""
  if not bounded:
    if num_views is None:
      rows = (index, index, view[:, 1], targets)
    else:
      slot = index[:, None] * num_views + view.astype(jnp.int32)
      twice = jnp.concatenate([index, index])
      both = jnp.concatenate([anchors, targets])
      rows = (slot.T.reshape(-1), twice, view.T.reshape(-1), both)
    memory, _ = _write(memory, *rows, axis_name=axis_name)
  draw = _draw(
    key,
    memory,
    anchors,
    index,
    beta,
    num_negatives,
    top_k,
    _block_size(num_rows),
    axis_name,
  )
  return jax.lax.stop_gradient(draw), memory


def _draw(
  key, memory, queries, own, beta, num_negatives, top_k, block, axis_name
):
  """Draws rows for every query, the same on all devices."""
  local = memory.index.shape[0]
  num_blocks, shard, num_shards = local // block, 0, 1
  if axis_name is not None:
    shard = jax.lax.axis_index(axis_name)
    num_shards = jax.lax.axis_size(axis_name)
  logits = beta * jax.lax.dot_general(
    queries.astype(jnp.float32),
    memory.embedding.astype(jnp.float32),
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
  )
  index = memory.index[None, :]
  logits = jnp.where((index < 0) | (index == own[:, None]), -jnp.inf, logits)
  total = mass = _logsumexp(logits, axis_name)
  if top_k is not None:
    highest = jax.lax.top_k(logits, min(top_k, local))[0]
    if axis_name is not None:
      highest = jax.lax.all_gather(highest, axis_name, axis=1, tiled=True)
      highest = jax.lax.top_k(highest, top_k)[0]
    logits = jnp.where(logits < highest[:, -1:], -jnp.inf, logits)
    mass = _logsumexp(logits, axis_name)
  query = jnp.arange(logits.shape[0])
  draws = []
  for number in range(num_negatives):
    outer_key, inner_key = jax.random.split(jax.random.fold_in(key, number))
    blocks = logits.reshape(-1, num_blocks, block)
    shape = (blocks.shape[0], num_shards * num_blocks)
    noise = jax.lax.dynamic_slice_in_dim(
      jax.random.gumbel(outer_key, shape), shard * num_blocks, num_blocks, 1
    )
    heights = jax.nn.logsumexp(blocks, axis=2) + noise
    chosen = jnp.argmax(heights, axis=1)
    inside = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    noise = jax.random.gumbel(inner_key, inside.shape)
    place = chosen * block + jnp.argmax(inside + noise, axis=1)
    place = place.astype(jnp.int32)
    age = memory.count - jnp.maximum(memory.written[place], 0)
    winner = jnp.stack(
      [
        shard * local + place,
        memory.index[place],
        jax.lax.bitcast_convert_type(memory.view[place], jnp.int32),
        age,
        jax.lax.bitcast_convert_type(logits[query, place], jnp.int32),
      ]
    )
    if axis_name is not None:
      height = jnp.max(heights, axis=1)
      best = height == jax.lax.pmax(height, axis_name)
      first = jax.lax.pmin(jnp.where(best, shard, num_shards), axis_name)
      winner = jnp.where(first == shard, winner, 0)
      winner = jax.lax.psum(winner, axis_name)
    draws.append(winner)
    taken = winner[0] - shard * local
    taken = jnp.where((taken >= 0) & (taken < local), taken, local)
    logits = logits.at[query, taken].set(-jnp.inf, mode='drop')
  slot, index, view, age, logit = jnp.stack(draws, axis=2)
  return _Draw(
    slot=slot,
    index=jnp.maximum(index, 0),
    view=jax.lax.bitcast_convert_type(view, jnp.uint32),
    age=age,
    logit=jax.lax.bitcast_convert_type(logit, jnp.float32),
    # With nothing to draw from, a probability is 0, not NaN.
    mass=jnp.where(jnp.isneginf(mass), 0.0, mass),
    total=total,
  )


def _logsumexp(logits, axis_name):
  """Over the rows of all devices: (B, K) to (B,)."""
  if axis_name is None:
    return jax.nn.logsumexp(logits, axis=1)
  top = jax.lax.pmax(jnp.max(logits, axis=1), axis_name)
  shift = jnp.where(jnp.isneginf(top), 0.0, top)
  part = jnp.sum(jnp.exp(logits - shift[:, None]), axis=1)
  return shift + jnp.log(jax.lax.psum(part, axis_name))


def _write(memory, slot, index, view, rows, *, axis_name):
  """Writes rows to slots of the whole cache; each device takes its own.

  Args:
    memory: The cache.
    slot: (n,) int32; others than those of the cache are left out.
    index: (n,) int32.
    view: (n,) uint32.
    rows: (n, d); those with a number that is not finite are left out.
    axis_name: The axis that splits the cache, or None.

  Returns:
    The cache, and the mean relative squared distance from what was there; the
    part of this device in it, so that their mean is the mean of all.
  """
  local, start, num_shards = memory.index.shape[0], 0, 1
  if axis_name is not None:
    start = jax.lax.axis_index(axis_name) * local
    num_shards = jax.lax.axis_size(axis_name)
  place = slot - start
  fits = (place >= 0) & (place < local) & jnp.all(jnp.isfinite(rows), axis=1)
  place = jnp.where(fits, place, local)
  new = rows.astype(jnp.float32)
  old = memory.embedding.at[place].get(mode='clip').astype(jnp.float32)
  known = fits & (memory.index.at[place].get(mode='clip') >= 0)
  length = jnp.maximum(jnp.sum(jnp.square(new), axis=1), 1e-12)
  moved = jnp.sum(jnp.square(old - new), axis=1) / length
  moved = jnp.sum(jnp.where(known, moved, 0.0)) * (num_shards / slot.shape[0])
  put = lambda array, values: array.at[place].set(
    values.astype(array.dtype), mode='drop'
  )
  memory = memory._replace(
    embedding=put(memory.embedding, rows),
    index=put(memory.index, index),
    view=put(memory.view, view),
    written=put(memory.written, jnp.broadcast_to(memory.count, place.shape)),
  )
  return memory, moved


def _oldest(memory, count, axis_name):
  """The rows embedded longest ago, first of those that tie: slots and views."""
  local = memory.index.shape[0]
  stamp, place = jax.lax.top_k(-memory.written, min(count, local))
  start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * local
  found = (stamp, start + place, memory.view[place])
  stamp, slot, view = estimator.gather(found, axis_name)
  order = jax.lax.top_k(stamp, count)[1]
  return slot[order], view[order]


def _refresh(
  memory, params, data, embed_fn, count, num_rows, num_views, axis_name
):
  """Embeds the oldest rows of a full cache anew, each device its part."""
  slot, view = _oldest(memory, count, axis_name)
  mine_slot, mine_view = slot, view
  if axis_name is not None:
    size = count // jax.lax.axis_size(axis_name)
    start = jax.lax.axis_index(axis_name) * size
    part = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size)
    mine_slot, mine_view = part(slot), part(view)
  # The rows that fill up the last block stand for no sample.
  index = jnp.minimum(mine_slot, num_rows - 1) // (num_views or 1)
  rows = jax.lax.stop_gradient(embed_fn(params, data, index, mine_view))
  index, rows = estimator.gather((index, rows), axis_name)
  slot = jnp.where(slot < num_rows, slot, _NEVER)
  return _write(memory, slot, index, view, rows, axis_name=axis_name)


def _replace(memory, draw, drawn, everyone, axis_name):
  """Writes back what was drawn, then the positives over the oldest rows."""
  index, view, _, targets = everyone
  size = index.shape[0]
  drawn = estimator.gather(drawn, axis_name).reshape(-1, drawn.shape[-1])
  slot = jnp.where(jnp.isneginf(draw.logit), _NEVER, draw.slot)
  memory, staleness = _write(
    memory,
    slot.reshape(-1),
    draw.index.reshape(-1),
    draw.view.reshape(-1),
    drawn,
    axis_name=axis_name,
  )
  slot, _ = _oldest(memory, size, axis_name)
  memory, _ = _write(
    memory, slot, index, view[:, 1], targets, axis_name=axis_name
  )
  return memory, staleness
