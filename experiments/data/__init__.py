"""Images in memory or read by Grain; documents and characters.

Images are digits, STL-10 or image folders. Documents as bags of words:
`bag_of_words`, `document_batches`; as text: `docstrings`, `text`. All four are
modules.
"""

from emc2.experiments.data import (
  bag_of_words,
  docstrings,
  document_batches,
  text,
)
from emc2.experiments.data.dataset import MEMORY_LIMIT, Dataset, Source
from emc2.experiments.data.loader import batches
from emc2.experiments.data.order import batch_indices, steps_per_epoch
from emc2.experiments.data.readers import open

__all__ = (
  'MEMORY_LIMIT',
  'Dataset',
  'Source',
  'bag_of_words',
  'batch_indices',
  'batches',
  'docstrings',
  'document_batches',
  'open',
  'steps_per_epoch',
  'text',
)
