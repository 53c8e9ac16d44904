"""The few layers that the encoders share, initialised as PyTorch does it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

NORMS = ('none', 'group')
NUM_GROUPS = 32

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')
_MIN_NORM = 1e-12


def convolve(
  images: jax.Array,
  kernel: jax.Array,
  *,
  stride: int = 1,
  padding: int = 0,
  implementation: str = 'auto',
) -> jax.Array:
  r"""Convolves images as `torch.nn.functional.conv2d` does.

  .. math::
    y_{n,p,q,o} = \sum_{i,j,c} x_{n,\, ps+i-r,\, qs+j-r,\, c}\, k_{i,j,c,o}

  for stride `s` and padding `r`; `x` is 0 outside of the image.

  .. note::
    XLA for CPU runs the derivative of a convolution some 20 times slower inside
    of a loop (`jax.lax.scan`) than outside. One matrix product with the patches
    of the images does not suffer, and under `jax.vmap` over kernels it is a
    batched product where a convolution turns into a grouped one. The patches
    are made again in the backward pass, not kept.

  Args:
    images: (n, height, width, channels).
    kernel: (rows, columns, channels, outputs), the same dtype.
    stride: Static, at least 1.
    padding: Zeros on each side, static.
    implementation: 'xla' is `jax.lax.conv_general_dilated`, 'patches' a matrix
      product; 'auto' takes patches on CPU and XLA's own elsewhere. Static.

  Returns:
    (n, out height, out width, outputs), the same dtype.

  Raises:
    ValueError: If there is no such implementation.

  Examples:
    >>> ones = jnp.ones((1, 2, 2, 1))
    >>> convolve(ones, jnp.ones((3, 3, 1, 1)), padding=1).reshape(2, 2)
    Array([[4., 4.],
           [4., 4.]], dtype=float32)
  """
  if implementation not in ('auto', 'xla', 'patches'):
    raise ValueError(
      "implementation must be 'auto', 'xla' or 'patches', got "
      f'{implementation!r}.'
    )

  def by_xla(images, kernel):
    return lax.conv_general_dilated(
      images,
      kernel,
      (stride, stride),
      ((padding, padding), (padding, padding)),
      dimension_numbers=_LAYOUT,
    )

  def by_patches(images, kernel):
    return _multiply_patches(images, kernel, stride, padding)

  if implementation == 'xla':
    return by_xla(images, kernel)
  if implementation == 'patches':
    return jax.checkpoint(by_patches)(images, kernel)

  def choose(images, kernel):
    return lax.platform_dependent(
      images, kernel, cpu=by_patches, default=by_xla
    )

  # Without the checkpoint the patches would be a residual, also for the
  # platforms that never make them.
  return jax.checkpoint(choose)(images, kernel)


def _multiply_patches(images, kernel, stride, padding):
  """Lays the patches out, columns first, and multiplies once."""
  rows, columns, _, outputs = kernel.shape
  sides = (padding, padding)
  images = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
  num_images, height, width, _ = images.shape
  out_height = (height - rows) // stride + 1
  out_width = (width - columns) // stride + 1
  patches = images
  for axis, taps, size in ((2, columns, out_width), (1, rows, out_height)):
    reach = (size - 1) * stride + 1
    shifted = [
      lax.slice_in_dim(patches, tap, tap + reach, stride, axis)
      for tap in range(taps)
    ]
    patches = jnp.concatenate(shifted, axis=-1)
  patches = patches.reshape(num_images * out_height * out_width, -1)
  product = patches @ kernel.reshape(-1, outputs)
  return product.reshape(num_images, out_height, out_width, outputs)


def max_pool(images: jax.Array) -> jax.Array:
  """Takes the largest of 3x3 at stride 2, padding 1, as ResNet's stem does.

  Args:
    images: (n, height, width, channels).

  Returns:
    (n, ceil(height / 2), ceil(width / 2), channels).
  """
  return nnx.max_pool(images, (3, 3), (2, 2), ((1, 1), (1, 1)))


def unit_rows(rows: jax.Array) -> jax.Array:
  r"""Divides each row by its Euclidean norm, floored at 1e-12.

  .. math:: z \mapsto z / \max(\|z\|_2, 10^{-12})

  A row of zeros stays a row of zeros, with a finite derivative; every row with
  a norm above the floor has norm 1.

  Args:
    rows: (n, d), any float dtype.

  Returns:
    (n, d), float32.

  Examples:
    >>> unit_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    Array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
  """
  rows = rows.astype(jnp.float32)
  square = jnp.sum(rows * rows, axis=-1, keepdims=True)
  return rows / jnp.sqrt(jnp.maximum(square, _MIN_NORM**2))


class Conv(nnx.Module):
  """A square convolution without bias, Kaiming-normal by fan-out.

  A bias would be undone by a norm that follows it; torchvision has none, and
  keeps none where the norm is left out.

  Attributes:
    kernel: (size, size, inputs, outputs), float32.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    size: int,
    stride: int = 1,
    padding: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    self.kernel = nnx.Param(
      init(rngs.params(), (size, size, inputs, outputs), jnp.float32)
    )
    self.stride = stride
    self.padding = padding
    self.dtype = dtype

  def __call__(self, images: jax.Array) -> jax.Array:
    """Convolves images (n, height, width, inputs)."""
    return convolve(
      images.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      stride=self.stride,
      padding=self.padding,
    )


def linear(
  inputs: int,
  outputs: int,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  r"""Makes a linear layer with bias, initialised as `torch.nn.Linear`.

  Weights and bias are uniform on :math:`\pm 1/\sqrt{\text{inputs}}`.

  Args:
    inputs: Number of features in.
    outputs: Number of features out.
    dtype: Of the computation; the parameters are float32.
    rngs: Where the parameters are drawn from.

  Returns:
    The layer.
  """
  bound = float(1 / np.sqrt(inputs))

  def init(key, shape, dtype, out_sharding=None):
    del out_sharding
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nnx.Linear(
    inputs, outputs, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs
  )


def identity(x: jax.Array) -> jax.Array:
  """Returns what it is given: the norm that is none."""
  return x


def make_norm(
  kind: str,
  channels: int,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  rngs: nnx.Rngs,
):
  """Makes what stands where torchvision has batch norm.

  Args:
    kind: 'none', the identity, or 'group', group norm with 32 groups.
    channels: Of the images that it will see; for 'group' a multiple of 32.
    dtype: Of the computation; the parameters are float32.
    rngs: Where the parameters are drawn from.

  Returns:
    A function of images.

  Raises:
    ValueError: If there is no such norm.
    NotImplementedError: If the channels do not fall into 32 groups.
  """
  if kind not in NORMS:
    raise ValueError(f'norm must be one of {NORMS}, got {kind!r}.')
  if kind == 'none':
    return identity
  if channels % NUM_GROUPS:
    raise NotImplementedError(
      f"norm 'group' makes {NUM_GROUPS} groups, which do not divide "
      f'{channels} channels.'
    )
  return nnx.GroupNorm(
    channels,
    NUM_GROUPS,
    epsilon=1e-5,
    use_fast_variance=False,
    dtype=dtype,
    rngs=rngs,
  )
