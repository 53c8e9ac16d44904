"""Image folders: `root/split/class/file`, the way most people hold images."""

import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm
from PIL import Image, UnidentifiedImageError

from emc2.experiments.data import dataset

_MANY = 10_000  # Files from which on the work shows its progress.
_CHUNK = 16  # Files that a thread takes at a time.
_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class _Files:
  """A `dataset.Source` that decodes on demand, on all cores."""

  def __init__(self, paths: list[str], size: tuple[int, int]):
    self._paths = paths
    self._size = size  # Width and height, as PIL has it.
    self.shape = (len(paths), size[1], size[0], 3)

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    images = np.empty((len(index), *self.shape[1:]), np.uint8)

    def decode(row):
      images[row] = _decode(self._paths[index[row]], self._size)

    _map(decode, range(len(index)), 'Decoding')
    return images


def read(
  root: str | pathlib.Path,
  split: str,
  *,
  size: int | None = None,
  memory_limit: int = dataset.MEMORY_LIMIT,
) -> dataset.Dataset:
  """Reads `root/split/class/file` as RGB; every header is checked at once.

  Classes are the sorted names of the folders, samples the sorted files within
  them. Hidden files (`.name`) are passed over. Whatever PIL knows is an image.

  Args:
    root: The folder that holds the splits.
    split: The name of one of them.
    size: Side in pixels of the square to which each image is resized (bilinear
      with antialiasing, whatever its aspect); None keeps the size, which must
      then be the same for all.
    memory_limit: Bytes up to which all images are decoded and kept; above, they
      are decoded when asked for.

  Returns:
    Images (n, height, width, 3) with labels.

  Raises:
    ValueError: If a folder is missing or empty, a file is no image, or sizes
      differ and `size` is None.
  """
  if size is not None and size < 1:
    raise ValueError(f'size must be None or at least 1, got {size}.')
  folder = pathlib.Path(root) / split
  if not folder.is_dir():
    found = [path.name for path in _visible(pathlib.Path(root))]
    raise ValueError(
      f'{folder}: expected a folder for this split, got {found}.'
    )
  classes = [path for path in _visible(folder) if path.is_dir()]
  if not classes:
    raise ValueError(f'{folder}: expected one folder per class, got none.')
  paths, labels = [], []
  for label, path in enumerate(classes):
    files = _visible(path)
    if not files:
      raise ValueError(f'{path}: expected images of this class, got none.')
    paths.extend(map(str, files))
    labels.extend([label] * len(files))
  sizes = _map(_header, paths, f'Checking {folder}')
  if size is None:
    for path, other in zip(paths, sizes, strict=True):
      if other != sizes[0]:
        raise ValueError(
          f'{path}: expected {_by(sizes[0])} pixels as in {paths[0]}, got '
          f'{_by(other)}; give a size to resize to.'
        )
  files = _Files(paths, sizes[0] if size is None else (size, size))
  return dataset.Dataset(
    images=dataset.keep(files, memory_limit),
    labels=np.asarray(labels, np.int32),
    class_names=tuple(path.name for path in classes),
  )


def _header(path: str) -> tuple[int, int]:
  """Reads width and height without decoding."""
  try:
    with Image.open(path) as image:
      return image.size
  except _BROKEN as error:
    raise ValueError(_complaint(path, error)) from error


def _decode(path: str, size: tuple[int, int]) -> np.ndarray:
  try:
    with Image.open(path) as image:
      image = image.convert('RGB')
  except _BROKEN as error:
    raise ValueError(_complaint(path, error)) from error
  if image.size != size:
    image = image.resize(size, Image.Resampling.BILINEAR)
  return np.asarray(image)


def _complaint(path: str, error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):
    found = f'{os.path.getsize(path)} bytes in no format that PIL knows'
  else:
    found = f'{error}'
  return f'{path}: expected a whole image file, got {found}.'


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  """The entries of a folder that are not hidden, sorted; none if it lacks."""
  if not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir() if not p.name.startswith('.'))


def _map(function: Callable, items: Sequence[Any], title: str) -> list[Any]:
  """`list(map(function, items))` on all cores; a long one shows progress."""
  if len(items) <= _CHUNK:  # A pool costs more than it saves.
    return [function(item) for item in items]
  chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
  results = []
  with (
    futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    tqdm.tqdm(desc=title, total=len(items), disable=len(items) < _MANY) as bar,
  ):
    for part in pool.map(lambda chunk: [function(i) for i in chunk], chunks):
      results.extend(part)
      bar.update(len(part))
  return results


def _by(size: tuple[int, int]) -> str:
  return f'{size[0]}x{size[1]}'
