"""The stream follows the order, splits by process and resumes anywhere."""

import itertools
import json

import numpy as np
import pytest
from absl import flags
from absl.testing import parameterized

from emc2.experiments import data
from emc2.experiments.data import dataset


def make(num_samples=23, labelled=True):
  """Images that show their number."""
  images = np.zeros((num_samples, 2, 2, 1), np.uint8)
  images += np.arange(num_samples, dtype=np.uint8)[:, None, None, None]
  labels = np.arange(num_samples, dtype=np.int32) % 3 if labelled else None
  return dataset.Dataset(images, labels, ('a', 'b', 'c') if labelled else ())


def take(stream, count):
  return list(itertools.islice(stream, count))


def join(batches, name='index'):
  return np.stack([batch[name] for batch in batches])


class LoaderTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 5)
  def test_follows_the_order(self, prefetch):
    stream = data.batches(make(), batch_size=4, seed=3, prefetch=prefetch)
    for step, batch in enumerate(take(stream, 12)):
      want = data.batch_indices(3, step, num_samples=23, batch_size=4)
      np.testing.assert_array_equal(batch['index'], want)
      np.testing.assert_array_equal(batch['image'][:, 1, 0, 0], want)
      np.testing.assert_array_equal(batch['label'], want % 3)
      self.assertEqual(batch['image'].shape, (4, 2, 2, 1))
      self.assertEqual(batch['image'].dtype, np.uint8)

  def test_an_epoch_shows_each_sample_at_most_once(self):
    stream = iter(data.batches(make(), batch_size=4))
    for _ in range(3):
      self.assertLen(np.unique(join(take(stream, 5))), 20)

  def test_no_labels(self):
    stream = data.batches(make(labelled=False), batch_size=4)
    self.assertNotIn('label', next(iter(stream)))

  def test_two_processes_share_each_batch(self):
    whole = take(data.batches(make(), batch_size=6), 9)
    parts = [
      take(data.batches(make(), batch_size=6, shard_index=i, num_shards=2), 9)
      for i in range(2)
    ]
    for name in ('index', 'image', 'label'):
      both = np.concatenate([join(part, name) for part in parts], axis=1)
      np.testing.assert_array_equal(both, join(whole, name))

  @parameterized.parameters(0, 4)
  def test_resumes(self, prefetch):
    stream = iter(data.batches(make(), batch_size=4, prefetch=prefetch))
    take(stream, 7)
    state = json.loads(json.dumps(stream.get_state()))
    want = join(take(stream, 8))
    stream.set_state(state)
    np.testing.assert_array_equal(join(take(stream, 8)), want)
    fresh = iter(data.batches(make(), batch_size=4, prefetch=prefetch))
    fresh.set_state(state)
    np.testing.assert_array_equal(join(take(fresh, 8)), want)

  def test_resumes_with_another_number_of_processes(self):
    stream = iter(data.batches(make(), batch_size=4))
    take(stream, 3)
    state = stream.get_state()
    want = join(take(stream, 4))
    for shard in range(2):
      part = iter(
        data.batches(make(), batch_size=4, shard_index=shard, num_shards=2)
      )
      part.set_state(state)
      got = join(take(part, 4))
      np.testing.assert_array_equal(got, want[:, 2 * shard : 2 * shard + 2])

  @pytest.mark.slow
  def test_worker_processes_give_the_same(self):
    settings = dict(batch_size=4, prefetch=1)
    want = join(take(data.batches(make(), **settings), 8))
    stream = iter(data.batches(make(), **settings, num_workers=2))
    self.addCleanup(stream.close)
    np.testing.assert_array_equal(join(take(stream, 3)), want[:3])
    state = stream.get_state()
    np.testing.assert_array_equal(join(take(stream, 2)), want[3:5])
    stream.set_state(state)
    np.testing.assert_array_equal(join(take(stream, 5)), want[3:])

  def test_workers_need_flags(self):
    flags.FLAGS.unparse_flags()
    self.addCleanup(flags.FLAGS.mark_as_parsed)
    next(iter(data.batches(make(), batch_size=4)))
    with self.assertRaisesRegex(ValueError, 'num_workers must be 0 .* got 2'):
      data.batches(make(), batch_size=4, num_workers=2)

  @parameterized.parameters(
    (dict(batch_size=24), 'batch_size must lie between 1 and .* 23, got 24'),
    (dict(batch_size=4, seed=-1), 'seed must lie in'),
    (dict(batch_size=4, num_shards=3), 'multiple of num_shards'),
  )
  def test_refuses_before_the_first_batch(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      data.batches(make(), **settings)
