"""Image augmentation on the device, any view of any sample made at will.

What happens to a sample hangs on the key, its number and its view id alone, so
a view can be made again in any batch, at any step, on any device. All colours
are planes in [0, 1]; nothing is rounded to 8 bits on the way.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import contrastive

_ATTEMPTS = 10  # To draw a crop that fits, before the whole image is taken.
_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
_UNIT = np.float32(1 / 255)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision have it.


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is done to an image, in the order of the fields.

  Attributes:
    size: Side of the square result in pixels; None keeps the image's size.
    crop_area: Range of the share of the area that a crop keeps, uniform; None
      for no crop. The crop is resized, bilinear with antialiasing.
    crop_ratio: Range of width over height of the crop, log-uniform.
    shift: Largest move in pixels, up, down and sideways, uniform over whole
      pixels; what comes in is 0.
    flip: Probability of a left-right flip. Everything below treats left and
      right alike, so recipes that flip last are the same.
    jitter: b, c, s, h: brightness, contrast and saturation are scaled by
      factors from `[max(0, 1 - b), 1 + b]` and so on, the hue turned by a part
      of the circle from [-h, h]; the four in random order.
    jitter_probability: Probability of the jitter as a whole.
    gray: Probability that the colours are taken away.
    blur: Range of the standard deviation of a Gaussian blur in pixels, uniform;
      None for no blur.
    blur_probability: Probability of the blur.
    noise: Standard deviation of Gaussian noise on each value.

  Raises:
    ValueError: If a probability or a range is none.
  """

  size: int | None = None
  crop_area: tuple[float, float] | None = None
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  shift: int = 0
  flip: float = 0.0
  jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
  jitter_probability: float = 0.0
  gray: float = 0.0
  blur: tuple[float, float] | None = None
  blur_probability: float = 1.0
  noise: float = 0.0

  def __post_init__(self):
    for name in ('flip', 'jitter_probability', 'gray', 'blur_probability'):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise ValueError(
          f'{name} must lie in [0, 1], got {getattr(self, name)}.'
        )
    for name in ('crop_area', 'crop_ratio', 'blur'):
      low, high = getattr(self, name) or (1.0, 1.0)
      if not 0.0 < low <= high < math.inf:
        raise ValueError(
          f'{name} must be a range above 0, got {getattr(self, name)}.'
        )
    if min(self.shift, self.noise, *self.jitter) < 0:
      raise ValueError(
        'shift, noise and jitter must be at least 0, got '
        f'{self.shift}, {self.noise}, {self.jitter}.'
      )


_STL10 = Recipe(
  size=96,
  crop_area=(0.08, 1.0),
  flip=0.5,
  jitter=(0.8, 0.8, 0.8, 0.2),
  jitter_probability=0.8,
  gray=0.2,
  blur=(0.1, 2.0),
)
_MILD = (0.4, 0.4, 0.2, 0.1)

RECIPES = {
  'digits': Recipe(shift=1, noise=0.1),
  'stl10': _STL10,
  'cifar10': dataclasses.replace(_STL10, size=36),
  'cifar10_sogclr': dataclasses.replace(
    _STL10, size=32, jitter=_MILD, blur=None
  ),
  'imagenet100': dataclasses.replace(_STL10, size=224, jitter=_MILD),
}
"""By name: what EMC2 (Yau et al., 2024, https://arxiv.org/abs/2404.10575) does
to its data sets, what SogCLR (Yuan et al., 2022,
https://arxiv.org/abs/2202.12387) does to CIFAR, and a light one for 8x8 digits,
whose noise is 1.6 of their 16 grey steps."""


class _Draw(NamedTuple):
  """What was drawn for one view; scalars unless said."""

  box: jax.Array  # (4,): top, left, height, width in pixels.
  flip: jax.Array  # bool.
  jitter: jax.Array  # bool.
  factors: jax.Array  # (4,): brightness, contrast, saturation, hue turn.
  order: jax.Array  # (4,), int32: which of them comes first, second, ...
  gray: jax.Array  # bool.
  blur: jax.Array  # bool.
  sigma: jax.Array  # Pixels.
  noise: jax.Array  # (size * size * channels,), or (0,) for a recipe without.


