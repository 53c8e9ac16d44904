"""When workers synchronise: tables of steps, made and checked on the host.

A table is a bool array: (num_steps,) where all workers upload together, or
(num_steps, num_workers) where each has times of its own. Entry t says whether
the worker uploads after step t, that is at time t + 1 of the paper.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments


def every(
  num_steps: int, period: int, *, first: int | None = None
) -> np.ndarray:
  """All workers upload together, every so many steps and after the last.

  Args:
    num_steps: Steps of the whole run, at least 1.
    period: :math:`H`, at least 1.
    first: How many steps come before the first upload, in [1, period]; the
      period by default. The authors' code takes 1.

  Returns:
    (num_steps,), bool.

  Raises:
    ValueError: If a number breaks its rule.

  Examples:
    >>> np.flatnonzero(every(8, 3)) + 1
    array([3, 6, 8])
    >>> np.flatnonzero(every(8, 3, first=1)) + 1
    array([1, 4, 7, 8])
  """
  arguments.check_at_least('num_steps', num_steps, 1)
  arguments.check_at_least('period', period, 1)
  first = period if first is None else first
  if not 1 <= first <= period:
    raise ValueError(f'first must lie in [1, {period}], got {first}.')
  table = np.arange(1, num_steps + 1) % period == first % period
  table[-1] = True
  return table


def random_gaps(
  key: jax.Array, num_steps: int, num_workers: int, max_gap: int
) -> np.ndarray:
  r"""Each worker draws the gap to its next upload from :math:`\{1..H\}`.

  After the last step all upload. A worker does so :math:`2 / (H + 1)` times a
  step on average.

  Args:
    key: PRNG key, ().
    num_steps: Steps of the whole run, at least 1.
    num_workers: At least 1.
    max_gap: :math:`H`, at least 1.

  Returns:
    (num_steps, num_workers), bool.

  Raises:
    ValueError: If a number is below 1.

  References:
    Basu, Data, Karakus and Diggavi, `Qsparse-local-SGD
    <https://arxiv.org/abs/1906.02367>`_, 2019, experiments.
  """
  arguments.check_at_least('num_steps', num_steps, 1)
  arguments.check_at_least('num_workers', num_workers, 1)
  arguments.check_at_least('max_gap', max_gap, 1)
  shape = num_steps, num_workers
  gaps = jax.random.randint(key, shape, 1, max_gap + 1, jnp.int32)
  times = np.cumsum(np.asarray(gaps, np.int64), axis=0)
  table = np.zeros(shape, bool)
  inside, worker = np.nonzero(times <= num_steps)
  table[times[inside, worker] - 1, worker] = True
  table[-1] = True
  return table


def largest_gap(table: Sequence | np.ndarray) -> int:
  """The most steps that a worker makes between two uploads.

  Args:
    table: (num_steps,) or (num_steps, num_workers), bool.

  Returns:
    The largest distance between times next to each other, counting 0 as one.

  Examples:
    >>> largest_gap([False, False, True, True])
    3
  """
  table = np.asarray(table)
  columns = table.reshape(len(table), -1).T
  times = [np.flatnonzero(column) + 1 for column in columns]
  return max(
    int(np.diff(each, prepend=0, append=len(table)).max()) for each in times
  )


def check_schedule(
  table: Sequence | np.ndarray, max_gap: int | None = None
) -> None:
  """Refuses a table that breaks what the analysis asks for.

  Args:
    table: (num_steps,) or (num_steps, num_workers), bool.
    max_gap: :math:`H`, which no gap may exceed; None for no bound.

  Raises:
    ValueError: If it is no such table, if not all upload after the last step,
      since what they did last would be lost, or if a gap is too large.
  """
  table = np.asarray(table)
  if table.dtype != bool or table.ndim not in (1, 2) or not table.size:
    raise ValueError(
      'schedule must be bool, (num_steps,) or (num_steps, num_workers), got '
      f'{table.dtype}, {table.shape}.'
    )
  if not table[-1].all():
    raise ValueError(
      'schedule must have all workers upload after the last step, got '
      f'{table[-1]} there.'
    )
  gap = largest_gap(table)
  if max_gap is not None and gap > max_gap:
    raise ValueError(f'schedule must have no gap above {max_gap}, got {gap}.')
