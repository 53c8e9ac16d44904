"""The table against closed forms, asymptotics and its own laws."""

import collections
import math

import numpy as np
from absl.testing import parameterized

from emc2.sphere import closed_forms, configurations, minima

FAMILIES = ('polygon', 'simplex', 'cross-polytope')
SETS = [
  (3, 1.0, 325),
  (3, 2.0, 99),
  (3, 0.0, 3),
  (4, 1.0, 37),
  (4, 2.0, 27),
  (5, 1.0, 19),
  (2, 1.0, 15),
  (2, 2.0, 15),
  (8, 1.0, 3),
  (24, 2.0, 1),
]


class TableTest(parameterized.TestCase):
  @parameterized.parameters(*SETS)
  def test_rows(self, dim, exponent, count):
    table = minima.tabulated(dim, exponent)
    self.assertLen(table, count)
    self.assertEqual(list(table), sorted(table))

  def test_covers_the_sphere(self):
    ns = set(minima.tabulated())
    self.assertContainsSubset(range(2, 307), ns | {304, 305})
    self.assertContainsSubset([312, 372, 400, 470, 972], ns)
    self.assertContainsSubset(range(2, 101), minima.tabulated(3, 2.0))

  @parameterized.parameters(*SETS)
  def test_mean_energy_of_a_pair_rises(self, dim, exponent, count):
    """Leaving out each point in turn of n gives n - 1 with no more of it."""
    del count
    table = minima.tabulated(dim, exponent)
    means = [row.energy / (n * (n - 1)) for n, row in table.items()]
    self.assertTrue(np.all(np.diff(means) > 0))

  def test_sources(self):
    table = minima.tabulated()
    counts = collections.Counter(row.source for row in table.values())
    want = {
      'exact': 6,
      'table+computed': 94,
      'table_recalled+computed': 133,
      'computed_2seeds': 76,
      'computed_upper_bound': 16,
    }
    self.assertEqual(counts, want)
    self.assertContainsSubset(want, minima.SOURCES)
    self.assertContainsSubset(minima.TARGETS, minima.SOURCES)
    bounds = [n for n, row in table.items() if row.is_bound]
    self.assertLen(bounds, 92)
    # What is proved or published is complete up to here.
    self.assertEqual(min(bounds), 139)

  def test_other_sources(self):
    counts = collections.Counter(
      row.source
      for dim in range(2, 25)
      for exponent in (0.0, 1.0, 2.0)
      if (dim, exponent) != (3, 1.0)
      for row in minima.tabulated(dim, exponent).values()
    )
    self.assertEqual(counts, {'exact': 85, 'computed': 171})

  def test_is_given_out_as_a_copy(self):
    minima.tabulated().clear()
    self.assertLen(minima.tabulated(), 325)

  def test_has_no_rows(self):
    self.assertEmpty(minima.tabulated(9, 1.5))

  def test_configurations_can_be_made(self):
    """Of each row that names one, the coordinates have its energy."""
    for dim in range(2, 25):
      for exponent in (1.0, 2.0):
        table = minima.tabulated(dim, exponent)
        for n, row in table.items():
          if row.configuration in configurations.named():
            shape = configurations.named()[row.configuration]
            self.assertEqual(shape, (dim, n))

  def test_anchors(self):
    table = minima.tabulated()
    for n, energy, group in (
      (11, 40.596450508, 'C2v'),
      (16, 92.911655303, 'T'),
      (24, 223.347074052, 'O'),
      (72, 2255.001190975, 'I'),
      (122, 6698.374499261, 'Ih'),
      (132, 7875.045342797, 'I'),
      (192, 16963.338386460, 'I'),
      (212, 20768.053085964, 'I'),
      (272, 34515.193292681, 'Ih'),
      (282, 37147.294418462, 'I'),
      (372, 65230.027122557, 'I'),
      (470, 104822.886324279, 'S6'),
      (972, 455651.219290380, 'T'),
    ):
      self.assertEqual(table[n][:2], (energy, group))

  def test_inverse_square_energies(self):
    table = minima.tabulated(3, 2.0)
    for n, energy in (
      (10, 25.0413597221),
      (20, 133.9369785684),
      (30, 346.2636306408),
      (40, 672.3093535035),
    ):
      self.assertAlmostEqual(table[n].energy, energy, delta=1e-9)


class AsymptoticTest(parameterized.TestCase):
  def test_lies_below(self):
    for n, row in minima.tabulated().items():
      self.assertGreater(row.energy, closed_forms.asymptotic(n, 1.0), msg=n)

  @parameterized.parameters(
    (10, 0.206),
    (20, 0.348),
    (50, 0.715),
    (100, 1.402),
    (200, 3.108),
    (400, 6.859),
    (470, 8.123),
  )
  def test_residual(self, n, want):
    got = minima.best_known(n).energy - closed_forms.asymptotic(n, 1.0)
    self.assertAlmostEqual(got, want, delta=1e-3)

  def test_fit(self):
    errors = [
      abs(row.energy - closed_forms.coulomb_fit(n))
      for n, row in minima.tabulated().items()
      if 20 <= n <= 470
    ]
    self.assertLess(max(errors), 0.41)

  def test_inverse_square(self):
    for n, want in ((50, -0.0038), (100, -0.0023)):
      energy = minima.best_known(n, exponent=2.0).energy
      got = closed_forms.asymptotic(n, 2.0) / energy - 1
      self.assertAlmostEqual(got, want, delta=1e-4)

  def test_logarithm(self):
    for n in (12, 50, 100):
      energy = minima.best_known(n, exponent=0.0).energy
      error = energy - closed_forms.asymptotic(n, 0.0)
      self.assertLess(abs(error), 0.01 * n)


