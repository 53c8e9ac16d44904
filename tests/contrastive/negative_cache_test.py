"""The negative cache: its law, its gradient and what it keeps, in NumPy.

The encoders take the plain view from the last of the views that they hold.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from emc2 import mesh as mesh_lib
from emc2.contrastive import estimator, negative_cache

from tests.contrastive import common

KEY = jax.random.key(0)
BETA = 5.0


def _cache(num_samples, **changes):
  settings = dict(embedding_size=16, inverse_temperature=BETA)
  return negative_cache.negative_cache(num_samples, **{**settings, **changes})


def _warm(method, params, num_samples, num_views=None):
  warm = functools.partial(
    negative_cache.warm_cache,
    data=(),
    embed_fn=common.embed_table,
    num_samples=num_samples,
    num_views=num_views,
  )
  index = jnp.arange(num_samples, dtype=jnp.int32)
  memory = jax.jit(method.init)(KEY, params)
  return jax.jit(warm)(memory, params, index=index)


def _cached_rows(views, num_views=None):
  """Rows of a fresh full cache and their samples."""
  rows = views[:, -1:] if num_views is None else views[:, :num_views]
  owner = np.repeat(np.arange(len(views)), rows.shape[1])
  return rows.reshape(-1, views.shape[-1]), owner


def _numpy_gradient(views, index, num_views=None):
  """Of the cross entropy over a fresh cache, anchors on view 0.

  Cached rows are views of the same encoder, so gradients flow into them too.
  """
  gradient, losses = np.zeros_like(views), []
  positive = -1 if num_views is None else 1
  rows, owner = _cached_rows(views, num_views)
  kept = [-1] if num_views is None else list(range(num_views))
  for i in index:
    anchor, target = views[i, 0], views[i, positive]
    others = owner != i
    logits = np.append(BETA * rows[others] @ anchor, BETA * target @ anchor)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    losses.append(-np.log(p[-1]))
    scale = BETA / len(index)
    gradient[i, 0] += scale * (p[:-1] @ rows[others] + (p[-1] - 1) * target)
    gradient[i, positive] += scale * (p[-1] - 1) * anchor
    for z, share in zip(np.flatnonzero(others), p[:-1], strict=True):
      view = kept[z % len(kept)]
      gradient[owner[z], view] += scale * share * anchor
  return gradient, losses


class DrawTest(parameterized.TestCase):
  @parameterized.product(num_negatives=[1, 3], num_views=[None, 2])
  @pytest.mark.slow
  def test_unbiased_when_fresh(self, num_negatives, num_views):
    """Identity 9; for several negatives it needs the weights of Des Raj."""
    views = common.clusters(6, 3, size=4, num_clusters=3)
    method = _cache(
      6, embedding_size=4, num_negatives=num_negatives, num_views=num_views
    )
    params, one = common.table(views), common.batch([0, 3])
    memory = _warm(method, params, 6, num_views)
    grad_fn = jax.grad(method.surrogate, argnums=2, has_aux=True)

    @jax.jit
    def gradients(keys):
      draw = lambda key: grad_fn(key, memory, params, one, common.embed_table)
      return jax.vmap(draw)(keys)

    grads, (_, info) = gradients(jax.random.split(KEY, 20_000))
    want, losses = _numpy_gradient(views, [0, 3], num_views)
    grads = np.asarray(grads['table'], np.float64)
    mean, error = grads.mean(axis=0), grads.std(axis=0) / np.sqrt(20_000)
    self.assertLess(np.max(np.abs(mean - want) - 5 * error), 1e-5)
    self.assertLess(common.relative_error(mean, want), 0.02)
    np.testing.assert_allclose(info.loss[0], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(
      info.positive[0], np.mean(np.exp(-np.array(losses))), rtol=1e-4
    )

  @parameterized.parameters(None, 7)
  @pytest.mark.slow
  def test_law_of_two_stages(self, top_k):
    """Identity 10: chi-squared of 1e5 draws over many blocks."""
    views = common.clusters(40, 3)
    method = _cache(40, top_k=top_k)
    params, one = common.table(views), common.batch([5, 9])
    memory = _warm(method, params, 40)

    @jax.jit
    def draw(keys):
      pending = lambda key: method.pending(
        key, memory, params, one, common.embed_table
      )
      return jax.vmap(pending)(keys)

    drawn = draw(jax.random.split(KEY, 100_000))
    for column, anchor in enumerate((5, 9)):
      p = np.exp(BETA * views[:, -1] @ views[anchor, 0])
      p[anchor] = 0
      if top_k is not None:
        p[np.argsort(-p)[top_k:]] = 0
      counts = np.bincount(drawn[:, column], minlength=40)
      self.assertEqual(counts[p == 0].sum(), 0)
      expected = p / p.sum() * len(drawn)
      test = stats.chisquare(counts[p > 0], expected[p > 0])
      self.assertGreater(test.pvalue, 1e-3)

  def test_without_replacement(self):
    views = common.clusters(8, 3)
    method = _cache(8, num_negatives=7)
    params, one = common.table(views), common.batch([2, 4])
    memory = _warm(method, params, 8)
    drawn = common.pending(method, KEY, memory, params, one)
    for row, own in zip(drawn[:14].reshape(2, 7), (2, 4), strict=True):
      self.assertSequenceEqual(
        sorted(row.tolist()), [i for i in range(8) if i != own]
      )

  @pytest.mark.slow
  def test_more_negatives_have_less_variance(self):
    views = common.clusters(12, 3, size=4)
    params, one = common.table(views), common.batch([1, 7])
    variance = []
    for num_negatives in (1, 4):
      method = _cache(12, embedding_size=4, num_negatives=num_negatives)
      memory = _warm(method, params, 12)
      grad_fn = jax.grad(method.surrogate, argnums=2, has_aux=True)
      draw = lambda key, f=grad_fn, memory=memory: f(
        key, memory, params, one, common.embed_table
      )[0]['table']
      grads = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 300))
      variance.append(np.asarray(grads).var(axis=0).sum())
    self.assertLess(variance[1], variance[0] / 3)

  @pytest.mark.slow
  def test_pending_names_all_that_is_embedded(self):
    """An encoder that knows only those samples gives the same."""
    views = common.clusters(30, 3)

    def embed(params, data, index, view):
      rows = common.embed_table(params, (), index, view)
      return jnp.where(data[index][:, None], rows, jnp.nan)

    params, index = common.table(views), np.array([3, 8, 20])
    for method, memory in (
      (_cache(30, num_negatives=2), None),
      (_cache(30, capacity=10), None),
    ):
      memory = method.init(KEY, params)
      for number in range(3):
        key = jax.random.key(number)
        index = (index + number) % 30
        everything = common.batch(index, data=jnp.ones(30, bool))
        named = common.pending(method, key, memory, params, everything, embed)
        known = np.zeros(30, bool)
        known[index] = known[np.asarray(named)] = True
        result = common.forward(
          method,
          key,
          memory,
          params,
          common.batch(index, data=jnp.asarray(known)),
          embed,
        )
        want = common.forward(method, key, memory, params, everything, embed)
        for w, g in zip(
          jax.tree.leaves(want), jax.tree.leaves(result), strict=True
        ):
          np.testing.assert_array_equal(g, w)
        memory = want[1][0]


class FullCacheTest(parameterized.TestCase):
  @parameterized.parameters(None, 2)
  @pytest.mark.slow
  def test_batch_is_written_and_the_stalest_refreshed(self, num_views):
    rng, views = np.random.default_rng(0), common.clusters(11, 3)
    per_sample = num_views or 1
    num_rows = 11 * per_sample
    method = _cache(11, num_views=num_views, refresh_fraction=0.2)
    num_refreshed = int(0.2 * num_rows)
    memory = method.init(KEY, None)
    self.assertTrue(np.all(memory.index == -1))
    stamps = np.array(memory.written[:num_rows])
    self.assertSetEqual(set(stamps.tolist()), set(range(-num_rows, 0)))
    self.assertFalse(np.all(np.diff(stamps) > 0))
    cached = np.zeros((num_rows, 16))
    filled = np.zeros(num_rows, bool)
    for step in range(9):
      views = common.normalize(views + 0.3 * rng.normal(size=views.shape))
      index = rng.permutation(11)[:3]
      fresh = views[:, -1:] if num_views is None else views[:, :2]
      fresh = fresh.reshape(num_rows, 16)
      for i in index:
        slots = slice(i * per_sample, (i + 1) * per_sample)
        cached[slots], filled[slots], stamps[slots] = fresh[slots], True, step
      stale = np.argsort(stamps, kind='stable')[:num_refreshed]
      moved = np.sum((cached[stale] - fresh[stale]) ** 2, axis=1)
      staleness = np.mean(np.where(filled[stale], moved, 0))
      cached[stale], filled[stale], stamps[stale] = fresh[stale], True, step
      _, (memory, info) = common.forward(
        method,
        jax.random.key(step),
        memory,
        common.table(views),
        common.batch(index),
      )
      np.testing.assert_allclose(
        memory.embedding[:num_rows], cached, rtol=1e-5, atol=1e-6
      )
      np.testing.assert_array_equal(memory.written[:num_rows], stamps)
      np.testing.assert_array_equal(memory.index[:num_rows] >= 0, filled)
      np.testing.assert_allclose(
        info.staleness, staleness, rtol=1e-4, atol=1e-6
      )
      self.assertTrue(np.all(memory.index[num_rows:] == -1))
    self.assertEqual(memory.count, 9)

  @pytest.mark.slow
  def test_second_view_may_be_the_positive(self):
    views = common.clusters(6, 3)
    params = common.table(views)
    values = {}
    for positive in ('plain', 'second'):
      method = _cache(6, positive=positive, refresh_fraction=0.01)
      (values[positive], (memory, info)), _ = common.gradient(
        method, KEY, _warm(method, params, 6), params, common.batch([1, 4])
      )
      view = -1 if positive == 'plain' else 1
      np.testing.assert_allclose(
        memory.embedding[4], views[4, view], rtol=1e-5, atol=1e-6
      )
      losses = []
      rows = views[:, -1].copy()
      rows[[1, 4]] = views[[1, 4], view]
      for i in (1, 4):
        logits = BETA * np.delete(rows, i, axis=0) @ views[i, 0]
        s = BETA * views[i, view] @ views[i, 0]
        losses.append(np.logaddexp(s, np.log(np.sum(np.exp(logits)))) - s)
      np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-4)

  def test_rows_keep_the_view_that_they_hold(self):
    """A refreshed row is embedded by the view that was written."""
    views = common.clusters(6, 4)
    params = common.table(views)
    method = _cache(6, positive='second', refresh_fraction=1.0)
    memory = _warm(method, params, 6)
    batch = estimator.Batch(
      jnp.array([1, 4], jnp.int32), jnp.array([[0, 0], [2, 1]], jnp.uint32)
    )
    _, (memory, _) = common.forward(method, KEY, memory, params, batch)
    _, (memory, _) = common.forward(
      method, KEY, memory, params, common.batch([0, 2])
    )
    np.testing.assert_allclose(
      memory.embedding[jnp.array([1, 4])],
      views[[1, 4], [2, 1]],
      rtol=1e-5,
      atol=1e-6,
    )

  @pytest.mark.slow
  def test_warm_by_chunks(self):
    views = common.clusters(11, 3)
    params, method = common.table(views), _cache(11, num_views=3)
    start = memory = method.init(KEY, params)
    for chunk in np.array_split(np.arange(11, dtype=np.int32), 3):
      memory = negative_cache.warm_cache(
        memory,
        params,
        (),
        common.embed_table,
        jnp.asarray(chunk),
        num_samples=11,
        num_views=3,
      )
    np.testing.assert_allclose(
      memory.embedding[:33], views.reshape(33, 16), rtol=1e-6
    )
    np.testing.assert_array_equal(
      memory.index[:33], np.repeat(np.arange(11), 3)
    )
    np.testing.assert_array_equal(memory.view[:33], np.tile(np.arange(3), 11))
    np.testing.assert_array_equal(memory.written, start.written)

  def test_age_of_what_was_drawn(self):
    views = common.clusters(2, 3)
    params = common.table(views)
    method = _cache(2, refresh_fraction=0.5)
    memory = _warm(method, params, 2)._replace(
      count=jnp.int32(9), written=jnp.array([4, 7], jnp.int32)
    )
    # Sample 0 is the batch, so sample 1 is all that can be drawn.
    _, (_, info) = common.forward(
      method, KEY, memory, params, common.batch([0])
    )
    self.assertEqual(info.age, 2)

  @parameterized.parameters((jnp.float32, 4), (jnp.bfloat16, 2))
  def test_memory(self, dtype, itemsize):
    """Identity 16: 4 m d bytes; half of it as bfloat16."""
    method = _cache(10_000, embedding_size=512, dtype=dtype)
    memory = jax.eval_shape(method.init, KEY, {})
    rows = memory.embedding
    self.assertEqual(rows.dtype, dtype)
    size = rows.size * rows.dtype.itemsize
    np.testing.assert_allclose(size, itemsize * 10_000 * 512, rtol=0.01)

  @pytest.mark.slow
  def test_bfloat16_cache_draws_alike(self):
    views = common.clusters(20, 3)
    params, losses = common.table(views), []
    for dtype in (jnp.float32, jnp.bfloat16):
      method = _cache(20, dtype=dtype)
      _, (_, info) = common.forward(
        method, KEY, _warm(method, params, 20), params, common.batch([1, 4])
      )
      losses.append(info.loss)
    np.testing.assert_allclose(*losses, rtol=0.02)

  def test_not_a_number_stays_out_of_the_cache(self):
    """Pitfall 15."""
    views = common.clusters(8, 3)
    method = _cache(8, refresh_fraction=1.0)
    params = common.table(views)
    memory = _warm(method, params, 8)
    broken = {'table': params['table'].at[1].set(jnp.nan)}
    value, (after, info) = common.forward(
      method, KEY, memory, broken, common.batch([0, 1, 2])
    )
    self.assertFalse(np.isfinite(value))
    self.assertFalse(np.isfinite(info.loss))
    np.testing.assert_array_equal(after.embedding, memory.embedding)


class BoundedCacheTest(parameterized.TestCase):
  def test_drawn_rows_stay_and_the_oldest_go(self):
    rng, views = np.random.default_rng(0), common.clusters(20, 3)
    method = _cache(20, capacity=7)
    memory = method.init(KEY, None)
    owner, stamps = np.full(7, -1), np.full(7, -1)
    cached = np.zeros((7, 16))
    for step in range(12):
      views = common.normalize(views + 0.1 * rng.normal(size=views.shape))
      params = common.table(views)
      free = np.setdiff1d(np.arange(20), owner)
      one = common.batch(rng.permutation(free)[:3])
      key = jax.random.key(step)
      drawn = common.pending(method, key, memory, params, one)
      _, (memory, info) = common.forward(method, key, memory, params, one)
      for i in np.asarray(drawn) if step else ():
        (slot,) = np.flatnonzero(owner == i)
        stamps[slot], cached[slot] = step, views[i, -1]
      # Ties go by the slot.
      slots = np.argsort(stamps, kind='stable')[:3]
      owner[slots], stamps[slots] = one.index, step
      cached[slots] = views[owner[slots], -1]
      np.testing.assert_array_equal(memory.index[:7], owner)
      np.testing.assert_array_equal(memory.written[:7], stamps)
      np.testing.assert_allclose(
        memory.embedding[:7], cached, rtol=1e-5, atol=1e-6
      )
      self.assertTrue(np.all(memory.index[7:] == -1))
      if step > 1:
        self.assertGreater(info.staleness, 0)

  def test_empty_cache_teaches_nothing(self):
    params = common.table(common.clusters(8, 3))
    method = _cache(8, capacity=4, num_negatives=2)
    (value, (memory, info)), grads = common.gradient(
      method, KEY, method.init(KEY, None), params, common.batch([5, 2])
    )
    self.assertEqual(value, 0)
    self.assertEqual(info.loss, 0)
    self.assertTrue(np.all(grads['table'] == 0))
    np.testing.assert_array_equal(memory.index[:4], [5, 2, -1, -1])

  @pytest.mark.slow
  def test_cache_of_one_sample_more_than_can_be_drawn(self):
    """Two draws where one row is left: the second has no weight."""
    views = common.clusters(8, 3)
    params = common.table(views)
    method = _cache(8, capacity=4, num_negatives=2)
    memory = method.init(KEY, None)
    _, (memory, _) = common.forward(
      method, KEY, memory, params, common.batch([5])
    )
    (value, (memory, info)), grads = common.gradient(
      method, KEY, memory, params, common.batch([2])
    )
    s, s_positive = BETA * views[[5, 2], -1] @ views[2, 0]
    rest = 1 / (1 + np.exp(s_positive - s))
    np.testing.assert_allclose(info.positive, 1 - rest, rtol=1e-5)
    np.testing.assert_allclose(value, rest * (s - s_positive), rtol=1e-4)
    self.assertTrue(np.all(np.isfinite(grads['table'])))
    np.testing.assert_array_equal(memory.index[:4], [5, 2, -1, -1])


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(num_samples=1), 'num_samples'),
    (dict(embedding_size=0), 'embedding_size'),
    (dict(inverse_temperature=0.0), 'inverse_temperature'),
    (dict(inverse_temperature=np.inf), 'inverse_temperature'),
    (dict(capacity=0), 'capacity'),
    (dict(capacity=9), 'capacity'),
    (dict(capacity=4, num_views=2), 'num_views'),
    (dict(capacity=4, refresh_fraction=0.1), 'refresh_fraction'),
    (dict(num_views=1), 'num_views'),
    (dict(num_views=2, positive='plain'), 'positive'),
    (dict(positive='third'), 'positive'),
    (dict(num_negatives=0), 'num_negatives'),
    (dict(num_negatives=9), 'num_negatives'),
    (dict(num_negatives=3, top_k=2), 'num_negatives'),
    (dict(refresh_fraction=0.0), 'refresh_fraction'),
    (dict(refresh_fraction=1.1), 'refresh_fraction'),
    (dict(refresh_fraction=np.nan), 'refresh_fraction'),
    (dict(top_k=0), 'top_k'),
    (dict(top_k=9), 'top_k'),
    (dict(num_shards=0), 'num_shards'),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      _cache(**{'num_samples': 8, **changes})

  def test_refuses_a_batch_larger_than_the_cache(self):
    method, params = _cache(8, capacity=2), common.table(common.clusters(8, 3))
    with self.assertRaisesRegex(ValueError, 'batch of 3'):
      common.forward(
        method, KEY, method.init(KEY, None), params, common.batch([0, 1, 2])
      )

  def test_refuses_to_warm_a_bounded_cache(self):
    method, params = _cache(8, capacity=2), common.table(common.clusters(8, 3))
    with self.assertRaisesRegex(ValueError, 'all 8 rows'):
      _warm(method, params, 8)

  def test_refuses_a_mesh_that_does_not_fit(self):
    method = _cache(8, num_shards=4, axis_name='data')
    with self.assertRaisesRegex(ValueError, 'num_shards'):
      method.shardings(mesh_lib.make(data=8))


class ShardedCacheTest(parameterized.TestCase):
  @parameterized.parameters(
    [dict(num_views=2, num_negatives=3, refresh_fraction=0.2)]
  )
  def test_eight_devices_equal_one(self, **changes):
    self.check_devices(**changes)

  @parameterized.parameters(
    dict(),
    dict(top_k=5, positive='second'),
    dict(capacity=30),
    dict(capacity=30, num_negatives=2, top_k=9),
  )
  @pytest.mark.slow
  def test_eight_devices_equal_one_of_others(self, **changes):
    self.check_devices(**changes)

  def check_devices(self, **changes):
    """Caches and gradients."""
    params, batches = common.linear_problem(40, 16, 4, num_views=2)
    make = lambda axis_name: _cache(
      40, embedding_size=8, num_shards=8, axis_name=axis_name, **changes
    )
    common.assert_sharded_equals_single(make, params, batches)

  def test_each_device_holds_its_part(self):
    mesh = mesh_lib.make(data=8)
    method = _cache(40, num_shards=8, axis_name='data')
    memory = mesh_lib.place(
      method.init(KEY, None), mesh, method.shardings(mesh)
    )
    part = memory.embedding.addressable_shards[0].data
    self.assertEqual(part.shape[0] * 8, memory.embedding.shape[0])

  def test_warm_in_parts(self):
    mesh = mesh_lib.make(data=8)
    views = common.clusters(40, 3)
    params = common.table(views)
    method = _cache(40, num_shards=8, axis_name='data')
    specs = method.shardings(mesh)
    spec = jax.sharding.PartitionSpec

    def warm(memory, index):
      return negative_cache.warm_cache(
        memory,
        params,
        (),
        common.embed_table,
        index,
        num_samples=40,
        axis_name='data',
      )

    warm = jax.shard_map(
      warm,
      mesh=mesh,
      in_specs=(specs, spec('data')),
      out_specs=specs,
      check_vma=False,
    )
    memory = mesh_lib.place(method.init(KEY, None), mesh, specs)
    memory = jax.jit(warm)(memory, jnp.arange(40, dtype=jnp.int32))
    np.testing.assert_allclose(memory.embedding[:40], views[:, -1], rtol=1e-6)
    np.testing.assert_array_equal(memory.index[:40], np.arange(40))

  def test_collectives(self):
    """No message grows with the cache."""
    params, batches = common.linear_problem(40, 16, 1)
    sizes = {}
    for num_samples in (40, 4_000):
      method = _cache(
        num_samples,
        embedding_size=8,
        num_shards=8,
        axis_name='data',
        refresh_fraction=8 / num_samples,
      )
      sizes[num_samples] = common.count_collectives(method, params, batches[0])
    self.assertEqual(sizes[40], sizes[4_000])
    self.assertEqual(sizes[40], {'all_gather': 9, 'all_reduce': 8})
