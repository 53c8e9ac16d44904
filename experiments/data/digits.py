"""The 1,797 handwritten digits that scikit-learn carries; no download."""

import numpy as np
from sklearn import datasets, model_selection

from emc2.experiments.data import dataset

SPLITS = ('train', 'test')
_NUM_TEST = 360  # A fifth.


def read(split: str) -> dataset.Dataset:
  """Reads one part of a fixed split, each digit equally frequent in both.

  Args:
    split: 'train' (1,437 images) or 'test' (360).

  Returns:
    Images (n, 8, 8, 1): the 17 grey levels spread over 0 to 255.

  Raises:
    ValueError: If there is no such split.

  References:
    Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://doi.org/10.24432/C50P49
  """
  if split not in SPLITS:
    raise ValueError(f"digits: split must be one of {SPLITS}, got '{split}'.")
  bunch = datasets.load_digits()
  parts = model_selection.train_test_split(
    np.arange(bunch.target.size),
    test_size=_NUM_TEST,
    stratify=bunch.target,
    random_state=0,
  )
  index = np.sort(parts[SPLITS.index(split)])
  images = np.rint(bunch.images[index] * (255 / 16)).astype(np.uint8)
  return dataset.Dataset(
    images=images[..., None],
    labels=bunch.target[index].astype(np.int32),
    class_names=tuple(str(name) for name in bunch.target_names),
  )
