import json
import struct

import numpy as np
import pytest
from absl.testing import absltest
from tensorboardX.proto import event_pb2

from emc2.experiments import metrics


def _events(folder):
  """The (step, name, value) of all TensorBoard files of a folder."""
  found = []
  for path in sorted(folder.glob('events.*')):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      for value in event.summary.value:
        found.append((event.step, value.tag, value.simple_value))
      data = data[12 + size + 4 :]
  return found


class MetricsTest(absltest.TestCase):
  @pytest.fixture(autouse=True)
  def _workdir(self, tmp_path):
    self.folder = tmp_path

  def _write(self, after, *rows):
    writer = metrics.Writer(self.folder, after)
    for step, values in rows:
      writer.write(step, values)
    writer.close()

  def _lines(self):
    text = (self.folder / metrics.FILE).read_text()
    return [json.loads(line) for line in text.splitlines()]

  def test_lines_and_events(self):
    values = {'loss': np.float32(0.5), 'each': np.array([1.0, 3.0]), 'n': 2}
    self._write(None, (3, values))
    self.assertEqual(
      self._lines(), [{'step': 3, 'loss': 0.5, 'each': [1.0, 3.0], 'n': 2}]
    )
    self.assertEqual(
      _events(self.folder), [(3, 'loss', 0.5), (3, 'each', 2.0), (3, 'n', 2.0)]
    )

  def test_drops_lines_after_the_checkpoint(self):
    self._write(None, (1, {'a': 1.0}), (2, {'a': 2.0}), (3, {'a': 3.0}))
    with (self.folder / metrics.FILE).open('a') as file:
      file.write('{"step": 4, "a')
    self._write(2, (3, {'a': 4.0}))
    self.assertEqual([row['a'] for row in self._lines()], [1.0, 2.0, 4.0])
    self._write(None, (1, {'a': 5.0}))
    self.assertEqual([row['a'] for row in self._lines()], [5.0])

  def test_no_number_is_null(self):
    self._write(None, (1, {'a': np.nan}), (2, {'a': 1}), (3, {'a': -np.inf}))
    self.assertIsNone(self._lines()[0]['a'])
    steps, values = metrics.read(self.folder)['a']
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [np.nan, 1.0, np.nan])

  def test_read_gives_one_series_for_each_name(self):
    self._write(
      None,
      (0, {'error': 1.0}),
      (1, {'loss': np.array([2.0, 3.0])}),
      (2, {'loss': np.array([4.0, 5.0])}),
    )
    series = metrics.read(self.folder)
    self.assertEqual(sorted(series), ['error', 'loss'])
    np.testing.assert_array_equal(series['loss'][0], [1, 2])
    np.testing.assert_array_equal(series['loss'][1], [[2.0, 3.0], [4.0, 5.0]])

  def test_read_names_a_missing_file(self):
    with self.assertRaisesRegex(FileNotFoundError, 'metrics.jsonl'):
      metrics.read(self.folder)
