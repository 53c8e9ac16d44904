"""One encoder for all contrastive runs: trunk, features, projector, unit rows.

Built by name, split once, and from then on two pure functions of a plain tree
of parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emc2.experiments.models import convnet, layers, mlp, resnet


class Encoder(nnx.Module):
  """A trunk, hidden features, a projector and the unit sphere.

  The hidden features are `h = relu(W t + b)` of the trunk's output `t`; they
  are what an evaluation sees. The projector is `projector_layers` times a
  linear layer with ReLU and one linear layer more; then the norm of each row
  becomes 1 (:func:`layers.unit_rows`).

  References:
    Yau, Wai, Raman, Sarkar, Hong, "EMC2: Efficient MCMC Negative Sampling for
    Contrastive Learning with Global Convergence", 2024,
    https://arxiv.org/abs/2404.10575, its networks.
  """

  def __init__(
    self,
    trunk: Any,
    *,
    image_shape: Sequence[int],
    embedding: int,
    hidden: int,
    projector_layers: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Puts the head on a trunk.

    Args:
      trunk: Maps images to (n, trunk.num_features).
      image_shape: Height, width, channels.
      embedding: d, the length of an embedding.
      hidden: Length of the features.
      projector_layers: Hidden layers of the projector, 0 or more.
      dtype: Of the computation; the parameters are float32, and so is the norm.
      rngs: Where the parameters are drawn from.

    Raises:
      ValueError: If a size is not positive.
    """
    for name, value, least in (
      ('embedding', embedding, 1),
      ('hidden', hidden, 1),
      ('projector_layers', projector_layers, 0),
    ):
      if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}.')
    kwargs = dict(dtype=dtype, rngs=rngs)
    self.trunk = trunk
    self.hidden = layers.linear(trunk.num_features, hidden, **kwargs)
    self.projector = nnx.Dict(
      {
        f'linear{i}': layers.linear(hidden, hidden, **kwargs)
        for i in range(projector_layers)
      }
    )
    self.out = layers.linear(hidden, embedding, **kwargs)
    self.projector_layers = projector_layers
    self.image_shape = tuple(image_shape)
    self.dtype = dtype

  def features(self, images: jax.Array) -> jax.Array:
    """Maps images to what an evaluation sees.

    Args:
      images: (n, height, width, channels), any float dtype, in [0, 1].

    Returns:
      (n, hidden), float32, not negative.

    Raises:
      ValueError: If the images are not floats of the encoder's shape.
    """
    return self._hidden(images).astype(jnp.float32)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images to embeddings.

    Args:
      images: (n, height, width, channels), any float dtype, in [0, 1].

    Returns:
      (n, embedding), float32, rows of norm 1.

    Raises:
      ValueError: If the images are not floats of the encoder's shape.
    """
    rows = self._hidden(images)
    for i in range(self.projector_layers):
      rows = nnx.relu(self.projector[f'linear{i}'](rows))
    return layers.unit_rows(self.out(rows))

  def _hidden(self, images):
    if images.ndim != 4 or images.shape[1:] != self.image_shape:
      raise ValueError(
        f'images must be (n, *{self.image_shape}), got {images.shape}.'
      )
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f'images must be floats in [0, 1], got dtype {images.dtype}.'
      )
    return nnx.relu(self.hidden(self.trunk(images.astype(self.dtype))))


_RESNET18 = functools.partial(
  resnet.ResNet,
  block=resnet.BasicBlock,
  depths=(2, 2, 2, 2),
  widths=(64, 128, 256, 512),
)
_RESNET50 = functools.partial(
  resnet.ResNet,
  block=resnet.Bottleneck,
  depths=(3, 4, 6, 3),
  widths=(64, 128, 256, 512),
)
_RESNET_SMALL = functools.partial(
  resnet.ResNet,
  block=resnet.BasicBlock,
  depths=(1, 1, 1),
  widths=(16, 32, 64),
)
_TRUNKS = {
  'convnet': convnet.ConvNet,
  'resnet_small': functools.partial(_RESNET_SMALL, stem='cifar'),
  'resnet18': functools.partial(_RESNET18, stem='imagenet'),
  'resnet18_cifar': functools.partial(_RESNET18, stem='cifar'),
  'resnet50': functools.partial(_RESNET50, stem='imagenet'),
  'resnet50_cifar': functools.partial(_RESNET50, stem='cifar'),
}
NAMES = ('mlp', *_TRUNKS)


def build(
  name: str,
  *,
  image_shape: Sequence[int],
  embedding: int,
  hidden: int,
  projector_layers: int = 0,
  norm: str = 'none',
  rngs: nnx.Rngs,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Encoder:
  """Builds an encoder by its name.

  Args:
    name: One of `NAMES`. 'mlp' has one more hidden layer of width `hidden`;
      'convnet' and 'resnet_small' are for small images on a CPU; 'resnet18' and
      'resnet50' are torchvision's, and with '_cifar' their stem is one 3x3
      convolution of stride 1, without the max-pool.
    image_shape: Height, width, channels.
    embedding: d, the length of an embedding.
    hidden: Length of the features that an evaluation sees.
    projector_layers: Hidden layers of the projector.
    norm: 'none' or 'group' (32 groups), where torchvision has batch norm.
    rngs: Where the parameters are drawn from.
    dtype: Of the computation, e.g. `jnp.bfloat16`; the parameters are float32.

  Returns:
    The encoder; :func:`split` makes it pure.

  Raises:
    ValueError: If there is no such encoder, norm, or image shape.
    NotImplementedError: If the encoder does not support the norm.

  Examples:
    >>> model = build('mlp', image_shape=(8, 8, 1), embedding=32, hidden=64,
    ...               rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((5, 8, 8, 1))).shape
    (5, 32)
  """
  if name not in NAMES:
    raise ValueError(f'name must be one of {NAMES}, got {name!r}.')
  if norm not in layers.NORMS:
    raise ValueError(f'norm must be one of {layers.NORMS}, got {norm!r}.')
  if len(image_shape) != 3 or min(image_shape) < 1:
    raise ValueError(
      'image_shape must be (height, width, channels), all positive, got '
      f'{tuple(image_shape)}.'
    )
  if name == 'mlp':
    if norm != 'none':
      raise NotImplementedError(f"name 'mlp' has no norm, got {norm!r}.")
    trunk = mlp.Mlp(image_shape, widths=(hidden,), dtype=dtype, rngs=rngs)
  else:
    trunk = _TRUNKS[name](image_shape, norm=norm, dtype=dtype, rngs=rngs)
  return Encoder(
    trunk,
    image_shape=image_shape,
    embedding=embedding,
    hidden=hidden,
    projector_layers=projector_layers,
    dtype=dtype,
    rngs=rngs,
  )


class PureEncoder(NamedTuple):
  """An encoder after the split.

  Attributes:
    params: Nested dict of arrays, with string keys: for optax, Orbax and
      `jax.tree`, none of which need Flax.
    apply_embeddings: `(params, images) -> (n, embedding)`, unit rows.
    apply_features: `(params, images) -> (n, hidden)`.
  """

  params: dict[str, Any]
  apply_embeddings: Callable[[Any, jax.Array], jax.Array]
  apply_features: Callable[[Any, jax.Array], jax.Array]


def split(model: Encoder) -> PureEncoder:
  """Splits an encoder, once, into its parameters and two pure functions.

  The functions may be jitted, differentiated and mapped like any other; a new
  draw of parameters comes from a new `build`, and fits the old functions.

  Args:
    model: An encoder all of whose state is parameters.

  Returns:
    The parameters and the functions.

  Raises:
    ValueError: If the model keeps other state: dropout, batch statistics.

  Examples:
    >>> pure = split(build('mlp', image_shape=(2, 2, 1), embedding=3, hidden=4,
    ...                    rngs=nnx.Rngs(0)))
    >>> jax.jit(pure.apply_features)(pure.params, jnp.zeros((5, 2, 2, 1))).shape
    (5, 4)
  """
  graphdef, state, rest = nnx.split(model, nnx.Param, ...)
  if jax.tree.leaves(rest):
    raise ValueError(
      'model must keep no state but parameters, got '
      f'{sorted(nnx.to_pure_dict(rest))}.'
    )

  def apply_embeddings(params, images):
    return nnx.merge(graphdef, params, rest)(images)

  def apply_features(params, images):
    return nnx.merge(graphdef, params, rest).features(images)

  return PureEncoder(nnx.to_pure_dict(state), apply_embeddings, apply_features)


def draw_params(
  build_fn: Callable[[nnx.Rngs], Encoder], key: jax.Array
) -> dict[str, Any]:
  """Draws parameters; pure, so that `jax.vmap` over keys draws many at once.

  Args:
    build_fn: `(rngs) -> Encoder`.
    key: PRNG key.

  Returns:
    The parameters, as in `PureEncoder`.
  """
  state = nnx.state(build_fn(nnx.Rngs(key)), nnx.Param)
  return nnx.to_pure_dict(state)
