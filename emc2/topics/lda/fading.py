"""Sums by word that fade as those of newer minibatches come in.

Online methods share them, with the state that they make up.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh as mesh_lib

Schedule = Callable[[jax.Array], jax.Array]

_LEAST_SCALE = 1e-6
"""Below it the scale is multiplied into the rows, in a pass over all of them.

At steps of 1/50 that is each 700th.
"""


class Fading(NamedTuple):
  """A table (V, K) that fades as a whole and grows by few rows.

  It is `scale * rows`, so that a minibatch does not touch the words that it
  does not hold.
  """

  rows: jax.Array  # (V, K).
  scale: jax.Array  # (), in (0, 1].


class State(NamedTuple):
  """What an online method knows of the topics."""

  words: Fading  # (V, K): tokens by topic, without the prior.
  totals: jax.Array  # (K,): their sums over all words.
  count: jax.Array  # (), int32: finished steps.


def start(word_sums: jax.typing.ArrayLike) -> State:
  """The state before the first step, from sums (V, K)."""
  word_sums = jnp.asarray(word_sums)
  return State(
    words=make(word_sums),
    totals=jnp.sum(word_sums, 0),
    count=jnp.zeros([], jnp.int32),
  )


def word_sums(state: State) -> jax.Array:
  """The topics, (V, K): lambda - eta."""
  return value(state.words)


def shardings(mesh: jax.sharding.Mesh) -> State:
  """How a state lies on a mesh: by word over `fsdp`, where the mesh has it.

  Otherwise everywhere the same. A batch is split over `data`.
  """
  spec = jax.sharding.PartitionSpec
  split = spec(mesh_lib.FSDP) if mesh_lib.FSDP in mesh.shape else spec()
  return State(words=Fading(split, spec()), totals=spec(), count=spec())


def make(table: jax.Array) -> Fading:
  """Takes a table (V, K)."""
  return Fading(table, jnp.ones([], table.dtype))


def value(fading: Fading) -> jax.Array:
  """The table (V, K)."""
  return fading.rows * fading.scale


def take(fading: Fading, ids: jax.Array) -> jax.Array:
  """Rows (..., K) of the table at ids (...)."""
  rows = fading.rows.at[ids].get(mode='promise_in_bounds')
  return rows * fading.scale


def mix(
  fading: Fading, rate: jax.Array, ids: jax.Array, updates: jax.Array
) -> Fading:
  """`(1 - rate)` times the table, plus `rate` times rows added up by id.

  Args:
    fading: The table.
    rate: (), in [0, 1].
    ids: (...), the rows that `updates` belong to; they may repeat.
    updates: (..., K).

  Returns:
    The new table.
  """
  rows, scale = fading.rows, (1 - rate) * fading.scale
  rows, scale = jax.lax.cond(
    scale < _LEAST_SCALE,
    lambda rows, scale: (rows * scale, jnp.ones_like(scale)),
    lambda rows, scale: (rows, scale),
    rows,
    scale,
  )
  updates = updates * (rate / scale)
  return Fading(rows.at[ids].add(updates, mode='promise_in_bounds'), scale)


def power(
  exponent: float = 0.7, delay: float = 64.0, scale: float = 1.0
) -> Schedule:
  r"""The schedule :math:`\rho_t = s (\tau_0 + t)^{-\kappa}`.

  Args:
    exponent: :math:`\kappa` in (0.5, 1].
    delay: :math:`\tau_0`, at least 1.
    scale: s, such that no rate is above 1.

  Returns:
    A function of the number of finished steps.

  Raises:
    ValueError: If an argument is out of its range.
  """
  if not 0.5 < exponent <= 1:
    raise ValueError(f'exponent must lie in (0.5, 1], got {exponent}.')
  if not 1 <= delay < math.inf:
    raise ValueError(f'delay must be finite and at least 1, got {delay}.')
  if not 0 < scale <= delay**exponent:
    raise ValueError(
      f'scale must lie in (0, delay**exponent], {delay**exponent}, got {scale}.'
    )
  return lambda count: scale * (delay + count) ** -exponent


def rate(step_size: float | Schedule, count: jax.Array, like: jax.Array):
  """The rate (), in the dtype of `like`, after `count` finished steps."""
  if callable(step_size):
    step_size = step_size(count.astype(like.dtype))
  return jnp.asarray(step_size, like.dtype)


def check_step_size(name: str, step_size: float | Schedule) -> None:
  """Refuses a constant rate outside of (0, 1]."""
  if not callable(step_size) and not 0 < step_size <= 1:
    raise ValueError(f'{name} must lie in (0, 1], got {step_size}.')
