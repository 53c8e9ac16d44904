"""Losses against extended precision and each other's derivatives."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.newton import losses


def _remainder(x):
  """exp(x) - 1 - x in extended precision."""
  near, series = np.clip(x, -0.5, 0.5), np.ones_like(x)
  for k in range(30, 2, -1):
    series = 1 + near * series / k
  far = np.expm1(np.where(np.abs(x) < 0.5, 0, x)) - x
  return np.where(np.abs(x) < 0.5, near * near * series / 2, far)


def _excess(loss, z, d):
  """D(z, d) in extended precision."""
  z, d = z.astype(np.longdouble), d.astype(np.longdouble)
  if loss == 'squared':
    return d * d / 2
  if loss == 'poisson':
    return np.exp(z) * _remainder(d)
  tail = np.exp(-np.abs(z))
  p = np.where(z < 0, tail, 1) / (1 + tail)
  q = np.where(z < 0, 1, tail) / (1 + tail)
  return np.log1p(q * _remainder(-p * d) + p * _remainder(q * d))


def _grid(scores, dtype):
  """Each score with changes of 1e-8 to 1e4, both ways."""
  sizes = np.concatenate([np.logspace(-8, 4, 97), np.linspace(0.5, 100, 41)])
  z, d = np.meshgrid(scores, np.concatenate([sizes, -sizes]))
  return z.ravel().astype(dtype), d.ravel().astype(dtype)


class LossesTest(parameterized.TestCase):
  @parameterized.product(
    loss=['logistic', 'squared', 'poisson'], dtype=['float32', 'float64']
  )
  def test_excess_is_right_to_a_few_eps(self, loss, dtype):
    with jax.enable_x64(dtype == 'float64'):
      far = [-1e4, -300, 300, 1e4] if loss != 'poisson' else []
      scores = np.concatenate([np.linspace(-60, 60, 121), [1e-3, -0.2], far])
      z, d = _grid(scores, dtype)
      got = losses.LOSSES[loss].excess(*map(jnp.asarray, (z, d, 0 * z)))
      self.assertEqual(got.dtype, dtype)
      want = _excess(loss, z, d)
      # Where a result would underflow or overflow there is nothing to compare.
      kept = (want > 1e-30) & (want < 1e30)
      got = np.asarray(got)
      self.assertGreater(np.mean(kept), 0.6)
      error = np.abs(got - want)[kept] / want[kept]
      # exp(z + d) owes an eps for each unit of its exponent, and XLA's log1p of
      # float64 errs by some 60 eps near -0.41.
      exact = loss == 'squared' or (loss, dtype) == ('logistic', 'float32')
      limit = 16 if exact else 128
      self.assertLess(error.max(), limit * np.finfo(dtype).eps)
      self.assertTrue(np.all(got[want < 1e30] >= 0))
      if loss != 'poisson':
        self.assertTrue(np.all(np.isfinite(got)))

  def test_excess_of_poisson_far_out(self):
    z = jnp.array([-1e4, -300.0, -1e4, 0.0])
    d = jnp.array([1e4, 301.0, -1e4, 1e4])
    got = losses.LOSSES['poisson'].excess(z, d, 0 * z)
    np.testing.assert_allclose(got, [1.0, math.e, 0.0, math.inf], rtol=1e-6)

  @parameterized.parameters(*losses.LOSSES)
  def test_excess_does_not_depend_on_the_label(self, loss):
    z, d = jnp.linspace(-3, 3, 13), jnp.linspace(2, -2, 13)
    excess = losses.LOSSES[loss].excess
    np.testing.assert_array_equal(excess(z, d, 0 * z), excess(z, d, 0 * z + 1))

  @parameterized.parameters(*losses.LOSSES)
  def test_derivatives(self, loss):
    loss = losses.LOSSES[loss]
    with jax.enable_x64(True):
      z = jnp.linspace(-20, 20, 81)
      for label in (0.0, 1.0):
        y = jnp.full_like(z, label)
        slope = jax.vmap(jax.grad(loss.value))(z, y)
        np.testing.assert_allclose(loss.slope(z, y), slope, 1e-9, 1e-14)
        curvature = jax.vmap(jax.grad(loss.slope))(z, y)
        np.testing.assert_allclose(loss.curvature(z, y), curvature, 1e-6)

  @parameterized.parameters(*losses.LOSSES)
  def test_bound_is_the_largest_third_derivative(self, loss):
    loss = losses.LOSSES[loss]
    with jax.enable_x64(True):
      z = jnp.linspace(-30, 30, 6001)
      third = jax.vmap(jax.grad(loss.curvature))(z, 0 * z)
      largest = float(jnp.max(jnp.abs(third)))
    if math.isinf(loss.bound):
      self.assertGreater(largest, 1e12)
    else:
      self.assertAlmostEqual(loss.bound, largest, places=5)

  def test_values_of_logistic(self):
    loss = losses.LOSSES['logistic']
    z = np.array([-1e4, -20.0, -1.0, 0.0, 2.0, 30.0, 1e4], np.float32)
    for label in (0, 1):
      args = jnp.asarray(z), jnp.full(z.shape, float(label))
      side = (1 - 2 * label) * z.astype(np.longdouble)
      tail = np.exp(-np.abs(side))
      want = np.maximum(side, 0) + np.log1p(tail)
      np.testing.assert_allclose(loss.value(*args), want, rtol=1e-6, atol=1e-37)
      sigmoid = np.where(side < 0, tail, 1) / (1 + tail)
      # Both ends right of themselves: no sigmoid(z) - 1.
      np.testing.assert_allclose(
        loss.slope(*args), (1 - 2 * label) * sigmoid, rtol=1e-6, atol=1e-37
      )
      np.testing.assert_allclose(
        loss.curvature(*args), tail / (1 + tail) ** 2, rtol=1e-6, atol=1e-37
      )

  def test_values_of_the_others(self):
    z, y = jnp.array([0.5, -1.0]), jnp.array([2.0, 3.0])
    squared, poisson = losses.LOSSES['squared'], losses.LOSSES['poisson']
    np.testing.assert_allclose(squared.value(z, y), [1.125, 8.0])
    np.testing.assert_allclose(
      poisson.value(z, y), np.exp(z) - np.array(y * z), rtol=1e-6
    )
