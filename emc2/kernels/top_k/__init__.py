"""The largest entries by magnitude."""

from emc2.kernels.top_k.api import TopK, top_k

__all__ = ['TopK', 'top_k']
