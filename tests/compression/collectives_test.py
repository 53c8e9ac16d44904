"""Many arrays in few collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import mesh
from emc2.compression import collectives

NUM_WORKERS = 4
BIG = collectives._JOINED_BELOW

FOLDS = {
  'mean': (collectives.mean, lambda x: x.mean(axis=0)),
  'total': (collectives.total, lambda x: x.sum(axis=0)),
  'gather': (collectives.gather, lambda x: x),
}


def _draw():
  rng = np.random.default_rng(0)
  shapes = {'row': (5,), 'matrix': (2, 3), 'number': (), 'big': (BIG,)}
  draw = lambda shape: rng.normal(size=(NUM_WORKERS, *shape))
  return {name: draw(s).astype('float32') for name, s in shapes.items()}


def _jitted(fold, **axes):
  count = int(np.prod(list(axes.values())))
  alone = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
  fn = jax.shard_map(
    lambda tree: fold(alone(tree), mesh.DATA),
    mesh=mesh.make(jax.devices()[:count], **axes),
    in_specs=jax.P(mesh.DATA),
    out_specs=jax.P(),
  )
  return jax.jit(fn)


class CollectivesTest(parameterized.TestCase):
  @parameterized.parameters(*FOLDS)
  def test_equals_numpy(self, name):
    fold, want = FOLDS[name]
    tree = _draw()
    got = _jitted(fold, data=NUM_WORKERS)(tree)
    for leaf in tree:
      np.testing.assert_allclose(got[leaf], want(tree[leaf]), rtol=1e-5)

  @parameterized.parameters(*FOLDS)
  def test_over_an_axis_of_vmap(self, name):
    fold, want = FOLDS[name]
    tree = _draw()
    fn = jax.vmap(lambda tree: fold(tree, 'workers'), axis_name='workers')
    got = jax.jit(fn)(tree)
    for leaf in tree:
      every = np.broadcast_to(want(tree[leaf]), got[leaf].shape)
      np.testing.assert_allclose(got[leaf], every, rtol=1e-5)

  @parameterized.parameters(*FOLDS)
  def test_small_arrays_travel_together(self, name):
    tree = _draw()
    fn = _jitted(FOLDS[name][0], data=NUM_WORKERS)
    text = fn.lower(tree).as_text()
    self.assertLen(re.findall(r'"?stablehlo\.all_(reduce|gather)"?\(', text), 2)

  def test_dtypes_stay_apart(self):
    tree = {
      'words': np.arange(8, dtype=np.uint32).reshape(NUM_WORKERS, 2),
      'row': np.ones((NUM_WORKERS, 3), np.float32),
    }
    got = _jitted(collectives.total, data=NUM_WORKERS)(tree)
    np.testing.assert_array_equal(got['words'], tree['words'].sum(axis=0))
    self.assertEqual(got['words'].dtype, jnp.uint32)

  def test_what_does_not_vary_over_another_axis_stays_so(self):
    def run(rows):
      once = rows[0]
      each = once + jax.lax.axis_index(mesh.FSDP).astype(jnp.float32)
      both = collectives.mean({'once': once, 'each': each}, mesh.DATA)
      return both['once'], both['each'][None]

    fn = jax.shard_map(
      run,
      mesh=mesh.make(data=4, fsdp=2),
      in_specs=jax.P(mesh.DATA),
      out_specs=(jax.P(), jax.P(mesh.FSDP)),
    )
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    once, each = jax.jit(fn)(rows)
    np.testing.assert_allclose(once, rows.mean(axis=0))
    np.testing.assert_allclose(each, rows.mean(axis=0) + [[0], [1]])
