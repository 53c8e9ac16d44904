"""The sampler in plain JAX: what CPUs run, and what the kernels must equal."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Columns that share one range of counters; 64 calls give their 128 words.
BLOCK = 128
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Draws(NamedTuple):
  """What the chains of `n` rows did over `c` columns."""

  counts: jax.Array  # (n, c), uint16: retained steps spent at each column.
  stay: jax.Array  # (n,), int32: retained steps still at the incoming state.
  last: jax.Array  # (n,), int32: column of the last state; -1: the incoming.
  last_logit: jax.Array  # (n,), float32: logit of the last state.
  accepted: jax.Array  # (n,), int32: accepted proposals among the retained.
  peak: jax.Array  # (n,), float32: stay is 0 exactly where start < peak.


def threefry(
  key: tuple[jax.Array, jax.Array], x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds: two words for each counter (x0, x1).

  Written out in plain operations, since a kernel cannot call the generator of
  JAX, and since XLA makes one loop of it on a CPU: 1 ns a word.

  Args:
    key: two words, each (), uint32.
    x0: first half of the counters, uint32.
    x1: second half, of the same shape.

  Returns:
    Two arrays of the shape of `x0`, uint32.

  References:
    Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3,
    2011, section 4.3, https://doi.org/10.1145/2063384.2063405.
  """
  schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
  x0, x1 = x0 + schedule[0], x1 + schedule[1]
  for i in range(5):
    for r in _ROTATIONS[i % 2]:
      x0 = x0 + x1
      x1 = (x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))
      x1 = x1 ^ x0
    x0 = x0 + schedule[(i + 1) % 3]
    x1 = x1 + schedule[(i + 2) % 3] + np.uint32(i + 1)
  return x0, x1


def random_words(
  key: jax.Array, position: jax.Array, column: jax.Array
) -> jax.Array:
  """Word of each (column, row): it hangs on nothing but key, row, column.

  Args:
    key: (2,), uint32.
    position: (n,), int32: numbers of the rows, the first half of a counter.
    column: (k,), int32: column `128 b + o` takes the first word of counter
      `64 b + o` where `o < 64`, the second word of `64 b + o - 64` elsewhere.

  Returns:
    (k, n), uint32.
  """
  low = BLOCK // 2
  pair = column // BLOCK * low + column % low
  x0, x1 = jnp.broadcast_arrays(
    position.astype(jnp.uint32)[None, :], pair.astype(jnp.uint32)[:, None]
  )
  first, second = threefry((key[0], key[1]), x0, x1)
  return jnp.where((column % BLOCK < low)[:, None], first, second)


def exponential(words: jax.Array) -> jax.Array:
  """-log of the uniform in (0, 1] that the upper 24 bits of a word give."""
  upper = (words >> np.uint32(8)).astype(jnp.int32) + 1
  return -jnp.log(upper.astype(jnp.float32) * np.float32(2**-24))


def step_number(
  column: jax.Array, own: jax.Array, half: int, own_steps: bool
) -> jax.Array:
  """How many steps come before the one that proposes `column`.

  Args:
    column: int32, broadcasts against `own`.
    own: int32: the first of the row's own two columns.
    half: from one own column to the other.
    own_steps: whether own columns take a step too.

  Returns:
    int32, of the shape to which both broadcast.
  """
  if own_steps:
    return column + jnp.zeros_like(own)
  after = (column > own).astype(jnp.int32)
  return column - after - (column > own + half).astype(jnp.int32)


def dwell(step: jax.Array, following: jax.Array, discard: int) -> jax.Array:
  """Retained steps from one acceptance to the one that follows it."""
  return jnp.maximum(following - jnp.maximum(step, discard), 0)


