"""Each notebook is committed bare, and runs at smoke size."""

import os
import pathlib
from unittest import mock

import pytest
from absl.testing import parameterized

nbformat = pytest.importorskip('nbformat', reason='extra notebooks')
nbclient = pytest.importorskip('nbclient', reason='extra notebooks')

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted(
  (path.name,) for path in (ROOT / 'notebooks').glob('*.ipynb')
)


def _read(name):
  return nbformat.read(ROOT / 'notebooks' / name, as_version=4)


class NotebooksTest(parameterized.TestCase):
  def test_there_are_notebooks(self):
    self.assertNotEmpty(NOTEBOOKS)

  @parameterized.parameters(*NOTEBOOKS)
  def test_is_valid_and_bare(self, name):
    notebook = _read(name)
    nbformat.validate(notebook)
    self.assertEqual(notebook.cells[0].cell_type, 'markdown')
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    self.assertIn("if 'google.colab' in sys.modules:", cells[0].source)
    self.assertIn('EMC2_SMOKE', ''.join(cell.source for cell in cells))
    for cell in cells:
      self.assertEmpty(cell.outputs)
      self.assertIsNone(cell.execution_count)

  @parameterized.parameters(*NOTEBOOKS)
  # Of the event loop and the sockets between this process and the kernel.
  @pytest.mark.filterwarnings('ignore')
  @pytest.mark.slow  # `make notebooks` runs them too.
  def test_runs(self, name):
    notebook = _read(name)
    client = nbclient.NotebookClient(notebook, timeout=600)
    with mock.patch.dict(os.environ, {'EMC2_SMOKE': '1'}):
      client.execute(cwd=self.create_tempdir().full_path)
    pictures = [
      output
      for cell in notebook.cells
      if cell.cell_type == 'code'
      for output in cell.outputs
      if 'image/png' in output.get('data', {})
    ]
    self.assertGreater(len(pictures), 1)
