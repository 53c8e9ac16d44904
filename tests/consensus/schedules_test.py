"""Tables of uploads: by their definition, and what they refuse."""

import jax
import numpy as np
from absl.testing import parameterized

from emc2.consensus import schedules


def _times(column):
  return (np.flatnonzero(column) + 1).tolist()


class EveryTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1, None, [1]),
    (6, 1, None, [1, 2, 3, 4, 5, 6]),
    (9, 4, None, [4, 8, 9]),
    (8, 4, None, [4, 8]),
    (3, 8, None, [3]),
    (20, 8, 1, [1, 9, 17, 20]),  # As the authors' code.
    (20, 8, 8, [8, 16, 20]),
  )
  def test_times(self, num_steps, period, first, want):
    table = schedules.every(num_steps, period, first=first)
    self.assertEqual(table.shape, (num_steps,))
    self.assertEqual(_times(table), want)
    schedules.check_schedule(table, period)

  @parameterized.parameters(
    (dict(num_steps=0, period=1), 'num_steps must be at least 1, got 0'),
    (dict(num_steps=5, period=0), 'period must be at least 1, got 0'),
    (
      dict(num_steps=5, period=2, first=3),
      r'first must lie in \[1, 2\], got 3',
    ),
    (
      dict(num_steps=5, period=2, first=0),
      r'first must lie in \[1, 2\], got 0',
    ),
  )
  def test_bad_input(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      schedules.every(**settings)


class RandomGapsTest(parameterized.TestCase):
  def test_gaps_are_uniform(self):
    table = schedules.random_gaps(jax.random.key(0), 4_000, 15, 8)
    self.assertEqual(table.shape, (4_000, 15))
    schedules.check_schedule(table, 8)
    gaps = [np.diff(_times(column)[:-1], prepend=0) for column in table.T]
    counts = np.bincount(np.concatenate(gaps), minlength=9)
    self.assertEqual((counts[0], counts.size), (0, 9))
    np.testing.assert_allclose(counts[1:] / counts.sum(), 1 / 8, rtol=0.05)
    # 2 H / (H + 1) times as often as one that uploads every H steps.
    np.testing.assert_allclose(8 * table.mean(), 16 / 9, rtol=0.02)

  def test_workers_differ_and_keys_matter(self):
    one, two = (
      schedules.random_gaps(jax.random.key(i), 50, 3, 5) for i in (0, 1)
    )
    self.assertFalse(np.array_equal(one, two))
    self.assertFalse(np.array_equal(one[:, 0], one[:, 1]))
    again = schedules.random_gaps(jax.random.key(0), 50, 3, 5)
    np.testing.assert_array_equal(one, again)

  def test_gap_of_one_is_every_step(self):
    table = schedules.random_gaps(jax.random.key(0), 7, 2, 1)
    self.assertTrue(table.all())

  @parameterized.parameters('num_steps', 'num_workers', 'max_gap')
  def test_bad_input(self, name):
    settings = dict(num_steps=4, num_workers=2, max_gap=3) | {name: 0}
    with self.assertRaisesRegex(ValueError, f'{name} must be at least 1'):
      schedules.random_gaps(jax.random.key(0), **settings)


class CheckTest(parameterized.TestCase):
  def test_gap_counts_from_zero(self):
    table = np.array([[0, 0, 1, 1], [0, 1, 1, 1]], bool).T
    self.assertEqual(schedules.largest_gap(table), 3)
    self.assertEqual(schedules.largest_gap(table[:, 1]), 2)
    self.assertEqual(schedules.largest_gap(np.zeros(4, bool)), 4)
    schedules.check_schedule(table, 3)

  @parameterized.parameters(
    (np.array([False, True, False]), None, 'after the last step'),
    (np.array([[True, False]]), None, 'after the last step'),
    (np.array([False, False, True]), 2, 'no gap above 2, got 3'),
    (np.array([0, 1]), None, 'must be bool'),
    (np.zeros((0,), bool), None, 'must be bool'),
    (np.ones((1, 1, 1), bool), None, 'must be bool'),
  )
  def test_refuses(self, table, max_gap, message):
    with self.assertRaisesRegex(ValueError, message):
      schedules.check_schedule(table, max_gap)