def augment(
  key: jax.Array,
  images: jax.Array | np.ndarray,
  index: jax.Array | np.ndarray,
  view: jax.Array | np.ndarray,
  *,
  recipe: Recipe,
) -> jax.Array:
  """Makes one view of each image.

  Args:
    key: PRNG key of the whole run, the same at every call.
    images: (n, height, width, channels), uint8; channels is 3, or any number
      where the recipe leaves colours alone.
    index: (n,), int32: the numbers of the samples.
    view: (n,), uint32: which view of each; `emc2.contrastive.PLAIN_VIEW` leaves
      the image as it is, as :func:`plain`.
    recipe: Static.

  Returns:
    (n, size, size, channels), float32 in [0, 1].

  Raises:
    ValueError: If the arrays are not of that form, or the images are too small
      for the blur.

  .. note::
    The recipes were written for PIL, which rounds to 8 bits after every step,
    turns the hue in 256 steps and blurs by three boxes; here each step is exact
    and the blur mirrors the image at its border, as torchvision's does. An
    image that a reader has resized is cropped as resized.

  Examples:
    >>> images = jnp.arange(128, dtype=jnp.uint8).reshape(2, 8, 8, 1)
    >>> index, view = jnp.array([0, 1]), jnp.array([3, 3], jnp.uint32)
    >>> key, recipe = jax.random.key(0), Recipe(flip=0.5, shift=1)
    >>> draw = jax.jit(lambda *given: augment(*given, recipe=recipe))
    >>> both = draw(key, images, index, view)
    >>> second = draw(key, images[1:], index[1:], view[1:])
    >>> both.shape, bool((second[0] == both[1]).all())
    ((2, 8, 8, 1), True)
  """
  _check(images, recipe)
  if not index.shape == view.shape == images.shape[:1]:
    raise ValueError(
      f'index and view must have shape {images.shape[:1]}, got '
      f'{index.shape} and {view.shape}.'
    )
  if view.dtype != jnp.uint32:
    raise ValueError(f'view must be uint32, got {view.dtype}.')

  def one(image, index, view):
    sample_key = jax.random.fold_in(jax.random.fold_in(key, index), view)
    is_plain = view == contrastive.PLAIN_VIEW
    drawn = _draw(sample_key, is_plain, image.shape, recipe)
    x = _resample(image, drawn.box, drawn.flip, recipe)
    if recipe.jitter_probability:
      x = jnp.where(drawn.jitter, _jitter(x, drawn.factors, drawn.order), x)
    if recipe.gray:
      x = jnp.where(drawn.gray, _gray(x), x)
    if recipe.blur is not None:
      x = _blur(x, drawn.sigma, drawn.blur, recipe.blur[1])
    if recipe.noise:
      x = jnp.clip(x + drawn.noise.reshape(x.shape), 0.0, 1.0)
    return x.transpose(1, 2, 0)

  return jax.vmap(one)(images, index, view)


def plain(images: jax.Array | np.ndarray, *, recipe: Recipe) -> jax.Array:
  """Scales images to [0, 1] and to the size of a recipe, as for evaluation.

  Args:
    images: (n, height, width, channels), uint8.
    recipe: Of which only `size` matters. Static.

  Returns:
    (n, size, size, channels), float32 in [0, 1].

  Examples:
    >>> plain(jnp.full((1, 2, 2, 1), 255, jnp.uint8), recipe=Recipe()).ravel()
    Array([1., 1., 1., 1.], dtype=float32)
  """
  _check(images, Recipe())
  _, height, width, _ = images.shape
  if recipe.size is None or recipe.size == height == width:
    return jnp.asarray(images).astype(jnp.float32) * _UNIT
  box = jnp.array([0.0, 0.0, height, width])
  flip = jnp.array(False)
  x = jax.vmap(lambda image: _resample(image, box, flip, recipe))(images)
  return x.transpose(0, 2, 3, 1)


