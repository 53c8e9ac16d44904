"""STL-10 is read by its column-major layout, and a broken file is named."""

import pathlib

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import stl10


def write(folder, num_samples=4, seed=0):
  """Writes all splits; gives the images, (n, 3, column, row)."""
  rng = np.random.default_rng(seed)
  planes = rng.integers(0, 256, (num_samples, 3, 96, 96), np.uint8)
  for split in stl10.SPLITS:
    (folder / f'{split}_X.bin').write_bytes(planes.tobytes())
  for split in ('train', 'test'):
    labels = np.arange(1, num_samples + 1, dtype=np.uint8)
    (folder / f'{split}_y.bin').write_bytes(labels.tobytes())
  return planes


class Stl10Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.planes = write(self.root)

  @parameterized.parameters((2**31, True), (0, False))
  def test_layout(self, memory_limit, in_memory):
    data = stl10.read(self.root, 'train', memory_limit=memory_limit)
    self.assertEqual(data.in_memory, in_memory)
    self.assertEqual(data.images.shape, (4, 96, 96, 3))
    raw = (self.root / 'train_X.bin').read_bytes()
    images = data.fetch([2, 0, 3, 1])
    rng = np.random.default_rng(1)
    for _ in range(100):
      place = rng.integers((4, 96, 96, 3))
      row, y, x, channel = (int(i) for i in place)
      number = [2, 0, 3, 1][row]
      byte = ((number * 3 + channel) * 96 + x) * 96 + y
      self.assertEqual(images[row, y, x, channel], raw[byte])

  def test_labels(self):
    data = stl10.read(self.root, 'test')
    self.assertEqual(data.labels.tolist(), [0, 1, 2, 3])
    self.assertEqual(data.class_names[3], 'cat')
    unlabeled = stl10.read(self.root, 'unlabeled')
    self.assertIsNone(unlabeled.labels)
    self.assertEqual(unlabeled.class_names, ())

  def test_refuses_a_truncated_file(self):
    path = self.root / 'unlabeled_X.bin'
    path.write_bytes(path.read_bytes()[:-5])
    message = rf'{path}: expected .* of 27648 bytes, got 110587 bytes'
    with self.assertRaisesRegex(ValueError, message):
      stl10.read(self.root, 'unlabeled')

  def test_refuses_an_empty_file(self):
    path = self.root / 'train_X.bin'
    path.write_bytes(b'')
    with self.assertRaisesRegex(ValueError, f'{path}: .* got 0 bytes'):
      stl10.read(self.root, 'train')

  @parameterized.parameters(
    ([1, 2, 3], 'expected 4 labels, one per image, got 3'),
    ([1, 2, 0, 3], 'expected labels from 1 to 10, got 0 at byte 2'),
    ([11, 2, 0, 3], 'expected labels from 1 to 10, got 11 at byte 0'),
  )
  def test_refuses_labels(self, labels, message):
    path = self.root / 'train_y.bin'
    path.write_bytes(bytes(labels))
    with self.assertRaisesRegex(ValueError, f'{path}: {message}'):
      stl10.read(self.root, 'train')

  @parameterized.parameters('test_X.bin', 'test_y.bin')
  def test_refuses_a_missing_file(self, name):
    (self.root / name).unlink()
    message = f'{name}: expected this file, got .*train_X.bin'
    with self.assertRaisesRegex(ValueError, message):
      stl10.read(self.root, 'test')

  def test_refuses_another_split(self):
    with self.assertRaisesRegex(ValueError, "split must be .* got 'val'"):
      stl10.read(self.root, 'val')
