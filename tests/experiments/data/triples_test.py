"""Rating triples: any form of them is read, and a broken line is named."""

import gzip
import pathlib

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import scanning, triples

TEXT = '10\t3\t4\t881250949\n9\t3\t2.5\t881250950\n10\t20\t1\t881250951\n'


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(setattr, scanning, '_BLOCK', scanning._BLOCK)
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.root / 'u.data'
    self.path.write_text(TEXT)

  def check(self, found, users=('9', '10'), items=('3', '20')):
    self.assertEqual(found.user_names, users)
    self.assertEqual(found.item_names, items)
    self.assertEqual(found.users.tolist(), [1, 0, 1])
    self.assertEqual(found.items.tolist(), [0, 0, 1])
    self.assertEqual(found.values.tolist(), [4, 2.5, 1])
    self.assertEqual(found.users.dtype, np.int32)
    self.assertEqual(found.items.dtype, np.int32)
    self.assertEqual(found.values.dtype, np.float32)
    self.assertEqual(
      (found.num_ratings, found.num_users, found.num_items), (3, 2, 2)
    )

  @parameterized.parameters(
    (TEXT,),
    (TEXT.rstrip(),),
    ('\n' + TEXT.replace('\n', '\r\n') + '\n\n',),
    (TEXT.replace('\t', '::'),),
    (TEXT.replace('\t', ','),),
    (TEXT.replace('\t', ' ;'),),
    (TEXT.replace('\t', '  '),),
    ('user,item,rating\n10,3,4\n9,3,2.5\n10,20,1\n',),
    ('u\ti\tr\tt\n' + TEXT,),
    ('"u";"i";"r"\n"10";"3";"4"\n"9";"3";"2.5"\n"10";"20";"1"\n',),
    ('10 3 4\n9 3 2.5\n10 20 1\n',),
    ('\ufeffu,i,r\n10,3,4\n9,3,2.5\n10,20,1\n',),
  )
  def test_forms(self, text):
    for size in (5, 40, 2**20):
      scanning._BLOCK = size
      self.path.write_bytes(text.encode())
      self.check(triples.read(self.path)[0])
    self.path.write_bytes(gzip.compress(text.encode()))
    self.check(triples.read(str(self.path))[0])

  def test_names_of_any_form(self):
    self.path.write_text('Zoé,x-1,4\n007,x-1,2.5\nZoé,"y, 2",1\n')
    (found,) = triples.read(self.path)
    self.check(found, ('007', 'Zoé'), ('x-1', 'y, 2'))
    self.path.write_text('10 a 4\n9 a 2.5\n10 b 1\n')
    self.check(triples.read(self.path)[0], ('9', '10'), ('a', 'b'))

  def test_matches_a_loop(self):
    rng = np.random.default_rng(0)
    given = np.stack(
      [rng.integers(50, 90, 500), rng.integers(7, 40, 500)], axis=1
    )
    stars = rng.integers(1, 6, 500)
    lines = [f'{u},{i},{r}' for (u, i), r in zip(given, stars, strict=True)]
    lines[300] = lines[300].replace(',', ',x', 1)  # From here on, words.
    self.path.write_text('\n'.join(lines))
    scanning._BLOCK = 300
    (found,) = triples.read(self.path)
    for k, line in enumerate(lines):
      user, item, rating = line.split(',')
      self.assertEqual(found.user_names[found.users[k]], user)
      self.assertEqual(found.item_names[found.items[k]], item)
      self.assertEqual(found.values[k], float(rating))

  def test_files_share_users_and_items(self):
    other = self.root / 'u.test'
    other.write_text('9\t4\t3\t0\n11\t3\t2\t0\n')
    train, test = triples.read(self.path, other)
    self.assertEqual(train.user_names, ('9', '10', '11'))
    self.assertEqual(train.item_names, test.item_names)
    self.assertEqual(test.users.tolist(), [0, 2])
    self.assertEqual(test.items.tolist(), [1, 0])
    self.assertEqual(train.items.tolist(), [0, 0, 2])

  def test_one_hot(self):
    found = triples.one_hot(triples.read(self.path)[0])
    np.testing.assert_array_equal(
      found.rows.to_dense(), [[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    )
    np.testing.assert_array_equal(found.labels, [4, 2.5, 1])
    self.assertEqual(found.rows.ids.dtype, np.int32)

  def test_split(self):
    self.path.write_text(''.join(f'{i} {i % 7} {i}\n' for i in range(50)))
    (given,) = triples.read(self.path)
    train, test = triples.split(given, 0.2, seed=1)
    self.assertEqual((train.num_ratings, test.num_ratings), (40, 10))
    for part in (train, test):
      np.testing.assert_array_equal(part.users, part.values)
      np.testing.assert_array_equal(part.items, part.values % 7)
      self.assertEqual(part.num_users, 50)
    both = np.concatenate([train.values, test.values])
    np.testing.assert_array_equal(np.sort(both), np.arange(50))
    other = triples.split(given, 0.2, seed=2)[1]
    self.assertNotEqual(other.values.tolist(), test.values.tolist())

  @parameterized.parameters(
    ('1,2,3\n1,2\n', ":2: expected 3 fields, .* got 2 in '1,2'"),
    ('1,2,3\n1,2,3,4\n', ':2: expected 3 fields, .* got 4'),
    ('1,2,3\n\n1,2,x\n', ":3: expected a finite number as rating, got 'x'"),
    ('u,i,r\n1,2,nan\n', ":2: expected a finite number as rating, got 'nan'"),
    ('1,2,3\n1,2,inf\n', ":2: expected a finite number as rating, got 'inf'"),
    ('1,2,3\n\n1,2,1e39\n', ':3: expected a rating that float32 holds, got 1e'),
    ('u,i,r\n1,2,1e39\n', ':2: expected a rating that float32 holds, got 1e'),
    ('1,2,3\n1,,4\n', ":2: expected a name of the item, got '1,,4'"),
    ('1,2,3\n ,2,4\n', ":2: expected a name of the user, got ' ,2,4'"),
    ('1,2\n1,2\n', ":1: expected 'user item rating' or .* got '1,2'"),
    ('1 2 3 4 5\n', ":1: expected 'user item rating' or .* got '1 2 3 4 5'"),
    ('1,2,3\n\xff,2,3\n', ':2: expected UTF-8'),
    ('', ": expected lines 'user item rating', got an empty file"),
    ('u,i,r\n\n', ": expected lines 'user item rating', got an empty file"),
  )
  def test_refuses(self, text, message):
    for size in (4, 2**20):
      scanning._BLOCK = size
      self.path.write_bytes(text.encode('latin-1'))
      with self.assertRaisesRegex(ValueError, f'^{self.path}{message}'):
        triples.read(self.path)

  def test_refuses_missing_and_broken_files(self):
    with self.assertRaisesRegex(ValueError, 'no: expected a file, got none'):
      triples.read(self.root / 'no')
    with self.assertRaisesRegex(ValueError, 'paths must name at least one'):
      triples.read()
    self.path.write_bytes(gzip.compress(TEXT.encode())[:-9])
    with self.assertRaisesRegex(ValueError, r'u.data:\d+: expected a whole'):
      triples.read(self.path)
    self.path.write_text(TEXT)
    with self.assertRaisesRegex(ValueError, r'held_out must lie in \(0, 1\)'):
      triples.split(triples.read(self.path)[0], 1.0)
