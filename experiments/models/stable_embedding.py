"""An embedding that trains under 8-bit states: uniform rows, and a norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

TABLE = 'stable_table'
"""The name of the parameter, by which :func:`keep32_mask` knows it."""


class StableEmbedding(nnx.Module):
  """Looks rows up in float32 and normalises each.

  Rows of a table get gradients of very different sizes, as rare tokens have
  few; the norm bounds what they become, and :func:`keep32_mask` leaves the
  optimiser's state of the table in 32 bits. Positions are added after it.

  References:
    Dettmers, Lewis, Shleifer and Zettlemoyer, `8-bit Optimizers via Block-wise
    Quantization <https://arxiv.org/abs/2110.02861>`_, 2022, section 2.3.

  Args:
    num_embeddings: V.
    num_features: h.
    padding: A row that starts as zeros, or None.
    dtype: Of what it returns; the table and the norm are float32.
    rngs: Of the first rows, uniform within the root of 6 / (V + h).
  """

  def __init__(
    self,
    num_embeddings: int,
    num_features: int,
    *,
    padding: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if padding is not None and not 0 <= padding < num_embeddings:
      raise ValueError(
        f'padding must lie in [0, {num_embeddings}), got {padding}.'
      )
    limit = (6 / (num_embeddings + num_features)) ** 0.5
    table = jax.random.uniform(
      rngs.params(),
      (num_embeddings, num_features),
      minval=-limit,
      maxval=limit,
    )
    if padding is not None:
      table = table.at[padding].set(0.0)
    setattr(self, TABLE, nnx.Param(table))
    self.norm = nnx.LayerNorm(num_features, epsilon=1e-5, rngs=rngs)
    self.dtype = dtype

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens (...), int, to rows (..., h)."""
    rows = jnp.take(getattr(self, TABLE)[...], tokens, axis=0)
    return self.norm(rows).astype(self.dtype)


def keep32_mask(params: Any) -> Any:
  """Marks the tables, for `keep32_mask` of the 8-bit optimisers.

  Args:
    params: A tree of parameters, as `nnx.split` gives it.

  Returns:
    A tree of booleans like it.
  """
  is_table = lambda path, _: TABLE in jax.tree_util.keystr(path)
  return jax.tree_util.tree_map_with_path(is_table, params)
