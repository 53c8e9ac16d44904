"""Workers with queues under any routing, event by event on the host."""

import collections
import heapq
from typing import NamedTuple

import jax
import numpy as np

from emc2.ring.simulate import checks

ROUTINGS = ('ring', 'uniform', 'two_choice')


class Trace(NamedTuple):
  """The visits of a run by events, in the order in which they start."""

  start: np.ndarray  # (T,), float64.
  finish: np.ndarray  # (T,), float64.
  worker: np.ndarray  # (T,), int32.
  block: np.ndarray  # (T,), int32.


def route(
  rng: np.random.Generator,
  num_workers: int,
  num_visits: int,
  *,
  routing: str = 'ring',
  slots: int = 1,
  compute: jax.typing.ArrayLike = 1.0,
  latency: float = 0.0,
  occupancy: float = 0.0,
  cv: float = 0.0,
) -> Trace:
  """Simulates workers with queues, event by event, under any routing.

  A worker takes what has waited longest. After the visit it sends the block to
  its neighbour p - 1 (`ring`), to any worker, itself included (`uniform`), or
  to the less loaded of two such (`two_choice`); the load is what waits there,
  is worked on or on its way. Its link sends one message after the other, as in
  :func:`ring`, whose times routing by ring gives. A float64 loop on the host,
  of a few microseconds for each visit.

  Args:
    rng: Draws compute times and routes.
    num_workers: P.
    num_visits: T, of all workers together: the run ends when so many began.
    routing: 'ring', 'uniform' or 'two_choice'.
    slots: m, blocks that each worker starts with: m p, ..., m p + m - 1.
    compute: Mean c of a visit, positive; broadcasts to (P, Q), as in
      :func:`ring`.
    latency: Of a message, at least 0.
    occupancy: Of the sender's link by a message, at least 0.
    cv: Standard deviation of compute times over their mean: 0 for constant
      ones, 1 for exponential, otherwise gamma.

  Returns:
    The visits, in the order in which they start: equivalent to making them one
    by one, so `worker` and `block` are what `executors.replay` takes.

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.

  Examples:
    >>> trace = route(np.random.default_rng(0), 2, 4)
    >>> trace.worker.tolist(), trace.block.tolist()
    ([0, 1, 1, 0], [0, 1, 0, 1])

  References:
    Yun, Yu, Hsieh, Vishwanathan, Dhillon, `NOMAD
    <https://arxiv.org/abs/1312.0193>`_, 2014.
  """
  if routing not in ROUTINGS:
    raise ValueError(
      f'routing must be one of {", ".join(ROUTINGS)}, got {routing!r}.'
    )
  total = checks.num_blocks(num_workers, slots)
  checks.counts(num_visits=num_visits)
  checks.times(latency=latency, occupancy=occupancy)
  checks.spread(cv)
  latency, occupancy = float(latency), float(occupancy)
  mean = np.asarray(compute, np.float64)
  checks.compute(mean, num_workers, total)
  mean = np.broadcast_to(
    mean, (num_workers, mean.shape[-1] if mean.ndim else 1)
  )
  by_block = mean.shape[1] > 1
  mean = mean.tolist()  # Python's floats: no NumPy call for each event.
  if cv:
    draws = rng.gamma(cv**-2.0, cv**2.0, num_visits).tolist()
  else:
    draws = [1.0] * num_visits
  # No more messages leave than visits end.
  first = second = None
  if routing != 'ring':
    first = rng.integers(num_workers, size=num_visits).tolist()
  if routing == 'two_choice':
    second = rng.integers(num_workers, size=num_visits).tolist()

  start, finish = [0.0] * num_visits, [0.0] * num_visits
  worker, block = [0] * num_visits, [0] * num_visits
  queues = [
    collections.deque(range(p * slots, (p + 1) * slots))
    for p in range(num_workers)
  ]
  load = [slots] * num_workers
  working = [-1] * num_workers  # The block, or -1.
  link = [0.0] * num_workers
  # Events (time, number, p, q): block q arrives at p or, for q = -1, p ends its
  # visit. The number keeps the order of those at the same time.
  events, number, began, ended = [], 0, 0, 0
  push, pop = heapq.heappush, heapq.heappop

  now, waiting = 0.0, list(range(num_workers))
  while True:
    for p in waiting:
      q = queues[p].popleft()
      working[p] = q
      end = now + mean[p][q if by_block else 0] * draws[began]
      start[began], finish[began], worker[began], block[began] = now, end, p, q
      number += 1
      push(events, (end, number, p, -1))
      began += 1
      if began == num_visits:
        return Trace(
          np.asarray(start),
          np.asarray(finish),
          np.asarray(worker, np.int32),
          np.asarray(block, np.int32),
        )
    now, _, p, q = pop(events)
    if q < 0:
      q, working[p] = working[p], -1
      load[p] -= 1
      if first is None:
        target = p - 1 if p else num_workers - 1
      else:
        target = first[ended]
        if second is not None and load[second[ended]] < load[target]:
          target = second[ended]
      ended += 1
      load[target] += 1
      sent = (now if now > link[p] else link[p]) + occupancy
      link[p] = sent
      number += 1
      push(events, (sent + latency, number, target, q))
    else:
      queues[p].append(q)
    waiting = (p,) if working[p] < 0 and queues[p] else ()


def throughput(trace: Trace) -> float:
  """Visits that end before the last one starts, per second.

  Raises:
    ValueError: If all visits start at once.
  """
  horizon = trace.start[-1]
  if not horizon > 0:
    raise ValueError('trace must last longer than its first visits.')
  return float(np.sum(trace.finish <= horizon) / horizon)


def visit_shares(trace: Trace, num_workers: int) -> np.ndarray:
  """(P,), float64: the visits of each worker over the mean of all workers."""
  counts = np.bincount(trace.worker, minlength=num_workers)
  return counts * (num_workers / len(trace.worker))


def coverage(trace: Trace, num_workers: int, num_blocks: int) -> float:
  """How often Q visits in a row, of a worker, are of all Q blocks.

  Args:
    trace: A run.
    num_workers: P.
    num_blocks: Q.

  Returns:
    The share of all windows of Q visits at a worker; 1 for the ring.

  Raises:
    ValueError: If no worker has made Q visits.
  """
  full = windows = 0
  for p in range(num_workers):
    blocks = trace.block[trace.worker == p]
    visits = np.arange(len(blocks))
    # The last visit before to the same block: a window is full if none of its
    # visits has that within.
    order = np.lexsort((visits, blocks))
    same = blocks[order][1:] == blocks[order][:-1]
    before = np.full(len(blocks), -1)
    before[order[1:]] = np.where(same, order[:-1], -1)
    latest = np.maximum.accumulate(before)[num_blocks - 1 :]
    full += np.sum(latest < visits[: len(latest)])
    windows += len(latest)
  if not windows:
    raise ValueError(
      f'trace must have {num_blocks} visits of a worker, got fewer.'
    )
  return float(full / windows)
