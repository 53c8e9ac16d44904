"""Steps in the whole space, against NumPy."""

import jax
import numpy as np
from absl.testing import parameterized

from emc2.newton import full

from tests.newton import oracle, trains_newton

NUM_STEPS = 5


class OracleTest(parameterized.TestCase):
  """Both solvers equal the oracle, and so each other."""

  @parameterized.parameters(
    ('dense', False, 1e-9),
    ('dense', True, 1e-9),
    ('cg', True, 1e-6),
  )
  def test_step_by_step(self, solver, sparse, rtol):
    objective, x = trains_newton.sparse_logistic(60, 10), np.full(10, 0.5)
    want = oracle.full(objective, x, NUM_STEPS)
    with jax.enable_x64(True):
      data = trains_newton.make(objective, sparse)
      method = full.cubic_newton(solver=solver)
      state, infos = trains_newton.run(method, data, x, NUM_STEPS)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-9)
    close(state.x, want.xs[-1])
    close(infos.objective, want.values[1:])
    falls = -np.diff(infos.objective)
    self.assertTrue(np.all(falls >= infos.decrease[1:] - 1e-12))
    close(infos.gradient_norm, want.gradient_norms)
    close(infos.decrease, want.decreases)
    close(infos.regularization, want.regularizations)
    np.testing.assert_array_equal(infos.num_trials, want.trials)
    if solver == 'dense':
      np.testing.assert_array_equal(infos.num_hvps, 10)
    else:
      self.assertGreater(infos.num_hvps.min(), 20)


class SolverTest(parameterized.TestCase):
  def test_float32_conjugate_gradients(self):
    objective, x = oracle.logistic(60, 20, ridge=1e-3), np.full(20, 0.5)
    data = trains_newton.make(objective, dtype=np.float32)
    method = full.cubic_newton(solver='cg')
    state, infos = trains_newton.run(method, data, x, 25)
    value, _ = oracle.minimum(objective, x, 30)
    self.assertLess(infos.gradient_norm[-1], 1e-6)
    self.assertAlmostEqual(float(state.objective), value, delta=1e-6)
    self.assertEqual(state.result, 0)

  @parameterized.parameters((499, True), (500, False))
  def test_default_is_by_size(self, num_features, is_dense):
    objective = oracle.logistic(5, num_features)
    data = trains_newton.make(objective, dtype=np.float32)
    method, key = full.cubic_newton(), jax.random.key(0)
    state = jax.eval_shape(method.init, key, data)
    text = str(jax.make_jaxpr(method.step)(key, state, data))
    self.assertEqual('eigh' in text, is_dense)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'solver must be one of'):
      full.cubic_newton(solver='qr')
