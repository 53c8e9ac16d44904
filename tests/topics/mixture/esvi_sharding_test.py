"""ESVI over a mesh: the same numbers, few messages, small shards."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.topics import mixture

from tests import processes
from tests.topics.mixture import fits_mixture, fitting, oracle

KINDS = (
  'all_gather',
  'all_reduce',
  'reduce_scatter',
  'all_to_all',
  'collective_permute',
)


@functools.cache
def _rows():
  return oracle.points(0, 90, 2)[0]


@functools.cache
def _fit(num_devices, **settings):
  """A state after 9 rotations of 8 blocks, Info, and the lowered step."""
  mesh, init = None, fitting.method('esvi', 16, num_blocks=8).init
  settings = dict(num_blocks=8, refresh_every=4) | settings
  with jax.enable_x64(True):
    rows = mixture.esvi.split_rows(jnp.asarray(_rows()), 8)
    if num_devices > 1:
      mesh = mesh_lib.make(jax.devices()[:num_devices], ring=num_devices)
      rows = mesh_lib.place(rows, mesh, mixture.esvi.row_shardings(mesh))
      settings['mesh'] = mesh
    method = fitting.method('esvi', 16, **settings)
    if num_devices == 8:
      init = method.init
    state = init(jax.random.key(0), rows)
    if num_devices > 1:
      specs = mixture.esvi.shardings(mesh)
      state = mesh_lib.place(state, mesh, specs)
    for number in range(9):
      state, info = method.step(jax.random.key(number), state, rows)
    return state, info, method.step.lower(jax.random.key(0), state, rows)


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(num_devices=8),
    dict(num_devices=4, mixing='ring', active_prob=0.5, inner_batch=3),
  )
  @pytest.mark.slow
  def test_devices_equal_one(self, num_devices, **settings):
    one, many = _fit(1, **settings)[:2], _fit(num_devices, **settings)[:2]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)

  def test_shards_are_small_and_messages_few(self):
    state, _, lowered = _fit(8)
    mesh = mesh_lib.make(ring=8)
    specs = mixture.esvi.shardings(mesh)
    for leaf, spec in zip(
      jax.tree.leaves(state), jax.tree.leaves(specs), strict=True
    ):
      want = jax.sharding.NamedSharding(mesh, spec)
      self.assertTrue(leaf.sharding.is_equivalent_to(want, leaf.ndim))
    # K (1 + F) / W numbers of statistics on a device, F = 2 D.
    for shard in range(8):
      of = lambda x, shard=shard: x.addressable_shards[shard].data.nbytes
      size = sum(of(x) for x in state.statistics)
      self.assertEqual(size, 8 * 16 * (1 + 2 * 2) // 8)
      self.assertEqual(of(state.responsibilities), 8 * 12 * 16)
      self.assertEqual(of(state.ids), 4 * 16)
    text = lowered.as_text()
    counts = {kind: text.count(f'"stablehlo.{kind}"') for kind in KINDS}
    # The components' move; the two fields of the blocks that go round when the
    # statistics are summed anew.
    self.assertEqual(counts['all_to_all'], 1)
    self.assertEqual(counts['collective_permute'], 2)
    self.assertEqual(sum(counts.values()), 3)
    with jax.enable_x64(True):
      text = lowered.compile().as_text()
    found = re.findall(
      r' (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(', text
    )
    self.assertEqual(found, ['all-to-all'])

  @pytest.mark.slow
  def test_2_processes_equal_1(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'state.npz'
    processes.run('tests.topics.mixture.fits_mixture', 2, str(path))
    one = fits_mixture.fit(mesh_lib.make(jax.devices()[:4], ring=4))
    with np.load(path) as two:
      np.testing.assert_array_equal(one['ids'], two['ids'])
      for name in ('z', 'count', 'moments'):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6)

  def test_refuses_places_that_no_device_has(self):
    for mesh in (mesh_lib.make(ring=8), mesh_lib.make(data=8)):
      with self.assertRaisesRegex(ValueError, '^num_blocks must be a multiple'):
        mixture.esvi.esvi(fitting.make_model(16), num_blocks=4, mesh=mesh)
