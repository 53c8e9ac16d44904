"""Processes that send blocks to one another against a list of visits."""

import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import ring
from emc2.ring import processes as processes_lib
from emc2.ring import worker as worker_lib

from tests import processes
from tests.ring import rotations


class ProcessesTest(parameterized.TestCase):
  def test_two_equal_loops_and_tell_of_errors(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    processes.run(
      'tests.ring.rotates_processes', 2, str(folder), 'equal', 'fail'
    )
    found = [np.load(folder / f'equal{p}.npz') for p in range(2)]
    for here in (1, 3):
      start = rotations.draw(2, here)
      (x, seen), kept, blocks = rotations.loops(
        2, here, rotations.ROTATIONS, start, 2
      )
      for p in range(2):
        home = blocks[p * here : (p + 1) * here]
        for i, want in enumerate((x[p], seen[p], kept[p], home)):
          once = found[p][f'once{here}.{i}']
          self.assertEqual(once.dtype, np.float64)
          np.testing.assert_allclose(once, want, rtol=1e-12, atol=1e-12)
          for name in ('late', 'twice'):
            np.testing.assert_array_equal(once, found[p][f'{name}{here}.{i}'])
    for p in range(2):
      errors = json.loads((folder / f'fail{p}.json').read_text())
      self.assertEqual(
        errors['raises'][0],
        'process 1 failed at its visit 5, of block 3: no more',
      )
      self.assertRegex(errors['hangs'][0], 'process 0 hung: it sent no block')
      self.assertRegex(errors['differs'][0], 'must make the same run')
      self.assertLess(errors['raises'][1], 10)
      self.assertLess(errors['hangs'][1], 10)

  @pytest.mark.slow
  def test_tells_of_the_one_that_dies(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    processes.run('tests.ring.rotates_processes', 2, str(folder), 'die')
    died = float((folder / 'died').read_text())
    told, message = (folder / 'told').read_text().split(' ', 1)
    self.assertStartsWith(message, 'process 1 died: ')
    self.assertLess(float(told) - died, 5)

  @parameterized.parameters(1, 3)
  def test_one_process_equals_loops(self, here):
    (x, seen), kept, blocks = start = rotations.draw(1, here)
    want = rotations.loops(1, here, rotations.ROTATIONS, start, 2)
    delays = []
    watched = mock.patch.object(worker_lib, 'work', wraps=worker_lib.work)
    with jax.enable_x64(True), watched as work:
      found = processes_lib.run(
        rotations.ROTATIONS,
        (x[0], seen[0]),
        kept[0],
        blocks,
        num_passes=2,
        delay=lambda worker, count: delays.append((worker, count)) or 0.0,
        device=jax.devices()[3],
        ahead=3,
      )
    self.assertEqual(work.call_args.kwargs['ahead'], 3)
    found = *jax.tree.map(lambda x: x[None], found[:2]), found[2]
    check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12)
    jax.tree.map(check, found, want)
    self.assertEqual(found[2].devices(), {jax.devices()[3]})
    self.assertEqual(delays, [(0, count) for count in range(4 * here)])

  def test_arrays_that_come_in_are_the_callers_still(self):
    def visit(key, own, block, number):
      return jax.random.fold_in(key, number), own + 1, block * 2

    rotation = ring.Rotation(visit, lambda key: key)
    given = jax.random.key(0), jnp.arange(3.0), jnp.ones((3, 2))
    found = processes_lib.run([rotation], *given)
    key = jax.random.key(0)
    np.testing.assert_array_equal(
      jax.random.key_data(given[0]), jax.random.key_data(key)
    )
    np.testing.assert_array_equal(given[1], np.arange(3))
    np.testing.assert_array_equal(given[2], np.ones((3, 2)))
    for number in range(3):
      key = jax.random.fold_in(key, number)
    np.testing.assert_array_equal(
      jax.random.key_data(found[0]), jax.random.key_data(key)
    )
    np.testing.assert_array_equal(found[1], np.arange(3) + 1)
    np.testing.assert_array_equal(found[2], np.full((3, 2), 2))

  @parameterized.parameters(
    ({'kept': (4,)}, 'kept must have a leading axis of 3'),
    ({'blocks': (0,)}, 'blocks must have one leading axis'),
    ({'num_passes': -1}, 'num_passes must be at least 0'),
    ({'ahead': 0}, 'ahead must be at least 1'),
    ({'timeout': 0.0}, 'timeout must be positive'),
  )
  def test_refuses(self, change, match):
    given = {'kept': (3,), 'blocks': (3,)} | change
    kept, blocks = jnp.zeros(given.pop('kept')), jnp.zeros(given.pop('blocks'))
    same = ring.Rotation(lambda r, o, b, n: (r, o, b), lambda r: r)
    with self.assertRaisesRegex(ValueError, match):
      processes_lib.run([same], jnp.zeros(()), kept, blocks, **given)

  def test_names_what_to_take_where_nothing_can_be_sent(self):
    same = ring.Rotation(lambda r, o, b, n: (r, o, b), lambda r: r)
    run = lambda blocks: processes_lib.run(
      [same], jnp.zeros(()), (), blocks, host='10.0.0.7'
    )
    lacks = mock.Mock()
    lacks.start_transfer_server.side_effect = jax.errors.JaxRuntimeError('no')
    with mock.patch.object(jax, 'process_count', lambda: 2):
      for module in (None, lacks):
        with (
          mock.patch.object(processes_lib, 'transfer', module),
          self.assertRaisesRegex(NotImplementedError, 'emc2.ring.on_mesh'),
        ):
          run(jnp.zeros(2))
      lacks.start_transfer_server.assert_called_once_with(
        jax.devices()[0].client, '10.0.0.7:0', ['10.0.0.7:0']
      )
      with self.assertRaisesRegex(NotImplementedError, 'no typed keys'):
        run(jax.random.split(jax.random.key(0), 2))
