r"""SimCLR: the negatives of a row are the other samples of its batch.

Its gradient differs from that of the global loss by a bias that no number of
steps removes, and that falls as the batch grows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2.contrastive import estimator
from emc2.kernels import row_logsumexp


class SimclrMemory(NamedTuple):
  """SimCLR keeps nothing of past steps."""


class SimclrInfo(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (), float32: the loss of the batch, in nats.
  positive: jax.Array  # (), float32: mean probability of the positive.


def init(key: jax.Array, params: Any) -> SimclrMemory:
  """There is nothing to remember."""
  del key, params
  return SimclrMemory()


def surrogate(
  key: jax.Array,
  memory: SimclrMemory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  decoupled: bool = False,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> tuple[jax.Array, tuple[SimclrMemory, SimclrInfo]]:
  """The loss itself; see :func:`simclr`."""
  del key
  views = estimator.embed_batch(params, batch, embed_fn, axis_name)
  beta = jnp.asarray(inverse_temperature, jnp.float32)
  negatives = row_logsumexp.row_logsumexp(
    views.rows,
    None if axis_name is None else views.columns,
    views.position,
    beta,
    implementation=implementation,
  ).value
  positive = beta * estimator.positives(views.rows)
  both = jnp.logaddexp(positive, negatives)
  losses = (negatives if decoupled else both) - positive
  info = SimclrInfo(
    loss=jnp.mean(losses), positive=jnp.mean(jnp.exp(positive - both))
  )
  info = estimator.mean(jax.lax.stop_gradient(info), axis_name)
  return jnp.sum(losses) / views.columns.shape[0], (memory, info)


def simclr(
  *,
  inverse_temperature: float,
  decoupled: bool = False,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> estimator.Estimator:
  r"""SimCLR: the normalised temperature-scaled cross entropy (NT-Xent).

  Of the rows :math:`a = 1 \dots 2B` of a batch, with similarities :math:`s`,
  the positive similarity :math:`s_a^+` and the views :math:`N_a` of the other
  samples,

  .. math::
    L = \frac{1}{2B} \sum_a -\beta s_a^+ + \log\Big(e^{\beta s_a^+}
        + \sum_{z \in N_a} e^{\beta s_{az}}\Big).

  The decoupled loss drops the positive from the logarithm; then a batch of the
  whole data set gives the global loss but for its constant.

  Args:
    inverse_temperature: :math:`\beta = 1 / \tau > 0`.
    decoupled: Drops the positive from the logarithm. Static.
    axis_name: The mesh axis that splits the batch, or None.
    implementation: Of :func:`emc2.kernels.row_logsumexp.row_logsumexp`.

  Returns:
    An estimator whose memory is empty.

  Raises:
    ValueError: If `inverse_temperature` is not finite and positive, or a batch
      has fewer than 2 samples.

  References:
    Chen, Kornblith, Norouzi, Hinton, `A Simple Framework for Contrastive
    Learning of Visual Representations <https://arxiv.org/abs/2002.05709>`_,
    2020, equation 1; Yeh et al., `Decoupled Contrastive Learning
    <https://arxiv.org/abs/2110.06848>`_, 2022, for the decoupled loss.
  """
  estimator.check_positive('inverse_temperature', inverse_temperature)

  def surrogate_fn(key, memory, params, batch, embed_fn):
    return surrogate(
      key,
      memory,
      params,
      batch,
      embed_fn,
      inverse_temperature=inverse_temperature,
      decoupled=decoupled,
      axis_name=axis_name,
      implementation=implementation,
    )

  def shardings(mesh):
    del mesh
    return SimclrMemory()

  return estimator.Estimator(
    init, surrogate_fn, estimator.nothing_pending, shardings
  )
