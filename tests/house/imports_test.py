"""Imports run one way: experiments -> transforms -> emc2."""

import ast
import importlib.metadata
import re
import subprocess
import sys

from absl.testing import parameterized

from tests.house import tree

FOUNDATION = {
  'algorithm',
  'arguments',
  'compression',
  'csr',
  'densify',
  'indexed_slices',
  'kernels',
  'linalg',
  'mesh',
  'ring',
}
"""What every method may use, and what uses no method."""

CORE = {'jax', 'jaxtyping', 'numpy'}
TRANSFORMS = CORE | {'optax'}


def _room(name: str) -> str:
  """The package that an import name lies in."""
  for package in ('emc2.transforms', 'emc2.experiments'):
    if name == package or name.startswith(package + '.'):
      return package
  return 'emc2'


def _part(name: str) -> str:
  """The folder or file below emc2/ that an import name lies in."""
  return (name.split('.') + [''])[1]


def wrong_imports(name: str, imported: list[str]) -> list[str]:
  """The imports of module `name` that the rules of the house forbid.

  Args:
    name: The module's import name.
    imported: What it imports, as `tree.imports` gives it.

  Returns:
    A line for each of them.
  """
  room, wrong = _room(name), []
  allowed_rooms = {
    'emc2': {'emc2'},
    'emc2.transforms': {'emc2', 'emc2.transforms'},
    'emc2.experiments': set(tree.FOLDERS),
  }[room]
  allowed_others = {'emc2': CORE, 'emc2.transforms': TRANSFORMS}.get(room)
  for target in imported:
    top = target.split('.')[0]
    if target.startswith('.'):
      wrong.append(f'{name} imports {target}: write the name in full.')
    elif top in ('experiments', 'transforms', 'tests'):
      wrong.append(f'{name} imports {target}: that is no name of ours.')
    elif top != 'emc2':
      known = allowed_others is None or top in sys.stdlib_module_names
      if not known and top not in allowed_others:
        wrong.append(f'{name} imports {top}: {room} may not.')
    elif _room(target) not in allowed_rooms:
      wrong.append(f'{name} imports {target}: imports run the other way.')
    elif room == 'emc2' and name != 'emc2':
      mine, theirs = _part(name), _part(target)
      if theirs not in FOUNDATION | {mine}:
        wrong.append(f'{name} imports {target}: {mine} may not know it.')
  return wrong


class RuleTest(parameterized.TestCase):
  @parameterized.parameters(
    ('emc2.contrastive.emc2', 'emc2.transforms.lars'),
    ('emc2.contrastive.emc2', 'emc2.experiments.runner'),
    ('emc2.contrastive.emc2', 'emc2.topics.svi'),
    ('emc2.contrastive.emc2', 'optax.adam'),
    ('emc2.contrastive.emc2', '.estimator'),
    ('emc2.linalg.lanczos', 'emc2.contrastive.emc2'),
    ('emc2.mesh', 'emc2.contrastive'),
    ('emc2', 'emc2.transforms'),
    ('emc2.transforms.lars', 'emc2.experiments.runner'),
    ('emc2.transforms.lars', 'flax.nnx'),
    ('emc2.experiments.contrastive', 'transforms.lars'),
    ('emc2.experiments.contrastive', 'experiments'),
    ('emc2.experiments.contrastive', 'tests.house.tree'),
  )
  def test_refuses(self, name, target):
    self.assertLen(wrong_imports(name, [target]), 1)

  @parameterized.parameters(
    ('emc2', 'emc2.contrastive'),
    ('emc2.contrastive.emc2', 'emc2.contrastive.estimator'),
    ('emc2.contrastive.emc2', 'emc2.kernels.metropolis'),
    ('emc2.contrastive.emc2', 'jax.numpy'),
    ('emc2.contrastive.emc2', 'collections.abc.Callable'),
    ('emc2.kernels.metropolis.api', 'emc2.mesh'),
    ('emc2.transforms.lars', 'emc2.linalg.lanczos'),
    ('emc2.transforms.lars', 'optax'),
    ('emc2.experiments.contrastive', 'emc2.transforms.lars'),
    ('emc2.experiments.contrastive', 'flax.nnx'),
  )
  def test_allows(self, name, target):
    self.assertEmpty(wrong_imports(name, [target]))


class TreeTest(parameterized.TestCase):
  @parameterized.named_parameters(tree.cases(tree.all_modules()))
  def test_module(self, module):
    imported = list(tree.imports(module.parse()))
    self.assertEmpty(wrong_imports(module.name, imported))

  def test_tests_use_full_names(self):
    for path in tree.tests():
      for target in tree.imports(ast.parse(path.read_text())):
        top = target.split('.')[0]
        self.assertNotIn(top, ('', 'experiments', 'transforms'), msg=path)

  def test_what_is_imported_is_declared(self):
    """A fresh machine has what setup.cfg names, and no more than that."""
    declared = tree.option('options', 'install_requires')
    declared += tree.option('options.extras_require', 'experiments')
    declared = {_distribution(line) for line in declared}
    of = importlib.metadata.packages_distributions()
    for module in tree.all_modules():
      for target in tree.imports_at_import(module.parse()):
        top = target.split('.')[0]
        if top in sys.stdlib_module_names or top == 'emc2':
          continue
        found = {_distribution(name) for name in of.get(top, [])}
        self.assertTrue(found & declared, msg=f'{module.name} imports {top}')

  def test_import_touches_no_device(self):
    """What an import did to a device, a user could no longer choose."""
    names = [module.name for module in tree.all_modules()]
    code = (
      'import importlib, sys\n'
      'import jax\n'
      'for name in sys.argv[1:]:\n'
      '  importlib.import_module(name)\n'
      '  jax.config.update("jax_num_cpu_devices", 3)\n'
      'print(jax.device_count())\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', code, *names],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual((done.returncode, done.stdout), (0, '3\n'), done.stderr)


def _distribution(requirement: str) -> str:
  """The name of a requirement, spelt as an index spells it."""
  name = re.split(r'[\[<>=!~; ]', requirement, maxsplit=1)[0]
  return re.sub(r'[-_.]+', '-', name).lower()
