"""Groups are groups, and what they make is symmetric."""

import itertools

import numpy as np
from absl.testing import parameterized
from scipy import optimize, spatial

from emc2.sphere import configurations, minima, symmetry

# Order, whether all are rotations, and the sizes of the special orbits.
GROUPS = {
  'C1': (1, True, []),
  'C2': (2, True, [1, 1]),
  'C3': (3, True, [1, 1]),
  'C5': (5, True, [1, 1]),
  'C12': (12, True, [1, 1]),
  'C2v': (4, False, [1, 1]),
  'C3v': (6, False, [1, 1]),
  'C1h': (2, False, []),
  'C3h': (6, False, [2]),
  'C4h': (8, False, [2]),
  'Ci': (2, False, []),
  'Cs': (2, False, []),
  'S2': (2, False, []),
  'S4': (4, False, [2]),
  'S6': (6, False, [2]),
  'S8': (8, False, [2]),
  'D2': (4, True, [2, 2, 2]),
  'D3': (6, True, [2, 3, 3]),
  'D4': (8, True, [2, 4, 4]),
  'D5': (10, True, [2, 5, 5]),
  'D6': (12, True, [2, 6, 6]),
  'D3h': (12, False, [2, 3, 3]),
  'D4h': (16, False, [2, 4, 4]),
  'D2d': (8, False, [2, 4]),
  'D3d': (12, False, [2, 6]),
  'D4d': (16, False, [2, 8]),
  'D5d': (20, False, [2, 10]),
  'D6d': (24, False, [2, 12]),
  'T': (12, True, [4, 4, 6]),
  'Td': (24, False, [4, 4, 6]),
  'Th': (24, False, [6, 8]),
  'O': (24, True, [6, 8, 12]),
  'Oh': (48, False, [6, 8, 12]),
  'I': (60, True, [12, 20, 30]),
  'Ih': (120, False, [12, 20, 30]),
}


def _is_among(rows, points, tolerance=1e-9):
  """Whether each row is one of the points."""
  distance = spatial.distance.cdist(rows, points)
  return np.min(distance, axis=1) < tolerance


def _coulomb(flat):
  """The energy of normalised rows, with the gradient of these, flat."""
  y = flat.reshape(-1, 3)
  norm = np.linalg.norm(y, axis=1, keepdims=True)
  x = y / norm
  difference = x[:, None] - x[None]
  squared = np.sum(difference**2, axis=2)
  np.fill_diagonal(squared, np.inf)
  gradient = -np.sum(difference * squared[..., None] ** -1.5, axis=1)
  gradient -= np.sum(gradient * x, axis=1, keepdims=True) * x
  return np.sum(squared**-0.5) / 2, (gradient / norm).ravel()


class PointGroupTest(parameterized.TestCase):
  @parameterized.parameters(*GROUPS)
  def test_is_a_group(self, name):
    elements = symmetry.point_group(name)
    order, is_proper, _ = GROUPS[name]
    self.assertEqual(elements.shape, (order, 3, 3))
    np.testing.assert_array_equal(elements[0], np.eye(3))
    inverses = np.swapaxes(elements, 1, 2)
    identity = np.broadcast_to(np.eye(3), elements.shape)
    np.testing.assert_allclose(elements @ inverses, identity, atol=2e-15)
    flat = elements.reshape(order, 9)
    apart = spatial.distance.pdist(flat)
    self.assertTrue(np.all(apart > 0.1))
    products = elements[:, None] @ elements[None]
    self.assertTrue(np.all(_is_among(products.reshape(-1, 9), flat)))
    rotations = np.linalg.det(elements) > 0
    self.assertEqual(np.sum(rotations), order if is_proper else order / 2)

  @parameterized.parameters(
    ('T', 'O'),
    ('T', 'I'),
    ('T', 'Td'),
    ('T', 'Th'),
    ('O', 'Oh'),
    ('I', 'Ih'),
    ('Td', 'Oh'),
    ('Th', 'Ih'),
    ('D3', 'D3d'),
    ('D3', 'D6'),
    ('S6', 'D3d'),
    ('S4', 'D2d'),
    ('C5', 'D5'),
    ('D2', 'T'),
    ('C4v', 'D4h'),
    ('Cs', 'C1h'),
    ('Ci', 'S2'),
    ('Ci', 'S6'),
  )
  def test_is_a_subgroup(self, small, large):
    rows = symmetry.point_group(small).reshape(-1, 9)
    within = _is_among(rows, symmetry.point_group(large).reshape(-1, 9))
    self.assertTrue(np.all(within))

  @parameterized.parameters(
    ('Ih', configurations.icosahedron),
    ('Ih', configurations.dodecahedron),
    ('Oh', configurations.cube),
    ('Oh', lambda: configurations.cross_polytope(3)),
    ('D3h', configurations.bipyramid),
  )
  def test_keeps(self, name, make):
    points = make()
    for element in symmetry.point_group(name):
      self.assertTrue(np.all(_is_among(points @ element.T, points)))

  @parameterized.parameters(
    '', 'C', 'C0', 'c3', 'C3d', 'D1', 'D3v', 'S3', 'S4h', 'Iv', 'C1000', 'X3'
  )
  def test_unknown(self, name):
    with self.assertRaisesRegex(ValueError, f"group must .* got '{name}'"):
      symmetry.point_group(name)

  def test_cannot_be_written(self):
    with self.assertRaisesRegex(ValueError, 'read-only'):
      symmetry.point_group('T')[0] = 0
    with self.assertRaisesRegex(ValueError, 'read-only'):
      symmetry.special_orbits('T')[0][:] = 0


