"""UCI's bags of words: what a loop reads, and a broken line is named."""

import gzip
import pathlib

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import scanning, uci_bag_of_words

HEADER = '4\n5\n5\n'
PAIRS = '2 4 1\n2 1 4\n4 2 2\n4 5 1\n4 1 7\n'
DENSE = [[0] * 5, [4, 0, 0, 1, 0], [0] * 5, [7, 2, 0, 0, 1]]


def write_random(path, num_documents=300, num_words=50, seed=0):
  """Writes documents in any order of words, some empty; gives the counts."""
  rng = np.random.default_rng(seed)
  dense = rng.poisson(0.3, (num_documents, num_words))
  dense *= rng.integers(1, 2000, dense.shape)
  dense[rng.random(num_documents) < 0.3] = 0
  dense[[0, -1]] = 0
  lines = [*map(str, dense.shape), str(np.count_nonzero(dense))]
  for document, row in enumerate(dense, 1):
    for word in rng.permutation(np.flatnonzero(row)):
      lines.append(f'{document} {word + 1} {row[word]}')
  path.write_text('\n'.join(lines) + '\n')
  return dense


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.root / 'docword.kos.txt'
    self.path.write_text(HEADER + PAIRS)

  def read_in_blocks(self, size):
    before = scanning._BLOCK
    self.addCleanup(setattr, scanning, '_BLOCK', before)
    scanning._BLOCK = size
    return uci_bag_of_words.read(self.path)

  def test_reads(self):
    found = uci_bag_of_words.read(self.path)
    np.testing.assert_array_equal(found.counts.toarray(), DENSE)
    self.assertEqual(found.counts.dtype, np.int32)
    self.assertEqual(found.counts.indices.tolist(), [0, 3, 0, 1, 4])
    self.assertIsNone(found.words)

  @parameterized.parameters(
    ((HEADER + PAIRS).rstrip(),),
    ((HEADER + PAIRS).replace('\n', '\r\n'),),
    (HEADER + PAIRS.replace(' ', '   '),),
  )
  def test_takes_other_spaces(self, text):
    self.path.write_bytes(text.encode())
    found = uci_bag_of_words.read(str(self.path)).counts.toarray()
    np.testing.assert_array_equal(found, DENSE)

  @parameterized.product(block=(5, 200, 2**20), zipped=(False, True))
  def test_matches_a_loop(self, block, zipped):
    dense = write_random(self.path)
    if zipped:
      self.path.write_bytes(gzip.compress(self.path.read_bytes()))
    counts = self.read_in_blocks(block).counts
    np.testing.assert_array_equal(counts.toarray(), dense)
    again = counts.copy()
    again.has_canonical_format = False
    again.sum_duplicates()
    np.testing.assert_array_equal(again.indices, counts.indices)

  @parameterized.product(
    name=('vocab.kos.txt', 'vocab.txt'), suffix=('', '.gz')
  )
  def test_finds_the_vocabulary(self, name, suffix):
    (self.root / name).write_text('a\nb\nc\nd\ne\n')
    path = self.root / f'docword.kos.txt{suffix}'
    path.write_text(HEADER + PAIRS)
    self.assertEqual(uci_bag_of_words.read(path).words, tuple('abcde'))

  def test_takes_the_vocabulary_given(self):
    (self.root / 'vocab.txt').write_text('other\n')
    given = self.root / 'words'
    given.write_text('e\nd\nc\nb\na\n')
    found = uci_bag_of_words.read(self.path, given)
    self.assertEqual(found.words, tuple('edcba'))

  def test_begins_anywhere(self):
    dense = write_random(self.path)
    self.read_in_blocks(300)
    blocks = list(uci_bag_of_words.scan(self.path))
    self.assertGreater(len(blocks), 5)
    for i in (0, 1, 5, len(blocks) - 1):
      start = blocks[i].start
      rest = list(uci_bag_of_words.scan(self.path, start=start))
      self.assertEqual(rest[0].start, start)
      got = np.concatenate([block.sizes for block in rest])
      want = dense[start.document :]
      np.testing.assert_array_equal(got, np.count_nonzero(want, axis=1))
      got = np.concatenate([block.counts for block in rest])
      np.testing.assert_array_equal(got, want[want > 0])

  @parameterized.parameters(
    ('', ":1: expected the number of documents, from 1 to .* got ''"),
    ('4\n', ":2: expected the number of words, from 1 to .* got ''"),
    ('4\n5\n', ":3: expected the number of pairs, from 1 to .* got ''"),
    ('0\n5\n1\n1 1 1\n', ":1: .* documents, from 1 to .* got '0'"),
    ('4\n0\n1\n1 1 1\n', ":2: .* words, from 1 to .* got '0'"),
    ('4\n5\n0\n', ":3: .* pairs, from 1 to .* got '0'"),
    ('4\nfive\n1\n1 1 1\n', ":2: .* got 'five'"),
    ('2147483648\n5\n1\n1 1 1\n', ":1: .* got '2147483648'"),
    (f'{"9" * 99}\n5\n1\n', ":1: .* got '9999"),
    ('4 5 5\n2 4 1\n', ":1: .* got '4 5 5'"),
  )
  def test_refuses_a_header(self, text, message):
    self.path.write_text(text)
    with self.assertRaisesRegex(ValueError, f'^{self.path}{message}'):
      uci_bag_of_words.read(self.path)

  @parameterized.parameters(
    ('2 1 4', '2 1', ":5: expected a pair 'document word count', got '2 1'"),
    ('2 1 4', '2 1 4 4', ":5: expected a pair .* got '2 1 4 4'"),
    ('2 1 4', '', ":5: expected a pair .* got ''"),
    ('2 1 4', '2 cat 4', ":5: expected a pair .* got '2 cat 4'"),
    ('2 1 4', '2 1 -4', ":5: expected a pair .* got '2 1 -4'"),
    ('2 1 4', '2 1 0', ':5: expected a count from 1 to 2147483647, got 0'),
    ('2 1 4', '2 0 4', ':5: expected a word id from 1 to 5, got 0'),
    ('2 1 4', '2 6 4', ':5: expected a word id from 1 to 5, got 6'),
    ('2 1 4', '2 4 4', ':5: expected each word once .* got word 4 again'),
    ('4 1 7', '4 2 7', ':8: expected each word once .* got word 2 again'),
    ('2 1 4', '1 1 4', ':5: expected a document from 2 .* to 4, got 1'),
    ('2 4 1', '0 4 1', ':4: expected a document from 1 .* to 4, got 0'),
    ('4 1 7', '5 1 7', ':8: expected a document from 4 .* to 4, got 5'),
    ('4 1 7', '3 1 7', ':8: expected a document from 4 .* got 3'),
    (
      '4 1 7\n',
      '',
      ':8: expected 5 pairs, as line 3 says, got the end .* after 4',
    ),
    (
      '4 1 7\n',
      '4 1 7\n4 3 1\n',
      ':9: expected no more than 5 pairs, as line 3 says, got another',
    ),
  )
  def test_refuses(self, right, wrong, message):
    self.path.write_text(HEADER + PAIRS.replace(right, wrong))
    for block in (6, 2**20):
      with self.assertRaisesRegex(ValueError, f'^{self.path}{message}'):
        self.read_in_blocks(block)

  def test_refuses_another_vocabulary(self):
    (self.root / 'vocab.txt').write_text('a\nb\n')
    message = f'{self.path}:2: expected the number of words .*, 2, got 5'
    with self.assertRaisesRegex(ValueError, message):
      uci_bag_of_words.read(self.path)

  def test_refuses_a_broken_gzip_file(self):
    write_random(self.path)
    whole = gzip.compress(self.path.read_bytes())
    for content in (whole[: len(whole) // 2], whole[:5]):
      self.path.write_bytes(content)
      message = rf'^{self.path}:\d+: expected a whole file, got one that is cut'
      with self.assertRaisesRegex(ValueError, message):
        self.read_in_blocks(500)

  def test_refuses_a_missing_file(self):
    with self.assertRaisesRegex(ValueError, 'no: expected a file, got none'):
      uci_bag_of_words.read(self.root / 'no')
