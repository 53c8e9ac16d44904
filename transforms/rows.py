"""Trees whose leaves hold points of unit spheres along their last axis."""

import functools
from typing import Any

import jax
import numpy as np
import optax

from emc2.sphere import manifold

MAPS = ('retraction', 'exponential')
"""The ways to follow a tangent vector."""


def check_params(params: optax.Params | None, name: str) -> None:
  """Refuses an update that does not know at which points it is made."""
  if params is None:
    raise ValueError(f'params must hold the points for {name}, got None.')


def check_map(map: str) -> None:
  """Refuses a map that is not known by that name."""
  if map not in MAPS:
    raise ValueError(f'map must be one of {MAPS}, got {map!r}.')


def check_positive(value: jax.typing.ArrayLike, name: str) -> None:
  """Refuses what is not positive; a traced scalar passes."""
  if not isinstance(value, jax.core.Tracer) and not value > 0:
    raise ValueError(f'{name} must be positive, got {value}.')


def wide_dtype(*leaves: Any) -> np.dtype:
  """The least dtype that holds arrays or their shapes, and at least float32."""
  dtypes = [leaf.dtype for leaf in leaves]
  return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def project(params: optax.Params, vectors: optax.Updates) -> optax.Updates:
  """Projects vectors to the tangent spaces; what is masked out stays so."""

  def leaf(vector, points):
    if is_masked(vector):
      return vector
    dtype = wide_dtype(points, vector)
    tangent = manifold.project(points.astype(dtype), vector.astype(dtype))
    return tangent.astype(vector.dtype)

  is_masked = lambda node: isinstance(node, optax.MaskedNode)
  return jax.tree.map(leaf, vectors, params, is_leaf=is_masked)


def move(
  map: str, params: optax.Params, vectors: optax.Updates
) -> optax.Params:
  """Follows the vectors from the points, in dtypes of at least float32."""

  def leaf(points, vector):
    dtype = wide_dtype(points, vector)
    points, vector = points.astype(dtype), vector.astype(dtype)
    if map == 'retraction':
      return manifold.retract(points, vector)
    # Rounding, and vectors not quite tangent, would add up over many moves.
    return manifold.normalize(manifold.exponential(points, vector))

  return jax.tree.map(leaf, params, vectors)


def subtract(ends: optax.Params, params: optax.Params) -> optax.Updates:
  """The updates, of the dtypes of the params, that lead to the ends."""
  return jax.tree.map(
    lambda end, point: (end - point.astype(end.dtype)).astype(point.dtype),
    ends,
    params,
  )
