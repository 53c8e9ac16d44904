"""Docstrings of installed packages: which ones, in what order, whose label."""

import gc
import importlib.util
import pathlib
import sys

import numpy as np
from absl.testing import parameterized

from emc2.experiments.data import docstrings

FILES = {
  '__init__.py': '"""The package, and what it is for."""\nraise ImportError\n',
  'alone.py': "'''A module with a short function.'''\ndef f():\n  'short'\n",
  'broken.py': '"""A template of {{ name }}."""\ndef {{ name }}(): ...\n',
  'data/__init__.py': '',
  'data/_reader.py': '''
def read(path):
  r"""Reads \\d digits.

    By their hexadecimal names.
  """
  def inner():
    """A function that no import defines."""

def _private():
  """A function that nobody should call."""

class Reader:
  """Reads what there is to be read."""

  async def close(self):
    """Closes what there is to be closed."""

  def _close(self):
    """Closes what nobody should close."""

class _Hidden:
  """A class that nobody should make."""

  def visible(self):
    """A method that nobody should call."""

if True:
  try:
    import nothing
  except ImportError:
    def fallback():
      """Stands where nothing is there."""
''',
  'data/copy.py': '''
def read(path):
  """Reads what there is to be read."""

"""A string that is not a docstring."""
x = '\\d'
''',
  'data/reader_test.py': '"""A test of what there is to be read."""',
  'tests/__init__.py': '"""The tests, which are no documents."""',
  'test_all.py': '"""A test of what there is to be read."""',
  'conftest.py': '"""Settings of tests, no documents."""',
}
TEXTS = [
  'The package, and what it is for.',
  'A module with a short function.',
  'Reads \\d digits.\n\nBy their hexadecimal names.',
  'Reads what there is to be read.',
  'Closes what there is to be closed.',
  'Stands where nothing is there.',
]


def _write(root, package, files):
  for name, content in files.items():
    path = root / package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


class DocstringsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    _write(self.root, 'emc2_fake', FILES)
    sys.path.insert(0, str(self.root))
    self.addCleanup(sys.path.remove, str(self.root))
    importlib.invalidate_caches()

  def test_reads_what_is_public(self):
    found = docstrings.load(['emc2_fake'], min_chars=10)
    self.assertEqual(found.texts, TEXTS)
    self.assertNotIn('emc2_fake', sys.modules)
    self.assertEqual(found.names, ('emc2_fake',))
    np.testing.assert_array_equal(found.labels, np.zeros(6))
    self.assertEqual(found.labels.dtype, np.int32)
    self.assertTrue(gc.isenabled())

  @parameterized.parameters(
    (
      'module',
      ('emc2_fake', 'emc2_fake.alone', 'emc2_fake.data._reader'),
      [0, 1, 2, 2, 2, 2],
    ),
    (
      'subpackage',
      ('emc2_fake', 'emc2_fake.alone', 'emc2_fake.data'),
      [0, 1, 2, 2, 2, 2],
    ),
    ('package', ('emc2_fake',), [0] * 6),
  )
  def test_labels(self, label, names, labels):
    found = docstrings.load(['emc2_fake'], label=label, min_chars=10)
    self.assertEqual(found.names, names)
    self.assertEqual(found.labels.tolist(), labels)

  def test_leaves_out_rare_labels(self):
    _write(self.root, 'emc2_other', {'__init__.py': '"""Another package."""'})
    packages = ['emc2_other', 'emc2_fake']
    found = docstrings.load(packages, min_chars=10)
    self.assertEqual(found.texts, ['Another package.', *TEXTS])
    self.assertEqual(found.names, ('emc2_fake', 'emc2_other'))
    self.assertEqual(found.labels.tolist(), [1] + [0] * 6)
    found = docstrings.load(packages, min_chars=10, min_per_label=2)
    self.assertEqual(found.texts, TEXTS)
    self.assertEqual(found.names, ('emc2_fake',))
    self.assertEqual(found.labels.tolist(), [0] * 6)

  def test_bounds(self):
    found = docstrings.load(['emc2_fake'], min_chars=32)
    self.assertEqual(found.texts, [t for t in TEXTS if len(t) >= 32])
    found = docstrings.load(['emc2_fake'], min_chars=10, max_documents=3)
    self.assertEqual(found.texts, TEXTS[::2])
    found = docstrings.load(['emc2_fake'], min_chars=10, max_documents=7)
    self.assertEqual(found.texts, TEXTS)

  def test_takes_a_module_of_one_file(self):
    (self.root / 'emc2_single.py').write_text('"""A module of one file."""')
    found = docstrings.load(['emc2_single'], label='module', min_chars=10)
    self.assertEqual(found.texts, ['A module of one file.'])
    self.assertEqual(found.names, ('emc2_single',))

  def test_reads_installed_packages(self):
    first = docstrings.load(('optax', 'flax'), label='module')
    self.assertGreater(len(first.texts), 400)
    self.assertEqual(len(set(first.texts)), len(first.texts))
    self.assertGreaterEqual(min(map(len, first.texts)), 200)
    self.assertEqual(first.labels.shape, (len(first.texts),))
    used = np.unique(first.labels)
    np.testing.assert_array_equal(used, np.arange(len(first.names)))
    name = first.names.index('optax._src.alias')
    text = first.texts[np.flatnonzero(first.labels == name)[0]]
    self.assertIn('optimizer', text)
    again = docstrings.load(('optax', 'flax'), label='module')
    self.assertEqual(again.texts, first.texts)
    np.testing.assert_array_equal(again.labels, first.labels)

  def test_defaults_are_installed(self):
    for package in docstrings.DEFAULT:
      self.assertIsNotNone(importlib.util.find_spec(package), msg=package)

  @parameterized.parameters(
    (['emc2_missing'], {}, "installed packages, got 'emc2_missing'"),
    (['emc2_fake.data'], {}, "installed packages, got 'emc2_fake.data'"),
    ([''], {}, "installed packages, got ''"),
    (['_bisect'], {}, "Python sources, got none of '_bisect'"),
    (['sys'], {}, "Python sources, got none of 'sys'"),
    (['emc2_fake'], dict(min_chars=99), '99 characters.* got 0 documents'),
    ([], {}, r'got 0 documents of 0 labels in \(\)'),
    (
      ['emc2_fake'],
      dict(min_chars=10, min_per_label=7),
      'got 6 documents of 1 labels',
    ),
    (['emc2_fake'], dict(label='file'), "label must .* got 'file'"),
    (['emc2_fake'], dict(min_chars=0), 'min_chars must .* got 0'),
    (['emc2_fake'], dict(min_per_label=0), 'min_per_label must .* got 0'),
    (['emc2_fake'], dict(max_documents=0), 'max_documents must .* got 0'),
  )
  def test_refuses(self, packages, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      docstrings.load(packages, **settings)
