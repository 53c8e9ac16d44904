r"""The global contrastive loss, exactly: the target that all methods estimate.

For samples of A views each, an anchor view x, the other views y of its sample
and the views z of all other samples,

.. math::
  L = E_{x, y}\Big[-\beta \phi(x)^\top \phi(y)
      + \log \sum_z e^{\beta \phi(x)^\top \phi(z)}\Big].
"""

from typing import Any

import jax
import jax.numpy as jnp

from emc2.contrastive import estimator


def global_loss(
  embeddings: jax.Array,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  block_size: int = 1024,
) -> jax.Array:
  r"""The global contrastive loss of embedded views.

  It costs `(m A)^2 d` products and `O(block_size m A)` memory, forwards and
  backwards.

  Args:
    embeddings: (m, A, d) unit rows: A >= 2 views of each of m >= 2 samples.
    inverse_temperature: (), :math:`\beta > 0`.
    block_size: How many anchors are compared at once, static.

  Returns:
    (), the loss in nats; differentiable.

  Raises:
    ValueError: If `embeddings` is not (m >= 2, A >= 2, d).

  Examples:
    >>> x = jnp.array([[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2])
    >>> global_loss(x, inverse_temperature=1.0)  # log(2 exp(0)) - 1
    Array(-0.30685282, dtype=float32)

  References:
    Yau, Wai, Raman, Sarkar, Hong, `EMC2: Efficient MCMC Negative Sampling for
    Contrastive Learning with Global Convergence
    <https://arxiv.org/abs/2404.10575>`_, 2024, the objective; it is that of
    Yuan et al., `Provable Stochastic Optimization for Global Contrastive
    Learning <https://arxiv.org/abs/2202.12387>`_, 2022.
  """
  if embeddings.ndim != 3 or embeddings.shape[0] < 2 or embeddings.shape[1] < 2:
    raise ValueError(
      'embeddings must be (m, A, d) with m, A >= 2, got shape '
      f'{embeddings.shape}.'
    )
  num_samples, num_views, size = embeddings.shape
  beta = jnp.asarray(inverse_temperature, embeddings.dtype)
  # sum_{v != w} f_v . f_w = |sum_v f_v|^2 - sum_v |f_v|^2 in each sample.
  together = jnp.sum(jnp.square(jnp.sum(embeddings, axis=1)))
  apart = jnp.sum(jnp.square(embeddings))
  pairs = num_samples * num_views * (num_views - 1)
  alignment = (together - apart) / pairs

  everything = embeddings.reshape(num_samples * num_views, size)
  owner = jnp.repeat(jnp.arange(num_samples), num_views)
  total = owner.size
  num_blocks = -(-total // block_size)
  block_size = -(-total // num_blocks)
  padding = num_blocks * block_size - total
  anchors = jnp.pad(everything, ((0, padding), (0, 0)))
  owners = jnp.pad(owner, (0, padding))

  @jax.checkpoint
  def block(pair):
    rows, row_owner = pair
    logits = beta * (rows @ everything.T)
    own = row_owner[:, None] == owner[None, :]
    return jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=1)

  blocks = (
    anchors.reshape(num_blocks, block_size, size),
    owners.reshape(num_blocks, block_size),
  )
  normalizers = jax.lax.map(block, blocks).reshape(-1)[:total]
  return jnp.mean(normalizers) - beta * alignment


def embed_all(
  params: Any,
  data: Any,
  embed_fn: estimator.EmbedFn,
  *,
  num_samples: int,
  views: jax.Array,
  block_size: int = 1024,
) -> jax.Array:
  """Embeds the same views of every sample.

  Args:
    params: Of the encoder.
    data: What `embed_fn` reads.
    embed_fn: The encoder.
    num_samples: m, static.
    views: (m, A) uint32: view ids of each sample.
    block_size: How many views are embedded at once, static.

  Returns:
    (m, A, d) unit rows; differentiable, with the activations of one block only.
  """
  num_views = views.shape[1]
  index = jnp.repeat(jnp.arange(num_samples, dtype=jnp.int32), num_views)
  total = index.size
  num_blocks = -(-total // block_size)
  block_size = -(-total // num_blocks)
  shape = (num_blocks, block_size)
  padding = (0, num_blocks * block_size - total)
  index = jnp.pad(index, padding).reshape(shape)
  view = jnp.pad(views.reshape(-1), padding).reshape(shape)
  block = jax.checkpoint(lambda pair: embed_fn(params, data, *pair))
  rows = jax.lax.map(block, (index, view))
  return rows.reshape(-1, rows.shape[-1])[:total].reshape(
    num_samples, num_views, -1
  )
