"""Tests of the fused step of 8-bit Adam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.compression import blockwise
from emc2.kernels import adam_8bit, lowering
from emc2.kernels.adam_8bit import pallas_tpu, reference, specs


def _scalars(t, dtype=jnp.float32):
  return adam_8bit.Scalars.of(0.9, 0.999, 1e-8, jnp.asarray(t, dtype), dtype)


def _moments(grad, block_size=256):
  start = functools.partial(blockwise.zeros_like, block_size=block_size)
  return start(grad, blockwise.SIGNED), start(grad, blockwise.UNSIGNED)


def _oracle(grad, mu, nu, t):
  """The update, and both moments, from what is decoded."""
  mu = 0.9 * mu + 0.1 * grad
  nu = 0.999 * nu + 0.001 * grad**2
  root = np.sqrt(nu / (1 - 0.999**t))
  return mu / (1 - 0.9**t) / (root + 1e-8), mu, nu


@functools.partial(jax.jit, static_argnames='implementation')
def _step(grad, mu, nu, k, implementation='xla'):
  return adam_8bit.step(grad, mu, nu, k, implementation=implementation)


def _draw(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class ReferenceTest(parameterized.TestCase):
  def test_matches_numpy(self):
    self._check_matches_numpy((5, 7), 16)

  @parameterized.parameters(((6, 64), 32), ((40,), 8))
  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self, shape, block_size):
    self._check_matches_numpy(shape, block_size)

  def _check_matches_numpy(self, shape, block_size):
    mu, nu = _moments(jnp.zeros(shape), block_size)
    for t in range(1, 5):
      grad = _draw(shape, t)
      before = [np.asarray(blockwise.dequantize(x, grad)) for x in (mu, nu)]
      want = _oracle(grad, *before, t)
      update, mu, nu = _step(jnp.asarray(grad), mu, nu, _scalars(t))
      np.testing.assert_allclose(update, want[0], rtol=1e-4, atol=1e-6)
      for got, fresh in zip((mu, nu), want[1:], strict=True):
        coded = blockwise.quantize(
          jnp.asarray(fresh), got.codebook, block_size=block_size
        )
        apart = np.asarray(got.codes, int) - np.asarray(coded.codes, int)
        # An entry half-way between two numbers may go to either.
        self.assertLessEqual(np.abs(apart).max(), 1)
        self.assertLess(np.mean(apart != 0), 0.02)

  def test_first_step_is_that_of_adam(self):
    grad = jnp.asarray(_draw((8, 64)))
    for block_size in (1, 16, 64):
      update, _, _ = _step(grad, *_moments(grad, block_size), _scalars(1))
      zero = jnp.zeros_like(grad)
      want, _, _ = adam_8bit.step_32(grad, zero, zero, _scalars(1))
      np.testing.assert_array_equal(update, want)

  def test_skips_what_is_not_finite(self):
    grad = (
      jnp.ones((2, 32)).at[0, :3].set(jnp.asarray([jnp.nan, jnp.inf, 1e30]))
    )
    update, mu, nu = _step(grad, *_moments(grad, 32), _scalars(1))
    for x in (update, blockwise.dequantize(mu), blockwise.dequantize(nu)):
      np.testing.assert_array_equal(x[0, :3], 0)
      self.assertTrue(np.all(x[0, 3:] > 0))
      self.assertTrue(np.all(x[1] > 0))

  def test_options(self):
    grad = jnp.asarray([[1.0, -1e-9, 1e-5, 0.5]])
    run = lambda **options: jax.jit(
      lambda k: adam_8bit.step(grad, *_moments(grad, 4), k, **options)
    )(_scalars(1))
    _, mu, nu = run()
    self.assertEqual((mu.codes[0, 1], nu.codes[0, 2]), (126, 1))
    _, mu, nu = run(keep_sign=False, floor=False)
    self.assertEqual((mu.codes[0, 1], nu.codes[0, 2]), (127, 0))

  def test_draws(self):
    grad = jnp.asarray(_draw((4, 64)))
    run = jax.jit(
      lambda key: adam_8bit.step(
        grad, *_moments(grad, 64), _scalars(1), key=key
      )
    )
    drawn, other = (run(jax.random.key(seed))[1].codes for seed in range(2))
    self.assertGreater(np.mean(np.asarray(drawn != other)), 0.1)


class KernelsTest(parameterized.TestCase):
  def test_blocked_equals_the_reference(self):
    self._check_blocked_equals_the_reference((300, 333))

  @parameterized.parameters(((300, 256),), ((70_001,),))
  @pytest.mark.slow
  def test_blocked_equals_the_reference_elsewhere(self, shape):
    self._check_blocked_equals_the_reference(shape)

  def _check_blocked_equals_the_reference(self, shape):
    """To the last bit, also where blocks or parts are padded."""
    outputs = []
    for name in ('xla', 'blocked'):
      mu, nu = _moments(jnp.zeros(shape))
      for t in range(1, 3):
        grad = jnp.asarray(_draw(shape, t))
        update, mu, nu = _step(grad, mu, nu, _scalars(t), implementation=name)
      outputs.append((update, mu, nu))
    for want, got in zip(*map(jax.tree.leaves, outputs), strict=True):
      if want.dtype == jnp.uint8:
        self.assertLess(np.mean(np.asarray(got != want)), 1e-4)
      else:
        np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_pallas_tpu_equals_the_reference(self):
    self._check_pallas_tpu_equals_the_reference((128, 512), 256)

  @pytest.mark.slow
  def test_pallas_tpu_equals_the_reference_of_three_axes(self):
    self._check_pallas_tpu_equals_the_reference((2, 128, 1280), 128)

  def _check_pallas_tpu_equals_the_reference(self, shape, width):
    grad = jnp.asarray(_draw(shape))
    mu = blockwise.quantize(grad, block_size=width)
    nu = blockwise.quantize(grad**2, blockwise.UNSIGNED, block_size=width)
    want = _step(grad, mu, nu, _scalars(3))
    coded = reference.Coded(
      blockwise.codes_in_blocks(mu),
      mu.absmax,
      blockwise.codes_in_blocks(nu),
      nu.absmax,
    )
    run = functools.partial(
      pallas_tpu.step, settings=reference.Settings(), interpret=True
    )
    update, got = jax.jit(run)(grad, coded, _scalars(3))
    np.testing.assert_allclose(update, want[0], rtol=1e-4, atol=1e-6)
    for codes, scale, old in zip(got[::2], got[1::2], want[1:], strict=True):
      np.testing.assert_allclose(scale, old.absmax, rtol=1e-6)
      differ = codes.reshape(shape) != old.codes
      self.assertLess(np.mean(np.asarray(differ)), 1e-3)

  @parameterized.parameters(*specs.SPECS)
  def test_lowers_for_a_tpu(self, name):
    args = specs.SPECS[name].args()
    run = lambda grad, mu, nu: adam_8bit.step(
      grad, mu, nu, _scalars(2), implementation='pallas_tpu'
    )
    text = lowering.lower_for(run, *args, platform='tpu').as_text()
    self.assertEqual(text.count('kernel_name = "adam_8bit"'), 1)

  def test_each_name_or_nothing(self):
    grad = jnp.ones((4, 100))
    moments = _moments(grad)
    run = functools.partial(adam_8bit.step, grad, *moments, _scalars(1))
    with self.assertRaisesRegex(NotImplementedError, 'at least'):
      run(implementation='blocked')
    with self.assertRaisesRegex(NotImplementedError, 'multiple of 128'):
      run(implementation='pallas_tpu')
    with self.assertRaisesRegex(NotImplementedError, 'want no key'):
      run(implementation='blocked', key=jax.random.key(0))
    with self.assertRaisesRegex(ValueError, "implementation='rows'"):
      run(implementation='rows')
