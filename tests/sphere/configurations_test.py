"""Each configuration has the inner products that its literature prints."""

import itertools
import math

import numpy as np
from absl.testing import parameterized

from emc2.sphere import closed_forms, configurations

ROOT5 = math.sqrt(5)
PHI = (1 + ROOT5) / 2

# Inner product to the number of points at it, of each point.
PRODUCTS = {
  'cube': {-1: 1, 1 / 3: 3, -1 / 3: 3},
  'icosahedron': {1 / ROOT5: 5, -1 / ROOT5: 5, -1: 1},
  'dodecahedron': {-1: 1, ROOT5 / 3: 3, 1 / 3: 6, -1 / 3: 6, -ROOT5 / 3: 3},
  '24-cell': {-1: 1, 1 / 2: 8, -1 / 2: 8, 0: 6},
  '600-cell': {
    PHI / 2: 12,
    -PHI / 2: 12,
    1 / 2: 20,
    -1 / 2: 20,
    (PHI - 1) / 2: 12,
    (1 - PHI) / 2: 12,
    0: 30,
    -1: 1,
  },
  'clebsch_16': {1 / 5: 10, -3 / 5: 5},
  'schlafli_27': {1 / 4: 16, -1 / 2: 10},
  'gosset_56': {1 / 3: 27, -1 / 3: 27, -1: 1},
  'e8_240': {1 / 2: 56, -1 / 2: 56, 0: 126, -1: 1},
  'isotropic_112': {1 / 9: 81, -1 / 3: 30},
  'mclaughlin_162': {1 / 7: 105, -2 / 7: 56},
  'higman_sims_100': {1 / 11: 77, -4 / 11: 22},
  'mclaughlin_275': {1 / 6: 162, -1 / 4: 112},
  'isotropic_891': {1 / 4: 336, -1 / 8: 512, -1 / 2: 42},
  'equiangular_552': {1 / 5: 275, -1 / 5: 275, -1: 1},
  'leech_4600': {1 / 3: 891, -1 / 3: 891, 0: 2816, -1: 1},
  'leech_196560': {
    1 / 2: 4600,
    -1 / 2: 4600,
    1 / 4: 47104,
    -1 / 4: 47104,
    0: 93150,
    -1: 1,
  },
}
ROWS = 8  # How many are looked at of a large code.


def _pair_energy(points, exponent):
  """Sums over the pairs, in a loop over the points."""
  terms = []
  for i, point in enumerate(points[:-1]):
    r = np.linalg.norm(points[i + 1 :] - point, axis=1)
    terms += (-np.log(r) if exponent == 0 else r**-exponent).tolist()
  return math.fsum(terms)


def _potential(rows, points):
  """The Coulomb potential of some of the points."""
  potentials = []
  for row in rows:
    r = np.linalg.norm(points - row, axis=1)
    potentials.append(np.sum(1 / r[r > 1e-6]))
  return np.array(potentials)


def _rotation(dim, seed=0):
  """A random orthogonal matrix, at times with a reflection."""
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


