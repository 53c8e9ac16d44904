"""All-pairs Riesz potentials and forces in O(n) memory."""

from emc2.kernels.riesz.api import Riesz, riesz

__all__ = ['Riesz', 'riesz']
