"""Key first, then state, in every algorithm."""

import ast

from absl.testing import parameterized

from tests.house import tree

STATES = ('state', 'memory')
"""What a step carries: a whole state, or an estimator's part of one."""


def wrong_signatures(module: ast.AST) -> list[str]:
  """The functions whose first arguments the rules of the house forbid.

  Closures count, since a factory gives them out.

  Args:
    module: A parsed file.

  Returns:
    A line for each of them.
  """
  wrong = []
  for node in ast.walk(module):
    if not isinstance(node, ast.FunctionDef):
      continue
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
    names = names[1:] if names[:1] == ['self'] else names
    if node.name == 'init' and names[:1] != ['key']:
      wrong.append(f'init({", ".join(names)}) must take key first.')
    is_step = node.name in ('step', 'surrogate')
    if is_step and names[:2] not in [['key', state] for state in STATES]:
      wrong.append(
        f'{node.name}({", ".join(names)}) must take key, then state.'
      )
  return wrong


class RuleTest(parameterized.TestCase):
  @parameterized.parameters(
    'def init(params): ...',
    'def init(): ...',
    'def init(params, *, key): ...',
    'def step(state, key): ...',
    'def step(key, batch): ...',
    'def surrogate(params, key, state): ...',
    'def factory():\n  def step(carry, x): ...',
    'class Algorithm:\n  def step(self, state): ...',
  )
  def test_refuses(self, source):
    self.assertLen(wrong_signatures(ast.parse(source)), 1)

  @parameterized.parameters(
    'def init(key): ...',
    'def init(key, params, *, size): ...',
    'def step(key, state, batch): ...',
    'def surrogate(key, memory, params, batch, embed_fn): ...',
    'def step_size(t): ...',
    'class Algorithm:\n  def step(self, key, state): ...',
  )
  def test_allows(self, source):
    self.assertEmpty(wrong_signatures(ast.parse(source)))


class TreeTest(parameterized.TestCase):
  # A kernel is no algorithm: its loops may have steps of their own.
  @parameterized.named_parameters(
    tree.cases(
      module
      for module in tree.modules('emc2')
      if not module.name.startswith('emc2.kernels.')
    )
  )
  def test_module(self, module):
    self.assertEmpty(wrong_signatures(module.parse()))
