"""Workers of one process that wait for no one: a thread for each device."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp

from emc2 import mesh as mesh_lib
from emc2.ring import executors
from emc2.ring import worker as worker_lib
from emc2.ring.rotate import Rotation


def run(
  rotations: Sequence[Rotation],
  residents: Any,
  kept: Any,
  blocks: Any,
  *,
  devices: Sequence[jax.Device],
  num_passes: int = 1,
  delay: Callable[[int, int], float] | None = None,
  ahead: int = 2,
) -> tuple[Any, Any, Any]:
  """Passes of asynchronous workers, each a thread with a device of its own.

  A worker has a queue of blocks. It takes the first, dispatches its visit,
  sends the block on to the device and the queue of worker p - 1 without waiting
  for either, and goes on. Nothing is ever awaited by all: a worker finishes a
  rotation by itself after Q visits, while others may be behind or ahead.

  .. note::
    Queues and a fixed successor make a deterministic network: the visits of a
    worker, and those of a block, come in the order of `schedules.travel`
    whatever the speeds, and the result is bit by bit the same in each run.
    Asynchrony changes when, not what.

  Args:
    rotations: What a pass consists of. A function that was given before, with
      the same shapes on the same device, is not compiled again.
    residents: Leaves (P, ...).
    kept: Leaves (P, Q, ...).
    blocks: Leaves (Q, ...).
    devices: P of them, one for each worker. A device may stand there more than
      once, to try on few devices what is meant for many.
    num_passes: At least 0.
    delay: Of the worker and the count of its visit, from 0 on through all
      rotations and passes: how many seconds it does nothing before the visit.
    ahead: How many visits of a worker may be dispatched and not yet done, at
      least 1. Few may leave its device idle; many hold as many blocks in
      memory.

  Returns:
    `residents`, `kept` and `blocks` afterwards: split over the axis `ring` of
    a mesh of the devices, or on the first if one is there more than once.

  Raises:
    ValueError: If the axes do not fit one another or the devices, a number is
      out of range, or a function changes a shape or type.
    RuntimeError: If a worker fails. All have stopped then; the message names
      the worker and the block.

  Examples:
    >>> from emc2 import ring
    >>> def visit(total, own, block, number):
    ...   return total + block, block, 2 * block
    >>> rotation = ring.Rotation(visit, lambda total: total)
    >>> totals, kept, blocks = run(
    ...     [rotation], jnp.zeros(2), jnp.zeros((2, 2)), jnp.array([1.0, 10.0]),
    ...     devices=jax.devices()[:1] * 2)
    >>> totals, blocks
    (Array([21., 12.], dtype=float32), Array([ 4., 40.], dtype=float32))

  References:
    Yun et al., NOMAD: Non-locking, stOchastic Multi-machine algorithm for
    Asynchronous and Decentralized matrix completion, 2014,
    https://arxiv.org/abs/1312.0193
  """
  width, here = executors.check_axes(residents, kept, blocks)
  devices = list(devices)
  if len(devices) != width:
    raise ValueError(
      f'devices must be {width}, one for each worker, got {len(devices)}.'
    )
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)
  own = jax.eval_shape(lambda x: one(one(x)), kept)
  resident, block = jax.eval_shape(one, (residents, blocks))
  worker_lib.check(
    rotations, resident, own, block, num_passes=num_passes, ahead=ahead
  )

  queues = [queue.SimpleQueue() for _ in devices]
  starts = []
  for worker, device in enumerate(devices):
    own = [
      worker_lib.entry(kept, device, worker, q) for q in range(width * here)
    ]
    starts.append((worker_lib.entry(residents, device, worker), own))
    for number in range(worker * here, (worker + 1) * here):
      queues[worker].put((number, worker_lib.entry(blocks, device, number)))

  stopped = threading.Event()
  # A thread has none of the settings that its starter made for itself alone.
  x64 = jax.config.jax_enable_x64
  precision = jax.config.jax_default_matmul_precision

  def stop():
    stopped.set()
    for each in queues:
      each.put(None)

  def work(worker):
    resident, own = starts[worker]
    before = (worker - 1) % width

    def pause(count):
      if delay is not None and stopped.wait(delay(worker, count)):
        raise worker_lib.Stopped

    def take(count):
      del count
      token = queues[worker].get()
      if stopped.is_set():
        raise worker_lib.Stopped
      return token

    def send(count, number, block):
      del count
      queues[before].put((number, jax.device_put(block, devices[before])))

    try:
      with jax.enable_x64(x64), jax.default_matmul_precision(precision):
        return worker_lib.work(
          rotations,
          resident,
          own,
          worker=worker,
          here=here,
          num_passes=num_passes,
          ahead=ahead,
          device=devices[worker],
          pause=pause,
          take=take,
          send=send,
        )
    except BaseException:
      stop()
      raise

  with futures.ThreadPoolExecutor(width, mesh_lib.RING) as pool:
    try:
      tasks = [pool.submit(work, worker) for worker in range(width)]
      futures.wait(tasks)
    except BaseException:
      stop()
      raise
  failures = []
  for worker, task in enumerate(tasks):
    error = task.exception()
    if isinstance(error, worker_lib.Failure):
      failures.append((error.count, worker, error))
    elif error is not None and not isinstance(error, worker_lib.Stopped):
      raise error
  if failures:
    # An error spreads with the blocks; the earliest visit is where it began.
    count, worker, failure = min(failures, key=lambda x: x[:2])
    raise RuntimeError(
      f'worker {worker} failed at its visit {count}, of block '
      f'{failure.number}: {failure.error}'
    ) from failure.error
  stack = worker_lib.stack
  ends = [task.result() for task in tasks]
  residents = [stack([resident]) for resident, _ in ends]
  kept = [stack([stack(own)]) for _, own in ends]
  blocks = [stack([each.get()[1] for _ in range(here)]) for each in queues]
  return tuple(_join(trees, devices) for trees in (residents, kept, blocks))


def _join(trees, devices):
  """Global arrays from the rows of each worker."""
  if len(set(devices)) < len(devices):
    trees = jax.device_put(trees, devices[0])
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
  mesh = mesh_lib.make(devices, ring=len(devices))
  spec = jax.sharding.PartitionSpec(mesh_lib.RING)
  sharding = jax.sharding.NamedSharding(mesh, spec)

  def join(*leaves):
    shape = len(devices) * leaves[0].shape[0], *leaves[0].shape[1:]
    return jax.make_array_from_single_device_arrays(shape, sharding, leaves)

  return jax.tree.map(join, *trees)
