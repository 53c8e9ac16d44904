"""What all contrastive methods share: batches, views, the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import contrastive
from emc2 import mesh as mesh_lib
from emc2.contrastive import emc2, estimator, simclr

from tests.contrastive import common


class CheckBatchTest(parameterized.TestCase):
  def test_accepts(self):
    estimator.check_batch([3, 0, 9], 10)
    view = contrastive.draw_views(jax.random.key(0), 3, 2)
    estimator.check_batch([3, 0, 9], 10, view, 2)

  @parameterized.parameters(
    ([1], 'at least 2 samples, .* got 1'),
    ([], 'vector of integers|at least 2 samples'),
    ([1, 10], r'index must lie in \[0, 10\), got 10'),
    ([1, -1], r'index must lie in \[0, 10\), got -1'),
    ([1, 2, 1], 'distinct, got 1 2 times'),
    ([[1, 2]], 'vector of integers, got shape'),
    ([1.0, 2.0], 'vector of integers, .* float64'),
  )
  def test_refuses_index(self, index, message):
    with self.assertRaisesRegex(ValueError, message):
      estimator.check_batch(index, 10)

  def test_refuses_view(self):
    with self.assertRaisesRegex(NotImplementedError, 'exactly two views'):
      estimator.check_batch([0, 1], 10, np.zeros((3, 2), np.uint32))
    with self.assertRaisesRegex(ValueError, r'view must be \(2, 2\)'):
      estimator.check_batch([0, 1], 10, np.zeros((2, 3), np.uint32))
    with self.assertRaisesRegex(ValueError, r'lie in \[0, 2\), got 2'):
      estimator.check_batch([0, 1], 10, np.full((2, 2), 2, np.uint32), 2)


class DrawViewsTest(parameterized.TestCase):
  @parameterized.parameters(2, 5)
  def test_all_ordered_pairs_alike(self, num_views):
    draws = contrastive.draw_views(jax.random.key(0), 20_000, num_views)
    first, second = np.asarray(draws, int)
    counts = np.zeros((num_views, num_views))
    np.add.at(counts, (first, second), 1)
    self.assertEqual(np.trace(counts), 0)
    pairs = num_views * (num_views - 1)
    off = counts[~np.eye(num_views, dtype=bool)]
    error = np.sqrt(20_000 / pairs)
    np.testing.assert_array_less(np.abs(off - 20_000 / pairs), 4 * error)

  def test_fresh_views_never_plain(self):
    draws = contrastive.draw_views(jax.random.key(0), 1000)
    self.assertLess(int(draws.max()), contrastive.PLAIN_VIEW)
    self.assertLen(np.unique(draws), 2000)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'at least 2, got 1'):
      contrastive.draw_views(jax.random.key(0), 3, 1)


class EmbedBatchTest(parameterized.TestCase):
  def test_order(self):
    views = common.clusters(6, 2)
    params, batch = common.table(views), common.batch([4, 1, 2])
    got = estimator.embed_batch(params, batch, common.embed_table)
    want = np.concatenate([views[[4, 1, 2], 0], views[[4, 1, 2], 1]])
    np.testing.assert_allclose(got.rows, want, rtol=1e-6)
    np.testing.assert_array_equal(got.position, np.arange(6))
    similarity = np.sum(want[:3] * want[3:], axis=1)
    np.testing.assert_allclose(
      estimator.positives(got.rows), np.tile(similarity, 2), rtol=1e-5
    )

  @pytest.mark.slow
  def test_sharded_rows_know_their_columns(self):
    params = common.table(common.clusters(20, 2))
    index = np.random.default_rng(0).permutation(20)[:16]
    batch = common.batch(index, data=jnp.zeros([]))
    mesh = mesh_lib.make(data=8)
    spec = jax.sharding.PartitionSpec

    def local(batch):
      return estimator.embed_batch(params, batch, common.embed_table, 'data')

    got = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(estimator.Batch(spec('data'), spec(None, 'data'), spec()),),
      out_specs=estimator.Views(spec('data'), spec(), spec('data')),
      check_vma=False,
    )(batch)
    whole = estimator.embed_batch(params, batch, common.embed_table)
    np.testing.assert_array_equal(got.columns, whole.columns)
    np.testing.assert_array_equal(got.rows, got.columns[got.position])
    np.testing.assert_array_equal(np.sort(got.position), np.arange(32))


class AlgorithmTest(parameterized.TestCase):
  def test_one_step_of_sgd(self):
    inputs = jnp.float32(common.clusters(6, 2))
    weight = jax.random.normal(jax.random.key(1), (16, 8))
    method = simclr.simclr(inverse_temperature=5.0, decoupled=True)
    algorithm = contrastive.algorithm(
      method, common.embed_linear, optax.sgd(0.1)
    )
    state = algorithm.init(jax.random.key(0), {'weight': weight})
    batch = common.batch(range(6), data=inputs)
    state, info = jax.jit(algorithm.step)(jax.random.key(0), state, batch)
    # The batch is the data set, so the estimate is the exact gradient.
    grads = common.numpy_linear_gradient(inputs, weight, 5.0)
    want = np.asarray(weight) - 0.1 * grads
    np.testing.assert_allclose(
      state.params['weight'], want, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      info.gradient_norm, np.linalg.norm(grads), rtol=1e-4
    )
    self.assertEqual(state.count, 1)

  @pytest.mark.slow
  def test_gives_the_value_to_the_optimizer(self):
    seen = []

    def update(updates, state, params=None, *, value, **extra):
      del params, extra
      seen.append(value)
      return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda p: (), update)
    method = simclr.simclr(inverse_temperature=1.0)
    algorithm = contrastive.algorithm(method, common.embed_table, tx)
    params = common.table(common.clusters(4, 2))
    state = algorithm.init(jax.random.key(0), params)
    _, info = algorithm.step(jax.random.key(0), state, common.batch([0, 1]))
    np.testing.assert_allclose(seen[0], info.loss, rtol=1e-6)

  def test_second_step_compiles_nothing(self):
    method = emc2.emc2(6, inverse_temperature=5.0, num_views=2)
    algorithm = contrastive.algorithm(
      method, common.embed_table, optax.adam(1e-3)
    )
    state = algorithm.init(
      jax.random.key(0), common.table(common.clusters(6, 2))
    )
    step = jax.jit(algorithm.step)
    # Optax's bias correction counts on promotion.
    with jax.numpy_dtype_promotion('standard'):
      for number in range(3):
        batch = common.batch([number, 5])
        state, _ = step(jax.random.key(number), state, batch)
    self.assertEqual(step._cache_size(), 1)
