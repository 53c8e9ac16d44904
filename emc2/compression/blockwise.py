r"""Arrays in blocks of 8-bit codes, each with one scale.

A block of :math:`B` neighbours is divided by its largest magnitude, and each
entry becomes the nearest of at most 256 numbers in [-1, 1]: 1 + 4/B bytes an
entry. The dynamic numbers lie in seven decades, with twice as many in each as
in the one below. Between a number and its code stands a line for each decade;
coding takes the least of seven lines and decoding the greatest of their
inverses, so that neither searches a table.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments

BLOCK_SIZE = 256
MOST_BLOCK_SIZE = 4096
ROUNDINGS = ('nearest', 'stochastic')

_DECADES = 7
# Beyond, the reciprocal of a scale is flushed to 0.
_LEAST_SCALE = 2.0**-126


def dynamic_table(
  *, signed: bool = True, total_bits: int = 8, exponent_bits: int = 7
) -> np.ndarray:
  """Numbers of dynamic precision: zeros of a code count decades.

  Args:
    signed: Whether there are negative numbers.
    total_bits: Of a code, from 2 to 8.
    exponent_bits: Most zeros before the fraction, in [1, `total_bits`).

  Returns:
    (at most 2^`total_bits`,) float32, ascending, with 0 and 1 and without -1.

  Raises:
    ValueError: If a number of bits breaks its rule.

  Examples:
    >>> dynamic_table(total_bits=3, exponent_bits=2).round(4)
    array([-0.775, -0.325, -0.055,  0.   ,  0.055,  0.325,  0.775,  1.   ],
          dtype=float32)

  References:
    Dettmers, `8-Bit Approximations for Parallelism in Deep Learning
    <https://arxiv.org/abs/1511.04561>`_, 2016, section 2.
  """
  if not 2 <= total_bits <= 8:
    raise ValueError(f'total_bits must lie in [2, 8], got {total_bits}.')
  if not 1 <= exponent_bits < total_bits:
    raise ValueError(
      f'exponent_bits must lie in [1, {total_bits}), got {exponent_bits}.'
    )
  spare = total_bits - 1 - exponent_bits
  doubled = 0 if signed else 1

  def centres(cells):
    return 0.1 + 0.9 * (np.arange(cells) + 0.5) / cells

  parts = [
    10.0 ** (i + 1 - exponent_bits) * centres(2 ** (i + spare + doubled))
    for i in range(exponent_bits)
  ]
  if spare:
    # Codes with no zero at all divide the top decade once more.
    parts.append(centres(2**spare - 1))
  positive = np.concatenate(parts)
  negative = -positive if signed else []
  return np.sort(np.concatenate([negative, positive, [0.0, 1.0]])).astype(
    np.float32
  )


@dataclasses.dataclass(frozen=True)
class Codebook:
  """The numbers in [-1, 1] that codes stand for; static.

  Attributes:
    kind: 'dynamic', those of :func:`dynamic_table`; 'linear', at equal
      distances: 255 on [-1, 1], or 256 on [0, 1]; 'table', those of `numbers`.
    signed: Whether there are negative ones.
    symmetric: Whether -1 replaces the least number of a signed dynamic table,
      -0.99297: else a block whose largest entry is negative shrinks by that
      factor each time it is coded.
    numbers: Of kind 'table': 2 to 256, ascending, with 0 among them.
  """

  kind: str = 'dynamic'
  signed: bool = True
  symmetric: bool = False
  numbers: tuple[float, ...] | None = None

  def __post_init__(self):
    arguments.check_one_of('kind', self.kind, ('dynamic', 'linear', 'table'))
    if (self.numbers is not None) != (self.kind == 'table'):
      raise ValueError(
        "numbers must be given for kind 'table' and for no other, got "
        f'{self.kind!r}.'
      )
    if self.symmetric and not (self.signed and self.kind == 'dynamic'):
      raise ValueError(
        'symmetric must go with a signed dynamic table, got '
        f'kind={self.kind!r}, signed={self.signed}.'
      )
    if self.numbers is not None:
      found = np.asarray(self.numbers, np.float64)
      if not (
        2 <= found.size <= 256
        and np.all(np.diff(found) > 0)
        and np.all(np.abs(found) <= 1)
        and 0 in found
      ):
        raise ValueError(
          'numbers must be 2 to 256 in [-1, 1], ascending, with 0, got '
          f'{self.numbers}.'
        )
      if self.signed != (found[0] < 0):
        raise ValueError(
          'signed must say whether numbers has negative ones, got '
          f'{self.signed}.'
        )

  @property
  def name(self) -> str:
    """What tells it from others in a checkpoint."""
    if self.kind == 'table':
      digest = sum(hash(x) * (i + 1) for i, x in enumerate(self.numbers))
      return f'table_{digest % 2**32:08x}'
    sign = 'signed' if self.signed else 'unsigned'
    return f'{self.kind}_{"symmetric" if self.symmetric else sign}'

  @functools.cached_property
  def table(self) -> np.ndarray:
    """The numbers by their codes: (at most 256,) float32, ascending."""
    if self.kind == 'table':
      return np.asarray(self.numbers, np.float32)
    if self.kind == 'linear':
      codes = (
        np.arange(-127, 128) / 127 if self.signed else np.arange(256) / 255
      )
      return codes.astype(np.float32)
    table = dynamic_table(signed=self.signed)
    if self.symmetric:
      table[0] = -1
    return table

  @functools.cached_property
  def zero(self) -> int:
    """The code of 0."""
    return int(np.flatnonzero(self.table == 0)[0])

  def encode(self, y: jax.Array, *, keep_sign: bool = False) -> jax.Array:
    """The codes of the nearest numbers; half-way, that of the lower.

    Args:
      y: Float32 or float64; what lies outside of [-1, 1] counts as its end.
      keep_sign: Static; no entry that is not 0 becomes 0, but a negative one
        the number below 0 and, where all are at least 0, a positive one the
        number above.

    Returns:
      Of the shape of `y`, uint8.
    """
    if self.kind == 'dynamic':
      codes = self._encode_dynamic(y)
    elif self.kind == 'linear':
      steps = 127 if self.signed else 255
      low = -1.0 if self.signed else 0.0
      codes = jnp.ceil(jnp.clip(y, low, 1.0) * steps - 0.5).astype(jnp.int32)
      codes = codes + self.zero
    else:
      middles = (self.table[:-1] + self.table[1:]) / 2
      codes = jnp.searchsorted(
        jnp.asarray(middles, y.dtype), y, method='compare_all'
      ).astype(jnp.int32)
    if keep_sign and self.signed:
      codes = codes - ((y < 0) & (codes == self.zero)).astype(jnp.int32)
    elif keep_sign:
      codes = jnp.maximum(codes, (y > 0).astype(jnp.int32))
    return codes.astype(jnp.uint8)

  def decode(
    self, codes: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> jax.Array:
    """The numbers that codes stand for.

    Args:
      codes: uint8, less than the length of the table.
      dtype: Float32 or float64.

    Returns:
      Of the shape of `codes`; of a dynamic table up to 1e-6 of each number.
    """
    if self.kind == 'table':
      return jnp.take(jnp.asarray(self.table, dtype), codes.astype(jnp.int32))
    # By way of int32, from which a CPU converts many at a time.
    place = codes.astype(jnp.int32).astype(dtype)
    if self.signed:
      place = place - 127
    if self.kind == 'linear':
      return place / (127 if self.signed else 255)
    steps, starts = _inverse_lines(self.signed)
    size = jnp.abs(place) if self.signed else place
    lines = [size * a + b for a, b in zip(steps, starts, strict=True)]
    value = _within(functools.reduce(_greater, lines), 0.0, 1.0)
    if self.signed:
      value = jnp.where(place < 0, -value, value)
    if self.symmetric:
      value = jnp.where(place == -127, jnp.full_like(value, -1), value)
    return value

  def _encode_dynamic(self, y):
    """By the least of the lines, whose whole part counts numbers from 0."""
    size = _less(jnp.abs(y), 1.0) if self.signed else _greater(y, 0.0)
    slopes, starts = _lines(self.signed)
    lines = [size * a + b for a, b in zip(slopes, starts, strict=True)]
    place = functools.reduce(_less, lines)
    # Between two decades the middle of neighbours lies 0.2 past the border,
    # and the border is a power of two: there the exponent changes.
    bits, word = (23, jnp.int32) if y.dtype == jnp.float32 else (52, jnp.int64)
    read = functools.partial(jax.lax.bitcast_convert_type, new_dtype=word)
    lower = place - 0.2
    place = jnp.where((read(lower) ^ read(place)) >= 1 << bits, lower, place)
    # The whole part stands in the last bits of what is rounded to whole
    # numbers; a cast would heed NaN and infinity.
    count = (read(place + (2.0**bits - 0.5)) & 255).astype(jnp.int32)
    top = (self.table[-2].item() + 1) / 2
    if not self.signed:
      return jnp.where(y > top, jnp.full_like(count, 255), count - 1)
    count = jnp.where(y > top, jnp.full_like(count, 128), count)
    if self.symmetric:
      bottom = (self.table[1].item() - 1) / 2
      short = (y >= bottom) & (y < 0)
      count = jnp.where(short, jnp.minimum(count, 126), count)
    return jnp.where(y < 0, 127 - count, 127 + count)

  def encode_stochastic(
    self, y: jax.Array, key: jax.Array, *, keep_sign: bool = False
  ) -> jax.Array:
    """Codes of one of the two neighbours, whose mean is the entry.

    Args:
      y: As :meth:`encode`.
      key: Of the draws.
      keep_sign: Static; as :meth:`encode`.

    Returns:
      Of the shape of `y`, uint8. The mean over keys of what they stand for is
      `y`, where that lies between the least and the greatest number.
    """
    nearest = self.encode(y).astype(jnp.int32)
    above = self._at(nearest, y.dtype) > y
    low = nearest - above.astype(jnp.int32)
    low = jnp.clip(low, 0, self.table.size - 2)
    down, up = self._at(low, y.dtype), self._at(low + 1, y.dtype)
    share = jax.random.uniform(key, y.shape, y.dtype)
    codes = low + (share * (up - down) < y - down).astype(jnp.int32)
    if keep_sign and self.signed:
      codes = codes - ((y < 0) & (codes == self.zero)).astype(jnp.int32)
    elif keep_sign:
      codes = jnp.maximum(codes, (y > 0).astype(jnp.int32))
    return codes.astype(jnp.uint8)

  def _at(self, codes, dtype):
    return self.decode(codes.astype(jnp.uint8), dtype)


SIGNED = Codebook()
UNSIGNED = Codebook(signed=False)


def _less(x, y):
  """The minimum; `jnp.minimum` heeds NaN, for four times as long on a CPU."""
  return jnp.where(x < y, x, y)


def _greater(x, y):
  """The maximum, likewise."""
  return jnp.where(x > y, x, y)


def _within(x, low, high):
  """Between two bounds, likewise."""
  return _less(_greater(x, low), high)


@functools.cache
def _lines(signed):
  """Slopes and starts: number to position, whose whole part counts numbers."""
  cells = 2.0 ** (np.arange(_DECADES) + (0 if signed else 1))
  decade = 10.0 ** (np.arange(_DECADES) - 6)
  slopes, starts = cells / (0.9 * decade), cells * 8 / 9
  # The first runs through the middle of 0 and the least number, and through
  # the border above it, or the next middle where there is one.
  least = decade[0] * (0.1 + 0.45 / cells[0])
  first = least / 2, cells[0] + 0.2
  second = (decade[0], 2.0) if signed else (decade[0] * 0.55, 3.0)
  slopes[0] = (second[1] - first[1]) / (second[0] - first[0])
  starts[0] = first[1] - slopes[0] * first[0]
  return tuple(slopes.tolist()), tuple(starts.tolist())


@functools.cache
def _inverse_lines(signed):
  """Slopes and starts: how many numbers from 0, to the number."""
  cells = 2.0 ** (np.arange(_DECADES) + (0 if signed else 1))
  decade = 10.0 ** (np.arange(_DECADES) - 6)
  steps = 0.9 * decade / cells
  starts = steps * (0.5 if signed else 1.5) - 0.8 * decade
  return tuple(steps.tolist()), tuple(starts.tolist())


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Quantized:
  """An array in blocks of codes, as a pytree of two arrays.

  Where whole blocks fill its last axis, codes have the shape of the array, and
  lie on a mesh as it does. Else it is flattened, and its last block padded. No
  shape is kept, so that the same holds for the part that a device has in
  :func:`jax.shard_map`. The name of the codebook is part of the name under
  which a checkpoint holds the codes: to restore with another one fails.

  Attributes:
    codes: (..., n), uint8, or (number of blocks, B).
    absmax: Scales: (..., n / B), float32 or float64, or (number of blocks,).
    codebook: Static.
  """

  codes: Any
  absmax: Any
  codebook: Codebook = SIGNED

  def tree_flatten_with_keys(self):
    """Codes and scales, by name, and the codebook."""
    name = jax.tree_util.GetAttrKey(f'codes_{self.codebook.name}')
    scale = jax.tree_util.GetAttrKey('absmax')
    # In alphabetical order, as in a mapping.
    return ((scale, self.absmax), (name, self.codes)), self.codebook

  @classmethod
  def tree_unflatten(cls, codebook, children):
    """The reverse."""
    absmax, codes = children
    return cls(codes, absmax, codebook)

  @property
  def is_flat(self) -> bool:
    """Whether the array was flattened."""
    return self.absmax.ndim != self.codes.ndim

  @property
  def block_size(self) -> int:
    """B."""
    if self.is_flat:
      return self.codes.shape[-1]
    return self.codes.shape[-1] // self.absmax.shape[-1]


def is_coded(node: Any) -> bool:
  """Whether a node of a state is an array in codes, or a mapping of its parts.

  A library of models may have made the one into the other (`flax.nnx`).
  """
  if isinstance(node, Quantized):
    return True
  if not isinstance(node, Mapping) or len(node) != 2:
    return False
  scale, codes = sorted(map(str, node))
  return scale == 'absmax' and codes.startswith('codes_')


def as_coded(node: Any, *codebooks: Codebook) -> Any:
  """The array that a node is in codes of one of some codebooks, or the node."""
  if isinstance(node, Quantized) or not is_coded(node):
    return node
  for codebook in codebooks:
    if f'codes_{codebook.name}' in node:
      return Quantized(node[f'codes_{codebook.name}'], node['absmax'], codebook)
  raise ValueError(
    f'codes must be those of one of {[x.name for x in codebooks]}, got '
    f'{sorted(map(str, node))}.'
  )


def check_block_size(block_size: int) -> None:
  """Refuses what is no whole number in [1, 4096].

  Raises:
    ValueError: If `block_size` is none.
  """
  whole = isinstance(block_size, int | np.integer)
  if not whole or not 1 <= block_size <= MOST_BLOCK_SIZE:
    raise ValueError(
      f'block_size must be an int in [1, {MOST_BLOCK_SIZE}], got '
      f'{block_size!r}.'
    )


def check_rounding(rounding: str, key: jax.Array | None) -> None:
  """Refuses a rounding without a name, and a key that goes with another one.

  Raises:
    ValueError: If `rounding` is unknown, or `key` is missing or not needed.
  """
  arguments.check_one_of('rounding', rounding, ROUNDINGS)
  if (key is None) != (rounding == 'nearest'):
    raise ValueError(
      "key must be given for rounding='stochastic' and for no other, got "
      f'{rounding=}.'
    )


def to_blocks(x: jax.Array, block_size: int) -> jax.Array:
  """Splits an array into blocks.

  Args:
    x: (..., n) of any shape.
    block_size: B.

  Returns:
    (..., n / B, B) where B divides n; else (number of blocks, B), the entries
    row by row and zeros at the end.
  """
  if x.ndim and x.shape[-1] and x.shape[-1] % block_size == 0:
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)
  flat = x.reshape(-1)
  if flat.size % block_size:
    flat = jnp.pad(flat, (0, -flat.size % block_size))
  return flat.reshape(-1, block_size)


def from_blocks(blocks: jax.Array, shape: Sequence[int]) -> jax.Array:
  """What :func:`to_blocks` made of an array of that shape."""
  size = math.prod(shape)
  if blocks.size == size:
    return blocks.reshape(shape)
  return blocks.reshape(-1)[:size].reshape(shape)


def scale_of(blocks: jax.Array) -> jax.Array:
  """The largest magnitude of each block: (..., B) to (...)."""
  return jnp.max(jnp.abs(blocks), axis=-1)


def inverse_scale(absmax: jax.Array) -> jax.Array:
  """What blocks are multiplied by; of a block of zeros 0."""
  inverse = jnp.maximum(1 / absmax, _LEAST_SCALE)
  return jnp.where(absmax < _LEAST_SCALE, jnp.zeros_like(absmax), inverse)


def encode_blocks(
  blocks: jax.Array,
  absmax: jax.Array,
  codebook: Codebook,
  *,
  keep_sign: bool = False,
  key: jax.Array | None = None,
) -> jax.Array:
  """Codes (..., B) of blocks (..., B) with scales (...); random with a key."""
  y = blocks * inverse_scale(absmax)[..., None]
  if key is None:
    return codebook.encode(y, keep_sign=keep_sign)
  return codebook.encode_stochastic(y, key, keep_sign=keep_sign)


def decode_blocks(
  codes: jax.Array, absmax: jax.Array, codebook: Codebook
) -> jax.Array:
  """Blocks (..., B), of the dtype of scales (...), from codes (..., B)."""
  return codebook.decode(codes, absmax.dtype) * absmax[..., None]


def quantize(
  x: jax.Array,
  codebook: Codebook = SIGNED,
  *,
  block_size: int = BLOCK_SIZE,
  keep_sign: bool = True,
  rounding: str = 'nearest',
  key: jax.Array | None = None,
) -> Quantized:
  r"""Codes an array in blocks of 8 bits.

  For a block :math:`T_k` of the array and the numbers :math:`M_0 < M_1 <
  \dots` of the codebook,

  .. math::
    A_k = \max_i |T_{ki}|, \quad
    q_{ki} = \arg\min_j |T_{ki} / A_k - M_j|.

  A block that holds a NaN decodes to NaN throughout. Magnitudes of :math:`A_k`
  below 2^-126 count as 0.

  Args:
    x: Of any shape, of real floats.
    codebook: Static; must be signed if `x` has negative entries.
    block_size: :math:`B`, static, in [1, 4096].
    keep_sign: Static; a negative entry never becomes 0 but the number below it,
      and where no number is negative, a positive one that above it.
    rounding: Static; 'nearest', or 'stochastic': one of the two neighbours, so
      that the mean is the entry itself.
    key: Of the draws, for 'stochastic' alone.

  Returns:
    Codes, and scales of at least float32.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> coded = quantize(jnp.array([[1.0, -0.5, 0.0, 0.1]]), block_size=2)
    >>> coded.codes, coded.absmax
    (Array([[255,  35, 127, 255]], dtype=uint8), Array([[1. , 0.1]],
    dtype=float32))
    >>> dequantize(coded)
    Array([[ 1.       , -0.5007812,  0.       ,  0.1      ]], dtype=float32)

  References:
    Dettmers, Lewis, Shleifer and Zettlemoyer, `8-bit Optimizers via Block-wise
    Quantization <https://arxiv.org/abs/2110.02861>`_, 2022, section 2.
  """
  check_block_size(block_size)
  check_rounding(rounding, key)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x must be of real floats, got {x.dtype}.')
  wide = x.astype(np.promote_types(x.dtype, np.float32))
  blocks = to_blocks(wide, block_size)
  absmax = scale_of(blocks)
  codes = encode_blocks(blocks, absmax, codebook, keep_sign=keep_sign, key=key)
  return _keep(x, codes, absmax, codebook)


def _keep(x, codes, absmax, codebook):
  """In the shape in which codes are kept."""
  if codes.size == x.size and codes.ndim > x.ndim >= 1:
    codes = codes.reshape(x.shape)
  return Quantized(codes, absmax, codebook)


def codes_in_blocks(coded: Quantized) -> jax.Array:
  """Codes (..., B), one block along each last axis."""
  if coded.is_flat:
    return coded.codes
  return coded.codes.reshape(*coded.absmax.shape, coded.block_size)


def dequantize(
  coded: Quantized,
  like: Any = None,
) -> jax.Array:
  """The array that codes stand for.

  Args:
    coded: From :func:`quantize`.
    like: An array, maybe abstract, of the shape and dtype to return; by default
      those of the codes and of the scales, which serve where no block was
      padded.

  Returns:
    An array.
  """
  blocks = decode_blocks(codes_in_blocks(coded), coded.absmax, coded.codebook)
  if like is None:
    return blocks.reshape(coded.codes.shape)
  return from_blocks(blocks, like.shape).astype(like.dtype)


def zeros_like(
  x: jax.Array | jax.ShapeDtypeStruct,
  codebook: Codebook = SIGNED,
  *,
  block_size: int = BLOCK_SIZE,
) -> Quantized:
  """An array of zeros in blocks of codes.

  Args:
    x: Of any shape, of real floats; abstract or sharded ones carry through.
    codebook: Static.
    block_size: Static, in [1, 4096].

  Returns:
    Of the very types that :func:`quantize` gives for an array like `x`.
  """
  wide = np.promote_types(x.dtype, np.float32)
  zeros = to_blocks(jnp.zeros_like(x, dtype=wide), block_size)
  codes = jnp.full_like(zeros, codebook.zero, dtype=jnp.uint8)
  # A maximum of so many constants would take long to compile.
  scale = jax.lax.index_in_dim(zeros, 0, axis=-1, keepdims=False)
  return _keep(x, codes, scale, codebook)
