"""Corpora by name, and splits that lose nothing and favour no token."""

import gzip
import pathlib

import numpy as np
import scipy.sparse
from absl.testing import parameterized
from scipy import stats

from emc2.experiments.data import (
  bag_of_words,
  corpus,
  docstrings,
  lda_c,
  uci_bag_of_words,
  vocabulary,
)

LDA_C = '2 0:1 2:3\n0\n1 1:2\n'
UCI = '3\n3\n3\n1 1 1\n1 3 3\n3 2 2\n'
DENSE = np.array([[1, 0, 3], [0, 0, 0], [0, 2, 0]])


def make_random(num_documents=60, num_words=30, seed=0):
  """Counts from 1 to 5 in a third of all places; some documents empty."""
  rng = np.random.default_rng(seed)
  dense = rng.integers(1, 6, (num_documents, num_words))
  dense *= rng.random(dense.shape) < 1 / 3
  dense[::7] = 0
  return dense


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.product(
    form=((LDA_C, lda_c), (UCI, uci_bag_of_words)),
    name=('ap.dat', 'counts', 'ap.dat.gz'),
  )
  def test_tells_formats_by_content(self, form, name):
    text, module = form
    path = self.root / name
    content = text.encode()
    path.write_bytes(gzip.compress(content) if '.gz' in name else content)
    self.assertIs(bag_of_words.file_format(path), module)
    found = bag_of_words.read(str(path))
    np.testing.assert_array_equal(found.counts.toarray(), DENSE)

  def test_tells_formats_by_name(self):
    path = self.root / 'docword.broken.txt'
    path.write_text(LDA_C)
    with self.assertRaisesRegex(
      ValueError, f'{path}:1: .* number of documents'
    ):
      bag_of_words.read(path)

  def test_begins_with_an_empty_document(self):
    path = self.root / 'ap.dat'
    path.write_text('0\n0\n1 1:2\n')
    self.assertEqual(bag_of_words.read(path).counts.shape, (3, 2))

  @parameterized.parameters(LDA_C, UCI)
  def test_passes_the_vocabulary_on(self, text):
    path, words = self.root / 'counts', self.root / 'words'
    path.write_text(text)
    words.write_text('a\nb\nc\n')
    found = bag_of_words.read(path, words)
    self.assertEqual(found.words, ('a', 'b', 'c'))

  def test_docstrings(self):
    packages = ('flax', 'optax')  # Less to parse than the default.
    before = docstrings.load
    self.addCleanup(setattr, docstrings, 'load', before)
    docstrings.load = lambda _, **settings: before(packages, **settings)
    found = bag_of_words.read('docstrings')
    self.assertEqual(found.class_names, packages)
    self.assertEqual(found.counts.shape[1], len(found.words))
    self.assertGreater(found.num_documents, 400)
    want = vocabulary.count_docstrings(packages)
    self.assertEqual(found.words, want.words)

  def test_refuses(self):
    with self.assertRaisesRegex(
      ValueError, "nowhere: expected 'docstrings' or"
    ):
      bag_of_words.read(self.root / 'nowhere')
    with self.assertRaisesRegex(ValueError, 'vocabulary must be None .* got a'):
      bag_of_words.read('docstrings', 'a')
    for content in (b'', gzip.compress(b'')):
      path = self.root / 'empty'
      path.write_bytes(content)
      with self.assertRaisesRegex(ValueError, f'{path}: .* got an empty file'):
        bag_of_words.read(path)


