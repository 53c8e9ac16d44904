"""Optax gradient transformations, one file each."""

from emc2.transforms.add_tangent_noise import (
  AddTangentNoiseState,
  add_tangent_noise,
)
from emc2.transforms.avgrad import (
  ScaleByAvgradState,
  avgrad,
  scale_by_avgrad,
)
from emc2.transforms.backtrack import BacktrackState, backtrack
from emc2.transforms.compressed_mean import (
  CompressedMeanState,
  compressed_mean,
  compressed_mean_specs,
  reset_memory,
  sent_bits,
)
from emc2.transforms.densify import densify
from emc2.transforms.krylov_cubic_newton import (
  KrylovCubicNewtonState,
  krylov_cubic_newton,
)
from emc2.transforms.lars import lars
from emc2.transforms.mada import (
  COEFFICIENTS,
  ScaleByMadaState,
  mada,
  mada_coefficients,
  scale_by_mada,
)
from emc2.transforms.powersgd_momentum import (
  PowersgdMomentumState,
  powersgd_momentum,
)
from emc2.transforms.quantize_state import (
  UNSIGNED_FIELDS,
  QuantizeStateState,
  quantize_state,
)
from emc2.transforms.riemannian import (
  MOMENTUM_BUFFERS,
  cap_rows,
  project_tangent,
  retract,
  riemannian,
  search_on_sphere,
  transport_momentum,
)
from emc2.transforms.row_wise import apply_updates, row_wise
from emc2.transforms.scale_by_adam_8bit import (
  ScaleByAdam8bitState,
  adamw_8bit,
  scale_by_adam_8bit,
)
from emc2.transforms.scale_by_row_adam import (
  ScaleByRowAdamState,
  scale_by_row_adam,
)

if __name__ != 'emc2.transforms':
  raise ImportError(
    f'This package is emc2.transforms, not {__name__}: under two names its '
    'classes would be two classes each.'
  )

__all__ = [
  'COEFFICIENTS',
  'MOMENTUM_BUFFERS',
  'AddTangentNoiseState',
  'BacktrackState',
  'CompressedMeanState',
  'KrylovCubicNewtonState',
  'PowersgdMomentumState',
  'ScaleByAvgradState',
  'ScaleByMadaState',
  'ScaleByRowAdamState',
  'add_tangent_noise',
  'apply_updates',
  'avgrad',
  'backtrack',
  'cap_rows',
  'compressed_mean',
  'compressed_mean_specs',
  'densify',
  'krylov_cubic_newton',
  'lars',
  'mada',
  'mada_coefficients',
  'powersgd_momentum',
  'project_tangent',
  'reset_memory',
  'retract',
  'riemannian',
  'row_wise',
  'scale_by_avgrad',
  'scale_by_mada',
  'scale_by_row_adam',
  'search_on_sphere',
  'sent_bits',
  'transport_momentum',
  'UNSIGNED_FIELDS',
  'QuantizeStateState',
  'quantize_state',
  'ScaleByAdam8bitState',
  'adamw_8bit',
  'scale_by_adam_8bit',
]
