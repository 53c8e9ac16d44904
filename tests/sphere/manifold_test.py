"""The geometry of the sphere against loops in NumPy and closed forms."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import sphere
from emc2.sphere import manifold


def _unit(rng, *shape):
  rows = rng.normal(size=shape)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _tangent(rng, points):
  vectors = rng.normal(size=points.shape)
  return vectors - np.sum(vectors * points, -1, keepdims=True) * points


def _rows(*arrays):
  """The rows of arrays of one shape (..., n, k), side by side."""
  return zip(*(a.reshape(-1, a.shape[-1]) for a in arrays), strict=True)


class WideTest(parameterized.TestCase):
  """In float64."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    self.rng = np.random.default_rng(0)

  def test_maps_match_a_loop(self):
    self._check_maps_match_a_loop(3, 2, 6, 3)

  @parameterized.parameters((5, 2), (4, 24))
  @pytest.mark.slow
  def test_maps_match_a_loop_elsewhere(self, *shape):
    self._check_maps_match_a_loop(*shape)

  def _check_maps_match_a_loop(self, *shape):
    points = _unit(self.rng, *shape)
    vectors = self.rng.normal(size=shape)
    tangents = _tangent(self.rng, points)
    flat = lambda rows: np.reshape(rows, shape)
    want = {
      'normalize': flat([v / np.sqrt(v @ v) for (v,) in _rows(vectors)]),
      'project': flat([v - (v @ x) * x for x, v in _rows(points, vectors)]),
      'retract': flat(
        [(x + v) / np.sqrt(1 + v @ v) for x, v in _rows(points, tangents)]
      ),
      'exponential': flat(
        [
          x * np.cos(np.sqrt(v @ v))
          + v * np.sin(np.sqrt(v @ v)) / np.sqrt(v @ v)
          for x, v in _rows(points, tangents)
        ]
      ),
    }
    got = {
      'normalize': sphere.normalize(vectors),
      'project': sphere.project(points, vectors),
      'retract': sphere.retract(points, tangents),
      'exponential': sphere.exponential(points, tangents),
    }
    for name in want:
      np.testing.assert_allclose(
        got[name], want[name], rtol=1e-13, atol=1e-14, err_msg=name
      )
    np.testing.assert_allclose(
      sphere.transport(points, vectors), want['project'], atol=1e-14
    )

  def test_normalize_lands_on_the_sphere(self):
    points = sphere.normalize(self.rng.normal(size=(1000, 3)) * 1e3)
    norm = np.linalg.norm(np.asarray(points), axis=1)
    np.testing.assert_allclose(norm, 1.0, rtol=0, atol=4e-16)

  def test_normalize_has_a_tangent_gradient(self):
    """Identity 9: F(y) = f(y / |y|) has no radial slope."""
    y = self.rng.normal(size=(6, 3)) * 2
    weight = self.rng.normal(size=(6, 3))
    f = lambda y: jnp.sum(weight * sphere.normalize(y) ** 3)
    radial = np.sum(jax.grad(f)(y) * y, axis=1)
    np.testing.assert_allclose(radial, 0.0, atol=1e-14)

  @parameterized.parameters(1e-160, 1e-9, 1e-4, 0.5, 0.999, 1.001, 3.0)
  def test_exponential_walks_an_angle(self, length):
    # Coordinates of their own for both, or the sum would round the angle.
    points = np.tile([0.0, 0.0, 1.0], (20, 1))
    vectors = np.pad(_unit(self.rng, 20, 2), ((0, 0), (0, 1))) * length
    moved = np.asarray(sphere.exponential(points, vectors))
    along = np.sum(moved * (vectors / length), axis=1)
    angle = np.arctan2(along, np.sum(moved * points, axis=1))
    np.testing.assert_allclose(angle, length, rtol=1e-14)
    norm = np.linalg.norm(moved, axis=1)
    np.testing.assert_allclose(norm, 1.0, rtol=0, atol=1e-15)

  @parameterized.parameters(1e-160, 1e-3, 1.001)
  @pytest.mark.slow
  def test_exponential_has_its_derivatives(self, length):
    """Along v they are those of the cosine and the sine, of any order."""
    point, direction = jnp.array([[0.6, 0.8]]), jnp.array([[-0.8, 0.6]])
    curve = lambda t: sphere.exponential(point, t * direction)
    for order in range(3):
      shift = length + order * np.pi / 2
      want = point * np.cos(shift) + direction * np.sin(shift)
      got = jax.jit(curve)(length)
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
      curve = jax.jacfwd(curve)

  @pytest.mark.slow
  def test_exponential_is_smooth_where_nothing_moves(self):
    point = np.array([[0.0, 0.0, 1.0]])
    origin = np.zeros((1, 3))
    np.testing.assert_array_equal(sphere.exponential(point, origin), point)
    for derivative in (jax.jacrev, jax.jacfwd):
      slope = jax.jit(derivative(sphere.exponential, 1))(point, origin)
      np.testing.assert_array_equal(slope[0, :, 0, :], np.eye(3))
    bend = jax.jit(jax.hessian(sphere.exponential, 1))(point, origin)
    want = -np.einsum('a,bc->abc', point[0], np.eye(3))
    np.testing.assert_allclose(bend[0, :, 0, :, 0, :], want, atol=1e-15)

  @parameterized.parameters(1e-2, 3e-2, 1e-1)
  def test_retraction_is_of_second_order(self, length):
    """It falls short of the great circle by a third of the length cubed."""
    point, vector = np.array([[1.0, 0.0]]), np.array([[0.0, length]])
    gap = sphere.exponential(point, vector) - sphere.retract(point, vector)
    got = np.linalg.norm(gap) / length**3
    np.testing.assert_allclose(got, 1 / 3, rtol=length**2)

  def test_transport_along_a_step(self):
    angle = 0.7
    x, u, w = np.eye(3)[None].swapaxes(0, 1)
    y = sphere.exponential(x, angle * u)
    parallel = u * np.cos(angle) - x * np.sin(angle)
    np.testing.assert_allclose(
      sphere.transport(y, u), parallel * np.cos(angle), atol=1e-15
    )
    np.testing.assert_allclose(sphere.transport(y, w), w, atol=1e-15)

  def test_limit_matches_a_loop(self):
    vectors = self.rng.normal(size=(2, 9, 3))
    vectors[0, 0] = 0
    flat = [
      v * min(1, 0.8 / max(np.linalg.norm(v), 1e-300))
      for (v,) in _rows(vectors)
    ]
    got = sphere.limit(vectors, 0.8)
    want = np.reshape(flat, vectors.shape)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    np.testing.assert_array_equal(sphere.limit(vectors, np.inf), vectors)

  @parameterized.parameters((None, 0.5 / 3), (0.3, 0.3))
  def test_move_is_bounded(self, max_step, bound):
    points = _unit(self.rng, 9, 3)
    vectors = _tangent(self.rng, points)
    vectors *= np.linspace(0.01, 1.0, 9)[:, None] / np.linalg.norm(
      vectors, axis=1, keepdims=True
    )
    moved, longer = sphere.move(points, vectors, max_step)
    lengths = np.minimum(np.linspace(0.01, 1.0, 9), bound)
    chord = np.sum(np.asarray(moved) * points, axis=1)
    np.testing.assert_allclose(chord, np.cos(np.arctan(lengths)), rtol=1e-13)
    self.assertAlmostEqual(
      float(longer), np.mean(np.linspace(0.01, 1.0, 9) > bound)
    )


class NarrowTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_keeps_the_dtype(self, dtype):
    def results():
      points = sphere.draw_uniform(jax.random.key(0), 5, 3, dtype)
      vectors = sphere.project(points, points[::-1])
      return (
        points,
        vectors,
        sphere.retract(points, vectors),
        sphere.exponential(points, vectors),
        sphere.limit(vectors, 0.1),
        *sphere.move(points, vectors),
      )

    for result in jax.eval_shape(results):
      self.assertEqual(result.dtype, dtype)

  def test_limit_of_huge_vectors(self):
    huge = np.float32([[3e30, -4e30, 0.0], [0.0, 0.0, 3e38]])
    got = sphere.limit(huge, 0.5)
    np.testing.assert_allclose(got, [[0.3, -0.4, 0.0], [0.0, 0.0, 0.5]])


class DrawUniformTest(parameterized.TestCase):
  def test_moments(self):
    self._check_moments(3)

  @parameterized.parameters(2, 8)
  @pytest.mark.slow
  def test_moments_elsewhere(self, dim):
    self._check_moments(dim)

  def _check_moments(self, dim):
    points = np.asarray(sphere.draw_uniform(jax.random.key(0), 20_000, dim))
    error = 5 / np.sqrt(20_000)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=3e-7)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=error)
    second = points.T @ points / 20_000
    np.testing.assert_allclose(second, np.eye(dim) / dim, atol=error)

  def test_heights_are_uniform(self):
    """Archimedes: on the ordinary sphere, as nowhere else."""
    points = sphere.draw_uniform(jax.random.key(1), 10_000, 3)
    heights = np.sort(np.asarray(points)[:, 2])
    gap = np.abs(heights - np.linspace(-1, 1, 10_000)).max()
    self.assertLess(gap, 2 * 1.95 / np.sqrt(10_000))

  def test_default_dtype(self):
    draw = lambda: sphere.draw_uniform(jax.random.key(0), 3, 3)
    self.assertEqual(draw().dtype, jnp.float32)
    with jax.enable_x64(True):
      self.assertEqual(draw().dtype, jnp.float64)

  @parameterized.parameters(
    (0, 3, 'num_points must be at least 1, got 0'),
    (3, 1, 'dim must be at least 2, got 1'),
  )
  def test_refuses(self, num_points, dim, message):
    with self.assertRaisesRegex(ValueError, message):
      sphere.draw_uniform(jax.random.key(0), num_points, dim)