class SplitDocumentsTest(parameterized.TestCase):
  @parameterized.parameters((0.1, 6), (0.5, 30), (0.99, 59))
  def test_every_document_goes_to_one_part(self, held_out, size):
    dense = make_random()
    dense[:, 0] = np.arange(60) + 1  # Which document it is.
    whole = corpus.make(
      dense,
      tuple(map(str, range(30))),
      np.arange(60, dtype=np.int32) % 3,
      ('a', 'b', 'c'),
    )
    parts = bag_of_words.split_documents(whole, held_out, seed=3)
    self.assertEqual(parts[1].num_documents, size)
    numbers = [part.counts[:, [0]].toarray()[:, 0] - 1 for part in parts]
    self.assertCountEqual(np.concatenate(numbers).tolist(), range(60))
    for part, rows in zip(parts, numbers, strict=True):
      self.assertTrue((np.diff(rows) > 0).all())
      np.testing.assert_array_equal(part.counts.toarray(), dense[rows])
      np.testing.assert_array_equal(part.labels, whole.labels[rows])
      self.assertEqual(part.class_names, whole.class_names)
      self.assertEqual(part.words, whole.words)

  def test_seeds(self):
    whole = corpus.make(np.eye(40))
    held_out = lambda seed: tuple(
      bag_of_words.split_documents(whole, seed=seed)[1].counts.indices
    )
    self.assertEqual(held_out(0), held_out(0))
    self.assertLen({held_out(seed) for seed in range(5)}, 5)
    self.assertLen(held_out(0), 4)
    counts = np.zeros(40)
    for seed in range(300):
      counts[list(held_out(seed))] += 1
    self.assertGreater(stats.chisquare(counts).pvalue, 1e-3)

  @parameterized.parameters(
    (0.0, r'held_out must lie in \(0, 1\), got 0.0'),
    (1.0, r'held_out must lie in \(0, 1\), got 1.0'),
    (0.1, 'held_out must leave a document in each part, got 0.1 of 4'),
    (0.9, 'held_out must leave a document in each part, got 0.9 of 4'),
  )
  def test_refuses(self, held_out, message):
    with self.assertRaisesRegex(ValueError, message):
      bag_of_words.split_documents(corpus.make(np.eye(4)), held_out)

  def test_refuses_a_part_without_tokens(self):
    with self.assertRaisesRegex(ValueError, 'at least one token, got 2'):
      bag_of_words.split_documents(corpus.make(DENSE[[0, 1, 1, 1]]), 0.5)


class SplitTokensTest(parameterized.TestCase):
  @parameterized.parameters(1, 40, 2**22)
  def test_halves_every_document(self, tokens):
    before = bag_of_words._TOKENS
    self.addCleanup(setattr, bag_of_words, '_TOKENS', before)
    bag_of_words._TOKENS = tokens
    dense = make_random()
    halves = bag_of_words.split_tokens(corpus.make(dense).counts, seed=1)
    for half in halves:
      self.assertEqual((half.dtype, half.shape), (np.int32, dense.shape))
      self.assertTrue(half.has_canonical_format)
      self.assertGreater(half.data.min(), 0)
      twice = 2 * half.toarray().sum(1) - dense.sum(1)
      np.testing.assert_array_less(np.abs(twice), 2)
      self.assertContainsSubset({-1, 0, 1}, set(twice.tolist()))
    total = halves[0].toarray() + halves[1].toarray()
    np.testing.assert_array_equal(total, dense)

  def test_seeds(self):
    counts = corpus.make(make_random()).counts
    half = lambda seed: bag_of_words.split_tokens(counts, seed=seed)[
      0
    ].toarray()
    np.testing.assert_array_equal(half(0), half(0))
    self.assertFalse(np.array_equal(half(0), half(1)))

  @parameterized.parameters(([3, 2, 1],), ([4, 3],))
  def test_draws_every_half_alike(self, document):
    """The counts follow the law of draws without replacement."""
    document = np.array(document)
    rows = 20_000
    counts = corpus.make(np.tile(document, (rows, 1))).counts
    observed = bag_of_words.split_tokens(counts, seed=2)[0].toarray()
    drawn, seen = np.unique(observed, axis=0, return_counts=True)
    low = document.sum() // 2
    want = np.zeros(len(drawn))
    sizes = sorted({low, document.sum() - low})
    for size in sizes:
      law = stats.multivariate_hypergeom(document, size)
      want += [
        law.pmf(row) * rows / len(sizes) if row.sum() == size else 0
        for row in drawn
      ]
    np.testing.assert_allclose(want.sum(), rows)  # No outcome is missing.
    self.assertGreater(stats.chisquare(seen, want).pvalue, 1e-3)

  def test_documents_are_independent(self):
    counts = corpus.make(np.ones((20_000, 2))).counts
    first = bag_of_words.split_tokens(counts)[0].toarray()[:, 0]
    pairs = np.bincount(2 * first[:-1] + first[1:], minlength=4)
    self.assertGreater(stats.chisquare(pairs).pvalue, 1e-3)

  def test_a_single_token(self):
    counts = scipy.sparse.csr_array(np.array([[0, 1, 0]], np.int32))
    first, second = bag_of_words.split_tokens(counts)
    self.assertEqual(first.nnz + second.nnz, 1)
    self.assertEqual((first.shape, second.shape), ((1, 3), (1, 3)))
