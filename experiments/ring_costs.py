"""What a ring of workers costs: seconds measured and simulated, and bytes."""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.ring import simulate

EXECUTORS = ('virtual', 'mesh')
"""All workers on one device, or a device for each."""

COUNTS = (1, 2, 4, 8, 64, 512, 4096)
"""Workers of simulated rings."""

SLOTS = 2
"""Blocks of each simulated worker: one travels while it works on another."""

SPREAD = 0.5
"""Standard deviation of simulated compute times over their mean."""

_VISITS = 256, 1024
"""Least and most that are simulated of each worker, whatever a pass has."""


class Memory(NamedTuple):
  """Bytes of one of some workers."""

  blocks: float  # What travels.
  rows: float  # What stays: rows, labels and what is known of them.


class SpeedUp(NamedTuple):
  """How many times faster than one worker some workers are."""

  workers: np.ndarray  # (n,).
  ring: np.ndarray  # (n,): passing blocks on, waiting for nothing else.
  bulk: np.ndarray  # (n,): all waiting for the last after each visit.


def use_cores() -> None:
  """Makes a device of each core of a CPU, unless told how many to make.

  Must come before the first JAX array.
  """
  if 'JAX_NUM_CPU_DEVICES' not in os.environ:
    mesh_lib.use_cpu_devices(len(os.sched_getaffinity(0)))


def parse_workers(text: str) -> list[int]:
  """Reads numbers of workers with commas between.

  Raises:
    ValueError: If one is no number from 1 up, or stands twice.
  """
  found = [word.strip() for word in text.split(',')]
  if not all(word.isdecimal() and int(word) for word in found):
    raise ValueError(
      f'workers must be numbers from 1 up, with commas between, got {text!r}.'
    )
  if len(set(map(int, found))) < len(found):
    raise ValueError(f'workers must not repeat, got {text!r}.')
  return list(map(int, found))


def check_devices(executor: str, workers: Sequence[int]) -> None:
  """Refuses more workers than devices on a mesh, and several processes.

  Raises:
    ValueError: If there are too few devices.
    NotImplementedError: If the run has several processes.
  """
  if jax.process_count() > 1:
    raise NotImplementedError(
      f'rings of experiments have one process, got {jax.process_count()}.'
    )
  if executor == 'mesh' and max(workers) > jax.device_count():
    raise ValueError(
      f'workers must be at most the {jax.device_count()} devices on a mesh, '
      f'got {max(workers)}.'
    )


def mesh_of(executor: str, num_workers: int) -> jax.sharding.Mesh | None:
  """A ring of the first devices, or None for virtual workers on one."""
  if executor == 'virtual':
    return None
  return mesh_lib.make(jax.devices()[:num_workers], ring=num_workers)


def device_counts() -> list[int]:
  """1, 2, 4, ... up to the number of devices."""
  return [2**i for i in range(jax.device_count().bit_length())]


def due_passes(num_passes: int, evaluations: int) -> set[int]:
  """After which passes to evaluate: 0, the last, and ever fewer between."""
  due = np.geomspace(1, num_passes, evaluations - 1)
  return {0, num_passes, *np.round(due).astype(int).tolist()}


def measured(
  make: Callable[[int], tuple[Callable, Any, Any]], most: int
) -> dict[int, float]:
  """Times passes on 1, 2, 4, ... devices, a worker on each.

  Args:
    make: Of the number of devices, the step of :func:`runner.train`, a state
      and the constants.
    most: Devices.

  Returns:
    Seconds of a pass by the number of devices.
  """
  seconds = {}
  for count in device_counts():
    if count <= most:
      seconds[count] = seconds_per_pass(*make(count))
  return seconds


def seconds_per_pass(
  step: Callable[[jax.Array, Any, Any], Any],
  state: Any,
  constants: Any,
  *,
  least: float = 0.5,
) -> float:
  """Times passes, each from the same state, once all is compiled.

  Args:
    step: `(key, state, (number, constants)) -> (state, info)`.
    state: Placed as the passes shall find it.
    constants: Likewise.
    least: Seconds that the measurement takes at least; a pass is timed three
      times at least.

  Returns:
    The median, in seconds.
  """
  step, key = jax.jit(step), jax.random.key(0)
  jax.block_until_ready(step(key, state, (0, constants)))
  times, end = [], time.perf_counter() + least
  while len(times) < 3 or time.perf_counter() < end:
    start = time.perf_counter()
    jax.block_until_ready(step(key, state, (0, constants)))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def simulated(
  cases: Mapping[str, tuple[simulate.Workload, simulate.Machine]],
  *,
  seed: int = 0,
) -> dict[str, SpeedUp]:
  """Simulates passes of up to 4,096 workers, as many as have a block each.

  Compute times are gamma distributed, with half of their mean as deviation.

  Args:
    cases: What a pass asks for and what each worker can do, by name.
    seed: Of the compute times.

  Returns:
    The speed-ups over a worker that works without overheads.
  """
  run = {
    field: jax.jit(
      functools.partial(function, slots=SLOTS, cv=SPREAD),
      static_argnums=1,
      static_argnames='num_visits',
    )
    for field, function in (
      ('ring', simulate.ring),
      ('bulk', simulate.bulk_synchronous),
    )
  }
  found = {}
  for name, (workload, machine) in cases.items():
    serial = simulate.serial_time(workload, machine)
    counts = [count for count in COUNTS if SLOTS * count <= workload.units]
    speed_ups = {field: [] for field in run}
    for count in counts:
      costs = simulate.costs(workload, machine, count, slots=SLOTS)
      visits = int(np.clip(SLOTS * count, *_VISITS))
      for field, function in run.items():
        times = function(
          jax.random.key(seed), count, num_visits=visits, **costs._asdict()
        )
        elapsed = float(times.elapsed) * SLOTS * count / visits
        speed_ups[field].append(serial / elapsed)
    found[name] = SpeedUp(
      np.array(counts), *(np.array(values) for values in speed_ups.values())
    )
  return found


def memory(to_ring: Callable[..., tuple[Any, Any, Any]], *given: Any) -> Memory:
  """Counts the bytes of a worker, from shapes alone.

  Args:
    to_ring: Of `given` it makes `residents`, `kept` and `blocks`.
    *given: Arrays.

  Returns:
    The bytes.
  """
  residents, kept, blocks = jax.eval_shape(to_ring, *given)
  width = jax.tree.leaves(residents)[0].shape[0]
  return Memory(
    blocks=_bytes(blocks) / width, rows=_bytes((residents, kept)) / width
  )


def _bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
