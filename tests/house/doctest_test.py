"""The examples in the docstrings of the three packages run."""

import ast
import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

from tests.house import tree

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NAMES = {'jax': jax, 'jnp': jnp, 'np': np, 'optax': optax}
"""What an example need not import."""


def examples(module: tree.Module) -> list[doctest.DocTest]:
  """Reads the examples of a file; a decorator hides none from the source."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
  found = []
  for node in ast.walk(module.parse()):
    text = ast.get_docstring(node) if isinstance(node, kinds) else None
    if text and '>>>' in text:
      name = f'{module.name}.{getattr(node, "name", "__doc__")}'
      line = getattr(node, 'lineno', 0)
      parser = doctest.DocTestParser()
      test = parser.get_doctest(text, {}, name, str(module.path), line)
      found.append(test)
  return found


class DoctestTest(parameterized.TestCase):
  @parameterized.named_parameters(tree.cases(tree.all_modules()))
  def test_module(self, module):
    names = {**NAMES, **vars(importlib.import_module(module.name))}
    for test in examples(module):
      test.globs = dict(names)
      report = []
      doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
      self.assertEmpty(report, msg='\n' + ''.join(report))

  @parameterized.parameters(*tree.FOLDERS)
  def test_package_has_examples(self, package):
    found = [examples(module) for module in tree.modules(package)]
    self.assertTrue(any(found))