class SpecialOrbitsTest(parameterized.TestCase):
  @parameterized.parameters(*GROUPS)
  def test_are_orbits_on_axes(self, name):
    elements = symmetry.point_group(name)
    orbits = symmetry.special_orbits(name)
    self.assertEqual([len(orbit) for orbit in orbits], GROUPS[name][2])
    for orbit in orbits:
      np.testing.assert_allclose(np.linalg.norm(orbit, axis=1), 1, rtol=1e-14)
      if len(orbit) > 1:
        self.assertGreater(np.min(spatial.distance.pdist(orbit)), 1e-3)
      images = np.einsum('gij,pj->gpi', elements, orbit)
      self.assertTrue(np.all(_is_among(images.reshape(-1, 3), orbit)))
      # One orbit, not two: the first point reaches all others.
      self.assertTrue(np.all(_is_among(orbit, images[:, 0])))
      fixed = np.linalg.norm(images[:, 0] - orbit[0], axis=1) < 1e-9
      self.assertGreater(np.sum(fixed & (np.linalg.det(elements) > 0)), 1)

  @parameterized.parameters(*GROUPS)
  def test_hold_each_axis_once(self, name):
    """By Burnside: each rotation but 1 fixes two points."""
    elements = symmetry.point_group(name)
    rotations = elements[np.linalg.det(elements) > 0]
    orbits = symmetry.special_orbits(name)
    fixed = sum(
      np.sum(np.linalg.norm(point @ R.T - point) < 1e-9)
      for orbit in orbits
      for point in orbit
      for R in rotations[1:]
    )
    self.assertEqual(fixed, 2 * (len(rotations) - 1))

  def test_are_the_regular_solids(self):
    names = [
      configurations.identify(orbit)
      for orbit in symmetry.special_orbits('I')[:2]
      + symmetry.special_orbits('O')[:2]
    ]
    want = ['icosahedron', 'dodecahedron', 'cross-polytope', 'cube']
    self.assertEqual(names, want)


