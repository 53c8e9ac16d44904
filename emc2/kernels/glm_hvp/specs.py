"""Shapes in which Hessians meet vectors, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
  """Dense features of a generalised linear model."""

  num_rows: int
  num_features: int
  dtype: str

  def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract arguments of `glm_hvp`."""
    n, d, dtype = self
    make = jax.ShapeDtypeStruct
    return (
      make((n, d), dtype),
      make((n,), jnp.float32),
      make((d,), jnp.float32),
    )


class PaddedSpec(NamedTuple):
  """Padded-sparse rows, of at most `width` entries."""

  width: int
  num_rows: int
  num_features: int
  dtype: str  # Of the ids.
  weighted: bool  # Whether there are values; without, all are 1.

  def args(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Abstract arguments of `glm_hvp_padded`."""
    w, n, d, dtype, weighted = self
    make = jax.ShapeDtypeStruct
    return (
      make((w, n), dtype),
      make((w, n), jnp.float32) if weighted else None,
      make((n,), jnp.float32),
      make((d,), jnp.float32),
    )


SPECS = {
  'digits': Spec(1440, 65, 'float32'),
  'w8a': Spec(49_749, 300, 'float32'),
  'embeddings': Spec(65_536, 768, 'float32'),
  'embeddings_bfloat16': Spec(65_536, 768, 'bfloat16'),
  'wide': Spec(8_192, 4_096, 'float32'),
}
PADDED_SPECS = {
  'w8a': PaddedSpec(16, 49_749, 300, 'uint16', False),
  'weighted': PaddedSpec(64, 20_242, 4_096, 'uint16', True),
  'int32': PaddedSpec(16, 8_192, 1_000, 'int32', True),
}
