"""Shapes in which the log-sum-exp is used, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
  """One call: `rows` rows against all `2 * batch` columns."""

  batch: int  # Images in the global batch.
  rows: int  # Rows of this device; all the columns where it is 2 * batch.
  dim: int  # Dimension of an embedding.
  dtype: str

  def args(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Abstract rows, columns, position and scale."""
    make = jax.ShapeDtypeStruct
    rows = make((self.rows, self.dim), self.dtype)
    scale = make((self.rows,), jnp.float32)
    if self.rows == 2 * self.batch:
      return rows, None, None, scale
    columns = make((2 * self.batch, self.dim), self.dtype)
    return rows, columns, make((self.rows,), jnp.int32), scale


SPECS = {
  'digits': Spec(4, 8, 32, 'float32'),
  'stl10_resnet18': Spec(32, 64, 512, 'float32'),
  'imagenet100_resnet50': Spec(256, 512, 128, 'float32'),
  'imagenet100_resnet50_bfloat16': Spec(256, 512, 128, 'bfloat16'),
  'imagenet100_eight_devices': Spec(256, 64, 128, 'float32'),
  'large_batch': Spec(1024, 2048, 128, 'bfloat16'),
  'largest_batch': Spec(8192, 16384, 128, 'bfloat16'),
}
