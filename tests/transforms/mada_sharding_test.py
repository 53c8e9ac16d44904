"""MADA over devices: equal to one, and what they tell each other."""

import functools
import re

import jax
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib

from tests import processes
from tests.transforms import learns_mada

AXES = ('fsdp', 'tensor')
NUM_FLOATS = 6


@functools.cache
def _alone():
  return jax.jit(functools.partial(learns_mada.train, learns_mada.make()))(
    *learns_mada.problem()
  )


def _mesh(fsdp, tensor):
  devices = jax.devices()[: fsdp * tensor]
  return mesh_lib.make(devices, fsdp=fsdp, tensor=tensor)


def _collectives(tx, specs):
  """The collectives in a compiled update: how many floats each carries."""
  mesh = _mesh(4, 2)
  params = {name: np.ones((8, 8), np.float32) for name in specs}
  with jax.set_mesh(mesh), jax.numpy_dtype_promotion('standard'):
    params = mesh_lib.place(params, mesh, specs)
    state = tx.init(params)
    update = jax.jit(tx.update).lower(params, state, params)
    text = update.compile().as_text()
  kinds = 'all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute'
  # Shape, and kind: results are `f32[6]{0}`, or a tuple of such.
  found = re.findall(rf' = (\S+|\(.*?\)) ({kinds})(?:-start)?\(', text)
  floats = lambda shape: sum(
    int(np.prod([int(n) for n in dims.split(',') if n]))
    for dims in re.findall(r'f32\[([\d,]*)\]', shape)
  )
  return [(kind, floats(shape)) for shape, kind in found]


def _in_shard_map(mesh):
  """The run, with a place of its own for each device."""
  tx = learns_mada.make(axis_name=AXES)
  specs = learns_mada.SPECS
  later = {name: jax.P(None, *spec) for name, spec in specs.items()}

  def run(params, noise):
    params, _, rows = learns_mada.train(tx, params, noise)
    return params, rows

  return jax.shard_map(
    run, mesh=mesh, in_specs=(specs, later), out_specs=(specs, jax.P())
  )


class ShardingTest(parameterized.TestCase):
  def _check(self, params, rows):
    want_params, _, want_rows = _alone()
    np.testing.assert_allclose(rows, want_rows, rtol=0, atol=1e-6)
    for name, want in want_params.items():
      np.testing.assert_allclose(
        params[name], want, rtol=0, atol=1e-5, err_msg=name
      )

  def test_learns_something(self):
    _, _, rows = _alone()
    self.assertGreater(np.abs(rows[-1] - rows[0]).min(), 1e-3)

  def test_equals_one_device(self):
    self._check_devices(4, 2)

  @parameterized.parameters((1, 2), (2, 2))
  @pytest.mark.slow
  def test_equals_one_device_on_fewer(self, fsdp, tensor):
    self._check_devices(fsdp, tensor)

  def _check_devices(self, fsdp, tensor):
    mesh = _mesh(fsdp, tensor)
    with jax.set_mesh(mesh):
      train = functools.partial(learns_mada.train, learns_mada.make())
      params, state, rows = jax.jit(train)(*learns_mada.place(mesh))
    self._check(params, rows)
    # The state lies as the params do.
    moments, grads = state[0].moments, state[0].grads
    for tree in (params, *moments, grads):
      for name, spec in learns_mada.SPECS.items():
        sharding = jax.NamedSharding(mesh, spec)
        same = tree[name].sharding.is_equivalent_to(sharding, 2)
        self.assertTrue(same, msg=(name, tree[name].sharding))

  def test_equals_one_device_in_shard_map(self):
    """Leaves that some devices hold whole count once."""
    mesh = _mesh(4, 2)
    self._check(*jax.jit(_in_shard_map(mesh))(*learns_mada.place(mesh)))

  @pytest.mark.slow
  def test_equals_one_process(self):
    path = self.create_tempfile('ends.npz').full_path
    processes.run('tests.transforms.learns_mada', 2, path)
    ends = dict(np.load(path))
    self._check(ends, ends.pop('rows'))

  def test_costs_a_reduction_for_each_axis(self):
    # A dimension for each axis: XLA sums over one axis after the other.
    self._check_costs({'a': jax.P(*AXES), 'b': jax.P(*AXES)}, 2)

  @parameterized.parameters(
    # One dimension, over both axes: one sum.
    ({'a': jax.P(AXES), 'b': jax.P(None, AXES)}, 1),
    (learns_mada.SPECS, 2),
  )
  @pytest.mark.slow
  def test_costs_as_params_lie(self, specs, count):
    self._check_costs(specs, count)

  def _check_costs(self, specs, count):
    """Of six floats for each leaf; nothing else crosses, as in Adam."""
    self.assertEqual(_collectives(optax.adam(0.1), specs), [])
    found = _collectives(learns_mada.make(), specs)
    self.assertLen(found, count)
    for kind, floats in found:
      self.assertEqual(kind, 'all-reduce')
      self.assertLessEqual(floats, NUM_FLOATS * len(specs))

  @pytest.mark.slow
  def test_what_does_not_learn_costs_nothing(self):
    found = _collectives(learns_mada.make(learn=()), learns_mada.SPECS)
    self.assertEqual(found, [])

  def test_costs_one_reduction_in_shard_map(self):
    """Of six floats in all, however many leaves."""
    mesh = _mesh(4, 2)
    run = jax.jit(_in_shard_map(mesh)).lower(*learns_mada.place(mesh))
    text = run.as_text()
    found = re.findall(
      r'stablehlo\.(all_\w+|reduce_scatter|collective_\w+)', text
    )
    self.assertEqual(found, ['all_reduce'])
    self.assertRegex(
      text.replace('\n', ' '),
      r'all_reduce.*?\(tensor<6xf32>\) -> tensor<6xf32>',
    )
