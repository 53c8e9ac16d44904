"""One pass of a method by different means, all with the same result.

All take and give global arrays. Of P workers and Q blocks, `residents` has a
leading axis of P, `blocks` of Q, and `kept` both.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.ring import schedules
from emc2.ring.rotate import Rotation, rotate


def virtual(
  rotations: Sequence[Rotation],
  residents: Any,
  kept: Any,
  blocks: Any,
  *,
  schedule: schedules.Schedule | None = None,
) -> tuple[Any, Any, Any]:
  """A pass of P virtual workers on one device, all visits of a time at once.

  Args:
    rotations: What the pass consists of.
    residents: Leaves (P, ...).
    kept: Leaves (P, Q, ...).
    blocks: Leaves (Q, ...).
    schedule: Another order than the ring, for Q = P.

  Returns:
    `residents`, `kept` and `blocks` afterwards.

  Raises:
    ValueError: If the leading axes do not fit.
  """
  width, here = check_axes(residents, kept, blocks)
  if width == 1:
    own = lambda tree: jax.tree.map(lambda x: x[0], tree)
    found = _pass(rotations, own(residents), own(kept), blocks, None, schedule)
    add = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return add(found[0]), add(found[1]), found[2]
  split = lambda x: x.reshape(width, here, *x.shape[1:])
  join = lambda x: x.reshape(width * here, *x.shape[2:])

  def run(resident, kept, blocks):
    return _pass(rotations, resident, kept, blocks, mesh_lib.RING, schedule)

  residents, kept, blocks = jax.vmap(run, axis_name=mesh_lib.RING)(
    residents, kept, jax.tree.map(split, blocks)
  )
  return residents, kept, jax.tree.map(join, blocks)


def on_mesh(
  rotations: Sequence[Rotation],
  residents: Any,
  kept: Any,
  blocks: Any,
  mesh: jax.sharding.Mesh,
  *,
  schedule: schedules.Schedule | None = None,
) -> tuple[Any, Any, Any]:
  """A pass of one worker on each device of the axis `ring` of a mesh.

  The only collective is the permutation that passes blocks on.

  Args:
    rotations: What the pass consists of.
    residents: Leaves (P, ...), split over the ring.
    kept: Leaves (P, Q, ...), split over the ring.
    blocks: Leaves (Q, ...), split over the ring.
    mesh: Has the axis `ring`, of P devices.
    schedule: Another order than the ring, for Q = P.

  Returns:
    `residents`, `kept` and `blocks` afterwards.

  Raises:
    ValueError: If the leading axes do not fit, or P is not the mesh's.
  """
  width, _ = check_axes(residents, kept, blocks)
  if mesh.shape[mesh_lib.RING] != width:
    raise ValueError(
      f'mesh must have a ring of {width} devices, one for each worker, got '
      f'{mesh.shape[mesh_lib.RING]}.'
    )

  def run(residents, kept, blocks):
    own = lambda tree: jax.tree.map(lambda x: x[0], tree)
    found = _pass(
      rotations, own(residents), own(kept), blocks, mesh_lib.RING, schedule
    )
    add = lambda tree: jax.tree.map(lambda x: x[None], tree)
    return add(found[0]), add(found[1]), found[2]

  spec = jax.sharding.PartitionSpec(mesh_lib.RING)
  run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
  return run(residents, kept, blocks)


def run(
  rotations: Sequence[Rotation],
  residents: Any,
  kept: Any,
  blocks: Any,
  mesh: jax.sharding.Mesh | None = None,
  *,
  schedule: schedules.Schedule | None = None,
) -> tuple[Any, Any, Any]:
  """A pass :func:`on_mesh`, or :func:`virtual` where there is none."""
  given = rotations, residents, kept, blocks
  if mesh is None:
    return virtual(*given, schedule=schedule)
  return on_mesh(*given, mesh, schedule=schedule)


def serial(
  rotations: Sequence[Rotation],
  residents: Any,
  kept: Any,
  blocks: Any,
  *,
  numbers: np.ndarray | None = None,
) -> tuple[Any, Any, Any]:
  """A pass visit by visit: of each time, worker after worker.

  Args:
    rotations: What the pass consists of.
    residents: Leaves (P, ...).
    kept: Leaves (P, Q, ...).
    blocks: Leaves (Q, ...).
    numbers: (Q, P), the block of each worker at each visit; the ring's by
      default.

  Returns:
    `residents`, `kept` and `blocks` afterwards.

  Raises:
    ValueError: If the leading axes do not fit.
  """
  width, here = check_axes(residents, kept, blocks)
  if numbers is None:
    numbers = schedules.travel(width, here)
  numbers = np.tile(np.asarray(numbers), (len(rotations), 1))
  workers = np.broadcast_to(np.arange(width), numbers.shape)
  return replay(
    rotations, residents, kept, blocks, workers.ravel(), numbers.ravel()
  )


def replay(
  rotations: Sequence[Rotation],
  residents: Any,
  kept: Any,
  blocks: Any,
  workers: jax.typing.ArrayLike,
  numbers: jax.typing.ArrayLike,
) -> tuple[Any, Any, Any]:
  """Any visits in any order, for instance those of a simulated run.

  Each worker finishes a rotation by itself after Q visits, whichever blocks
  they were of; methods that count on seeing each block once are then wrong, as
  they would be in the run.

  Args:
    rotations: What a pass consists of.
    residents: Leaves (P, ...).
    kept: Leaves (P, Q, ...).
    blocks: Leaves (Q, ...).
    workers: (T,), the worker of each visit.
    numbers: (T,), the block of each.

  Returns:
    `residents`, `kept` and `blocks` afterwards.

  Raises:
    ValueError: If the leading axes do not fit, or a known number is out of
      range.
  """
  width, here = check_axes(residents, kept, blocks)
  total = width * here
  for name, values, limit in (
    ('workers', workers, width),
    ('numbers', numbers, total),
  ):
    if isinstance(values, jax.core.Tracer) or not np.size(values):
      continue
    values = np.asarray(values)
    if not 0 <= values.min() <= values.max() < limit:
      raise ValueError(
        f'{name} must lie in [0, {limit}), got {values.min()} to '
        f'{values.max()}.'
      )
  visits = [rotation.visit for rotation in rotations]
  # After its last visit of a rotation a worker finishes; else it does nothing.
  finishes = [lambda x: x] + [rotation.finish for rotation in rotations]

  def body(carry, event):
    residents, kept, blocks, counts = carry
    worker, number = event
    resident = jax.tree.map(lambda x: x[worker], residents)
    own = jax.tree.map(lambda x: x[worker, number], kept)
    block = jax.tree.map(lambda x: x[number], blocks)
    count = counts[worker]
    stage = count // total % len(rotations)
    given = resident, own, block, number
    if len(visits) == 1:
      resident, own, block = visits[0](*given)
    else:
      resident, own, block = jax.lax.switch(stage, visits, *given)
    ends = (count + 1) % total == 0
    choice = jnp.where(ends, stage + 1, 0)
    resident = jax.lax.switch(choice, finishes, resident)
    put = lambda x, y: x.at[worker].set(y)
    residents = jax.tree.map(put, residents, resident)
    kept = jax.tree.map(lambda x, y: x.at[worker, number].set(y), kept, own)
    blocks = jax.tree.map(lambda x, y: x.at[number].set(y), blocks, block)
    return (residents, kept, blocks, put(counts, count + 1)), None

  events = jnp.asarray(workers, jnp.int32), jnp.asarray(numbers, jnp.int32)
  carry = residents, kept, blocks, jnp.zeros(width, jnp.int32)
  return jax.lax.scan(body, carry, events)[0][:3]


def check_axes(residents: Any, kept: Any, blocks: Any) -> tuple[int, int]:
  """Refuses global arrays whose leading axes do not fit.

  Returns:
    P, and the blocks of each worker.

  Raises:
    ValueError: If there is no block or resident, or an axis does not fit.
  """
  sizes = {}
  for name, tree in (('residents', residents), ('blocks', blocks)):
    leading = {x.shape[:1] for x in jax.tree.leaves(tree)}
    if len(leading) != 1 or leading == {()}:
      raise ValueError(
        f'{name} must have one leading axis, the same of all leaves, got '
        f'{sorted(leading)}.'
      )
    sizes[name] = leading.pop()[0]
  width, total = sizes['residents'], sizes['blocks']
  if total % width:
    raise ValueError(
      f'blocks must be a multiple of the {width} workers, got {total}.'
    )
  for leaf in jax.tree.leaves(kept):
    if leaf.shape[:2] != (width, total):
      raise ValueError(
        f'kept must have leading axes ({width}, {total}), got {leaf.shape}.'
      )
  return width, total // width


def _pass(rotations, resident, kept, blocks, axis_name, schedule):
  for rotation in rotations:
    resident, kept, blocks = rotate(
      rotation.visit,
      resident,
      kept,
      blocks,
      axis_name=axis_name,
      schedule=schedule,
    )
    resident = rotation.finish(resident)
  return resident, kept, blocks
