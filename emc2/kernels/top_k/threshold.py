"""The largest entries by magnitude, without a sort of the array.

A threshold that more than k entries reach comes from a sample. One pass over
the array marks the entries that reach it, one bit each; the bits say where the
candidates are, and among these few the exact threshold is found by bisection.
If the sample misled, or there are too many ties for a short list, the threshold
is moved by bisection over the array until the list fits: whatever the array
holds, the entries are exact.

Magnitudes are compared as integers, the bits of floats without the sign. A
threshold is a magnitude and an index: it is reached by what is larger, and by
what is as large and stands before the index.

Bits become a list in one of two forms: a CPU walks over them, and GPUs
ask for each place of the list which word it falls into.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh

WORD = 32
_SAMPLE = 1 << 12, 1 << 16  # At least and at most; else one in 64.
# The spread of a count is its root: five of them are missed once in a million.
_SPREADS = 5.0
# Less is sorted at once.
MIN_SIZE = 1 << 17


def unsupported(x: jax.Array) -> str | None:
  """Why the passes do not take these arguments, or None."""
  if x.dtype not in (jnp.float32, jnp.float64):
    return f'want float32 or float64, got {x.dtype}.'
  if not MIN_SIZE <= x.size < 2**31:
    return f'want {MIN_SIZE} to 2^31 - 1 entries, got {x.size}.'
  return None


def _sample_size(size: int) -> int:
  least, most = _SAMPLE
  return min(size, most, max(least, size // 64))


def capacity(size: int, k: int) -> tuple[int, int]:
  """Static sizes of the search.

  Args:
    size: Entries of the array.
    k: Entries to find.

  Returns:
    The rank in the sample of the first threshold, and how many candidates
    there is room for.
  """
  m = _sample_size(size)
  expected = m * k / size
  margin = 1 + _SPREADS * expected**0.5
  rank = min(m, int(expected + margin) + 1)
  return rank, min(size, int(size / m * (rank + margin)) + WORD)


def magnitudes(x: jax.Array) -> jax.Array:
  """Unsigned integers in the order of |x|; NaN is above infinity."""
  unsigned = jnp.uint32 if x.dtype == jnp.float32 else jnp.uint64
  return jax.lax.bitcast_convert_type(jnp.abs(x), unsigned)


def _sample(x):
  """Entries spread evenly over x, and over the columns of any matrix in it."""
  m = _sample_size(x.size)
  # Multiples of the golden ratio, modulo 1; float32 holds 24 bits of them.
  turns = jnp.arange(m, dtype=jnp.uint32) * jnp.uint32(2654435769)
  share = (turns >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)
  at = (share * jnp.float32(x.size)).astype(jnp.int32)
  return x.at[jnp.minimum(at, x.size - 1)].get(mode='promise_in_bounds')


def _loop(goes_on, body, start, like):
  """A while loop whose carry varies over the mesh axes of an array."""
  leaves, structure = jax.tree.flatten(start)
  *leaves, _ = mesh.vary_alike(*leaves, like)
  return jax.lax.while_loop(goes_on, body, structure.unflatten(leaves))


class _Search(NamedTuple):
  """Two thresholds, the lower of which too many reach and the upper too few."""

  tries: jax.Array  # (), int32.
  low: jax.Array  # (), unsigned: magnitude.
  high: jax.Array  # (), unsigned.
  first: jax.Array  # (), int32: index of the upper; magnitudes are equal then.
  last: jax.Array  # (), int32: index of the lower.
  many: jax.Array  # (), int32: reach the lower.
  few: jax.Array  # (), int32: reach the upper.
  number: jax.Array  # (), int32: reached the one that was tried last.
  marks: jax.Array  # What the one tried last gave.


def _between(step, low, high):
  """`low`, and a share of the way to `high`, but never all or nothing."""
  way = high - low
  part = (way.astype(jnp.float32) * step).astype(way.dtype)
  one = jnp.ones_like(way)
  return low + jnp.clip(part, one, jnp.maximum(way - one, one))


def _search(mark, k, room, start, size, like):
  """Marks from k to `room` of `size` entries, the k largest among them.

  Args:
    mark: Maps a magnitude and an index to the marks of what reaches them, and
      the number of those.
    k: Static.
    room: Static, at least k.
    start: (), the first magnitude to try.
    size: Static; one index more than any.
    like: What `mark` looks at.

  Returns:
    Marks and number.
  """
  zero, half = jnp.int32(0), jnp.float32(0.5)
  largest = jnp.iinfo(start.dtype).max // 2 + 1

  def misled(s):
    return (s.number < k) | (s.number > room)

  def again(s):
    # Halves in turn with where the number would be right on a line.
    share = ((k + room) / 2 - s.few.astype(jnp.float32)) / jnp.maximum(
      s.many - s.few, 1
    ).astype(jnp.float32)
    straight = jnp.clip(share, 1 / 16, 15 / 16)
    split = s.high - s.low > 1
    # Numbers fall with magnitudes, and grow with indices.
    step = jnp.where(split, 1 - straight, straight)
    step = jnp.where(s.tries % 2 == 0, step, half)
    at = _between(step, s.low, s.high)
    # It may be one magnitude alone that is too many, as zero often is.
    beside = (s.tries == 1) & (s.number > room)
    at = jnp.where(beside, s.low + jnp.ones_like(at), at)
    at = jnp.where(s.tries == 0, start, jnp.where(split, at, s.low))
    end = jnp.where(split, size, _between(step, s.first, s.last))
    marks, number = mark(at, end)
    enough = number >= k
    return _Search(
      tries=s.tries + 1,
      low=jnp.where(enough & split, at, s.low),
      high=jnp.where(~enough & split, at, s.high),
      first=jnp.where(~enough & ~split, end, s.first),
      last=jnp.where(enough & ~split, end, s.last),
      many=jnp.where(enough, number, s.many),
      few=jnp.where(enough, s.few, number),
      number=number,
      marks=marks,
    )

  blank = jax.eval_shape(mark, start, zero)[0]
  found = _loop(
    misled,
    again,
    _Search(
      tries=zero,
      low=jnp.zeros_like(start),
      high=jnp.full_like(start, largest),
      first=zero,
      last=jnp.int32(size),
      many=jnp.int32(size),
      few=zero,
      number=zero,
      marks=jnp.zeros(blank.shape, blank.dtype),
    ),
    like,
  )
  return found.marks, found.number


def _count(mask):
  return jnp.sum(mask, dtype=jnp.int32)


def _reaches(keys, index, at, end):
  """Whether entries reach a threshold."""
  return keys >= at + (index >= end).astype(at.dtype)


def pack(x: jax.Array, at: jax.Array, end: jax.Array) -> jax.Array:
  """One bit for each entry: whether it reaches a threshold.

  Args:
    x: (d,), float.
    at: (), as :func:`magnitudes` are.
    end: (), int32; an entry of just this magnitude must stand before.

  Returns:
    (ceil(d / 32),), uint32: of n = d // 32 words, word w has as bit i the entry
    i n + w; one more has the d mod 32 entries beyond.
  """
  n = x.size // WORD
  # Else XLA would take the magnitudes out of a loop, and keep them all.
  x, at, end = jax.lax.optimization_barrier((x, at, end))
  place = jnp.arange(n, dtype=jnp.int32)
  words = jnp.zeros((n,), jnp.uint32)
  # One vectorised loop that reads 32 rows at once.
  for i in range(WORD):
    row = magnitudes(jax.lax.slice(x, [i * n], [(i + 1) * n]))
    bits = _reaches(row, place, at, end - i * n).astype(jnp.uint32)
    words |= bits << jnp.uint32(i)
  rest = magnitudes(jax.lax.slice(x, [n * WORD], [x.size]))
  if rest.size:
    place = jnp.arange(rest.size, dtype=jnp.int32)
    bits = _reaches(rest, place, at, end - n * WORD).astype(jnp.uint32)
    bits <<= place.astype(jnp.uint32)
    words = jnp.append(words, jnp.sum(bits, dtype=jnp.uint32))
  return words


def _mark(x, k, room):
  """Marks k to `room` entries that have the k largest among them."""
  rank, _ = capacity(x.size, k)
  sample = jnp.sort(magnitudes(_sample(x)))

  def mark(at, end):
    words = pack(x, at, end)
    return words, _count(jax.lax.population_count(words).astype(jnp.int32))

  return _search(mark, k, room, sample[-rank], x.size, x)


def _list(words, x, room):
  """The entries that are marked, at most `room`; it is filled up."""
  n, total = x.size // WORD, words.size

  # A loop over scalars: on a CPU XLA makes it machine code of a few
  # nanoseconds a turn, less than any sums over words cost.
  def take(state):
    at, word, number, indices = state
    some = word != 0
    bit = jax.lax.population_count((word & (~word + 1)) - 1).astype(jnp.int32)
    index = jnp.where(at < n, at + bit * n, n * WORD + bit)
    # A word without a bit writes what the next one overwrites.
    indices = _put(indices, number, jnp.where(some, index, 0))
    word &= word - 1
    done = word == 0
    at += done.astype(jnp.int32)
    word = jnp.where(done, words[jnp.minimum(at, total - 1)], word)
    return at, word, number + some.astype(jnp.int32), indices

  zero = jnp.int32(0)
  start = zero, words[0], zero, jnp.zeros((room + 1,), jnp.int32)
  *_, indices = _loop(lambda s: s[0] < total, take, start, x)
  indices = indices[:room]
  return x.at[indices].get(mode='promise_in_bounds'), indices


def _put(out, at, value):
  return jax.lax.dynamic_update_index_in_dim(
    out, value, at, 0, allow_negative_indices=False
  )


def _list_at_once(words, x, room):
  """As :func:`_list`, by a search for each place of the list."""
  n = x.size // WORD
  counts = jax.lax.population_count(words).astype(jnp.int32)
  ends = jnp.cumsum(counts, dtype=jnp.int32)
  place = jnp.arange(room, dtype=jnp.int32)
  at = jnp.searchsorted(ends, place, side='right', method='scan_unrolled')
  at = jnp.minimum(at.astype(jnp.int32), words.size - 1)
  take = lambda z: z.at[at].get(mode='promise_in_bounds')
  word, rank = take(words), place - take(ends - counts)
  # The bit of that rank in its word, half of what is left at a time.
  bit = jnp.zeros_like(rank)
  for width in (16, 8, 4, 2, 1):
    part = (word >> bit.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
    low = jax.lax.population_count(part).astype(jnp.int32)
    above = rank >= low
    rank, bit = (
      jnp.where(above, rank - low, rank),
      jnp.where(above, bit + width, bit),
    )
  indices = jnp.where(at < n, at + bit * n, n * WORD + bit)
  # Beyond the last bit there is nothing to be found, but there is a place.
  indices = jnp.minimum(indices, x.size - 1)
  return x.at[indices].get(mode='promise_in_bounds'), indices


def _take(kept, k, *lists):
  """The k entries of lists that are kept."""

  def take(state):
    i, number, *outs = state
    outs = [_put(o, number, z[i]) for o, z in zip(outs, lists, strict=True)]
    return i + 1, number + kept[i].astype(jnp.int32), *outs

  # What is not kept is written over, or in the spare place.
  outs = [jnp.zeros((k + 1,), z.dtype) for z in lists]
  start = jnp.int32(0), jnp.int32(0), *outs
  _, _, *outs = _loop(lambda s: s[0] < kept.size, take, start, kept)
  return tuple(out[:k] for out in outs)


def _take_at_once(kept, k, *lists):
  """As :func:`_take`, by a sum of what is kept before each entry."""
  place = jnp.cumsum(kept, dtype=jnp.int32) - 1
  place = jnp.where(kept, place, k)
  return tuple(
    jnp.zeros((k,), z.dtype).at[place].set(z, mode='drop') for z in lists
  )


def _choose(values, indices, number, k, size):
  """Which of the first `number` of the list are the k largest."""
  keys = magnitudes(values)
  # Those beyond are below all others.
  listed = jnp.arange(keys.size, dtype=jnp.int32) < number
  keys = jnp.where(listed, keys + jnp.ones_like(keys), jnp.zeros_like(keys))

  def mark(at, end):
    marks = _reaches(keys, indices, at, end)
    return marks, _count(marks)

  least = jnp.min(jnp.where(listed, keys, jnp.max(keys)))
  kept, _ = _search(mark, k, k, least, size, keys)
  return kept


def top_k(
  x: jax.Array, k: int, *, at_once: bool = False
) -> tuple[jax.Array, jax.Array]:
  """As :func:`reference.top_k`, in another order.

  Args:
    x: (d,), float32 or float64.
    k: 1 to d; static.
    at_once: Which form makes the lists; static.

  Returns:
    Values (k,) and indices (k,), int32.
  """
  _, room = capacity(x.size, k)
  make, take = (_list_at_once, _take_at_once) if at_once else (_list, _take)
  words, number = _mark(x, k, room)
  values, indices = make(words, x, room)
  kept = _choose(values, indices, number, k, x.size)
  return take(kept, k, values, indices)
