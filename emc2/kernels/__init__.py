"""Hot loops by hand: each kernel with its plain JAX reference."""

from emc2.kernels import lowering, metropolis, riesz, row_logsumexp, topic_tile

__all__ = ['lowering', 'metropolis', 'riesz', 'row_logsumexp', 'topic_tile']
