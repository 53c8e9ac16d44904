"""Packed codes: the layout bit by bit, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from emc2.kernels import bit_planes


def _codes(size, bits):
  rng = np.random.default_rng(size + bits)
  return rng.integers(0, 2**bits, size, dtype=np.uint64).astype(np.uint32)


def _oracle(codes, bits):
  words = np.zeros((bits, -(-codes.size // 32)), np.uint32)
  for bit in range(bits):
    for i, code in enumerate(codes):
      words[bit, i // 32] |= np.uint32((int(code) >> bit & 1) << i % 32)
  return words


class BitPlanesTest(parameterized.TestCase):
  @parameterized.product(size=(1, 31, 32, 33, 64, 1000), bits=(3,))
  def test_equals_a_loop_and_comes_back(self, size, bits):
    self._check_equals_a_loop_and_comes_back(size, bits)

  @parameterized.product(size=(1, 31, 32, 33, 64, 1000), bits=(1, 32))
  @pytest.mark.slow
  def test_equals_a_loop_and_comes_back_elsewhere(self, size, bits):
    self._check_equals_a_loop_and_comes_back(size, bits)

  def _check_equals_a_loop_and_comes_back(self, size, bits):
    codes = _codes(size, bits)
    words = jax.jit(bit_planes.pack, static_argnums=1)(codes, bits)
    self.assertEqual(words.dtype, jnp.uint32)
    self.assertEqual(words.shape, (bits, bit_planes.num_words(size)))
    np.testing.assert_array_equal(words, _oracle(codes, bits))
    back = jax.jit(bit_planes.unpack, static_argnums=1)(words, size)
    np.testing.assert_array_equal(back, codes)

  def test_flags_are_codes_of_one_bit(self):
    flags = _codes(100, 1) > 0
    words = bit_planes.pack(flags, 1)
    np.testing.assert_array_equal(words, _oracle(flags.astype(np.uint32), 1))

  def test_higher_bits_are_lost(self):
    words = bit_planes.pack(_codes(100, 8), 3)
    back = bit_planes.unpack(words, 100)
    np.testing.assert_array_equal(back, _codes(100, 8) % 8)

  @pytest.mark.slow
  def test_under_vmap(self):
    codes = np.stack([_codes(70, 4), _codes(70, 3)])
    words = jax.vmap(lambda c: bit_planes.pack(c, 4))(codes)
    back = jax.vmap(lambda w: bit_planes.unpack(w, 70))(words)
    np.testing.assert_array_equal(back, codes)

  def test_no_array_of_codes_is_kept(self):
    def send(x):
      words = bit_planes.pack(x < 0, 1)
      return jnp.where(bit_planes.unpack(words, x.size) > 0, -1.0, 1.0)

    spec = jax.ShapeDtypeStruct((1 << 20,), jnp.float32)
    memory = jax.jit(send).lower(spec).compile().memory_analysis()
    # The words, and what aligns them.
    self.assertLess(memory.temp_size_in_bytes, (1 << 20) / 8 + 4096)

  def test_rejects_what_it_does_not_take(self):
    with self.assertRaisesRegex(ValueError, 'codes must be a vector'):
      bit_planes.pack(jnp.zeros((3, 3), jnp.uint32), 1)
    with self.assertRaisesRegex(ValueError, 'codes must be a vector'):
      bit_planes.pack(jnp.zeros(3, jnp.int32), 1)
    for bits in (0, 33):
      with self.assertRaisesRegex(ValueError, r'bits must lie in \[1, 32\]'):
        bit_planes.pack(jnp.zeros(3, jnp.uint32), bits)
    with self.assertRaisesRegex(ValueError, 'words must be a uint32 matrix'):
      bit_planes.unpack(jnp.zeros(3, jnp.uint32), 3)
    with self.assertRaisesRegex(ValueError, '2\\) for 33 codes'):
      bit_planes.unpack(jnp.zeros((1, 3), jnp.uint32), 33)


if __name__ == '__main__':
  absltest.main()
