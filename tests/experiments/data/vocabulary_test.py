"""Words are counted as a loop counts them, and stop words are left out."""

import collections
import re

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import vocabulary

TEXTS = (
  'The sphere: a Sphere, spheres. See n_samples, x2 and ab.',
  'Energy of the sphere on a naïve grid; energy!',
  'parameters : array',
  'grid energy grid-energy sphere',
)
ALL = dict(min_documents=1, max_share=1.0)


def count(**settings):
  return vocabulary.count(TEXTS, **(ALL | settings))


class CountTest(parameterized.TestCase):
  def test_counts(self):
    found = count()
    words = ('energy', 'grid', 'naïve', 'sphere', 'spheres')
    self.assertEqual(found.words, words)
    for text, row in zip(TEXTS, found.counts.toarray(), strict=True):
      seen = collections.Counter(re.findall(r'\b\w+\b', text.lower()))
      self.assertEqual(row.tolist(), [seen[word] for word in words])
    self.assertIsNone(found.labels)

  def test_stop_words(self):
    found = count(stop_words=['sphere', 'the'])
    self.assertContainsSubset(('parameters', 'array', 'and'), found.words)
    self.assertNoCommonElements(('sphere', 'the'), found.words)

  @parameterized.parameters(
    (dict(min_documents=2), ('energy', 'grid', 'sphere')),
    (dict(min_documents=3), ('sphere',)),
    (dict(max_share=0.5), ('energy', 'grid', 'naïve', 'spheres')),
    (dict(max_share=0.25), ('naïve', 'spheres')),
    (dict(max_vocabulary=2), ('energy', 'sphere')),
    (dict(max_vocabulary=9), ('energy', 'grid', 'naïve', 'sphere', 'spheres')),
  )
  def test_bounds(self, settings, words):
    self.assertEqual(count(**settings).words, words)

  def test_keeps_empty_documents_and_labels(self):
    labels = np.array([1, 0, 1, 0], np.int32)
    found = count(labels=labels, class_names=('a', 'b'))
    self.assertEqual(found.num_documents, 4)
    self.assertEqual(found.counts[[2]].nnz, 0)
    self.assertIs(found.labels, labels)
    self.assertEqual(found.class_names, ('a', 'b'))

  @parameterized.parameters(
    (dict(min_documents=0), 'min_documents must .* got 0'),
    (dict(max_vocabulary=0), 'max_vocabulary must .* got 0'),
    (dict(max_share=0.0), r'max_share must lie in \(0, 1\], got 0.0'),
    (dict(max_share=1.5), 'got 1.5'),
    (dict(min_documents=4), 'a word in at least 4 .* got none in 4 documents'),
    (dict(min_documents=3, max_share=0.5), 'at most 0.5 of all documents'),
    (dict(texts=('the', '')), 'got none in 2 documents'),
    (dict(texts=()), 'got none in 0 documents'),
  )
  def test_refuses(self, settings, message):
    settings = ALL | dict(texts=TEXTS) | settings
    with self.assertRaisesRegex(ValueError, message):
      vocabulary.count(settings.pop('texts'), **settings)


class DocstringsTest(parameterized.TestCase):
  def test_leaves_what_topics_are_made_of(self):
    found = vocabulary.count_docstrings(('optax', 'flax'), label='module')
    self.assertContainsSubset(
      ('attention', 'gradient', 'momentum', 'optimizer'), found.words
    )
    self.assertNoCommonElements(vocabulary.STOP_WORDS, found.words)
    self.assertGreater(found.num_documents, 400)
    self.assertIn('optax._src.alias', found.class_names)
    share = np.bincount(found.counts.indices) / found.num_documents
    self.assertLessEqual(share.max(), 0.25)
    self.assertGreaterEqual(share.min() * found.num_documents, 4.99)

  def test_options(self):
    found = vocabulary.count_docstrings(
      ('optax',),
      max_documents=50,
      min_documents=3,
      max_share=0.2,
      max_vocabulary=40,
    )
    self.assertEqual(found.counts.shape, (50, 40))
    self.assertEqual(found.class_names, ('optax',))
    seen = np.bincount(found.counts.indices)
    self.assertBetween(seen.min(), 3, 5)
    self.assertLessEqual(seen.max(), 10)

  def test_stop_words_are_sorted_and_once(self):
    """In each of the groups, so that a word is found where it should stand."""
    groups = vocabulary._DOCSTRING.split('\n\n')
    for group in groups:
      self.assertEqual(group.split(), sorted(group.split()))
    words = vocabulary._DOCSTRING.split()
    self.assertLen(set(words), len(words))
