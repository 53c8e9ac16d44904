"""A multilayer perceptron on the pixels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emc2.experiments.models import layers


class Mlp(nnx.Module):
  """Flattens the image; linear layers, each with a ReLU.

  Attributes:
    num_features: Length of the rows that it returns.
  """

  def __init__(
    self,
    image_shape: Sequence[int],
    *,
    widths: Sequence[int],
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    sizes = (int(np.prod(image_shape)), *widths)
    self.layers = nnx.Dict(
      {
        f'linear{i}': layers.linear(*sizes[i : i + 2], dtype=dtype, rngs=rngs)
        for i in range(len(widths))
      }
    )
    self.depth = len(widths)
    self.num_features = sizes[-1]

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, height, width, channels) to (n, num_features)."""
    rows = images.reshape(images.shape[0], -1)
    for i in range(self.depth):
      rows = nnx.relu(self.layers[f'linear{i}'](rows))
    return rows
