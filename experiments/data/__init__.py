"""Images in memory or read by Grain; documents and characters.

Images are digits, STL-10 or image folders. `docstrings` and `text` are modules.
"""

from emc2.experiments.data import docstrings, text
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
  'docstrings',
  'open',
  'steps_per_epoch',
  'text',
)
