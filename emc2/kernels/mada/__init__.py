"""The update of MADA and its derivatives in the coefficients."""

from emc2.kernels.mada.api import advance, direction, exchange
from emc2.kernels.mada.reference import Constants, Moments, Scalars, Settings

__all__ = [
  'Constants',
  'Moments',
  'Scalars',
  'Settings',
  'advance',
  'direction',
  'exchange',
]
