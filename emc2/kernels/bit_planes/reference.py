"""Codes to bit planes and back, in plain `jax.numpy`.

A plane of nw words holds the code at i nw + w as bit i of word w: entries that
a vector unit loads side by side go into words that lie side by side.
"""

import jax
import jax.numpy as jnp

WORD = 32


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """Packs codes.

  Args:
    codes: (d,), uint32.
    bits: Planes to keep, from the lowest; static.

  Returns:
    (bits, ceil(d / 32)), uint32.
  """
  nw = -(-codes.size // WORD)
  rows = jnp.pad(codes, (0, WORD * nw - codes.size)).reshape(WORD, nw)
  one = jnp.uint32(1)
  planes = []
  for bit in range(bits):
    taken = [
      ((rows[i] >> jnp.uint32(bit)) & one) << jnp.uint32(i) for i in range(WORD)
    ]
    word = taken[0]
    for part in taken[1:]:
      word = word | part
    planes.append(word)
  return jnp.stack(planes)


def unpack(words: jax.Array, size: int) -> jax.Array:
  """Unpacks codes.

  Args:
    words: (bits, nw), uint32.
    size: Number of codes, at most 32 nw; static.

  Returns:
    (size,), uint32.
  """
  bits, nw = words.shape
  shift = jnp.arange(WORD, dtype=jnp.uint32)[:, None]
  codes = jnp.zeros((WORD, nw), jnp.uint32)
  for bit in range(bits):
    taken = (words[bit][None, :] >> shift) & jnp.uint32(1)
    codes = codes | (taken << jnp.uint32(bit))
  return codes.reshape(-1)[:size]
