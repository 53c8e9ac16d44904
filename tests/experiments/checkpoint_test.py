import gc
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import checkpoint


class Memory(NamedTuple):
  mean: jax.Array
  nothing: None


def _tree():
  return {
    'w': jnp.arange(5000, dtype=jnp.float32).reshape(50, 100) / 7,
    'a/b.c': (jnp.int32(3), Memory(jnp.full((2,), -jnp.inf), None)),
    'empty': jnp.zeros((0, 3)),
    'keys': jax.random.split(jax.random.key(1), 3),
    'other': jax.random.key(2, impl='rbg'),
  }


def _numpy(tree):
  """Host values with keys as words, so that they compare bit for bit."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  words = lambda x: jax.random.key_data(x) if is_key(x) else x
  return jax.tree.map(lambda x: np.asarray(words(x)), tree)


def _assert_same(tree, want):
  assert jax.tree.structure(tree) == jax.tree.structure(want)
  assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(
    lambda x: x.dtype, want
  )
  jax.tree.map(np.testing.assert_array_equal, _numpy(tree), _numpy(want))


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  found = (path for path in folder.rglob('*') if path.is_file())
  return {str(path): path.read_bytes() for path in found}


def _biggest_file(folder: pathlib.Path) -> pathlib.Path:
  files = (path for path in folder.rglob('*') if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def _halve(step: pathlib.Path):
  path = _biggest_file(step)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(step: pathlib.Path):
  path = _biggest_file(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def _remove(step: pathlib.Path):
  _biggest_file(step).unlink()


def _empty_page(step: pathlib.Path):
  (step / 'page' / 'metadata').write_bytes(b'')


def _lose_page(step: pathlib.Path):
  (step / 'page' / 'metadata').unlink()


def _await_reads():
  """Lets reads that Orbax gave up end here, and not in another test."""
  time.sleep(0.5)
  gc.collect()


class CheckpointsTest(parameterized.TestCase):
  @pytest.fixture(autouse=True)
  def _workdir(self, tmp_path, caplog):
    self.folder = tmp_path / 'checkpoints'
    self.caplog = caplog

  def _save(self, *steps, tree=None, **kwargs):
    with checkpoint.Checkpoints(self.folder, **kwargs) as saved:
      for step in steps:
        saved.save(step, _tree() if tree is None else tree, {'step': step})

  def _restore(self, like=None, **kwargs):
    with checkpoint.Checkpoints(self.folder, **kwargs) as saved:
      return saved.restore(_tree() if like is None else like)

  def test_gives_back_what_was_saved(self):
    self._save(7)
    like = jax.tree.map(jnp.zeros_like, _tree() | {'keys': 0, 'other': 0})
    like |= {k: _tree()[k] for k in ('keys', 'other')}
    restored = self._restore(like)
    self.assertEqual((restored.step, restored.extra), (7, {'step': 7}))
    _assert_same(restored.tree, _tree())
    _, draw = restored.tree['keys'][1], jax.random.normal
    np.testing.assert_array_equal(
      draw(restored.tree['keys'][1]), draw(_tree()['keys'][1])
    )

  @parameterized.parameters(
    'bool', 'int8', 'uint16', 'int32', 'bfloat16', 'float16', 'float8_e4m3fn',
    'complex64',
  )  # fmt: skip
  @pytest.mark.slow
  def test_every_dtype(self, dtype):
    tree = {'x': jnp.arange(12).reshape(3, 4).astype(dtype)}
    self._save(1, tree=tree)
    _assert_same(self._restore(jax.tree.map(jnp.zeros_like, tree)).tree, tree)

  def test_nothing_to_restore(self):
    self.assertIsNone(self._restore())

  def test_keeps_the_newest(self):
    self._save(1, 2, 3, 4, 5, keep=3)
    with checkpoint.Checkpoints(self.folder) as saved:
      self.assertEqual(saved.steps(), [3, 4, 5])
    self.assertEqual(self._restore().step, 5)

  def test_refuses_to_keep_none(self):
    with self.assertRaisesRegex(ValueError, 'keep must be at least 1, got 0'):
      checkpoint.Checkpoints(self.folder, keep=0)

  def test_the_state_may_be_donated_at_once(self):
    tree = {'x': jnp.arange(300_000.0)}
    overwrite = jax.jit(lambda x: jnp.full_like(x, -1.0), donate_argnums=0)
    with checkpoint.Checkpoints(self.folder) as saved:
      saved.save(1, tree)
      overwrite(tree.pop('x')).block_until_ready()
    restored = self._restore({'x': jnp.zeros(300_000)})
    np.testing.assert_array_equal(restored.tree['x'], np.arange(300_000.0))

  def test_restores_onto_another_mesh(self):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    place = lambda *axes: jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)
    )
    tree = {'x': jnp.arange(64.0).reshape(16, 4), 'key': jax.random.key(0)}
    spread = jax.device_put(tree, {'x': place('data'), 'key': place()})
    self._save(1, tree=spread)
    _assert_same(self._restore(tree).tree, tree)
    restored = self._restore(spread).tree
    _assert_same(restored, tree)
    self.assertEqual(restored['x'].sharding, place('data'))

  # When one read fails, Orbax leaves the others of the checkpoint unawaited.
  @parameterized.parameters(_halve, _flip, _remove, _empty_page, _lose_page)
  @pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
  @pytest.mark.slow
  def test_takes_the_one_before_a_damaged_one(self, damage):
    self._save(10)
    newer = _tree() | {'w': -_tree()['w']}
    self._save(20, tree=newer)
    damage(self.folder / '20')
    with checkpoint.Checkpoints(self.folder) as saved:
      restored = saved.restore(_tree())
      self.assertEqual(restored.step, 10)
      _assert_same(restored.tree, _tree())
      self.assertTrue(
        (self.folder.with_name('checkpoints-damaged') / '20').exists()
      )
      self.assertIn('20 is damaged', self.caplog.text)
      saved.save(20, newer)
    restored = self._restore()
    self.assertEqual(restored.step, 20)
    _assert_same(restored.tree, newer)
    _await_reads()

  @pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
  @pytest.mark.slow
  def test_all_damaged_is_an_error(self):
    self._save(10, 20)
    _halve(self.folder / '10')
    _flip(self.folder / '20')
    before = _files(self.folder)
    with self.assertRaisesRegex(ValueError, r'every checkpoint .* \[10, 20\]'):
      self._restore()
    self.assertEqual(_files(self.folder), before)
    _await_reads()

  @parameterized.named_parameters(
    ('shape', {'w': jnp.zeros((50, 99))},
     r"\['w'\] is float32\[50,100\] there and float32\[50,99\] here"),
    ('dtype', {'w': jnp.zeros((50, 100), jnp.bfloat16)},
     r"\['w'\] is float32\[50,100\] there and bfloat16\[50,100\] here"),
    ('more', {'v': jnp.zeros(3)}, r"\['v'\] is float32\[3\] here and missing"),
    ('key', {'other': jax.random.key(2)}, r'key<rbg>\[\] there and key<fry>'),
  )  # fmt: skip
  def test_refuses_another_shape(self, change, message):
    self._save(10)
    before = _files(self.folder)
    with self.assertRaisesRegex(ValueError, message):
      self._restore(_tree() | change)
    self.assertEqual(_files(self.folder), before)

  def test_refuses_fewer_leaves(self):
    self._save(10)
    like = _tree()
    del like['w']
    with self.assertRaisesRegex(ValueError, r"\['w'\] .* unknown here"):
      self._restore(like)

  def test_refuses_another_name(self):
    self._save(10, name='emc2')
    with self.assertRaisesRegex(ValueError, "of 'emc2', this run is 'simclr'"):
      self._restore(name='simclr')

  def test_last_finite(self):
    with checkpoint.Checkpoints(self.folder) as saved:
      self.assertIsNone(saved.last_finite())
      saved.save(1, {'x': jnp.ones(3)})
      saved.save(2, {'x': jnp.array([1, jnp.nan, 1])})
      self.assertEqual(saved.last_finite(), 1)
