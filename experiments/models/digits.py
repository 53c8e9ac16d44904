"""Small classifiers of scikit-learn's digits, 8 x 8 pixels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from emc2.experiments.models import convnet, layers

KINDS = ('cnn', 'mlp')

_NUM_CLASSES = 10
_HIDDEN = 32


class Classifier(nnx.Module):
  """A convolutional net, or the perceptron 64-32-10 with tanh.

  Args:
    kind: 'cnn' or 'mlp'.
    widths: Channels of the convolutions.
    rngs: Draws the first parameters.
  """

  def __init__(
    self, kind: str, *, widths: Sequence[int] = (8, 16), rngs: nnx.Rngs
  ):
    if kind == 'cnn':
      self.body = convnet.ConvNet((8, 8, 1), widths=widths, rngs=rngs)
      width = self.body.num_features
    else:
      width = _HIDDEN
      self.body = layers.linear(64, width, rngs=rngs)
    self.head = layers.linear(width, _NUM_CLASSES, rngs=rngs)
    self.kind = kind

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (n, 8, 8, 1) or (n, 64) to logits (n, 10)."""
    if self.kind == 'cnn':
      return self.head(self.body(images.reshape(-1, 8, 8, 1)))
    rows = images.reshape(images.shape[0], -1)
    return self.head(jnp.tanh(self.body(rows)))
