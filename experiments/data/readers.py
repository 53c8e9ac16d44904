"""Picks the reader for a name or a folder."""

import pathlib

from emc2.experiments.data import dataset, digits, image_folder, stl10


def open(
  name_or_path: str | pathlib.Path,
  split: str,
  size: int | None = None,
  *,
  memory_limit: int = dataset.MEMORY_LIMIT,
) -> dataset.Dataset:
  """Opens one split of image data, whatever the format.

  Args:
    name_or_path: 'digits'; or a folder with STL-10's `.bin` files (or with
      their folder `stl10_binary`); or a folder `split/class/file`.
    split: 'train', 'test', for STL-10 also 'unlabeled', or any folder's name.
    size: Side of the square to which the images of a folder are resized; None
      keeps their size. The other formats have one size only.
    memory_limit: Bytes up to which all images are loaded.

  Returns:
    The images and labels.

  Raises:
    ValueError: If something is missing or broken, in one line that names the
      file, what was expected and what came.

  Examples:
    >>> open('digits', 'test').images.shape
    (360, 8, 8, 1)
  """
  if str(name_or_path) == 'digits':
    return _with_size(digits.read(split), 'digits', size)
  root = pathlib.Path(name_or_path).expanduser()
  if not root.is_dir():
    raise ValueError(f"{root}: expected 'digits' or a folder, got neither.")
  for folder in (root, root / 'stl10_binary'):
    if any(folder.glob('*_X.bin')):
      found = stl10.read(folder, split, memory_limit=memory_limit)
      return _with_size(found, folder, size)
  return image_folder.read(root, split, size=size, memory_limit=memory_limit)


def _with_size(found: dataset.Dataset, name, size: int | None):
  if size not in (None, found.image_shape[0]):
    raise ValueError(
      f'{name}: size must be None or {found.image_shape[0]}, got {size}; '
      'only image folders are resized.'
    )
  return found
