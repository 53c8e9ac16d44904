"""What tests of an experiment begin with."""

import pathlib

import jax
from absl.testing import parameterized


class ExperimentTestCase(parameterized.TestCase):
  """Has a folder of its own, and compiles fast.

  Attributes:
    folder: Empty at first.
  """

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    # Nearly all of the time goes into compiling.
    name = 'jax_disable_most_optimizations'
    self.addCleanup(jax.config.update, name, jax.config.read(name))
    jax.config.update(name, True)
