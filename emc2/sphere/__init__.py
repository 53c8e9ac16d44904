"""Points on a sphere: energies, tangent spaces, and how to spread them."""

from emc2.sphere import manifold
from emc2.sphere.manifold import (
  check_points,
  draw_uniform,
  exponential,
  limit,
  normalize,
  project,
  retract,
  transport,
)

__all__ = [
  'check_points',
  'draw_uniform',
  'exponential',
  'limit',
  'manifold',
  'normalize',
  'project',
  'retract',
  'transport',
]
