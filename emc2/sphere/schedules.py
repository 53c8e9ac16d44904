"""Step sizes and temperatures as functions of the number of steps done."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.typing.ArrayLike]
"""Maps (), int32, the number of finished steps, to a number ()."""


def geometric(start: float, stop: float, num_steps: int) -> Schedule:
  r"""Goes from one positive number to another by equal factors.

  .. math::
    \eta_t = \eta_0 \Big(\frac{\eta_T}{\eta_0}\Big)^{\min(t / T, 1)}

  Args:
    start: :math:`\eta_0 > 0`.
    stop: :math:`\eta_T > 0`, kept from step T on.
    num_steps: T, at least 1.

  Returns:
    The schedule, in the default float dtype of JAX.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> schedule = geometric(1.0, 0.01, 10)
    >>> [round(float(schedule(t)), 3) for t in (0, 5, 10, 20)]
    [1.0, 0.1, 0.01, 0.01]
  """
  check_positive('start', start)
  check_positive('stop', stop)
  if num_steps < 1:
    raise ValueError(f'num_steps must be at least 1, got {num_steps}.')
  rate = math.log(stop / start) / num_steps

  def schedule(count):
    count = jnp.minimum(jnp.asarray(count), num_steps)
    return start * jnp.exp(rate * count.astype(jnp.result_type(float)))

  return schedule


def evaluate(
  value: jax.typing.ArrayLike | Schedule,
  count: jax.Array,
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """A number, or what a schedule says now, as () of the dtype."""
  value = value(count) if callable(value) else value
  return jnp.asarray(value).astype(dtype)


def check_positive(name: str, value: float) -> None:
  """Refuses a number that is not finite and above zero."""
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f'{name} must be finite and positive, got {value}.')
