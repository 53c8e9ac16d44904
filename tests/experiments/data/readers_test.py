"""The right reader for each name and folder."""

import pathlib

import numpy as np
from absl.testing import parameterized
from PIL import Image

from emc2.experiments import data


class OpenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_digits(self):
    self.assertEqual(data.open('digits', 'train', 8).num_samples, 1437)
    with self.assertRaisesRegex(ValueError, 'digits: size .* 8, got 36'):
      data.open('digits', 'train', 36)

  @parameterized.parameters('.', 'stl10_binary')
  def test_stl10(self, folder):
    path = self.root / folder
    path.mkdir(exist_ok=True)
    (path / 'unlabeled_X.bin').write_bytes(bytes(2 * 27648))
    found = data.open(self.root, 'unlabeled')
    self.assertEqual(found.images.shape, (2, 96, 96, 3))
    found = data.open(str(self.root), 'unlabeled', memory_limit=10)
    self.assertFalse(found.in_memory)
    with self.assertRaisesRegex(ValueError, 'size must be None or 96, got 32'):
      data.open(self.root, 'unlabeled', 32)

  def test_image_folder(self):
    folder = self.root / 'test' / 'cat'
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(folder / 'a.png')
    self.assertEqual(data.open(self.root, 'test').image_shape, (6, 6, 3))
    self.assertEqual(data.open(self.root, 'test', 4).image_shape, (4, 4, 3))
    lazy = data.open(self.root, 'test', memory_limit=10)
    self.assertFalse(lazy.in_memory)

  def test_refuses_what_is_not_there(self):
    with self.assertRaisesRegex(ValueError, "nowhere: expected 'digits' or"):
      data.open(self.root / 'nowhere', 'train')
