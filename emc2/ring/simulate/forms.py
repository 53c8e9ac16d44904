"""Closed forms: times from sizes, efficiencies and bounds."""

from typing import NamedTuple

import jax
import numpy as np

from emc2.ring.simulate import checks


class Workload(NamedTuple):
  """What one pass over all rows and all blocks asks for."""

  operations: float  # Floating-point operations of all workers together.
  size: float  # Bytes of all blocks together.
  units: int  # What blocks are cut from, features or classes: Q at most.


class Machine(NamedTuple):
  """What one worker can do."""

  speed: float = 5e9  # Floating-point operations per second.
  bandwidth: float = 1e9  # Of its link, bytes per second.
  latency: float = 50e-6  # Of a message.
  overhead: float = 20e-6  # Of a visit.


class Costs(NamedTuple):
  """Seconds of a visit and of a message; keywords of :func:`ring`."""

  compute: float  # c.
  latency: float  # alpha.
  occupancy: float  # g.


def step_time(
  compute: jax.typing.ArrayLike,
  latency: jax.typing.ArrayLike = 0.0,
  occupancy: jax.typing.ArrayLike = 0.0,
  *,
  slots: jax.typing.ArrayLike = 1,
) -> np.ndarray:
  r"""Time between visits of a ring in its stride, for constant compute times.

  .. math::
    \tau = \max(c, g, (c + \alpha + g) / m).

  Args:
    compute: c.
    latency: :math:`\alpha`.
    occupancy: g.
    slots: m.

  Returns:
    :math:`\tau`, of the shape to which all broadcast.

  Raises:
    ValueError: If a time is negative or there is no slot.

  Examples:
    >>> float(step_time(0.5, 0.1, 0.7, slots=2))
    0.7
  """
  checks.times(compute=compute, latency=latency, occupancy=occupancy)
  checks.counts(slots=slots)
  trip = (np.asarray(compute) + latency + occupancy) / np.asarray(slots)
  return np.asarray(np.maximum(np.maximum(compute, occupancy), trip))


def bulk_efficiency(
  num_workers: int,
  compute: float = 1.0,
  latency: float = 0.0,
  occupancy: float = 0.0,
) -> float:
  r"""Efficiency of bulk-synchronous steps with exponential compute times.

  .. math::
    \epsilon = 1 / (H_P + (\alpha + g) / c), \quad
    H_P = 1 + 1/2 + \dots + 1/P.

  Raises:
    ValueError: If there is no worker, or a time is out of its range.
  """
  checks.counts(num_workers=num_workers)
  checks.times(latency=latency, occupancy=occupancy)
  checks.compute(np.asarray(compute), 1, 1)
  harmonic = float(np.sum(1 / np.arange(1, num_workers + 1)))
  return 1 / (harmonic + (latency + occupancy) / compute)


def queue_efficiency(num_workers: int, num_blocks: int) -> float:
  r"""Efficiency of queues with exponential compute times and free messages.

  :math:`\epsilon = Q / (Q + P - 1)`, for routing by ring or uniform.

  Raises:
    ValueError: If there is no worker or no block.

  References:
    Gordon, Newell, `Closed queuing systems with exponential servers
    <https://doi.org/10.1287/opre.15.2.254>`_, 1967.
  """
  checks.counts(num_workers=num_workers, num_blocks=num_blocks)
  return num_blocks / (num_blocks + num_workers - 1)


def linear_workload(
  nnz: int, num_features: int, num_outputs: int, *, itemsize: int = 4
) -> Workload:
  """A pass of a linear model whose blocks are of outputs.

  Scores and gradients: 4 operations for each nonzero and output.

  Args:
    nnz: Nonzeros of the data.
    num_features: D.
    num_outputs: K.
    itemsize: Bytes of a weight.

  Returns:
    4 nnz K operations on D K weights.

  Raises:
    ValueError: If a size is not positive.

  Examples:
    >>> saturation(linear_workload(4_902_565 * 1_152, 1_152, 4_716), Machine())
    980513.0
  """
  checks.counts(nnz=nnz, itemsize=itemsize)
  checks.counts(num_features=num_features, num_outputs=num_outputs)
  size = float(num_features) * num_outputs * itemsize
  return Workload(4.0 * nnz * num_outputs, size, num_outputs)


def serial_time(workload: Workload, machine: Machine) -> float:
  r""":math:`W`, seconds of a pass on one worker, without overheads."""
  _check(workload, machine)
  return workload.operations / machine.speed


def costs(
  workload: Workload, machine: Machine, num_workers: int, *, slots: int = 1
) -> Costs:
  r"""Times of a visit and of a message on so many workers.

  .. math::
    c = W / (P Q) + o, \quad g = M / (Q B),

  with the size :math:`M` of all blocks, the bandwidth :math:`B` and the
  overhead :math:`o` of a visit.

  Args:
    workload: What a pass asks for, spread evenly.
    machine: What a worker can do.
    num_workers: P.
    slots: m.

  Returns:
    c, the latency and g.

  Raises:
    ValueError: If a size is not positive, or the work has fewer units than
      blocks.
  """
  total = checks.num_blocks(num_workers, slots)
  if workload.units < total:
    raise ValueError(
      f'workload must have a unit for each of the {total} blocks, got '
      f'{workload.units}.'
    )
  compute = serial_time(workload, machine) / (num_workers * total)
  occupancy = workload.size / (total * machine.bandwidth)
  return Costs(compute + machine.overhead, machine.latency, occupancy)


def speed_up(
  workload: Workload, machine: Machine, num_workers: int, *, slots: int = 1
) -> float:
  r""":math:`W / (Q \tau)`: serial time over a ring's pass in its stride.

  With the times of :func:`costs` and the constant steps of :func:`step_time`.

  Raises:
    ValueError: As :func:`costs`.
  """
  spent = costs(workload, machine, num_workers, slots=slots)
  step = float(step_time(*spent, slots=slots))
  return serial_time(workload, machine) / (num_workers * slots * step)


def pass_bound(workload: Workload, machine: Machine, num_workers: int) -> float:
  r"""No pass takes less: :math:`\max(W / P, M / B)`.

  Each worker does its part, and all blocks go through its link.

  Raises:
    ValueError: If a size is not positive.
  """
  checks.counts(num_workers=num_workers)
  work = serial_time(workload, machine) / num_workers
  return max(work, workload.size / machine.bandwidth)


def saturation(workload: Workload, machine: Machine) -> float:
  r"""The speed-up that no number of workers exceeds.

  :math:`P^* = W B / M`, whatever the slots.

  Raises:
    ValueError: If a size is not positive.
  """
  time = serial_time(workload, machine)
  return time * machine.bandwidth / workload.size


def _check(workload, machine):
  checks.counts(units=workload.units)
  checks.sizes(operations=workload.operations, size=workload.size)
  checks.sizes(speed=machine.speed, bandwidth=machine.bandwidth)
  checks.times(latency=machine.latency, overhead=machine.overhead)
