"""Points on a sphere: energies, tangent spaces, and how to spread them."""

from emc2.sphere import (
  basin_hopping,
  closed_forms,
  configurations,
  langevin,
  manifold,
  minima,
  minimize,
  neighbours,
  pairs,
  schedules,
  symmetry,
)
from emc2.sphere.energy import energy
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
from emc2.sphere.minima import Minimum, best_known
from emc2.sphere.neighbours import (
  check_triangulation,
  degrees,
  disclination_charges,
  min_distance,
  nearest_distances,
)
from emc2.sphere.pairs import pair_sgd
from emc2.sphere.symmetry import icosadeltahedral, symmetric_seed

__all__ = [
  'Minimum',
  'basin_hopping',
  'best_known',
  'check_points',
  'check_triangulation',
  'closed_forms',
  'configurations',
  'degrees',
  'disclination_charges',
  'draw_uniform',
  'energy',
  'exponential',
  'icosadeltahedral',
  'langevin',
  'limit',
  'manifold',
  'min_distance',
  'minima',
  'minimize',
  'move',
  'nearest_distances',
  'neighbours',
  'normalize',
  'pair_sgd',
  'pairs',
  'project',
  'retract',
  'schedules',
  'symmetric_seed',
  'symmetry',
  'transport',
]
