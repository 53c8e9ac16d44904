"""Codes of few bits for an entry, by rounding to levels or to a dtype."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments
from emc2.compression import blockwise, collectives, compressor, sign
from emc2.kernels import bit_planes

# float32 still tells so many levels from their neighbours.
_MOST_LEVELS = 1 << 23
# One stage of the transform mixes so many entries: half the passes over memory
# of a radix of 4, and no more time than those passes for the products.
_RADIX = 16
_BETA_RULES = ('min', 'k_over_s2')


class Levels(NamedTuple):
  """A payload of levels of a norm.

  Attributes:
    counts: uint32 (1 + ceil(log2(s + 1)), ceil(d / 32)): bit planes of the
      level, 0 to s, and above it the sign; or, to be added, integers (d,).
    norm: (), dtype of the array: the Euclidean norm, over what it is scaled by.
  """

  counts: jax.Array
  norm: jax.Array


class Steps(NamedTuple):
  """A payload of steps between the least and the greatest entry.

  Attributes:
    planes: uint32 (ceil(log2(s + 1)), ceil(d / 32)): bit planes of the steps
      from the least entry, 0 to s.
    least: (), dtype of the array.
    greatest: (), dtype of the array.
  """

  planes: jax.Array
  least: jax.Array
  greatest: jax.Array


class Blocks(NamedTuple):
  """A payload of 8-bit codes.

  Attributes:
    codes: (d,), uint8.
    absmax: (ceil(d / B),), dtype of the array: the largest magnitudes.
  """

  codes: jax.Array
  absmax: jax.Array


def qsgd(
  levels: int,
  *,
  scaled: bool = False,
  shared_norm: bool = False,
  num_workers: int | None = None,
  beta_rule: str = 'min',
) -> compressor.Compressor:
  r"""Rounds magnitudes at random to s levels of the Euclidean norm.

  .. math::
    Q(x)_i = \|x\|_2 \operatorname{sign}(x_i) \ell_i / s, \quad
    \ell_i = \lfloor v_i \rfloor + \operatorname{Bernoulli}(v_i - \lfloor v_i
    \rfloor), \quad v_i = s |x_i| / \|x\|_2 .

  Unbiased, E|Q(x) - x|^2 <= beta |x|^2 with beta = min(d / s^2, sqrt(d) / s).
  Zero goes to zero.

  Args:
    levels: s, static, in [1, 2^23].
    scaled: Whether the result is divided by 1 + beta, which makes a
      contraction of it for every beta: |x|^2 - 2 |x|^2 / (1 + beta) +
      E|Q|^2 / (1 + beta)^2 <= (1 - 1 / (1 + beta)) |x|^2.
    shared_norm: Whether :func:`emc2.compression.reduce` takes the greatest
      norm of all workers for each, so that levels add up as integers. Then
      omega is to the greatest norm.
    num_workers: With `shared_norm`, for how many workers integers have room.
    beta_rule: 'min' as above, or 'k_over_s2': beta = d / s^2, as the authors'
      code of Qsparse-local-SGD has it; it matters if `scaled`.

  Returns:
    A code with omega = beta, or delta = 1 / (1 + beta) if `scaled`, and
    d (1 + ceil(log2(s + 1))) + 32 bits; with `shared_norm`
    d (1 + ceil(log2(num_workers s + 1))) + 32 bits, which travel as the
    narrowest integers that hold the sum.

  Raises:
    ValueError: If an argument is out of its range; by `reduce`, if more
      workers share a norm than `num_workers`.

  References:
    Alistarh et al., QSGD: Communication-Efficient SGD via Gradient
    Quantization and Encoding, 2017, https://arxiv.org/abs/1610.02132
  """
  _check_levels(levels)
  arguments.check_one_of('beta_rule', beta_rule, _BETA_RULES)
  if shared_norm != (num_workers is not None):
    raise ValueError(
      'num_workers must be given with shared_norm and only then, got '
      f'{num_workers=}, {shared_norm=}.'
    )
  if shared_norm and scaled:
    raise ValueError(
      'scaled must be False with shared_norm: the levels of a greater norm '
      'are no contraction of an array.'
    )
  arguments.check_at_least('num_workers', num_workers, 1)
  kind = sign.integer(levels * num_workers) if shared_norm else None
  least_beta = lambda shape: beta('min', math.prod(shape), levels)

  def gain(shape):
    return 1 + beta(beta_rule, math.prod(shape), levels) if scaled else 1.0

  def compress(state, x, key):
    flat = x.reshape(-1)
    size = norm(flat)
    counts = _signed_levels(flat, key, levels, size)
    size = size / gain(x.shape)
    if shared_norm:
      return Levels(counts.astype(kind), size), state
    return Levels(_pack(counts, levels), size), state

  def decompress(state, payload, like):
    del state
    counts = payload.counts
    if not shared_norm:
      counts = _unpack(counts, math.prod(like.shape), levels)
    flat = counts.astype(like.dtype) * (payload.norm / levels)
    return flat.reshape(like.shape)

  def reduce(states, xs, keys, axis_name):
    norms = [norm(x) for x in xs]
    if axis_name is not None:
      workers = jax.lax.axis_size(axis_name)
      sign.check_workers(workers, num_workers)
      worker = jax.lax.axis_index(axis_name)
      keys = [jax.random.fold_in(key, worker) for key in keys]
      norms = jax.lax.pmax(norms, axis_name)
    counts = [
      _signed_levels(x.reshape(-1), key, levels, norm).astype(kind)
      for x, key, norm in zip(xs, keys, norms, strict=True)
    ]

    def decoded(counts, workers=1):
      return [
        (count.astype(x.dtype) * (norm / (levels * workers))).reshape(x.shape)
        for count, norm, x in zip(counts, norms, xs, strict=True)
      ]

    sent = decoded(counts)
    if axis_name is None:
      return compressor.Reduced(sent, sent, list(states))
    mean = decoded(collectives.total(counts, axis_name), workers)
    return compressor.Reduced(sent, mean, list(states))

  def bits(shape):
    largest = levels * (num_workers or 1)
    return math.prod(shape) * (1 + largest.bit_length()) + 32

  if scaled:
    constants = {'delta': lambda shape: 1 / gain(shape)}
  else:
    constants = {
      'delta': lambda shape: _contraction(least_beta(shape)),
      'omega': least_beta,
      'unbiased': True,
    }
  return compressor.Compressor(
    name=f'QSGD, {levels} levels' + ', scaled' * scaled,
    compress=compress,
    decompress=decompress,
    bits=bits,
    allreducible=shared_norm,
    shared_key=False,
    reduce=reduce if shared_norm else None,
    **constants,
  )


def k_level(levels: int) -> compressor.Compressor:
  """Rounds entries at random to the ends of s equal intervals of their range.

  Unbiased; an interval has width w = (max - min) / s and a variance of at most
  w^2 / 4 for each entry, and (max - min)^2 <= 2 |x|^2, so that
  E|Q(x) - x|^2 <= d / (2 s^2) |x|^2.

  Args:
    levels: s, the number of intervals, static, in [1, 2^23].

  Returns:
    A code with omega = d / (2 s^2) and d ceil(log2(s + 1)) + 64 bits.

  Raises:
    ValueError: If `levels` is out of its range.

  References:
    Suresh et al., Distributed Mean Estimation with Limited Communication,
    2017, Section 2.2, https://arxiv.org/abs/1611.00429
  """
  _check_levels(levels)

  def compress(state, x, key):
    return _encode_range(x.reshape(-1), key, levels), state

  def decompress(state, payload, like):
    del state
    flat = _decode_range(payload, math.prod(like.shape), levels)
    return flat.reshape(like.shape)

  omega = lambda shape: math.prod(shape) / (2 * levels**2)
  return compressor.Compressor(
    name=f'{levels} steps',
    compress=compress,
    decompress=decompress,
    bits=lambda shape: math.prod(shape) * levels.bit_length() + 64,
    delta=lambda shape: _contraction(omega(shape)),
    omega=omega,
    unbiased=True,
    shared_key=False,
  )


def rotated(levels: int) -> compressor.Compressor:
  """Rounds as :func:`k_level` after a random rotation that evens entries out.

  The rotation is a random diagonal of +-1 and a normalised Hadamard transform
  of n entries, n the power of two from d on; zeros fill up. All workers share
  the diagonal, which the state of the code draws anew each time; their
  roundings are their own.

  Args:
    levels: s, the number of intervals, static, in [1, 2^23].

  Returns:
    A code with omega = min(2 log2(2 n), n / 2) / s^2 and
    n ceil(log2(s + 1)) + 64 bits.

  Raises:
    ValueError: If `levels` is out of its range.

  References:
    Suresh et al., Distributed Mean Estimation with Limited Communication,
    2017, Section 3, https://arxiv.org/abs/1611.00429
  """
  _check_levels(levels)
  padded = lambda shape: 1 << (math.prod(shape) - 1).bit_length()

  def diagonal(seed, size, dtype):
    words = bit_planes.num_words(size)
    planes = jax.random.bits(jax.random.key(seed), (1, words), jnp.uint32)
    return 2 * bit_planes.unpack(planes, size).astype(dtype) - 1

  def compress(state, x, key):
    # Who decompresses is given the state of after: that one sets the rotation.
    state = jax.random.bits(jax.random.key(state), (), jnp.uint32)
    flat = x.reshape(-1) * diagonal(state, x.size, x.dtype)
    flat = jnp.pad(flat, (0, padded(x.shape) - x.size))
    return _encode_range(hadamard(flat), key, levels), state

  def decompress(state, payload, like):
    size = math.prod(like.shape)
    flat = hadamard(_decode_range(payload, padded(like.shape), levels))[:size]
    return (flat * diagonal(state, size, like.dtype)).reshape(like.shape)

  def omega(shape):
    n = padded(shape)
    return min(2 * math.log2(2 * n), n / 2) / levels**2

  return compressor.Compressor(
    name=f'{levels} steps, rotated',
    init=lambda shape, dtype, key: jax.random.bits(key, (), jnp.uint32),
    compress=compress,
    decompress=decompress,
    bits=lambda shape: padded(shape) * levels.bit_length() + 64,
    delta=lambda shape: _contraction(omega(shape)),
    omega=omega,
    unbiased=True,
    shared_key=False,
  )


def cast(
  dtype: Any = jnp.bfloat16, *, allreducible: bool = False
) -> compressor.Compressor:
  """Rounds every entry to the nearest number of a narrower dtype.

  Entries beyond its greatest finite number become that number, so that a
  memory gets the rest; infinities stay.

  Args:
    dtype: A float of at most 16 bits.
    allreducible: Whether workers add in that dtype. It moves less from more
      than two workers on, but each sum is rounded once more, and what that
      loses no memory holds.

  Returns:
    A code with 16 d bits (for 16 bits); delta = 1 - eps^2 / 4 for bfloat16,
    whose range is that of float32, and 0 for others, for which small entries
    round to zero.

  Raises:
    ValueError: If `dtype` is not such a float.
  """
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 2:
    raise ValueError(f'dtype must be a float of at most 16 bits, got {dtype}.')
  limits = jnp.finfo(dtype)

  def compress(state, x, key):
    del key
    top = float(limits.max)
    x = jnp.where(jnp.isinf(x), x, jnp.clip(x, -top, top))
    return x.astype(dtype), state

  def delta(shape):
    del shape
    if limits.minexp > jnp.finfo(jnp.float32).minexp:
      return 0.0
    return 1 - float(limits.eps) ** 2 / 4

  return compressor.Compressor(
    name=dtype.name,
    compress=compress,
    decompress=lambda state, payload, like: payload.astype(like.dtype),
    bits=lambda shape: 8 * dtype.itemsize * math.prod(shape),
    delta=delta,
    allreducible=allreducible,
  )


def blocks_8bit(
  block_size: int = blockwise.BLOCK_SIZE, *, rounding: str = 'nearest'
) -> compressor.Compressor:
  """Rounds to 8-bit numbers of dynamic precision, by blocks of one scale each.

  The numbers are those of :class:`blockwise.Codebook`, made symmetric, so that
  the largest entry of a block is exact whatever its sign. For numbers M_j, the
  error of another entry between M_j and M_{j+1} is at most half their distance;
  hence with B entries in a block

    |x - Q(x)|^2 / |x|^2 <= max_j (B - 1) ((M_{j+1} - M_j) / 2)^2 /
                                  (1 + (B - 1) min(M_j^2, M_{j+1}^2)),

  0.0033 for 256 of them. Of Gaussian entries it is 0.00012.

  Args:
    block_size: B, static, in [1, 4096].
    rounding: 'nearest', or 'stochastic', which makes the code unbiased.

  Returns:
    A code of 8 d + 32 ceil(d / B) bits, whose omega is that bound, or whose
    delta is what it leaves of 1.

  Raises:
    ValueError: If an argument is out of its range.

  References:
    Dettmers, Lewis, Shleifer, Zettlemoyer, 8-bit Optimizers via Block-wise
    Quantization, 2022, https://arxiv.org/abs/2110.02861
  """
  blockwise.check_block_size(block_size)
  arguments.check_one_of('rounding', rounding, blockwise.ROUNDINGS)
  codebook = blockwise.Codebook(symmetric=True)
  random = rounding == 'stochastic'

  def compress(state, x, key):
    blocks = blockwise.to_blocks(x.reshape(-1), block_size)
    absmax = blockwise.scale_of(blocks)
    codes = blockwise.encode_blocks(
      blocks, absmax, codebook, key=key if random else None
    )
    return Blocks(codes.reshape(-1)[: x.size], absmax), state

  def decompress(state, payload, like):
    del state
    size = math.prod(like.shape)
    codes = jnp.pad(payload.codes, (0, -size % block_size))
    blocks = blockwise.decode_blocks(
      codes.reshape(-1, block_size), payload.absmax, codebook
    )
    return blockwise.from_blocks(blocks, like.shape)

  low, high = codebook.table[:-1], codebook.table[1:]
  size = np.minimum(np.abs(low), np.abs(high))
  others = block_size - 1
  loss = others * ((high - low) / 2) ** 2 / (1 + others * size**2)
  omega = float(np.max(loss))
  return compressor.Compressor(
    name='8 bits' + ', stochastic' * random,
    compress=compress,
    decompress=decompress,
    bits=lambda shape: (
      8 * math.prod(shape) + 32 * -(-math.prod(shape) // block_size)
    ),
    delta=lambda shape: 1 - omega,
    omega=lambda shape: omega if random else None,
    unbiased=random,
    shared_key=False,
  )


def beta(rule: str, size: int, levels: int) -> float:
  """The bound on the variance of `levels` levels on `size` entries."""
  fine = size / levels**2
  return fine if rule == 'k_over_s2' else min(fine, math.sqrt(size) / levels)


def norm(x: jax.Array) -> jax.Array:
  """The Euclidean norm of all entries, whose squares may leave the range."""
  top = jnp.max(jnp.abs(x))
  safe = jnp.where(top > 0, top, 1)
  return top * jnp.sqrt(jnp.sum(jnp.square(x / safe)))


def hadamard(x: jax.Array) -> jax.Array:
  """The normalised Hadamard transform of (n,), n a power of two."""
  size = x.size
  done = 1
  # A stage takes the last bits of the index and leaves them first, so that
  # the order is whole again once each bit has been taken.
  while done < size:
    radix = min(_RADIX, size // done)
    columns = x.reshape(-1, radix)
    mixer = jnp.asarray(_signs_of_hadamard(radix), x.dtype)
    x = jnp.einsum('ij,aj->ia', mixer, columns, precision='highest').reshape(-1)
    done *= radix
  return x / math.sqrt(size)


def _signs_of_hadamard(size: int) -> np.ndarray:
  """The Hadamard matrix (n, n) of +-1 in Sylvester's order."""
  signs = np.ones((1, 1))
  while len(signs) < size:
    signs = np.kron(signs, [[1, 1], [1, -1]])
  return signs