class CheckPointsTest(parameterized.TestCase):
  @parameterized.parameters(np.float64, np.float32, np.float16, jnp.bfloat16)
  def test_accepts(self, dtype):
    self.assertIsNone(sphere.check_points(np.eye(4, dtype=dtype)))
    points = _unit(np.random.default_rng(0), 50, 24)
    sphere.check_points(points.astype(dtype))

  def test_accepts_many_in_little_memory(self):
    points = _unit(np.random.default_rng(0), 20_000, 3)
    tracemalloc.start()
    sphere.check_points(points)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    self.assertLess(peak, 20 * points.nbytes)

  @parameterized.parameters(
    (np.eye(1, 3), 'at least n = 2, got 1'),
    (np.ones((3, 1)), 'dimension k >= 2, got 1'),
    (np.ones(3), r'shape \(n, k\), got float64 of shape \(3,\)'),
    (np.eye(3, dtype=int), r'float array .*, got int64 of shape \(3, 3\)'),
    (np.array([[1.0, 0.0], [np.nan, 0.0]]), 'finite, but row 1 is .nan'),
    (np.array([[np.inf, 0.0], [1.0, 0.0]]), 'finite, but row 0 is .inf'),
    (np.array([[1.0, 0.0], [0.0, 0.0]]), 'unit rows, but row 1 has norm 0'),
    (np.array([[1.0, 0.0], [0.0, 1 + 1e-11]]), 'row 1 has norm 1.00000000001'),
    (np.eye(3)[[0, 1, 2, 1]], 'distinct, but rows 1 and 3 are 0 apart'),
  )
  def test_refuses(self, points, message):
    with self.assertRaisesRegex(ValueError, message):
      sphere.check_points(points)

  @parameterized.parameters(
    (np.float64, 5e-13, 2e-12), (np.float32, 1e-7, 1e-6)
  )
  def test_how_close_two_may_come(self, dtype, near, apart):
    x = np.array([[0.0, 0.0, 1.0]])
    move = lambda length: np.append(x, x + np.array([length, 0, 0]), axis=0)
    sphere.check_points(move(apart).astype(dtype))
    with self.assertRaisesRegex(ValueError, f'rows 0 and 1 are {near:.3g} ap'):
      sphere.check_points(move(near).astype(dtype))

  @parameterized.parameters(
    (np.float64, 1e-11), (np.float32, 1e-4), (jnp.bfloat16, 0.2)
  )
  def test_off_the_sphere_by_dtype(self, dtype, gap):
    points = np.array([[1.0, 0.0], [0.0, 1.0 - gap]]).astype(dtype)
    with self.assertRaisesRegex(ValueError, 'row 1 has norm 0.'):
      sphere.check_points(points)

  def test_finds_a_pair_among_many(self):
    rng = np.random.default_rng(0)
    for _ in range(5):
      points = _unit(rng, 20_000, 3)
      i, j = sorted(rng.choice(20_000, 2, replace=False))
      points[j] = points[i]
      with self.assertRaisesRegex(ValueError, f'rows {i} and {j} are'):
        sphere.check_points(points)

  def test_looks_beyond_the_next_along_the_line(self):
    """Rows that lie between two along the line hide nothing."""
    grid = np.stack(np.mgrid[:6, :6], -1).reshape(36, 2).astype(np.float64)
    for shift in ([0.3, 0.3], [0.3, -0.3]):
      points = np.append(grid, [grid[14] + shift], axis=0)
      i, j, distance = manifold._coincident(points, 0.6)
      self.assertEqual((i, j), (14, 36))
      self.assertAlmostEqual(distance, np.hypot(0.3, 0.3))
    self.assertIsNone(manifold._coincident(points, 0.4))

  @parameterized.parameters(0.0, -1.0, np.nan)
  def test_max_step_refuses(self, max_step):
    with self.assertRaisesRegex(ValueError, f'positive, got {max_step}'):
      manifold.check_max_step(max_step)