class _Rows(NamedTuple):
  """The rows and what proposes to them, each once per call."""

  key: jax.Array  # (2,), uint32.
  rows: jax.Array  # (n, d).
  position: jax.Array  # (n,), int32.
  beta: jax.Array  # (), float32.
  half: int
  own_steps: bool

  @property
  def own(self) -> jax.Array:
    return self.position % self.half

  def steps(self, column: jax.Array) -> jax.Array:
    """(k, n), int32, for columns (k, 1)."""
    return step_number(column, self.own[None, :], self.half, self.own_steps)

  def propose(
    self, columns: jax.Array, column: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Logits and their perturbed values, each (k, n), of k columns."""
    exact = None if columns.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    logit = self.beta * jax.lax.dot_general(
      columns,
      self.rows,
      (((1,), (1,)), ((), ())),
      precision=exact,
      preferred_element_type=jnp.float32,
    )
    high = logit + exponential(random_words(self.key, self.position, column))
    apart = column[:, None] - self.own[None, :]
    mine = (apart == 0) | (apart == self.half)
    return logit, jnp.where(mine, -jnp.inf, high)


def sequential(
  key: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  position: jax.Array,
  start: jax.Array,
  beta: jax.Array,
  *,
  discard: int,
  own_steps: bool,
) -> Draws:
  """Walks the columns one by one, all rows at once: the fastest on a CPU.

  Logits are made for 128 columns at a time and lie transposed, so that a step
  reads one contiguous row and nothing of size (c, n) but flags is kept. See
  :func:`emc2.kernels.metropolis.metropolis` for the arguments.
  """
  c = columns.shape[0]
  chains = _Rows(key, rows, position, beta, c // 2, own_steps)
  total = c if own_steps else c - 2
  number = jnp.arange(c, dtype=jnp.int32)

  def visit(logit, proposal):
    l, h = proposal
    accept = logit < h
    return jnp.where(accept, l, logit), accept

  def block(carry, xs):
    logit, last, accepted, peak = carry
    columns, number = xs
    l, h = chains.propose(columns, number)
    logit, accept = jax.lax.scan(visit, logit, (l, h))
    step = chains.steps(number[:, None])
    at = jnp.max(jnp.where(accept, number[:, None], -1), axis=0)
    retained = (accept & (step >= discard)).astype(jnp.int32)
    top = jnp.max(jnp.where(step <= discard, h, -jnp.inf), axis=0)
    carry = (
      logit,
      jnp.maximum(last, at),
      accepted + jnp.sum(retained, axis=0, dtype=jnp.int32),
      jnp.maximum(peak, top),
    )
    return carry, accept

  none = jnp.zeros_like(position)
  carry = start, none - 1, none, jnp.full_like(start, -jnp.inf)
  whole = c // BLOCK * BLOCK
  accept = []
  if whole:
    split = lambda x: x[:whole].reshape(-1, BLOCK, *x.shape[1:])
    carry, flags = jax.lax.scan(block, carry, (split(columns), split(number)))
    accept.append(flags.reshape(whole, -1))
  if whole < c:
    carry, flags = block(carry, (columns[whole:], number[whole:]))
    accept.append(flags)
  last_logit, last, accepted, peak = carry

  def revisit(following, xs):
    accept, number = xs
    step = step_number(number, chains.own, chains.half, own_steps)
    count = jnp.where(accept, dwell(step, following, discard), 0)
    return jnp.where(accept, step, following), count.astype(jnp.uint16)

  # A column holds the state until the next acceptance: backwards, its count is
  # known when it is reached, and nothing is scattered.
  first, counts = jax.lax.scan(
    revisit, none + total, (jnp.concatenate(accept), number), reverse=True
  )
  stay = jnp.maximum(first - discard, 0)
  return Draws(counts.T, stay, last, last_logit, accepted, peak)


def combine(
  early: tuple[jax.Array, jax.Array], late: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  r"""Joins two stretches of a chain, each (h, l): associative and exact.

  A stretch accepts some incoming state of logit :math:`x` when :math:`x < h`,
  and then leaves logit :math:`l`. For the two together,

  .. math::
    (h_1, l_1) \circ (h_2, l_2) = \begin{cases}
      (h_2, l_2) & h_2 > h_1 \\
      (h_1, l_2) & l_1 < h_2 \le h_1 \\
      (h_1, l_1) & \text{else.}
    \end{cases}

  Examples:
    >>> early = jnp.array(2.0), jnp.array(0.5)
    >>> late = jnp.array(1.0), jnp.array(0.25)
    >>> high, logit = combine(early, late)
    >>> float(high), float(logit)
    (2.0, 0.25)
  """
  (h1, l1), (h2, l2) = early, late
  moved = (h2 > h1) | (l1 < h2)
  return jnp.maximum(h1, h2), jnp.where(moved, l2, l1)


def walk(
  logit: jax.Array, high: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Walks chains past given proposals in a depth that grows as log k.

  Args:
    logit: (k, n), float32: of the proposals, in order.
    high: (k, n): the logits that they beat, i.e. `logit - log u`.
    start: (n,): logits of the incoming states, -inf for none.

  Returns:
    Which proposals are accepted, and the logit after each step; both (k, n).
  """
  top, held = jax.lax.associative_scan(combine, (high, logit), axis=0)
  after = jnp.where(start[None, :] < top, held, start[None, :])
  before = jnp.concatenate([start[None, :], after[:-1]])
  return before < high, after


def hold(
  accept: jax.Array, step: jax.Array, total: int, discard: int
) -> tuple[jax.Array, jax.Array]:
  """Counts the retained steps for which each accepted state is held.

  Args:
    accept: (k, n), bool.
    step: (k, n) or (k, 1), int32, not falling: the steps of the proposals.
    total: steps of the whole walk.
    discard: steps at its begin that do not count.

  Returns:
    (k, n), int32; and the first accepted step of each chain, `total` if none.
  """
  ahead = jnp.where(accept, step, total)
  ahead = jax.lax.cummin(ahead, axis=0, reverse=True)
  end = jnp.full_like(ahead[:1], total)
  following = jnp.concatenate([ahead[1:], end])
  return jnp.where(accept, dwell(step, following, discard), 0), ahead[0]


def associative(
  key: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  position: jax.Array,
  start: jax.Array,
  beta: jax.Array,
  *,
  discard: int,
  own_steps: bool,
) -> Draws:
  """The same chains, bit for bit, in a number of passes that grows as log c.

  What XLA runs on an accelerator where no kernel fits. See
  :func:`emc2.kernels.metropolis.metropolis` for the arguments.
  """
  c = columns.shape[0]
  chains = _Rows(key, rows, position, beta, c // 2, own_steps)
  total = c if own_steps else c - 2
  number = jnp.arange(c, dtype=jnp.int32)
  l, h = chains.propose(columns, number)
  accept, after = walk(l, h, start)
  step = chains.steps(number[:, None])
  counts, first = hold(accept, step, total, discard)
  retained = (accept & (step >= discard)).astype(jnp.int32)
  return Draws(
    counts=counts.astype(jnp.uint16).T,
    stay=jnp.maximum(first - discard, 0),
    last=jnp.max(jnp.where(accept, number[:, None], -1), axis=0),
    last_logit=after[-1],
    accepted=jnp.sum(retained, axis=0, dtype=jnp.int32),
    peak=jnp.max(jnp.where(step <= discard, h, -jnp.inf), axis=0),
  )


def by_platform(
  *args: jax.Array, others: dict[str, Callable[..., Draws]], **settings
) -> Draws:
  """Chooses when lowering: `others` by platform, else what XLA does best."""
  branches = {
    name: functools.partial(fn, **settings) for name, fn in others.items()
  }
  return jax.lax.platform_dependent(
    *args,
    cpu=functools.partial(sequential, **settings),
    default=functools.partial(associative, **settings),
    **branches,
  )
