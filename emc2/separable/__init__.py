"""Models whose parameters are split as their data are, on one ring."""

from emc2.separable import (
  ds_facto,
  ds_mlr,
  fm_cells,
  mlr_cells,
  sliced,
  whitening,
)
from emc2.separable.rows import SparseRows, from_csr

__all__ = [
  'SparseRows',
  'ds_facto',
  'ds_mlr',
  'fm_cells',
  'from_csr',
  'mlr_cells',
  'sliced',
  'whitening',
]
