"""A corpus says what it holds, and refuses what is not one."""

import numpy as np
import scipy.sparse
from absl.testing import parameterized

from emc2.experiments.data import corpus

DENSE = np.array([[1, 0, 3], [0, 0, 0], [0, 2, 0]])


class CorpusTest(parameterized.TestCase):
  @parameterized.parameters(
    np.asarray,
    lambda x: x.astype(np.float32),
    scipy.sparse.csc_matrix,
    lambda x: scipy.sparse.coo_array(x.astype(np.float64)),
    lambda x: scipy.sparse.csr_array(  # Unsorted, in parts, with a zero.
      ([1, 2, 1, 2, 0], [2, 2, 0, 1, 0], [0, 3, 3, 5]), x.shape
    ),
  )
  def test_takes_any_form(self, convert):
    given = convert(DENSE)
    found = corpus.make(given)
    np.testing.assert_array_equal(found.counts.toarray(), DENSE)
    self.assertEqual(found.counts.indices.tolist(), [0, 2, 1])
    self.assertEqual(found.counts.dtype, np.int32)
    self.assertTrue(found.counts.has_canonical_format)
    if scipy.sparse.issparse(given):
      np.testing.assert_array_equal(given.toarray(), DENSE)

  def test_sizes(self):
    found = corpus.make(DENSE)
    self.assertEqual(
      (
        found.num_documents,
        found.num_words,
        found.num_pairs,
        found.num_tokens,
        found.max_words,
      ),
      (3, 3, 3, 6, 2),
    )
    large = corpus.make(np.full((1, 3), 2**31 - 1))
    self.assertEqual(large.num_tokens, 3 * (2**31 - 1))

  @parameterized.parameters(
    (-DENSE, 'counts must be whole numbers .* got -1'),
    (DENSE / 2, 'whole numbers .* got 0.5'),
    (DENSE * np.nan, 'whole numbers .* got nan'),
    (DENSE * 2**31, 'whole numbers .* got 2147483648'),
    (0 * DENSE, 'at least one token, got 3 documents and none'),
    (DENSE[:0], 'at least one token, got 0 documents and none'),
  )
  def test_refuses_counts(self, counts, message):
    with self.assertRaisesRegex(ValueError, message):
      corpus.make(counts)

  @parameterized.parameters(
    (dict(words=('a',)), 'words must .* axis 1, 3, got 1'),
    (dict(labels=np.zeros(2, np.int32)), 'labels must .* axis 0, 3, got 2'),
  )
  def test_refuses_what_does_not_fit(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      corpus.make(DENSE, **settings)

  def test_refuses_other_forms(self):
    make = scipy.sparse.csr_array
    for counts, message in (
      (make(DENSE.astype(np.float32)), 'counts must be int32, .* got float32'),
      (
        make((np.ones(2, np.int32), [1, 0], [0, 2])),
        'indices that rise within a row',
      ),
      (
        make((np.array([1, 0], np.int32), [0, 1], [0, 2])),
        'at least 1 where stored, got 0',
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        corpus.Corpus(counts)