def _check(images: jax.Array | np.ndarray, recipe: Recipe):
  if images.ndim != 4 or images.dtype != jnp.uint8:
    raise ValueError(
      'images must be (n, height, width, channels) uint8, got '
      f'{images.shape} {images.dtype}.'
    )
  _, height, width, channels = images.shape
  if channels != 3 and (recipe.jitter_probability or recipe.gray):
    raise ValueError(
      f'images must have 3 channels for a recipe of colours, got {channels}.'
    )
  if recipe.blur is not None:
    side = min(height, width) if recipe.size is None else recipe.size
    radius = _radius(recipe.blur[1])
    if side <= radius:
      raise ValueError(
        f'the sides must exceed the reach of the blur, {radius} pixels, got '
        f'{side}.'
      )


def _draw(
  key: jax.Array, is_plain: jax.Array, shape: tuple[int, ...], recipe: Recipe
) -> _Draw:
  """Draws all numbers of one view from one call for random words."""
  height, width, channels = shape
  num_words = 2 * _ATTEMPTS + 14
  num_values = 0
  if recipe.noise:
    num_values = channels * (recipe.size**2 if recipe.size else height * width)
  words = jax.random.bits(key, (num_words + num_values,), jnp.uint32)
  unit = (words >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
  rest = unit[2 * _ATTEMPTS + 2 :]
  # Normal by the inverse of its distribution; centred, so never infinite.
  centred = 2.0 * unit[num_words:] - np.float32(1.0 - 2**-24)
  noise = recipe.noise * math.sqrt(2.0) * jax.lax.erf_inv(centred)
  whole = jnp.array([0.0, 0.0, height, width])
  box = whole
  if recipe.crop_area is not None:
    box = _crop_box(unit[: 2 * _ATTEMPTS + 2], height, width, recipe)
  if recipe.shift:
    moves = _uniform(rest[:2], -recipe.shift, recipe.shift + 1)
    box = box.at[:2].add(jnp.floor(moves))
  chances = [recipe.flip, recipe.jitter_probability, recipe.gray]
  chances = np.array([*chances, recipe.blur_probability], np.float32)
  flip, jitter, gray, blur = (rest[2:6] < chances) & ~is_plain
  spread = np.array(recipe.jitter, np.float32)
  middle = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
  floor = np.array([0.0, 0.0, 0.0, -np.inf], np.float32)
  low, high = np.maximum(middle - spread, floor), middle + spread
  sigma = (1.0, 1.0) if recipe.blur is None else recipe.blur
  return _Draw(
    box=jnp.where(is_plain, whole, box),
    flip=flip,
    jitter=jitter,
    factors=_uniform(rest[6:10], low, high),
    order=jnp.asarray(_ORDERS)[words[num_words - 1] % np.uint32(len(_ORDERS))],
    gray=gray,
    blur=blur,
    sigma=_uniform(rest[10], *sigma),
    noise=jnp.where(is_plain, 0.0, noise),
  )


def _uniform(unit: jax.Array, low, high) -> jax.Array:
  """Maps [0, 1) to [low, high)."""
  return low + (high - low) * unit


def _crop_box(unit: jax.Array, height: int, width: int, recipe: Recipe):
  """Draws a crop as torchvision's RandomResizedCrop does."""
  ratio_low, ratio_high = recipe.crop_ratio
  areas, log_ratios = unit[:-2].reshape(2, _ATTEMPTS)
  area = height * width * _uniform(areas, *recipe.crop_area)
  ratio = jnp.exp(
    _uniform(log_ratios, math.log(ratio_low), math.log(ratio_high))
  )
  sides = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio])))
  bounds = jnp.array([height, width], jnp.float32)
  fits = jnp.all((sides > 0) & (sides <= bounds[:, None]), axis=0)
  drawn = sides[:, jnp.argmax(fits)]
  start = jnp.floor(unit[-2:] * (bounds - drawn + 1.0))
  start = jnp.minimum(start, bounds - drawn)  # Rounding may reach the end.
  # If none fits: the largest box in the middle whose ratio is allowed.
  whole_height = min(height, round(width / ratio_low))
  whole_width = min(width, round(height * ratio_high))
  whole = jnp.array(
    [
      (height - whole_height) // 2,
      (width - whole_width) // 2,
      whole_height,
      whole_width,
    ],
    jnp.float32,
  )
  return jnp.where(jnp.any(fits), jnp.concatenate([start, drawn]), whole)


