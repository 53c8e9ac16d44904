"""Distances against a loop, defects against Euler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import spatial

from emc2 import sphere
from emc2.sphere import neighbours

TETRAHEDRON = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])


def _unit(n, k, seed=0):
  rows = np.random.default_rng(seed).normal(size=(n, k))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _icosahedron():
  golden = (1 + np.sqrt(5)) / 2
  signs = [(a, b * golden) for a in (-1, 1) for b in (-1, 1)]
  return np.array(
    [np.roll([0, a, b], shift) for a, b in signs for shift in range(3)]
  ) / np.hypot(1, golden)


def _neighbours(triangles, n):
  """How many distinct points share a triangle with each."""
  near = [set() for _ in range(n)]
  for triangle in triangles.tolist():
    for i in triangle:
      near[i] |= set(triangle) - {i}
  return np.array([len(s) for s in near])


class DistanceTest(parameterized.TestCase):
  @parameterized.parameters((2, 3), (31, 2), (32, 3), (33, 3), (100, 24))
  @pytest.mark.slow
  def test_matches_a_loop(self, n, k):
    points = np.float32(_unit(n, k))
    wide = points.astype(np.float64)
    want = [
      min(np.linalg.norm(x - y) for j, y in enumerate(wide) if j != i)
      for i, x in enumerate(wide)
    ]
    got = jax.jit(sphere.nearest_distances)(points)
    self.assertEqual((got.shape, got.dtype), ((n,), np.float32))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(sphere.min_distance(points), min(want), 1e-6)

  def test_small_distances_keep_their_digits(self):
    points = np.float32(_unit(40, 3))
    points[17] = points[3]
    nearest = np.asarray(sphere.nearest_distances(points))
    np.testing.assert_array_equal(np.flatnonzero(nearest == 0), [3, 17])
    points[17, 0] += 2e-5
    wide = points.astype(np.float64)
    want = np.linalg.norm(wide[17] - wide[3])
    np.testing.assert_allclose(sphere.min_distance(points), want, rtol=1e-6)

  def test_keeps_the_dtype(self):
    with jax.enable_x64(True):
      got = sphere.nearest_distances(_icosahedron())
      self.assertEqual(got.dtype, np.float64)
      want = 1 / np.sin(2 * np.pi / 5)
      np.testing.assert_allclose(got, want, rtol=1e-14)

  def test_memory_grows_as_the_points(self):
    sizes = []
    for n in (10_000, 20_000):
      points = jax.ShapeDtypeStruct((n, 3), jnp.float32)
      compiled = jax.jit(sphere.nearest_distances).lower(points).compile()
      sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    self.assertLess(sizes[1], 2.5 * sizes[0])
    self.assertLess(sizes[1], 8 * 2**20)

  @parameterized.parameters((1, 3), (3,), (2, 3, 3))
  def test_refuses(self, *shape):
    with self.assertRaisesRegex(ValueError, r'n at least 2, got shape'):
      sphere.nearest_distances(np.ones(shape, np.float32))


class DefectTest(parameterized.TestCase):
  def test_icosahedron(self):
    triangles = spatial.ConvexHull(_icosahedron()).simplices
    sphere.check_triangulation(triangles, 12)
    charges = sphere.disclination_charges(triangles, 12)
    np.testing.assert_array_equal(charges, np.ones(12))

  @parameterized.parameters(4, 13, 50, 200)
  @pytest.mark.slow
  def test_random_points(self, n):
    """Twelve in all, whatever the points."""
    triangles = spatial.ConvexHull(_unit(n, 3, seed=n)).simplices
    sphere.check_triangulation(triangles, n)
    want = _neighbours(triangles, n)
    got = jax.jit(sphere.degrees, static_argnums=1)(triangles, n)
    np.testing.assert_array_equal(got, want)
    charges = sphere.disclination_charges(triangles, n)
    np.testing.assert_array_equal(charges, 6 - want)
    self.assertEqual(np.sum(charges), 12)
    self.assertEqual(charges.dtype, jnp.int32)

  def test_refuses_shape(self):
    with self.assertRaisesRegex(ValueError, r'triangles must be \(f, 3\)'):
      neighbours.degrees(np.zeros((4, 4), int), 4)

  @parameterized.parameters(
    (TETRAHEDRON[:, :2], 4, r'integers of shape \(f, 3\), got int64 of shape'),
    (TETRAHEDRON * 1.0, 4, r'integers of shape \(f, 3\), got float64'),
    (TETRAHEDRON, 3, r'points in \[0, 3\), got 3'),
    (TETRAHEDRON - 1, 4, r'points in \[0, 4\), got -1'),
    (TETRAHEDRON, 5, 'use every point, but not 4'),
    (np.array([[0, 1, 2], [3, 1, 3]]), 4, r'three corners, .* 1 is \[3 1 3\]'),
    (TETRAHEDRON[:3], 4, r'in pairs, but 1 has the edge \(1, 2\)'),
    (TETRAHEDRON[[0, 1, 2, 3, 3]], 4, r'but 3 has the edge \(1, 2\)'),
    (
      np.concatenate([TETRAHEDRON, TETRAHEDRON + 4]),
      8,
      '2 n - 4 = 12, got 8',
    ),
  )
  def test_refuses(self, triangles, n, message):
    with self.assertRaisesRegex(ValueError, message):
      sphere.check_triangulation(triangles, n)
