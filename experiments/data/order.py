"""Which samples make which batch: shuffled epochs as a pure function of step.

Nothing is carried or stored, so a run resumes at any step, a loader on the
host and a step on the device agree, and so does any number of processes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: spreads small integers.


def steps_per_epoch(num_samples: int, batch_size: int) -> int:
  """How many whole batches an epoch has; the rest of it is dropped.

  Args:
    num_samples: m, below 2**31.
    batch_size: Of all processes together.

  Returns:
    At least 1.

  Raises:
    ValueError: If not even one batch fits.

  Examples:
    >>> steps_per_epoch(1437, 4)
    359
  """
  if not 1 <= batch_size <= num_samples:
    raise ValueError(
      'batch_size must lie between 1 and the number of samples, '
      f'{num_samples}, got {batch_size}.'
    )
  if num_samples >= 2**31:
    raise ValueError(f'num_samples must be below 2**31, got {num_samples}.')
  return num_samples // batch_size


def batch_indices(
  seed: jax.typing.ArrayLike,
  step: jax.typing.ArrayLike,
  *,
  num_samples: int,
  batch_size: int,
  shard_index: int = 0,
  num_shards: int = 1,
) -> jax.Array | np.ndarray:
  r"""The samples of one batch, all distinct.

  Every epoch has its own permutation of all samples, cut into batches; the
  remainder is dropped. The permutation is a cipher on :math:`\{0..m-1\}`, the
  swap-or-not shuffle: round :math:`r` pairs :math:`x` with
  :math:`x' = K_r - x \bmod m` and takes :math:`x'` if a random bit of the pair
  says so. An entry costs :math:`6 \lceil \log_2 m \rceil` rounds and needs no
  other entry.

  Args:
    seed: (), uint32.
    step: (), int32: batches drawn before, over all epochs. A `jax.Array` is
      computed under JAX (also in `jit`, `vmap` and `scan`), a number in NumPy.
    num_samples: m, static.
    batch_size: Of all shards together, static.
    shard_index: Which part of the batch to give, static; the parts in order
      make the whole batch.
    num_shards: In how many equal parts the batch is cut, static.

  Returns:
    (batch_size / num_shards,) int32, the same numbers from JAX and NumPy.

  Raises:
    ValueError: If the sizes do not fit.

  Examples:
    >>> batch_indices(0, 7, num_samples=100, batch_size=4).tolist()
    [15, 73, 27, 34]
    >>> step = jnp.int32(7)
    >>> batch_indices(0, step, num_samples=100, batch_size=4).tolist()
    [15, 73, 27, 34]

  References:
    Hoang, Morris, Rogaway, "An Enciphering Scheme Based on a Card Shuffle",
    2012, the shuffle and its bound for non-adaptive queries,
    https://arxiv.org/abs/1208.1176
  """
  epoch_size = steps_per_epoch(num_samples, batch_size)
  if batch_size % num_shards:
    raise ValueError(
      f'batch_size must be a multiple of num_shards, {num_shards}, got '
      f'{batch_size}.'
    )
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f'shard_index must lie in [0, {num_shards}), got {shard_index}.'
    )
  on_device = isinstance(step, jax.Array) or isinstance(seed, jax.Array)
  xp, loop = (jnp, jax.lax.fori_loop) if on_device else (np, _loop)
  epoch, rest = divmod(xp.asarray(step), epoch_size)
  part = batch_size // num_shards
  offset = np.arange(part, dtype=np.uint32) + np.uint32(part * shard_index)
  position = rest.astype(np.uint32) * np.uint32(batch_size) + offset
  key = _mix(xp.asarray(seed, np.uint32).reshape(1))
  key = _mix(key ^ epoch.astype(np.uint32))
  shuffled = _shuffle(key, position, num_samples, xp, loop)
  return shuffled.astype(np.int32)


def _shuffle(key, position, num_samples, xp: Any, loop: Callable):
  """Swap-or-not of position (n,) in [0, m) under key (1,), all uint32."""
  size = np.uint32(num_samples)
  # After r rounds the law of q entries is within
  # 4 m^1.5 / (r + 2) ((q + m) / 2m)^(r/2 + 1) of uniform in total variation;
  # for a batch, q << m, this r makes that less than m^-1.5.
  num_rounds = 6 * max(1, math.ceil(math.log2(num_samples)))
  salt = _mix(key + np.arange(1, num_rounds + 1, dtype=np.uint32) * _GOLDEN)
  mirror = salt % size + size
  salt = _mix(salt + _GOLDEN)

  def swap_or_not(r, x):
    partner = (mirror[r] - x) % size
    bit = _mix(xp.maximum(x, partner) ^ salt[r]) & np.uint32(1)
    return xp.where(bit == 1, partner, x)

  return loop(0, num_rounds, swap_or_not, position)


def _mix(x):
  """The finaliser of MurmurHash3 (Appleby): a bijection that avalanches."""
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def _loop(start, stop, body, carry):
  """`jax.lax.fori_loop` for NumPy."""
  for i in range(start, stop):
    carry = body(i, carry)
  return carry
