"""What every reader gives: images by number, with their labels."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

MEMORY_LIMIT = 2**31
"""Default number of bytes up to which a reader loads all images."""


@runtime_checkable
class Source(Protocol):
  """Images that stay on disk; reads like an array along its first axis."""

  shape: tuple[int, int, int, int]

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    """Reads images index (n,) as (n, height, width, channels) uint8."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Labelled or unlabelled images of one size.

  Attributes:
    images: (n, height, width, channels) uint8, an array in memory or a
      `Source` (a memory map counts as one).
    labels: (n,) int32 in [0, number of classes), or None.
    class_names: The name of each label; empty without labels.
  """

  images: np.ndarray | Source
  labels: np.ndarray | None = None
  class_names: tuple[str, ...] = ()

  @property
  def num_samples(self) -> int:
    """How many images there are."""
    return self.images.shape[0]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return tuple(self.images.shape[1:])

  @property
  def in_memory(self) -> bool:
    """Whether `images` is an array that can be put on a device as it is."""
    mapped = isinstance(self.images, np.memmap)
    return isinstance(self.images, np.ndarray) and not mapped

  def fetch(self, index: jax.typing.ArrayLike | Sequence[int]) -> np.ndarray:
    """Reads any images, in the order asked for; repeats are allowed.

    Args:
      index: (n,) integers in [0, num_samples).

    Returns:
      (n, height, width, channels) uint8.

    Raises:
      ValueError: If an index names no sample.

    Examples:
      >>> dataset = Dataset(np.arange(6, dtype=np.uint8).reshape(3, 1, 2, 1))
      >>> dataset.fetch([2, 0]).reshape(2, 2).tolist()
      [[4, 5], [0, 1]]
    """
    index = np.asarray(index, np.int64)
    outside = index[(index < 0) | (index >= self.num_samples)]
    if outside.size:
      raise ValueError(
        f'index must lie in [0, {self.num_samples}), got {outside[0]}.'
      )
    return np.asarray(self.images[index])


def keep(images: np.ndarray | Source, memory_limit: int) -> np.ndarray | Source:
  """Loads `images` if their bytes are within the limit, else leaves them.

  Args:
    images: (n, height, width, channels) uint8, on disk.
    memory_limit: In bytes.

  Returns:
    An array in memory, or what came.
  """
  if int(np.prod(images.shape, dtype=np.int64)) > memory_limit:
    return images
  return np.array(images[np.arange(images.shape[0])])
