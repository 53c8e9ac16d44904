"""The table of the specification, section 6: iterations to a gap."""

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.newton import coordinates, full, krylov

from tests.newton import oracle, trains_newton

GAPS = (1e-2, 1e-3, 1e-4, 1e-6)

METHODS = {
  'krylov': krylov.krylov_cubic_newton,
  'full': lambda _: full.cubic_newton(solver='dense'),
  'coordinates': coordinates.subspace_cubic_newton,
}


def count(name, dim, num_features, num_steps):
  """Iterations to each gap, from 0.5; the data can be parted, so f* is 0."""
  with jax.enable_x64(True):
    data = trains_newton.make(oracle.logistic(1000, num_features))
    x = np.full(num_features, 0.5)
    method = METHODS[name](dim)
    state, infos = trains_newton.run(method, data, x, num_steps)
    values = infos.objective[: int(state.count)]
  reached = values[:, None] <= np.array(GAPS)
  first = reached.argmax(axis=0) + 1
  return np.where(reached.any(axis=0), first, np.inf), int(state.result)


class TableTest(parameterized.TestCase):
  def _check(self, name, dim, num_features, want):
    num_steps = int(1.15 * max(want)) + 1
    found, result = count(name, dim, num_features, num_steps)
    self.assertEqual(result, 0)
    np.testing.assert_allclose(found[: len(want)], want, rtol=0.15)

  @parameterized.parameters(
    ('full', 300, (15, 19, 23, 30)),
    ('krylov', 20, (15, 19, 23, 30)),
    ('krylov', 10, (15, 19, 23, 32)),
    ('krylov', 5, (25, 45, 66, 107)),
  )
  def test_few_features(self, name, dim, want):
    self._check(name, dim, 300, want)

  @parameterized.parameters(
    ('coordinates', 100, 300, (64, 118, 169, 275)),
    ('coordinates', 50, 300, (178, 353, 541, 882)),
    ('coordinates', 10, 300, (1099,)),
    ('krylov', 20, 2000, (13, 17, 20, 27)),
    ('krylov', 10, 2000, (13, 17, 20, 27)),
    ('krylov', 5, 2000, (13, 18, 26, 40)),
    ('krylov', 1, 2000, (229, 357)),
    ('coordinates', 100, 2000, (53, 81, 108, 162)),
    ('coordinates', 50, 2000, (95, 152, 211, 327)),
    ('coordinates', 10, 2000, (462, 757, 1056)),
  )
  @pytest.mark.slow
  def test_all(self, name, dim, num_features, want):
    self._check(name, dim, num_features, want)
