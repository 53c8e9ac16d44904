r"""MoCo: a queue of keys from past batches, by an encoder that moves slowly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2.contrastive import estimator


class MocoMemory(NamedTuple):
  """The slow encoder and what it has lately seen."""

  key_params: Any  # Like the encoder's parameters.
  queue: jax.Array  # (K, d), float32: unit keys of past batches.
  position: jax.Array  # (), int32: where the next batch goes, in [0, K).


class MocoInfo(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (), float32: the cross entropy of the batch, in nats.
  accuracy: jax.Array  # (), float32: how often the positive beats the queue.
  positive: jax.Array  # (), float32: mean probability of the positive.


def init(
  key: jax.Array, params: Any, *, num_keys: int, embedding_size: int
) -> MocoMemory:
  """The key encoder is a copy of the encoder; the queue is random."""
  queue = jax.random.normal(key, (num_keys, embedding_size), jnp.float32)
  return MocoMemory(
    key_params=jax.tree.map(jnp.array, params),
    queue=queue / jnp.linalg.norm(queue, axis=1, keepdims=True),
    position=jnp.zeros([], jnp.int32),
  )


def surrogate(
  key: jax.Array,
  memory: MocoMemory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  momentum: jax.typing.ArrayLike = 0.999,
  axis_name: str | None = None,
) -> tuple[jax.Array, tuple[MocoMemory, MocoInfo]]:
  """The cross entropy itself; see :func:`moco`."""
  del key
  beta = jnp.asarray(inverse_temperature, jnp.float32)
  follow = lambda k, q: _follow(k, jax.lax.stop_gradient(q), momentum)
  key_params = jax.tree.map(follow, memory.key_params, params)
  queries = embed_fn(params, batch.data, batch.index, batch.view[0])
  keys = embed_fn(key_params, batch.data, batch.index, batch.view[1])
  queries = queries.astype(jnp.float32)
  keys = jax.lax.stop_gradient(keys).astype(jnp.float32)

  positive = beta * jnp.sum(queries * keys, axis=1)
  logits = beta * jnp.matmul(
    queries, memory.queue.T, precision=jax.lax.Precision.HIGHEST
  )
  total = jnp.logaddexp(positive, jax.nn.logsumexp(logits, axis=1))
  losses = total - positive
  info = MocoInfo(
    loss=jnp.mean(losses),
    accuracy=jnp.mean(positive > jnp.max(logits, axis=1), dtype=jnp.float32),
    positive=jnp.mean(jnp.exp(-losses)),
  )
  info = estimator.mean(jax.lax.stop_gradient(info), axis_name)

  everyone = estimator.gather(keys, axis_name)
  size, num_keys = everyone.shape[0], memory.queue.shape[0]
  if size > num_keys:
    raise ValueError(
      'num_keys must be at least the batch size, got '
      f'num_keys={num_keys} and a batch of {size}.'
    )
  place = (memory.position + jnp.arange(size, dtype=jnp.int32)) % num_keys
  known = jnp.all(jnp.isfinite(everyone), axis=1, keepdims=True)
  everyone = jnp.where(known, everyone, memory.queue[place])
  memory = MocoMemory(
    key_params=key_params,
    queue=memory.queue.at[place].set(everyone),
    position=(memory.position + size) % num_keys,
  )
  return jnp.sum(losses) / size, (memory, info)


def moco(
  num_keys: int,
  *,
  embedding_size: int,
  inverse_temperature: float,
  momentum: float = 0.999,
  axis_name: str | None = None,
) -> estimator.Estimator:
  r"""Momentum contrast.

  With queries :math:`q` by the encoder :math:`\theta` from the first view, keys
  :math:`k` by the key encoder :math:`\theta_k` from the second, and the queue
  :math:`Q` of the keys of past batches,

  .. math::
    \theta_k \leftarrow \mu \theta_k + (1 - \mu) \theta, \quad
    L = \frac1B \sum_i -\beta q_i^\top k_i + \log\Big(e^{\beta q_i^\top k_i}
        + \sum_{z \in Q} e^{\beta q_i^\top z}\Big).

  No gradient flows to keys. They enter the queue after the loss, over the
  oldest. :math:`\theta_k` moves in the parameters' own type, so parameters
  should be float32: a bfloat16 does not see a change by a thousandth.

  .. note::
    The queue may hold an older key of the batch's own sample, as in the
    authors' code; to shut it out needs :math:`K` less than an epoch.

  Args:
    num_keys: K, at least the batch size. Static.
    embedding_size: d. Static.
    inverse_temperature: :math:`\beta = 1 / \tau > 0`; the authors take
      :math:`\tau = 0.07`, and 0.2 in the second version.
    momentum: :math:`\mu`, in [0, 1).
    axis_name: The mesh axis that splits the batch, or None.

  Returns:
    An estimator with 4 K d bytes of memory and a second set of parameters.

  Raises:
    ValueError: If an argument is out of its range, or a batch is larger than
      the queue.

  References:
    He, Fan, Wu, Xie, Girshick, `Momentum Contrast for Unsupervised Visual
    Representation Learning <https://arxiv.org/abs/1911.05722>`_, 2020,
    algorithm 1.
  """
  if num_keys < 1:
    raise ValueError(f'num_keys must be at least 1, got {num_keys}.')
  if embedding_size < 1:
    raise ValueError(
      f'embedding_size must be at least 1, got {embedding_size}.'
    )
  estimator.check_positive('inverse_temperature', inverse_temperature)
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum must lie in [0, 1), got {momentum}.')

  def init_fn(key, params):
    return init(key, params, num_keys=num_keys, embedding_size=embedding_size)

  def surrogate_fn(key, memory, params, batch, embed_fn):
    return surrogate(
      key,
      memory,
      params,
      batch,
      embed_fn,
      inverse_temperature=inverse_temperature,
      momentum=momentum,
      axis_name=axis_name,
    )

  def shardings(mesh):
    del mesh
    spec = jax.sharding.PartitionSpec()
    return MocoMemory(key_params=spec, queue=spec, position=spec)

  return estimator.Estimator(
    init_fn, surrogate_fn, estimator.nothing_pending, shardings
  )


def _follow(slow: jax.Array, fast: jax.Array, momentum: Any) -> jax.Array:
  """Moves one leaf of the key encoder; what is no real number is copied."""
  if not jnp.issubdtype(slow.dtype, jnp.floating):
    return fast
  mixed = momentum * slow.astype(jnp.float32)
  mixed += (1 - momentum) * fast.astype(jnp.float32)
  return mixed.astype(slow.dtype)
