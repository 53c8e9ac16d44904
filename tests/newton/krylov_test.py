"""Steps in Krylov spaces, against NumPy."""

import jax
import numpy as np
from absl.testing import parameterized

from emc2.newton import krylov

from tests.newton import oracle, trains_newton

NUM_STEPS = 6


def _poisson(ridge):
  rng = np.random.default_rng(1)
  features = rng.normal(size=(40, 8))
  rates = np.exp(features @ rng.normal(size=8) / 4)
  return oracle.Objective(features, rng.poisson(rates), 'poisson', ridge)


def _squared():
  rng = np.random.default_rng(2)
  features, labels = rng.normal(size=(30, 8)), rng.normal(size=30)
  return oracle.Objective(features, labels, 'squared')


class OracleTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('dense', oracle.logistic(50, 12), False, {}),
    (
      'sparse',
      trains_newton.sparse_logistic(60, 12),
      True,
      dict(regularization=1.0, shrink=0.2),
    ),
    ('poisson', _poisson(1e-2), False, dict(subspace_dim=1)),
    ('squared', _squared(), False, dict(adaptive=False)),
  )
  def test_step_by_step(self, objective, sparse, settings):
    settings = dict(subspace_dim=4, regularization=1e-3) | settings
    x = np.full(objective.features.shape[1], 0.5)
    want = oracle.krylov(objective, x, NUM_STEPS, **settings)
    dim = settings.pop('subspace_dim')
    with jax.enable_x64(True):
      data = trains_newton.make(objective, sparse)
      method = krylov.krylov_cubic_newton(dim, loss=objective.loss, **settings)
      state, infos = trains_newton.run(method, data, x, NUM_STEPS)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-12)
    close(state.x, want.xs[-1])
    close(infos.objective, want.values[1:])
    close(infos.gradient_norm, want.gradient_norms)
    close(infos.decrease, want.decreases)
    close(infos.regularization, want.regularizations)
    close(infos.quality, want.qualities)
    np.testing.assert_array_equal(infos.num_trials, want.trials)
    np.testing.assert_array_equal(infos.num_hvps, dim)
    self.assertEqual(state.count, NUM_STEPS)
    self.assertEqual(state.result, 0)
    close(state.regularization, want.regularizations[-1])
    last = want.xs[-1] - want.xs[-2]
    close(state.shift, want.regularizations[-1] / 2 * np.linalg.norm(last))


class ArgumentsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(subspace_dim=0), 'subspace_dim'),
    (dict(loss='hinge'), 'loss'),
    (dict(regularization=0.0), 'regularization'),
    (dict(convention='half'), 'convention'),
    (dict(shrink=1.0), 'shrink'),
    (dict(max_trials=0), 'max_trials'),
    (dict(gradient_tol=-1.0), 'gradient_tol'),
    (dict(refresh_every=0), 'refresh_every'),
  )
  def test_refuses(self, settings, name):
    with self.assertRaisesRegex(ValueError, name):
      krylov.krylov_cubic_newton(**settings)

  def test_refuses_what_does_not_fit(self):
    data = trains_newton.make(oracle.logistic(9, 3), dtype=np.float32)
    method, key = krylov.krylov_cubic_newton(4), jax.random.key(0)
    with self.assertRaisesRegex(ValueError, r'x must be of shape \(3,\)'):
      method.init(key, data, np.zeros(4))
    with self.assertRaisesRegex(ValueError, 'subspace_dim must be at most 3'):
      method.step(key, method.init(key, data), data)
    mesh = jax.make_mesh((8,), ('ring',))
    with self.assertRaisesRegex(ValueError, 'mesh must have no axes but'):
      krylov.krylov_cubic_newton(4, mesh=mesh)
