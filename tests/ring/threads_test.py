"""Threads and queues against a list of visits."""

import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import ring
from emc2.ring import threads
from emc2.ring import worker as worker_lib

from tests.ring import rotations as rotations_lib


def plain(resident, own, block, number):
  return resident + block, own, 2 * block + number.astype(block.dtype)


PLAIN = (ring.Rotation(plain, lambda resident: resident),)


def after(predicate):
  """Whether it comes true."""
  for _ in range(2_000):
    if predicate():
      return True
    time.sleep(5e-3)
  return False


class ThreadsTest(parameterized.TestCase):
  @parameterized.parameters((2, 2), (4, 3))
  def test_equals_loops(self, width, here):
    self._check_equals_loops(width, here)

  @parameterized.parameters((1, 1), (2, 1), (4, 1), (4, 2))
  @pytest.mark.slow
  def test_equals_loops_elsewhere(self, width, here):
    self._check_equals_loops(width, here)

  def _check_equals_loops(self, width, here):
    self._check(width, here, jax.devices()[:width])

  @parameterized.parameters((8, 1), (8, 3))
  def test_equals_loops_with_few_devices(self, width, here):
    self._check(width, here, jax.devices()[:2] * (width // 2))

  @parameterized.parameters((8, 1), (8, 3))
  @pytest.mark.slow
  def test_equals_loops_with_8_devices(self, width, here):
    self._check(width, here, jax.devices())

  def _check(self, width, here, devices):
    start = rotations_lib.draw(width, here)
    want = rotations_lib.loops(width, here, rotations_lib.ROTATIONS, start, 2)
    pauses = np.random.default_rng(1).exponential(
      2e-3, (width, 4 * width * here)
    )
    places = set(devices) if len(set(devices)) == width else {devices[0]}
    with jax.enable_x64(True):
      found = threads.run(
        rotations_lib.ROTATIONS, *start, devices=devices, num_passes=2
      )
      delayed = threads.run(
        rotations_lib.ROTATIONS,
        *start,
        devices=devices,
        num_passes=2,
        delay=lambda worker, count: pauses[worker, count],
      )
      for leaf, x in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        self.assertEqual(leaf.dtype, jnp.float64)
        self.assertEqual(leaf.sharding.device_set, places)
        np.testing.assert_allclose(leaf, x, rtol=1e-12, atol=1e-12)
      jax.tree.map(np.testing.assert_array_equal, found, delayed)

  def test_pass_after_pass_on_its_own_results(self):
    start = rotations_lib.draw(2, 2)
    want = rotations_lib.loops(2, 2, rotations_lib.ROTATIONS, start, 2)
    devices = jax.devices()[:2]
    with jax.enable_x64(True), jax.transfer_guard('disallow'):
      found = jax.device_put(start, devices[0])
      given = jax.tree.map(np.array, found)
      state = found
      for _ in range(2):
        state = threads.run(rotations_lib.ROTATIONS, *state, devices=devices)
      unmoved = threads.run(
        rotations_lib.ROTATIONS, *start, devices=devices, num_passes=0
      )
    check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12)
    jax.tree.map(check, state, want)
    jax.tree.map(np.testing.assert_array_equal, unmoved, start)
    # The arrays that came in are the caller's still.
    jax.tree.map(np.testing.assert_array_equal, found, given)

  def test_one_device_for_all_and_keys_in_the_resident(self):
    def visit(resident, own, block, number):
      key = jax.random.fold_in(resident, number)
      return resident, own, block + jax.random.normal(key, block.shape)

    rotations = [ring.Rotation(visit, lambda key: jax.random.fold_in(key, 7))]
    keys = jax.random.split(jax.random.key(0), 2)
    found, kept, blocks = threads.run(
      rotations, keys, (), jnp.zeros((4, 3)), devices=jax.devices()[:1] * 2
    )
    want = jax.vmap(lambda key: jax.random.fold_in(key, 7))(keys)
    np.testing.assert_array_equal(
      jax.random.key_data(found), jax.random.key_data(want)
    )
    self.assertEqual(kept, ())
    spread = threads.run(
      rotations, keys, (), jnp.zeros((4, 3)), devices=jax.devices()[:2]
    )
    np.testing.assert_array_equal(
      jax.random.key_data(spread[0]), jax.random.key_data(want)
    )
    np.testing.assert_array_equal(spread[2], blocks)
    self.assertEqual(len(np.unique(blocks)), 12)

  @parameterized.parameters((4, 1), (4, 2))
  def test_no_one_waits_but_for_blocks(self, width, here):
    reached = [0] * width
    # While worker 0 sleeps, what it holds is all that the others lack.
    want = [0] + [(width - p) * here for p in range(1, width)]
    arrived = []

    def delay(worker, count):
      if worker == count == 0:
        arrived.append(after(lambda: reached == want))
        time.sleep(0.05)
        arrived.append(list(reached))
      reached[worker] = count + 1
      return 0

    zeros = jnp.zeros(width * here)
    watched = mock.patch.object(worker_lib, 'work', wraps=worker_lib.work)
    with watched as work:
      threads.run(
        PLAIN,
        zeros[:width],
        (),
        zeros,
        devices=jax.devices()[:1] * width,
        delay=delay,
        ahead=5,
      )
    self.assertEqual(work.call_args.kwargs['ahead'], 5)
    self.assertEqual(arrived, [True, want])
    self.assertEqual(reached, [width * here] * width)

  @parameterized.parameters(1, 3)
  def test_has_no_more_than_ahead_visits_under_way(self, ahead):
    events = []

    class Mark:
      def __init__(self, number):
        self.number = number

      def block_until_ready(self):
        events.append(('done', self.number))

    def dispatch(visit, resident, own, block, number):
      events.append(('dispatched', int(number)))
      return resident, own, block, Mark(int(number))

    with mock.patch.object(worker_lib, '_visit', dispatch):
      worker_lib.work(
        PLAIN,
        (),
        [()] * 6,
        worker=0,
        here=6,
        num_passes=1,
        ahead=ahead,
        device=jax.devices()[0],
        pause=lambda count: None,
        take=lambda count: (count, ()),
        send=lambda count, number, block: None,
      )
    want = [('dispatched', i) for i in range(ahead)]
    for i in range(ahead, 6):
      want += [('done', i - ahead), ('dispatched', i)]
    want += [('done', i) for i in range(6 - ahead, 6)]
    self.assertEqual(events, want)

  def test_uses_the_memory_of_the_resident_again(self):
    device = jax.devices()[1]
    resident = worker_lib.entry(jnp.zeros((1, 1000)), device, 0)
    place = resident.unsafe_buffer_pointer()
    queue = [worker_lib.entry(np.float32(i), device) for i in range(3)]
    resident, _ = worker_lib.work(
      PLAIN,
      resident,
      [()] * 3,
      worker=0,
      here=3,
      num_passes=2,
      ahead=2,
      device=device,
      pause=lambda count: None,
      take=lambda count: (count % 3, queue[count % 3]),
      send=lambda count, number, block: queue.__setitem__(number, block),
    )
    self.assertEqual(resident.unsafe_buffer_pointer(), place)

  def test_delays(self):
    def seconds(delay):
      start = time.monotonic()
      devices = jax.devices()[:1]
      threads.run(
        PLAIN, jnp.zeros(1), (), jnp.zeros(5), devices=devices, delay=delay
      )
      return time.monotonic() - start

    seconds(None)
    self.assertGreater(seconds(lambda worker, count: 0.1), 0.5)

  def test_names_the_worker_that_fails_on_the_host(self):
    def delay(worker, count):
      if (worker, count) == (2, 5):
        raise OSError('no more')
      return 0

    with self.assertRaisesRegex(
      RuntimeError, 'worker 2 failed at its visit 5, of block 1: no more'
    ):
      zeros = jnp.zeros(8)
      threads.run(
        PLAIN,
        zeros[:4],
        (),
        zeros,
        devices=jax.devices()[:4],
        num_passes=50,
        delay=delay,
      )

  def test_names_the_worker_that_fails_on_its_device(self):
    def fail(worker, number):
      if (worker, number) == (1, 4):
        raise OSError('no more')
      return np.float32(0)

    def visit(resident, own, block, number):
      shape = jax.ShapeDtypeStruct((), jnp.float32)
      zero = jax.pure_callback(fail, shape, resident, number)
      return resident, own, block + zero

    rotations = [ring.Rotation(visit, lambda resident: resident)]
    with self.assertRaisesRegex(
      RuntimeError, '(?s)worker 1 failed at its visit 2, of block 4: .*no more'
    ):
      threads.run(
        rotations,
        jnp.arange(3),
        (),
        jnp.zeros(6),
        devices=jax.devices()[:3],
        num_passes=4,
        ahead=4,
      )

  @parameterized.parameters(
    ({'num_devices': 3}, 'devices must be 2'),
    ({'num_devices': 1}, 'devices must be 2'),
    ({'num_blocks': 3}, 'blocks must be a multiple of the 2'),
    ({'kept': (2, 3)}, 'kept must have leading axes'),
    ({'num_passes': -1}, 'num_passes must be at least 0'),
    ({'ahead': 0}, 'ahead must be at least 1'),
    ({'rotations': ()}, 'rotations must hold'),
  )
  def test_refuses(self, change, match):
    given = {'num_devices': 2, 'num_blocks': 4, 'kept': (2, 4)} | change
    devices = jax.devices()[: given.pop('num_devices')]
    blocks, kept = jnp.zeros(given.pop('num_blocks')), given.pop('kept')
    rotations = given.pop('rotations', PLAIN)
    with self.assertRaisesRegex(ValueError, match):
      threads.run(
        rotations,
        jnp.zeros(2),
        jnp.zeros(kept),
        blocks,
        devices=devices,
        **given,
      )

  def test_refuses_functions_that_change_a_type(self):
    same = lambda x: x
    longer = lambda r, o, b, n: (r, o, jnp.stack([b, b]))
    for rotation, match in (
      (ring.Rotation(longer, same), 'visit must keep shapes'),
      (ring.Rotation(plain, lambda r: r > 0), 'finish must keep shapes'),
    ):
      with self.assertRaisesRegex(ValueError, match):
        threads.run(
          [rotation],
          jnp.zeros(1),
          (),
          jnp.zeros(2),
          devices=jax.devices()[:1],
        )
