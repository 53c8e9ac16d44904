"""A block of a factorisation machine meets the rows of a worker."""

from emc2.kernels.fm_visit.api import accumulate, gradient
from emc2.kernels.fm_visit.reference import Bags, count

__all__ = ['Bags', 'accumulate', 'count', 'gradient']
