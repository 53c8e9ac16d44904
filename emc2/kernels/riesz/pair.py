"""What two points at a distance do to each other."""

import jax
import jax.numpy as jnp


def terms(
  r2: jax.Array, inverse: jax.Array, exponent: float
) -> tuple[jax.Array, jax.Array]:
  """The potential of a pair, and the weight of its difference.

  Whole exponents take multiplications alone, the logarithmic energy one
  logarithm, and all others an exponential too.

  Args:
    r2: squared distances, positive.
    inverse: `1 / r`, like `r2`.
    exponent: `s`, static.

  Returns:
    `r^-s`, or `-log r` where `s` is 0, and `r^-(s + 2)`, like `r2`. The
    gradient of the potential with respect to `x` is the weight times
    `-s (x - y)`, or times `-(x - y)` where `s` is 0.
  """
  square = inverse * inverse
  if exponent == 0:
    return -0.5 * jnp.log(r2), square
  if exponent == 1:
    return inverse, inverse * square
  if exponent % 2 == 0:
    half = int(exponent) // 2
    power = square if half == 1 else jax.lax.integer_pow(square, half)
  elif exponent % 1 == 0:
    power = jax.lax.integer_pow(inverse, int(exponent))
  else:
    power = jnp.exp(-0.5 * exponent * jnp.log(r2))
  return power, power * square


def slope(exponent: float) -> float:
  """By what the weighted differences are multiplied in the end."""
  return -1.0 if exponent == 0 else -float(exponent)
