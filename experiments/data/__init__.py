"""Image data: digits, STL-10, image folders; in memory or read by Grain."""

from emc2.experiments.data.dataset import MEMORY_LIMIT, Dataset, Source
from emc2.experiments.data.loader import batches
from emc2.experiments.data.order import batch_indices, steps_per_epoch
from emc2.experiments.data.readers import open

__all__ = (
  'MEMORY_LIMIT',
  'Dataset',
  'Source',
  'batch_indices',
  'batches',
  'open',
  'steps_per_epoch',
)
