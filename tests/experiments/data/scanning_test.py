"""Whole lines come from any place of a file, in blocks of any size."""

import contextlib
import gzip
import io
import pathlib

from absl.testing import parameterized

from emc2.experiments.data import (
  document_batches,
  lda_c,
  scanning,
  uci_bag_of_words,
)

TEXT = b'one\n\nthree three three\nfour\r\nfive'


class ReadLinesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for name in ('_BLOCK', '_DELAY'):
      self.addCleanup(setattr, scanning, name, getattr(scanning, name))
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'file'

  def write(self, zipped, text=TEXT):
    self.path.write_bytes(gzip.compress(text) if zipped else text)

  @parameterized.product(zipped=(False, True), block=(1, 3, 7, 100))
  def test_gives_all_lines(self, zipped, block):
    self.write(zipped)
    scanning._BLOCK = block
    whole = TEXT + b'\n'
    parts = list(scanning.read_lines(self.path))
    self.assertEqual(b''.join(part.text for part in parts), whole)
    for part in parts:
      self.assertTrue(part.text.endswith(b'\n'))
      self.assertEqual(whole.find(part.text, part.offset), part.offset)
      self.assertEqual(part.first, 1 + whole.count(b'\n', 0, part.offset))
      rest = list(scanning.read_lines(self.path, part.offset, part.first))
      self.assertEqual(rest[0].offset, part.offset)
      self.assertEqual(rest[0].first, part.first)
      text = b''.join(other.text for other in rest)
      self.assertEqual(text, whole[part.offset :])

  @parameterized.product(zipped=(False, True), block=(1, 100))
  def test_first_lines(self, zipped, block):
    self.write(zipped)
    scanning._BLOCK = block
    found = scanning.first_lines(self.path, 3)
    self.assertEqual(found, [b'one\n', b'\n', b'three three three\n'])
    self.assertLen(scanning.first_lines(self.path, 9), 5)
    self.write(zipped, b'x' * 200)
    self.assertEqual(scanning.first_lines(self.path, 1), [b'x' * 80])
    self.write(zipped, b'')
    self.assertEmpty(scanning.first_lines(self.path, 1))

  @parameterized.parameters(
    (lda_c, '1 0:1\n'), (uci_bag_of_words, '1\n1\n1\n1 1 1\n')
  )
  def test_shows_progress(self, module, text):
    """A long file does; a short one, and a stream, do not."""
    self.write(False, text.encode())

    def shown(work):
      with contextlib.redirect_stderr(io.StringIO()) as stderr:
        work()
      return f'Reading {self.path.name}' in stderr.getvalue()

    read = lambda: module.read(self.path)
    scan = lambda: list(module.scan(self.path))
    measure = lambda: document_batches.measure(self.path)
    self.assertEqual([shown(read), shown(scan)], [False, False])
    scanning._DELAY = 0
    self.assertEqual(
      [shown(read), shown(scan), shown(measure)], [True, False, True]
    )
