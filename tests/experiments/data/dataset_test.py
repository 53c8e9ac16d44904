"""A data set reads alike from memory and from disk."""

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import dataset


def make(num_samples=5):
  shape = (num_samples, 2, 3, 1)
  return np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)


class DatasetTest(parameterized.TestCase):
  def test_fetch(self):
    data = dataset.Dataset(make())
    np.testing.assert_array_equal(
      data.fetch([3, 0, 3]), make()[np.array([3, 0, 3])]
    )
    self.assertEqual(data.num_samples, 5)
    self.assertEqual(data.image_shape, (2, 3, 1))

  def test_a_memory_map_is_not_in_memory(self):
    path = self.create_tempfile().full_path
    make().tofile(path)
    mapped = np.memmap(path, np.uint8, 'r').reshape(5, 2, 3, 1)
    self.assertFalse(dataset.Dataset(mapped).in_memory)
    self.assertTrue(dataset.Dataset(make()).in_memory)
    self.assertIs(type(dataset.Dataset(mapped).fetch([1])), np.ndarray)

  def test_keep_obeys_the_limit(self):
    path = self.create_tempfile().full_path
    make().tofile(path)
    mapped = np.memmap(path, np.uint8, 'r').reshape(5, 2, 3, 1)
    self.assertIs(dataset.keep(mapped, 29), mapped)
    loaded = dataset.keep(mapped, 30)
    self.assertIs(type(loaded), np.ndarray)
    np.testing.assert_array_equal(loaded, make())

  @parameterized.parameters(-1, 5)
  def test_refuses_an_index_outside(self, index):
    with self.assertRaisesRegex(ValueError, rf'\[0, 5\), got {index}'):
      dataset.Dataset(make()).fetch([0, index])