class SeedTest(parameterized.TestCase):
  @parameterized.parameters(*symmetry.GROUPS, 'C3v', 'D3h', 'Td', 'Oh', 'Ih')
  def test_is_symmetric(self, group):
    rng = np.random.default_rng(0)
    elements = symmetry.point_group(group)
    sizes = [n for n in range(2, 200) if symmetry.possible(group, n)]
    for n in rng.permutation(sizes)[:4]:
      points = symmetry.symmetric_seed(rng, int(n), group)
      self.assertEqual(points.shape, (n, 3))
      self.assertEqual(points.dtype, np.float64)
      np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-15)
      self.assertGreater(np.min(spatial.distance.pdist(points)), 1e-4)
      for element in elements:
        self.assertTrue(np.all(_is_among(points @ element.T, points)))

  @parameterized.parameters(*symmetry.GROUPS, 'C1', 'C3v', 'C4h', 'Oh', 'Ih')
  def test_possible(self, group):
    order, _, sizes = GROUPS.get(
      group, (len(symmetry.point_group(group)), 0, 0)
    )
    sums = {
      sum(size for size, take in zip(sizes, takes, strict=True) if take)
      for takes in itertools.product([False, True], repeat=len(sizes))
    }
    reached = {
      part + order * count for part in sums for count in range(150)
    } - {0, 1}
    for n in range(-1, 140):
      self.assertEqual(symmetry.possible(group, n), n in reached, msg=n)
      if n not in reached:
        with self.assertRaisesRegex(ValueError, f'num_points .* got {n}'):
          symmetry.symmetric_seed(np.random.default_rng(0), n, group)

  def test_takes_special_orbits(self):
    rng = np.random.default_rng(0)
    name = configurations.identify(symmetry.symmetric_seed(rng, 12, 'I'))
    self.assertEqual(name, 'icosahedron')
    points = symmetry.symmetric_seed(rng, 92, 'I')
    for orbit, is_there in zip(
      symmetry.special_orbits('I'), (True, True, False), strict=True
    ):
      self.assertEqual(np.all(_is_among(orbit, points)), is_there)

  def test_takes_each_choice(self):
    """24 is 4 * 6 and 3 + 3 + 3 * 6; the poles leave no multiple of 6."""
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
      points = symmetry.symmetric_seed(rng, 24, 'D3')
      seen.add(
        tuple(
          bool(np.all(_is_among(orbit, points)))
          for orbit in symmetry.special_orbits('D3')
        )
      )
    self.assertEqual(seen, {(False, False, False), (False, True, True)})

  def test_hangs_on_the_generator_only(self):
    one, two, other = (
      symmetry.symmetric_seed(np.random.default_rng(seed), 100, 'D5')
      for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, two)
    self.assertGreater(np.max(np.abs(one - other)), 0.01)

  def test_draws_compete(self):
    """The best of many keeps further from its images and from the others."""
    nearest = {
      num_draws: [
        np.min(
          spatial.distance.pdist(
            symmetry.symmetric_seed(
              np.random.default_rng(seed), 72, 'T', num_draws=num_draws
            )
          )
        )
        for seed in range(20)
      ]
      for num_draws in (1, 12)
    }
    self.assertGreater(np.median(nearest[12]), 2 * np.median(nearest[1]))

  def test_is_the_best_of_the_draws(self):
    """Of a single orbit, whose images alone repel."""
    points = symmetry.symmetric_seed(np.random.default_rng(5), 12, 'T')
    rng = np.random.default_rng(5)
    rng.integers(1)  # Of T no set of special orbits but the empty one fits.
    draws = rng.normal(size=(12, 3))
    sums = []
    for draw in draws / np.linalg.norm(draws, axis=1, keepdims=True):
      images = symmetry.point_group('T')[1:] @ draw
      sums.append(np.sum(np.linalg.norm(images - draw, axis=1) ** -3))
    best = draws[np.argmin(sums)]
    best /= np.linalg.norm(best)
    self.assertTrue(np.all(_is_among(best[None], points)))

  def test_no_draws(self):
    rng = np.random.default_rng(0)
    with self.assertRaisesRegex(ValueError, 'num_draws .* got 0'):
      symmetry.symmetric_seed(rng, 12, 'T', num_draws=0)


class IcosadeltahedralTest(parameterized.TestCase):
  @parameterized.parameters(*minima.icosadeltahedral_minima())
  def test_size(self, h, k):
    want = 10 * (h * h + h * k + k * k) + 2
    self.assertEqual(minima.icosadeltahedral_minima()[h, k].num_points, want)
    points = symmetry.icosadeltahedral(h, k)
    self.assertEqual(points.shape, (want, 3))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-15)
    # No two of them closer than in a net of twice as many.
    nearest = np.min(spatial.distance.pdist(points))
    self.assertGreater(nearest * np.sqrt(want), 2.6)

  @parameterized.parameters((1, 1), (2, 1), (1, 2), (3, 0), (4, 2))
  def test_symmetry_and_defects(self, h, k):
    points = symmetry.icosadeltahedral(h, k)
    for element in symmetry.point_group('I'):
      self.assertTrue(np.all(_is_among(points @ element.T, points)))
    is_chiral = h != k and h * k > 0
    is_kept = np.all(_is_among(-points, points))
    self.assertEqual(is_kept, not is_chiral)
    # Mirror images of one another.
    other = symmetry.icosadeltahedral(k, h)
    self.assertTrue(np.all(_is_among(-points, other)))
    triangles = spatial.ConvexHull(points).simplices
    degrees = np.bincount(triangles.ravel())
    self.assertEqual(np.sum(degrees == 5), 12)
    self.assertEqual(np.sum(degrees == 6), len(points) - 12)

  @parameterized.parameters((2, 1), (2, 2), (3, 1), (1, 3))
  def test_descends_to_the_tabulated_energy(self, h, k):
    want = minima.icosadeltahedral_minima()[max(h, k), min(h, k)].energy
    found = optimize.minimize(
      _coulomb,
      symmetry.icosadeltahedral(h, k).ravel(),
      jac=True,
      method='L-BFGS-B',
      options={'maxcor': 20, 'maxiter': 2000, 'ftol': 0, 'gtol': 1e-7},
    )
    np.testing.assert_allclose(found.fun, want, rtol=1e-12, atol=1e-9)

  @parameterized.parameters((0, 0), (-1, 2), (2, -1))
  def test_errors(self, h, k):
    with self.assertRaisesRegex(ValueError, f'got {h}, {k}'):
      symmetry.icosadeltahedral(h, k)
