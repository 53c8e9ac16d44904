"""The ring against a list of visits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import ring


def visit(resident, own, block, number):
  """Order matters to all three."""
  seen, count = resident
  seen = seen.at[count].set(number)
  time, number = count.astype(jnp.float32), number.astype(jnp.float32)
  return (seen, count + 1), own + (1 + time) * block, 2 * block + number


def serial(width, here):
  """What every device saw and kept, and the blocks, by loops."""
  total = width * here
  seen = np.zeros((width, total), np.int32)
  kept = np.zeros((width, total), np.float32)
  blocks = np.arange(1, total + 1, dtype=np.float32)
  for t in range(total):
    for i in range(width):
      b = (i + t // here) % width * here + t % here
      seen[i, t] = b
      kept[i, b] += (1 + t) * blocks[b]
      blocks[b] = 2 * blocks[b] + b
  return seen, kept, blocks


class RotateTest(parameterized.TestCase):
  @parameterized.parameters((2, 2), (4, 3))
  def test_equals_loops(self, width, here):
    self._check_equals_loops(width, here)

  @parameterized.parameters((1, 1), (1, 4), (2, 1), (8, 1))
  @pytest.mark.slow
  def test_equals_loops_elsewhere(self, width, here):
    self._check_equals_loops(width, here)

  def _check_equals_loops(self, width, here):
    total = width * here
    blocks = jnp.arange(1, total + 1, dtype=jnp.float32)
    spec = jax.sharding.PartitionSpec(mesh_lib.RING)

    def go(blocks, axis_name=None):
      seen = jnp.zeros_like(blocks, shape=total, dtype=jnp.int32)
      count = jnp.zeros_like(blocks, shape=(), dtype=jnp.int32)
      kept = jnp.zeros_like(blocks, shape=total)
      (seen, _), kept, blocks = ring.rotate(
        visit, (seen, count), kept, blocks, axis_name=axis_name
      )
      return seen[None], kept[None], blocks

    if width > 1:
      go = jax.shard_map(
        functools.partial(go, axis_name=mesh_lib.RING),
        mesh=mesh_lib.make(jax.devices()[:width], ring=width),
        in_specs=spec,
        out_specs=spec,
      )
    found = jax.jit(go)(blocks)
    for got, want in zip(found, serial(width, here), strict=True):
      np.testing.assert_array_equal(got, want)
