"""Newton methods for convex objectives, whose models are bounded by a cubic."""

from emc2.newton import (
  coordinates,
  features,
  full,
  krylov,
  losses,
  problem,
  regularization,
  solve,
  steps,
)
from emc2.newton.coordinates import subspace_cubic_newton
from emc2.newton.full import cubic_newton
from emc2.newton.krylov import krylov_cubic_newton
from emc2.newton.regularization import Result
from emc2.newton.steps import Info, State

__all__ = [
  'Info',
  'Result',
  'State',
  'coordinates',
  'cubic_newton',
  'features',
  'full',
  'krylov',
  'krylov_cubic_newton',
  'losses',
  'problem',
  'regularization',
  'solve',
  'steps',
  'subspace_cubic_newton',
]
