"""lda-c: what a loop over the lines reads, and a broken line is named."""

import gzip
import pathlib

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import lda_c, scanning

TEXT = '2 3:1 0:4\n0\n3 1:2 4:1 0:7\n'
DENSE = [[4, 0, 0, 1, 0], [0] * 5, [7, 2, 0, 0, 1]]
WORDS = ('a', 'b', 'c', 'd', 'e')


def write_random(path, num_documents=300, num_words=50, seed=0):
  """Writes documents in any order of words; gives the counts."""
  rng = np.random.default_rng(seed)
  dense = rng.poisson(0.3, (num_documents, num_words)) * rng.integers(
    1, 2000, (num_documents, num_words)
  )
  lines = []
  for row in dense:
    ids = rng.permutation(np.flatnonzero(row))
    lines.append(' '.join([str(ids.size), *(f'{i}:{row[i]}' for i in ids)]))
  path.write_text('\n'.join(lines) + '\n')
  return dense


def in_small_blocks(case, size):
  """Reads as many bytes at a time, in one test."""
  before = scanning._BLOCK
  case.addCleanup(setattr, scanning, '_BLOCK', before)
  scanning._BLOCK = size


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.root / 'ap.dat'
    self.path.write_text(TEXT)

  def test_reads(self):
    found = lda_c.read(self.path)
    np.testing.assert_array_equal(found.counts.toarray(), DENSE)
    self.assertEqual(found.counts.dtype, np.int32)
    self.assertEqual(found.counts.indices.tolist(), [0, 3, 0, 1, 4])
    self.assertIsNone(found.words)
    self.assertIsNone(found.labels)

  @parameterized.parameters(
    (TEXT.rstrip(),),
    (TEXT.replace('\n', '\r\n'),),
    (TEXT.replace(' ', '  '),),
    (TEXT.replace('\n', ' \t\n'),),
    (TEXT.replace(':4', ':0004'),),
  )
  def test_takes_other_spaces(self, text):
    self.path.write_bytes(text.encode())
    found = lda_c.read(str(self.path)).counts.toarray()
    np.testing.assert_array_equal(found, DENSE)

  @parameterized.parameters('ap.dat.gz', 'plain')
  def test_knows_gzip_by_its_bytes(self, name):
    path = self.root / name
    path.write_bytes(gzip.compress(TEXT.encode()))
    np.testing.assert_array_equal(lda_c.read(path).counts.toarray(), DENSE)

  @parameterized.product(block=(5, 64, 2**20), zipped=(False, True))
  def test_matches_a_loop(self, block, zipped):
    dense = write_random(self.path)
    if zipped:
      self.path.write_bytes(gzip.compress(self.path.read_bytes()))
    in_small_blocks(self, block)
    counts = lda_c.read(self.path).counts
    np.testing.assert_array_equal(counts.toarray(), dense)
    self.assertTrue(counts.has_canonical_format)
    again = counts.copy()
    again.has_canonical_format = False
    again.sum_duplicates()
    np.testing.assert_array_equal(again.indices, counts.indices)

  @parameterized.parameters(
    'ap_vocab.txt', 'ap.vocab', 'ap.tokens', 'vocab.ap.txt', 'vocab.txt'
  )
  def test_finds_the_vocabulary(self, name):
    (self.root / name).write_text('\n'.join([*WORDS, 'f']) + '\n')
    for suffix in ('.gz', ''):
      path = self.path.with_name(self.path.name + suffix)
      path.write_text(TEXT)
      found = lda_c.read(path)
      self.assertEqual(found.words, (*WORDS, 'f'))
      self.assertEqual(found.counts.shape, (3, 6))

  def test_takes_the_vocabulary_given(self):
    (self.root / 'vocab.txt').write_text('other\n')
    given = self.root / 'words'
    given.write_bytes(gzip.compress('é\nb\nc\nd\ne'.encode()))
    self.assertEqual(lda_c.read(self.path, given).words[0], 'é')

  def test_begins_anywhere(self):
    dense = write_random(self.path)
    in_small_blocks(self, 2000)
    blocks = list(lda_c.scan(self.path))
    self.assertGreater(len(blocks), 5)
    for i in (0, 3, len(blocks) - 1):
      start = blocks[i].start
      rest = list(lda_c.scan(self.path, start=start))
      self.assertEqual(rest[0].start, start)
      got = np.concatenate([block.sizes for block in rest])
      want = np.count_nonzero(dense[start.document :], axis=1)
      np.testing.assert_array_equal(got, want)

  @parameterized.parameters(
    ('1 0:1\n2 0:1\n', ':2: expected 2 pairs id:count, .* got 1'),
    ('1 0:1\n0 0:1\n', ':2: expected 0 pairs id:count, .* got 1'),
    ('1 0:1\n3\n', ':2: expected 3 pairs id:count, .* got 0'),
    ('1 0:1\n1 0:0\n', ':2: expected a count from 1 to 2147483647, got 0'),
    ('1 0:2147483648\n', ':1: expected a count from .* got 2147483648'),
    ('0\n2 1:1 2147483647:1\n', ':2: expected a word id from 0 to 2147483646'),
    ('1 0:1\n2 3:1 3:2\n', ':2: expected each word once .* got word 3 again'),
    ('3 5:1 3:1 5:2\n1 0:1\n', ':1: expected each word .* got word 5 again'),
    ('1 0:1\n\n1 0:1\n', ":2: expected a document .*, got ''"),
    ('1 0:1\n\n', ":2: expected a document .*, got ''"),
    ('1 0:1\n1 -3:1\n', ":2: expected a document .* got '1 -3:1'"),
    ('1 0:1\n1 0:-1\n', ":2: expected a document .* got '1 0:-1'"),
    ('1 0:1\n1 0:1.5\n', ":2: expected a document .* got '1 0:1.5'"),
    ('1 0:1\n1 cat:1\n', ":2: expected a document .* got '1 cat:1'"),
    ('1 0:1\n1 0: 1\n', ":2: expected a document .* got '1 0: 1'"),
    ('1 0:1\n2 0:1:2 3\n', ":2: expected a document .* got '2 0:1:2 3'"),
    ('1 0:1\n1 0:1 \n1:1\n', ":3: expected a document .* got '1:1'"),
    ('1 0:1\n1 0:1' + 20 * '0', ':2: expected a document'),
    ('1 0:1\n' + 99 * 'x', f":2: expected a document .* got '{60 * 'x'}'"),
    ('1 0:1\n\xff', ':2: expected a document'),
    ('0\n0\n', ': expected at least one word .* got 2 documents, all empty'),
    ('', ': expected at least one word .* got 0 documents'),
  )
  def test_refuses(self, text, message):
    for size in (4, 2**20):
      in_small_blocks(self, size)
      self.path.write_bytes(text.encode('latin-1'))
      with self.assertRaisesRegex(ValueError, f'^{self.path}{message}'):
        lda_c.read(self.path)

  def test_refuses_ids_beyond_the_vocabulary(self):
    words = self.root / 'words.txt'
    words.write_text('a\nb\nc\nd\n')
    message = f'{self.path}:3: expected a word id from 0 to 3, got 4'
    with self.assertRaisesRegex(ValueError, message):
      lda_c.read(self.path, words)

  @parameterized.parameters(
    (b'a\n\nb\n', ':2: expected a word, got none'),
    (b'a\n\xff\n', ":2: expected UTF-8, got '\N{REPLACEMENT CHARACTER}'"),
    (b'', ': expected one word per line, got an empty file'),
  )
  def test_refuses_a_vocabulary(self, content, message):
    words = self.root / 'vocab.txt'
    words.write_bytes(content)
    with self.assertRaisesRegex(ValueError, f'^{words}{message}'):
      lda_c.read(self.path)

  def test_refuses_a_missing_file(self):
    for path, words in ((self.root / 'no', None), (self.path, self.root / 'n')):
      with self.assertRaisesRegex(ValueError, 'n.*: expected a file, got none'):
        lda_c.read(path, words)

  def test_refuses_a_broken_gzip_file(self):
    write_random(self.path)
    whole = gzip.compress(self.path.read_bytes())
    in_small_blocks(self, 2000)
    damaged = bytearray(whole)
    damaged[-8] ^= 1  # Its checksum.
    for content in (whole[: len(whole) // 2], whole[:5], bytes(damaged)):
      self.path.write_bytes(content)
      message = rf'^{self.path}:\d+: expected a whole file, got one that is cut'
      with self.assertRaisesRegex(ValueError, message):
        lda_c.read(self.path)

  def test_accepts_what_a_loop_accepts(self):
    """Random damage: the same verdict, and the same line, as a plain parser."""
    rng = np.random.default_rng(0)
    good = b'2 3:1 0:4\n1 5:1\n0\n3 1:2 4:1 0:7\n'
    symbols = b'0123456789: \n-x'
    seen = set()
    for _ in range(300):
      text = bytearray(good)
      for _ in range(rng.integers(1, 3)):
        text[rng.integers(len(text))] = symbols[rng.integers(len(symbols))]
      self.path.write_bytes(text)
      wrong = _wrong_lines(bytes(text))
      seen.add(tuple(wrong))
      try:
        lda_c.read(self.path)
        found = None
      except ValueError as error:
        found = int(str(error).removeprefix(f'{self.path}:').split(':')[0])
      self.assertIn(found, wrong or [None], msg=text)
    self.assertContainsSubset({(), (1,), (2,), (4,)}, seen)


def _wrong_lines(text):
  """A parser of one line at a time, without any pattern."""
  wrong = []
  for number, line in enumerate(text.removesuffix(b'\n').split(b'\n'), 1):
    head, *fields = line.rstrip(b' ').split(b' ')
    pairs = [field.split(b':') for field in fields if field]
    numbers = [head, *(part for pair in pairs for part in pair)]
    if not (
      all(part.isdigit() for part in numbers)
      and all(len(pair) == 2 for pair in pairs)
      and int(head) == len(pairs)
      and all(int(count) > 0 for _, count in pairs)
      and len({int(word) for word, _ in pairs}) == len(pairs)
    ):
      wrong.append(number)
  return wrong
