"""A small convolutional net, for images of 8 to some 40 pixels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from emc2.experiments.models import layers


class ConvNet(nnx.Module):
  """3x3 convolutions, each with a ReLU; all but the first halve the image.

  The last maps are flattened, not averaged: on 8x8 digits it matters where a
  stroke is.

  Attributes:
    num_features: Length of the rows that it returns.
  """

  def __init__(
    self,
    image_shape: Sequence[int],
    *,
    widths: Sequence[int] = (16, 32, 64),
    norm: str = 'none',
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    height, width, channels = image_shape
    convs, norms = {}, {}
    for i, outputs in enumerate(widths):
      stride = 1 if i == 0 else 2
      convs[f'conv{i}'] = layers.Conv(
        channels,
        outputs,
        size=3,
        stride=stride,
        padding=1,
        dtype=dtype,
        rngs=rngs,
      )
      norms[f'norm{i}'] = layers.make_norm(
        norm, outputs, dtype=dtype, rngs=rngs
      )
      height, width = -(-height // stride), -(-width // stride)
      channels = outputs
    self.convs = nnx.Dict(convs)
    self.norms = nnx.Dict(norms)
    self.depth = len(widths)
    self.num_features = height * width * channels

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, height, width, channels) to (n, num_features)."""
    for i in range(self.depth):
      images = self.convs[f'conv{i}'](images)
      images = nnx.relu(self.norms[f'norm{i}'](images))
    return images.reshape(images.shape[0], -1)
