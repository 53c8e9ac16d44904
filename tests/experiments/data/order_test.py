"""Every epoch is a permutation, and a batch is a pure function of its step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from scipy import stats

from emc2.experiments.data import order


def swap_or_not(seed, epoch, position, num_samples):
  """The image of one position, in Python integers."""

  def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)

  golden, word = 0x9E3779B9, 2**32
  key, x = mix(mix(seed) ^ epoch), position
  for r in range(6 * max(1, math.ceil(math.log2(num_samples)))):
    salt = mix((key + (r + 1) * golden) % word)
    partner = (salt % num_samples - x) % num_samples
    if mix(max(x, partner) ^ mix((salt + golden) % word)) % 2:
      x = partner
  return x


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 7, 64, 1000)
  def test_epoch_is_a_permutation(self, num_samples):
    whole = order.batch_indices(
      3, 5, num_samples=num_samples, batch_size=num_samples
    )
    np.testing.assert_array_equal(np.sort(whole), np.arange(num_samples))

  @parameterized.parameters((100, 4, 0), (1437, 8, 500), (10, 3, 7))
  def test_matches_python(self, num_samples, batch_size, step):
    epoch, row = divmod(step, num_samples // batch_size)
    want = [
      swap_or_not(9, epoch, row * batch_size + i, num_samples)
      for i in range(batch_size)
    ]
    got = order.batch_indices(
      9, step, num_samples=num_samples, batch_size=batch_size
    )
    self.assertEqual(got.tolist(), want)
    self.assertEqual(got.dtype, np.int32)

  def test_drops_the_remainder(self):
    for epoch in range(3):
      seen = np.concatenate(
        [
          order.batch_indices(0, 3 * epoch + t, num_samples=10, batch_size=3)
          for t in range(3)
        ]
      )
      self.assertLen(np.unique(seen), 9)

  def test_every_epoch_and_seed_has_its_own_order(self):
    draw = lambda seed, step: tuple(
      order.batch_indices(seed, step, num_samples=50, batch_size=50)
    )
    orders = {draw(seed, step) for seed in range(4) for step in range(4)}
    self.assertLen(orders, 16)

  def test_jax_gives_the_same(self):
    sizes = dict(num_samples=103, batch_size=4)
    steps = jnp.arange(60, dtype=jnp.int32)
    want = np.stack([order.batch_indices(7, t, **sizes) for t in range(60)])

    def body(seed, step):
      return seed, order.batch_indices(seed, step, **sizes)

    _, scanned = jax.lax.scan(body, jnp.uint32(7), steps)
    np.testing.assert_array_equal(scanned, want)
    self.assertEqual(scanned.dtype, jnp.int32)
    mapped = jax.vmap(lambda seed: order.batch_indices(seed, 59, **sizes))(
      jnp.array([7, 8], jnp.uint32)
    )
    np.testing.assert_array_equal(mapped[0], want[59])
    self.assertFalse(np.array_equal(mapped[1], want[59]))

  def test_shards_make_the_whole(self):
    sizes = dict(num_samples=40, batch_size=6)
    whole = order.batch_indices(1, 8, **sizes)
    parts = [
      order.batch_indices(1, 8, **sizes, shard_index=i, num_shards=3)
      for i in range(3)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)

  @parameterized.parameters((4, 4), (10, 2))
  def test_batches_are_uniform(self, num_samples, batch_size):
    seeds = jnp.arange(12_000, dtype=jnp.uint32)
    draw = lambda seed: order.batch_indices(
      seed, 0, num_samples=num_samples, batch_size=batch_size
    )
    batches = np.asarray(jax.jit(jax.vmap(draw))(seeds))
    _, counts = np.unique(batches, axis=0, return_counts=True)
    self.assertLen(counts, math.perm(num_samples, batch_size))
    self.assertGreater(stats.chisquare(counts).pvalue, 1e-3)

  def test_positions_of_one_epoch_are_uncorrelated(self):
    whole = order.batch_indices(0, 0, num_samples=20_000, batch_size=20_000)
    places = np.arange(whole.size)
    pairs = ((places, whole), (whole[1:], whole[:-1]), (whole[2:], whole[:-2]))
    for x, y in pairs:
      self.assertGreater(stats.spearmanr(x, y).pvalue, 1e-3)

  @parameterized.parameters(
    (dict(num_samples=4, batch_size=5), 'batch_size must lie between 1'),
    (dict(num_samples=4, batch_size=0), 'got 0'),
    (dict(num_samples=2**31, batch_size=2), 'must be below'),
    (dict(num_samples=9, batch_size=4, num_shards=3), 'multiple of num_shards'),
    (
      dict(num_samples=9, batch_size=4, num_shards=2, shard_index=2),
      'shard_index must lie in',
    ),
  )
  def test_refuses(self, sizes, message):
    with self.assertRaisesRegex(ValueError, message):
      order.batch_indices(0, 0, **sizes)
