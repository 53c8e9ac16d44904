"""What an import name means does not hang on the folder one stands in."""

import os
import pathlib
import subprocess
import sys

from absl.testing import parameterized

from tests.house import tree


def _run(code: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=folder,
    env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'},
    capture_output=True,
    text=True,
    check=False,
  )


class ShortNameTest(parameterized.TestCase):
  @parameterized.parameters('transforms', 'experiments')
  def test_is_refused(self, name):
    done = _run(f'import {name}', tree.ROOT)
    self.assertEqual(done.returncode, 1)
    self.assertIn(
      f'ImportError: This package is emc2.{name}, not {name}:', done.stderr
    )

  @parameterized.parameters('transforms', 'experiments')
  def test_of_a_user_does_not_shadow_ours(self, name):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / f'{name}.py').write_text('mine = True\n')
    code = (
      f'import {name}, emc2.{name}\n'
      f'print({name}.mine, hasattr(emc2.{name}, "mine"))\n'
    )
    done = _run(code, folder)
    self.assertEqual(done.stdout, 'True False\n', done.stderr)
