"""Blocks go round a ring of devices; each device visits every block."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2.ring import schedules


class Rotation(NamedTuple):
  """What a method does while its blocks go round once.

  Attributes:
    visit: `(resident, own, block, number) -> (resident, own, block)`, as
      :func:`rotate` takes it.
    finish: `resident -> resident`, of each worker by itself, after its last
      visit.
  """

  visit: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Any]]
  finish: Callable[[Any], Any]


def rotate(
  visit: Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Any]],
  resident: Any,
  kept: Any,
  blocks: Any,
  *,
  axis_name: str | None = None,
  schedule: schedules.Schedule | None = None,
) -> tuple[Any, Any, Any]:
  r"""Takes every block round the ring once, back to where it started.

  A ring of :math:`W` devices holds :math:`B = W m` blocks, of which device
  :math:`i` starts with :math:`i m, \dots, i m + m - 1`. At visit
  :math:`t = 0, \dots, B - 1` it works on block
  :math:`((i + \lfloor t / m \rfloor) \bmod W) m + t \bmod m`, so no two devices
  ever hold the same block, and passes it on to device :math:`i - 1`. With
  :math:`m \ge 2` a block travels while the next one is worked on.

  Args:
    visit: `(resident, own, block, number) -> (resident, own, block)`; `number`
      (), int32, is the block's, from 0 to B - 1.
    resident: Pytree that stays on its device.
    kept: Pytree that stays too, with a leading axis of B: `own` is what this
      device keeps of the block that visits it.
    blocks: Pytree whose leaves have a leading axis of the m blocks that are
      here.
    axis_name: The mesh axis of the ring, inside `jax.shard_map`, or an axis of
      `jax.vmap`; None for a ring of one device.
    schedule: Another order, for one block on each device.

  Returns:
    `resident`, `kept` and `blocks` after B visits.

  Raises:
    ValueError: If a schedule does not fit.

  Examples:
    >>> def visit(total, own, block, number):
    ...   return total + block, block, 2 * block
    >>> total, kept, blocks = rotate(
    ...     visit, jnp.float32(0), jnp.zeros(3), jnp.arange(3.0))
    >>> total, kept
    (Array(3., dtype=float32), Array([0., 1., 2.], dtype=float32))
    >>> blocks
    Array([0., 2., 4.], dtype=float32)
  """
  here = jax.tree.leaves(blocks)[0].shape[0]
  width = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  position = 0 if axis_name is None else jax.lax.axis_index(axis_name)
  if schedule is not None:
    if here != 1 or schedule.numbers.shape != (width, width):
      raise ValueError(
        f'schedule must be of {width} workers with one block each, got '
        f'{schedule.numbers.shape[-1]} workers and {here} blocks on each.'
      )
    return _follow(visit, resident, kept, blocks, axis_name, schedule)
  if width == here == 1:  # No loop, whose carry would be copied.
    number = jnp.zeros([], jnp.int32)
    own, block = _read(kept, 0), _read(blocks, 0)
    resident, own, block = visit(resident, own, block, number)
    add = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return resident, add(own), add(block)
  overlaps = width > 1 and here > 1
  routes = [(i, (i - 1) % width) for i in range(width)]

  def pass_on(block):
    if width == 1:
      return block
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, routes), block)

  def number_of(visit_number):
    owner = (position + visit_number // here) % width
    return owner * here + visit_number % here

  # What a visit needs is read right after its predecessor wrote: a read that
  # others still wanted at the next write would make XLA copy the whole.
  def body(carry, visit_number):
    resident, kept, blocks, own, block, leaving = carry
    number, slot = number_of(visit_number), visit_number % here
    if overlaps:  # Neither needs the other, so they run at once.
      arrived, place = pass_on(leaving), (slot - 1) % here
      resident, own, leaving = visit(resident, own, block, number)
      first = visit_number == 0
      last = jax.tree.map(lambda x: x[-1], blocks)
      arrived = jax.tree.map(lambda x, y: jnp.where(first, x, y), last, arrived)
    else:
      resident, own, block = visit(resident, own, block, number)
      arrived, place = pass_on(block), slot
    kept, blocks = _write(kept, own, number), _write(blocks, arrived, place)
    following = (visit_number + 1) % (width * here)
    own = _read(kept, number_of(following))
    block = _read(blocks, following % here)
    return (resident, kept, blocks, own, block, leaving), None

  own, block = _read(kept, number_of(0)), _read(blocks, 0)
  leaving = jax.tree.map(jnp.zeros_like, block) if overlaps else ()
  carry = resident, kept, blocks, own, block, leaving
  visits = jnp.arange(width * here, dtype=jnp.int32)
  resident, kept, blocks, _, _, leaving = jax.lax.scan(body, carry, visits)[0]
  if overlaps:
    blocks = _write(blocks, pass_on(leaving), here - 1)
  return resident, kept, blocks


def _follow(visit, resident, kept, blocks, axis_name, schedule):
  """Takes blocks along the routes of a schedule."""
  position = 0 if axis_name is None else jax.lax.axis_index(axis_name)

  def send(route, tree):
    pairs = list(enumerate(route))
    if all(source == target for source, target in pairs):
      return tree
    shift = lambda x: jax.lax.ppermute(x, axis_name, pairs)
    return jax.tree.map(shift, tree)

  branches = [functools.partial(send, route) for route in schedule.routes]

  def pass_on(block, choice):
    if len(branches) == 1:
      return branches[0](block)
    return jax.lax.switch(choice, branches, block)

  def body(carry, now):
    resident, kept, block = carry
    row, choice = now
    number = row[position]
    own = _read(kept, number)
    resident, own, block = visit(resident, own, block, number)
    kept = _write(kept, own, number)
    return (resident, kept, pass_on(block, choice)), None

  choices = jnp.asarray(schedule.choices)
  numbers = jnp.asarray(schedule.numbers)
  block = pass_on(_read(blocks, 0), choices[0])
  carry, _ = jax.lax.scan(body, (resident, kept, block), (numbers, choices[1:]))
  resident, kept, block = carry
  return resident, kept, jax.tree.map(lambda x: x[None], block)


def _read(tree, place):
  read = jax.lax.dynamic_index_in_dim
  return jax.tree.map(lambda x: read(x, place, keepdims=False), tree)


def _write(tree, entry, place):
  write = jax.lax.dynamic_update_index_in_dim
  return jax.tree.map(lambda x, y: write(x, y, place, 0), tree, entry)