class BestKnownTest(parameterized.TestCase):
  @parameterized.product(dim=list(range(2, 25)), exponent=[0.0, 1.0, 2.0])
  def test_closed_forms_agree_with_the_rows(self, dim, exponent):
    for n, row in minima.tabulated(dim, exponent).items():
      best = minima.best_known(n, dim, exponent)
      if row.source == 'exact':
        self.assertEqual(best.source, 'exact')
        self.assertFalse(best.is_bound)
      if best.source == 'exact':
        # Rows have nine or ten decimals, at most sixteen digits.
        np.testing.assert_allclose(
          best.energy, row.energy, rtol=1e-14, atol=6e-10
        )
      else:
        self.assertEqual(best, row)

  @parameterized.parameters(0.0, 0.5, 1.0, 3.0, 40.0)
  def test_families(self, s):
    for n in (2, 3, 4, 9):
      want = minima.Minimum(closed_forms.polygon(n, s), 'polygon', 'exact')
      self.assertEqual(minima.best_known(n, 2, s), want)
    for n, dim in ((2, 3), (3, 3), (4, 3), (3, 9), (10, 9)):
      want = minima.Minimum(closed_forms.simplex(n, s), 'simplex', 'exact')
      self.assertEqual(minima.best_known(n, dim, s), want)
    for dim in (3, 4, 11):
      energy = closed_forms.cross_polytope(dim, s)
      want = minima.Minimum(energy, 'cross-polytope', 'exact')
      self.assertEqual(minima.best_known(2 * dim, dim, s), want)

  @parameterized.parameters(0.0, 0.5, 1.0, 3.0, 40.0)
  def test_codes(self, s):
    never = {'cube', 'dodecahedron', '24-cell'}
    for name, (dim, n) in configurations.named().items():
      best = minima.best_known(n, dim, s)
      if name in never:
        self.assertNotEqual((best or ('', ''))[1], name)
      elif name != 'bipyramid':
        energy = closed_forms.code(name, s)
        self.assertEqual(best, minima.Minimum(energy, name, 'exact'))

  def test_bipyramid(self):
    for s in (0.0, 1.0, 2.0, 15.0):
      best = minima.best_known(5, 3, s)
      self.assertEqual(best[1:], ('bipyramid', 'exact'))
    # Where a pyramid over a square may be better, nothing is known.
    self.assertIsNone(minima.best_known(5, 3, 15.1))

  def test_nothing_is_known(self):
    self.assertIsNone(minima.best_known(7, 3, 1.5))
    self.assertIsNone(minima.best_known(1000))
    self.assertIsNone(minima.best_known(30, 9))

  def test_tells_bounds(self):
    for n, is_bound in ((60, False), (138, False), (139, True), (972, True)):
      self.assertEqual(minima.best_known(n).is_bound, is_bound)
    self.assertTrue(minima.best_known(10, exponent=2.0).is_bound)

  @parameterized.parameters(
    ((1,), 'num_points .* got 1'),
    ((5, 1), 'dim .* got 1'),
    ((7, 3, -1.0), 'exponent .* got -1.0'),
    ((7, 3, math.nan), 'exponent .* got nan'),
    ((7, 3, math.inf), 'exponent .* got inf'),
  )
  def test_errors(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      minima.best_known(*arguments)


class IcosadeltahedralMinimaTest(parameterized.TestCase):
  def test_are_all_nets_of_up_to_972_points(self):
    want = {
      (h, k): 10 * (h * h + h * k + k * k) + 2
      for h in range(1, 11)
      for k in range(h + 1)
      if h * h + h * k + k * k <= 97
    }
    nets = minima.icosadeltahedral_minima()
    self.assertEqual({net: row.num_points for net, row in nets.items()}, want)
    self.assertLen(nets, 37)
    for (h, k), row in nets.items():
      self.assertEqual(row.point_group, 'Ih' if k in (0, h) else 'I')

  def test_are_at_times_the_best(self):
    best = []
    for row in minima.icosadeltahedral_minima().values():
      known = minima.tabulated().get(row.num_points)
      if known is not None:
        self.assertLessEqual(known.energy, row.energy)
        if known.energy == row.energy:
          self.assertEqual(known.configuration, row.point_group)
          best.append(row.num_points)
    self.assertEqual(best, [12, 32, 72, 122, 132, 192, 212, 272, 282, 372, 392])
    self.assertAlmostEqual(
      minima.icosadeltahedral_minima()[8, 3].energy, 455654.618623181
    )