def _resample(image, box, flip, recipe: Recipe) -> jax.Array:
  """Cuts box (4,) out of image (h, w, c) uint8 to (c, size, size) in [0, 1]."""
  height, width, _ = image.shape
  out_height = height if recipe.size is None else recipe.size
  out_width = width if recipe.size is None else recipe.size
  rows = _weights(box[0], box[2], height, out_height)
  columns = _weights(box[1], box[3], width, out_width)
  columns = jnp.where(flip, columns[::-1], columns)
  x = image.astype(jnp.float32) * _UNIT
  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum('oi,ijc->ojc', rows, x, precision=exact)
  x = jnp.einsum('pj,ojc->cop', columns, x, precision=exact)
  return jnp.clip(x, 0.0, 1.0)


def _weights(start, length, size_in: int, size_out: int) -> jax.Array:
  """The (size_out, size_in) matrix that resizes [start, start + length).

  Row o is a triangle round the centre of pixel o, as wide as an input or an
  output pixel, whichever is larger, over the pixels inside the box; it sums to
  1, or to 0 where the box leaves the image.
  """
  scale = length / size_out
  centre = start + (jnp.arange(size_out, dtype=jnp.float32) + 0.5) * scale
  pixel = jnp.arange(size_in, dtype=jnp.float32) + 0.5
  distance = jnp.abs(pixel[None, :] - centre[:, None])
  weights = jnp.maximum(0.0, 1.0 - distance / jnp.maximum(scale, 1.0))
  inside = (pixel > start) & (pixel < start + length)
  weights = jnp.where(inside[None, :], weights, 0.0)
  total = jnp.sum(weights, axis=1, keepdims=True)
  return weights / jnp.where(total > 0.0, total, 1.0)


def _gray(x: jax.Array) -> jax.Array:
  """The luma of x (3, h, w), as (1, h, w)."""
  red, green, blue = _LUMA
  return (red * x[0] + green * x[1] + blue * x[2])[None]


def _jitter(x: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
  """Brightness, contrast, saturation (blends) and hue of x (3, h, w)."""
  for slot in range(4):
    which = order[slot]
    # Blended with black, with the mean gray, or with each pixel's own gray.
    gray = _gray(x)
    other = jnp.where(which == 1, jnp.mean(gray), 0.0)
    other = jnp.where(which == 2, gray, other)
    blend = factors[which] * x + (1.0 - factors[which]) * other
    blend = jnp.clip(blend, 0.0, 1.0)
    x = jnp.where(which == 3, _turn_hue(x, factors[3]), blend)
  return x


def _turn_hue(x: jax.Array, turn: jax.Array) -> jax.Array:
  """Turns the hue in HSV by a part of the circle; x (3, h, w)."""
  red, green, blue = x[0], x[1], x[2]
  top = jnp.max(x, axis=0)
  chroma = top - jnp.min(x, axis=0)
  per_chroma = 1.0 / jnp.where(chroma > 0.0, chroma, 1.0)
  sextant = jnp.where(
    top == red,
    (green - blue) * per_chroma,
    jnp.where(
      top == green,
      2.0 + (blue - red) * per_chroma,
      4.0 + (red - green) * per_chroma,
    ),
  )
  offset = np.array([5.0, 3.0, 1.0], np.float32)[:, None, None]
  k = offset + (sextant + 6.0 * turn)[None]
  k = k - 6.0 * jnp.floor(k * np.float32(1 / 6))
  share = jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
  return top[None] - chroma[None] * share


def _radius(sigma: float) -> int:
  """Reach of the blur: three standard deviations of the widest."""
  return math.ceil(3 * sigma)


def _blur(x, sigma, applies, largest_sigma: float) -> jax.Array:
  """Separable Gaussian blur of x (c, h, w), mirrored at the borders."""
  radius = _radius(largest_sigma)
  offset = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
  taps = jnp.exp(-0.5 * (offset / sigma) ** 2)
  alone = (offset == 0.0).astype(jnp.float32)
  taps = jnp.where(applies, taps / jnp.sum(taps), alone)
  for axis in (1, 2):
    pad = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
    # The barrier keeps XLA from computing x anew for each tap.
    padded = jax.lax.optimization_barrier(jnp.pad(x, pad, mode='reflect'))
    size = x.shape[axis]
    x = sum(
      taps[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i in range(2 * radius + 1)
    )
  return jnp.clip(x, 0.0, 1.0)
