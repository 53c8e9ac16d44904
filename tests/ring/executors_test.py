"""All executors against visits one after another in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import ring
from emc2.ring import executors, schedules

# Workers, and blocks for each.
SHAPES = ((1, 1), (2, 2), (4, 2))
OTHERS = ((1, 3), (2, 1), (4, 1), (8, 1), (4, 3), (8, 3))
DIM = 3


def update(resident, own, block, number):
  """Order matters to all; rounding too."""
  weight = 1 / (1 + number.astype(block.dtype) / 7)
  block = jnp.cos(block * weight + resident['sum'])
  resident = resident | {
    'sum': 0.5 * resident['sum'] + block * resident['x'] / 4
  }
  return resident, own + block / weight, block


def gather(resident, own, block, number):
  """A second rotation that reads only."""
  del number
  return resident | {'total': resident['total'] + own * block}, own, block


def swap(resident):
  return resident | {
    'sum': resident['total'] / 3,
    'total': jnp.zeros_like(resident['total']),
  }


ROTATIONS = {
  'one': (ring.Rotation(update, lambda x: x),),
  'two': (ring.Rotation(update, lambda x: x), ring.Rotation(gather, swap)),
}


def start(width, here):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  residents = {
    'x': draw(width, DIM),
    'sum': draw(width, DIM),
    'total': np.zeros((width, DIM)),
  }
  total = width * here
  return residents, draw(width, total, DIM), draw(total, DIM)


def loops(numbers, num_rotations, residents, kept, blocks):
  """The oracle."""
  x, sums, totals = (residents[name].copy() for name in ('x', 'sum', 'total'))
  kept, blocks = kept.copy(), blocks.copy()
  for rotation in range(num_rotations):
    for row in numbers:
      for p, q in enumerate(row):
        if rotation == 0:
          weight = 1 / (1 + q / 7)
          blocks[q] = np.cos(blocks[q] * weight + sums[p])
          sums[p] = 0.5 * sums[p] + blocks[q] * x[p] / 4
          kept[p, q] += blocks[q] / weight
        else:
          totals[p] += kept[p, q] * blocks[q]
    if rotation == 1:
      sums, totals = totals / 3, np.zeros_like(totals)
  return {'x': x, 'sum': sums, 'total': totals}, kept, blocks


def assert_close(found, wanted):
  for got, want in zip(
    jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


class ExecutorsTest(parameterized.TestCase):
  @parameterized.product(shape=SHAPES, rotations=('one', 'two'))
  def test_virtual_and_serial(self, shape, rotations):
    self._check_virtual_and_serial(shape, rotations)

  @parameterized.product(shape=OTHERS, rotations=('one', 'two'))
  @pytest.mark.slow
  def test_virtual_and_serial_elsewhere(self, shape, rotations):
    self._check_virtual_and_serial(shape, rotations)

  def _check_virtual_and_serial(self, shape, rotations):
    with jax.enable_x64(True):
      state = start(*shape)
      wanted = state
      for _ in range(3):
        wanted = loops(
          schedules.travel(*shape), len(ROTATIONS[rotations]), *wanted
        )
      for executor in (ring.virtual, ring.serial):
        run = jax.jit(functools.partial(executor, ROTATIONS[rotations]))
        found = state
        for _ in range(3):
          found = run(*found)
        assert_close(found, wanted)

  def test_on_mesh(self):
    self._check_on_mesh(4, 3)

  @parameterized.parameters((2, 1), (8, 1))
  @pytest.mark.slow
  def test_on_mesh_elsewhere(self, width, here):
    self._check_on_mesh(width, here)

  def _check_on_mesh(self, width, here):
    with jax.enable_x64(True):
      state = start(width, here)
      wanted = loops(schedules.travel(width, here), 2, *state)
      mesh = mesh_lib.make(jax.devices()[:width], ring=width)
      spec = jax.sharding.PartitionSpec(mesh_lib.RING)
      run = lambda *given: ring.on_mesh(ROTATIONS['two'], *given, mesh)
      given = mesh_lib.place(state, mesh, spec)
      assert_close(jax.jit(run)(*given), wanted)
      text = jax.jit(run).lower(*given).as_text()
    self.assertIn('collective_permute', text)
    for other in ('all_reduce', 'all_gather', 'all_to_all', 'reduce_scatter'):
      self.assertNotIn(other, text)

  @parameterized.parameters(
    (schedules.two_level(2, 2),), (schedules.strata(np.array([2, 0, 3, 1])),)
  )
  def test_schedules(self, schedule):
    self._check_schedules(schedule)

  @parameterized.parameters(
    (schedules.two_level(4, 2),), (schedules.strata(np.array([0])),)
  )
  @pytest.mark.slow
  def test_schedules_elsewhere(self, schedule):
    self._check_schedules(schedule)

  def _check_schedules(self, schedule):
    numbers = np.asarray(schedule.numbers)
    width = len(numbers)
    with jax.enable_x64(True):
      state = start(width, 1)
      wanted = loops(numbers, 2, *state)
      run = functools.partial(ring.virtual, ROTATIONS['two'], schedule=schedule)
      assert_close(jax.jit(run)(*state), wanted)
      run = functools.partial(ring.serial, ROTATIONS['two'], numbers=numbers)
      assert_close(jax.jit(run)(*state), wanted)
      mesh = mesh_lib.make(jax.devices()[:width], ring=width)
      given = mesh_lib.place(
        state, mesh, jax.sharding.PartitionSpec(mesh_lib.RING)
      )
      run = lambda *given: ring.on_mesh(
        ROTATIONS['two'], *given, mesh, schedule=schedule
      )
      assert_close(jax.jit(run)(*given), wanted)

  def test_strata_of_a_traced_order(self):
    with jax.enable_x64(True):
      state = start(4, 1)

      @jax.jit
      def run(order, *state):
        schedule = schedules.strata(order)
        return ring.virtual(ROTATIONS['one'], *state, schedule=schedule)

      for order in ([3, 1, 2, 0], [1, 0, 2, 3]):
        numbers = np.asarray(schedules.strata(np.array(order)).numbers)
        wanted = loops(numbers, 1, *state)
        assert_close(run(jnp.asarray(order), *state), wanted)
      self.assertEqual(run._cache_size(), 1)

  def test_visits_of_others_commute(self):
    with jax.enable_x64(True):
      state = start(4, 1)
      run = jax.jit(functools.partial(ring.replay, ROTATIONS['one']))
      one = run(*state, np.array([0, 2, 1]), np.array([3, 1, 0]))
      other = run(*state, np.array([1, 2, 0]), np.array([0, 1, 3]))
    jax.tree.map(np.testing.assert_array_equal, one, other)

  def test_each_worker_finishes_by_itself(self):
    finish = lambda x: x | {'total': x['total'] + 1}
    rotations = (ring.Rotation(update, finish),)
    state = start(2, 1)
    found, _, _ = ring.replay(
      rotations, *state, np.array([0, 0, 0, 1]), np.array([1, 0, 1, 0])
    )
    np.testing.assert_array_equal(found['total'][:, 0], [1, 0])

  def test_bad_input(self):
    residents, kept, blocks = start(2, 1)
    rotations = ROTATIONS['one']
    with self.assertRaisesRegex(ValueError, 'multiple of the 2 workers, got 3'):
      ring.virtual(rotations, residents, kept, np.zeros((3, DIM)))
    with self.assertRaisesRegex(ValueError, r'kept must .* \(2, 2\)'):
      ring.serial(rotations, residents, kept[:, :1], blocks)
    with self.assertRaisesRegex(
      ValueError, 'blocks must have one leading axis'
    ):
      executors.check_axes(residents, kept, (blocks, blocks[:1]))
    with self.assertRaisesRegex(ValueError, r'workers must lie in \[0, 2\)'):
      ring.replay(
        rotations, residents, kept, blocks, np.array([0, 2]), np.array([0, 1])
      )
    mesh = mesh_lib.make(jax.devices()[:4], ring=4)
    with self.assertRaisesRegex(ValueError, 'ring of 2 devices'):
      ring.on_mesh(rotations, residents, kept, blocks, mesh)
    schedule = schedules.two_level(2, 2)
    with self.assertRaisesRegex(ValueError, 'must be of 2 workers'):
      ring.virtual(rotations, residents, kept, blocks, schedule=schedule)
