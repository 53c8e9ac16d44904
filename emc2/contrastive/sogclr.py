r"""SogCLR: one moving average per sample stands for its global denominator.

With a small weight of the new value the bias of SimCLR's small batch goes away,
at the price of one float per sample.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2.contrastive import estimator, moving_average
from emc2.kernels import row_logsumexp


class SogclrMemory(NamedTuple):
  """What SogCLR knows of every sample."""

  log_u: jax.Array  # (m,), float32: log of the average; -inf before a visit.
  count: jax.Array  # (), int32: finished steps.


class SogclrInfo(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (), float32: the decoupled SimCLR loss of the batch.
  log_u: jax.Array  # (), float32: mean over the samples of the batch.
  weight: jax.Array  # (), float32: mean of g / u; 1 says nothing was learnt.


def init(key: jax.Array, params: Any, *, num_samples: int) -> SogclrMemory:
  """No sample has been visited."""
  del key, params
  return SogclrMemory(
    log_u=jnp.full((num_samples,), moving_average.UNVISITED, jnp.float32),
    count=jnp.zeros([], jnp.int32),
  )


def surrogate(
  key: jax.Array,
  memory: SogclrMemory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  gamma: moving_average.Gamma = 0.9,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> tuple[jax.Array, tuple[SogclrMemory, SogclrInfo]]:
  """The weighted log-sum-exp; see :func:`sogclr`."""
  del key
  views = estimator.embed_batch(params, batch, embed_fn, axis_name)
  total = views.columns.shape[0]
  beta = jnp.asarray(inverse_temperature, jnp.float32)
  negatives = row_logsumexp.row_logsumexp(
    views.rows,
    None if axis_name is None else views.columns,
    views.position,
    beta,
    implementation=implementation,
  ).value
  positive = beta * estimator.positives(views.rows)

  log_g = jax.lax.stop_gradient(negatives) - math.log(total - 2)
  before = memory.log_u[batch.index]
  log_u = moving_average.update(
    jnp.concatenate([before, before]),
    log_g,
    moving_average.gamma_at(gamma, memory.count),
  )
  # The gradient of a log-sum-exp is its softmax, whose denominator this
  # exchanges for the average.
  weight = jnp.exp(log_g - log_u)
  value = jnp.sum(weight * negatives - positive) / total

  after = moving_average.mean_of_views(log_u)
  after = jnp.where(jnp.isfinite(after), after, before)
  index, everyone = estimator.gather((batch.index, after), axis_name)
  info = SogclrInfo(
    loss=jnp.mean(negatives - positive),
    log_u=jnp.mean(after),
    weight=jnp.mean(weight),
  )
  info = estimator.mean(jax.lax.stop_gradient(info), axis_name)
  memory = SogclrMemory(
    log_u=memory.log_u.at[index].set(everyone), count=memory.count + 1
  )
  return value, (memory, info)


def sogclr(
  num_samples: int,
  *,
  inverse_temperature: float,
  gamma: moving_average.Gamma = 0.9,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> estimator.Estimator:
  r"""SogCLR: stochastic optimisation of the global contrastive loss.

  Of the rows :math:`a` of a batch, with similarities :math:`s`, the positive
  similarity :math:`s_a^+` and the views :math:`N_a` of the other samples,

  .. math::
    g_a = \frac{1}{2B - 2} \sum_{z \in N_a} e^{\beta s_{az}}, \quad
    u_a = (1 - \gamma) u_i + \gamma g_a, \\
    \nabla = \frac{\beta}{2B} \sum_a -\nabla s_a^+ + \frac{1}{2B - 2}
        \sum_{z \in N_a} \frac{e^{\beta s_{az}}}{u_a} \nabla s_{az},

  for a row of sample :math:`i`, whose :math:`u_i` then becomes the mean of
  :math:`u_a` over its two rows.

  .. note::
    The official loss has no :math:`\beta` and sums the two views: its gradient
    is :math:`2 / \beta` times this one. It takes :math:`\gamma = 1` for a whole
    batch of which no sample has been visited; here each sample decides for
    itself. LibAUC bounds :math:`u` by 1e-8 from below, which is wrong below
    :math:`\tau = 0.054`, where :math:`e^{-1 / \tau}` is less; :math:`\log u`
    needs no bound.

  Args:
    num_samples: m, at least 2; samples have the numbers 0 to m - 1. Static.
    inverse_temperature: :math:`\beta = 1 / \tau > 0`.
    gamma: The weight of the new value, in (0, 1], or a schedule: a function of
      the count of finished steps, e.g. :func:`cosine_gamma`.
    axis_name: The mesh axis that splits the batch, or None.
    implementation: Of :func:`emc2.kernels.row_logsumexp.row_logsumexp`.

  Returns:
    An estimator with 4 bytes of memory per sample.

  Raises:
    ValueError: If an argument is out of its range, or a batch has fewer than 2
      samples.

  References:
    Yuan, Wu, Qiu, Du, Zhang, Zhou, Yang, `Provable Stochastic Optimization for
    Global Contrastive Learning: Small Batch Does Not Harm Performance
    <https://arxiv.org/abs/2202.12387>`_, 2022, algorithm 1.
  """
  estimator.check_size(num_samples)
  estimator.check_positive('inverse_temperature', inverse_temperature)
  moving_average.check_gamma(gamma)

  def init_fn(key, params):
    return init(key, params, num_samples=num_samples)

  def surrogate_fn(key, memory, params, batch, embed_fn):
    return surrogate(
      key,
      memory,
      params,
      batch,
      embed_fn,
      inverse_temperature=inverse_temperature,
      gamma=gamma,
      axis_name=axis_name,
      implementation=implementation,
    )

  def shardings(mesh):
    del mesh
    spec = jax.sharding.PartitionSpec()
    return SogclrMemory(log_u=spec, count=spec)

  return estimator.Estimator(
    init_fn, surrogate_fn, estimator.nothing_pending, shardings
  )
