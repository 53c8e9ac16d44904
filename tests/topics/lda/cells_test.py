"""Cells hold every pair once, and are of about equal size."""

import numpy as np
from absl.testing import parameterized

from emc2.topics import lda

from tests.topics.lda import corpora


def rebuild(cells, layout):
  """The matrix of counts that cells hold."""
  dense = np.zeros((layout.num_documents, layout.num_words))
  shards, blocks = cells.counts.shape[:2]
  for i in range(shards):
    for b in range(blocks):
      inside = cells.counts[i, b] > 0
      ids = layout.document_ids[i][cells.documents[i, b][inside]]
      word_ids = layout.word_ids[b][cells.words[i, b][inside]]
      np.add.at(dense, (ids, word_ids), cells.counts[i, b][inside])
      head = np.zeros((len(layout.document_ids[i]), cells.dense.shape[-1]))
      head += cells.dense[i, b]
      rows, columns = np.nonzero(head)
      ids = layout.document_ids[i][rows]
      word_ids = layout.word_ids[b][columns]
      np.add.at(dense, (ids, word_ids), head[rows, columns])
  return dense


class CutTest(parameterized.TestCase):
  @parameterized.product(
    shape=[(1, 1), (1, 4), (3, 3), (4, 8)],
    dense_share=[None, 0.1, 1e-9],
    seed=[None, 0],
  )
  def test_holds_every_pair_once(self, shape, dense_share, seed):
    documents = corpora.draw(37, 53, 5, num_empty=3).documents
    cells, layout = lda.cut(
      documents,
      num_shards=shape[0],
      num_blocks=shape[1],
      tile=16,
      dense_share=dense_share,
      seed=seed,
    )
    want = corpora.to_dense(documents)
    np.testing.assert_array_equal(rebuild(cells, layout), want)
    self.assertEqual(layout.num_tokens, want.sum())
    self.assertEqual(cells.counts.shape[:2], shape)
    if dense_share == 1e-9:
      self.assertEqual(cells.counts.size, 0)

  def test_orders_are_undone(self):
    documents = corpora.draw(37, 53, 5).documents
    _, layout = lda.cut(documents, num_shards=4, num_blocks=8)
    rows = np.arange(53 * 2.0).reshape(53, 2)
    placed = layout.place_words(rows, fill=-1.0)
    np.testing.assert_array_equal(layout.sort_words(placed), rows)
    self.assertEqual(np.sum(placed == -1), 2 * (placed.shape[1] * 8 - 53))
    ids = layout.document_ids.ravel()
    np.testing.assert_array_equal(
      layout.sort_documents(ids[:, None])[:, 0], np.arange(37)
    )

  def test_pads_little(self):
    documents = corpora.draw(800, 400, 5, eta=0.01).documents
    cells, _ = lda.cut(documents, num_shards=4, num_blocks=8, tile=64)
    self.assertLess(cells.counts.size, 1.3 * len(documents.counts))

  def test_dense_words_have_the_share(self):
    documents = corpora.draw(100, 60, 5).documents
    share = (corpora.to_dense(documents) > 0).mean(0)
    cells, layout = lda.cut(documents, num_blocks=3, dense_share=0.2)
    num_dense = cells.dense.shape[-1]
    inside = layout.word_ids[:, :num_dense].ravel()
    enough = np.flatnonzero(share >= 0.2)
    self.assertContainsSubset(enough.tolist(), inside.tolist())
    self.assertLess(num_dense * 3, len(enough) + 3)

  def test_pairs_lie_at_random_unless_told(self):
    documents = corpora.draw(50, 60, 5).documents
    plain, random, again, other = (
      lda.cut(documents, seed=seed)[0].documents for seed in (None, 0, 0, 1)
    )
    np.testing.assert_array_equal(random, again)
    self.assertFalse(np.array_equal(random, other))
    self.assertFalse(np.array_equal(random, plain))

  @parameterized.named_parameters(
    ('shards', dict(num_shards=0), 'num_shards must be at least 1, got 0'),
    ('tile', dict(tile=0), 'tile must be at least 1, got 0'),
    ('blocks', dict(num_blocks=0), 'num_blocks must be a multiple'),
    (
      'uneven',
      dict(num_shards=2, num_blocks=3),
      'num_blocks must be a multiple of num_shards=2, got 3',
    ),
    ('many', dict(num_blocks=99), 'at most the number of words, 60, got 99'),
    ('share', dict(dense_share=0.0), r'dense_share must lie in \(0, 1\]'),
    ('whole', dict(dense_share=1.5), r'dense_share must lie in \(0, 1\]'),
  )
  def test_refuses(self, settings, message):
    documents = corpora.draw(20, 60, 5).documents
    with self.assertRaisesRegex(ValueError, message):
      lda.cut(documents, **settings)

  def test_refuses_an_empty_corpus(self):
    documents = corpora.from_dense(np.zeros((4, 5)))
    with self.assertRaisesRegex(ValueError, 'at least one token, got 4 doc'):
      lda.cut(documents)
