"""Each package states its public names once, and each name says what it is."""

import ast
import importlib
import inspect

from absl.testing import parameterized

from tests.house import tree

PACKAGES = [module for module in tree.all_modules() if module.is_package]


def _is_described(name: str, value: object) -> bool:
  """Whether a function, class or module has a docstring of its own."""
  if not (inspect.ismodule(value) or callable(value)):
    return True
  text = inspect.getdoc(value) or ''
  # A NamedTuple and a dataclass without a docstring get their signature.
  return bool(text) and not text.startswith(f'{name}(')


class PublicNamesTest(parameterized.TestCase):
  @parameterized.named_parameters(tree.cases(PACKAGES))
  def test_package(self, module):
    package = importlib.import_module(module.name)
    self.assertTrue(hasattr(package, '__all__'), msg='it must state __all__.')
    self.assertLen(set(package.__all__), len(package.__all__))
    for name in package.__all__:
      self.assertTrue(hasattr(package, name), msg=name)
      self.assertTrue(_is_described(name, getattr(package, name)), msg=name)

  @parameterized.named_parameters(tree.cases(PACKAGES))
  def test_only_names_stand_here(self, module):
    """No star, and what is imported is public, or it would be stated twice."""
    imported = []
    for node in module.parse().body:
      if isinstance(node, ast.ImportFrom):
        imported += [alias.asname or alias.name for alias in node.names]
      self.assertNotIsInstance(node, (ast.FunctionDef, ast.ClassDef))
    public = importlib.import_module(module.name).__all__
    self.assertContainsSubset(imported, public)


class TestsTest(parameterized.TestCase):
  def test_nothing_is_skipped_without_a_reason(self):
    for path in tree.tests():
      for line in _silent_skips(ast.parse(path.read_text())):
        self.fail(f'{path}:{line} skips without a reason.')

  @parameterized.parameters(
    '@unittest.expectedFailure\ndef f(): ...',
    '@pytest.mark.skip\ndef f(): ...',
    '@pytest.mark.xfail(strict=True)\ndef f(): ...',
    '@unittest.skipIf(True, "")\ndef f(): ...',
    'self.skipTest("")',
    'pytest.importorskip("torch")',
  )
  def test_finds(self, source):
    self.assertNotEmpty(list(_silent_skips(ast.parse(source))))

  @parameterized.parameters(
    '@pytest.mark.skipif(True, reason="No two processes here.")\ndef f(): ...',
    '@unittest.skipIf(True, "No two processes here.")\ndef f(): ...',
    'self.skipTest("No two processes here.")',
  )
  def test_passes(self, source):
    self.assertEmpty(list(_silent_skips(ast.parse(source))))


def _silent_skips(module: ast.AST) -> list[int]:
  """The lines that skip a test, or let it fail, and do not say why."""
  positions = {'skip': 0, 'skipTest': 0, 'skipIf': 1, 'skipUnless': 1}
  named = {'skip', 'skipif', 'xfail', 'importorskip'}
  uses = {*positions, *named, 'expectedFailure'}
  excused = set()
  for node in ast.walk(module):
    if not isinstance(node, ast.Call):
      continue
    name = getattr(node.func, 'attr', None)
    reasons = [word.value for word in node.keywords if word.arg == 'reason']
    if name in positions and len(node.args) > positions[name]:
      reasons.append(node.args[positions[name]])
    for reason in reasons:
      if not isinstance(reason, ast.Constant) or reason.value:
        excused.add(node.func)
  return [
    node.lineno
    for node in ast.walk(module)
    if isinstance(node, ast.Attribute)
    and node.attr in uses
    and node not in excused
  ]
