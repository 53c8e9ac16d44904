"""Charges on spheres, written plainly: what the transforms are tried on."""

import jax
import jax.numpy as jnp
import numpy as np

MINIMA = {12: 49.165253058, 32: 412.261274651, 50: 1055.182314726}
"""Number of points on the sphere in three dimensions to the least energy."""


def energy(points):
  """Sum of 1 / r over unordered pairs of (n, k) points."""
  gaps = points[:, None] - points[None]
  same = jnp.eye(len(points), dtype=points.dtype)
  # The distance 1 of a point to itself is taken off again.
  inverse = jax.lax.rsqrt(jnp.sum(gaps**2, axis=-1) + same)
  return jnp.sum(inverse * (1 - same)) / 2


def gradient(points):
  """The gradient in space of `energy`, by NumPy, one pair after another."""
  points = np.asarray(points, np.float64)
  result = np.zeros_like(points)
  for i, x in enumerate(points):
    for j, y in enumerate(points):
      if i != j:
        result[i] -= (x - y) / np.linalg.norm(x - y) ** 3
  return result


def uniform(seed, *shape, dtype=np.float32):
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=shape)
  return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(dtype)


def project(points, vectors):
  """Row after row, in float64."""
  points, vectors = np.asarray(points), np.asarray(vectors)
  result = np.array(vectors, np.float64)
  for at in np.ndindex(points.shape[:-1]):
    x, v = points[at].astype(np.float64), result[at]
    result[at] = v - (v @ x) * x
  return result


def normalize(rows):
  rows = np.asarray(rows, np.float64)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def follow(map, points, vectors):
  """Where vectors lead, by the formulas, in float64."""
  points = np.asarray(points, np.float64)
  vectors = np.asarray(vectors, np.float64)
  if map == 'retraction':
    return normalize(points + vectors)
  angle = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return points * np.cos(angle) + vectors * np.sinc(angle / np.pi)
