"""The first words of topics and their coherence, against loops."""

import itertools
import math

import numpy as np
from absl.testing import parameterized

from emc2.topics.lda import topics

from tests.topics.lda import inference_test


def find_coherence(top_ids, counts):
  """Pair by pair, document by document."""
  found = []
  for ids in top_ids:
    values = []
    for one, other in itertools.combinations(ids, 2):
      have = [(row[one] > 0, row[other] > 0) for row in counts]
      both = sum(a and b for a, b in have) / len(have)
      first = sum(a for a, _ in have) / len(have)
      second = sum(b for _, b in have) / len(have)
      if both in (0, 1):
        values.append(2 * both - 1)
      else:
        values.append(math.log(both / (first * second)) / -math.log(both))
    found.append(sum(values) / len(values))
  return found


class TopWordsTest(parameterized.TestCase):
  @parameterized.product(num=(1, 5, 40), num_topics=(1, 6))
  def test_matches_sorting(self, num, num_topics):
    """Many words are equal, and the lower ids come first."""
    sums = np.random.default_rng(0).integers(0, 6, (40, num_topics)) * 0.5
    found = topics.top_words(sums, num)
    self.assertEqual(found.shape, (num_topics, num))
    for topic, ids in enumerate(found):
      want = sorted(range(40), key=lambda v, t=topic: (-sums[v, t], v))[:num]
      self.assertEqual(ids.tolist(), want)

  def test_takes_ten_by_default(self):
    self.assertEqual(topics.top_words(np.ones((12, 2))).shape, (2, 10))

  @parameterized.parameters(
    (np.ones((3, 2)), 0, 'num must'),
    (np.ones((3, 2)), 4, 'num must'),
    (np.ones(3), 1, 'word_sums must'),
    (np.ones((3, 2), np.int32), 1, 'word_sums must'),
    (np.array([[0.0], [np.nan]]), 1, 'word_sums must'),
  )
  def test_refuses(self, word_sums, num, match):
    with self.assertRaisesRegex(ValueError, f'^{match}'):
      topics.top_words(word_sums, num)


class CoherenceTest(parameterized.TestCase):
  @parameterized.product(part=(None, 64, 100), num=(2, 7))
  def test_matches_a_loop(self, part, num):
    """Also where documents are gone through in parts."""
    if part:
      self.addCleanup(setattr, topics, '_DOCUMENTS', topics._DOCUMENTS)
      topics._DOCUMENTS = part
    counts = inference_test.make_counts(333)
    rng = np.random.default_rng(1)
    counts[:, 4] = 1 + rng.poisson(1.0, 333)
    counts[:, 5] = 1
    counts[::2, 8], counts[1::2, 9] = 0, 0
    top_ids = [[7, 8], [4, 5], [8, 9], [0, 7], [4, 0]]
    top_ids = [
      ids + rng.choice(np.arange(10, 30), num - 2, replace=False).tolist()
      for ids in top_ids
    ]
    found = topics.coherence(top_ids, inference_test.make_documents(counts))
    want = find_coherence(top_ids, counts)
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-12)
    if num == 2:
      np.testing.assert_array_equal(found[:4], [-1, 1, -1, -1])

  def test_limits(self):
    """Words that come together only, and independent ones."""
    counts = np.zeros((8, 4), np.int64)
    counts[:3, :2] = 2
    counts[[0, 1, 4, 5], 2] = 1
    counts[[0, 2, 4, 6], 3] = 1
    documents = inference_test.make_documents(counts)
    found = topics.coherence([[0, 1], [2, 3]], documents)
    np.testing.assert_allclose(found, [1, 0], atol=1e-12)

  @parameterized.parameters(
    ([[0], [1]], 'top_ids must be'),
    ([0, 1], 'top_ids must be'),
    ([[0.0, 1.0]], 'top_ids must be integers'),
    ([[0, 30]], 'top_ids must lie'),
    ([[-1, 3]], 'top_ids must lie'),
    ([[3, 3]], 'top_ids must not'),
  )
  def test_refuses(self, top_ids, match):
    documents = inference_test.make_documents(inference_test.make_counts())
    with self.assertRaisesRegex(ValueError, f'^{match}'):
      topics.coherence(top_ids, documents)

  def test_refuses_no_documents(self):
    documents = inference_test.make_documents(np.zeros((0, 30), np.int32))
    with self.assertRaisesRegex(ValueError, '^documents must'):
      topics.coherence([[0, 1]], documents)
