"""Blocks go round a ring of devices; each device visits every block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def rotate(
  visit: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
  resident: Any,
  blocks: Any,
  *,
  axis_name: str | None = None,
) -> tuple[Any, Any]:
  r"""Takes every block round the ring once, back to where it started.

  A ring of :math:`W` devices holds :math:`B = W m` blocks, of which device
  :math:`i` starts with :math:`i m, \dots, i m + m - 1`. At visit
  :math:`t = 0, \dots, B - 1` it works on block
  :math:`((i + \lfloor t / m \rfloor) \bmod W) m + t \bmod m`, so no two devices
  ever hold the same block, and passes it on to device :math:`i - 1`. With
  :math:`m \ge 2` a block travels while the next one is worked on.

  Args:
    visit: `(resident, block, number) -> (resident, block)`; `number` (), int32,
      is the block's, from 0 to B - 1.
    resident: Pytree that stays on its device.
    blocks: Pytree whose leaves have a leading axis of the m blocks that are
      here.
    axis_name: The mesh axis of the ring, inside `jax.shard_map`; None for a
      ring of one device.

  Returns:
    The resident tree and the blocks after B visits.
  """
  here = jax.tree.leaves(blocks)[0].shape[0]
  width = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  position = 0 if axis_name is None else jax.lax.axis_index(axis_name)
  overlaps = width > 1 and here > 1

  def pass_on(block):
    if width == 1:
      return block
    routes = [(i, (i - 1) % width) for i in range(width)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, routes), block)

  def body(carry, visit_number):
    resident, blocks, leaving = carry
    slot = visit_number % here
    owner = (position + visit_number // here) % width
    block = _read(blocks, slot)
    if overlaps:  # Neither needs the other, so they run at once.
      arrived = pass_on(leaving)
      previous = jnp.maximum(slot - 1, 0)
      previous = jnp.where(slot == 0, here - 1, previous)
      kept = _read(blocks, previous)
      first = visit_number == 0
      arrived = jax.tree.map(
        lambda old, new: jnp.where(first, old, new), kept, arrived
      )
      resident, done = visit(resident, block, owner * here + slot)
      return (resident, _write(blocks, arrived, previous), done), None
    resident, done = visit(resident, block, owner * here + slot)
    return (resident, _write(blocks, pass_on(done), slot), leaving), None

  leaving = _read(blocks, 0) if overlaps else ()
  visits = jnp.arange(width * here, dtype=jnp.int32)
  carry, _ = jax.lax.scan(body, (resident, blocks, leaving), visits)
  resident, blocks, leaving = carry
  if overlaps:
    blocks = _write(blocks, pass_on(leaving), here - 1)
  return resident, blocks


def _read(blocks, slot):
  read = jax.lax.dynamic_index_in_dim
  return jax.tree.map(lambda x: read(x, slot, keepdims=False), blocks)


def _write(blocks, block, slot):
  write = jax.lax.dynamic_update_index_in_dim
  return jax.tree.map(lambda x, y: write(x, y, slot, 0), blocks, block)
