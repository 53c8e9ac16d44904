"""Both products of a generalised linear model's Hessian, in one pass."""

from emc2.kernels.glm_hvp.api import (
  Product,
  glm_hvp,
  glm_hvp_padded,
  tpu_takes_padded,
)

__all__ = ['Product', 'glm_hvp', 'glm_hvp_padded', 'tpu_takes_padded']
