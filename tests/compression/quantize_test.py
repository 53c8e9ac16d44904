"""Levels are whole, their mean is the entry, and their error that of theory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh
from emc2.compression import compressor, quantize


@functools.cache
def _program(code):
  def run(x, key):
    of_state, of_code = jax.random.split(key)
    state = code.init(x.shape, x.dtype, of_state)
    payload, state = code.compress(state, x, of_code)
    return code.decompress(state, payload, jax.ShapeDtypeStruct.like(x))

  return jax.jit(run)


def _ends_in(code, x, seed=0):
  """What an array is after it has been sent."""
  return _program(code)(jnp.asarray(x), jax.random.key(seed))


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class QsgdTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 24.4, 31.6), (16, 0.648, 1.98), (256, 2.5e-3, 0.0153)
  )
  def test_levels_and_variance(self, levels, want, bound):
    x = _normal(1000)
    norm = np.sqrt(np.sum(np.square(x, dtype=np.float64)))
    code = quantize.qsgd(levels)
    found = np.asarray(_ends_in(code, x), np.float64)
    counts = found * levels / norm
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    self.assertLessEqual(np.max(np.abs(counts)), levels + 1e-3)
    np.testing.assert_array_less(0, found * x + 1e-12)
    # Exact: an entry between two levels has the variance of a coin.
    part = np.modf(levels * np.abs(x) / norm)[0]
    variance = np.sum(part * (1 - part)) / levels**2
    self.assertAlmostEqual(variance / want, 1, delta=0.1)
    self.assertAlmostEqual(
      np.sum((found - x) ** 2) / norm**2, variance, delta=0.25 * variance
    )
    self.assertAlmostEqual(
      code.omega((1000,)), min(1000 / levels**2, math.sqrt(1000) / levels)
    )
    self.assertAlmostEqual(code.omega((1000,)) / bound, 1, delta=0.01)

  def test_levels_stay(self):
    # Of norm 5: 3 and 4 are levels 3 and 4 of 5, and no draw moves them.
    x = np.array([3, 0, -4], np.float32)
    code = quantize.qsgd(5)
    for seed in range(20):
      np.testing.assert_allclose(_ends_in(code, x, seed), x, rtol=1e-6)

  def test_one_level_is_the_norm(self):
    with jax.enable_x64(True):
      x = np.random.default_rng(0).normal(size=100)
      found = np.unique(np.abs(_ends_in(quantize.qsgd(1), x)))
      np.testing.assert_allclose(found, [0, np.linalg.norm(x)], rtol=1e-14)

  @parameterized.parameters(1e-30, 1e30)
  def test_norm_of_any_size(self, scale):
    x = _normal(50) * np.float32(scale)
    want = np.linalg.norm(x.astype(np.float64))
    np.testing.assert_allclose(quantize.norm(jnp.asarray(x)), want, rtol=1e-5)

  @parameterized.parameters('min', 'k_over_s2')
  @pytest.mark.slow
  def test_scaled(self, rule):
    # s < sqrt(d) tells the two rules apart.
    x, beta = _normal(400), {'min': 5.0, 'k_over_s2': 25.0}[rule]
    code = quantize.qsgd(4, scaled=True, beta_rule=rule)
    want = np.asarray(_ends_in(quantize.qsgd(4), x)) / (1 + beta)
    np.testing.assert_allclose(_ends_in(code, x), want, rtol=1e-6)
    self.assertAlmostEqual(code.delta((400,)), 1 / (1 + beta))
    self.assertFalse(code.unbiased)

  def test_shared_norm(self):
    rows = _normal(4, 33) * np.array([[1], [2], [0], [5]], np.float32)
    code = quantize.qsgd(7, shared_norm=True, num_workers=5)
    self.assertEqual(code.bits((33,)), 33 * (1 + 6) + 32)
    self.assertEqual(compressor.wire_bits(code, (33,)), 33 * 8 + 32)

    def run(rows):
      key = jax.random.key(0)
      reduced = compressor.reduce(code, [()], [rows[0]], [key], mesh.DATA)
      return reduced.sent[0][None], reduced.mean[0]

    split = jax.P(mesh.DATA)
    program = jax.jit(
      jax.shard_map(
        run,
        mesh=mesh.make(jax.devices()[:4], data=4),
        in_specs=split,
        out_specs=(split, jax.P()),
      )
    )
    sent, mean = program(rows)
    np.testing.assert_allclose(np.mean(sent, axis=0), mean, atol=1e-6)
    norm = np.max(np.linalg.norm(rows, axis=1))
    counts = np.asarray(sent) * 7 / norm
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    # Each is one of the two levels of its entry.
    self.assertLess(np.max(np.abs(counts - rows * 7 / norm)), 1)
    self.assertIn('all_reduce', program.lower(rows).as_text())
    self.assertRegex(program.lower(rows).as_text(), r'tensor<33xi8>')

  def test_shared_norm_alone(self):
    x, code = _normal(33), quantize.qsgd(7, shared_norm=True, num_workers=1)
    reduced = compressor.reduce(
      code, [()], [jnp.asarray(x)], [jax.random.key(0)]
    )
    counts = np.asarray(reduced.mean[0]) * 7 / np.linalg.norm(x)
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)

  @parameterized.parameters(
    ({'levels': 0}, r'levels must be in \[1, 8388608\], got 0'),
    ({'levels': 1, 'beta_rule': 'max'}, 'beta_rule must be one of'),
    ({'levels': 1, 'shared_norm': True}, 'num_workers must be given'),
    ({'levels': 1, 'num_workers': 2}, 'num_workers must be given'),
    (
      {'levels': 1, 'shared_norm': True, 'num_workers': 2, 'scaled': True},
      'scaled must be False',
    ),
    (
      {'levels': 1 << 20, 'shared_norm': True, 'num_workers': 1 << 12},
      'sums must stay below',
    ),
  )
  def test_refuses(self, asked, message):
    with self.assertRaisesRegex(ValueError, message):
      quantize.qsgd(**asked)


class KLevelTest(parameterized.TestCase):
  def test_steps(self):
    x = _normal(200)
    found = np.asarray(_ends_in(quantize.k_level(5), x))
    width = (x.max() - x.min()) / 5
    steps = (found - x.min()) / width
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    self.assertLess(np.max(np.abs(found - x)), width * 1.0001)
    self.assertEqual(found[np.argmax(x)], x.max())
    self.assertEqual(found[np.argmin(x)], x.min())
    self.assertGreater(len(np.unique(np.round(steps))), 4)

  def test_constant(self):
    x = np.full(5, 0.1, np.float32)
    np.testing.assert_allclose(_ends_in(quantize.k_level(3), x), x, rtol=1e-6)

  def test_refuses(self):
    for make in (quantize.k_level, quantize.rotated):
      with self.assertRaisesRegex(ValueError, 'levels must be in'):
        make(0)


class RotatedTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 16, 32, 512)
  def test_hadamard(self, size):
    with jax.enable_x64(True):
      matrix = np.ones((1, 1))
      while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
      x = np.random.default_rng(0).normal(size=size)
      transform = jax.jit(quantize.hadamard)
      found = transform(jnp.asarray(x))
      want = matrix @ x / math.sqrt(size)
      np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
      np.testing.assert_allclose(transform(found), x, atol=1e-12)

  def test_evens_out_a_spike(self):
    x = 0.1 * _normal(500)
    x[7] = 10
    lost = lambda code: np.sum((np.asarray(_ends_in(code, x)) - x) ** 2)
    rotated = lost(quantize.rotated(15))
    self.assertLess(rotated, 0.2 * lost(quantize.k_level(15)))

  def test_each_time_another_rotation(self):
    code, x = quantize.rotated(3), jnp.asarray(_normal(40))
    state = code.init(x.shape, x.dtype, jax.random.key(0))
    self.assertEqual((state.shape, state.dtype), ((), jnp.uint32))
    compress = jax.jit(code.compress)
    first, after = compress(state, x, jax.random.key(1))
    second, last = compress(after, x, jax.random.key(1))
    self.assertNotEqual(float(first.least), float(second.least))
    self.assertLen({int(state), int(after), int(last)}, 3)


class CastTest(parameterized.TestCase):
  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_nearest(self, dtype):
    x = _normal(300)
    want = x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(_ends_in(quantize.cast(dtype), x), want)

  def test_beyond_the_range(self):
    x = np.array([1e6, -1e6, np.inf, np.nan], np.float32)
    found = _ends_in(quantize.cast(jnp.float16), x)
    np.testing.assert_array_equal(found, [65504, -65504, np.inf, np.nan])

  @parameterized.parameters(jnp.float32, jnp.int8)
  def test_refuses(self, dtype):
    with self.assertRaisesRegex(ValueError, 'dtype must be a float of at most'):
      quantize.cast(dtype)


class Blocks8BitTest(parameterized.TestCase):
  def test_gaussian(self):
    x = _normal(256 * 40)
    found = np.asarray(_ends_in(quantize.blocks_8bit(), x))
    lost = np.sum((found - x) ** 2) / np.sum(x**2)
    self.assertAlmostEqual(lost, 1.2e-4, delta=2e-5)

  @parameterized.parameters((3, 100), (300,), (4, 64))
  def test_largest_of_a_block_stays(self, *shape):
    x = _normal(*shape)
    code = quantize.blocks_8bit(64)
    found = np.asarray(_ends_in(code, x)).reshape(-1)
    for start in range(0, x.size, 64):
      block = x.reshape(-1)[start : start + 64]
      top = np.argmax(np.abs(block))
      np.testing.assert_allclose(found[start + top], block[top], rtol=1e-6)
    self.assertEqual(compressor.wire_bits(code, shape), code.bits(shape))

  def test_rounds_at_random_if_asked(self):
    x = _normal(500)
    code = quantize.blocks_8bit(rounding='stochastic')
    draws = [np.asarray(_ends_in(code, x, seed)) for seed in (1, 2)]
    self.assertFalse(np.array_equal(*draws))
    code = quantize.blocks_8bit()
    fixed = [_ends_in(code, x, seed) for seed in (1, 2)]
    np.testing.assert_array_equal(*fixed)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'block_size must be an int in'):
      quantize.blocks_8bit(0)
    with self.assertRaisesRegex(ValueError, 'rounding must be one of'):
      quantize.blocks_8bit(rounding='up')
