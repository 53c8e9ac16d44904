"""Simulated rings against loops, closed forms and the tables of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.ring import schedules, simulate

KEY = jax.random.key(1)
MACHINE = simulate.Machine()
SHAPES = ((1, 1), (1, 3), (2, 1), (4, 1), (5, 2), (4, 3))
# Rows, features, share of nonzeros, classes.
DATA_SETS = {
  'reddit': (211_532_359, 1_348_182, 3.6e-5, 33_225),
  'odp': (1_084_404, 422_712, 5.33e-4, 105_034),
  'video': (4_902_565, 1_152, 1.0, 4_716),
  'lshtc': (93_805, 347_256, 4.9e-4, 12_294),
}


def visit_by_visit(
  compute,
  slots,
  num_visits,
  *,
  near=(0.0, 0.0),
  far=(0.0, 0.0),
  hosts=1,
  numbers=None,
):
  """(T, P): when each worker ends each visit; links are (latency, busy)."""
  width = len(compute)
  if numbers is None:
    numbers = schedules.travel(width, slots)
  arrivals = {}
  free = np.zeros(width)
  busy = np.zeros((2, width))
  finish = np.zeros((num_visits, width))
  for t in range(num_visits):
    block = numbers[t % len(numbers)]
    for p in range(width):
      arrival = arrivals.get((p, t), 0.0)
      free[p] = max(free[p], arrival) + compute[p, block[p]]
      finish[t, p] = free[p]
    if t + slots >= num_visits:
      continue
    later = numbers[(t + slots) % len(numbers)].tolist()
    for p in range(width):
      to = later.index(block[p])
      away = p * hosts // width != to * hosts // width
      latency, occupancy = far if away else near
      link = int(away)
      busy[link, p] = max(free[p], busy[link, p]) + occupancy
      arrivals[to, t + slots] = busy[link, p] + latency
  return finish


def workload(name):
  rows, features, density, outputs = DATA_SETS[name]
  nnz = round(rows * features * density)
  return simulate.linear_workload(nnz, features, outputs)


def run(simulation, width, **arguments):
  """As a user stages it: what is no static setting is traced."""
  names = ('slots', 'cv', 'num_visits', 'hosts')
  static = {k: v for k, v in arguments.items() if k in names}
  traced = {k: v for k, v in arguments.items() if k not in names}
  return _staged(simulation, width, *static.items())(KEY, **traced)


@functools.cache
def _staged(simulation, width, *static):
  return jax.jit(
    lambda key, **traced: simulation(key, width, **dict(static), **traced)
  )


class RingTest(parameterized.TestCase):
  @parameterized.parameters((1, 3), (5, 2))
  def test_equals_loops(self, width, slots):
    rng = np.random.default_rng(0)
    total = width * slots
    compute = rng.gamma(2.0, size=(width, total))
    want = visit_by_visit(compute, slots, 3 * total, near=(0.3, 0.4))
    with jax.enable_x64(True):
      found = simulate.ring(
        KEY,
        width,
        slots=slots,
        compute=compute,
        latency=0.3,
        occupancy=0.4,
        num_visits=3 * total,
      )
    np.testing.assert_allclose(found.finish, want.max(1), rtol=1e-12)
    self.assertEqual(found.elapsed, found.finish[-1])
    busy = 3 * compute.sum() / (width * want.max())
    np.testing.assert_allclose(found.efficiency, busy, rtol=1e-12)

  @parameterized.parameters(
    (None, 3),
    (schedules.two_level(2, 3).numbers, 2),
    (np.asarray(schedules.strata(np.array([2, 5, 0, 1, 4, 3])).numbers), 2),
  )
  def test_other_orders_and_links(self, numbers, hosts):
    rng = np.random.default_rng(1)
    compute = rng.gamma(2.0, size=(6, 6))
    want = visit_by_visit(
      compute,
      1,
      12,
      near=(0.1, 0.2),
      far=(0.5, 1.5),
      hosts=hosts,
      numbers=numbers,
    )
    with jax.enable_x64(True):
      found = simulate.ring(
        KEY,
        6,
        compute=compute,
        latency=0.1,
        occupancy=0.2,
        num_visits=12,
        numbers=numbers,
        hosts=hosts,
        host_latency=0.5,
        host_occupancy=1.5,
      )
    np.testing.assert_allclose(found.finish, want.max(1), rtol=1e-12)

  def test_two_levels_spare_the_slow_links(self):
    links = dict(hosts=4, occupancy=0.125, host_latency=0.5, host_occupancy=4.0)
    go = functools.partial(run, simulate.ring, 32, num_visits=320, **links)
    flat = go(numbers=schedules.travel(32))
    two = go(numbers=schedules.two_level(4, 8).numbers)
    # The flat ring waits for a slow link at each visit; of two levels all
    # chips use theirs at once, between visits 8 apart.
    self.assertAlmostEqual(float(flat.finish[-1] - flat.finish[-33]) / 32, 4.0)
    hops = 280 * 0.125 + 39 * 4.5
    self.assertAlmostEqual(float(two.elapsed), 320 + hops, places=3)

  @parameterized.parameters(
    (1.0, 0.25, 0.0, 1, 1.25),
    (0.5, 0.25, 0.0, 2, 0.5),
    (0.5, 0.1, 0.7, 2, 0.7),
    (0.2, 1.0, 0.1, 4, 0.325),
    (1.0, 0.5, 0.9, 2, 1.2),
  )
  @pytest.mark.slow
  def test_stride(self, compute, latency, occupancy, slots, want):
    found = run(
      simulate.ring,
      8,
      slots=slots,
      compute=compute,
      latency=latency,
      occupancy=occupancy,
      num_visits=240,
    )
    stride = float(found.finish[-1] - found.finish[-121]) / 120
    self.assertAlmostEqual(stride / want, 1.0, delta=1e-4)
    form = simulate.step_time(compute, latency, occupancy, slots=slots)
    self.assertAlmostEqual(float(form), want)

  def test_long_runs_keep_their_precision(self):
    found = run(simulate.ring, 3, compute=0.1, num_visits=100_000)
    self.assertAlmostEqual(float(found.elapsed), 1e4, delta=2e-2)

  @parameterized.parameters(0.5, 0.8)
  @pytest.mark.slow
  def test_spread_of_compute_times(self, cv):
    # A ring of one: the draws themselves.
    found = run(simulate.ring, 1, compute=3.0, cv=cv, num_visits=8_000)
    draws = np.diff(np.asarray(found.finish, np.float64))
    self.assertAlmostEqual(draws.mean() / 3, 1.0, delta=4 * cv / 89)
    self.assertAlmostEqual(draws.std() / 3 / cv, 1.0, delta=0.05)
    # The third moment tells a gamma from others: its skewness is 2 cv.
    skew = np.mean(((draws - draws.mean()) / draws.std()) ** 3)
    self.assertAlmostEqual(skew / (2 * cv), 1.0, delta=0.2)

  def test_batches_of_keys_and_traced_times(self):
    keys = jax.random.split(KEY, 3)

    def simulated(key, latency):
      return simulate.ring(key, 4, slots=2, latency=latency, cv=0.5).elapsed

    together = jax.vmap(simulated, in_axes=(0, None))(keys, jnp.float32(0.5))
    staged = jax.jit(simulated)
    one_by_one = [staged(key, 0.5) for key in keys]
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)
    self.assertLen(set(np.asarray(together).tolist()), 3)

  @parameterized.parameters(1, 4)
  def test_slow_worker(self, slots):
    compute = np.full((64, 1), 1 / slots)
    settings = dict(slots=slots, latency=0.25)
    fair = run(simulate.ring, 64, compute=jnp.asarray(compute), **settings)
    compute[5] *= 2
    slow = run(simulate.ring, 64, compute=jnp.asarray(compute), **settings)
    self.assertBetween(float(fair.elapsed) / 64, 0.99, 1.25)
    self.assertAlmostEqual(float(slow.elapsed) / 64, 2.0, delta=0.02)

  @parameterized.parameters((1, 0.25, 0.72), (2, 1.0, 0.62))
  @pytest.mark.slow
  def test_efficiency_of_a_pass(self, slots, cv, want):
    found = run(
      simulate.ring, 256, slots=slots, compute=1 / slots, latency=0.25, cv=cv
    )
    self.assertAlmostEqual(float(found.efficiency), want, delta=0.02)

  @parameterized.parameters(
    (1024, 1, 0.0, 0.80),
    (1024, 1, 0.25, 0.72),
    (1024, 1, 1.0, 0.47),
    (1024, 2, 0.25, 0.92),
    (1024, 2, 1.0, 0.62),
    (1024, 4, 0.25, 0.97),
    (1024, 4, 1.0, 0.76),
    (4096, 1, 1.0, 0.47),
    (4096, 2, 1.0, 0.63),
  )
  @pytest.mark.slow
  def test_efficiency_of_a_pass_of_thousands(self, width, slots, cv, want):
    found = run(
      simulate.ring, width, slots=slots, compute=1 / slots, latency=0.25, cv=cv
    )
    self.assertAlmostEqual(float(found.efficiency), want, delta=0.01)

  @parameterized.parameters(
    (dict(num_workers=0), 'num_workers must be'),
    (dict(slots=0), 'slots must be'),
    (dict(num_visits=0), 'num_visits must be'),
    (dict(compute=0.0), 'compute must be finite and above 0'),
    (dict(compute=np.ones(4)), 'compute must be a number'),
    (dict(compute=np.ones((4, 3))), 'compute must be a number'),
    (dict(latency=-1.0), 'latency must be'),
    (dict(occupancy=float('nan')), 'occupancy must be'),
    (dict(cv=-0.5), 'cv must be'),
    (dict(hosts=3), 'hosts must divide the 4 workers'),
    (dict(host_latency=-1.0), 'host_latency must be'),
    (dict(host_occupancy=-1.0), 'host_occupancy must be'),
    (dict(numbers=np.zeros((4, 3), int)), 'numbers must have shape'),
    (dict(numbers=np.zeros((4, 4), int)), 'numbers must give each worker'),
    (dict(numbers=schedules.travel(4), slots=2), 'numbers must have shape'),
  )
  def test_refuses(self, arguments, message):
    arguments = {'num_workers': 4} | arguments
    with self.assertRaisesRegex(ValueError, message):
      simulate.ring(KEY, **arguments)


class BulkSynchronousTest(parameterized.TestCase):
  @parameterized.parameters((3, 1), (4, 2))
  def test_equals_loops(self, width, slots):
    total = width * slots
    compute = np.random.default_rng(0).gamma(2.0, size=(width, total))
    numbers = schedules.travel(width, slots)
    longest = [max(compute[p, q] for p, q in enumerate(row)) for row in numbers]
    want = np.cumsum(np.tile(longest, 2) + 0.75)
    with jax.enable_x64(True):
      found = simulate.bulk_synchronous(
        KEY,
        width,
        slots=slots,
        compute=compute,
        latency=0.25,
        occupancy=0.5,
        num_visits=2 * total,
      )
    np.testing.assert_allclose(found.finish, want, rtol=1e-12)
    busy = 2 * compute.sum() / (width * want[-1])
    np.testing.assert_allclose(found.efficiency, busy, rtol=1e-12)

  @parameterized.parameters((64, 0.2002, 0.005), (1024, 0.1289, 0.003))
  def test_exponential_times(self, width, want, tolerance):
    found = run(
      simulate.bulk_synchronous, width, latency=0.25, cv=1.0, num_visits=512
    )
    self.assertAlmostEqual(float(found.efficiency), want, delta=tolerance)
    form = simulate.bulk_efficiency(width, latency=0.15, occupancy=0.1)
    self.assertAlmostEqual(form, want, delta=5e-5)
    twice = simulate.bulk_efficiency(width, 2.0, latency=0.3, occupancy=0.2)
    self.assertAlmostEqual(twice, form)

  def test_slow_worker(self):
    compute = np.ones((64, 1))
    go = functools.partial(run, simulate.bulk_synchronous, 64, latency=0.25)
    fair = go(compute=jnp.asarray(compute))
    compute[5] = 2.0
    slow = go(compute=jnp.asarray(compute))
    self.assertEqual((fair.elapsed, slow.elapsed), (1.25 * 64, 2.25 * 64))

  @parameterized.parameters(
    (dict(num_workers=0), 'num_workers must be'),
    (dict(slots=0), 'slots must be'),
    (dict(num_visits=0), 'num_visits must be'),
    (dict(compute=-1.0), 'compute must be finite'),
    (dict(latency=-1.0), 'latency must be'),
    (dict(occupancy=-1.0), 'occupancy must be'),
    (dict(cv=float('inf')), 'cv must be'),
  )
  def test_refuses(self, arguments, message):
    arguments = {'num_workers': 4} | arguments
    with self.assertRaisesRegex(ValueError, message):
      simulate.bulk_synchronous(KEY, **arguments)


class RouteTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES)
  def test_ring_equals_the_recursion(self, width, slots):
    rng = np.random.default_rng(0)
    total = width * slots
    compute = rng.integers(1, 200, size=(width, total)) / 64
    times = dict(slots=slots, compute=compute, latency=0.25, occupancy=0.5)
    # Long enough for the last of all to make two passes.
    trace = simulate.route(rng, width, 6 * width * total, **times)
    finish = np.full((2 * total, width), np.nan)
    block = np.zeros((2 * total, width), int)
    for p in range(width):
      own = trace.worker == p
      finish[:, p] = trace.finish[own][: 2 * total]
      block[:, p] = trace.block[own][: 2 * total]
    numbers = schedules.travel(width, slots)
    np.testing.assert_array_equal(block, np.tile(numbers, (2, 1)))
    if (width, slots) == (4, 3):
      found = simulate.ring(KEY, width, num_visits=2 * total, **times)
      np.testing.assert_array_equal(finish.max(1), found.finish)
    want = visit_by_visit(compute, slots, 2 * total, near=(0.25, 0.5))
    np.testing.assert_array_equal(finish, want)

  @parameterized.parameters(*simulate.ROUTINGS)
  def test_one_owner_at_a_time(self, routing):
    trace = simulate.route(
      np.random.default_rng(0),
      5,
      2_000,
      routing=routing,
      slots=2,
      latency=0.2,
      occupancy=0.1,
      cv=0.5,
    )
    self.assertTrue(np.all(np.diff(trace.start) >= 0))
    for owner, gap in ((trace.worker, 0.0), (trace.block, 0.3)):
      for i in range(owner.max() + 1):
        start, finish = trace.start[owner == i], trace.finish[owner == i]
        self.assertGreater(len(start), 10)
        self.assertTrue(np.all(start[1:] >= finish[:-1] + gap - 1e-9))

  def test_compute_times_are_of_worker_and_block(self):
    compute = np.random.default_rng(0).gamma(2.0, size=(3, 6))
    trace = simulate.route(
      np.random.default_rng(0),
      3,
      300,
      routing='uniform',
      slots=2,
      compute=compute,
    )
    want = compute[trace.worker, trace.block]
    np.testing.assert_allclose(trace.finish - trace.start, want)

  @parameterized.parameters(0.5, 1.0)
  def test_spread_of_compute_times(self, cv):
    trace = simulate.route(np.random.default_rng(0), 4, 20_000, cv=cv)
    draws = trace.finish - trace.start
    self.assertAlmostEqual(draws.mean(), 1.0, delta=4 * cv / 141)
    self.assertAlmostEqual(draws.std() / cv, 1.0, delta=0.05)

  @parameterized.product(routing=('ring', 'uniform'), slots=(1, 4))
  def test_exponential_queues(self, routing, slots):
    trace = simulate.route(
      np.random.default_rng(2),
      64,
      64 * 1_500,
      routing=routing,
      slots=slots,
      cv=1.0,
    )
    want = simulate.queue_efficiency(64, 64 * slots)
    self.assertAlmostEqual(want, {1: 0.504, 4: 0.803}[slots], delta=1e-3)
    found = simulate.throughput(trace) / 64
    self.assertAlmostEqual(found / want, 1.0, delta=0.02)

  def test_coverage(self):
    blocks = np.array([0, 1, 2, 2, 0, 1, 1, 2], np.int32)
    times = np.arange(8.0)
    trace = simulate.Trace(times, times, np.zeros(8, np.int32), blocks)
    # Windows of three: 012, 201, 122 has two of one, and so on.
    windows = [blocks[i : i + 3] for i in range(6)]
    want = np.mean([len(set(x.tolist())) == 3 for x in windows])
    self.assertEqual(simulate.coverage(trace, 1, 3), want)
    apart = trace._replace(worker=np.arange(8, dtype=np.int32) % 2)
    windows = [
      own[i : i + 3] for own in (blocks[::2], blocks[1::2]) for i in (0, 1)
    ]
    want = np.mean([len(set(x.tolist())) == 3 for x in windows])
    self.assertEqual(simulate.coverage(apart, 2, 3), want)
    with self.assertRaisesRegex(ValueError, 'trace must have 9 visits'):
      simulate.coverage(trace, 1, 9)

  @parameterized.parameters(('ring', 1.0, 0.0), ('uniform', 0.02, 0.008))
  def test_coverage_of_routings(self, routing, want, tolerance):
    trace = simulate.route(
      np.random.default_rng(0), 4, 40_000, routing=routing, slots=2, cv=1.0
    )
    found = simulate.coverage(trace, 4, 8)
    self.assertAlmostEqual(found, want, delta=tolerance)

  def test_two_choices_spare_a_slow_worker(self):
    compute = np.ones((32, 1))
    compute[3] = 2.0
    trace = simulate.route(
      np.random.default_rng(0),
      32,
      32 * 400,
      routing='two_choice',
      slots=4,
      compute=compute,
      latency=0.25,
    )
    rate = simulate.throughput(trace) / np.sum(1 / compute)
    self.assertBetween(rate, 0.98, 1.0)
    shares = simulate.visit_shares(trace, 32)
    self.assertAlmostEqual(shares.sum(), 32)
    self.assertAlmostEqual(
      shares[3] / np.delete(shares, 3).mean(), 0.5, delta=0.05
    )

  # Slots; ring, uniform and two choices of equal workers, and with each tenth
  # of them slow; the share of the least visited under two choices.
  TABLE = (
    (1, (0.63, 0.52, 0.64), (0.47, 0.42, 0.59), 0.65),
    (2, (0.85, 0.72, 0.89), (0.51, 0.51, 0.84), 0.51),
    (4, (0.94, 0.86, 0.99), (0.54, 0.57, 0.94), 0.47),
    (8, (0.98, 0.94, 1.0), (0.59, 0.72, 0.95), 0.47),
  )

  def _efficiencies(self, width, slots, slow):
    compute = np.ones((width, 1))
    if slow:
      compute[::10] = 2.0
    found, shares = [], None
    for routing in simulate.ROUTINGS:
      trace = simulate.route(
        np.random.default_rng(1),
        width,
        200 * width,
        routing=routing,
        slots=slots,
        compute=compute,
        latency=0.25,
        cv=0.5,
      )
      found.append(simulate.throughput(trace) / width)
      shares = simulate.visit_shares(trace, width)
    return found, shares.min()

  @parameterized.parameters(*TABLE)
  def test_routings(self, slots, equal, slow, share):
    found, _ = self._efficiencies(128, slots, slow=False)
    np.testing.assert_allclose(found, equal, atol=0.02)
    found, least = self._efficiencies(128, slots, slow=True)
    np.testing.assert_allclose(found, slow, atol=0.02)
    self.assertAlmostEqual(least, share, delta=0.04)

  @parameterized.parameters(*TABLE)
  @pytest.mark.slow
  def test_routings_of_a_thousand(self, slots, equal, slow, share):
    found, _ = self._efficiencies(1024, slots, slow=False)
    np.testing.assert_allclose(found, equal, atol=0.02)
    found, least = self._efficiencies(1024, slots, slow=True)
    np.testing.assert_allclose(found, slow, atol=0.02)
    self.assertAlmostEqual(least, share, delta=0.04)

  @parameterized.parameters(
    (dict(num_workers=0), 'num_workers must be'),
    (dict(num_visits=0), 'num_visits must be'),
    (dict(slots=0), 'slots must be'),
    (dict(routing='any'), "routing must be one of .*, got 'any'"),
    (dict(compute=0.0), 'compute must be finite'),
    (dict(compute=np.ones(3)), 'compute must be a number'),
    (dict(latency=-1.0), 'latency must be'),
    (dict(occupancy=-1.0), 'occupancy must be'),
    (dict(cv=-1.0), 'cv must be'),
  )
  def test_refuses(self, arguments, message):
    arguments = {'num_workers': 4, 'num_visits': 8} | arguments
    with self.assertRaisesRegex(ValueError, message):
      simulate.route(np.random.default_rng(0), **arguments)

  def test_throughput_needs_time(self):
    trace = simulate.route(np.random.default_rng(0), 4, 4)
    with self.assertRaisesRegex(ValueError, 'trace must last longer'):
      simulate.throughput(trace)


class FormsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('reddit', 1523), ('odp', 115.6), ('video', 980_513), ('lshtc', 9.19)
  )
  def test_saturation(self, name, want):
    found = simulate.saturation(workload(name), simulate.Machine())
    self.assertAlmostEqual(found / want, 1.0, delta=1e-3)

  # Workers, slots, speed-up: in the stride, with jitter, bulk-synchronous.
  @parameterized.parameters(
    ('reddit', 16, 2, 16, None, None),
    ('reddit', 64, 2, 64, None, None),
    ('reddit', 256, 2, 256, None, None),
    ('reddit', 1024, 2, 1024, None, None),
    ('reddit', 4096, 2, 1523, None, None),
    ('odp', 64, 2, 64, 51, 21),
    ('odp', 256, 2, 116, None, None),
    ('odp', 4096, 2, 116, None, None),
    ('video', 64, 2, 64, None, None),
    ('video', 1024, 2, 1022, None, None),
    ('video', 4096, 1, 3867, None, None),
  )
  def test_speed_up(self, name, width, slots, ideal, jitter, bulk):
    self._speed_up(name, width, slots, ideal, jitter, bulk)

  @parameterized.parameters(
    ('reddit', 64, 2, 64, 53, 24),
    ('video', 64, 2, 64, 54, 25),
    ('odp', 256, 2, 116, 114, 49),
    ('reddit', 256, 2, 256, 213, 80),
    ('reddit', 1024, 2, 1024, 805, 249),
    ('reddit', 4096, 2, 1523, 1519, 623),
    ('odp', 1024, 2, 116, 116, 83),
    ('odp', 4096, 2, 116, 116, 104),
    ('video', 256, 2, 256, 217, 84),
    ('video', 1024, 2, 1022, 867, 297),
    ('video', 4096, 1, 3867, None, 1028),
  )
  @pytest.mark.slow
  def test_speed_up_of_thousands(self, *case):
    self._speed_up(*case)

  def _speed_up(self, name, width, slots, ideal, jitter, bulk):
    load, machine = workload(name), MACHINE
    found = simulate.speed_up(load, machine, width, slots=slots)
    self.assertAlmostEqual(found, ideal, delta=0.51)
    costs = simulate.costs(load, machine, width, slots=slots)._asdict()
    serial = simulate.serial_time(load, machine)
    bound = simulate.pass_bound(load, machine, width)
    self.assertGreaterEqual(serial / bound, found)
    for simulation, want in (
      (simulate.ring, jitter),
      (simulate.bulk_synchronous, bulk),
    ):
      if want is not None:
        elapsed = run(simulation, width, slots=slots, cv=0.5, **costs).elapsed
        # The table rounds, and is of another single pass.
        delta = 0.5 + 0.03 * want
        self.assertAlmostEqual(serial / float(elapsed), want, delta=delta)

  def test_costs(self):
    load = simulate.Workload(operations=6e12, size=4e8, units=24)
    machine = simulate.Machine(1e12, 1e7, latency=0.5, overhead=0.125)
    self.assertEqual(
      simulate.costs(load, machine, 4, slots=3),
      (6 / 48 + 0.125, 0.5, 4e8 / 12e7),
    )
    self.assertEqual(simulate.pass_bound(load, machine, 4), 40.0)
    self.assertEqual(
      simulate.pass_bound(load._replace(size=1.0), machine, 4), 1.5
    )
    self.assertEqual(
      simulate.linear_workload(10, 5, 7, itemsize=2), (280.0, 70.0, 7)
    )

  def test_shapes_of_step_times(self):
    found = simulate.step_time(np.ones(3), 0.5, slots=np.array([[1], [2]]))
    np.testing.assert_array_equal(found, [[1.5] * 3, [1.0] * 3])

  @parameterized.parameters(
    (lambda: simulate.step_time(-1.0), 'compute must be'),
    (lambda: simulate.step_time(1.0, slots=0), 'slots must be'),
    (lambda: simulate.bulk_efficiency(0), 'num_workers must be'),
    (lambda: simulate.bulk_efficiency(2, 0.0), 'compute must be'),
    (lambda: simulate.queue_efficiency(2, 0), 'num_blocks must be'),
    (lambda: simulate.linear_workload(0, 1, 1), 'nnz must be'),
    (
      lambda: simulate.costs(
        workload('video'), simulate.Machine(), 4096, slots=2
      ),
      'workload must have a unit for each of the 8192 blocks, got 4716',
    ),
    (
      lambda: simulate.costs(workload('video'), MACHINE, 4, slots=0),
      'slots must be',
    ),
    (
      lambda: simulate.serial_time(workload('video'), simulate.Machine(0.0)),
      'speed must be',
    ),
    (
      lambda: simulate.saturation(
        simulate.Workload(1.0, 0.0, 1), simulate.Machine()
      ),
      'size must be',
    ),
    (
      lambda: simulate.pass_bound(
        workload('video'), simulate.Machine(overhead=-1.0), 4
      ),
      'overhead must be',
    ),
  )
  def test_refuses(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()
