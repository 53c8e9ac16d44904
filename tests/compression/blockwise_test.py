"""Tests of arrays in blocks of 8-bit codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.compression import blockwise

SYMMETRIC = blockwise.Codebook(symmetric=True)
LINEAR = blockwise.Codebook('linear')
LINEAR_UNSIGNED = blockwise.Codebook('linear', signed=False)
TABLE = blockwise.Codebook('table', numbers=(-1.0, -0.3, 0.0, 0.2, 1.0))
BOOKS = (
  blockwise.SIGNED,
  blockwise.UNSIGNED,
  SYMMETRIC,
  LINEAR,
  LINEAR_UNSIGNED,
  TABLE,
)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(x, book, block_size=256, keep_sign=False):
  return blockwise.quantize(x, book, block_size=block_size, keep_sign=keep_sign)


def _round(x, book=blockwise.SIGNED, block_size=256):
  coded = _quantize(x, book, block_size)
  return jax.jit(blockwise.dequantize)(coded, x)


def _entries(signed):
  """Of all decades, and some special ones."""
  rng = np.random.default_rng(0)
  sizes = [rng.uniform(0, 1, 20_000), 10 ** rng.uniform(-8, 0, 20_000), [0, 1]]
  y = np.concatenate(sizes).astype(np.float32)
  return y * rng.choice([-1, 1], y.size).astype(np.float32) if signed else y


class TableTest(parameterized.TestCase):
  """The numbers are those that the paper's code makes."""

  def test_signed(self):
    table = blockwise.SIGNED.table
    self.assertEqual((table.dtype, table.shape), (np.float32, (256,)))
    self.assertTrue(np.all(np.diff(table) > 0))
    some = {0: -0.99296874, 1: -0.9789063, 126: -5.5e-7, 127: 0, 128: 5.5e-7}
    some |= {129: 3.25e-6, 254: 0.99296874, 255: 1}
    for code, value in some.items():
      np.testing.assert_allclose(table[code], value, rtol=1e-6)
    np.testing.assert_allclose(table.sum(dtype=np.float64), 1, rtol=1e-6)
    np.testing.assert_array_equal(table[126::-1], -table[128:255])
    self.assertEqual(blockwise.SIGNED.zero, 127)

  def test_unsigned(self):
    table = blockwise.UNSIGNED.table
    self.assertLen(np.unique(table), 256)
    first = [0, 3.25e-7, 7.75e-7, 2.125e-6, 4.375e-6]
    np.testing.assert_allclose(table[:5], first, rtol=1e-6)
    np.testing.assert_allclose(table[254:], [0.9964844, 1], rtol=1e-6)
    np.testing.assert_allclose(table.sum(dtype=np.float64), 75.10526, rtol=1e-6)
    self.assertEqual(blockwise.UNSIGNED.zero, 0)

  def test_decades(self):
    for book, most in ((blockwise.SIGNED, 64), (blockwise.UNSIGNED, 128)):
      table = book.table[(book.table > 0) & (book.table < 1)]
      counts = np.bincount(-np.floor(np.log10(table)).astype(int) - 1)
      np.testing.assert_array_equal(counts, [most >> k for k in range(7)])

  @parameterized.parameters(
    (8, 7, 256, 256), (8, 4, 256, 249), (5, 2, 32, 29), (4, 3, 16, 16)
  )
  def test_bits(self, total, exponent, *sizes):
    for signed, size in zip((True, False), sizes, strict=True):
      table = blockwise.dynamic_table(
        signed=signed, total_bits=total, exponent_bits=exponent
      )
      self.assertLen(np.unique(table), size)
      self.assertIn(0, table)
      self.assertEqual(table[-1], 1)


