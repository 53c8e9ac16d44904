"""Metropolis-Hastings negatives: similarity, draw and walk in one kernel."""

from emc2.kernels.metropolis.api import metropolis
from emc2.kernels.metropolis.reference import Draws

__all__ = ['Draws', 'metropolis']
