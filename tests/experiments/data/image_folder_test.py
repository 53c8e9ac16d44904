"""Image folders: what is read, and what is refused before a run."""

import contextlib
import io
import pathlib
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import Image

from emc2.experiments.data import image_folder


def picture(seed, height=6, width=5):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


class ImageFolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    for name, seeds in (('zebra', (0, 1, 2)), ('ant', (3, 4))):
      (self.root / 'train' / name).mkdir(parents=True)
      for seed in seeds:
        path = self.root / 'train' / name / f'{seed}.png'
        Image.fromarray(picture(seed)).save(path)
    (self.root / 'train' / '.hidden').mkdir()
    (self.root / 'train' / 'ant' / '.DS_Store').write_bytes(b'x')
    self.want = np.stack([picture(seed) for seed in (3, 4, 0, 1, 2)])

  @parameterized.parameters((2**31, True), (0, False))
  def test_reads_sorted_classes_and_files(self, memory_limit, in_memory):
    data = image_folder.read(self.root, 'train', memory_limit=memory_limit)
    self.assertEqual(data.in_memory, in_memory)
    self.assertEqual(data.class_names, ('ant', 'zebra'))
    self.assertEqual(data.labels.tolist(), [0, 0, 1, 1, 1])
    self.assertEqual(data.image_shape, (6, 5, 3))
    order = np.array([4, 0, 0, 2])
    np.testing.assert_array_equal(data.fetch(order), self.want[order])

  def test_resizes(self):
    odd = picture(9, 11, 3)
    Image.fromarray(odd).save(self.root / 'train' / 'zebra' / '9.png')
    data = image_folder.read(self.root, 'train', size=4)
    self.assertEqual(data.images.shape, (6, 4, 4, 3))
    want = Image.fromarray(odd).resize((4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.images[5], np.asarray(want))

  def test_makes_rgb_of_any_mode(self):
    gray = picture(9)[:, :, 0]
    Image.fromarray(gray).save(self.root / 'train' / 'zebra' / '9.bmp')
    data = image_folder.read(self.root, 'train')
    np.testing.assert_array_equal(
      data.images[5], np.repeat(gray[:, :, None], 3, axis=2)
    )

  def test_many_files_are_read_in_order_and_show_progress(self):
    folder = self.root / 'many' / 'class'
    folder.mkdir(parents=True)
    for number in range(40):
      image = np.full((2, 2, 3), number, np.uint8)
      Image.fromarray(image).save(folder / f'{number:02}.png')
    screen = io.StringIO()
    with (
      mock.patch.object(image_folder, '_MANY', 40),
      contextlib.redirect_stderr(screen),
    ):
      data = image_folder.read(self.root, 'many')
    self.assertEqual(data.images[:, 0, 0, 0].tolist(), list(range(40)))
    self.assertIn(f'Checking {self.root / "many"}: 100%', screen.getvalue())
    screen = io.StringIO()
    with contextlib.redirect_stderr(screen):
      image_folder.read(self.root, 'many')
    self.assertEqual(screen.getvalue(), '')

  def test_refuses_a_missing_split(self):
    message = r"val: expected a folder for this split, got \['train'\]"
    with self.assertRaisesRegex(ValueError, message):
      image_folder.read(self.root, 'val')

  def test_refuses_a_split_without_classes(self):
    (self.root / 'val').mkdir()
    (self.root / 'val' / 'notes.txt').write_text('x')
    with self.assertRaisesRegex(ValueError, 'one folder per class, got none'):
      image_folder.read(self.root, 'val')

  def test_refuses_an_empty_class(self):
    (self.root / 'train' / 'bee').mkdir()
    message = 'train/bee: expected images of this class, got none'
    with self.assertRaisesRegex(ValueError, message):
      image_folder.read(self.root, 'train')

  @parameterized.parameters(0, 2**31)
  def test_refuses_what_is_no_image(self, memory_limit):
    (self.root / 'train' / 'ant' / 'notes.txt').write_text('hello')
    message = 'ant/notes.txt: expected a whole image file, got 5 bytes in no'
    with self.assertRaisesRegex(ValueError, message):
      image_folder.read(self.root, 'train', memory_limit=memory_limit)

  def test_refuses_a_folder_among_the_files(self):
    (self.root / 'train' / 'ant' / 'more').mkdir()
    with self.assertRaisesRegex(ValueError, 'ant/more: expected .* directory'):
      image_folder.read(self.root, 'train')

  @parameterized.parameters('.png', '.jpg')
  def test_names_a_file_that_is_cut_short(self, suffix):
    path = self.root / 'train' / 'ant' / f'cut{suffix}'
    Image.fromarray(picture(9, 64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    message = f'ant/cut{suffix}: expected a whole image file, got .*truncated'
    with self.assertRaisesRegex(ValueError, message):
      image_folder.read(self.root, 'train', size=8)
    data = image_folder.read(self.root, 'train', size=8, memory_limit=0)
    self.assertEqual(data.fetch([0]).shape, (1, 8, 8, 3))
    with self.assertRaisesRegex(ValueError, message):
      data.fetch([2])

  def test_refuses_different_sizes(self):
    path = self.root / 'train' / 'zebra' / '9.png'
    Image.fromarray(picture(9, 7, 5)).save(path)
    message = r'zebra/9.png: expected 5x6 pixels as in .*ant/3.png, got 5x7'
    with self.assertRaisesRegex(ValueError, message):
      image_folder.read(self.root, 'train')

  def test_refuses_a_size_below_one(self):
    with self.assertRaisesRegex(ValueError, 'size must be .* got 0'):
      image_folder.read(self.root, 'train', size=0)
