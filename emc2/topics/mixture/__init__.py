"""Mixtures of conjugate exponential families.

A model is made by `model.make` of a family; a method of it is made by the
function that bears its file's name, for instance
`mixture.esvi.esvi(model, num_blocks=4)`.
"""

from emc2.topics.mixture import esvi, families, model, svi, vi
from emc2.topics.mixture.families import (
  Family,
  Statistics,
  gaussian_diagonal,
  gaussian_full,
  multinomial,
)
from emc2.topics.mixture.model import Model, elbo, elbo_at, make

__all__ = [
  'Family',
  'Model',
  'Statistics',
  'elbo',
  'elbo_at',
  'esvi',
  'families',
  'gaussian_diagonal',
  'gaussian_full',
  'make',
  'model',
  'multinomial',
  'svi',
  'vi',
]
