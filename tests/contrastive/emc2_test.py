"""EMC² against a loop written from the paper, and its identities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.extend import random as extend_random

from emc2.contrastive import emc2, estimator, objective

from tests.contrastive import common

BETA = 5.0
KEY = jax.random.key(0)


def _uniform(words, size):
  """The draws of rows and columns 0..size, by JAX's own threefry."""
  column = np.arange(size)
  counter = 64 * (column // 128) + column % 64
  row, pair = np.broadcast_arrays(np.arange(size)[:, None], counter[None, :])
  count = np.concatenate([row.ravel(), pair.ravel()]).astype(np.uint32)
  bits = np.asarray(extend_random.threefry_2x32(words, jnp.asarray(count)))
  first, second = bits.reshape(2, size, size)
  bits = np.where(column % 128 < 64, first, second)
  return ((bits >> 8) + 1.0) / 2**24


def _walk_row(logits, uniform, own, start, first, own_steps):
  """One chain past all columns: counts, steps stayed, last state, its logit."""
  counts, stay, last, current, step = np.zeros(logits.size), 0, -1, start, 0
  for j in range(logits.size):
    if j in own and not own_steps:
      continue
    if j not in own and current < logits[j] - np.log(uniform[j]):
      last, current = j, logits[j]
    if step >= first:
      if last < 0:
        stay += 1
      else:
        counts[last] += 1
    step += 1
  return counts, stay, last, current


def _loop(key, rows, states, has, logit, burn_in, views, mode):
  """One visit: dJ/dF (2B, d), dJ/dG (c B, d), the last columns and scores.

  `views` is the number of fixed views or None; `mode` is 'exact', 'cached',
  'drop' or 'released'.
  """
  size = rows.shape[0]
  half, released = size // 2, mode == 'released'
  words = jax.random.bits(key, (2,), jnp.uint32)
  uniform, steps = _uniform(words, size), size - 2
  discard = math.floor(burn_in * steps)
  retained = steps - discard
  d_rows, d_states = np.zeros_like(rows), np.zeros_like(states)
  chains = len(has)
  last, score = np.full(chains, -1), np.array(logit)
  for a in range(size):
    i = a % chains
    logits = BETA * rows @ rows[a]
    inside = last[i] >= 0
    if inside and not released:
      start = logits[last[i]]
    elif mode in ('drop', 'released'):
      start = score[i]
    else:
      start = BETA * rows[a] @ states[i] if has[i] else -np.inf
    counts, stay, end, score[i] = _walk_row(
      logits,
      uniform[a],
      (a % half, a % half + half),
      start,
      discard + released,
      released and views is None,
    )
    weights, stay_weight, other = counts / retained, stay / retained, None
    if released and views is not None:
      other = size - 1
    elif inside:
      other = last[i]
    elif released:
      stay_weight = max(stay - discard, 0) / steps
    elif mode == 'drop':
      stay_weight = 0.0
    if other is not None:
      weights[other] += stay_weight
      stay_weight = 0.0
    scale = BETA / size
    d_rows[a] += scale * (weights @ rows + stay_weight * states[i])
    d_rows += scale * weights[:, None] * rows[a]
    d_rows[a] -= 2 * scale * rows[(a + half) % size]
    d_states[i] += scale * stay_weight * rows[a]
    last[i] = end if end >= 0 else last[i]
  return d_rows, d_states, last, score


def _embed(params, data, index, view):
  """Fixed views repeat for ever, so that any id has an embedding."""
  table = params['table']
  return table[index, (view % jnp.uint32(table.shape[1])).astype(jnp.int32)]


def _some_memory(method, num_samples, num_views, batch, seed):
  """Chains of which a third have no state, none at its own sample."""
  rng = np.random.default_rng(seed)
  memory = method.init(jax.random.key(0), None)
  shape = memory.index.shape
  index = (
    np.arange(num_samples)[:, None] + rng.integers(1, num_samples, shape)
  ) % num_samples
  index = np.where(rng.random(shape) < 0.3, -1, index)
  view = rng.integers(0, num_views or 7, shape)
  memory = memory._replace(index=jnp.int32(index), view=jnp.uint32(view))
  if memory.logit is not None:
    logit = np.where(index < 0, -np.inf, rng.uniform(-BETA, BETA, shape))
    memory = memory._replace(logit=jnp.float32(logit))
  if memory.embedding is not None:
    cached = common.normalize(rng.normal(size=memory.embedding.shape))
    memory = memory._replace(embedding=jnp.float32(cached))
  return memory


def _gradient(method, key, memory, params, batch):
  run = lambda *a: common.gradient(method, *a, _embed)
  return jax.jit(run)(key, memory, params, batch)


def _value(method, key, memory, params, batch):
  run = lambda *a: method.surrogate(*a, _embed)
  return jax.jit(run)(key, memory, params, batch)


class VisitTest(parameterized.TestCase):
  @parameterized.product(
    mode=['exact', 'cached', 'drop', 'released'], burn_in=[0.5]
  )
  def test_equals_a_loop(self, mode, burn_in):
    self._check_equals_a_loop(mode, burn_in)

  @parameterized.product(
    mode=['exact', 'cached', 'drop', 'released'], burn_in=[0.0]
  )
  @pytest.mark.slow
  def test_equals_a_loop_elsewhere(self, mode, burn_in):
    self._check_equals_a_loop(mode, burn_in)

  def _check_equals_a_loop(self, mode, burn_in):
    self._compare(2, mode, burn_in)

  @parameterized.product(
    num_views=[3, None],
    mode=['exact', 'cached', 'drop', 'released'],
    burn_in=[0.0, 0.5],
  )
  @pytest.mark.slow
  def test_equals_a_loop_for_other_views(self, num_views, mode, burn_in):
    self._compare(num_views, mode, burn_in)

  def _compare(self, num_views, mode, burn_in):
    num_samples, size, dim, seed = 9, 4, 6, 1
    num_stored = num_views or 3
    views = common.clusters(num_samples, num_stored, size=dim, seed=seed)
    params = common.table(views)
    views = np.asarray(params['table'], np.float64)
    method = emc2.emc2(
      num_samples,
      inverse_temperature=BETA,
      burn_in=burn_in,
      num_views=num_views,
      out_of_batch=mode if mode in ('cached', 'drop') else 'reencode',
      embedding_size=dim if mode == 'cached' else None,
      released=mode == 'released',
    )
    key = jax.random.key(seed)
    index = np.random.default_rng(seed).permutation(num_samples)[:size]
    view = estimator.draw_views(key, size, num_views)
    batch = estimator.Batch(jnp.int32(index), view)
    memory = _some_memory(method, num_samples, num_views, batch, seed)

    view = np.asarray(view)
    both = np.concatenate([index, index])
    rows = views[both, view.reshape(-1) % num_stored]
    slots = (index, np.zeros_like(index))
    if num_views is not None:
      slots = (both, view.reshape(-1).astype(int))
    state, state_view = (np.asarray(x)[slots] for x in memory[:2])
    plain = estimator.PLAIN_VIEW if mode == 'released' else state_view
    places = (state, plain % num_stored)
    states = views[places]
    if mode == 'cached':
      states = np.asarray(memory.embedding, np.float64)[slots]
    logit = np.zeros(len(state))
    if memory.logit is not None:
      logit = np.asarray(memory.logit, np.float64)[slots]
    d_rows, d_states, last, score = _loop(
      key, rows, states, state >= 0, logit, burn_in, num_views, mode
    )
    want = np.zeros_like(views)
    np.add.at(want, (both, view.reshape(-1) % num_stored), d_rows)
    if mode in ('exact', 'released'):
      np.add.at(want, places, d_states)

    (_, (after, _)), grads = _gradient(method, key, memory, params, batch)
    np.testing.assert_allclose(grads['table'], want, rtol=1e-4, atol=1e-5)
    want_index = np.array(memory.index)
    want_view = np.array(memory.view)
    moved = last >= 0
    want_index[slots] = np.where(moved, both[last], state)
    want_view[slots] = np.where(moved, view.reshape(-1)[last], state_view)
    np.testing.assert_array_equal(after.index, want_index)
    np.testing.assert_array_equal(after.view, want_view)
    if memory.logit is not None:
      want_logit = np.array(memory.logit)
      want_logit[slots] = score
      np.testing.assert_allclose(after.logit, want_logit, rtol=1e-5)
    if memory.embedding is not None:
      want_cache = np.array(memory.embedding)
      stored = np.where(moved[:, None], rows[last], want_cache[slots])
      want_cache[slots] = stored
      np.testing.assert_allclose(after.embedding, want_cache, rtol=1e-6)


class IdentityTest(parameterized.TestCase):
  """Numbers as in §5 of the specification of the method."""

  def test_07_weights_sum_to_one(self):
    # With all embeddings equal, the negatives' share of J is beta times the
    # sum of the weights of each row.
    params = {'table': jnp.ones((6, 2, 1))}
    method = emc2.emc2(6, inverse_temperature=BETA, burn_in=0.5, num_views=2)
    batch = common.batch([0, 2, 5])
    memory = _some_memory(method, 6, 2, batch, 0)
    value, _ = _value(method, jax.random.key(1), memory, params, batch)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)

  @parameterized.parameters(0.0, 0.5)
  @pytest.mark.slow
  def test_08_vanishing_beta_is_uniform(self, burn_in):
    beta, views = 1e-6, common.clusters(5, 2)
    method = emc2.emc2(
      5, inverse_temperature=beta, burn_in=burn_in, num_views=2
    )
    params, batch = common.table(views), common.batch([3, 0, 4])
    memory = _some_memory(method, 5, 2, batch, 0)
    (_, (_, info)), grads = _gradient(
      method, jax.random.key(0), memory, params, batch
    )
    self.assertEqual(info.stay, 0)
    self.assertEqual(info.acceptance_rate, 1)
    rows = np.concatenate([views[[3, 0, 4], 0], views[[3, 0, 4], 1]])
    retained = 4 - math.floor(4 * burn_in)
    want = np.zeros_like(rows)
    for a in range(6):
      candidates = [j for j in range(6) if j % 3 != a % 3][-retained:]
      want[a] += rows[candidates].mean(0) - 2 * rows[(a + 3) % 6]
      want[candidates] += rows[a] / retained
    got = np.concatenate([grads['table'][[3, 0, 4], v] for v in (0, 1)])
    np.testing.assert_allclose(got / beta, want / 6, rtol=1e-5, atol=1e-6)

  def test_08_huge_beta_is_the_running_maximum(self):
    views = common.clusters(5, 2)
    method = emc2.emc2(5, inverse_temperature=1e6, num_views=2)
    params, batch = common.table(views), common.batch([0, 1, 2, 3, 4])
    memory = method.init(KEY, None)
    _, (after, _) = _value(method, jax.random.key(0), memory, params, batch)
    flat = views.transpose(1, 0, 2).reshape(10, -1)
    logits = flat @ flat.T
    for a in range(10):
      logits[a, [a % 5, a % 5 + 5]] = -np.inf
    best = logits.argmax(1)
    got = np.asarray(after.index).T.reshape(-1)
    np.testing.assert_array_equal(got, best % 5)
    got = np.asarray(after.view).T.reshape(-1)
    np.testing.assert_array_equal(got, best // 5)

  @parameterized.parameters((False, 1e-5), (True, 1e-10))
  @pytest.mark.slow
  def test_09_softmax_weights_give_the_exact_gradient(self, double, tolerance):
    with jax.enable_x64(double):
      views = common.clusters(7, 2)
      params = {'table': jnp.asarray(views, float)}
      method = emc2.emc2(
        7, inverse_temperature=BETA, num_views=2, proposals='resample'
      )
      memory = method.init(KEY, None)
      (value, _), grads = _gradient(
        method, jax.random.key(0), memory, params, common.batch(range(7))
      )
      loss = objective.global_loss(params['table'], inverse_temperature=BETA)
      want = common.numpy_global_gradient(views, BETA)
      self.assertLess(common.relative_error(grads['table'], want), tolerance)
      self.assertLess(common.relative_error(value, loss), tolerance)

  @parameterized.parameters(
    (None, None, 8), (2, None, 16), (None, 'drop', 12), (2, 'drop', 24)
  )
  def test_14_bytes_a_sample(self, num_views, out_of_batch, want):
    method = emc2.emc2(
      1000,
      inverse_temperature=BETA,
      num_views=num_views,
      out_of_batch=out_of_batch or 'reencode',
    )
    memory = jax.eval_shape(lambda: method.init(KEY, None))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
    self.assertEqual(size, 1000 * want)

  @parameterized.product(
    num_views=[2, None], proposals=['batch', 'uniform', 'resample']
  )
  @pytest.mark.slow
  def test_15_first_visit_sets_a_state(self, num_views, proposals):
    method = emc2.emc2(
      8, inverse_temperature=50.0, num_views=num_views, proposals=proposals
    )
    params = common.table(common.clusters(8, 2))
    batch = common.batch([1, 3, 6])
    _, (after, info) = _value(
      method, jax.random.key(0), method.init(KEY, None), params, batch
    )
    index = np.asarray(after.index)
    self.assertTrue(np.all(index[[1, 3, 6]] >= 0))
    self.assertTrue(np.all(index[[0, 2, 4, 5, 7]] < 0))
    self.assertTrue(np.all(index[[1, 3, 6]] != np.array([[1], [3], [6]])))
    self.assertEqual(info.stay, 0)


class CapacityTest(parameterized.TestCase):
  def _run(self, capacity, num_views, sign=1):
    beta = 20.0
    method = emc2.emc2(
      9,
      inverse_temperature=beta,
      burn_in=0.5,
      num_views=num_views,
      capacity=capacity,
    )
    views = common.clusters(9, 2, num_clusters=3)
    params, batch = common.table(views), common.batch([0, 2, 4, 7])
    memory = method.init(KEY, None)
    # Every chain stands at its sample's nearest, where it is likely to last.
    nearness = views[:, 0] @ views[:, 0].T - 2 * np.eye(9)
    nearest = np.int32(nearness.argmax(1))
    index = jnp.zeros_like(memory.index) + nearest[:, None]
    memory = memory._replace(index=index)
    if memory.logit is not None:
      anchors = views[:, : memory.logit.shape[1]]
      logit = np.einsum('ivd,id->iv', anchors, views[nearest, 0])
      memory = memory._replace(logit=jnp.float32(sign * beta * logit))
    return _gradient(method, jax.random.key(2), memory, params, batch)

  @parameterized.parameters((2, 8), (None, 4))
  @pytest.mark.slow
  def test_enough_room_changes_nothing(self, num_views, chains):
    (_, (want, want_info)), want_grads = self._run(None, num_views)
    (_, (after, info)), grads = self._run(chains - 1, num_views)
    self.assertGreater(want_info.stay, 0)
    self.assertEqual(info.overflow, 0)
    np.testing.assert_array_equal(after.index, want.index)
    np.testing.assert_allclose(
      grads['table'], want_grads['table'], rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(2, None)
  @pytest.mark.slow
  def test_overflow_is_counted(self, num_views):
    (_, (want, _)), want_grads = self._run(None, num_views)
    (_, (after, info)), grads = self._run(1, num_views)
    self.assertGreater(info.overflow, 0)
    # The chain goes on as it would, but its old state has lost its weight.
    np.testing.assert_array_equal(after.index, want.index)
    self.assertGreater(
      common.relative_error(grads['table'], want_grads['table']), 0.01
    )

  @pytest.mark.slow
  def test_old_scores_decide_who_finds_room(self):
    (_, (_, right)), _ = self._run(3, 2)
    (_, (_, wrong)), _ = self._run(3, 2, sign=-5)
    self.assertNotEqual(right.stay, wrong.stay)


class PendingTest(parameterized.TestCase):
  @parameterized.product(
    num_views=[2], proposals=['batch', 'uniform', 'resample']
  )
  def test_names_all_that_is_embedded(self, num_views, proposals):
    self._check_names_all_that_is_embedded(num_views, proposals)

  @parameterized.product(
    num_views=[None], proposals=['batch', 'uniform', 'resample']
  )
  @pytest.mark.slow
  def test_names_all_that_is_embedded_elsewhere(self, num_views, proposals):
    self._check_names_all_that_is_embedded(num_views, proposals)

  def _check_names_all_that_is_embedded(self, num_views, proposals):
    method = emc2.emc2(
      9, inverse_temperature=BETA, num_views=num_views, proposals=proposals
    )
    params = common.table(common.clusters(9, 2))
    batch = common.batch([0, 2, 4])
    memory = _some_memory(method, 9, num_views, batch, 0)

    @jax.jit
    def run(memory, params, batch):
      embedded = []

      def embed_fn(params, data, index, view):
        embedded.append(index)
        return _embed(params, data, index, view)

      method.surrogate(KEY, memory, params, batch, embed_fn)
      named = method.pending(KEY, memory, params, batch, embed_fn)
      return named, embedded

    named, embedded = run(memory, params, batch)
    self.assertNotEmpty(embedded)
    named = set(np.asarray(named).tolist()) | {0, 2, 4}
    asked = set(np.concatenate([np.asarray(x) for x in embedded]).tolist())
    self.assertLessEqual(asked, named)
    self.assertLessEqual(named, set(range(9)))

  def test_samples_stand_together(self):
    method = emc2.emc2(9, inverse_temperature=BETA, num_views=2)
    batch = common.batch([5, 1])
    memory = method.init(KEY, None)
    index = memory.index.at[5].set(jnp.array([3, 4])).at[1, 1].set(8)
    memory = memory._replace(index=index)
    named = method.pending(KEY, memory, None, batch, _embed)
    np.testing.assert_array_equal(named, [3, 4, 1, 8])

  def test_nothing_without_reencoding(self):
    method = emc2.emc2(9, inverse_temperature=1.0, out_of_batch='drop')
    named = method.pending(
      KEY, method.init(KEY, None), None, common.batch([0, 1]), _embed
    )
    self.assertEqual(named.shape, (0,))


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'num_samples': 1}, 'num_samples must be at least 2, got 1'),
    ({'inverse_temperature': 0.0}, 'inverse_temperature must be .* got 0'),
    ({'inverse_temperature': math.inf}, 'must be finite .* got inf'),
    ({'inverse_temperature': math.nan}, 'must be finite .* got nan'),
    ({'burn_in': 1.0}, r'burn_in must lie in \[0, 1\), got 1'),
    ({'burn_in': -0.1}, 'burn_in must lie in .* got -0.1'),
    ({'burn_in': math.nan}, 'burn_in must lie in .* got nan'),
    ({'num_views': 1}, 'num_views must be None or at least 2, got 1'),
    ({'out_of_batch': 'no'}, "out_of_batch must be one of .* got 'no'"),
    ({'proposals': 'no'}, "proposals must be one of .* got 'no'"),
    ({'out_of_batch': 'cached'}, 'embedding_size goes with'),
    ({'embedding_size': 3}, 'embedding_size goes with'),
    ({'capacity': 0}, 'capacity must be None or at least 1, got 0'),
    ({'capacity': 2, 'out_of_batch': 'drop'}, 'capacity goes with'),
    ({'capacity': 2, 'released': True}, 'capacity goes with'),
    ({'proposals': 'uniform', 'released': True}, "proposals='uniform' goes"),
    ({'proposals': 'resample', 'burn_in': 0.5}, 'burn_in must be 0'),
    ({'out_of_batch': 'drop', 'released': True}, 'released goes with'),
  )
  def test_refuses(self, given, message):
    arguments = {'num_samples': 10, 'inverse_temperature': 1.0} | given
    with self.assertRaisesRegex(ValueError, message):
      emc2.emc2(**arguments)
