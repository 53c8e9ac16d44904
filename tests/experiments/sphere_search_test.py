"""The search against the known minima, closed forms and NumPy."""

import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import sphere_search
from emc2.sphere import closed_forms, minima


def _energy(points, exponent):
  """The energy by a loop over pairs."""
  total = 0.0
  for i, x in enumerate(points):
    for y in points[:i]:
      distance = np.sqrt(np.sum((x - y) ** 2))
      total += distance**-exponent if exponent else -np.log(distance)
  return total


class SphereSearchTest(parameterized.TestCase):
  def test_finds_the_least_energy_and_stops_there(self):
    known = minima.best_known(16)
    found = sphere_search.search(16, target=known.energy, num_chains=2)
    self.assertLess(abs(found.energy / known.energy - 1), 1e-10)
    self.assertLess(found.gradient_norm, 1e-10)
    self.assertEqual(found.points.dtype, np.float64)
    np.testing.assert_allclose(np.linalg.norm(found.points, axis=1), 1)
    self.assertAlmostEqual(found.energy, _energy(found.points, 1.0), places=9)
    self.assertEqual(found.num_starts % 2, 0)

  @parameterized.parameters((2, 0.0), (2, 2.0), (4, 1.0))
  @pytest.mark.slow
  def test_other_spheres_and_exponents(self, dim, exponent):
    n = 8 if dim == 4 else 5
    found = sphere_search.search(
      n, dim=dim, exponent=exponent, num_chains=3, max_rounds=1
    )
    self.assertEqual(found.points.shape, (n, dim))
    want = (
      closed_forms.cross_polytope(4, exponent)
      if dim == 4
      else closed_forms.polygon(5, exponent)
    )
    self.assertAlmostEqual(found.energy, want, places=9)

  @pytest.mark.slow
  def test_a_net_is_among_the_first_starts(self):
    found = sphere_search.search(
      32, target=minima.best_known(32).energy, num_chains=1
    )
    self.assertEqual((found.origin, found.num_starts), ('net', 1))

  def test_half_of_the_starts_are_symmetric(self):
    search = sphere_search.Search(20, 3, 1.0, seed=0, num_chains=4)
    starts, origins = search.draw()
    self.assertEqual([o == 'random' for o in origins], [False, True] * 2)
    self.assertEqual(starts.shape, (4, 20, 3))
    few = sphere_search.Search(5, 3, 1.0, seed=0, num_chains=4)
    self.assertEqual(few.draw()[1], ['random'] * 4)

  def test_the_seed_settles_the_result(self):
    run = lambda seed: sphere_search.search(
      16, seed=seed, num_chains=2, max_rounds=1
    )
    np.testing.assert_array_equal(run(0).points, run(0).points)
    self.assertGreater(np.max(np.abs(run(0).points - run(1).points)), 0.1)

  def test_the_tolerance_ends_the_last_minimisation(self):
    settings = dict(seed=1, num_chains=2, max_rounds=1)
    rough = sphere_search.search(16, tolerance=1e-3, **settings)
    self.assertGreater(rough.gradient_norm, 1e-9)
    fine = sphere_search.search(16, **settings)
    self.assertLess(fine.gradient_norm, 1e-10)

  @pytest.mark.slow
  def test_a_search_that_never_reaches_its_target_goes_on_to_hop(self):
    # The starts of this seed miss the minimum in the first round.
    found = sphere_search.search(16, target=0.0, num_chains=2, max_rounds=7)
    self.assertEqual(found.num_starts, 14)
    self.assertAlmostEqual(found.energy, minima.best_known(16).energy, 9)

  @pytest.mark.slow
  def test_hops_find_what_starts_did_not(self):
    search = sphere_search.Search(16, 3, 1.0, seed=0, num_chains=2)
    search.seed()
    known = minima.best_known(16).energy
    self.assertGreater(search.best.energy, known + 1e-3)
    for _ in range(12):
      search.hop()
    self.assertLess(search.best.energy, known + 1e-8)
    self.assertEqual(search.best.origin, 'hop')
    self.assertEqual(search.num_starts, 26)

  @parameterized.parameters((0.0, False), (1e6, True))
  @pytest.mark.slow
  def test_only_a_warm_walk_leaves_a_minimum(self, temperature, leaves):
    search = sphere_search.Search(
      16, 3, 1.0, seed=1, num_chains=2, temperature=temperature
    )
    search.seed()
    highest = []
    for _ in range(12):
      search.hop()
      highest.append(np.max(search.walks))
    rises = np.max(np.diff(highest)) > 1e-6
    self.assertEqual(rises, leaves)

  def test_time_ends_a_search(self):
    found = sphere_search.search(16, target=0.0, num_chains=2, max_seconds=0.0)
    self.assertEqual(found.num_starts, 2)

  @parameterized.parameters(
    ({'num_points': 1}, 'num_points must be at least 2, got 1'),
    ({'dim': 1}, 'dim must be at least 2, got 1'),
    ({'exponent': -1.0}, 'exponent must be at least 0'),
    ({'num_chains': 0}, 'num_chains must be at least 1, got 0'),
    ({'max_rounds': 0}, 'max_rounds must be at least 1, got 0'),
  )
  def test_wrong_arguments_are_named(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      sphere_search.search(**({'num_points': 5} | arguments))
