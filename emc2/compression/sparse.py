"""Codes that keep k of d entries: the largest, random ones, a random block."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments
from emc2.compression import compressor
from emc2.kernels import bit_planes
from emc2.kernels import top_k as selection

_ROUNDS = 6


class Entries(NamedTuple):
  """The payload of a sparse code; codes of this form may be composed.

  Attributes:
    values: (k,), dtype of the array: the entries that were kept.
    indices: uint32 (ceil(log2 d), ceil(k / 32)), bit planes of where they
      stood in the flat array; None where the state of the code tells, or d
      is 1.
  """

  values: jax.Array
  indices: jax.Array | None


def top_k(
  k: int | None = None, *, fraction: float | None = None, at_most: bool = False
) -> compressor.Compressor:
  """Keeps the k entries of largest magnitude, ties by the lower index.

  Deterministic, |x - Q(x)|^2 = |x|^2 - |kept|^2 <= (1 - k / d) |x|^2.

  Args:
    k: How many entries of each array, static, in [1, d].
    fraction: In place of `k`, the part of the entries, in (0, 1]: k is
      max(1, int(fraction d)).
    at_most: Whether an array of fewer than `k` entries keeps all of them;
      otherwise it is refused.

  Returns:
    A code with delta = k / d and k (32 + ceil(log2 d)) bits.

  Raises:
    ValueError: If not exactly one of `k` and `fraction` is given, or it is out
      of range; by `init`, if `k` is greater than d.

  References:
    Stich et al., Sparsified SGD with Memory, 2018,
    https://arxiv.org/abs/1809.07599
  """
  count = _counter(k, fraction, at_most)

  def compress(state, x, key):
    del key
    values, indices = selection.top_k(x.reshape(-1), count(x.shape))
    return Entries(values, _pack(indices, x.size)), state

  return compressor.Compressor(
    name='top-k',
    init=_checked(count),
    compress=compress,
    decompress=_put,
    bits=lambda shape: count(shape) * (32 + _index_bits(shape)),
    delta=lambda shape: count(shape) / math.prod(shape),
    shared_key=False,
    accumulate=_add,
  )


def random_k(
  k: int | None = None,
  *,
  fraction: float | None = None,
  scaled: bool = False,
  shared: bool = True,
  at_most: bool = False,
) -> compressor.Compressor:
  """Keeps a random set of k entries.

  Every entry is kept with probability k / d, so that unscaled
  E|x - Q(x)|^2 = (1 - k / d) |x|^2, and scaled by d / k the code is unbiased.

  The set is the image of [0, k) under a keyed permutation of [0, d), which
  costs O(k) where a sort of d uniforms costs O(d log d): a Feistel network on
  a grid of about sqrt(d) x sqrt(d) cells, walked until it meets one of the
  first d, then a uniform rotation. The rotation alone makes each probability
  exactly k / d; that any two entries are kept independently of where they
  stand rests on the network, whose rounds are keyed hashes.

  Args:
    k: How many entries of each array, static, in [1, d].
    fraction: In place of `k`, the part of the entries, in (0, 1]: k is
      max(1, int(fraction d)).
    scaled: Whether values are multiplied by d / k.
    shared: Whether all workers draw the same set: then indices need not
      travel and payloads may be averaged. Otherwise each draws its own.
    at_most: Whether an array of fewer than `k` entries keeps all of them;
      otherwise it is refused.

  Returns:
    A code with 32 k bits, and k ceil(log2 d) for the indices if not `shared`.
    Unscaled delta = k / d; scaled omega = d / k - 1, and delta = 2 - d / k
    where that is not negative.

  Raises:
    ValueError: If not exactly one of `k` and `fraction` is given, or it is out
      of range; by `init`, if `k` is greater than d.

  References:
    Stich et al., Sparsified SGD with Memory, 2018,
    https://arxiv.org/abs/1809.07599
    Black, Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
  """
  count = _counter(k, fraction, at_most)

  def where(draws, shape):
    return _distinct(draws, count(shape), math.prod(shape))

  def compress(state, x, key):
    draws = _draw(key, x.size)
    indices = where(draws, x.shape)
    values = (
      x.reshape(-1)
      .at[indices]
      .get(mode='promise_in_bounds', unique_indices=True)
    )
    values = values * _gain(count, scaled, x.shape)
    if shared:
      return Entries(values, None), draws
    return Entries(values, _pack(indices, x.size)), state

  def decompress(state, payload, like):
    if not shared:
      return _put(state, payload, like)
    return _scatter(where(state, like.shape), payload.values, like)

  init = _checked(count)
  if shared:
    init = _checked(count, lambda: jnp.zeros(_ROUNDS + 1, jnp.uint32))
  index_bits = lambda shape: 0 if shared else _index_bits(shape)
  return compressor.Compressor(
    name='random-k' + ', scaled' * scaled,
    init=init,
    compress=compress,
    decompress=decompress,
    bits=lambda shape: count(shape) * (32 + index_bits(shape)),
    accumulate=None if shared else _add,
    shared_key=shared,
    allreducible=shared,
    **_constants(count, scaled),
  )


def block_k(
  k: int | None = None,
  *,
  fraction: float | None = None,
  scaled: bool = False,
  at_most: bool = False,
) -> compressor.Compressor:
  """Keeps k entries in a row, from a random one on, past the end to the start.

  All workers draw the same start from 0 to d - 1, so every entry is kept with
  probability exactly k / d, and payloads may be averaged. It reads and writes
  rows of memory where :func:`random_k` gathers.

  Args:
    k: How many entries of each array, static, in [1, d].
    fraction: In place of `k`, the part of the entries, in (0, 1]: k is
      max(1, int(fraction d)).
    scaled: Whether values are multiplied by d / k, which makes the code
      unbiased.
    at_most: Whether an array of fewer than `k` entries keeps all of them;
      otherwise it is refused.

  Returns:
    A code with 32 k bits. Unscaled delta = k / d; scaled omega = d / k - 1,
    and delta = 2 - d / k where that is not negative.

  Raises:
    ValueError: If not exactly one of `k` and `fraction` is given, or it is out
      of range; by `init`, if `k` is greater than d.

  References:
    Vogels et al., PowerSGD, 2019, Section 4.2,
    https://arxiv.org/abs/1905.13727
  """
  count = _counter(k, fraction, at_most)

  def compress(state, x, key):
    del state
    size, kept = x.size, count(x.shape)
    start = jax.random.randint(key, (), 0, size, jnp.int32)
    # Cut from the piece that ends with the array and the array's head: two
    # slices, where a gather would read entry by entry.
    first = jnp.minimum(start, size - kept)
    flat = x.reshape(-1)
    piece = jax.lax.dynamic_slice(flat, (first,), (kept,))
    both = jnp.concatenate([piece, flat[:kept]])
    values = jax.lax.dynamic_slice(both, (start - first,), (kept,))
    return Entries(values * _gain(count, scaled, x.shape), None), start

  def decompress(state, payload, like):
    size = math.prod(like.shape)
    # A CPU and a GPU read the block in the loop that uses the result; a TPU
    # reads slowly by index.
    flat = jax.lax.platform_dependent(
      state,
      payload.values,
      tpu=functools.partial(_place_by_slices, size=size),
      default=functools.partial(_place_by_index, size=size),
    )
    return flat.reshape(like.shape)

  return compressor.Compressor(
    name='block-k' + ', scaled' * scaled,
    init=_checked(count, lambda: jnp.zeros([], jnp.int32)),
    compress=compress,
    decompress=decompress,
    bits=lambda shape: 32 * count(shape),
    allreducible=True,
    **_constants(count, scaled),
  )


def _counter(
  k: int | None, fraction: float | None, at_most: bool
) -> Callable[[Sequence[int]], int]:
  """How many entries of an array of a given shape are kept."""
  if (k is None) == (fraction is None):
    raise ValueError(
      f'one of k and fraction must be given, got {k=}, {fraction=}.'
    )
  arguments.check_at_least('k', k, 1)
  if fraction is not None and not 0 < fraction <= 1:
    raise ValueError(f'fraction must be in (0, 1], got {fraction}.')

  def count(shape):
    size = math.prod(shape)
    if fraction is not None:
      return max(1, int(fraction * size))
    if k > size and not at_most:
      raise ValueError(
        f'k must be at most the {size} entries of shape {tuple(shape)}, got '
        f'{k}; at_most=True keeps all of them.'
      )
    return min(k, size)

  return count


def _checked(count, state=tuple):
  """An `init` that refuses a shape with fewer than k entries."""

  def prepare(shape, dtype, key):
    del dtype, key
    count(shape)
    return state()

  return prepare


def _gain(count, scaled, shape) -> float:
  return math.prod(shape) / count(shape) if scaled else 1.0


def _constants(count, scaled):
  """What a uniform choice of k entries keeps of the norm, and its flags."""
  ratio = lambda shape: math.prod(shape) / count(shape)
  if not scaled:
    return {'delta': lambda shape: 1 / ratio(shape)}
  return {
    'delta': lambda shape: 2 - ratio(shape) if ratio(shape) <= 2 else None,
    'omega': lambda shape: ratio(shape) - 1,
    'unbiased': True,
  }


def _index_bits(shape: Sequence[int]) -> int:
  """ceil(log2 d)."""
  return (math.prod(shape) - 1).bit_length()


def _pack(indices: jax.Array, size: int) -> jax.Array | None:
  """Indices below `size` as bit planes; a single one needs none."""
  if size == 1:
    return None
  return bit_planes.pack(indices.astype(jnp.uint32), _index_bits((size,)))


def _unpack(planes: jax.Array | None, count: int) -> jax.Array:
  if planes is None:
    return jnp.zeros(count, jnp.int32)
  return bit_planes.unpack(planes, count).astype(jnp.int32)


def _scatter(indices: jax.Array, values: jax.Array, like) -> jax.Array:
  """Distinct entries into an array of zeros."""
  flat = jnp.zeros(math.prod(like.shape), like.dtype)
  flat = flat.at[indices].set(
    values, mode='promise_in_bounds', unique_indices=True
  )
  return flat.reshape(like.shape)


def _place_by_index(start: jax.Array, block: jax.Array, size: int) -> jax.Array:
  """A block in an array of zeros, from `start` on and past the end."""
  place = jnp.arange(size, dtype=jnp.int32) - start
  place = jnp.where(place < 0, place + size, place)
  inside = jnp.minimum(place, block.size - 1)
  values = block.at[inside].get(mode='promise_in_bounds')
  return jnp.where(place < block.size, values, 0)


def _place_by_slices(
  start: jax.Array, block: jax.Array, size: int
) -> jax.Array:
  """The same by a piece that ends with the array at the latest, and a head."""
  first = jnp.minimum(start, size - block.size)
  both = jnp.zeros(2 * block.size, block.dtype)
  both = jax.lax.dynamic_update_slice(both, block, (start - first,))
  flat = jnp.zeros(size, block.dtype)
  flat = jax.lax.dynamic_update_slice(flat, both[: block.size], (first,))
  return flat.at[: block.size].add(both[block.size :])


def _put(state, payload: Entries, like) -> jax.Array:
  """Decompresses entries whose indices travelled."""
  del state
  indices = _unpack(payload.indices, payload.values.size)
  return _scatter(indices, payload.values, like)


def _add(state, payloads: Entries, like) -> jax.Array:
  """Adds the entries of all workers in one pass."""
  del state
  indices = jax.vmap(
    lambda entries: _unpack(entries.indices, entries.values.size)
  )(payloads).reshape(-1)
  flat = jnp.zeros(math.prod(like.shape), like.dtype)
  flat = flat.at[indices].add(
    payloads.values.reshape(-1), mode='promise_in_bounds'
  )
  return flat.reshape(like.shape)


def _draw(key: jax.Array, size: int) -> jax.Array:
  """The numbers that make a permutation: uint32 (rounds + 1,)."""
  of_rounds, of_shift = jax.random.split(key)
  keys = jax.random.bits(of_rounds, (_ROUNDS,), jnp.uint32)
  shift = jax.random.randint(of_shift, (1,), 0, size, jnp.int32)
  return jnp.concatenate([keys, shift.astype(jnp.uint32)])


def _distinct(draws: jax.Array, count: int, size: int) -> jax.Array:
  """The first `count` values, int32, of a random permutation of [0, size)."""
  rows = math.isqrt(size - 1) + 1
  columns = -(-size // rows)

  def permute(row, column):
    for i in range(0, _ROUNDS, 2):
      row = _rotate(row, column ^ draws[i], rows)
      column = _rotate(column, row ^ draws[i + 1], columns)
    return row, column

  # The grid has fewer than sqrt(size) cells too many, so few walk on.
  outside = lambda row, column: row * jnp.uint32(columns) + column >= size

  def walk(cell):
    stay = ~outside(*cell)
    ahead = permute(*cell)
    return [jnp.where(stay, *pair) for pair in zip(cell, ahead, strict=True)]

  start = jnp.arange(count, dtype=jnp.uint32)
  cell = list(permute(start // columns, start % columns))
  cell = jax.lax.while_loop(lambda cell: outside(*cell).any(), walk, cell)
  index = cell[0] * jnp.uint32(columns) + cell[1] + draws[_ROUNDS]
  return jnp.where(index < size, index, index - size).astype(jnp.int32)


def _rotate(x: jax.Array, seed: jax.Array, bound: int) -> jax.Array:
  """Adds a hash of `seed` to x in [0, bound), modulo bound <= 2^16; uint32."""
  # The finaliser of MurmurHash3, a bijection of 32 bits.
  seed = (seed ^ (seed >> 16)) * jnp.uint32(0x85EBCA6B)
  seed = (seed ^ (seed >> 13)) * jnp.uint32(0xC2B2AE35)
  seed = seed ^ (seed >> 16)
  # floor(seed bound / 2^32) without 64 bits, or a division.
  high, low = seed >> 16, seed & 0xFFFF
  x = x + ((high * bound + (low * bound >> 16)) >> 16)
  return jnp.where(x < bound, x, x - bound)
