"""Models whose parameters are split as their data are, on one ring."""

from emc2.separable.rows import SparseRows, from_csr

__all__ = ['SparseRows', 'from_csr']
