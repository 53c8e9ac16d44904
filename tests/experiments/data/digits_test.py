"""The digits: a fixed split, every image scikit-learn's own."""

import numpy as np
from absl.testing import parameterized
from sklearn import datasets

from emc2.experiments.data import digits


class DigitsTest(parameterized.TestCase):
  def test_splits_hold_every_digit_once(self):
    train, test = digits.read('train'), digits.read('test')
    self.assertEqual(train.images.shape, (1437, 8, 8, 1))
    self.assertEqual(test.images.shape, (360, 8, 8, 1))
    bunch = datasets.load_digits()
    level = np.round(bunch.images * 255 / 16)
    want = sorted(
      (int(label), tuple(image.ravel()))
      for label, image in zip(bunch.target, level, strict=True)
    )
    got = sorted(
      (int(label), tuple(image.ravel()))
      for part in (train, test)
      for label, image in zip(part.labels, part.images, strict=True)
    )
    self.assertEqual(got, want)
    self.assertEqual(train.images.max(), 255)
    self.assertEqual(train.images.dtype, np.uint8)

  def test_is_stratified(self):
    for split in digits.SPLITS:
      data = digits.read(split)
      share = np.bincount(data.labels) / data.num_samples
      np.testing.assert_allclose(share, 0.1, atol=0.005)
      self.assertEqual(data.class_names, tuple('0123456789'))
      self.assertEqual(data.labels.dtype, np.int32)

  def test_is_the_same_each_time(self):
    first, second = digits.read('test'), digits.read('test')
    np.testing.assert_array_equal(first.images, second.images)

  def test_refuses_another_split(self):
    with self.assertRaisesRegex(ValueError, "digits: split .* got 'val'"):
      digits.read('val')
