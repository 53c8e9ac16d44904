"""Which block each worker works on, visit by visit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One block on each worker at a time; worker p starts with block p.

  Attributes:
    numbers: (P, P), int32: the block of each worker (columns) at each visit.
    routes: Permutations of the workers: `routes[r][p]` is where worker p sends
      its block.
    choices: (P + 1,), int32: the route taken before the first visit, between
      visits, and after the last, when blocks go home.
  """

  numbers: Any
  routes: tuple[tuple[int, ...], ...]
  choices: Any


def travel(num_workers: int, slots: int = 1) -> np.ndarray:
  r"""The ring: worker p works on block :math:`(m p + t) \bmod Q` at visit t.

  Each of P workers starts with the m blocks :math:`m p, \dots, m p + m - 1` of
  :math:`Q = m P`, and sends each on to worker p - 1 when it has worked on it.
  A block has m - 1 visits of time to travel, and is home after Q.

  .. note::
    The specification's ring runs the other way: :math:`(m p - t) \bmod Q`, sent
    to p + 1. The two are mirror images; here the blocks at home are
    consecutive, as the shards of an array are.

  Args:
    num_workers: P.
    slots: m, one more than the blocks that wait or travel.

  Returns:
    (Q, P), int32.

  Raises:
    ValueError: If an argument is below 1.

  Examples:
    >>> travel(3)
    array([[0, 1, 2],
           [1, 2, 0],
           [2, 0, 1]], dtype=int32)
    >>> travel(2, slots=2)
    array([[0, 2],
           [1, 3],
           [2, 0],
           [3, 1]], dtype=int32)

  References:
    Yun, Yu, Hsieh, Vishwanathan, Dhillon, `NOMAD
    <https://arxiv.org/abs/1312.0193>`_, 2014.
  """
  arguments.check_at_least('num_workers', num_workers, 1)
  arguments.check_at_least('slots', slots, 1)
  visits = np.arange(num_workers * slots, dtype=np.int32)
  homes = np.arange(num_workers, dtype=np.int32) * np.int32(slots)
  return (homes[None, :] + visits[:, None]) % np.int32(num_workers * slots)


def two_level(outer: int, inner: int) -> Schedule:
  r"""Rings of chips within hosts, and a ring of hosts around them.

  Worker :math:`p = o I + i`, chip i of host o, works at visit :math:`u I + s`
  on block :math:`((o + u) \bmod O) I + (i + s) \bmod I`. A block sees all chips
  of a host before it leaves; all chips of a host then send at once, O times a
  pass, where a flat ring crosses hosts at every visit.

  Args:
    outer: O, hosts.
    inner: I, chips of each.

  Returns:
    The schedule of O I workers.

  Raises:
    ValueError: If an argument is below 1.

  Examples:
    >>> two_level(2, 2).numbers
    array([[0, 1, 2, 3],
           [1, 0, 3, 2],
           [2, 3, 0, 1],
           [3, 2, 1, 0]], dtype=int32)
  """
  arguments.check_at_least('outer', outer, 1)
  arguments.check_at_least('inner', inner, 1)
  o, i = np.divmod(np.arange(outer * inner), inner)
  u, s = o[:, None], i[:, None]
  numbers = (o + u) % outer * inner + (i + s) % inner
  return static(numbers)


def strata(order: jax.typing.ArrayLike) -> Schedule:
  r"""All shifts of the blocks, in any order: DSGD's strata.

  At visit s worker p works on block :math:`(p + \sigma(s)) \bmod P`.

  Args:
    order: (P,), :math:`\sigma`, a permutation of 0, ..., P - 1; drawn anew for
      each pass, it may be traced.

  Returns:
    The schedule.

  Raises:
    ValueError: If `order` has not one axis, or is known and no permutation.

  Examples:
    >>> strata(np.array([2, 0, 1])).numbers
    Array([[2, 0, 1],
           [0, 1, 2],
           [1, 2, 0]], dtype=int32)

  References:
    Gemulla, Nijkamp, Haas, Sismanis, `Large-scale matrix factorization with
    distributed stochastic gradient descent
    <https://doi.org/10.1145/2020408.2020426>`_, 2011.
  """
  if np.ndim(order) != 1:
    raise ValueError(f'order must have shape (P,), got {np.shape(order)}.')
  num_workers = np.shape(order)[0]
  known = not isinstance(order, jax.core.Tracer)
  if known and sorted(np.asarray(order).tolist()) != list(range(num_workers)):
    raise ValueError(
      f'order must be a permutation of 0 to {num_workers - 1}, got {order}.'
    )
  order = jnp.asarray(order, jnp.int32)
  workers = jnp.arange(num_workers, dtype=jnp.int32)
  numbers = (workers[None, :] + order[:, None]) % num_workers
  routes = tuple(
    tuple((p - shift) % num_workers for p in range(num_workers))
    for shift in range(num_workers)
  )
  ends = jnp.pad(order, 1)
  choices = (ends[1:] - ends[:-1]) % num_workers
  return Schedule(numbers, routes, choices)


def static(numbers: np.ndarray) -> Schedule:
  """Any table of visits as a schedule.

  Args:
    numbers: (P, P): the block of each worker (columns) at each visit.

  Returns:
    The schedule; it has as few routes as the table allows.

  Raises:
    ValueError: If two workers have a block at once, or a worker a block twice.
  """
  numbers = np.asarray(numbers, np.int32)
  check(numbers)
  if numbers.shape[0] != numbers.shape[1]:
    raise ValueError(
      f'numbers must have one block for each worker, got shape {numbers.shape}.'
    )
  home = np.arange(len(numbers), dtype=np.int32)[None]
  where = np.argsort(np.concatenate([home, numbers, home]), axis=1)
  now = np.concatenate([home, numbers])
  # The worker that has next what worker p has now.
  steps = np.take_along_axis(where[1:], now, axis=1)
  routes, choices = np.unique(steps, axis=0, return_inverse=True)
  routes = tuple(tuple(route) for route in routes.tolist())
  return Schedule(numbers, routes, choices.reshape(-1).astype(np.int32))


def check(numbers: np.ndarray) -> None:
  """Refuses a table (Q, P) that is no pass.

  Raises:
    ValueError: If two workers have one block at the same visit, or a worker
      does not work on each block once.
  """
  numbers = np.asarray(numbers)
  if numbers.ndim != 2:
    raise ValueError(f'numbers must have shape (Q, P), got {numbers.shape}.')
  for visit, row in enumerate(numbers):
    if len(set(row.tolist())) < len(row):
      raise ValueError(
        f'numbers must give each worker its own block, got {row} at visit '
        f'{visit}.'
      )
  for worker, column in enumerate(numbers.T):
    if sorted(column.tolist()) != list(range(len(column))):
      raise ValueError(
        f'numbers must give each worker each of the {len(column)} blocks once, '
        f'got {column} for worker {worker}.'
      )
