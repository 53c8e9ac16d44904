"""Docstrings by their modules: weights, norms, classes and what is held out."""

import importlib
import math
import pathlib
import sys
from unittest import mock

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import packages

WORDS = ('apple', 'berry', 'cherry', 'damson', 'elder', 'fig', 'grape')


def _write(root, num_modules=4, num_documents=6, seed=0):
  rng = np.random.default_rng(seed)
  folder = root / 'emc2_fruit'
  folder.mkdir()
  (folder / '__init__.py').write_text('')
  for module in range(num_modules):
    lines = []
    for number in range(num_documents):
      words = rng.choice(WORDS, 40, p=rng.dirichlet(np.full(len(WORDS), 0.3)))
      lines += [f'def f{number}():', f'  """{" ".join(words)}."""']
    (folder / f'm{module}.py').write_text('\n'.join(lines) + '\n')


class PackagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = pathlib.Path(self.create_tempdir().full_path)
    _write(root)
    sys.path.insert(0, str(root))
    self.addCleanup(sys.path.remove, str(root))
    importlib.invalidate_caches()
    self.enter_context(_share_of_one())

  def read(self, **settings):
    return packages.read(['emc2_fruit'], **settings)

  @parameterized.parameters('tf', 'tfidf')
  def test_weights(self, weights):
    train, test = self.read(weights=weights, held_out=0.34)
    texts = packages.docstrings.load(
      ['emc2_fruit'], label='module', min_per_label=2
    )
    want = []
    parts = packages._split(texts.labels, 0.34, 0)
    bags = [text.rstrip('.').split() for text in texts.texts]
    words = sorted({word for bag in bags for word in bag})
    held = {w: sum(w in bags[i] for i in parts[0]) for w in words}
    for bag in bags:
      row = np.zeros(len(words))
      for number, word in enumerate(words):
        if word in bag:
          row[number] = 1 + math.log(bag.count(word))
          if weights == 'tfidf':
            share = (1 + len(parts[0])) / (1 + held[word])
            row[number] *= 1 + math.log(share)
      want.append(row / np.linalg.norm(row))
    for part, found in zip(parts, (train, test), strict=True):
      np.testing.assert_allclose(
        found.rows.to_dense(), np.array(want)[part], rtol=1e-6
      )
      np.testing.assert_array_equal(found.labels, texts.labels[part])

  def test_holds_out_of_each_class(self):
    train, test = self.read(held_out=0.34)
    names = tuple(f'emc2_fruit.m{i}' for i in range(4))
    self.assertEqual((train.class_names, test.class_names), (names, names))
    np.testing.assert_array_equal(np.bincount(train.labels), [4] * 4)
    np.testing.assert_array_equal(np.bincount(test.labels), [2] * 4)
    train, test = self.read(held_out=0.99)
    np.testing.assert_array_equal(np.bincount(train.labels), [1] * 4)

  def test_is_the_same_again(self):
    first, again, other = (self.read(seed=seed)[1] for seed in (0, 0, 1))
    for one, two in zip(first.rows, again.rows, strict=True):
      np.testing.assert_array_equal(one, two)
    self.assertFalse(
      np.array_equal(first.rows.to_dense(), other.rows.to_dense())
    )

  def test_options(self):
    train, _ = self.read(label='package')
    self.assertEqual(train.class_names, ('emc2_fruit',))
    train, test = self.read(max_documents=12, min_per_label=2)
    self.assertEqual(train.num_rows + test.num_rows, 12)
    with self.assertRaisesRegex(ValueError, 'packages: expected a document'):
      self.read(min_per_label=7)
    with self.assertRaisesRegex(ValueError, 'expected a word in at least 25'):
      self.read(min_documents=25)

  @parameterized.parameters(
    (dict(weights='idf'), "weights must be one of .* got 'idf'"),
    (dict(min_per_label=1), 'min_per_label must be at least 2, got 1'),
    (dict(held_out=0.0), r'held_out must lie in \(0, 1\), got 0.0'),
    (dict(held_out=0.01), 'held_out must leave a document to test on'),
    (dict(label='folder'), "label must be one of .* got 'folder'"),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      self.read(**settings)

  def test_the_default_has_hundreds_of_classes(self):
    train, test = packages.read(['numpy', 'optax'], min_per_label=5)
    self.assertGreater(train.num_classes, 30)
    norms = np.linalg.norm(train.rows.to_dense(), axis=1)
    np.testing.assert_allclose(norms[norms > 0], 1, rtol=1e-5)
    self.assertSetEqual(set(train.labels), set(range(train.num_classes)))
    self.assertEqual(train.rows.num_features, test.rows.num_features)


def _share_of_one():
  """Lets a word stand in every document, for there are only seven."""
  count = packages.vocabulary.count

  def patched(texts, **settings):
    return count(texts, **(settings | dict(max_share=1.0, stop_words=())))

  return mock.patch.object(packages.vocabulary, 'count', patched)
