r"""Losses of one score, with what a second-order method asks of them.

A step moves a score from z to z + d. A line search that subtracts values of the
objective drowns in their rounding near the optimum. What it compares here
is the excess

.. math:: D(z, d) = l(z + d) - l(z) - l'(z)\, d \ge 0,

which each loss computes without cancellation, so float32 is enough.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
  """A convex loss l(z, y) of a score z and a label y, entry by entry.

  All four map floating arrays of one shape and dtype to such an array.
  """

  value: Callable[[jax.Array, jax.Array], jax.Array]  # l(z, y).
  slope: Callable[[jax.Array, jax.Array], jax.Array]  # dl/dz.
  curvature: Callable[[jax.Array, jax.Array], jax.Array]  # d2l/dz2 >= 0.
  # (z, d, y) to D(z, d), right to a few eps of itself.
  excess: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  bound: float  # sup |d3l/dz3|; infinite where there is none.


def _exp_remainder(x: jax.Array) -> jax.Array:
  """exp(x) - 1 - x for x in [-1, 1], by its series until it ends below eps."""
  num_terms = 18 if x.dtype == jnp.float64 else 10
  series = jnp.ones_like(x)
  for k in range(num_terms + 1, 2, -1):
    series = 1 + x * series * (1 / k)
  return x * x * series * 0.5


def _largest_exponent(dtype: jax.typing.DTypeLike) -> float:
  """An x whose exp is finite, and times a few still is."""
  return math.floor(math.log(float(jnp.finfo(dtype).max))) - 8.0


def _logistic_value(z: jax.Array, y: jax.Array) -> jax.Array:
  return jax.nn.softplus((1 - 2 * y) * z)


def _logistic_slope(z: jax.Array, y: jax.Array) -> jax.Array:
  # Not sigmoid(z) - y, which cancels where the label is predicted well.
  side = 1 - 2 * y
  return side * jax.nn.sigmoid(side * z)


def _logistic_curvature(z: jax.Array, y: jax.Array) -> jax.Array:
  del y
  tail = jnp.exp(-jnp.abs(z))
  return tail / jnp.square(1 + tail)


def _logistic_excess(
  z: jax.Array, change: jax.Array, y: jax.Array
) -> jax.Array:
  r"""log(1 + p expm1(d)) - p d with p = sigmoid(z)."""
  del y
  # D(-z, -d) = D(z, d): take z <= 0, so p is right where it is small.
  d, z = jnp.where(z > 0, -change, change), -jnp.abs(z)
  tail = jnp.exp(z)
  q = 1 / (1 + tail)
  p = tail * q
  # log(q exp(-p d) + p exp(q d)): as q (-p d) + p (q d) = 0, two remainders
  # >= 0 are left, and neither cancels.
  is_near = jnp.abs(d) <= 1
  near = jnp.where(is_near, d, 0)
  inner = q * _exp_remainder(-p * near) + p * _exp_remainder(q * near)
  # Where exp(d) overflows or p underflows, one end or the other lies so far
  # out that the loss is a ray there, to less than eps.
  largest, ahead = _largest_exponent(z.dtype), z + d
  is_far = d > jnp.where(z > -largest, largest, largest / 4)
  is_ray = z > -largest / 2
  growth = jnp.exp(jnp.where(is_far, -jnp.abs(ahead), d))
  outer = jnp.where(is_ray, tail, growth)
  middle = jnp.where(is_near, inner, p * (growth - 1))
  bend = jnp.log1p(jnp.where(is_far, outer, middle))
  far = jnp.maximum(ahead, 0) + jnp.where(is_ray, -bend - p * d, bend)
  return jnp.where(is_far, far, bend - jnp.where(is_near, 0, p * d))


def _squared_value(z: jax.Array, y: jax.Array) -> jax.Array:
  return 0.5 * jnp.square(z - y)


def _squared_slope(z: jax.Array, y: jax.Array) -> jax.Array:
  return z - y


def _squared_curvature(z: jax.Array, y: jax.Array) -> jax.Array:
  del y
  return jnp.ones_like(z)


def _squared_excess(z: jax.Array, change: jax.Array, y: jax.Array) -> jax.Array:
  del z, y
  return 0.5 * jnp.square(change)


def _poisson_value(z: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.exp(z) - y * z


def _poisson_slope(z: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.exp(z) - y


def _poisson_curvature(z: jax.Array, y: jax.Array) -> jax.Array:
  del y
  return jnp.exp(z)


def _poisson_excess(z: jax.Array, change: jax.Array, y: jax.Array) -> jax.Array:
  del y
  rate, largest = jnp.exp(z), _largest_exponent(z.dtype)
  near = rate * _exp_remainder(jnp.clip(change, -1, 1))
  middle = rate * (jnp.expm1(jnp.minimum(change, largest)) - change)
  far = jnp.exp(z + change) - rate * (1 + change)
  outer = jnp.where(change > largest, far, middle)
  return jnp.where(jnp.abs(change) <= 1, near, outer)


LOSSES = {
  'logistic': Loss(
    _logistic_value,
    _logistic_slope,
    _logistic_curvature,
    _logistic_excess,
    1 / (6 * math.sqrt(3)),
  ),
  'squared': Loss(
    _squared_value, _squared_slope, _squared_curvature, _squared_excess, 0.0
  ),
  'poisson': Loss(
    _poisson_value,
    _poisson_slope,
    _poisson_curvature,
    _poisson_excess,
    math.inf,
  ),
}
r"""By name: 'logistic', :math:`\log(1 + e^z) - y z` for y in {0, 1}; 'squared',
:math:`(z - y)^2 / 2`; 'poisson', :math:`e^z - y z` for counts y.
"""
