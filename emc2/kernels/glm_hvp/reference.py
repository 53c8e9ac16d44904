"""Both products of a generalised linear model's Hessian, in plain JAX.

Dense features are read twice: XLA makes a loop of its own for each product.
Padded-sparse rows are gathered from and scattered to, one column of the tables
at a time, so that no product of an entry is stored.
"""

import jax
import jax.numpy as jnp


def _matmul(x, y):
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def dense(
  features: jax.Array, curvature: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """See :func:`emc2.kernels.glm_hvp.glm_hvp`."""
  features = features.astype(vector.dtype)
  scores = _matmul(features, vector)
  return _matmul(curvature * scores, features), scores


def padded(
  ids: jax.Array,
  values: jax.Array | None,
  curvature: jax.Array,
  vector: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """See :func:`emc2.kernels.glm_hvp.glm_hvp_padded`."""
  dtype, table = vector.dtype, jnp.pad(vector, (0, 1))
  scores = jnp.zeros_like(curvature)
  for k in range(ids.shape[0]):
    terms = table.at[ids[k]].get(mode='promise_in_bounds')
    scores += terms if values is None else values[k].astype(dtype) * terms
  terms = jnp.broadcast_to(curvature * scores, ids.shape)
  terms = terms if values is None else values.astype(dtype) * terms
  image = jnp.zeros_like(table).at[ids].add(terms, mode='promise_in_bounds')
  return image[:-1], scores
