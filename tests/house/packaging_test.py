"""setup.cfg lists each package, and a wheel of them works away from here."""

import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
from absl.testing import parameterized

from tests.house import tree


class SetupTest(parameterized.TestCase):
  def test_each_package_is_listed(self):
    want = [module.name for module in tree.all_modules() if module.is_package]
    self.assertEqual(tree.option('options', 'packages'), sorted(want))

  def test_each_folder_of_modules_is_a_package(self):
    for module in tree.all_modules():
      self.assertTrue(
        (module.path.parent / '__init__.py').exists(), module.path
      )

  def test_each_data_file_is_listed(self):
    """A wheel holds no other file than these and the modules."""
    listed = dict(tree.setup_cfg()['options.package_data'].items())
    for module in tree.all_modules():
      if module.is_package:
        patterns = listed.pop(module.name, '').split()
        for path in tree.data_files(module):
          matches = [path.match(pattern) for pattern in patterns]
          self.assertTrue(any(matches), msg=f'{module.name}: {path.name}')
    self.assertEmpty(listed)

  def test_folders_are_mapped(self):
    lines = tree.option('options', 'package_dir')
    mapped = dict(line.split(' = ') for line in lines)
    self.assertEqual(mapped, tree.FOLDERS)

  def test_requirements_have_lower_bounds(self):
    config = tree.setup_cfg()
    lists = list(config['options.extras_require'].items())
    lists += [('install_requires', config['options']['install_requires'])]
    for extra, lines in lists:
      for line in lines.split('\n')[1:]:
        self.assertIn('>=', line, msg=extra)

  def test_lock_pins_each_requirement(self):
    """The lock is what `make` installs; `make lock` remakes it."""
    locked = set()
    for line in (tree.ROOT / 'requirements.lock').read_text().splitlines():
      if not line.startswith('#'):
        self.assertRegex(line, r'^[a-z0-9-]+==[0-9][^ ]*( ; .+)?$')
        locked.add(line.split('==')[0])
    wanted = tree.option('options', 'install_requires')
    wanted += tree.option('options.extras_require', 'experiments')
    wanted += tree.option('options.extras_require', 'test')
    for line in wanted:
      name = re.split(r'[\[<>=]', line)[0].lower().replace('_', '-')
      self.assertIn(name, locked)

  def test_pyproject_names_the_build_backend_only(self):
    text = (tree.ROOT / 'pyproject.toml').read_text()
    self.assertEqual(re.findall(r'^\[.*\]$', text, re.M), ['[build-system]'])


@pytest.mark.slow
class WheelTest(parameterized.TestCase):
  def test_imports_next_to_a_users_own_folders(self):
    """Needs an index: the build backend and the core's needs come from it."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    source, away = folder / 'source', folder / 'away'
    kept = (*tree.FOLDERS.values(), 'setup.cfg', 'pyproject.toml')
    source.mkdir()
    for name in (*kept, 'README.md', 'LICENSE'):
      path = tree.ROOT / name
      copy = shutil.copytree if path.is_dir() else shutil.copy
      copy(path, source / name)

    pip = [sys.executable, '-m', 'pip']
    self._run([*pip, 'wheel', '--no-deps', '-w', folder, source], folder)
    wheel = next(folder.glob('emc2-*.whl'))
    held = set(zipfile.ZipFile(wheel).namelist())
    for module in tree.all_modules():
      name = '/'.join(module.name.split('.'))
      name += '/__init__.py' if module.is_package else '.py'
      self.assertIn(name, held)
      if module.is_package:
        for path in tree.data_files(module):
          folder_name = name.removesuffix('/__init__.py')
          self.assertIn(f'{folder_name}/{path.name}', held)
    tops = {name.split('/')[0] for name in held}
    self.assertEqual({top for top in tops if '.dist-info' not in top}, {'emc2'})

    venv.create(folder / 'venv', with_pip=True)
    python = folder / 'venv' / 'bin' / 'python'
    locked = tree.ROOT / 'requirements.lock'
    self._run([python, '-m', 'pip', 'install', '-c', locked, wheel], folder)
    (away / 'experiments').mkdir(parents=True)
    (away / 'experiments' / '__init__.py').write_text('')
    (away / 'transforms.py').write_text('')
    code = (
      'import emc2.transforms, emc2.experiments, transforms, experiments\n'
      'import emc2.sphere\n'
      'import sys\n'
      'for name in ("transforms", "experiments"):\n'
      '  print(sys.modules["emc2." + name].__file__)\n'
      '  print(sys.modules[name].__file__)\n'
      'print(emc2.transforms.lars(0.1) is not None)\n'
      'print(emc2.sphere.best_known(7).configuration)\n'
    )
    lines = self._run([python, '-c', code], away).splitlines()
    for ours, theirs in (lines[:2], lines[2:4]):
      self.assertIn('site-packages', ours)
      self.assertStartsWith(theirs, str(away))
    self.assertEqual(lines[4:], ['True', 'D5h'])

  def _run(self, command: list, cwd: pathlib.Path) -> str:
    done = subprocess.run(
      [str(word) for word in command],
      cwd=cwd,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, msg=done.stderr)
    return done.stdout
