"""Shapes in which the energies are used, for tests and benchmarks alike."""

from typing import NamedTuple

import jax


class Spec(NamedTuple):
  """One call: sets of points among themselves, or against visitors."""

  num_points: int
  dim: int  # Of the space around the sphere.
  exponent: float
  dtype: str
  num_chains: int | None = None  # Sets of points, where there are many.
  num_columns: int | None = None  # Points of a visiting block.

  def args(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Abstract rows and columns."""
    batch = () if self.num_chains is None else (self.num_chains,)
    make = lambda n: jax.ShapeDtypeStruct((*batch, n, self.dim), self.dtype)
    columns = None if self.num_columns is None else make(self.num_columns)
    return make(self.num_points), columns


SPECS = {
  'thomson_12': Spec(12, 3, 1.0, 'float32'),
  'thomson_470': Spec(470, 3, 1.0, 'float32'),
  'thomson_470_float64': Spec(470, 3, 1.0, 'float64'),
  'thomson_1000_chains': Spec(1000, 3, 1.0, 'float32', num_chains=64),
  'logarithmic_1000': Spec(1000, 3, 0.0, 'float32'),
  'fractional_1000': Spec(1000, 3, 0.5, 'float32'),
  'sphere_4000': Spec(4000, 3, 1.0, 'float32'),
  'sphere_4000_bfloat16': Spec(4000, 3, 1.0, 'bfloat16'),
  'sphere_20000': Spec(20_000, 3, 1.0, 'float32'),
  'sphere_20000_float64': Spec(20_000, 3, 1.0, 'float64'),
  'sphere_100000': Spec(100_000, 3, 1.0, 'float32'),
  'visiting_block': Spec(2500, 3, 1.0, 'float32', num_columns=2500),
  'cell_120': Spec(120, 4, 2.0, 'float32'),
  'e8_240': Spec(240, 8, 2.0, 'float32'),
  'leech': Spec(196_560, 24, 1.0, 'float32'),
}
