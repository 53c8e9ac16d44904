"""Rows move by a random permutation, in one message."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import ring

from tests import processes

COLLECTIVE = re.compile(
  r' = \S+.* (all-gather|all-reduce|reduce-scatter|all-to-all|'
  r'collective-permute)(?:-start)?\('
)


@functools.cache
def _over_devices(num_devices, num_rows, num_blocks):
  """Jitted, from a key and all rows to all rows."""

  def move(key, rows):
    order = ring.draw_order(key, num_rows, num_blocks)
    return ring.redistribute(
      rows, order, num_blocks=num_blocks, axis_name=mesh_lib.RING
    )

  spec = jax.sharding.PartitionSpec
  return jax.jit(
    jax.shard_map(
      move,
      mesh=mesh_lib.make(jax.devices()[:num_devices], ring=num_devices),
      in_specs=(spec(), spec(mesh_lib.RING)),
      out_specs=spec(mesh_lib.RING),
    )
  )


class OrderTest(parameterized.TestCase):
  @parameterized.parameters((6, 2), (20, 4), (12, 1), (40, 8), (7, 7))
  def test_is_a_permutation_between_blocks(self, num_rows, num_blocks):
    height = num_rows // num_blocks
    draw = lambda key: ring.draw_order(key, num_rows, num_blocks)
    keys = jax.random.split(jax.random.key(0), 20)
    orders = jax.jit(jax.vmap(draw))(keys)
    self.assertEqual(orders.dtype, jnp.int32)
    for order in np.asarray(orders):
      by_target = order.reshape(num_blocks, height) // height
      self.assertGreaterEqual(np.diff(by_target, axis=1).min(initial=0), 0)
      np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))
      messages = np.zeros((num_blocks, num_blocks), int)
      np.add.at(messages, (order // height, np.arange(num_rows) // height), 1)
      self.assertLessEqual(messages.max(), -(-height // num_blocks))
      # The same all round: what block i sends to block i + t.
      for i in range(num_blocks):
        np.testing.assert_array_equal(np.roll(messages[0], i), messages[i])
    self.assertGreater(len(np.unique(np.asarray(orders), axis=0)), 4)

  @parameterized.parameters((8, 4), (12, 3))
  def test_pairs_meet_equally_often(self, num_rows, num_blocks):
    height, num_moves = num_rows // num_blocks, 6_000

    def move(ids, key):
      ids = ids[ring.draw_order(key, num_rows, num_blocks)]
      return ids, ids

    keys = jax.random.split(jax.random.key(1), num_moves)
    ids = jnp.arange(num_rows, dtype=jnp.int32)
    ids = np.asarray(jax.lax.scan(move, ids, keys)[1])
    met = np.zeros((num_rows, num_rows))
    for block in ids.reshape(num_moves, num_blocks, height).transpose(1, 0, 2):
      for a in range(height):
        for b in range(height):
          np.add.at(met, (block[:, a], block[:, b]), 1)
    met = met[~np.eye(num_rows, dtype=bool)] / num_moves
    want = (height - 1) / (num_rows - 1)
    np.testing.assert_allclose(met, want, atol=5 * (want / num_moves) ** 0.5)
    # And each row is everywhere equally often.
    first = np.argmax(ids == 0, axis=1) // height
    share = np.bincount(first, minlength=num_blocks) / num_moves
    np.testing.assert_allclose(share, 1 / num_blocks, atol=0.03)


class RedistributeTest(parameterized.TestCase):
  @parameterized.parameters((16, 8, 8), (24, 12, 2))
  def test_devices_equal_one(self, num_rows, num_blocks, num_devices):
    rows = jax.random.normal(jax.random.key(0), (num_rows, 5))
    move = _over_devices(num_devices, num_rows, num_blocks)
    draw = jax.jit(ring.draw_order, static_argnums=(1, 2))
    for number in range(4):
      key = jax.random.key(number)
      order = draw(key, num_rows, num_blocks)
      alone = ring.redistribute(rows, order, num_blocks=num_blocks)
      np.testing.assert_array_equal(alone, np.asarray(rows)[order])
      np.testing.assert_array_equal(move(key, rows), alone)

  @parameterized.parameters((16, 8, 8), (48, 8, 4))
  def test_one_all_to_all_and_no_more(self, num_rows, num_blocks, num_devices):
    move = _over_devices(num_devices, num_rows, num_blocks)
    rows = jax.ShapeDtypeStruct((num_rows, 5), jnp.float32)
    lowered = move.lower(jax.random.key(0), rows)
    self.assertEqual(lowered.as_text().count('stablehlo.all_to_all'), 1)
    found = COLLECTIVE.findall(lowered.compile().as_text())
    self.assertEqual(found, ['all-to-all'])
    # What a device sends: room for the rows that it may have for each block.
    room = -(-num_rows // num_blocks // num_blocks) * num_blocks
    local = num_blocks // num_devices
    shape = f'{local}x{num_devices}x{local}x{room // num_blocks}x5xf32'
    self.assertRegex(lowered.as_text(), f'all_to_all.*tensor<{shape}>')

  @pytest.mark.slow
  def test_over_2_processes(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'rows.npy'
    processes.run('tests.ring.redistributes', 2, str(path))
    order = ring.draw_order(jax.random.key(3), 20, 4)
    want = np.arange(40).reshape(20, 2)[order]
    np.testing.assert_array_equal(np.load(path), want)
    self.assertFalse(np.array_equal(order, np.arange(20)))

  @parameterized.parameters(
    ((6, 2), 6, 0, 'num_blocks must be at least 1'),
    ((6, 2), 6, 4, 'num_blocks must divide'),
    ((6,), 6, 2, 'rows must have shape'),
    ((6, 2), 4, 2, r'order must have shape \(6,\)'),
  )
  def test_refuses(self, shape, length, num_blocks, match):
    order = jnp.arange(length, dtype=jnp.int32)
    with self.assertRaisesRegex(ValueError, match):
      ring.redistribute(jnp.zeros(shape), order, num_blocks=num_blocks)

  def test_refuses_blocks_that_no_device_has(self):
    with self.assertRaisesRegex(ValueError, 'num_blocks must be a multiple'):
      _over_devices(4, 8, 2)(jax.random.key(0), jnp.zeros((8, 1)))
