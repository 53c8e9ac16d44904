"""Shapes in which the sampler is used, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
  """One call of the sampler: `n` rows against all `2 * batch` columns."""

  batch: int  # Images in the global batch.
  rows: int  # Rows of this device.
  dim: int  # Dimension of an embedding.
  dtype: str
  discard: int  # Half of the candidates, as in the published runs.

  def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract key, rows, columns, position and start."""
    make = jax.ShapeDtypeStruct
    return (
      make((2,), jnp.uint32),
      make((self.rows, self.dim), self.dtype),
      make((2 * self.batch, self.dim), self.dtype),
      make((self.rows,), jnp.int32),
      make((self.rows,), jnp.float32),
    )


SPECS = {
  'toy_500': Spec(4, 8, 512, 'float32', 3),
  'stl10_resnet18': Spec(32, 64, 512, 'float32', 31),
  'imagenet100_resnet50': Spec(256, 512, 128, 'float32', 255),
  'imagenet100_resnet50_bfloat16': Spec(256, 512, 128, 'bfloat16', 255),
  'imagenet100_eight_devices': Spec(256, 64, 128, 'float32', 255),
  'large_batch': Spec(1024, 2048, 128, 'bfloat16', 1023),
}
