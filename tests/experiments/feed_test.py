import grain
import jax
import numpy as np
from absl.testing import parameterized

from emc2.experiments import feed


class Listed:
  """Counts up; its position is what a test wants it to be."""

  def __init__(self, kind):
    self._kind, self._at = kind, 0

  def __iter__(self):
    return self

  def __next__(self):
    self._at += 1
    return np.full((2,), self._at, np.float32)

  def get_state(self):
    return self._kind(self._at)

  def set_state(self, state):
    self._at = int(state['at'] if isinstance(state, dict) else state)


class FeedTest(parameterized.TestCase):
  def test_stacks_on_the_device(self):
    source = feed.Feed(Listed(int))
    taken = source.take(0, 3)
    self.assertIsInstance(taken, jax.Array)
    np.testing.assert_array_equal(taken, [[1, 1], [2, 2], [3, 3]])

  @parameterized.parameters(
    int, lambda at: {'at': at}, lambda at: str(at).encode()
  )
  def test_goes_to_a_position(self, kind):
    source = feed.Feed(Listed(kind))
    source.take(0, 3)
    position = source.position()
    want = source.take(3, 2)
    other = feed.Feed(Listed(kind))
    other.go_to(position)
    np.testing.assert_array_equal(other.take(3, 2), want)

  def test_goes_to_a_position_of_grain(self):
    stream = grain.MapDataset.range(100).shuffle(seed=3).batch(4)
    source = feed.Feed(iter(stream.to_iter_dataset()))
    source.take(0, 5)
    position = source.position()
    want = source.take(5, 2)
    other = feed.Feed(iter(stream.to_iter_dataset()))
    other.go_to(position)
    np.testing.assert_array_equal(other.take(5, 2), want)

  def test_splits_each_batch_over_the_mesh(self):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('data')
    )
    taken = feed.Feed(Listed(int), sharding).take(0, 3)
    self.assertEqual(taken.shape, (3, 2))
    self.assertEqual(taken.addressable_shards[0].data.shape, (3, 1))

  def test_without_batches(self):
    source = feed.Feed(None)
    self.assertIsNone(source.take(0, 3))
    self.assertIsNone(source.position())
    source.go_to(None)

  def test_refuses_the_position_of_another_run(self):
    position = feed.Feed(Listed(int)).position()
    with self.assertRaisesRegex(ValueError, 'holds 1 positions .* run has 0'):
      feed.Feed(None).go_to(position)
    with self.assertRaisesRegex(ValueError, 'holds 2 positions .* run has 1'):
      feed.Feed(Listed(int)).go_to(position * 2)

  @parameterized.parameters(np.int64, lambda at: {at: 1}, lambda at: object())
  def test_refuses_a_position_that_json_cannot_hold(self, kind):
    with self.assertRaisesRegex(ValueError, 'get_state.* must give bytes or'):
      feed.Feed(Listed(kind))
