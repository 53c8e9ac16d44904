"""Sizing with devices that are here, and what it says of those that are not."""

import pathlib
import tempfile

import jax
import pytest
from absl.testing import parameterized

from emc2.experiments import scale

SMALL = scale.Corpus(num_documents=80, num_words=40, num_pairs=900)


class MeasureTest(parameterized.TestCase):
  def plan(self, **settings):
    build = lambda devices: scale.esvi_step(
      devices, corpus=SMALL, tile=16, refresh_every=0, **settings
    )
    return scale.Plan('small', '8 CPUs', build, 1.0)

  def test_counts_bytes_of_a_device(self):
    plan = self.plan(num_topics=4, storage='phi')
    row = scale.measure(plan, jax.devices())
    # Ten documents, five words, 8 cells of one tile of 16 pairs.
    state = 4 * (10 * 4 + 5 * 4 + 4 + 1 + 8 * 16 * 4)
    cells = 8 * 16 * 12
    self.assertEqual(row['argument_bytes'], state + cells)
    self.assertTrue(row['fits'])
    self.assertEqual(row['chips'], 8)

  def test_counts_exchanges(self):
    row = scale.measure(self.plan(num_topics=4, storage='topk'), jax.devices())
    self.assertEqual(row['collective_permute'], 1)
    self.assertEqual(row['all_reduce'], 2)
    self.assertEqual(row['all_gather'], 0)

  def test_writes_a_table(self):
    row = scale.measure(self.plan(num_topics=4, storage='phi'), jax.devices())
    refused = {k: row[k] for k in ('name', 'topology', 'chips')}
    refused |= {'message_bytes': 1.0, 'error': 'too large'}
    refused |= {name: 0 for name in scale.COLLECTIVES}
    about = {'date': 'now', 'commit': 'x', 'versions': {'jax': '0'}}
    page = scale.markdown('esvi', [row, refused], about)
    lines = [line for line in page.splitlines() if line.startswith('| small')]
    self.assertLen(lines, 2)
    self.assertIn('| yes |', lines[0])
    self.assertIn('| too large | - | **no** |', lines[1])
    columns = {line.count('|') for line in page.splitlines() if '|' in line}
    self.assertLen(columns, 1)

  def test_refuses_an_unknown_name(self):
    with self.assertRaisesRegex(ValueError, "the name must be one of .* 'no'"):
      scale.run('no', pathlib.Path('unused'))

  @pytest.mark.slow
  def test_compiles_for_a_tpu(self):
    """Where `libtpu` is; else it says that it is not."""
    plans = scale.PLANS['esvi']()
    self.assertLen({(plan.name, plan.topology) for plan in plans}, len(plans))
    with tempfile.TemporaryDirectory() as folder:
      try:
        rows = scale.run('esvi', pathlib.Path(folder))
      except ValueError as error:
        self.assertIn('libtpu must be installed', str(error))
      else:
        self.assertTrue(all('error' not in row for row in rows))
