"""Stochastic optimisation research in JAX.

The core knows jax and numpy only. Gradient transformations stand in
:mod:`emc2.transforms`, programs in :mod:`emc2.experiments`; neither is imported
from here.
"""

from emc2 import (
  algorithm,
  compression,
  consensus,
  contrastive,
  densify,
  indexed_slices,
  kernels,
  linalg,
  mesh,
  newton,
  ring,
  separable,
  sphere,
  topics,
)

__version__ = '0.1.0'

__all__ = [
  'algorithm',
  'compression',
  'consensus',
  'contrastive',
  'densify',
  'indexed_slices',
  'kernels',
  'linalg',
  'mesh',
  'newton',
  'ring',
  'separable',
  'sphere',
  'topics',
]