class CodebookTest(parameterized.TestCase):
  @parameterized.parameters(*BOOKS)
  def test_decodes_the_table(self, book):
    codes = jnp.arange(book.table.size, dtype=jnp.uint8)
    np.testing.assert_allclose(book.decode(codes), book.table, rtol=1e-6)
    with jax.enable_x64(True):
      wide = book.decode(codes, jnp.float64)
      self.assertEqual(wide.dtype, jnp.float64)
      np.testing.assert_allclose(wide, book.table, rtol=1e-6)

  @parameterized.product(book=BOOKS, dtype=(jnp.float32, jnp.float64))
  def test_encodes_to_the_nearest(self, book, dtype):
    """As a search among the middles does, but for what lies on one."""
    with jax.enable_x64(dtype == jnp.float64):
      y = _entries(book.signed)
      table = book.table.astype(np.float64)
      middles = (table[:-1] + table[1:]) / 2
      want = np.searchsorted(middles, y.astype(np.float64))
      got = np.asarray(jax.jit(book.encode)(jnp.asarray(y, dtype)))
      self.assertEqual(got.dtype, np.uint8)
      for i in np.flatnonzero(got != want):
        near = np.abs(middles - y[i]) <= 1e-6 * np.abs(middles)
        self.assertTrue(near.any(), msg=f'{y[i]}: {got[i]}, not {want[i]}')

  @parameterized.parameters(*BOOKS)
  def test_keeps_the_numbers(self, book):
    np.testing.assert_array_equal(
      book.encode(jnp.asarray(book.table)), np.arange(book.table.size)
    )

  def test_keeps_signs(self):
    y = jnp.array([-1e-9, 0.0, 1e-9, -1.0])
    encode = lambda book, keep: book.encode(y, keep_sign=keep).tolist()
    self.assertEqual(encode(blockwise.SIGNED, False), [127, 127, 127, 0])
    self.assertEqual(encode(blockwise.SIGNED, True), [126, 127, 127, 0])
    self.assertEqual(encode(blockwise.UNSIGNED, False)[:3], [0, 0, 0])
    self.assertEqual(encode(blockwise.UNSIGNED, True)[:3], [0, 0, 1])

  @parameterized.parameters(
    (blockwise.SIGNED, 0.00703126, [0.062, 0.110, 0.180, 0.276, 0.466, 0.711]),
    (blockwise.UNSIGNED, 0.003516, [0.033, 0.062, 0.110, 0.180, 0.276, 0.466]),
  )
  @pytest.mark.slow
  def test_error_bounds(self, book, most, by_decade):
    y = np.geomspace(1e-6, 1, 40_001).astype(np.float32)
    error = np.abs(book.decode(book.encode(jnp.asarray(y))) - y)
    self.assertLessEqual(error.max(), most)
    for k, bound in enumerate(by_decade):
      inside = (y >= 10.0 ** (-k - 1)) & (y < 10.0**-k)
      worst = (error[inside] / y[inside]).max()
      np.testing.assert_allclose(worst, bound, rtol=0.03)
    if book.signed:
      np.testing.assert_allclose(
        1 + book.decode(book.encode(jnp.array([-1.0]))), 0.00703126, rtol=1e-4
      )

  @parameterized.parameters(
    ({'kind': 'tree'}, 'kind must be one of'),
    ({'kind': 'table'}, 'numbers must be given'),
    ({'kind': 'table', 'numbers': (0.5, 1.0)}, 'with 0'),
    ({'kind': 'table', 'numbers': (0.0, 1.0)}, 'signed must say'),
    ({'kind': 'linear', 'symmetric': True}, 'symmetric must go'),
  )
  def test_refuses(self, options, words):
    with self.assertRaisesRegex(ValueError, words):
      blockwise.Codebook(**options)


