"""svmlight: what scikit-learn reads, and a broken line is named."""

import gzip
import pathlib

import numpy as np
from absl.testing import parameterized
from sklearn import datasets

from emc2.experiments.data import examples, scanning, svmlight

TEXT = '2 1:0.5 3:-1e1\n-7\n2 2:.25 3:+3. 4:1\n'
DENSE = [[0.5, 0, -10, 0], [0, 0, 0, 0], [0, 0.25, 3, 1]]


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(setattr, scanning, '_BLOCK', scanning._BLOCK)
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.root / 'train.svm'
    self.path.write_text(TEXT)

  def test_reads(self):
    (found,) = svmlight.read(self.path)
    np.testing.assert_array_equal(found.rows.to_dense(), DENSE)
    np.testing.assert_array_equal(found.labels, [1, 0, 1])
    self.assertEqual(found.class_names, ('-7', '2'))
    self.assertEqual((found.num_rows, found.num_classes), (3, 2))
    self.assertEqual(found.labels.dtype, np.int32)
    self.assertEqual(
      [x.dtype for x in found.rows[:3]], [np.int64, np.int32, np.float32]
    )

  @parameterized.parameters(
    (TEXT.rstrip(),),
    (TEXT.replace('\n', '\r\n'),),
    (TEXT.replace(' ', ' \t '),),
    (TEXT.replace('\n', ' \n\n'),),
    ('# header 1:x\n' + TEXT.replace('\n', ' # a comment, 5:6\n'),),
    (TEXT.replace('2 ', '2 qid:12 '),),
    (TEXT.replace('1:0.5', '1:0.5 2:0'),),
    (TEXT.replace('-7\n', '-7.0e0\n'),),
  )
  def test_takes_other_forms(self, text):
    for size in (7, 2**20):
      scanning._BLOCK = size
      self.path.write_bytes(text.encode())
      (found,) = svmlight.read(str(self.path))
      np.testing.assert_array_equal(found.rows.to_dense(), DENSE)
      np.testing.assert_array_equal(found.labels, [1, 0, 1])
      self.assertTrue(np.all(found.rows.values))

  @parameterized.product(block=(50, 2**20), zipped=(False, True), first=(0, 1))
  def test_matches_scikit_learn(self, block, zipped, first):
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(200, 30)) * (rng.random((200, 30)) < 0.3)
    labels = rng.integers(-3, 4, 200)
    datasets.dump_svmlight_file(
      dense, labels, str(self.path), zero_based=first == 0
    )
    want, targets = datasets.load_svmlight_file(
      str(self.path), zero_based=first == 0
    )
    if zipped:
      self.path.write_bytes(gzip.compress(self.path.read_bytes()))
    scanning._BLOCK = block
    (found,) = svmlight.read(self.path)
    np.testing.assert_allclose(
      found.rows.to_dense(), want.toarray().astype(np.float32), rtol=1e-6
    )
    names = np.array(found.class_names, int)
    np.testing.assert_array_equal(names[found.labels], targets)

  def test_files_share_features_and_classes(self):
    test = self.root / 'test.svm'
    test.write_text('5 6:1\n2 1:2\n')
    train, held_out = svmlight.read(self.path, test)
    self.assertEqual(train.rows.shape, (3, 6))
    self.assertEqual(held_out.rows.shape, (2, 6))
    self.assertEqual(train.class_names, ('-7', '2', '5'))
    self.assertEqual(train.class_names, held_out.class_names)
    self.assertEqual(held_out.labels.tolist(), [2, 1])
    test.write_text('5 0:1\n')  # Then both count from 0.
    train, held_out = svmlight.read(self.path, test)
    self.assertEqual(train.rows.shape, (3, 5))
    self.assertEqual(train.rows.ids.tolist(), [1, 3, 2, 3, 4])

  def test_options(self):
    (found,) = svmlight.read(self.path, first_index=0)
    self.assertEqual(found.rows.shape, (3, 5))
    (found,) = svmlight.read(self.path, num_features=9)
    self.assertEqual(found.rows.shape, (3, 9))
    self.path.write_text('0.5 1:1\n-2e-3\n')
    (found,) = svmlight.read(self.path, labels='numbers')
    np.testing.assert_array_equal(found.labels, np.float32([0.5, -2e-3]))
    self.assertEqual(found.labels.dtype, np.float32)
    self.assertEqual((found.class_names, found.num_classes), ((), 0))

  @parameterized.parameters(
    ('1 1:2\n1 3;0.5\n', ":2: expected INDEX:VALUE, got '3;0.5'"),
    ('1 1:2\n1 3:\n', ":2: expected INDEX:VALUE, got '3:'"),
    ('1 1:2\n1 3: 4\n', ":2: expected INDEX:VALUE, got '3:'"),
    ('1 1:2\n1 :4\n', ":2: expected INDEX:VALUE, got ':4'"),
    ('1 1:2\n1 3:x 4:nan\n', ":2: expected INDEX:VALUE, got '3:x'"),
    ('1 1:2\n1 a:4\n', ":2: expected INDEX:VALUE, got 'a:4'"),
    ('1 1:2\n1 3:1e\n', ":2: expected INDEX:VALUE, got '3:1e'"),
    ('1 1:2\n1 3:1:2\n', ":2: expected INDEX:VALUE, got '3:1:2'"),
    ('1 1:2\n1 7\n', ":2: expected INDEX:VALUE, got '7'"),
    ('1 1:2\n1 -3:1\n', ":2: expected an index from 0 to .* got '-3:1'"),
    ('1 1:2\n1 3:nan\n', ":2: expected a finite value, got '3:nan'"),
    ('1 1:2\n1 3:-Inf\n', ":2: expected a finite value, got '3:-Inf'"),
    ('1 1:2\n1 3:1e999\n', ':2: expected a value that float32 holds, got inf'),
    ('1 1:2\n1 3:-1e39\n', ':2: expected a value that float32 .* -1e.39 of'),
    ('1 1:2\n\n#\n1 2147483648:1\n', ':4: expected an index .* got 214748364'),
    ('1 1:2\n1 1' + 15 * '0' + ':1\n', ':2: expected an index from 0 to'),
    ('1 1:2\n1 4:1 3:1\n', ':2: expected indices that rise, got 3 after 4'),
    ('1 1:2\n1 2:1 4:1 4:1\n', ':2: expected indices .* got 4 after 4'),
    ('1 1:2\n1:2 4:1\n', ":2: expected a label before the pairs, got '1:2'"),
    ('1 1:2\ncat 4:1\n', ":2: expected a number as label, got 'cat'"),
    ('1 1:2\nnan 4:1\n', ":2: expected a finite number as label, got 'nan'"),
    ('1 1:2\n1,3 4:1\n', ":2: expected one label, got several, '1,3'"),
    ('1 1:2\n1,a 4:1\n', ":2: expected a number as label, got '1,a'"),
    ('1 1:2\n1.5 4:1\n', ':2: expected a whole number as label .* got 1.5'),
    ('1 1:2\n1e40 4:1\n', ':2: expected a label that float32 holds, got 1'),
    ('1 1:2\n\xff\n', ':2: expected a number as label'),
    ('1 1:2\n1 ' + 99 * 'x', f":2: expected INDEX:VALUE, got '{57 * 'x'}...'"),
    ('', r": expected rows 'LABEL INDEX:VALUE ...', got an empty file"),
    ('#1 1:1\n\n', r": expected rows 'LABEL .*', got an empty file"),
  )
  def test_refuses(self, text, message):
    for size in (4, 2**20):
      scanning._BLOCK = size
      self.path.write_bytes(text.encode('latin-1'))
      with self.assertRaisesRegex(ValueError, f'^{self.path}{message}'):
        svmlight.read(self.path)

  def test_refuses_indices_beyond_the_options(self):
    self.path.write_text('1 1:2\n\n1\n1 0:1 7:1\n')
    for options, message in (
      (dict(first_index=1), ':4: expected an index from 1 to 7, got 0'),
      (dict(num_features=7), ':4: expected an index from 0 to 6, got 7'),
    ):
      with self.assertRaisesRegex(ValueError, f'^{self.path}{message}'):
        svmlight.read(self.path, **options)

  @parameterized.parameters(
    (dict(labels='class'), "labels must be one of .* got 'class'"),
    (dict(first_index=2), 'first_index must be 0, 1 or None, got 2'),
    (dict(num_features=0), 'num_features must be at least 1, got 0'),
  )
  def test_refuses_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      svmlight.read(self.path, **options)

  def test_refuses_missing_and_broken_files(self):
    with self.assertRaisesRegex(
      ValueError, 'no.svm: expected a file, got none'
    ):
      svmlight.read(self.path, self.root / 'no.svm')
    with self.assertRaisesRegex(ValueError, 'paths must name at least one'):
      svmlight.read()
    self.path.write_bytes(gzip.compress(TEXT.encode())[:-9])
    with self.assertRaisesRegex(ValueError, r'train.svm:\d+: expected a whole'):
      svmlight.read(self.path)

  @parameterized.parameters(
    ('a', '\n# x\n1 3:0.5\n', True),
    ('a', '-1\n', True),
    ('a.svm', 'x', True),
    ('a.svm.gz', 'x', True),
    ('a.libsvm', '', True),
    ('a', '1 2 3\n', False),
    ('a', '1::2::3::4\n', False),
    ('a', 'user,item,rating\n', False),
    ('a', '', False),
  )
  def test_knows_its_files(self, name, text, want):
    path = self.root / name
    path.write_text(text)
    self.assertEqual(svmlight.is_svmlight(path), want)


