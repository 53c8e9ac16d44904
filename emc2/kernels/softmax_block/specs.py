"""Shapes in which blocks are visited, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
  """One visit: a minibatch of rows and the classes of a block."""

  num_rows: int
  num_features: int
  num_classes: int
  dtype: str  # Of the features.

  def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of `softmax_block`."""
    n, d, k, dtype = self
    make = jax.ShapeDtypeStruct
    return (
      make((n, d), dtype),
      make((d, k), jnp.float32),
      make((n,), jnp.float32),
      make((n,), jnp.int32),
      make((n,), jnp.float32),
      make((), jnp.int32),
    )

  def score_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of `score_block`."""
    features, weights, _, labels, _, num_valid = self.args()
    return features, weights, labels, num_valid


SPECS = {
  'digits': Spec(1440, 65, 5, 'float32'),
  'clef': Spec(2500, 80, 63, 'float32'),
  'embeddings': Spec(8192, 256, 1024, 'float32'),
  'youtube8m': Spec(4096, 1152, 295, 'float32'),
  'youtube8m_bfloat16': Spec(4096, 1152, 295, 'bfloat16'),
  'youtube8m_whole': Spec(4096, 1152, 4716, 'bfloat16'),
  'text1000_bfloat16': Spec(1024, 8192, 125, 'bfloat16'),
}
