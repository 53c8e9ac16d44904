"""The benchmark of Newton steps: where its sides come to, and its rows."""

import os

import jax
from absl.testing import parameterized

from emc2.experiments.benchmarks import harness, krylov, peers_krylov


class KrylovBenchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.create_tempdir(), 'problem.npz')
    self.source = krylov.prepare(self.path, True)

  @parameterized.parameters(*peers_krylov.METHODS)
  def test_each_peer_comes_to_a_small_gradient(self, method):
    settings = dict(path=self.path, ridge=0.01, seconds=10)
    found = peers_krylov.solve(
      **settings, method=method, tolerances=[1e-3, 1e-5]
    )
    first, second = found['reached']
    self.assertLessEqual(first['gradients'], second['gradients'])
    self.assertLessEqual(found['norm'], 1e-5)
    self.assertEqual(second['products'] > 0, method != 'L-BFGS-B')
    # What it cannot come to it is cut off from.
    cut = peers_krylov.solve(
      **settings | dict(seconds=0), method=method, tolerances=[1e-30]
    )
    self.assertEqual(cut['reached'], [None])

  def test_ours_is_judged_by_the_peers_objective(self):
    found = krylov.solve(
      path=self.path,
      ridge=0.01,
      tolerances=[1e-3, 1e-9],
      subspace_dim=5,
      dtype='float32',
      seconds=10,
      runs=1,
    )
    first, second = found['reached']
    self.assertTrue(first['converged'])
    self.assertLessEqual(first['norm'], 1.1e-3)
    self.assertEqual(first['products'], 5 * first['iterations'])
    self.assertGreaterEqual(second['iterations'], first['iterations'])
    self.assertFalse(jax.config.jax_enable_x64)

  def test_cases_have_names_of_their_own_and_smoke_is_a_part(self):
    for smoke in (True, False):
      names = [case.name for case in krylov.cases(smoke)]
      self.assertLen(set(names), len(names))
    self.assertContainsSubset([case.name for case in krylov.cases(True)], names)

  def test_without_an_accelerator_kernels_say_so(self):
    with harness.Context(smoke=True) as context:
      for case in krylov.cases(True):
        if case.name.startswith('kernel'):
          (row,) = case.run(context)
          self.assertIsNone(row.ours)
          self.assertIn('no accelerator', row.note)
