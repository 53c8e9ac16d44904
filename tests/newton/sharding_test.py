"""Rows and columns on eight devices, and in two processes."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.newton import krylov, problem, steps

from tests import processes
from tests.newton import trains_newton

P = jax.sharding.PartitionSpec


@functools.cache
def _alone(name, sparse):
  return trains_newton.train(name, None, sparse)


class DevicesTest(parameterized.TestCase):
  def _compare(self, name, axes, sparse):
    want, want_infos = _alone(name, sparse)
    mesh = mesh_lib.make(**axes)
    state, infos = trains_newton.train(name, mesh, sparse)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-5)
    close(state.x[:13], want.x)
    self.assertFalse(np.any(state.x[13:]))
    np.testing.assert_allclose(infos.objective, want_infos.objective, rtol=1e-5)
    close(infos.regularization, want_infos.regularization)
    np.testing.assert_array_equal(infos.num_trials, want_infos.num_trials)
    sharding = jax.sharding.NamedSharding(mesh, steps.shardings(mesh).x)
    self.assertTrue(state.x.sharding.is_equivalent_to(sharding, 1))
    self.assertEqual(state.result, 0)

  @parameterized.parameters(
    ('krylov', dict(data=8), True),
    ('krylov', dict(data=4, tensor=2), True),
    ('coordinates', dict(data=4, tensor=2), True),
  )
  def test_same_as_one_device(self, name, axes, sparse):
    self._compare(name, axes, sparse)

  @parameterized.parameters(
    ('krylov', dict(tensor=8), False),
    ('dense', dict(data=8), False),
    ('dense', dict(data=4, tensor=2), True),
    ('cg', dict(data=4, tensor=2), False),
    ('coordinates', dict(tensor=8), False),
  )
  @pytest.mark.slow
  def test_same_in_other_ways(self, name, axes, sparse):
    self._compare(name, axes, sparse)

  def test_the_bound_of_a_problem_in_blocks(self):
    objective, mesh = trains_newton.sparse_logistic(45, 13), mesh_lib.make()
    make = functools.partial(
      trains_newton.make, objective, sparse=True, dtype=np.float32
    )
    data = make(num_row_blocks=8)
    data = mesh_lib.place(data, mesh, problem.shardings(data, mesh))

    def begin(data, mesh):
      method = krylov.krylov_cubic_newton(2, regularization=None, mesh=mesh)
      return jax.jit(method.init)(jax.random.key(0), data)

    want = begin(make(), None).regularization
    found = begin(data, mesh).regularization
    np.testing.assert_allclose(found, want, rtol=1e-5)

  @pytest.mark.slow
  def test_two_processes(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'objective.npy'
    processes.run('tests.newton.trains_newton', 2, str(path))
    _, infos = trains_newton.train('krylov', None, sparse=True)
    np.testing.assert_allclose(np.load(path), infos.objective, rtol=1e-5)


class CollectivesTest(parameterized.TestCase):
  """A step exchanges what the specification counts, and nothing else."""

  def _count(self, **axes):
    mesh = mesh_lib.make(**axes)
    n, d, m = 32, 24, 5
    data = trains_newton.make(
      trains_newton.sparse_logistic(n, d),
      dtype=np.float32,
      num_row_blocks=axes.get('data', 1),
      num_column_blocks=axes.get('tensor', 1),
    )
    # A multiple that no run reaches: its product is not part of a step.
    method = krylov.krylov_cubic_newton(m, mesh=mesh, refresh_every=10**6)
    key = jax.random.key(0)
    state = jax.eval_shape(method.init, key, data)
    specs = problem.shardings(data, mesh), steps.shardings(mesh)
    data, state = jax.tree.map(
      lambda spec, x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
      ),
      specs,
      (data, state),
      is_leaf=lambda x: isinstance(x, P),
    )
    text = jax.jit(method.step).lower(key, state, data).as_text()
    found = re.findall(
      r'stablehlo\.(all_reduce|all_gather|all_to_all|collective_permute|'
      r'reduce_scatter)"(?:.|\n)*?-> tensor<([x0-9]*)f32>',
      text,
    )
    counts = {}
    for name, shape in found:
      counts[name, shape] = counts.get((name, shape), 0) + 1
    return counts

  def test_rows(self):
    """One of a vector in the loop of products, one for the gradient.

    Scalars: the excess of a trial, and the objective after the step.
    """
    want = {('all_reduce', '24x'): 2, ('all_reduce', ''): 2}
    self.assertEqual(self._count(data=8), want)

  def test_columns(self):
    """In the loop: scores, and what makes the basis orthogonal, twice.

    Outside: scores once, in a refresh; the norms of the gradient, of the start
    of the space, which is the same, and of the point.
    """
    want = {
      ('all_reduce', '32x'): 2,
      ('all_reduce', '5x'): 1,
      ('all_reduce', '6x'): 1,
      ('all_reduce', ''): 3,
    }
    self.assertEqual(self._count(tensor=8), want)

  def test_both(self):
    want = {
      ('all_reduce', '12x'): 2,
      ('all_reduce', '8x'): 2,
      ('all_reduce', '5x'): 1,
      ('all_reduce', '6x'): 1,
      ('all_reduce', ''): 2 + 3,
    }
    self.assertEqual(self._count(data=4, tensor=2), want)
