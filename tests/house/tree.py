"""The files of the three packages, as every rule of the house reads them."""

import ast
import configparser
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]

FOLDERS = {
  'emc2': 'emc2',
  'emc2.transforms': 'transforms',
  'emc2.experiments': 'experiments',
}
"""Import name of each package to its folder."""


class Module(NamedTuple):
  """One file of a package."""

  name: str  # As it is imported.
  path: pathlib.Path
  is_package: bool

  def parse(self) -> ast.Module:
    return ast.parse(self.path.read_text(), str(self.path))


def modules(package: str) -> list[Module]:
  """Lists the files below a package's folder in one order everywhere."""
  folder = ROOT / FOLDERS[package]
  found = []
  for path in sorted(folder.rglob('*.py')):
    parts = path.relative_to(folder).with_suffix('').parts
    is_package = parts[-1] == '__init__'
    parts = parts[:-1] if is_package else parts
    found.append(Module('.'.join((package, *parts)), path, is_package))
  return found


def all_modules() -> list[Module]:
  return [module for package in FOLDERS for module in modules(package)]


def data_files(package: Module) -> list[pathlib.Path]:
  """Lists what lies beside the modules of one package, tables for instance."""
  folder = package.path.parent
  return sorted(
    path
    for path in folder.iterdir()
    if path.is_file() and path.suffix != '.py' and path.name[0] != '.'
  )


def cases(found: Iterable[Module]) -> list[dict]:
  """Makes one named test case of each module."""
  return [
    {'testcase_name': '_' + module.name.replace('.', '_'), 'module': module}
    for module in found
  ]


def tests() -> list[pathlib.Path]:
  return sorted((ROOT / 'tests').rglob('*.py'))


def imports(tree: ast.AST) -> Iterator[str]:
  """Yields each imported name in full; of `from a import b` it is `a.b`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f'{"." * node.level}{node.module or ""}.{alias.name}'


def imports_at_import(tree: ast.AST) -> Iterator[str]:
  """Yields like `imports`, without those that wait for a function's call."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      yield from imports(node)
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield from imports_at_import(node)


def setup_cfg() -> configparser.ConfigParser:
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  return config


def option(section: str, name: str) -> list[str]:
  """The lines of an option of setup.cfg."""
  return setup_cfg()[section][name].split('\n')[1:]
