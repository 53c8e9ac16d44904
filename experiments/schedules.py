"""The learning-rate schedule and the plain optimisers of the EMC² paper."""

import jax
import jax.numpy as jnp
import optax

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


def warmup_cosine(
  learning_rate: float,
  *,
  steps_per_epoch: int,
  num_epochs: int,
  warmup_epochs: int = 10,
) -> optax.Schedule:
  r"""Warms up linearly from 0, then falls along half a cosine to 0.

  With the epoch :math:`e = t/s` as a fraction, `s` steps an epoch, `E` epochs
  and `W` of warm-up,

  .. math::
    \eta(e) = \begin{cases}
      \eta e / W & e < W \\
      \tfrac12 \eta \left(1 + \cos \pi \frac{e - W}{E - W}\right) & e \ge W.
    \end{cases}

  A run of :math:`E \le W` epochs is all warm-up, and never reaches
  :math:`\eta`. The rate at step 0 is exactly 0. After `E` epochs it stays where
  it is.

  Args:
    learning_rate: The peak, :math:`\eta`.
    steps_per_epoch: s, at least 1.
    num_epochs: E, at least 1.
    warmup_epochs: W, at least 0.

  Returns:
    Maps the number of finished steps to the rate, float32.

  Raises:
    ValueError: If a number is out of its range.

  Examples:
    >>> schedule = warmup_cosine(2.0, steps_per_epoch=5, num_epochs=30)
    >>> [round(float(schedule(t)), 4) for t in (0, 25, 50, 100, 150)]
    [0.0, 1.0, 2.0, 1.0, 0.0]

  References:
    The released code of Yau et al., "EMC2", 2024,
    https://arxiv.org/abs/2404.10575.
  """
  for name, value, least in (
    ('steps_per_epoch', steps_per_epoch, 1),
    ('num_epochs', num_epochs, 1),
    ('warmup_epochs', warmup_epochs, 0),
  ):
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    epoch = jnp.asarray(count, jnp.float32) / steps_per_epoch
    epoch = jnp.minimum(epoch, num_epochs)
    if num_epochs <= warmup_epochs:
      return learning_rate * epoch / warmup_epochs
    phase = (epoch - warmup_epochs) / (num_epochs - warmup_epochs)
    cosine = 0.5 * learning_rate * (1 + jnp.cos(jnp.pi * phase))
    if warmup_epochs == 0:
      return cosine
    warmup = learning_rate * epoch / warmup_epochs
    return jnp.where(epoch < warmup_epochs, warmup, cosine)

  return schedule


def adam(
  learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
  r"""Adam whose weight decay is an L2 term of the gradient: not decoupled.

  .. math:: g_t \leftarrow g_t + \lambda \theta_t, \text{ then Adam.}

  `optax.adamw` is something else: it decays beside the moments.

  Args:
    learning_rate: A number or a schedule.
    weight_decay: :math:`\lambda \ge 0`, on every parameter.

  Returns:
    The transform; `update` needs `params`.

  Raises:
    ValueError: If `weight_decay` is negative.
  """
  _check_weight_decay(weight_decay)
  b1, b2 = ADAM_BETAS
  return optax.with_extra_args_support(
    optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.adam(learning_rate, b1=b1, b2=b2, eps=ADAM_EPSILON),
    )
  )


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: float = 0.0,
  momentum: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradient descent whose weight decay is an L2 term of the gradient.

  .. math::
    g_t \leftarrow g_t + \lambda \theta_t, \quad
    m_{t+1} = \mu m_t + g_t, \quad
    \theta_{t+1} = \theta_t - \eta_t m_{t+1}

  The rate comes after the momentum, as in PyTorch.

  Args:
    learning_rate: A number or a schedule.
    weight_decay: :math:`\lambda \ge 0`, on every parameter.
    momentum: :math:`\mu`, or None for none, which keeps no state for it.

  Returns:
    The transform; `update` needs `params`.

  Raises:
    ValueError: If `weight_decay` is negative.
  """
  _check_weight_decay(weight_decay)
  return optax.with_extra_args_support(
    optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.sgd(learning_rate, momentum=momentum),
    )
  )


def _check_weight_decay(weight_decay: float) -> None:
  if not weight_decay >= 0:
    raise ValueError(f'weight_decay must not be negative, got {weight_decay}.')
