r"""The moving average of SogCLR and iSogCLR, kept as a logarithm.

The average :math:`u` of :math:`e^{s / \tau}` spans :math:`e^{\pm 1 / \tau}`,
which no float32 holds at :math:`\tau < 0.0113`; its logarithm always fits.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

UNVISITED = -math.inf
"""The logarithm of an average that has seen no value."""

Gamma = float | Callable[[jax.Array], jax.typing.ArrayLike]


def update(
  log_u: jax.Array, log_g: jax.Array, gamma: jax.typing.ArrayLike
) -> jax.Array:
  r"""Moves averages towards new values, in logarithms.

  .. math::
    \log u \leftarrow \log\big((1 - \gamma) u + \gamma g\big)

  Args:
    log_u: (n,) float32; `UNVISITED` where no value was seen: the new value then
      counts in full.
    log_g: (n,) float32: the new values.
    gamma: (), the weight of the new value, in (0, 1].

  Returns:
    (n,) float32.

  Examples:
    >>> log_u, log_g = jnp.log(jnp.array([[0.0, 2.0], [4.0, 4.0]]))
    >>> jnp.exp(update(log_u, log_g, 0.5))
    Array([4., 3.], dtype=float32)
  """
  gamma = jnp.where(log_u == UNVISITED, 1.0, jnp.asarray(gamma, log_u.dtype))
  return jnp.logaddexp(jnp.log1p(-gamma) + log_u, jnp.log(gamma) + log_g)


def mean_of_views(log_u: jax.Array) -> jax.Array:
  """The log of the mean over the two views of each sample: (2b,) to (b,)."""
  first, second = jnp.split(log_u, 2)
  return jnp.logaddexp(first, second) - math.log(2)


def gamma_at(gamma: Gamma, count: jax.Array) -> jax.Array:
  """The weight of the new value at a step, (), float32."""
  return jnp.asarray(gamma(count) if callable(gamma) else gamma, jnp.float32)


def check_gamma(gamma: Gamma) -> None:
  """Refuses a weight outside (0, 1]; a schedule is taken on trust."""
  if not callable(gamma) and not 0 < gamma <= 1:
    raise ValueError(
      f'gamma, the weight of the new value, must lie in (0, 1], got {gamma}.'
    )


def cosine_gamma(
  minimum: float, *, decay_epochs: int, steps_per_epoch: int
) -> Callable[[jax.Array], jax.Array]:
  r"""LibAUC's schedule: the average grows longer by a half cosine.

  .. math::
    \gamma(e) = \gamma_{\min} + \tfrac12 (1 - \gamma_{\min})
        \big(1 + \cos(\pi e / E)\big), \quad e = \lfloor t / n \rfloor,

  and :math:`\gamma_{\min}` from epoch :math:`E` on. Early in training, when the
  encoder moves fast, an old average misleads; later it removes more variance.

  Args:
    minimum: :math:`\gamma_{\min}`, in (0, 1].
    decay_epochs: :math:`E >= 1`; half of the training is LibAUC's advice.
    steps_per_epoch: :math:`n >= 1`.

  Returns:
    A function of the count of finished steps.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> gamma = cosine_gamma(0.2, decay_epochs=2, steps_per_epoch=10)
    >>> [round(float(gamma(t)), 2) for t in (0, 9, 10, 20, 90)]
    [1.0, 1.0, 0.6, 0.2, 0.2]

  References:
    LibAUC, `GCLoss <https://docs.libauc.org>`_, option `gamma_schedule`.
  """
  if not 0 < minimum <= 1:
    raise ValueError(f'minimum must lie in (0, 1], got {minimum}.')
  if decay_epochs < 1:
    raise ValueError(f'decay_epochs must be at least 1, got {decay_epochs}.')
  if steps_per_epoch < 1:
    raise ValueError(
      f'steps_per_epoch must be at least 1, got {steps_per_epoch}.'
    )

  def gamma(count):
    epoch = jnp.minimum(jnp.asarray(count) // steps_per_epoch, decay_epochs)
    phase = epoch.astype(jnp.float32) * (math.pi / decay_epochs)
    return minimum + (1 - minimum) * 0.5 * (1 + jnp.cos(phase))

  return gamma
