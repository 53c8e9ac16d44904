"""Meshes are named, sized and filled in one place."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import mesh as mesh_lib

P = jax.sharding.PartitionSpec


class MakeTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, {'data': 8}),
    ({'data': 2, 'tensor': -1}, {'data': 2, 'tensor': 4}),
    ({'ring': 8}, {'ring': 8}),
  )
  def test_sizes(self, asked, want):
    self.assertEqual(dict(mesh_lib.make(**asked).shape), want)

  def test_order_of_devices(self):
    devices = jax.devices()[::-1]
    mesh = mesh_lib.make(devices, data=4, fsdp=2)
    self.assertEqual(mesh.devices[0, 1], devices[1])
    self.assertEqual(mesh.devices[1, 0], devices[2])

  @parameterized.parameters(
    ({'batch': 8}, "named in .* got 'batch'"),
    ({'data': 3}, 'multiply to 8 devices, got'),
    ({'data': 0}, 'at least 1, got 0'),
    ({'data': -1, 'fsdp': -1}, 'at most one axis'),
    ({'data': 16, 'fsdp': -1}, 'multiply to 8 devices, got'),
  )
  def test_refuses(self, asked, message):
    with self.assertRaisesRegex(ValueError, message):
      mesh_lib.make(**asked)


class PlaceTest(parameterized.TestCase):
  def test_specs_are_a_prefix(self):
    mesh = mesh_lib.make(data=8)
    tree = {'a': jnp.arange(16.0), 'b': {'c': jnp.ones((3, 8)), 'd': 1.0}}
    tree['b']['d'] = np.float32(1)
    specs = {'a': P('data'), 'b': P()}
    placed = mesh_lib.place(tree, mesh, specs)
    self.assertEqual(placed['a'].sharding.spec, P('data'))
    self.assertTrue(placed['b']['c'].sharding.is_fully_replicated)
    np.testing.assert_array_equal(placed['a'], np.arange(16.0))

  def test_keys(self):
    mesh = mesh_lib.make(data=8)
    key = mesh_lib.place(jax.random.key(5), mesh)
    self.assertTrue(key.sharding.is_fully_replicated)
    self.assertEqual(jax.random.bits(key), jax.random.bits(jax.random.key(5)))

  def test_shards_join(self):
    mesh = mesh_lib.make(data=8)
    joined = mesh_lib.gather_shards({'x': np.arange(16.0)}, mesh)
    self.assertEqual(joined['x'].sharding.spec, P('data'))
    np.testing.assert_array_equal(joined['x'], np.arange(16.0))


class StartTest(parameterized.TestCase):
  def test_one_process_needs_nothing(self):
    mesh_lib.start()
    self.assertEqual(jax.process_count(), 1)

  @parameterized.parameters(
    ({'num_processes': 2}, 'coordinator must name'),
    ({'coordinator': 'localhost:1'}, 'must be given with coordinator'),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      r'\[0, 2\), got 2',
    ),
  )
  def test_refuses(self, asked, message):
    with self.assertRaisesRegex(ValueError, message):
      mesh_lib.start(**asked)

  def test_cpu_devices(self):
    self.assertLen(jax.devices('cpu'), 8)
    with self.assertRaisesRegex(ValueError, 'count must be at least 1, got 0'):
      mesh_lib.use_cpu_devices(0)
