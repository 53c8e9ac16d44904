"""The benchmark of Newton steps: what its sides minimise, and its rows."""

import os

import jax
import numpy as np
from absl.testing import parameterized

from emc2.experiments.benchmarks import harness, krylov, peers_krylov


class KrylovBenchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = os.path.join(self.create_tempdir(), 'problem.npz')
    self.source = krylov.prepare(self.path, True)

  def test_the_peers_objective_is_the_mean_logistic_loss(self):
    features, labels = peers_krylov.read(self.path)
    objective = peers_krylov.Objective(features, labels, 0.1)
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, features.shape[1]))
    dense = features.toarray()

    def loss(x):
      scores = dense @ x
      mean = np.mean(np.logaddexp(0, scores) - labels * scores)
      return mean + 0.05 * x @ x

    value, gradient = objective.value_and_gradient(x)
    np.testing.assert_allclose(value, loss(x), rtol=1e-12)
    slope = (loss(x + 1e-5 * v) - loss(x - 1e-5 * v)) / 2e-5
    np.testing.assert_allclose(gradient @ v, slope, rtol=1e-7)
    ahead = objective.gradient(x + 1e-5 * v)
    behind = objective.gradient(x - 1e-5 * v)
    np.testing.assert_allclose(
      objective.product(x, v), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8
    )

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
