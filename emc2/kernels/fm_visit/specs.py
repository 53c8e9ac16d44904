"""Shapes in which visits occur, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
  """One dense cell: the rows of a batch and the features of a block."""

  num_rows: int
  num_features: int
  rank: int

  def gradient_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of `gradient`."""
    n, d, k = self
    shapes = (n, d), (n,), (n, k), (d, k)
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)

  def accumulate_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of `accumulate`, without the number of rows."""
    n, d, k = self
    shapes = (n, d), (d,), (d,), (d, k)
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)


SPECS = {
  'synthetic': Spec(960, 32, 4),
  'breast_cancer': Spec(360, 30, 4),
  'ijcnn1': Spec(49_990, 22, 4),
  'embeddings': Spec(65_536, 768, 64),
  'wide_block': Spec(8_192, 4_096, 100),
}
