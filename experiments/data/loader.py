"""Batches from the host through Grain, for images that no device can hold."""

import grain
import numpy as np
from absl import flags

from emc2.experiments.data import dataset as dataset_lib
from emc2.experiments.data import order


class _Fetch(grain.transforms.Map):
  """Maps the number of a step to its batch."""

  def __init__(self, dataset: dataset_lib.Dataset, **settings):
    self._dataset = dataset
    self._settings = settings

  def map(self, step: int) -> dict[str, np.ndarray]:
    index = order.batch_indices(step=step, **self._settings)
    batch = {'index': index, 'image': self._dataset.fetch(index)}
    if self._dataset.labels is not None:
      batch['label'] = self._dataset.labels[index]
    return batch


def batches(
  dataset: dataset_lib.Dataset,
  *,
  batch_size: int,
  seed: int = 0,
  shard_index: int = 0,
  num_shards: int = 1,
  prefetch: int = 4,
  num_workers: int = 0,
) -> grain.IterDataset:
  """An endless stream of shuffled batches, epoch after epoch.

  The order is that of :func:`order.batch_indices`. Iterators have Grain's
  `get_state` and `set_state`; without workers the state is the number of
  batches given out, and fits a run with any number of processes.

  Args:
    dataset: What to read.
    batch_size: Of all processes together.
    seed: Of the order, in [0, 2**32).
    shard_index: Which process this is.
    num_shards: How many there are; each reads an equal part of every batch.
    prefetch: Batches read ahead by a thread; 0 reads when asked.
    num_workers: Reading processes beside this one, each with its own
      `prefetch`. They need absl flags to be parsed, as a binary does and a
      notebook does not.

  Returns:
    Batches `index` (b,) int32, the numbers of the samples in `dataset`; `image`
    (b, height, width, channels) uint8; and `label` (b,) int32 if there are any.

  Raises:
    ValueError: If the sizes do not fit, or workers lack the flags.

  Examples:
    >>> images = np.zeros((8, 2, 2, 1), np.uint8)
    >>> stream = iter(batches(dataset_lib.Dataset(images), batch_size=4))
    >>> next(stream)['image'].shape, stream.get_state()
    ((4, 2, 2, 1), {'next_index': 1})
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed must lie in [0, 2**32), got {seed}.')
  if num_workers and not flags.FLAGS.is_parsed():
    raise ValueError(
      'num_workers must be 0 where absl flags are not parsed, got '
      f'{num_workers}: Grain reads them to start a process.'
    )
  settings = dict(
    seed=seed,
    num_samples=dataset.num_samples,
    batch_size=batch_size,
    shard_index=shard_index,
    num_shards=num_shards,
  )
  order.batch_indices(step=0, **settings)  # Refuses sizes that do not fit.
  read = grain.ReadOptions(
    num_threads=min(1, prefetch), prefetch_buffer_size=prefetch
  )
  steps = grain.MapDataset.range(np.iinfo(np.int32).max)
  stream = steps.map(_Fetch(dataset, **settings)).to_iter_dataset(read)
  if num_workers:
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers))
  return stream