class NamedTest(parameterized.TestCase):
  @parameterized.parameters(*PRODUCTS)
  def test_inner_products(self, name):
    points, wanted = configurations.make(name), PRODUCTS[name]
    dim, num_points = configurations.named()[name]
    self.assertEqual(points.shape, (num_points, dim))
    self.assertEqual(points.dtype, np.float64)
    self.assertEqual(1 + sum(wanted.values()), num_points)
    np.testing.assert_allclose(
      np.linalg.norm(points, axis=1), 1.0, rtol=0, atol=1e-15 * dim
    )
    rows = np.random.default_rng(0).permutation(num_points)
    rows = rows if num_points <= 1000 else rows[:ROWS]
    for row in rows:
      products = points @ points[row]
      found = 0
      for t, count in {**wanted, 1: 1}.items():
        near = np.abs(products - t) < 1e-12
        self.assertEqual(np.sum(near), count, msg=(name, row, t))
        found += count
      self.assertEqual(found, num_points)

  @parameterized.parameters(*closed_forms.CODES)
  def test_energy_is_the_closed_form(self, name):
    points = configurations.make(name)
    if len(points) > 1000:
      rows = points[:: len(points) // ROWS]
      got = _potential(rows, points) * len(points) / 2
      want = closed_forms.code(name, 1.0)
      np.testing.assert_allclose(got, want, rtol=1e-12)
      return
    for exponent in (0.0, 1.0, 2.0, 3.5):
      got = _pair_energy(points, exponent)
      want = closed_forms.code(name, exponent)
      np.testing.assert_allclose(got, want, rtol=1e-12)

  def test_names_are_those_of_the_closed_forms(self):
    codes = closed_forms.CODES
    want = {name: (code.dim, code.num_points) for name, code in codes.items()}
    self.assertEqual(configurations.named(), want)
    self.assertSameElements(want, [*PRODUCTS, 'bipyramid'])

  def test_printed_products_are_those_of_the_closed_forms(self):
    for name, wanted in PRODUCTS.items():
      got = sorted(closed_forms.CODES[name].products.items())
      np.testing.assert_allclose(got, sorted(wanted.items()), atol=1e-15)

  def test_bipyramid(self):
    points = configurations.bipyramid()
    products = np.round(points @ points.T, 12)
    upper = sorted(products[np.triu_indices(5, 1)].tolist())
    self.assertEqual(upper, [-1.0, *[-0.5] * 3, *[0.0] * 6])

  def test_unknown_name(self):
    with self.assertRaisesRegex(ValueError, "bipyramid.*got 'prism'"):
      configurations.make('prism')

  def test_duals(self):
    """Each corner of the dodecahedron is the middle of three of the other."""
    products = configurations.dodecahedron() @ configurations.icosahedron().T
    near = np.sum(products > np.max(products) - 1e-12, axis=1)
    np.testing.assert_array_equal(near, 3)

  def test_leech_is_a_lattice(self):
    """All inner products are multiples of a quarter of the norm."""
    rows = configurations.leech()[::97]
    products = rows @ configurations.leech()[::1013].T * 4
    np.testing.assert_allclose(products, np.round(products), atol=1e-12)


class FamiliesTest(parameterized.TestCase):
  @parameterized.product(n=[2, 3, 5, 24], s=[0.0, 1.0, 2.0, 3.5])
  def test_polygon(self, n, s):
    got = _pair_energy(configurations.polygon(n), s)
    np.testing.assert_allclose(got, closed_forms.polygon(n, s), rtol=1e-12)

  @parameterized.product(n=[2, 3, 5, 24], s=[0.0, 1.0, 2.0, 3.5])
  def test_simplex(self, n, s):
    points = configurations.simplex(n)
    self.assertEqual(points.shape, (n, max(2, n - 1)))
    got = _pair_energy(points, s)
    np.testing.assert_allclose(got, closed_forms.simplex(n, s), rtol=1e-12)

  @parameterized.product(k=[2, 3, 5, 24], s=[0.0, 1.0, 2.0, 3.5])
  def test_cross_polytope(self, k, s):
    points = configurations.cross_polytope(k)
    self.assertEqual(points.shape, (2 * k, k))
    want = closed_forms.cross_polytope(k, s)
    np.testing.assert_allclose(_pair_energy(points, s), want, rtol=1e-12)

  def test_simplex_in_more_dimensions(self):
    points = configurations.simplex(4, dim=6)
    self.assertEqual(points.shape, (4, 6))
    np.testing.assert_allclose(
      points @ points.T, (4 * np.eye(4) - 1) / 3, atol=1e-15
    )

  @parameterized.parameters(
    (lambda: configurations.polygon(1), 'num_points .* got 1'),
    (lambda: configurations.simplex(1), 'num_points .* got 1'),
    (lambda: configurations.simplex(2, dim=1), 'at least 2 .* got 1'),
    (lambda: configurations.simplex(5, dim=3), 'at least 4 .* got 3'),
    (lambda: configurations.cross_polytope(1), 'dim .* got 1'),
  )
  def test_errors(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()


class DerivedTest(parameterized.TestCase):
  def test_vertex_figures(self):
    """Of the 600-cell an icosahedron, of the 24-cell a cube."""
    figure = configurations.derived(configurations.cell_600(), PHI / 2)
    self.assertEqual(configurations.identify(figure), 'icosahedron')
    figure = configurations.derived(configurations.cell_24(), 1 / 2)
    self.assertEqual(configurations.identify(figure), 'cube')

  def test_seen_across_the_first_point(self):
    points = configurations.cross_polytope(3) @ _rotation(3)
    figure = configurations.derived(points, 0.0)
    self.assertEqual(configurations.identify(figure), 'polygon')

  @parameterized.parameters(0.3, 1.0, -1.0)
  def test_errors(self, product):
    with self.assertRaisesRegex(ValueError, f'product .* got {product}'):
      configurations.derived(configurations.icosahedron(), product)


class IdentifyTest(parameterized.TestCase):
  @parameterized.parameters(
    *(name for name in closed_forms.CODES if not name.startswith('leech'))
  )
  def test_knows_what_is_turned_and_shuffled(self, name):
    points = configurations.make(name)
    points = np.random.default_rng(1).permutation(points)
    for seed in range(2):
      turned = points @ _rotation(points.shape[1], seed)
      self.assertEqual(configurations.identify(turned), name)

  def test_knows_the_families(self):
    got = [
      configurations.identify(configurations.polygon(5)),
      configurations.identify(configurations.polygon(4)),
      configurations.identify(configurations.simplex(4)),
      configurations.identify(configurations.simplex(4, dim=9)),
      configurations.identify(configurations.cross_polytope(3)),
      configurations.identify(configurations.cross_polytope(12)),
    ]
    want = [*['polygon'] * 2, *['simplex'] * 2, *['cross-polytope'] * 2]
    self.assertEqual(got, want)

  def test_tells_apart_what_has_the_same_numbers(self):
    rng = np.random.default_rng(0)
    for dim, num_points in itertools.product((2, 3, 4), (4, 6, 8, 12)):
      points = rng.normal(size=(num_points, dim))
      points /= np.linalg.norm(points, axis=1, keepdims=True)
      self.assertIsNone(configurations.identify(points))
    self.assertEqual(configurations.identify(configurations.cube()), 'cube')

  def test_tolerance(self):
    points = configurations.icosahedron()
    points = points + 1e-4 * np.random.default_rng(0).normal(size=points.shape)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    self.assertIsNone(configurations.identify(points))
    name = configurations.identify(points, tolerance=1e-2)
    self.assertEqual(name, 'icosahedron')
