"""Codes to bit planes and back, in plain `jax.numpy`.

Word w of a plane holds the codes from 32 w on, the first as its lowest bit.
Both ways are one loop over memory, and one that XLA fuses with what makes the
codes and with what uses them, so that no array of codes need exist.
"""

import jax
import jax.numpy as jnp

WORD = 32


def _places():
  return jnp.arange(WORD, dtype=jnp.uint32)[None, :]


def _join(bits):
  """Words of bits (32 n,), uint32."""
  shifted = bits.reshape(-1, WORD) << _places()
  return jax.lax.reduce_or(shifted, axes=(1,))


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """Packs codes.

  Args:
    codes: (d,), uint32.
    bits: Planes to keep, from the lowest; static.

  Returns:
    (bits, ceil(d / 32)), uint32.
  """
  whole = codes.size - codes.size % WORD
  # Padding the whole would be a pass of its own.
  main = jax.lax.slice(codes, [0], [whole])
  rest = jnp.pad(jax.lax.slice(codes, [whole], [codes.size]), (0, WORD))[:WORD]
  parts = [main, rest] if whole < codes.size else [main]
  one = jnp.uint32(1)
  planes = [
    [_join((part >> jnp.uint32(bit)) & one) for part in parts]
    for bit in range(bits)
  ]
  return jnp.stack([jnp.concatenate(plane) for plane in planes])


def unpack(words: jax.Array, size: int) -> jax.Array:
  """Unpacks codes.

  Args:
    words: (bits, n), uint32.
    size: Number of codes, at most 32 n; static.

  Returns:
    (size,), uint32.
  """
  codes = jnp.zeros((words.shape[1], WORD), jnp.uint32)
  for bit, plane in enumerate(words):
    taken = (plane[:, None] >> _places()) & jnp.uint32(1)
    codes |= taken << jnp.uint32(bit)
  return codes.reshape(-1)[:size]
