"""How long a ring of workers takes: recursions, events and closed forms.

Times are in seconds, sizes in bytes. P workers have m slots each, so Q = m P
blocks travel; a visit takes c on average, a message is on its way for the
latency alpha after it has kept the link of its sender busy for g.
"""

from emc2.ring.simulate.events import (
  ROUTINGS,
  Trace,
  coverage,
  route,
  throughput,
  visit_shares,
)
from emc2.ring.simulate.forms import (
  Costs,
  Machine,
  Workload,
  bulk_efficiency,
  costs,
  linear_workload,
  pass_bound,
  queue_efficiency,
  saturation,
  serial_time,
  speed_up,
  step_time,
)
from emc2.ring.simulate.recursion import Times, bulk_synchronous, ring

__all__ = [
  'ROUTINGS',
  'Costs',
  'Machine',
  'Times',
  'Trace',
  'Workload',
  'bulk_efficiency',
  'bulk_synchronous',
  'costs',
  'coverage',
  'linear_workload',
  'pass_bound',
  'queue_efficiency',
  'ring',
  'route',
  'saturation',
  'serial_time',
  'speed_up',
  'step_time',
  'throughput',
  'visit_shares',
]
