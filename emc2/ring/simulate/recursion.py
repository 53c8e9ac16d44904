"""Rings and bulk-synchronous steps, visit by visit, for all workers at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.ring import schedules
from emc2.ring.simulate import checks

_MOST_STAGES = 32  # Up to here a sum of exponentials beats `random.gamma`.


class Times(NamedTuple):
  """What a simulated run took."""

  elapsed: jax.Array  # (), until the last worker ends its last visit.
  efficiency: jax.Array  # (), in [0, 1]: busy time / (P elapsed).
  finish: jax.Array  # (T,): when all workers have ended visit t.


def ring(
  key: jax.Array,
  num_workers: int,
  *,
  slots: int = 1,
  compute: jax.typing.ArrayLike = 1.0,
  latency: jax.typing.ArrayLike = 0.0,
  occupancy: jax.typing.ArrayLike = 0.0,
  cv: float = 0.0,
  num_visits: int | None = None,
  numbers: jax.typing.ArrayLike | None = None,
  hosts: int = 1,
  host_latency: jax.typing.ArrayLike = 0.0,
  host_occupancy: jax.typing.ArrayLike = 0.0,
) -> Times:
  r"""Simulates workers that pass blocks on and wait for nothing else.

  Worker p makes visit t to block :math:`(m p + t) \bmod Q` and sends it to
  worker p - 1. Blocks arrive, visits end and messages leave at

  .. math::
    A_{p,t} &= S_{p+1,t-m} + \alpha, \quad A_{p,t} = 0 \text{ for } t < m, \\
    F_{p,t} &= \max(F_{p,t-1}, A_{p,t}) + C_{p,t}, \\
    S_{p,t} &= \max(F_{p,t}, S_{p,t-1}) + g.

  Memory is O(m P), whatever the number of visits. The times of all workers are
  kept relative to the first of them, so float32 does for long runs.

  .. note::
    The specification's ring runs the other way, which changes no time.

  Args:
    key: PRNG key of the compute times.
    num_workers: P. Static.
    slots: m, blocks per worker: 1 computes and then sends; 2 computes on one
      block while the other travels. Static.
    compute: Mean c of a visit, positive; a number, or an array that broadcasts
      to (P, Q): (P, 1) has slow workers, (1, Q) heavy blocks.
    latency: :math:`\alpha`, at least 0.
    occupancy: g, at least 0.
    cv: Standard deviation of C over its mean. 0: C = c. 1: exponential.
      Otherwise gamma. Static.
    num_visits: T, of each worker; by default Q, one pass. Static.
    numbers: (P, P), the block of each worker (columns) at each visit, in place
      of the ring's and repeated every P visits, as `schedules.two_level` and
      `schedules.strata` have it; `slots` is then 1. Blocks start where they are
      visited first.
    hosts: Workers lie on so many hosts, P / hosts consecutive ones on each; a
      message to another host takes the worker's second link. Static.
    host_latency: :math:`\alpha` of the second link.
    host_occupancy: g of the second link.

  Returns:
    The times. The way home of the last visit's blocks is not part of them.

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.

  Examples:
    >>> found = ring(jax.random.key(0), 4, compute=1.0, latency=0.25)
    >>> found.finish
    Array([1.  , 2.25, 3.5 , 4.75], dtype=float32)

  References:
    Yun, Yu, Hsieh, Vishwanathan, Dhillon, `NOMAD
    <https://arxiv.org/abs/1312.0193>`_, 2014.
  """
  total = checks.num_blocks(num_workers, slots)
  num_visits = total if num_visits is None else num_visits
  checks.counts(num_visits=num_visits, hosts=hosts)
  checks.times(
    latency=latency,
    occupancy=occupancy,
    host_latency=host_latency,
    host_occupancy=host_occupancy,
  )
  checks.spread(cv)
  if num_workers % hosts:
    raise ValueError(
      f'hosts must divide the {num_workers} workers, got {hosts}.'
    )
  workers = jnp.arange(num_workers, dtype=jnp.int32)
  if numbers is not None:
    if slots != 1 or np.shape(numbers) != (num_workers, num_workers):
      raise ValueError(
        f'numbers must have shape ({num_workers}, {num_workers}) and one slot, '
        f'got {np.shape(numbers)} and {slots}.'
      )
    if not isinstance(numbers, jax.core.Tracer):
      schedules.check(numbers)
    numbers = jnp.asarray(numbers, jnp.int32)
  mean = _mean(compute, num_workers, total)
  dtype = mean.dtype
  latency, occupancy, host_latency, host_occupancy = (
    jnp.asarray(x, dtype)
    for x in (latency, occupancy, host_latency, host_occupancy)
  )
  host = workers // (num_workers // hosts)

  def body(carry, t):
    arrivals, free, near, far = carry
    if numbers is None:
      number = (workers * slots + t) % total
      source, target = jnp.roll(workers, -1), jnp.roll(workers, 1)
    else:
      number, following = numbers[t % total], numbers[(t + 1) % total]
      invert = lambda x: jnp.zeros_like(x).at[x].set(workers)
      source = invert(number)[following]
      target = invert(source)
    draw = _draw(key, t, num_workers, cv, dtype)
    cost = _pick(mean, workers, number) * draw
    free = jnp.maximum(free, arrivals[t % slots]) + cost
    leaves = host != host[target]
    link = jnp.where(leaves, far, near)
    link = jnp.maximum(free, link) + jnp.where(
      leaves, host_occupancy, occupancy
    )
    near, far = jnp.where(leaves, near, link), jnp.where(leaves, link, far)
    arrived = link + jnp.where(leaves, host_latency, latency)
    arrivals = arrivals.at[t % slots].set(arrived[source])
    first, last = jnp.min(free), jnp.max(free)
    carry = (arrivals, free, near, far)
    carry = jax.tree.map(lambda x: x - first, carry)
    return carry, (first, last - first, jnp.mean(cost))

  zeros = jnp.zeros(num_workers, dtype)
  carry = jnp.zeros((slots, num_workers), dtype), zeros, zeros, zeros
  steps = jnp.arange(num_visits, dtype=jnp.int32)
  _, (first, spread, cost) = jax.lax.scan(body, carry, steps)
  return _times(jnp.cumsum(first) + spread, cost)


def bulk_synchronous(
  key: jax.Array,
  num_workers: int,
  *,
  slots: int = 1,
  compute: jax.typing.ArrayLike = 1.0,
  latency: jax.typing.ArrayLike = 0.0,
  occupancy: jax.typing.ArrayLike = 0.0,
  cv: float = 0.0,
  num_visits: int | None = None,
) -> Times:
  r"""Simulates workers that all wait for the last one after each visit.

  .. math::
    F_t = F_{t-1} + \alpha + g + \max_p C_{p,t}.

  Args:
    key: PRNG key of the compute times.
    num_workers: P. Static.
    slots: m: there are Q = m P blocks, though m - 1 of m only wait. Static.
    compute: Mean c of a visit, positive; broadcasts to (P, Q).
    latency: :math:`\alpha`, at least 0.
    occupancy: g, at least 0.
    cv: Standard deviation of C over its mean, as in :func:`ring`. Static.
    num_visits: T, of each worker; by default Q, one pass. Static.

  Returns:
    The times.

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.

  Examples:
    >>> found = bulk_synchronous(jax.random.key(0), 4, latency=0.25)
    >>> found.elapsed, found.efficiency
    (Array(5., dtype=float32), Array(0.8, dtype=float32))
  """
  total = checks.num_blocks(num_workers, slots)
  num_visits = total if num_visits is None else num_visits
  checks.counts(num_visits=num_visits)
  checks.times(latency=latency, occupancy=occupancy)
  checks.spread(cv)
  mean = _mean(compute, num_workers, total)
  workers = jnp.arange(num_workers, dtype=jnp.int32)

  def body(carry, t):
    draw = _draw(key, t, num_workers, cv, mean.dtype)
    cost = _pick(mean, workers, (workers * slots + t) % total) * draw
    return carry, (jnp.max(cost), jnp.mean(cost))

  steps = jnp.arange(num_visits, dtype=jnp.int32)
  _, (longest, cost) = jax.lax.scan(body, (), steps)
  wait = jnp.asarray(latency, mean.dtype) + jnp.asarray(occupancy, mean.dtype)
  return _times(jnp.cumsum(longest + wait), cost)


def _times(finish, cost):
  efficiency = jnp.sum(cost) / finish[-1]
  return Times(finish[-1], efficiency, finish)


def _mean(compute, num_workers, total):
  """`compute` as a floating number, or with two axes."""
  if not isinstance(compute, jax.core.Tracer):
    checks.compute(np.asarray(compute), num_workers, total)
  mean = jnp.asarray(compute)
  if not jnp.issubdtype(mean.dtype, jnp.floating):
    mean = mean.astype(jnp.result_type(float))
  return mean


def _pick(mean, workers, number):
  """(P,): the mean times of workers at the blocks `number`."""
  if mean.ndim == 0:
    return jnp.broadcast_to(mean, workers.shape)
  row = workers if mean.shape[0] > 1 else jnp.zeros_like(workers)
  return mean[row, number if mean.shape[1] > 1 else 0]


def _draw(key, t, num, cv, dtype):
  """(num,): the random times of visit t, of mean 1."""
  if cv == 0:
    return jnp.ones(num, dtype)
  key = jax.random.fold_in(key, t)
  shape = cv**-2.0
  stages = round(shape)
  if stages <= _MOST_STAGES and abs(shape - stages) < 1e-6 * shape:
    draws = jax.random.exponential(key, (stages, num), dtype)
    return jnp.mean(draws, axis=0)
  return jax.random.gamma(key, shape, (num,), dtype) / shape