class ExamplesTest(parameterized.TestCase):
  def test_splits(self):
    rng = np.random.default_rng(0)
    dense = rng.integers(0, 3, (20, 4)).astype(np.float32)
    dense[:, 0] = np.arange(20)
    given = examples.Examples(
      examples.rows_lib.from_dense(dense), np.arange(20), ()
    )
    parts = examples.split(given, 0.25, seed=3)
    self.assertEqual([part.num_rows for part in parts], [15, 5])
    for part in parts:
      np.testing.assert_array_equal(part.rows.to_dense(), dense[part.labels])
      self.assertTrue(np.all(np.diff(part.labels) > 0))
    self.assertEqual(
      set(np.concatenate([p.labels for p in parts])), {*range(20)}
    )
    other = examples.split(given, 0.25, seed=4)[1].labels
    self.assertNotEqual(other.tolist(), parts[1].labels.tolist())

  @parameterized.parameters(0.0, 1.0, 0.01, 0.99)
  def test_refuses_a_part_without_rows(self, held_out):
    given = examples.Examples(
      examples.rows_lib.from_dense(np.eye(9)), np.arange(9), ()
    )
    with self.assertRaisesRegex(ValueError, 'held_out must'):
      examples.split(given, held_out)

  @parameterized.parameters(
    ([0, 1], (), 'labels must be one for each of the 3 rows'),
    ([0, 1, 2], ('a', 'b'), r'labels must lie in \[0, 2\).* got 2'),
    ([0, -1, 1], ('a', 'b'), r'labels must lie in \[0, 2\).* got -1'),
  )
  def test_refuses_labels(self, labels, names, message):
    rows = examples.rows_lib.from_dense(np.eye(3))
    with self.assertRaisesRegex(ValueError, message):
      examples.Examples(rows, np.array(labels), names)

  def test_paths(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    odd = folder / 'a,b'
    odd.write_text('')
    self.assertEqual(examples.paths_of(str(odd)), [odd])
    self.assertEqual(
      examples.paths_of('a,b'), [pathlib.Path('a'), pathlib.Path('b')]
    )
    for text in ('', 'a,', 'a,b,c'):
      with self.assertRaisesRegex(ValueError, 'data must name a file or two'):
        examples.paths_of(text)