def _check_levels(levels: int) -> None:
  if not 1 <= levels <= _MOST_LEVELS:
    raise ValueError(f'levels must be in [1, {_MOST_LEVELS}], got {levels}.')


def _contraction(omega: float) -> float | None:
  """What an unbiased code of variance `omega` contracts by."""
  return 1 - omega if omega <= 1 else None


def _width(levels: int) -> int:
  """ceil(log2(levels + 1))."""
  return levels.bit_length()


def _round_at_random(v: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds v >= 0 down, or up with the probability of its fraction."""
  floor = jnp.floor(v)
  up = jax.random.uniform(key, v.shape, v.dtype) < v - floor
  return floor.astype(jnp.int32) + up.astype(jnp.int32)


def _signed_levels(flat, key, levels, norm):
  """Levels with signs, int32 (d,), of a norm that may be a greater one."""
  safe = jnp.where(norm > 0, norm, 1)
  # A quotient may be rounded to above 1.
  v = jnp.minimum(jnp.abs(flat) / safe, 1) * levels
  counts = _round_at_random(v, key)
  return jnp.where(flat < 0, -counts, counts)


def _pack(counts, levels):
  """Bit planes of levels with signs."""
  codes = jnp.abs(counts) | ((counts < 0).astype(jnp.int32) << _width(levels))
  return bit_planes.pack(codes.astype(jnp.uint32), 1 + _width(levels))


def _unpack(planes, size, levels):
  """Levels with signs, int32 (d,), of their planes."""
  codes = bit_planes.unpack(planes, size).astype(jnp.int32)
  counts = codes & ((1 << _width(levels)) - 1)
  return jnp.where(codes >> _width(levels) > 0, -counts, counts)


def _encode_range(flat, key, levels):
  """Rounds a flat array to steps of its range, and packs them."""
  least, greatest = jnp.min(flat), jnp.max(flat)
  width = greatest - least
  safe = jnp.where(width > 0, width, 1)
  v = jnp.minimum((flat - least) / safe, 1) * levels
  steps = _round_at_random(v, key).astype(jnp.uint32)
  return Steps(bit_planes.pack(steps, _width(levels)), least, greatest)


def _decode_range(payload, size, levels):
  """The array (size,) of a payload of steps; exact at both ends."""
  steps = bit_planes.unpack(payload.planes, size).astype(payload.least.dtype)
  part = steps / levels
  return payload.least * (1 - part) + payload.greatest * part
