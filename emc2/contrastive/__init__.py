"""Contrastive learning on the global objective, with batches of any size.

A method is made by the function that bears its file's name, for instance
`contrastive.emc2.emc2(num_samples, inverse_temperature=5.0)`.
"""

from emc2.contrastive import (
  emc2,
  isogclr,
  moco,
  moving_average,
  negative_cache,
  objective,
  simclr,
  sogclr,
)
from emc2.contrastive.estimator import (
  PLAIN_VIEW,
  Batch,
  EmbedFn,
  Estimator,
  Info,
  State,
  Views,
  algorithm,
  check_batch,
  draw_views,
  embed_batch,
  shard_surrogate,
)

__all__ = [
  'PLAIN_VIEW',
  'Batch',
  'EmbedFn',
  'Estimator',
  'Info',
  'State',
  'Views',
  'algorithm',
  'check_batch',
  'draw_views',
  'embed_batch',
  'emc2',
  'isogclr',
  'moco',
  'moving_average',
  'negative_cache',
  'objective',
  'shard_surrogate',
  'simclr',
  'sogclr',
]