class QuantizeTest(parameterized.TestCase):
  @parameterized.parameters(*BOOKS)
  def test_fixed_points(self, book):
    """What has been coded is coded again to the same, if a block has 1."""
    codes = np.random.default_rng(1).integers(0, book.table.size, (8, 64))
    codes[:, 3] = book.table.size - 1
    codes[-1] = book.zero
    scale = jnp.asarray([0.1, 1, 2, 3, 1e-20, 1e20, 7, 0], jnp.float32)[:, None]
    start = blockwise.Quantized(jnp.asarray(codes, jnp.uint8), scale, book)
    again = _quantize(blockwise.dequantize(start), book, 64)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_allclose(again.absmax, scale, rtol=1e-6)
    np.testing.assert_array_equal(blockwise.dequantize(again)[-1], 0)

  def test_positive_extremes_are_exact(self):
    x = jnp.asarray([[0.3, -0.2], [7.7, 1.0]], jnp.float32)
    np.testing.assert_array_equal(_round(x, block_size=2)[:, 0], x[:, 0])

  def test_negative_extremes_shrink(self):
    x = jnp.asarray([-1.0, 0.5, 0.25, 0.0])
    shrunk = jax.lax.fori_loop(0, 100, lambda _, x: _round(x, block_size=4), x)
    np.testing.assert_allclose(shrunk[0], -0.493807, rtol=1e-4)
    kept = jax.lax.fori_loop(
      0, 100, lambda _, x: _round(x, SYMMETRIC, block_size=4), x
    )
    self.assertEqual(kept[0], -1)

  @parameterized.parameters((256, 0.01083, 0.0070), (2048, 0.01246, 0.0083))
  def test_gaussian_error(self, block_size, dynamic, linear):
    x = jnp.asarray(np.random.default_rng(2).normal(size=2**18), jnp.float32)
    for book, want in ((blockwise.SIGNED, dynamic), (LINEAR, linear)):
      error = jnp.linalg.norm(_round(x, book, block_size) - x)
      np.testing.assert_allclose(error / jnp.linalg.norm(x), want, rtol=0.05)

  def test_outliers(self):
    x = np.random.default_rng(3).normal(size=2**20).astype(np.float32)
    x[:: 2**16] *= 100
    want = {
      (blockwise.SIGNED, 256): 0.0086,
      (blockwise.SIGNED, 2048): 0.0101,
      (LINEAR, 256): 0.0065,
      (LINEAR, 2048): 0.0108,
    }
    for (book, block_size), value in want.items():
      error = np.abs(_round(jnp.asarray(x), book, block_size) - x).mean()
      np.testing.assert_allclose(error, value, rtol=0.1)

  def test_scale_and_permutation(self):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 64)), jnp.float32)
    coded = _quantize(x, blockwise.SIGNED, 64)
    scaled = _quantize(0.125 * x, blockwise.SIGNED, 64)
    np.testing.assert_array_equal(scaled.codes, coded.codes)
    turned = _quantize(x[::-1], blockwise.SIGNED, 64)
    np.testing.assert_array_equal(turned.codes, coded.codes[::-1])

  @parameterized.parameters(
    ((6, 8), 4, (6, 8), (6, 2)),
    ((6, 5), 4, (8, 4), (8,)),
    ((3,), 4, (1, 4), (1,)),
    ((), 4, (1, 4), (1,)),
    ((2, 3, 8), 8, (2, 3, 8), (2, 3, 1)),
  )
  @pytest.mark.slow
  def test_layout(self, shape, block_size, codes, scales):
    x = jnp.asarray(np.random.default_rng(5).normal(size=shape), jnp.bfloat16)
    coded = _quantize(x, blockwise.SIGNED, block_size)
    self.assertEqual((coded.codes.shape, coded.absmax.shape), (codes, scales))
    self.assertEqual(coded.block_size, block_size)
    zeros = blockwise.zeros_like(x, block_size=block_size)
    self.assertEqual(
      jax.tree.map(jax.typeof, zeros), jax.tree.map(jax.typeof, coded)
    )
    back = blockwise.dequantize(coded, x)
    self.assertEqual((back.shape, back.dtype), (shape, x.dtype))
    flat = np.asarray(x, np.float32).ravel()
    padded = np.zeros(-(-flat.size // block_size) * block_size, np.float32)
    padded[: flat.size] = flat
    want = np.abs(padded.reshape(-1, block_size)).max(axis=1)
    np.testing.assert_array_equal(coded.absmax.reshape(-1), want)
    np.testing.assert_array_equal(blockwise.dequantize(zeros, x), 0)

  def test_block_size_one_is_exact(self):
    x = jnp.asarray(np.random.default_rng(6).uniform(0, 1, 50), jnp.float32)
    np.testing.assert_array_equal(_round(x, blockwise.UNSIGNED, 1), x)

  @parameterized.parameters(blockwise.UNSIGNED, SYMMETRIC, LINEAR)
  @pytest.mark.slow
  def test_stochastic_rounding_has_no_bias(self, book):
    x = jnp.asarray([1.0, 0.5, 0.1, 0.01234, 3e-5, -0.999 * book.signed])
    run = lambda key: blockwise.dequantize(
      blockwise.quantize(
        x,
        book,
        block_size=2,
        rounding='stochastic',
        keep_sign=False,
        key=key,
      )
    )
    draws = jax.vmap(run)(jax.random.split(jax.random.key(0), 4000))
    error = draws.std(axis=0) / 4000**0.5
    gap = np.abs(draws.mean(axis=0) - x)
    self.assertTrue(np.all(gap <= 4 * error + 1e-6 * np.abs(x)), msg=gap)
    # Two numbers for an entry, and the nearest is one of them.
    for column in np.asarray(draws).T:
      self.assertLessEqual(len(np.unique(column)), 2)

  def test_unusual_blocks(self):
    x = jnp.asarray([[jnp.nan, 1], [1e-39, 0], [2e38, -2e38]], jnp.float32)
    got = _round(x, block_size=2)
    self.assertTrue(np.all(np.isnan(got[0])))
    np.testing.assert_array_equal(got[1], 0)
    np.testing.assert_allclose(got[2], x[2], rtol=0.01)

  @parameterized.parameters(
    ({'block_size': 0}, 'block_size must be an int in'),
    ({'block_size': 4097}, 'block_size must be an int in'),
    ({'rounding': 'up'}, 'rounding must be one of'),
    ({'rounding': 'stochastic'}, 'key must be given'),
  )
  def test_refuses(self, options, words):
    with self.assertRaisesRegex(ValueError, words):
      blockwise.quantize(jnp.ones(4), **options)

  def test_refuses_integers(self):
    with self.assertRaisesRegex(ValueError, 'real floats, got int32'):
      blockwise.quantize(jnp.ones(4, jnp.int32))
