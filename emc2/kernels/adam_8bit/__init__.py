"""A step of Adam on moments that are kept in blocks of 8-bit codes."""

from emc2.kernels.adam_8bit.api import step
from emc2.kernels.adam_8bit.reference import Scalars, step_32

__all__ = ['Scalars', 'step', 'step_32']
