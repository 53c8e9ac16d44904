"""STL-10 in its binary form: `SPLIT_X.bin` and, with labels, `SPLIT_y.bin`."""

import pathlib

import numpy as np

from emc2.experiments.data import dataset

CLASS_NAMES = (
  'airplane',
  'bird',
  'car',
  'cat',
  'deer',
  'dog',
  'horse',
  'monkey',
  'ship',
  'truck',
)
SPLITS = ('train', 'test', 'unlabeled')
_SIZE = 96
_IMAGE_BYTES = 3 * _SIZE * _SIZE


def read(
  root: str | pathlib.Path,
  split: str,
  *,
  memory_limit: int = dataset.MEMORY_LIMIT,
) -> dataset.Dataset:
  """Reads one split; above `memory_limit` the images stay a memory map.

  On disk an image is three planes (red, green, blue), each column by column;
  labels run from 1 to 10.

  Args:
    root: The folder that holds the `.bin` files.
    split: 'train', 'test' or 'unlabeled'.
    memory_limit: Bytes up to which all images are loaded.

  Returns:
    Images (n, 96, 96, 3); 'unlabeled' has no labels.

  Raises:
    ValueError: If a file is missing, is cut short, or its labels do not fit.

  References:
    Coates, Lee, Ng, "An Analysis of Single Layer Networks in Unsupervised
    Feature Learning", 2011, https://cs.stanford.edu/~acoates/stl10
  """
  if split not in SPLITS:
    raise ValueError(f"{root}: split must be one of {SPLITS}, got '{split}'.")
  path = _existing(pathlib.Path(root) / f'{split}_X.bin')
  num_bytes = path.stat().st_size
  if num_bytes == 0 or num_bytes % _IMAGE_BYTES:
    raise ValueError(
      f'{path}: expected one or more images of {_IMAGE_BYTES} bytes, got '
      f'{num_bytes} bytes ({num_bytes % _IMAGE_BYTES} too many).'
    )
  planes = np.memmap(path, np.uint8, 'r').reshape(-1, 3, _SIZE, _SIZE)
  images = dataset.keep(planes.transpose(0, 3, 2, 1), memory_limit)
  if split == 'unlabeled':
    return dataset.Dataset(images)
  labels = _labels(pathlib.Path(root) / f'{split}_y.bin', planes.shape[0])
  return dataset.Dataset(images, labels, CLASS_NAMES)


def _labels(path: pathlib.Path, num_images: int) -> np.ndarray:
  labels = np.fromfile(_existing(path), np.uint8)
  if labels.size != num_images:
    raise ValueError(
      f'{path}: expected {num_images} labels, one per image, got {labels.size}.'
    )
  wrong = np.flatnonzero((labels < 1) | (labels > 10))
  if wrong.size:
    raise ValueError(
      f'{path}: expected labels from 1 to 10, got {labels[wrong[0]]} at byte '
      f'{wrong[0]}.'
    )
  return labels.astype(np.int32) - 1


def _existing(path: pathlib.Path) -> pathlib.Path:
  if not path.is_file():
    names = sorted(other.name for other in path.parent.glob('*.bin'))
    raise ValueError(f'{path}: expected this file, got {names}.')
  return path
