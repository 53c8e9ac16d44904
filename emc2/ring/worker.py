"""The visits of one worker, however blocks reach it."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emc2.ring.rotate import Rotation


class Failure(Exception):
  """A worker that cannot go on.

  Attributes:
    count: How many visits it had done.
    number: The block of the visit that failed.
    error: What was raised.
  """

  def __init__(self, count: int, number: int, error: Exception):
    super().__init__(count, number, error)
    self.count, self.number, self.error = count, number, error


class Stopped(Exception):
  """The worker must end because another has failed."""


def work(
  rotations: Sequence[Rotation],
  resident: Any,
  own: list[Any],
  *,
  worker: int,
  here: int,
  num_passes: int,
  ahead: int,
  device: jax.Device,
  pause: Callable[[int], None],
  take: Callable[[int], tuple[int, Any]],
  send: Callable[[int, int, Any], None],
) -> tuple[Any, list[Any]]:
  """Makes all visits of a worker, each as soon as its block is there.

  The memory of the resident, of what is kept and of the blocks is used again:
  no one else may hold them.

  Args:
    rotations: What a pass consists of.
    resident: The worker's, on `device`.
    own: What it keeps of each of the Q blocks; changed in place.
    worker: Which it is.
    here: How many blocks start with it.
    num_passes: At least 0.
    ahead: How many visits may be dispatched and not yet done, at least 1.
    device: Where all of it is.
    pause: Called before a visit with its count.
    take: Of the count, the next block, on `device`, and its number.
    send: Passes a block on; of the count, the block's number and the block.

  Returns:
    `resident` and `own` afterwards.

  Raises:
    Failure: If a visit fails, or what belongs to it.
    Stopped: If `pause`, `take` or `send` raises it and no visit failed.
  """
  total = len(own)
  names = [jax.device_put(np.int32(number), device) for number in range(total)]
  pending = collections.deque()

  def settle(limit):
    while len(pending) > limit:
      count, number, mark = pending[0]
      try:
        mark.block_until_ready()
      except Exception as error:  # Whatever a device or a callback raises.
        raise Failure(count, number, error) from error
      pending.popleft()

  for count in range(num_passes * len(rotations) * total):
    rotation = rotations[count // total % len(rotations)]
    number = (worker * here + count) % total
    settle(ahead - 1)
    try:
      arrived, block = take(count)
      if arrived != number:
        raise ValueError(f'block {arrived} came for block {number}.')
      pause(count)
      resident, own[number], block, mark = _visit(
        rotation.visit, resident, own[number], block, names[number]
      )
      pending.append((count, number, mark))
      send(count, number, block)
      if (count + 1) % total == 0:
        resident = _finish(rotation.finish, resident)
    except Stopped:
      settle(0)
      raise
    except Exception as error:  # Those of the caller's functions, too.
      settle(0)
      raise Failure(count, number, error) from error
  settle(0)
  return jax.block_until_ready(resident), own


def check(
  rotations: Sequence[Rotation],
  resident: Any,
  own: Any,
  block: Any,
  *,
  num_passes: int,
  ahead: int,
) -> None:
  """Refuses what no worker could do.

  Args:
    rotations: What a pass consists of.
    resident: Of one worker, shapes and types at least.
    own: What it keeps of one block.
    block: One block.
    num_passes: Any.
    ahead: Any.

  Raises:
    ValueError: If a number is out of range, there is no rotation, or a function
      changes a shape or type.
  """
  if not rotations:
    raise ValueError('rotations must hold at least one, got none.')
  if num_passes < 0:
    raise ValueError(f'num_passes must be at least 0, got {num_passes}.')
  if ahead < 1:
    raise ValueError(f'ahead must be at least 1, got {ahead}.')
  shapes = lambda *trees: jax.tree.map(_describe, trees)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  for rotation in rotations:
    given = resident, own, block
    found = _visit.eval_shape(rotation.visit, *given, number)[:3]
    if shapes(*found) != shapes(*given):
      raise ValueError(
        'visit must keep shapes and types, got from '
        f'{shapes(*given)} to {shapes(*found)}.'
      )
    found = _finish.eval_shape(rotation.finish, resident)
    if shapes(found) != shapes(resident):
      raise ValueError(
        'finish must keep shapes and types, got from '
        f'{shapes(resident)} to {shapes(found)}.'
      )


def entry(tree: Any, device: jax.Device, *place: int) -> Any:
  """One entry of the leading axes of all leaves, in memory of its own."""

  def take(leaf):
    if not isinstance(leaf, jax.Array):
      return jax.device_put(np.array(leaf[place]), device)
    if not place:
      return jax.device_put(jnp.copy(leaf), device)
    index, at = place, None
    for shard in leaf.addressable_shards:  # The worker's own, if split so.
      first, last, _ = shard.index[0].indices(leaf.shape[0])
      whole = shard.data.shape[1:] == leaf.shape[1:]
      if whole and first <= place[0] < last:
        leaf, index = shard.data, (place[0] - first, *place[1:])
        at = shard.device
        break
    index = jax.device_put(np.asarray(index, np.int32), at)
    return jax.device_put(_take(leaf, index), device)

  return jax.tree.map(take, tree)


def stack(trees: Sequence[Any]) -> Any:
  """Joins trees on a new leading axis of all leaves."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _describe(leaf):
  return f'{leaf.dtype}{list(leaf.shape)}'


@jax.jit
def _take(leaf, index):
  return leaf[tuple(index)]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3))
def _visit(visit, resident, own, block, number):
  resident, own, block = visit(resident, own, block, number)
  # The last is there to be waited for: the others are donated in their turn.
  return resident, own, block, number + 1


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _finish(finish, resident):
  return finish(resident)
