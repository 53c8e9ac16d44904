"""MoCo against a loop in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.contrastive import moco

from tests.contrastive import common

KEY = jax.random.key(0)


def _moco(**changes):
  settings = dict(
    num_keys=12, embedding_size=16, inverse_temperature=5.0, momentum=0.8
  )
  return moco.moco(**{**settings, **changes})


class MocoTest(parameterized.TestCase):
  @parameterized.parameters({}, dict(momentum=0.0), dict(num_keys=5))
  def test_is_the_algorithm(self, **changes):
    method = _moco(**changes)
    momentum, beta = changes.get('momentum', 0.8), 5.0
    rng, views = np.random.default_rng(0), common.clusters(20)
    params = common.table(views)
    memory = method.init(KEY, params)
    queue = np.float64(memory.queue)
    slow, place = np.float64(params['table']), 0
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-5)
    for _ in range(4):
      views = common.normalize(views + 0.1 * rng.normal(size=views.shape))
      index, params = rng.permutation(20)[:5], common.table(views)
      (value, (memory, info)), grads = common.gradient(
        method, KEY, memory, params, common.batch(index)
      )
      slow = momentum * slow + (1 - momentum) * views
      losses, first, want = [], [], np.zeros_like(views)
      for i in index:
        q, k = views[i, 0], slow[i, 1]
        candidates = np.concatenate([k[None], queue])
        logits = beta * candidates @ q
        p = np.exp(logits) / np.exp(logits).sum()
        losses.append(-np.log(p[0]))
        first.append(np.argmax(logits) == 0)
        want[i, 0] = beta / 5 * (p @ candidates - k)
      for i in index:
        queue[place] = slow[i, 1]
        place = (place + 1) % len(queue)
      np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
      np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-5)
      np.testing.assert_allclose(info.accuracy, np.mean(first), rtol=1e-6)
      np.testing.assert_allclose(
        info.positive, np.mean(np.exp(-np.array(losses))), rtol=1e-5
      )
      self.assertLess(common.relative_error(grads['table'], want), 1e-5)
      np.testing.assert_allclose(memory.queue, queue, rtol=1e-5, atol=1e-6)
      self.assertEqual(memory.position, place)

  def test_slow_encoder_closes_the_gap_by_a_power(self):
    """Identity 14."""
    method, rng = _moco(momentum=0.9), np.random.default_rng(0)
    views = common.clusters(8)
    fast = common.table(views)
    start = common.table(views + rng.normal(size=views.shape))
    memory = method.init(KEY, start)
    for _ in range(5):
      _, (memory, _) = common.forward(
        method, KEY, memory, fast, common.batch([0, 1, 2])
      )
    gap = lambda params: np.float64(params['table']) - np.float64(fast['table'])
    np.testing.assert_allclose(
      gap(memory.key_params), 0.9**5 * gap(start), rtol=1e-4, atol=1e-6
    )

  def test_leaves_that_are_no_numbers_are_copied(self):
    views = common.clusters(8)
    params = {**common.table(views), 'steps': jnp.int32(3)}
    method = _moco()
    memory = method.init(KEY, params)
    params = {**params, 'steps': jnp.int32(7)}
    _, (memory, _) = common.forward(
      method, KEY, memory, params, common.batch([0, 1])
    )
    self.assertEqual(memory.key_params['steps'], 7)

  def test_memory(self):
    """Identity 16: 4 K d bytes and one more encoder."""
    params = common.table(common.clusters(8))
    memory = jax.eval_shape(_moco(num_keys=100).init, KEY, params)
    self.assertEqual(memory.queue.size * 4, 4 * 100 * 16)
    self.assertEqual(memory.key_params['table'].shape, params['table'].shape)

  def test_not_a_number_stays_out_of_the_queue(self):
    """Pitfall 15."""
    method = _moco(momentum=0.0)
    params = common.table(common.clusters(8))
    memory = method.init(KEY, params)
    broken = {'table': params['table'].at[1].set(jnp.nan)}
    value, (after, _) = common.forward(
      method, KEY, memory, broken, common.batch([0, 1, 2])
    )
    self.assertFalse(np.isfinite(value))
    self.assertTrue(np.all(np.isfinite(after.queue)))
    np.testing.assert_array_equal(after.queue[1], memory.queue[1])
    np.testing.assert_allclose(after.queue[2], params['table'][2, 1], rtol=1e-6)

  @parameterized.parameters(
    (dict(num_keys=0), 'num_keys'),
    (dict(embedding_size=0), 'embedding_size'),
    (dict(inverse_temperature=0.0), 'inverse_temperature'),
    (dict(inverse_temperature=np.inf), 'inverse_temperature'),
    (dict(momentum=1.0), 'momentum'),
    (dict(momentum=-0.1), 'momentum'),
    (dict(momentum=np.nan), 'momentum'),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      _moco(**changes)

  def test_refuses_a_batch_larger_than_the_queue(self):
    method, params = _moco(num_keys=3), common.table(common.clusters(8))
    with self.assertRaisesRegex(ValueError, 'a batch of 4'):
      common.forward(
        method,
        KEY,
        method.init(KEY, params),
        params,
        common.batch([0, 1, 2, 3]),
      )


class ShardedMocoTest(parameterized.TestCase):
  def test_eight_devices_equal_one(self):
    params, batches = common.linear_problem(64, 16, 4)
    # A sample that comes again finds its own key in the queue, and rounding
    # alone says whether that one beats the positive.
    batches = [
      one._replace(index=16 * i + jnp.arange(16, dtype=jnp.int32))
      for i, one in enumerate(batches)
    ]
    make = lambda axis_name: _moco(
      num_keys=40, embedding_size=8, axis_name=axis_name
    )
    common.assert_sharded_equals_single(make, params, batches)

  def test_collectives(self):
    """The keys go out; their gradient does not come back."""
    params, batches = common.linear_problem(40, 16, 1)
    method = _moco(num_keys=40, embedding_size=8, axis_name='data')
    counts = common.count_collectives(method, params, batches[0])
    self.assertEqual(counts, {'all_gather': 1, 'all_reduce': 3})
