"""Schedules against what makes them passes."""

import numpy as np
from absl.testing import parameterized

from emc2.ring import schedules


class TravelTest(parameterized.TestCase):
  @parameterized.product(width=(1, 2, 5, 9), slots=(1, 2, 4))
  def test_is_a_pass(self, width, slots):
    numbers = schedules.travel(width, slots)
    total = width * slots
    self.assertEqual(numbers.shape, (total, width))
    schedules.check(numbers)
    for t in range(total - slots):  # Worker p sends to p - 1.
      np.testing.assert_array_equal(numbers[t + slots], np.roll(numbers[t], -1))
    again = (numbers[-1] + 1) % total
    np.testing.assert_array_equal(again, numbers[0])

  @parameterized.product(width=(1, 2, 5, 9), slots=(1, 2, 4))
  def test_mirrors_the_specification(self, width, slots):
    total = width * slots
    t, p = np.ogrid[:total, :width]
    printed = (slots * p - t) % total
    mirrored = (-printed[:, -np.arange(width) % width]) % total
    np.testing.assert_array_equal(schedules.travel(width, slots), mirrored)

  @parameterized.product(width=(1, 4, 7), slots=(1, 2, 3))
  def test_phases_never_mix_on_a_block(self, width, slots):
    total = width * slots
    rows = [schedules.travel(width, slots)] * 6
    numbers = np.concatenate(rows)
    for block in range(total):
      times = np.argwhere(numbers == block)[:, 0]
      phases = times // total
      for k in range(0, len(phases), width):
        self.assertLen(set(phases[k : k + width].tolist()), 1)


class OthersTest(parameterized.TestCase):
  @parameterized.parameters((2, 2), (3, 4), (4, 2), (1, 3), (3, 1))
  def test_two_level(self, outer, inner):
    schedule = schedules.two_level(outer, inner)
    schedules.check(schedule.numbers)
    host = lambda worker: worker // inner
    crossings = 0
    for choice in schedule.choices[1:-1]:
      route = schedule.routes[choice]
      crossings += any(host(p) != host(q) for p, q in enumerate(route))
    self.assertEqual(crossings, outer - 1)
    self.assertLessEqual(len(schedule.routes), 4)

  def test_strata(self):
    rng = np.random.default_rng(0)
    for width in range(1, 7):
      order = rng.permutation(width)
      numbers = np.asarray(schedules.strata(order).numbers)
      schedules.check(numbers)
      np.testing.assert_array_equal((numbers[:, 0]) % width, order)

  def test_routes_lead_where_the_table_says(self):
    schedule = schedules.two_level(3, 2)
    held = np.arange(6)
    rows = [*schedule.numbers, np.arange(6)]
    for row, choice in zip(rows, schedule.choices, strict=True):
      arrived = np.empty_like(held)
      for source, target in enumerate(schedule.routes[choice]):
        arrived[target] = held[source]
      held = arrived
      np.testing.assert_array_equal(held, row)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'slots must be at least 1, got 0'):
      schedules.travel(2, 0)
    with self.assertRaisesRegex(ValueError, 'inner must be at least 1'):
      schedules.two_level(2, 0)
    with self.assertRaisesRegex(ValueError, 'permutation of 0 to 2'):
      schedules.strata(np.array([0, 2, 2]))
    with self.assertRaisesRegex(ValueError, 'its own block'):
      schedules.static(np.array([[0, 0], [1, 1]]))
    with self.assertRaisesRegex(ValueError, 'each of the 2 blocks once'):
      schedules.static(np.array([[0, 1], [0, 1]]))
