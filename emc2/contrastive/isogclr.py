r"""iSogCLR: SogCLR with a temperature of its own for every sample.

A sample with many near neighbours gets a high temperature, a lonely one a low
temperature; this helps where classes differ much in size.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.contrastive import estimator, moving_average
from emc2.kernels import row_logsumexp


class IsogclrMemory(NamedTuple):
  """What iSogCLR knows of every sample."""

  log_u: jax.Array  # (m,), float32: log of the average; -inf before a visit.
  temperature: jax.Array  # (m,), float32.
  velocity: jax.Array  # (m,), float32: moving average of its gradient.
  count: jax.Array  # (), int32: finished steps.


class IsogclrInfo(NamedTuple):
  """What a reader may log of one step."""

  loss: jax.Array  # (), float32: the decoupled SimCLR loss of the batch.
  log_u: jax.Array  # (), float32: mean over the samples of the batch.
  weight: jax.Array  # (), float32: mean of g / u; 1 says nothing was learnt.
  temperature: jax.Array  # (), float32: mean over the samples of the batch.
  temperature_gradient: jax.Array  # (), float32: its mean, before clipping.


def init(
  key: jax.Array, params: Any, *, num_samples: int, inverse_temperature: float
) -> IsogclrMemory:
  """No sample has been visited; all have the initial temperature."""
  del key, params
  return IsogclrMemory(
    log_u=jnp.full((num_samples,), moving_average.UNVISITED, jnp.float32),
    temperature=jnp.full((num_samples,), 1 / inverse_temperature, jnp.float32),
    velocity=jnp.zeros((num_samples,), jnp.float32),
    count=jnp.zeros([], jnp.int32),
  )


def surrogate(
  key: jax.Array,
  memory: IsogclrMemory,
  params: Any,
  batch: estimator.Batch,
  embed_fn: estimator.EmbedFn,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  gamma: moving_average.Gamma = 0.9,
  rho: jax.typing.ArrayLike = 0.3,
  temperature_step: jax.typing.ArrayLike = 0.01,
  temperature_momentum: jax.typing.ArrayLike = 0.9,
  temperature_min: jax.typing.ArrayLike = 0.05,
  temperature_max: jax.typing.ArrayLike = 0.7,
  gradient_clip: jax.typing.ArrayLike | None = None,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> tuple[jax.Array, tuple[IsogclrMemory, IsogclrInfo]]:
  """The weighted log-sum-exp, and a step of tau; see :func:`isogclr`."""
  del key
  views = estimator.embed_batch(params, batch, embed_fn, axis_name)
  total = views.columns.shape[0]
  old = memory.temperature[batch.index]
  temperature = jnp.concatenate([old, old])
  negatives, similarity = row_logsumexp.row_logsumexp(
    views.rows,
    None if axis_name is None else views.columns,
    views.position,
    1 / temperature,
    implementation=implementation,
  )
  positive = estimator.positives(views.rows)

  log_g = jax.lax.stop_gradient(negatives) - math.log(total - 2)
  before = memory.log_u[batch.index]
  log_u = moving_average.update(
    jnp.concatenate([before, before]),
    log_g,
    moving_average.gamma_at(gamma, memory.count),
  )
  weight = jnp.exp(log_g - log_u)
  beta = jnp.asarray(inverse_temperature, jnp.float32)
  losses = weight * temperature * negatives - positive
  value = beta * jnp.sum(losses) / total

  slope = log_u + rho - weight * similarity / temperature
  slope = jax.lax.stop_gradient(jnp.mean(slope.reshape(2, -1), axis=0))
  clipped = slope
  if gradient_clip is not None:
    clipped = jnp.clip(slope, -gradient_clip, gradient_clip)
  velocity = memory.velocity[batch.index]
  moved = velocity + temperature_momentum * (clipped - velocity)
  new = jnp.clip(
    old - temperature_step * moved, temperature_min, temperature_max
  )
  after = moving_average.mean_of_views(log_u)
  known = jnp.isfinite(after) & jnp.isfinite(slope)
  after = jnp.where(known, after, before)
  moved = jnp.where(known, moved, velocity)
  new = jnp.where(known, new, old)

  index, everyone = estimator.gather(
    (batch.index, jnp.stack([after, new, moved], axis=1)), axis_name
  )
  info = IsogclrInfo(
    loss=jnp.mean(negatives - positive / temperature),
    log_u=jnp.mean(after),
    weight=jnp.mean(weight),
    temperature=jnp.mean(new),
    temperature_gradient=jnp.mean(slope),
  )
  info = estimator.mean(jax.lax.stop_gradient(info), axis_name)
  memory = IsogclrMemory(
    log_u=memory.log_u.at[index].set(everyone[:, 0]),
    temperature=memory.temperature.at[index].set(everyone[:, 1]),
    velocity=memory.velocity.at[index].set(everyone[:, 2]),
    count=memory.count + 1,
  )
  return value, (memory, info)


def isogclr(
  num_samples: int,
  *,
  inverse_temperature: float,
  gamma: moving_average.Gamma = 0.9,
  rho: float = 0.3,
  temperature_step: float = 0.01,
  temperature_momentum: float = 0.9,
  temperature_min: float = 0.05,
  temperature_max: float = 0.7,
  gradient_clip: float | None = None,
  axis_name: str | None = None,
  implementation: str = 'auto',
) -> estimator.Estimator:
  r"""iSogCLR: SogCLR with individual temperatures.

  Samples minimise over :math:`\tau_i` in a fixed range

  .. math::
    \tau_i \log E_z e^{s_{iz} / \tau_i} + \tau_i \rho,

  whose slope is :math:`\rho - KL(p_i \| U)`, with :math:`p_i` the softmax over
  the negatives and :math:`U` uniform over them: a large :math:`\rho` makes low
  temperatures, and :math:`\rho \ge \log(2B - 2)` pins them to the minimum. A
  row :math:`a` of a batch estimates it by

  .. math::
    G_a = \log u_a + \rho - \frac{1}{2B - 2} \sum_{z \in N_a}
        \frac{e^{s_{az} / \tau_i}}{u_a} \frac{s_{az}}{\tau_i}, \\
    v_i \leftarrow (1 - \mu) v_i + \mu G_i, \quad
    \tau_i \leftarrow \mathrm{clip}(\tau_i - \eta v_i),

  with :math:`u` as in SogCLR and :math:`G_i` the mean of its two rows. The
  encoder's gradient is SogCLR's with :math:`\tau_i` in each exponent, times the
  initial :math:`\beta`; with :math:`\eta = 0` it is SogCLR's.

  Args:
    num_samples: m, at least 2; samples have the numbers 0 to m - 1. Static.
    inverse_temperature: 1 over the initial temperature of all samples.
    gamma: The weight of the new value in u, in (0, 1], or a schedule: a
      function of the count of finished steps, e.g. :func:`cosine_gamma`.
    rho: :math:`\rho >= 0`, the pull towards low temperatures, in nats.
    temperature_step: :math:`\eta >= 0`.
    temperature_momentum: :math:`\mu`, the weight of the new gradient, in
      (0, 1].
    temperature_min: Temperatures stay above it.
    temperature_max: Temperatures stay below it.
    gradient_clip: Bounds :math:`|G_i|`, as the authors' code does by 3; None
      does not, as LibAUC.
    axis_name: The mesh axis that splits the batch, or None.
    implementation: Of :func:`emc2.kernels.row_logsumexp.row_logsumexp`.

  Returns:
    An estimator with 12 bytes of memory per sample.

  Raises:
    ValueError: If an argument is out of its range, or a batch has fewer than 2
      samples.

  References:
    Qiu, Hu, Yuan, Zhou, Zhang, Yang, `Not All Semantics are Created Equal:
    Contrastive Self-supervised Learning with Automatic Temperature
    Individualization <https://arxiv.org/abs/2305.11965>`_, 2023, algorithm 1.
  """
  estimator.check_size(num_samples)
  estimator.check_positive('inverse_temperature', inverse_temperature)
  moving_average.check_gamma(gamma)
  _check_at_least_zero('rho', rho)
  _check_at_least_zero('temperature_step', temperature_step)
  if not 0 < temperature_momentum <= 1:
    raise ValueError(
      'temperature_momentum, the weight of the new gradient, must lie in '
      f'(0, 1], got {temperature_momentum}.'
    )
  estimator.check_positive('temperature_min', temperature_min)
  estimator.check_positive('temperature_max', temperature_max)
  if not temperature_min <= 1 / inverse_temperature <= temperature_max:
    raise ValueError(
      'the initial temperature, 1 / inverse_temperature, must lie in '
      f'[temperature_min, temperature_max] = [{temperature_min}, '
      f'{temperature_max}], got {1 / inverse_temperature}.'
    )
  if gradient_clip is not None:
    estimator.check_positive('gradient_clip', gradient_clip)

  def init_fn(key, params):
    return init(
      key,
      params,
      num_samples=num_samples,
      inverse_temperature=inverse_temperature,
    )

  def surrogate_fn(key, memory, params, batch, embed_fn):
    return surrogate(
      key,
      memory,
      params,
      batch,
      embed_fn,
      inverse_temperature=inverse_temperature,
      gamma=gamma,
      rho=rho,
      temperature_step=temperature_step,
      temperature_momentum=temperature_momentum,
      temperature_min=temperature_min,
      temperature_max=temperature_max,
      gradient_clip=gradient_clip,
      axis_name=axis_name,
      implementation=implementation,
    )

  def shardings(mesh):
    del mesh
    spec = jax.sharding.PartitionSpec()
    return IsogclrMemory(
      log_u=spec, temperature=spec, velocity=spec, count=spec
    )

  return estimator.Estimator(
    init_fn, surrogate_fn, estimator.nothing_pending, shardings
  )


def _check_at_least_zero(name: str, value: float) -> None:
  if not (np.isfinite(value) and value >= 0):
    raise ValueError(f'{name} must be finite and at least 0, got {value}.')
