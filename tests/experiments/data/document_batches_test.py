"""Batches hold the documents in their order, and go on where they stood."""

import gzip
import itertools
import json
import pathlib

import numpy as np
from absl.testing import parameterized

from emc2.experiments import feed
from emc2.experiments.data import (
  corpus,
  document_batches,
  lda_c,
  order,
  scanning,
  uci_bag_of_words,
)

NUM_WORDS = 20


def make_counts(num_documents=23, seed=0):
  """Counts with documents of 0 to 12 words, each with the others' like."""
  rng = np.random.default_rng(seed)
  dense = rng.integers(1, 5, (num_documents, NUM_WORDS))
  for row, size in zip(dense, itertools.cycle(range(13)), strict=False):
    row[rng.permutation(NUM_WORDS)[size:]] = 0
  return dense


def to_dense(batch):
  """The counts of a batch, (b, words), by a loop."""
  dense = np.zeros((batch.counts.shape[0], NUM_WORDS))
  for row, ids, counts in zip(dense, *batch, strict=True):
    for word, count in zip(ids, counts, strict=True):
      row[word] += count
  return dense


def take(stream, count):
  return list(itertools.islice(stream, count))


def dense_rows(stream, count):
  return np.concatenate([to_dense(batch) for batch in take(stream, count)])


class PadTest(parameterized.TestCase):
  @parameterized.parameters(12, 15, None)
  def test_matches_a_loop(self, max_words):
    dense = make_counts()
    batch = document_batches.pad(corpus.make(dense).counts, max_words)
    self.assertEqual(batch.word_ids.shape, (23, max_words or 16))
    self.assertEqual(batch.counts.shape, batch.word_ids.shape)
    self.assertEqual(batch.word_ids.dtype, np.int32)
    self.assertEqual(batch.counts.dtype, np.float32)
    for row, ids, counts in zip(dense, *batch, strict=True):
      words = np.flatnonzero(row)
      padding = np.zeros(ids.size - words.size)
      np.testing.assert_array_equal(ids, [*words, *padding])
      np.testing.assert_array_equal(counts, [*row[words], *padding])

  @parameterized.parameters((0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8))
  def test_rounds_the_width_up(self, size, width):
    dense = np.zeros((2, 9), np.int32)
    dense[0, :size] = 1
    counts = corpus.make(np.eye(9)).counts[[0, 1]]
    batch = document_batches.pad(counts[:0], None)
    self.assertEqual(batch.counts.shape, (0, 1))
    if size:
      batch = document_batches.pad(corpus.make(dense).counts)
      self.assertEqual(batch.counts.shape, (2, width))

  def test_refuses(self):
    message = 'max_words must be .* got 11 and a document of 12'
    with self.assertRaisesRegex(ValueError, message):
      document_batches.pad(corpus.make(make_counts()).counts, 11)


class BatchesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.dense = make_counts()
    self.corpus = corpus.make(self.dense)

  @parameterized.product(max_words=(None, 13), prefetch=(0, 4))
  def test_follows_the_order(self, max_words, prefetch):
    stream = document_batches.batches(
      self.corpus, batch_size=4, seed=3, max_words=max_words, prefetch=prefetch
    )
    for step, batch in enumerate(take(stream, 12)):
      rows = order.batch_indices(3, step, num_samples=23, batch_size=4)
      np.testing.assert_array_equal(to_dense(batch), self.dense[rows])
      longest = max(1, np.count_nonzero(self.dense[rows], axis=1).max())
      width = max_words or 2 ** int(np.ceil(np.log2(longest)))
      self.assertEqual(batch.counts.shape, (4, width))

  def test_resumes(self):
    make = lambda: iter(document_batches.batches(self.corpus, batch_size=4))
    stream = make()
    take(stream, 7)
    state = json.loads(json.dumps(stream.get_state()))
    want = dense_rows(stream, 8)
    for other in (stream, make()):
      other.set_state(state)
      np.testing.assert_array_equal(dense_rows(other, 8), want)

  def test_two_processes_share_each_batch(self):
    make = lambda **part: document_batches.batches(
      self.corpus, batch_size=6, **part
    )
    parts = [take(make(shard_index=i, num_shards=2), 9) for i in range(2)]
    for whole, *halves in zip(take(make(), 9), *parts, strict=True):
      both = np.concatenate([to_dense(half) for half in halves])
      np.testing.assert_array_equal(both, to_dense(whole))

  @parameterized.parameters(
    (dict(batch_size=24), 'batch_size must lie between 1 and .* 23, got 24'),
    (dict(batch_size=4, seed=-1), 'seed must lie in'),
    (dict(batch_size=4, max_words=11), 'max_words must .*, 12, got 11'),
    (dict(batch_size=4, num_shards=3), 'multiple of num_shards'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      document_batches.batches(self.corpus, **settings)


class FileCase(parameterized.TestCase):
  """Writes the same documents in both formats."""

  def setUp(self):
    super().setUp()
    self.addCleanup(setattr, scanning, '_BLOCK', scanning._BLOCK)
    scanning._BLOCK = 90  # A few documents.
    self.dense = make_counts()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    lines = []
    for row in self.dense:
      pairs = [f'{word}:{row[word]}' for word in np.flatnonzero(row)]
      lines.append(' '.join([str(len(pairs)), *pairs]))
    (self.root / 'lda_c').write_text('\n'.join(lines))
    places = np.argwhere(self.dense)
    lines = [*map(str, self.dense.shape), str(len(places))]
    for row, word in places:
      lines.append(f'{row + 1} {word + 1} {self.dense[row, word]}')
    (self.root / 'uci').write_text('\n'.join(lines))

  def stream(self, name, **settings):
    return document_batches.stream(self.root / name, **settings)


class MeasureTest(FileCase):
  @parameterized.parameters(lda_c, uci_bag_of_words)
  def test_agrees_with_reading(self, module):
    path = self.root / module.__name__.split('.')[-1].split('_bag')[0]
    whole = module.read(path)
    found = document_batches.measure(path)
    self.assertEqual(
      found,
      (
        whole.num_documents,
        whole.num_words,
        whole.num_pairs,
        whole.num_tokens,
        whole.max_words,
      ),
    )
    self.assertEqual(found.num_tokens, self.dense.sum())
    words = self.root / 'words'
    words.write_text('w\n' * NUM_WORDS)
    self.assertEqual(document_batches.measure(path, words).num_words, NUM_WORDS)

  def test_refuses(self):
    path, words = self.root / 'lda_c', self.root / 'words'
    words.write_text('w\n' * 3)
    with self.assertRaisesRegex(ValueError, 'lda_c:.: .* word id from 0 to 2'):
      document_batches.measure(path, words)
    path.write_text('0\n0\n')
    with self.assertRaisesRegex(ValueError, 'got 2 documents, all empty'):
      document_batches.measure(path)


class StreamTest(FileCase):
  @parameterized.product(
    name=('lda_c', 'uci'), batch_size=(1, 5, 23), max_words=(None, 14)
  )
  def test_goes_round(self, name, batch_size, max_words):
    stream = self.stream(name, batch_size=batch_size, max_words=max_words)
    count = 60 // batch_size
    batches = take(stream, count)
    got = np.concatenate([to_dense(batch) for batch in batches])
    want = self.dense[np.arange(count * batch_size) % 23]
    np.testing.assert_array_equal(got, want)
    for batch in batches:
      longest = max(1, np.count_nonzero(to_dense(batch), axis=1).max())
      width = max_words or 2 ** int(np.ceil(np.log2(longest)))
      self.assertEqual(batch.counts.shape, (batch_size, width))
      self.assertEqual(batch.counts.dtype, np.float32)
      self.assertEqual(batch.word_ids.dtype, np.int32)

  @parameterized.product(
    name=('lda_c', 'uci'), zipped=(False, True), done=(0, 1, 3, 5, 6, 11)
  )
  def test_resumes(self, name, zipped, done):
    if zipped:
      path = self.root / name
      path.write_bytes(gzip.compress(path.read_bytes()))
    make = lambda: iter(self.stream(name, batch_size=4))
    stream = make()
    take(stream, done)
    state = json.loads(json.dumps(stream.get_state()))
    want = dense_rows(stream, 8)
    rows = (4 * done + np.arange(32)) % 23
    np.testing.assert_array_equal(want, self.dense[rows])
    for other in (stream, make()):
      other.set_state(state)
      self.assertEqual(other.get_state(), state)
      np.testing.assert_array_equal(dense_rows(other, 8), want)

  def test_reads_only_what_it_needs(self):
    """A broken line is met where it stands, and not on the way back there."""
    path = self.root / 'lda_c'
    stream = iter(self.stream('lda_c', batch_size=4))
    take(stream, 4)
    state = stream.get_state()
    self.assertGreater(state['start'][0], 90)
    lines = path.read_bytes()
    path.write_bytes(b'x' + lines[1:])
    stream.set_state(state)
    rows = dense_rows(stream, 1)
    np.testing.assert_array_equal(rows, self.dense[16:20])
    with self.assertRaisesRegex(ValueError, f'{path}:1: expected a document'):
      take(stream, 1)

  def test_feeds_a_run(self):
    batches = self.stream('uci', batch_size=4, max_words=12)
    source = feed.Feed(iter(batches))
    source.take(0, 3)
    position = source.position()
    want = source.take(3, 5)
    self.assertEqual(want.counts.shape, (5, 4, 12))
    other = feed.Feed(iter(batches))
    other.go_to(position)
    got = other.take(3, 5)
    np.testing.assert_array_equal(got.counts, want.counts)
    np.testing.assert_array_equal(got.word_ids, want.word_ids)

  def test_two_processes_share_each_batch(self):
    make = lambda **part: self.stream('uci', batch_size=6, **part)
    parts = [take(make(shard_index=i, num_shards=2), 9) for i in range(2)]
    for whole, *halves in zip(take(make(), 9), *parts, strict=True):
      both = np.concatenate([to_dense(half) for half in halves])
      np.testing.assert_array_equal(both, to_dense(whole))

  def test_checks_the_vocabulary(self):
    words = self.root / 'words'
    words.write_text('w\n' * 3)
    stream = self.stream('lda_c', batch_size=4, vocabulary=words)
    with self.assertRaisesRegex(ValueError, 'lda_c:.: .* word id from 0 to 2'):
      take(stream, 1)

  @parameterized.parameters(
    (
      dict(max_words=11),
      'at most 11 different words, .* got 12 in document 13',
    ),
    (dict(batch_size=24), 'expected 24 documents or more, .* got 23'),
  )
  def test_stops(self, settings, message):
    for name in ('lda_c', 'uci'):
      stream = self.stream(name, **(dict(batch_size=4) | settings))
      with self.assertRaisesRegex(
        ValueError, f'{self.root / name}: .*{message}'
      ):
        take(stream, 9)

  @parameterized.parameters(
    (dict(batch_size=0), 'batch_size and max_words must .* got 0'),
    (dict(batch_size=4, max_words=0), 'must be at least 1, got 4 and 0'),
    (dict(batch_size=4, num_shards=3), 'multiple of num_shards, 3, got 4'),
    (dict(batch_size=4, shard_index=1), r'shard_index must lie in \[0, 1\)'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      self.stream('uci', **settings)
    with self.assertRaisesRegex(ValueError, "expected 'docstrings' or a file"):
      self.stream('nowhere', batch_size=4)
