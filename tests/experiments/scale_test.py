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

  def test_softmax_regression_exchanges_blocks_alone(self):
    data = scale.Sparse(
      num_rows=128, num_features=10, num_outputs=32, per_row=3
    )
    for refresh, rotations in (('fused', 1), ('two_pass', 2)):
      build = lambda devices, refresh=refresh: scale.ds_mlr_step(
        devices, data=data, num_minibatches=2, refresh=refresh
      )
      plan = scale.Plan('small', '8 CPUs', build, 1.0)
      row = scale.measure(plan, jax.devices())
      self.assertEqual(row['collective_permute'], rotations)
      self.assertEqual(row['all_gather'] + row['all_reduce'], 0)
      # Four classes of ten features, and rows without their features.
      self.assertGreater(row['argument_bytes'], 4 * 4 * 10 + 3 * 4 * 16)

  def test_factorisation_machines_exchange_blocks_and_a_number(self):
    data = scale.Sparse(num_rows=128, num_features=40, num_outputs=4, per_row=3)
    build = lambda devices: scale.ds_facto_step(devices, data=data)
    plan = scale.Plan('small', '8 CPUs', build, 1.0)
    row = scale.measure(plan, jax.devices())
    self.assertEqual(row['collective_permute'], 2)  # Linear, and factors.
    self.assertEqual((row['all_gather'], row['all_reduce']), (0, 1))

  @parameterized.parameters(*scale.PLANS)
  def test_plans_have_names_of_their_own(self, name):
    plans = scale.PLANS[name]()
    self.assertLen({(plan.name, plan.topology) for plan in plans}, len(plans))

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
    with tempfile.TemporaryDirectory() as folder:
      try:
        rows = scale.run('esvi', pathlib.Path(folder))
      except ValueError as error:
        self.assertIn('libtpu must be installed', str(error))
      else:
        self.assertTrue(all('error' not in row for row in rows))
