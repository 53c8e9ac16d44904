"""Annotations are checked while tests run, in all three packages."""

import importlib

import jaxtyping
from absl.testing import parameterized

from emc2 import mesh
from emc2.kernels import lowering


class CheckingTest(parameterized.TestCase):
  def test_core(self):
    with self.assertRaises(jaxtyping.TypeCheckError):
      mesh.start(coordinator=3)
    with self.assertRaises(jaxtyping.TypeCheckError):
      lowering.lower_for(abs, 1.0, platform=3)

  def test_transforms(self):
    lars = importlib.import_module('emc2.transforms.lars')
    with self.assertRaises(jaxtyping.TypeCheckError):
      lars.lars('fast')

  def test_experiments(self):
    schedules = importlib.import_module('emc2.experiments.schedules')
    with self.assertRaises(jaxtyping.TypeCheckError):
      schedules.sgd('fast')
