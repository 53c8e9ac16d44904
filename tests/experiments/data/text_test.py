"""Characters: every one comes back, and every window is where it should be."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from scipy import stats

from emc2.experiments.data import text as text_lib

VERSE = 'Thé quick brown fox\njumps over\tthe lazy dog — 𝛼.\n'


class MakeTest(parameterized.TestCase):
  def test_splits_and_numbers(self):
    text = text_lib.make(VERSE, validation=0.2)
    self.assertEqual(text.vocabulary, tuple(sorted(set(VERSE))))
    whole = np.concatenate([text.train, text.validation])
    self.assertEqual(
      whole.tolist(), [text.vocabulary.index(character) for character in VERSE]
    )
    self.assertLen(text.validation, round(0.2 * len(VERSE)))
    self.assertEqual((text.train.dtype, text.validation.dtype), (np.int32,) * 2)
    self.assertEqual(text.decode(whole), VERSE)
    self.assertEqual(text.decode(jnp.asarray(whole)), VERSE)
    np.testing.assert_array_equal(text.encode(VERSE), whole)
    self.assertEqual(text.encode(VERSE).dtype, np.int32)

  def test_holds_out_a_tenth(self):
    text = text_lib.make('ab' * 50)
    self.assertEqual((text.train.size, text.validation.size), (90, 10))

  def test_replaces_rare_characters(self):
    text = text_lib.make('aaaabbbccdzz', max_vocabulary=4, validation=0.3)
    other = text_lib.REPLACEMENT
    # Of c and z, equally frequent, the first stays.
    self.assertEqual(text.vocabulary, ('a', 'b', 'c', other))
    whole = np.concatenate([text.train, text.validation])
    self.assertEqual(text.decode(whole), 'aaaabbbcc' + 3 * other)
    self.assertEqual(text.encode('abcdé').tolist(), [0, 1, 2, 3, 3])
    text = text_lib.make('aaaabbbccdzz', max_vocabulary=5, validation=0.3)
    self.assertEqual(text.vocabulary, tuple('abcdz'))

  def test_encode_refuses_an_unknown_character(self):
    with self.assertRaisesRegex(ValueError, "text must .* got 'q'"):
      text_lib.make('abcabc', validation=0.5).encode('aqb')

  @parameterized.parameters(
    (dict(validation=0.0), r'validation must lie in \(0, 1\), got 0.0'),
    (dict(validation=1.0), 'got 1.0'),
    (dict(max_vocabulary=1), 'max_vocabulary must .* got 1'),
    (dict(text=''), 'text: expected 2 or more .* got 0 characters'),
    (dict(text='abcdefghij'), 'got 10 characters in all, of which 1 held out'),
    (dict(text='abcd', validation=0.8, source='x.txt'), 'x.txt: expected'),
  )
  def test_refuses(self, settings, message):
    settings = dict(text=VERSE) | settings
    with self.assertRaisesRegex(ValueError, message):
      text_lib.make(settings.pop('text'), **settings)


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'verse.txt'
    self.path.write_bytes(VERSE.encode())

  @parameterized.parameters(text_lib.read, text_lib.open)
  def test_reads_a_file(self, read):
    text = read(self.path, validation=0.2, max_vocabulary=10)
    want = text_lib.make(VERSE, validation=0.2, max_vocabulary=10)
    np.testing.assert_array_equal(text.train, want.train)
    np.testing.assert_array_equal(text.validation, want.validation)
    self.assertEqual(text.vocabulary, want.vocabulary)
    self.assertLen(text.vocabulary, 10)

  def test_keeps_line_ends(self):
    self.path.write_bytes(b'one\r\ntwo\rthree\n')
    text = text_lib.read(self.path, validation=0.2)
    whole = np.concatenate([text.train, text.validation])
    self.assertEqual(text.decode(whole), 'one\r\ntwo\rthree\n')

  @parameterized.parameters(
    (
      b'one\ntwo\n\xff\xfe',
      'expected UTF-8, got byte 0xff at offset 8, line 3',
    ),
    (b'one\xc3', 'got byte 0xc3 at offset 3, line 1'),
    (b'', 'got 0 characters'),
    (b'abc', 'got 3 characters'),
  )
  def test_refuses(self, content, message):
    self.path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, f'{self.path}: .*{message}'):
      text_lib.read(self.path)

  def test_refuses_a_missing_file(self):
    for path in (self.path.parent, self.path.parent / 'prose.txt'):
      with self.assertRaisesRegex(ValueError, f'{path}: expected a text file'):
        text_lib.open(path)


class DocstringsTest(parameterized.TestCase):
  def test_is_bounded(self):
    read = lambda: text_lib.read_docstrings(('optax',), max_characters=50_000)
    text = read()
    self.assertEqual((text.train.size, text.validation.size), (45_000, 5_000))
    self.assertBetween(len(text.vocabulary), 80, 100)
    self.assertIn('Args:\n', text.decode(text.train))
    again = read()
    np.testing.assert_array_equal(again.train, text.train)
    self.assertEqual(again.vocabulary, text.vocabulary)

  def test_options(self):
    text = text_lib.read_docstrings(
      ('optax',), max_characters=10_000, validation=0.2, max_vocabulary=30
    )
    self.assertEqual(text.validation.size, 2_000)
    self.assertLen(text.vocabulary, 30)
    self.assertIn(text_lib.REPLACEMENT, text.vocabulary)
    with self.assertRaisesRegex(ValueError, "got 'emc2_missing'"):
      text_lib.read_docstrings(('emc2_missing',))
    with self.assertRaisesRegex(ValueError, 'max_characters must .* got 0'):
      text_lib.read_docstrings(('optax',), max_characters=0)

  def test_both_parts_hold_all_packages(self):
    text = text_lib.open('docstrings', validation=0.3)
    self.assertEqual(text.train.size + text.validation.size, 1_000_000)
    self.assertLessEqual(len(text.vocabulary), 100)
    for tokens in (text.train, text.validation):
      part = text.decode(tokens)
      for word in ('optax.', 'np.', 'nnx.'):
        self.assertIn(word, part)


class WindowTest(parameterized.TestCase):
  def test_draws_every_place_alike(self):
    tokens = jnp.arange(100, 120, dtype=jnp.int32)
    draw = jax.jit(text_lib.sample_batch, static_argnums=(2, 3))
    batch = draw(jax.random.key(0), tokens, 20_000, 4)
    self.assertEqual((batch.shape, batch.dtype), ((20_000, 5), jnp.int32))
    starts = np.asarray(batch[:, 0]) - 100
    np.testing.assert_array_equal(
      batch, 100 + starts[:, None] + np.arange(5)[None, :]
    )
    counts = np.bincount(starts, minlength=16)
    self.assertLen(counts, 16)
    self.assertGreater(stats.chisquare(counts).pvalue, 1e-3)
    other = draw(jax.random.key(1), tokens, 20_000, 4)
    self.assertFalse(np.array_equal(other, batch))

  def test_takes_the_whole_of_a_short_text(self):
    batch = text_lib.sample_batch(jax.random.key(0), jnp.arange(5), 3, 4)
    np.testing.assert_array_equal(batch, np.tile(np.arange(5), (3, 1)))

  @parameterized.parameters(
    (13, 3, 10, [0, 3, 6, 9]),
    (12, 3, 10, [0, 4, 8]),
    (100, 3, 4, [0, 32, 64, 96]),
    (100, 3, 1, [0]),
    (4, 3, 9, [0]),
  )
  def test_windows(self, size, length, max_windows, starts):
    tokens = np.arange(size, dtype=np.int32) * 2
    got = text_lib.validation_windows(tokens, length, max_windows)
    want = [tokens[start : start + length + 1] for start in starts]
    np.testing.assert_array_equal(got, want)
    self.assertEqual(got.dtype, np.int32)
    device = text_lib.validation_windows(
      jnp.asarray(tokens), length, max_windows
    )
    self.assertIsInstance(device, jax.Array)
    np.testing.assert_array_equal(device, want)

  @parameterized.product(
    size=(4, 7, 10, 28, 39), length=(1, 3), max_windows=(2, 9)
  )
  def test_windows_predict_no_token_twice(self, size, length, max_windows):
    tokens = np.arange(size)
    windows = text_lib.validation_windows(tokens, length, max_windows)
    self.assertLen(windows, min(max_windows, (size - 1) // length))
    targets = windows[:, 1:].ravel()
    self.assertLen(np.unique(targets), targets.size)

  @parameterized.parameters(
    (4, 2, 4, 'tokens must be more than length, 4, got 4'),
    (9, 2, 0, 'length must be at least 1, got 0'),
    (9, 0, 4, 'must be at least 1, got 0'),
  )
  def test_refuses(self, size, count, length, message):
    tokens = jnp.arange(size)
    with self.assertRaisesRegex(ValueError, message):
      text_lib.sample_batch(jax.random.key(0), tokens, count, length)
    with self.assertRaisesRegex(ValueError, message):
      text_lib.validation_windows(tokens, length, count)
