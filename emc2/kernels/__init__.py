"""Hot loops by hand: each kernel with its plain JAX reference."""

from emc2.kernels import lowering, metropolis, row_logsumexp

__all__ = ['lowering', 'metropolis', 'row_logsumexp']
