"""Codes to bit planes and back: checks, then an implementation."""

import jax
import jax.numpy as jnp

from emc2.kernels.bit_planes import reference


def num_words(size: int) -> int:
  """Words of a plane of so many codes."""
  return -(-size // reference.WORD)


def pack(codes: jax.typing.ArrayLike, bits: int) -> jax.Array:
  """Packs codes of a few bits, 32 codes to a word for each bit.

  Args:
    codes: (d,), uint32 or bool, each less than 2^bits; higher bits are lost.
    bits: 1 to 32; static.

  Returns:
    (bits, ceil(d / 32)), uint32: one plane for each bit, the lowest first.

  Raises:
    ValueError: `codes` is no such array, or `bits` out of range.
  """
  codes = jnp.asarray(codes)
  if codes.ndim != 1 or codes.dtype not in (jnp.uint32, jnp.bool_):
    raise ValueError(
      'codes must be a vector of uint32 or bool, got'
      f' {codes.dtype} of shape {codes.shape}.'
    )
  if not 1 <= bits <= reference.WORD:
    raise ValueError(f'bits must lie in [1, 32], got {bits}.')
  return reference.pack(codes.astype(jnp.uint32), bits)


def unpack(words: jax.typing.ArrayLike, size: int) -> jax.Array:
  """Inverts :func:`pack`.

  Args:
    words: (bits, ceil(size / 32)), uint32.
    size: Number of codes; static.

  Returns:
    (size,), uint32.

  Raises:
    ValueError: `words` is no such array.
  """
  words = jnp.asarray(words)
  if words.ndim != 2 or words.dtype != jnp.uint32:
    raise ValueError(
      f'words must be a uint32 matrix, got {words.dtype} of shape'
      f' {words.shape}.'
    )
  if words.shape[1] != num_words(size) or not 1 <= words.shape[0] <= 32:
    raise ValueError(
      f'words must be (1 to 32, {num_words(size)}) for {size} codes, got shape'
      f' {words.shape}.'
    )
  return reference.unpack(words, size)
