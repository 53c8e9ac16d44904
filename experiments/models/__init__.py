"""The Flax NNX networks that runs share."""

from emc2.experiments.models import decoder
from emc2.experiments.models.encoder import (
  NAMES,
  Encoder,
  PureEncoder,
  build,
  draw_params,
  split,
)

__all__ = [
  'NAMES',
  'Encoder',
  'PureEncoder',
  'build',
  'decoder',
  'draw_params',
  'split',
]
