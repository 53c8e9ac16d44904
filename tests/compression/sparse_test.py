"""Sparse codes keep the entries that they say, each as often as the next."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.compression import sparse


def _sets(code, size, num, seed=0):
  """Which entries (num, size) are kept under many keys."""
  ones = jnp.ones(size)
  like = jax.ShapeDtypeStruct.like(ones)

  def one(key):
    state = code.init((size,), ones.dtype, key)
    payload, state = code.compress(state, ones, key)
    return code.decompress(state, payload, like)

  keys = jax.random.split(jax.random.key(seed), num)
  return np.asarray(jax.jit(jax.vmap(one))(keys)) > 0


@functools.cache
def _program(code):
  def run(x, key):
    payload, state = code.compress((), x, key)
    return code.decompress(state, payload, jax.ShapeDtypeStruct.like(x))

  return jax.jit(run)


def _ends_in(code, x):
  """What an array is after it has been sent."""
  return _program(code)(jnp.asarray(x), jax.random.key(0))


class TopKTest(parameterized.TestCase):
  def test_largest_and_what_is_lost(self):
    with jax.enable_x64(True):
      x = np.random.default_rng(0).normal(size=(7, 11))
      found = np.asarray(_ends_in(sparse.top_k(9), x))
      order = np.argsort(-np.abs(x), axis=None, kind='stable')[:9]
      want = np.zeros(77)
      want[order] = x.reshape(-1)[order]
      np.testing.assert_array_equal(found.reshape(-1), want)
      lost = np.sum(x**2) - np.sum(want**2)
      self.assertAlmostEqual(np.sum((found - x) ** 2) / lost, 1, places=12)

  def test_ties_go_to_the_lower_index(self):
    x = np.array([1, -2, 2, 0, -2, 2], np.float32)
    found = _ends_in(sparse.top_k(3), x)
    np.testing.assert_array_equal(found, [0, -2, 2, 0, -2, 0])

  def test_workers_add_up(self):
    code = sparse.top_k(3)
    rows = np.random.default_rng(1).normal(size=(4, 2, 6)).astype(np.float32)
    compress = jax.jit(lambda x: code.compress((), x, None)[0])
    payloads = [compress(x) for x in rows]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *payloads)
    like = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    found = code.accumulate((), stacked, like)
    want = sum(np.asarray(_ends_in(code, x)) for x in rows)
    np.testing.assert_allclose(found, want, rtol=1e-6)


class RandomKTest(parameterized.TestCase):
  @parameterized.parameters((3, 7), (4, 9))
  @pytest.mark.slow
  def test_every_set_as_often(self, k, size):
    num = 20_000
    kept = _sets(sparse.random_k(k), size, num)
    np.testing.assert_array_equal(kept.sum(axis=1), k)
    sets = list(itertools.combinations(range(size), k))
    codes = kept @ (1 << np.arange(size))
    counts = [np.sum(codes == sum(1 << i for i in chosen)) for chosen in sets]
    want = num / len(sets)
    # Chi-square with as many degrees of freedom less one.
    chi = np.sum((np.array(counts) - want) ** 2) / want
    free = len(sets) - 1
    self.assertLess(chi, free + 4 * math.sqrt(2 * free))

  def test_every_entry_and_every_pair_as_often(self):
    num, k, size = 10_000, 20, 100
    kept = _sets(sparse.random_k(k), size, num).astype(float)
    np.testing.assert_array_equal(kept.sum(axis=1), k)
    pairs = kept.T @ kept
    one, two = k / size, k * (k - 1) / (size * (size - 1))
    ones = (np.diag(pairs) / num - one) / math.sqrt(one * (1 - one) / num)
    twos = pairs[np.triu_indices(size, 1)] / num - two
    twos = twos / math.sqrt(two * (1 - two) / num)
    # Normal, 100 and 4950 of them.
    self.assertLess(np.max(np.abs(ones)), 4.2)
    self.assertLess(np.max(np.abs(twos)), 5)
    self.assertBetween(np.std(ones), 0.7, 1.2)
    self.assertBetween(np.std(twos), 0.95, 1.05)

  def test_all_of_all(self):
    x = np.random.default_rng(0).normal(size=37).astype(np.float32)
    np.testing.assert_array_equal(_ends_in(sparse.random_k(37), x), x)

  def test_distinct_in_large_arrays(self):
    size = 1_000_003
    draws = sparse._draw(jax.random.key(0), size)
    run = jax.jit(lambda draws: sparse._distinct(draws, 10_000, size))
    found = np.asarray(run(draws))
    self.assertLen(np.unique(found), 10_000)
    self.assertBetween(found.min(), 0, 2_000)
    self.assertBetween(found.max(), size - 2_000, size - 1)
    # As many in each tenth of the array, give or take 4 deviations of 30.
    counts = np.bincount(found // (size // 10 + 1), minlength=10)
    self.assertLess(np.max(np.abs(counts - 1000)), 120)

  @pytest.mark.slow
  def test_own_draws_differ_and_shared_do_not(self):
    x = jnp.arange(1.0, 101)
    keys = jax.random.split(jax.random.key(0))
    shared = sparse.random_k(10)
    compress = jax.jit(lambda key: shared.compress((), x, key)[0])
    first, other = compress(keys[0]), compress(keys[1])
    self.assertIsNone(first.indices)
    self.assertFalse(np.array_equal(other.values, first.values))
    own = sparse.random_k(10, shared=False)
    payload, state = jax.jit(own.compress)((), x, keys[0])
    self.assertEqual(state, ())
    found = np.asarray(_program(own)(x, keys[0]))
    np.testing.assert_array_equal(np.sort(payload.values), found[found > 0])


class BlockKTest(parameterized.TestCase):
  @parameterized.product(
    k=(1, 4, 6, 7), place=(sparse._place_by_index, sparse._place_by_slices)
  )
  def test_all_starts(self, k, place):
    size = 7
    block = jnp.arange(1.0, k + 1)
    run = jax.jit(functools.partial(place, size=size))
    times = np.zeros(size)
    for start in range(size):
      found = run(jnp.int32(start), block)
      want = np.roll(np.pad(block, (0, size - k)), start)
      np.testing.assert_array_equal(found, want)
      times += np.asarray(found) > 0
    # Each entry is kept for exactly k of the d starts.
    np.testing.assert_array_equal(times, k)

  def test_platforms(self):
    code = sparse.block_k(2)
    like = jax.ShapeDtypeStruct((7,), jnp.float32)
    run = jax.jit(
      lambda start, block: code.decompress(
        start, sparse.Entries(block, None), like
      )
    )
    traced = run.trace(jnp.int32(0), jnp.ones(2))
    slices = [
      'dynamic_update_slice'
      in traced.lower(lowering_platforms=(platform,)).as_text()
      for platform in ('cpu', 'cuda', 'tpu')
    ]
    self.assertEqual(slices, [False, False, True])

  @parameterized.parameters(3, 6, 7)
  def test_values_are_those_in_a_row(self, k):
    x = np.arange(1, 8, dtype=np.float32)
    starts, compress = set(), jax.jit(sparse.block_k(k).compress)
    for seed in range(40):
      payload, start = compress((), jnp.asarray(x), jax.random.key(seed))
      want = np.roll(x, -int(start))[:k]
      np.testing.assert_array_equal(payload.values, want)
      starts.add(int(start))
    self.assertEqual(starts, set(range(7)))

  def test_gain(self):
    x = np.arange(1, 8, dtype=np.float32)
    plain, scaled = (sparse.block_k(2, scaled=s) for s in (False, True))
    np.testing.assert_allclose(
      _ends_in(scaled, x), 3.5 * _ends_in(plain, x), rtol=1e-6
    )


class CountTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'fraction': 0.1}, (5, 9), 4),
    ({'fraction': 0.001}, (5, 9), 1),
    ({'fraction': 1.0}, (5, 9), 45),
    ({'k': 45}, (5, 9), 45),
    ({'k': 1000, 'at_most': True}, (5, 9), 45),
    ({'k': 7, 'at_most': True}, (5, 9), 7),
  )
  def test_kept(self, asked, shape, want):
    code = sparse.block_k(**asked)
    code.init(shape, jnp.float32, None)
    self.assertEqual(code.bits(shape), 32 * want)

  @parameterized.product(
    make=(sparse.top_k, sparse.random_k, sparse.block_k),
    asked_and_message=(
      ({}, 'one of k and fraction'),
      ({'k': 1, 'fraction': 0.5}, 'one of k and fraction'),
      ({'k': 0}, 'k must be at least 1, got 0'),
      ({'fraction': 0.0}, r'fraction must be in \(0, 1\], got 0.0'),
      ({'fraction': 1.5}, r'fraction must be in \(0, 1\], got 1.5'),
    ),
  )
  def test_refuses(self, make, asked_and_message):
    asked, message = asked_and_message
    with self.assertRaisesRegex(ValueError, message):
      make(**asked)

  @parameterized.parameters(sparse.top_k, sparse.random_k, sparse.block_k)
  def test_refuses_shapes(self, make):
    with self.assertRaisesRegex(
      ValueError, r'at most the 6 .* \(2, 3\), got 7'
    ):
      make(7).init((2, 3), jnp.float32, jax.random.key(0))
