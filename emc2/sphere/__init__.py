"""Points on a sphere: energies, tangent spaces, and how to spread them."""

from emc2.sphere import langevin, manifold, neighbours, pairs, schedules
from emc2.sphere.manifold import (
  check_points,
  draw_uniform,
  exponential,
  limit,
  move,
  normalize,
  project,
  retract,
  transport,
)
from emc2.sphere.neighbours import (
  check_triangulation,
  degrees,
  disclination_charges,
  min_distance,
  nearest_distances,
)
from emc2.sphere.pairs import pair_sgd

__all__ = [
  'check_points',
  'check_triangulation',
  'degrees',
  'disclination_charges',
  'draw_uniform',
  'exponential',
  'langevin',
  'limit',
  'manifold',
  'min_distance',
  'move',
  'nearest_distances',
  'neighbours',
  'normalize',
  'pair_sgd',
  'pairs',
  'project',
  'retract',
  'schedules',
  'transport',
]
