"""Residual networks as torchvision defines them, without batch norm."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from emc2.experiments.models import layers

STEMS = ('imagenet', 'cifar')


class BasicBlock(nnx.Module):
  """Two 3x3 convolutions beside a shortcut; the first may stride."""

  expansion = 1

  def __init__(
    self,
    inputs: int,
    width: int,
    *,
    stride: int,
    norm: str,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    outputs = width * self.expansion
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.conv1 = layers.Conv(
      inputs, width, size=3, stride=stride, padding=1, **kwargs
    )
    self.norm1 = layers.make_norm(norm, width, **kwargs)
    self.conv2 = layers.Conv(width, outputs, size=3, padding=1, **kwargs)
    self.norm2 = layers.make_norm(norm, outputs, **kwargs)
    self.shortcut = _shortcut(inputs, outputs, stride, norm, kwargs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, height, width, inputs) to strided ones."""
    branch = nnx.relu(self.norm1(self.conv1(images)))
    branch = self.norm2(self.conv2(branch))
    return nnx.relu(branch + self.shortcut(images))


class Bottleneck(nnx.Module):
  """1x1, 3x3 and 1x1 convolutions beside a shortcut; the 3x3 may stride."""

  expansion = 4

  def __init__(
    self,
    inputs: int,
    width: int,
    *,
    stride: int,
    norm: str,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    outputs = width * self.expansion
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.conv1 = layers.Conv(inputs, width, size=1, **kwargs)
    self.norm1 = layers.make_norm(norm, width, **kwargs)
    self.conv2 = layers.Conv(
      width, width, size=3, stride=stride, padding=1, **kwargs
    )
    self.norm2 = layers.make_norm(norm, width, **kwargs)
    self.conv3 = layers.Conv(width, outputs, size=1, **kwargs)
    self.norm3 = layers.make_norm(norm, outputs, **kwargs)
    self.shortcut = _shortcut(inputs, outputs, stride, norm, kwargs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, height, width, inputs) to strided ones."""
    branch = nnx.relu(self.norm1(self.conv1(images)))
    branch = nnx.relu(self.norm2(self.conv2(branch)))
    branch = self.norm3(self.conv3(branch))
    return nnx.relu(branch + self.shortcut(images))


class Projection(nnx.Module):
  """The shortcut where the shape changes: a 1x1 convolution and a norm."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    stride: int,
    norm: str,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.conv = layers.Conv(inputs, outputs, size=1, stride=stride, **kwargs)
    self.norm = layers.make_norm(norm, outputs, **kwargs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, height, width, inputs) to strided ones."""
    return self.norm(self.conv(images))


def _shortcut(inputs, outputs, stride, norm, kwargs):
  if stride == 1 and inputs == outputs:
    return layers.identity
  return Projection(inputs, outputs, stride=stride, norm=norm, **kwargs)


class ResNet(nnx.Module):
  """A stem, stages of blocks, the mean over the image.

  Every stage but the first halves the image in its first block.

  Attributes:
    num_features: Length of the rows that it returns.

  References:
    He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016,
    https://arxiv.org/abs/1512.03385; with the stride of a bottleneck in its
    3x3 convolution, as torchvision has it.
  """

  def __init__(
    self,
    image_shape: Sequence[int],
    *,
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    widths: Sequence[int],
    stem: str,
    norm: str = 'none',
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the network.

    Args:
      image_shape: Height, width, channels.
      block: What the stages are made of.
      depths: Blocks per stage.
      widths: Channels per stage, before the expansion of the block.
      stem: 'imagenet', 7x7 of stride 2 and a max-pool, or 'cifar', 3x3 of
        stride 1.
      norm: As in `layers.make_norm`.
      dtype: Of the computation; the parameters are float32.
      rngs: Where the parameters are drawn from.

    Raises:
      ValueError: If there is no such stem.
    """
    if stem not in STEMS:
      raise ValueError(f'stem must be one of {STEMS}, got {stem!r}.')
    kwargs = dict(dtype=dtype, rngs=rngs)
    channels = widths[0]
    size, stride, padding = (7, 2, 3) if stem == 'imagenet' else (3, 1, 1)
    self.stem = layers.Conv(
      image_shape[-1],
      channels,
      size=size,
      stride=stride,
      padding=padding,
      **kwargs,
    )
    self.norm = layers.make_norm(norm, channels, **kwargs)
    self.pool = layers.max_pool if stem == 'imagenet' else layers.identity
    blocks = {}
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
      for number in range(depth):
        stride = 2 if stage > 0 and number == 0 else 1
        blocks[f'stage{stage}_block{number}'] = block(
          channels, width, stride=stride, norm=norm, **kwargs
        )
        channels = width * block.expansion
    self.names = tuple(blocks)
    self.blocks = nnx.Dict(blocks)
    self.num_features = channels

  def maps(self, images: jax.Array) -> jax.Array:
    """The last feature maps, (n, out height, out width, num_features)."""
    images = self.pool(nnx.relu(self.norm(self.stem(images))))
    for name in self.names:
      images = self.blocks[name](images)
    return images

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, height, width, channels) to (n, num_features)."""
    return jnp.mean(self.maps(images), axis=(1, 2))
