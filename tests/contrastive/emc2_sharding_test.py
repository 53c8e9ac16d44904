"""EMC² over a mesh: the same numbers, and no message beside those counted."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import contrastive
from emc2 import mesh as mesh_lib
from emc2.contrastive import emc2

from tests import processes
from tests.contrastive import common

BETA = 5.0


def _train(mesh, num_steps=4, **settings):
  num_samples, size = 20, 16
  inputs = jnp.float32(common.clusters(num_samples, 2))
  method = emc2.emc2(
    num_samples,
    inverse_temperature=BETA,
    axis_name=None if mesh is None else 'data',
    **settings,
  )

  def embed_fn(params, data, index, view):
    return common.embed_linear(params, data, index, view % jnp.uint32(2))

  algorithm = contrastive.algorithm(method, embed_fn, optax.sgd(0.5), mesh=mesh)
  weight = jax.random.normal(jax.random.key(7), (16, 8))
  state = algorithm.init(jax.random.key(0), {'weight': weight})
  step = jax.jit(algorithm.step)
  infos = []
  for number in range(num_steps):
    key = jax.random.fold_in(jax.random.key(1), number)
    index = jax.random.permutation(key, num_samples)[:size]
    view = contrastive.draw_views(key, size, settings.get('num_views'))
    batch = contrastive.Batch(index, view, inputs)
    state, info = step(key, state, batch)
    infos.append(info)
  return state, infos, jax.jit(step).lower(key, state, batch)


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters([{'num_views': 2, 'burn_in': 0.5}])
  def test_8_devices_equal_1(self, **settings):
    self.check_devices(**settings)

  @parameterized.parameters(
    {'num_views': None},
    {'num_views': 2, 'out_of_batch': 'drop'},
    {'num_views': None, 'out_of_batch': 'cached', 'embedding_size': 8},
    {'num_views': 2, 'proposals': 'uniform'},
    {'num_views': None, 'proposals': 'resample'},
    {'num_views': 2, 'released': True},
  )
  @pytest.mark.slow
  def test_8_devices_equal_1_with_others(self, **settings):
    self.check_devices(**settings)

  def check_devices(self, **settings):
    """States, infos and collectives of a split batch."""
    whole, whole_infos, _ = _train(None, **settings)
    split, split_infos, _ = _train(mesh_lib.make(data=8), **settings)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      (whole, whole_infos),
      (split, split_infos),
    )
    np.testing.assert_array_equal(whole.memory.index, split.memory.index)

  def test_collectives_are_those_counted(self):
    _, _, lowered = _train(
      mesh_lib.make(data=8), num_steps=1, num_views=2, burn_in=0.5
    )
    text = lowered.compile().as_text()
    found = re.findall(
      r' = (\S+).* (all-gather|all-reduce|reduce-scatter|all-to-all|'
      r'collective-permute)(?:-start)?\(',
      text,
    )
    counts = {}
    for _, kind in found:
      counts[kind] = counts.get(kind, 0) + 1
    # Embeddings, B indices with their views, the moved states; the transpose of
    # the first; the gradient with the scalars.
    self.assertEqual(counts.pop('all-gather'), 3, found)
    self.assertEqual(counts.pop('reduce-scatter'), 1, found)
    self.assertLessEqual(counts.pop('all-reduce'), 3, found)
    self.assertEmpty(counts)

  @pytest.mark.slow
  def test_2_processes_equal_1(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for number in (1, 2):
      processes.run(
        'tests.contrastive.trains_sharded', number, str(folder / f'{number}')
      )
    one, two = (np.load(folder / f'{number}.npz') for number in (1, 2))
    np.testing.assert_array_equal(one['index'], two['index'])
    np.testing.assert_array_equal(one['view'], two['view'])
    np.testing.assert_allclose(one['weight'], two['weight'], rtol=1e-5)
    self.assertGreater(np.sum(one['index'] >= 0), 40)
