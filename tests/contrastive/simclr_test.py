"""SimCLR against optax, closed forms and the global loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2.contrastive import estimator, simclr

from tests.contrastive import common

KEY = jax.random.key(0)
NOTHING = simclr.SimclrMemory()


def _rows(views, index):
  """(2B, d): the first views of the batch, then the second."""
  return np.concatenate([views[index, 0], views[index, 1]])


def _numpy_losses(rows, beta, decoupled):
  """NT-Xent of each row in a loop, and its positive's probability."""
  half = len(rows) // 2
  losses, probabilities = [], []
  for a, row in enumerate(rows):
    positive = beta * row @ rows[(a + half) % (2 * half)]
    others = [j for j in range(2 * half) if j % half != a % half]
    negative = np.sum(np.exp(beta * rows[others] @ row))
    both = np.exp(positive) + negative
    losses.append(np.log(negative if decoupled else both) - positive)
    probabilities.append(np.exp(positive) / both)
  return np.array(losses), np.array(probabilities)


class SimclrTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 14.28)
  @pytest.mark.slow
  def test_is_optax_ntxent(self, beta):
    views = common.clusters(12, view_noise=1.0)
    index = np.array([3, 1, 7, 9, 0])
    method = simclr.simclr(inverse_temperature=beta)
    params = common.table(views)

    def want_fn(params):
      rows = params['table'][index].swapaxes(0, 1).reshape(10, -1)
      labels = jnp.tile(jnp.arange(5), 2)
      return optax.losses.ntxent(rows, labels, temperature=1 / beta)

    # optax itself promotes ranks and types.
    with (
      jax.numpy_rank_promotion('allow'),
      jax.numpy_dtype_promotion('standard'),
    ):
      want, want_grad = jax.value_and_grad(want_fn)(params)
      # It normalises again, which takes away the radial part.
      radial = lambda g: (
        g - jnp.sum(g * params['table'], -1, keepdims=True) * params['table']
      )
    (value, (_, info)), grads = common.gradient(
      method,
      KEY,
      method.init(KEY, params),
      params,
      common.batch(index),
    )
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(info.loss, want, rtol=1e-5)
    got = radial(grads['table'])
    self.assertLess(common.relative_error(got, want_grad['table']), 1e-5)

  @parameterized.product(decoupled=[False, True], size=[2, 7])
  def test_is_the_loop(self, decoupled, size):
    views = common.clusters(9, seed=2, view_noise=1.0)
    index = np.random.default_rng(0).permutation(9)[:size]
    method = simclr.simclr(inverse_temperature=5.0, decoupled=decoupled)
    (value, (_, info)), _ = common.gradient(
      method, KEY, NOTHING, common.table(views), common.batch(index)
    )
    want, probabilities = _numpy_losses(_rows(views, index), 5.0, decoupled)
    np.testing.assert_allclose(value, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(info.loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(info.positive, probabilities.mean(), rtol=1e-5)

  def test_rows_differ_from_decoupled_by_the_share_of_the_positive(self):
    """Identity 2: each row's gradient is 1 - p times its decoupled one."""
    views = common.clusters(6)
    rows = _rows(views, np.arange(6))
    _, positive = _numpy_losses(rows, 5.0, False)
    pull = np.zeros((12, 12))
    for a in range(12):
      others = [j for j in range(12) if j % 6 != a % 6]
      weights = np.exp(5.0 * rows[others] @ rows[a])
      pull[a, others] = (1 - positive[a]) * weights / weights.sum()
      pull[a, (a + 6) % 12] = positive[a] - 1
    want = 5.0 / 12 * (pull + pull.T) @ rows
    method = simclr.simclr(inverse_temperature=5.0)
    _, grads = common.gradient(
      method,
      KEY,
      NOTHING,
      common.table(views),
      common.batch(np.arange(6)),
    )
    got = np.concatenate([grads['table'][:, 0], grads['table'][:, 1]])
    self.assertLess(common.relative_error(got, want), 1e-5)

  def test_whole_data_set_gives_the_global_gradient(self):
    views = common.clusters(20)
    method = simclr.simclr(inverse_temperature=5.0, decoupled=True)
    _, grads = common.gradient(
      method,
      KEY,
      NOTHING,
      common.table(views),
      common.batch(np.arange(20)),
    )
    want = common.numpy_global_gradient(views, 5.0)
    self.assertLess(common.relative_error(grads['table'], want), 1e-5)

  def test_permuted_batch_gives_the_same_loss(self):
    views = common.clusters(20)
    method = simclr.simclr(inverse_temperature=5.0)
    index = np.random.default_rng(0).permutation(20)[:8]
    value = lambda index: common.forward(
      method, KEY, NOTHING, common.table(views), common.batch(index)
    )[0]
    np.testing.assert_allclose(value(index), value(index[::-1]), rtol=1e-6)

  def test_finite_at_a_low_temperature(self):
    method = simclr.simclr(inverse_temperature=200.0)
    (value, _), grads = common.gradient(
      method,
      KEY,
      NOTHING,
      common.table(common.clusters(8)),
      common.batch(np.arange(8)),
    )
    self.assertTrue(np.isfinite(value))
    self.assertTrue(np.all(np.isfinite(grads['table'])))

  def test_remembers_nothing(self):
    method = simclr.simclr(inverse_temperature=5.0)
    self.assertEmpty(jax.tree.leaves(method.init(KEY, {})))
    pending = method.pending(
      KEY, NOTHING, {}, common.batch([0, 1]), common.embed_table
    )
    self.assertEqual(pending.shape, (0,))

  @parameterized.parameters(
    (dict(inverse_temperature=0.0), 'inverse_temperature'),
    (dict(inverse_temperature=-1.0), 'inverse_temperature'),
    (dict(inverse_temperature=np.inf), 'inverse_temperature'),
    (dict(inverse_temperature=np.nan), 'inverse_temperature'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      simclr.simclr(**settings)

  def test_refuses_a_batch_of_one(self):
    method = simclr.simclr(inverse_temperature=1.0)
    with self.assertRaisesRegex(ValueError, 'at least 2'):
      common.gradient(
        method,
        KEY,
        NOTHING,
        common.table(common.clusters(4)),
        common.batch([0]),
      )

  def test_implementation_is_handed_on(self):
    method = simclr.simclr(inverse_temperature=1.0, implementation='no such')
    with self.assertRaisesRegex(ValueError, 'no such'):
      common.gradient(
        method,
        KEY,
        NOTHING,
        common.table(common.clusters(4)),
        common.batch([0, 1]),
      )


class ShardedSimclrTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_eight_devices_equal_one(self, decoupled):
    params, batches = common.linear_problem(40, 16, 2)
    make = lambda axis_name: simclr.simclr(
      inverse_temperature=5.0, decoupled=decoupled, axis_name=axis_name
    )
    common.assert_sharded_equals_single(make, params, batches)

  def test_collectives(self):
    """Embeddings out and back, the gradient, the value and the numbers."""
    params, batches = common.linear_problem(40, 16, 1)
    method = simclr.simclr(inverse_temperature=5.0, axis_name='data')
    counts = common.count_collectives(method, params, batches[0])
    self.assertEqual(
      counts, {'all_gather': 1, 'reduce_scatter': 1, 'all_reduce': 3}
    )


class BatchTest(parameterized.TestCase):
  def test_views_may_be_any_two(self):
    views = common.clusters(10, 4)
    index, view = np.array([2, 5, 9]), np.array([[3, 0, 1], [1, 2, 0]])
    batch = estimator.Batch(jnp.int32(index), jnp.uint32(view))
    method = simclr.simclr(inverse_temperature=5.0)
    value, _ = common.forward(method, KEY, NOTHING, common.table(views), batch)
    rows = np.concatenate([views[index, view[0]], views[index, view[1]]])
    want = _numpy_losses(rows, 5.0, False)[0].mean()
    np.testing.assert_allclose(value, want, rtol=1e-5)
