"""Layers against loops, and their initial values against PyTorch's rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from emc2.experiments.models import layers


def _convolve(images, kernel, stride, padding):
  """Four loops, in float64."""
  n, height, width, _ = images.shape
  size, _, _, outputs = kernel.shape
  padded = np.zeros(
    (n, height + 2 * padding, width + 2 * padding, images.shape[3])
  )
  padded[:, padding : padding + height, padding : padding + width] = images
  out_height = (height + 2 * padding - size) // stride + 1
  out_width = (width + 2 * padding - size) // stride + 1
  out = np.zeros((n, out_height, out_width, outputs))
  for p in range(out_height):
    for q in range(out_width):
      for i in range(size):
        for j in range(size):
          pixel = padded[:, p * stride + i, q * stride + j]
          out[:, p, q] += pixel @ kernel[i, j].astype(np.float64)
  return out


def _random(*shape, seed=0):
  values = np.random.default_rng(seed).normal(size=shape)
  return values.astype(np.float32)


class ConvolveTest(parameterized.TestCase):
  @parameterized.product(
    case=((3, 2, 1), (1, 2, 0)), implementation=('auto', 'xla', 'patches')
  )
  def test_equals_a_loop(self, case, implementation):
    self._check_equals_a_loop(case, implementation)

  @parameterized.product(
    case=((3, 1, 1), (7, 2, 3), (1, 1, 0)),
    implementation=('auto', 'xla', 'patches'),
  )
  @pytest.mark.slow
  def test_equals_a_loop_elsewhere(self, case, implementation):
    self._check_equals_a_loop(case, implementation)

  def _check_equals_a_loop(self, case, implementation):
    size, stride, padding = case
    images, kernel = _random(2, 9, 8, 3), _random(size, size, 3, 4, seed=1)
    got = layers.convolve(
      jnp.asarray(images),
      jnp.asarray(kernel),
      stride=stride,
      padding=padding,
      implementation=implementation,
    )
    want = _convolve(images, kernel, stride, padding)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)

  @parameterized.product(
    case=((3, 1, 1), (3, 2, 1), (1, 2, 0)), mapped=(False, True)
  )
  @pytest.mark.slow
  def test_derivative_equals_that_of_xla(self, case, mapped):
    size, stride, padding = case
    images = jnp.asarray(_random(2, 6, 5, 3))
    kernel = jnp.asarray(_random(2, size, size, 3, 4, seed=1))

    def gradient(implementation):
      def loss(images, kernel):
        out = layers.convolve(
          images,
          kernel,
          stride=stride,
          padding=padding,
          implementation=implementation,
        )
        return jnp.sum(jnp.sin(out))

      grad = jax.grad(loss, argnums=(0, 1))
      if mapped:
        return jax.jit(jax.vmap(grad, (None, 0)))(images, kernel)
      return jax.jit(grad)(images, kernel[0])

    want = gradient('xla')
    for implementation in ('auto', 'patches'):
      got = gradient(implementation)
      for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)

  def test_forward_derivative_and_curvature(self):
    images, kernel = jnp.asarray(_random(1, 4, 4, 2)), _random(3, 3, 2, 2)

    def loss(kernel, implementation):
      out = layers.convolve(
        images, kernel, padding=1, implementation=implementation
      )
      return jnp.sum(out**3)

    @functools.partial(jax.jit, static_argnums=0)
    def curve(implementation):
      grad_fn = lambda k: jax.grad(loss)(k, implementation)
      kernels = (jnp.asarray(kernel),)
      return jax.jvp(grad_fn, kernels, (jnp.ones_like(kernel),))[1]

    want = curve('xla')
    np.testing.assert_allclose(curve('auto'), want, rtol=1e-4, atol=1e-3)

  @parameterized.parameters(('cpu', False), ('cuda', True), ('tpu', True))
  def test_auto_chooses_for_the_platform(self, platform, convolves):
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)

    def lower(implementation):
      def loss(images, kernel):
        out = layers.convolve(
          images, kernel, padding=1, implementation=implementation
        )
        return jnp.sum(out * out)

      traced = jax.jit(jax.grad(loss, argnums=1)).trace(images, kernel)
      return traced.lower(lowering_platforms=(platform,)).as_text()

    self.assertEqual('stablehlo.convolution' in lower('auto'), convolves)
    self.assertIn('stablehlo.convolution', lower('xla'))
    self.assertNotIn('stablehlo.convolution', lower('patches'))

  def test_refuses_an_unknown_implementation(self):
    ones = jnp.ones((1, 1, 1, 1))
    with self.assertRaisesRegex(ValueError, "implementation.*'pathces'"):
      layers.convolve(ones, ones, implementation='pathces')


class PoolTest(parameterized.TestCase):
  @parameterized.parameters(6, 7)
  def test_equals_a_loop(self, size):
    images = _random(2, size, size, 3) - 5  # Below the padding, were it 0.
    padded = np.full((2, size + 2, size + 2, 3), -np.inf)
    padded[:, 1:-1, 1:-1] = images
    out = -(-size // 2)
    want = np.zeros((2, out, out, 3))
    for p in range(out):
      for q in range(out):
        window = padded[:, 2 * p : 2 * p + 3, 2 * q : 2 * q + 3]
        want[:, p, q] = window.max((1, 2))
    got = layers.max_pool(jnp.asarray(images))
    np.testing.assert_array_equal(got, want.astype(np.float32))


class UnitRowsTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_norms(self, dtype):
    rows = jnp.asarray(_random(5, 7), dtype)
    got = layers.unit_rows(rows)
    self.assertEqual(got.dtype, jnp.float32)
    rows = np.asarray(rows, np.float64)
    want = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)

  def test_floor(self):
    rows = jnp.array([[0.0, 0.0], [3e-13, 4e-13], [3e-6, 4e-6]])
    want = [[0.0, 0.0], [0.3, 0.4], [0.6, 0.8]]
    np.testing.assert_allclose(layers.unit_rows(rows), want, rtol=1e-5)

  def test_derivative_at_zero_is_finite(self):
    grad = jax.grad(lambda z: jnp.sum(layers.unit_rows(z)))(jnp.zeros((2, 3)))
    self.assertTrue(jnp.all(jnp.isfinite(grad)))


class InitialValuesTest(parameterized.TestCase):
  def test_linear_is_uniform_by_fan_in(self):
    layer = layers.linear(400, 300, rngs=nnx.Rngs(0))
    for values in (layer.kernel[...], layer.bias[...]):
      self.assertLessEqual(float(jnp.max(jnp.abs(values))), 0.05)
      self.assertGreater(float(jnp.max(values)), 0.0495)
      self.assertLess(float(jnp.min(values)), -0.0495)
    deviation = float(jnp.std(layer.kernel[...]))
    self.assertAlmostEqual(deviation, 0.05 / np.sqrt(3), delta=3e-4)

  def test_convolution_is_normal_by_fan_out(self):
    layer = layers.Conv(64, 32, size=3, rngs=nnx.Rngs(0))
    want = np.sqrt(2 / (32 * 9))
    deviation = float(jnp.std(layer.kernel[...]))
    self.assertAlmostEqual(deviation, want, delta=0.02 * want)
    # Not truncated, as some libraries have it.
    self.assertGreater(float(jnp.max(jnp.abs(layer.kernel[...]))), 3 * want)

  def test_convolution_has_no_bias(self):
    layer = layers.Conv(3, 4, size=3, padding=1, rngs=nnx.Rngs(0))
    self.assertLen(jax.tree.leaves(nnx.state(layer)), 1)
    np.testing.assert_array_equal(layer(jnp.zeros((1, 5, 5, 3))), 0)


class NormTest(parameterized.TestCase):
  def test_none_is_the_identity(self):
    norm = layers.make_norm('none', 5, rngs=nnx.Rngs(0))
    images = jnp.asarray(_random(2, 3, 3, 5))
    self.assertIs(norm(images), images)

  def test_group_equals_a_loop(self):
    images = _random(2, 3, 3, 64) * 3 + 10
    norm = layers.make_norm('group', 64, rngs=nnx.Rngs(0))
    groups = images.astype(np.float64).reshape(2, 9, 32, 2)
    mean = groups.mean((1, 3), keepdims=True)
    variance = groups.var((1, 3), keepdims=True)
    want = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(images.shape)
    np.testing.assert_allclose(norm(images), want, rtol=1e-4, atol=1e-5)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, "norm.*'batch'"):
      layers.make_norm('batch', 64, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(NotImplementedError, '32 groups.*48'):
      layers.make_norm('group', 48, rngs=nnx.Rngs(0))
