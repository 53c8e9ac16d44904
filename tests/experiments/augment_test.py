"""Each step of an augmentation against PIL, SciPy, colorsys or NumPy."""

import colorsys
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image
from scipy import ndimage, stats

from emc2 import contrastive
from emc2 import mesh as mesh_lib
from emc2.experiments import augment

JITTED = jax.jit(augment.augment, static_argnames='recipe')
PLAIN = jax.jit(augment.plain, static_argnames='recipe')
JITTER = jax.jit(augment._jitter)


@functools.partial(jax.jit, static_argnames='size')
def resample(image, box, size):
  rows = augment._weights(box[0], box[2], image.shape[0], size[0])
  columns = augment._weights(box[1], box[3], image.shape[1], size[1])
  return rows, jnp.einsum('oi,pj,ijc->opc', rows, columns, image)


def pictures(count, height=14, width=14, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, height, width, channels), np.uint8)


def ids(*values, dtype=np.uint32):
  return jnp.asarray(np.array(values, dtype))


def run(recipe, images, index=None, view=None, seed=0):
  """One jitted call; by default sample i in view i."""
  numbers = np.arange(len(images))
  index = numbers if index is None else index
  view = numbers if view is None else view
  key = jax.random.key(seed)
  arrays = (np.asarray(index, np.int32), np.asarray(view, np.uint32))
  return np.asarray(JITTED(key, images, *arrays, recipe=recipe))


def draws(recipe, shape, count, plain=False):
  """What `count` views draw, as NumPy arrays."""
  keys = jax.random.split(jax.random.key(1), count)
  draw = lambda key: augment._draw(key, jnp.array(plain), shape, recipe)
  return jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(keys))


def resized(image, box, size):
  """Cuts and resizes (h, w, c) uint8 by PIL in float; gives [0, 1]."""
  top, left, height, width = (int(side) for side in box)
  planes = [
    Image.fromarray(np.float32(image[:, :, c]))
    .crop((left, top, left + width, top + height))
    .resize((size[1], size[0]), Image.Resampling.BILINEAR)
    for c in range(image.shape[2])
  ]
  return np.stack([np.asarray(plane) for plane in planes], axis=-1) / 255


def luma(image):
  return image @ np.array([0.299, 0.587, 0.114])


def jittered(image, factors, order):
  """ColorJitter as torchvision defines it, on (h, w, 3) in [0, 1]."""
  for which in order:
    factor = factors[which]
    if which == 0:
      image = np.clip(factor * image, 0, 1)
    elif which == 1:
      mean = luma(image).mean()
      image = np.clip(factor * image + (1 - factor) * mean, 0, 1)
    elif which == 2:
      gray = luma(image)[:, :, None]
      image = np.clip(factor * image + (1 - factor) * gray, 0, 1)
    else:
      image = np.array(
        [[turned(*pixel, factor) for pixel in row] for row in image]
      )
  return image


def turned(red, green, blue, turn):
  hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
  return colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)


def blurred(image, sigma, radius):
  return ndimage.gaussian_filter(
    image, sigma, radius=radius, mode='mirror', axes=(0, 1)
  )


class WholeTest(parameterized.TestCase):
  def test_matches_numpy(self):
    recipe = dataclasses.replace(
      augment.RECIPES['stl10'], size=12, blur=(0.1, 1.5)
    )
    images = pictures(12, 15, 17)
    got = run(recipe, images)

    def draw(index):
      key = jax.random.fold_in(jax.random.key(0), index)
      key = jax.random.fold_in(key, index)
      return augment._draw(key, jnp.array(False), images.shape[1:], recipe)

    numbers = jnp.arange(12, dtype=jnp.uint32)
    drawn = jax.tree.map(np.asarray, jax.jit(jax.vmap(draw))(numbers))
    for i, image in enumerate(images):
      want = resized(image, drawn.box[i], (12, 12))
      want = want[:, ::-1] if drawn.flip[i] else want
      if drawn.jitter[i]:
        want = jittered(want, drawn.factors[i], drawn.order[i])
      if drawn.gray[i]:
        want = np.repeat(luma(want)[:, :, None], 3, axis=2)
      want = blurred(want, drawn.sigma[i], 5)
      np.testing.assert_allclose(got[i], want, atol=2e-5)
    for field in (drawn.flip, drawn.jitter, drawn.gray):
      self.assertBetween(field.sum(), 1, 11)

  def test_a_view_hangs_on_key_sample_and_view_alone(self):
    recipe = augment.Recipe(crop_area=(0.1, 1.0), noise=0.1)
    images = np.repeat(pictures(1), 8, axis=0)
    index, view = [5, 5, 5, 6, 6, 6, 7, 7], [0, 1, 2, 0, 1, 2, 0, 2**31]
    first = run(recipe, images, index, view)
    self.assertLen(np.unique(first.reshape(8, -1), axis=0), 8)
    order = np.random.default_rng(0).permutation(8)
    second = run(recipe, images, np.array(index)[order], np.array(view)[order])
    np.testing.assert_array_equal(second, first[order])
    alone = run(recipe, images[:1], [6], [2])
    np.testing.assert_allclose(alone[0], first[5], atol=1e-6)
    other = run(recipe, images, index, view, seed=1)
    self.assertGreater(np.abs(other - first).max(axis=(1, 2, 3)).min(), 0.05)

  def test_eight_devices_equal_one(self):
    recipe = augment.Recipe(crop_area=(0.1, 1.0), flip=0.5, noise=0.1)
    images = pictures(16)
    sharding = jax.NamedSharding(mesh_lib.make(), jax.P(mesh_lib.DATA))
    numbers = np.arange(16)
    arrays = jax.device_put(
      (images, np.int32(numbers), np.uint32(numbers)), sharding
    )
    got = JITTED(jax.random.key(0), *arrays, recipe=recipe)
    self.assertTrue(got.sharding.is_equivalent_to(sharding, 4))
    np.testing.assert_allclose(got, run(recipe, images), atol=1e-6)


class PlainTest(parameterized.TestCase):
  def test_plain_view_leaves_the_image_as_it_is(self):
    recipe = dataclasses.replace(
      augment.RECIPES['stl10'], size=14, shift=2, noise=0.1, blur=(0.1, 2.0)
    )
    images = pictures(4)
    view = [contrastive.PLAIN_VIEW, 0, contrastive.PLAIN_VIEW, 1]
    got = run(recipe, images, view=view)
    want = np.asarray(PLAIN(images, recipe=recipe))
    np.testing.assert_array_equal(got[::2], want[::2])
    np.testing.assert_allclose(want, images / 255, atol=1e-7)
    self.assertGreater(np.abs(got - want)[1::2].max(axis=(1, 2, 3)).min(), 0.1)

  def test_plain_shrinks(self):
    self._check_plain(9)

  @pytest.mark.slow
  def test_plain_enlarges(self):
    self._check_plain(20)

  def _check_plain(self, size):
    images = pictures(3, 12, 15)
    recipe = augment.Recipe(size=size, crop_area=(0.1, 0.5), flip=1.0)
    want = [resized(image, (0, 0, 12, 15), (size, size)) for image in images]
    got = PLAIN(images, recipe=recipe)
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)
    view = np.full(3, contrastive.PLAIN_VIEW)
    np.testing.assert_allclose(run(recipe, images, view=view), got, atol=1e-6)


class CropTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0, 0, 20, 24), (20, 24)),  # Whole: nothing happens.
    ((3, 5, 12, 9), (16, 16)),  # Stretched.
    ((2, 1, 18, 23), (7, 6)),  # Shrunk.
    ((4, 20, 16, 4), (8, 8)),  # Shrunk in height, stretched in width.
    ((7, 8, 1, 1), (5, 5)),
  )
  @pytest.mark.slow
  def test_matches_pil(self, box, size):
    image = pictures(1, 20, 24)[0]
    rows, got = resample(np.float32(image / 255), np.float32(box), size)
    np.testing.assert_allclose(got, resized(image, box, size), atol=1e-5)
    np.testing.assert_allclose(rows.sum(1), 1.0, atol=1e-6)

  def test_whole_area_is_the_identity(self):
    images = pictures(3)
    recipe = augment.Recipe(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    np.testing.assert_array_equal(
      run(recipe, images), PLAIN(images, recipe=recipe)
    )

  def test_boxes_are_those_of_torchvision(self):
    self._check_boxes((96, 96), (0.08, 1.0), (3 / 4, 4 / 3))

  @pytest.mark.slow
  def test_boxes_are_those_of_torchvision_elsewhere(self):
    self._check_boxes((50, 80), (0.3, 0.6), (1 / 2, 3.0))

  def _check_boxes(self, size, area, ratio):
    height, width = size
    recipe = augment.Recipe(crop_area=area, crop_ratio=ratio)
    got = draws(recipe, (height, width, 3), 4000).box
    rng = np.random.default_rng(0)
    want = []
    while len(want) < 4000:
      target = height * width * rng.uniform(*area)
      aspect = math.exp(rng.uniform(*np.log(ratio)))
      w, h = (
        round(math.sqrt(target * aspect)),
        round(math.sqrt(target / aspect)),
      )
      if 0 < w <= width and 0 < h <= height:
        top = rng.integers(0, height - h + 1)
        want.append((top, rng.integers(0, width - w + 1), h, w))
    want = np.array(want)
    np.testing.assert_array_equal(got, np.round(got))
    self.assertGreaterEqual(got[:, :2].min(), 0)
    self.assertLessEqual((got[:, 0] + got[:, 2]).max(), height)
    self.assertLessEqual((got[:, 1] + got[:, 3]).max(), width)
    views = (
      lambda box: box[:, 0],
      lambda box: box[:, 1],
      lambda box: box[:, 2] * box[:, 3],
      lambda box: box[:, 3] / box[:, 2],
    )
    for view in views:
      self.assertGreater(stats.ks_2samp(view(got), view(want)).pvalue, 1e-3)

  @parameterized.parameters(
    ((8, 100), (0, 44, 8, 11)), ((100, 8), (44, 0, 11, 8))
  )
  def test_takes_the_middle_if_no_crop_fits(self, size, box):
    recipe = augment.Recipe(crop_area=(0.9, 1.0))
    got = draws(recipe, (*size, 3), 3).box
    np.testing.assert_array_equal(got, np.tile(np.float32(box), (3, 1)))


class DrawTest(parameterized.TestCase):
  def test_frequencies_and_ranges(self):
    recipe = augment.Recipe(
      size=4,
      flip=0.5,
      jitter=(0.8, 0.4, 1.5, 0.2),
      jitter_probability=0.8,
      gray=0.2,
      blur=(0.1, 2.0),
      blur_probability=0.3,
      noise=0.25,
    )
    count = 6000
    got = draws(recipe, (32, 32, 3), count)
    rates = dict(flip=0.5, jitter=0.8, gray=0.2, blur=0.3)
    for name, rate in rates.items():
      times = int(getattr(got, name).sum())
      pvalue = stats.binomtest(times, count, rate).pvalue
      self.assertGreater(pvalue, 1e-3, msg=name)
    ranges = [(0.2, 1.8), (0.6, 1.4), (0.0, 2.5), (-0.2, 0.2)]
    values = [*got.factors.T, got.sigma]
    for (low, high), value in zip([*ranges, (0.1, 2.0)], values, strict=True):
      uniform = stats.uniform(low, high - low)
      self.assertGreater(stats.kstest(value, uniform.cdf).pvalue, 1e-3)
    _, times = np.unique(got.order, axis=0, return_counts=True)
    self.assertLen(times, 24)
    self.assertGreater(stats.chisquare(times).pvalue, 1e-3)
    noise = got.noise[:500].ravel()
    self.assertLen(noise, 500 * 4 * 4 * 3)
    pvalue = stats.kstest(noise, stats.norm(0, 0.25).cdf).pvalue
    self.assertGreater(pvalue, 1e-3)
    decisions = np.stack([getattr(got, name) for name in rates])
    correlation = np.corrcoef(decisions) - np.eye(4)
    self.assertLess(np.abs(correlation).max(), 4 / math.sqrt(count))

  def test_plain_draws_nothing(self):
    recipe = dataclasses.replace(
      augment.RECIPES['stl10'], shift=3, noise=1.0, gray=1.0, flip=1.0
    )
    got = draws(recipe, (20, 30, 3), 50, plain=True)
    np.testing.assert_array_equal(got.box, [[0, 0, 20, 30]] * 50)
    for name in ('flip', 'jitter', 'gray', 'blur', 'noise'):
      self.assertFalse(getattr(got, name).any(), msg=name)


class ColourTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2, 3)
  def test_each_step(self, which):
    image = pictures(1, 7, 6)[0] / 255
    image[0] = image[0, :, :1]  # Grays have no hue.
    image[1] = np.round(image[1])  # Corners of the cube; some are black.
    order = np.array([which] + [i for i in range(4) if i != which])
    for factor in (0.3, 1.0, 1.7) if which < 3 else (-0.5, -0.1, 0.0, 0.37):
      factors = np.array([1.0, 1.0, 1.0, 0.0])
      factors[which] = factor
      got = JITTER(
        jnp.asarray(np.float32(image.transpose(2, 0, 1))),
        jnp.asarray(np.float32(factors)),
        jnp.asarray(np.int32(order)),
      )
      want = jittered(image, factors, order[:1])
      np.testing.assert_allclose(got.transpose(1, 2, 0), want, atol=2e-6)

  def test_the_order_matters_and_is_obeyed(self):
    image = pictures(1, 7, 6)[0] / 255
    factors = np.array([1.6, 0.5, 1.8, 0.2])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
      got = JITTER(
        jnp.asarray(np.float32(image.transpose(2, 0, 1))),
        jnp.asarray(np.float32(factors)),
        jnp.asarray(np.int32(order)),
      )
      want = jittered(image, factors, order)
      np.testing.assert_allclose(got.transpose(1, 2, 0), want, atol=5e-6)

  def test_gray(self):
    images = pictures(3)
    got = run(augment.Recipe(gray=1.0), images)
    want = np.repeat(luma(images / 255)[..., None], 3, axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-6)

  def test_flip(self):
    images = pictures(3)
    got = run(augment.Recipe(flip=1.0), images)
    np.testing.assert_allclose(got, images[:, :, ::-1] / 255, atol=1e-6)


class BlurTest(parameterized.TestCase):
  @parameterized.parameters(0.1, 0.7, 2.0)
  @pytest.mark.slow
  def test_matches_scipy(self, sigma):
    images = pictures(2)
    got = run(augment.Recipe(blur=(sigma, sigma)), images)
    radius = math.ceil(3 * sigma)
    want = [blurred(image / 255, sigma, radius) for image in images]
    np.testing.assert_allclose(got, np.stack(want), atol=2e-6)

  def test_keeps_a_constant(self):
    images = np.full((2, 14, 14, 3), 255, np.uint8)
    got = run(augment.Recipe(blur=(0.1, 2.0)), images)
    np.testing.assert_allclose(got, 1.0, atol=1e-6)
    self.assertLessEqual(got.max(), 1.0)

  def test_probability(self):
    images = pictures(2)
    recipe = augment.Recipe(blur=(2.0, 2.0), blur_probability=0.0)
    np.testing.assert_array_equal(
      run(recipe, images), PLAIN(images, recipe=recipe)
    )


class ShiftTest(parameterized.TestCase):
  def test_moves_by_whole_pixels_and_fills_with_zero(self):
    count, images = 900, np.repeat(pictures(1, 8, 8, 1), 900, axis=0)
    got = run(augment.Recipe(shift=1), images, index=np.zeros(count))
    padded = np.pad(images[0, :, :, 0] / 255, 1)
    moves = [(y, x) for y in range(3) for x in range(3)]
    want = np.stack([padded[y : y + 8, x : x + 8] for y, x in moves])
    error = np.abs(got[:, None, :, :, 0] - want[None]).max(axis=(2, 3))
    self.assertLess(error.min(axis=1).max(), 1e-6)
    times = np.bincount(error.argmin(axis=1), minlength=9)
    self.assertGreater(stats.chisquare(times).pvalue, 1e-3)

  @pytest.mark.slow
  def test_noise(self):
    images = np.full((50, 8, 8, 1), 127, np.uint8)
    got = run(augment.Recipe(noise=0.05), images).ravel() - 127 / 255
    pvalue = stats.kstest(got, stats.norm(0, 0.05).cdf).pvalue
    self.assertGreater(pvalue, 1e-3)
    images = np.full((20, 8, 8, 1), 255, np.uint8)
    self.assertEqual(run(augment.Recipe(noise=0.05), images).max(), 1.0)


class RecipesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('stl10', 96, (0.8, 0.8, 0.8, 0.2), (0.1, 2.0)),
    ('cifar10', 36, (0.8, 0.8, 0.8, 0.2), (0.1, 2.0)),
    ('imagenet100', 224, (0.4, 0.4, 0.2, 0.1), (0.1, 2.0)),
    ('cifar10_sogclr', 32, (0.4, 0.4, 0.2, 0.1), None),
  )
  def test_published_values(self, name, size, jitter, blur):
    want = augment.Recipe(
      size=size,
      crop_area=(0.08, 1.0),
      crop_ratio=(3 / 4, 4 / 3),
      flip=0.5,
      jitter=jitter,
      jitter_probability=0.8,
      gray=0.2,
      blur=blur,
      blur_probability=1.0,
    )
    self.assertEqual(augment.RECIPES[name], want)

  def test_digits(self):
    got = run(augment.RECIPES['digits'], pictures(4, 8, 8, 1))
    self.assertEqual(got.shape, (4, 8, 8, 1))
    self.assertEqual(got.dtype, np.float32)
    self.assertBetween(got.min(), 0.0, 1.0)

  @parameterized.parameters(
    (dict(flip=1.5), r'flip must lie in \[0, 1\], got 1.5'),
    (dict(crop_area=(0.0, 1.0)), 'crop_area must be a range'),
    (dict(blur=(2.0, 1.0)), 'blur must be a range'),
    (dict(noise=-0.1), 'must be at least 0, got 0, -0.1'),
  )
  def test_refuses_a_recipe(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      augment.Recipe(**fields)

  @parameterized.parameters(
    (
      augment.Recipe(),
      np.zeros((2, 4, 4, 3), np.float32),
      'uint8, got .*float',
    ),
    (augment.Recipe(), np.zeros((4, 4, 3), np.uint8), r'got \(4, 4, 3\)'),
    (augment.Recipe(gray=0.2), np.zeros((2, 4, 4, 1), np.uint8), '3 channels'),
    (augment.Recipe(blur=(1.0, 2.0)), pictures(2, 6, 9), 'exceed .* 6 pixels'),
  )
  def test_refuses_images(self, recipe, images, message):
    with self.assertRaisesRegex(ValueError, message):
      augment.augment(
        jax.random.key(0), images, jnp.arange(2), ids(0, 1), recipe=recipe
      )

  def test_refuses_ids(self):
    images = pictures(2)
    call = lambda index, view: augment.augment(
      jax.random.key(0), images, index, view, recipe=augment.Recipe()
    )
    with self.assertRaisesRegex(ValueError, r'must have shape \(2,\)'):
      call(jnp.arange(3), ids(0, 1))
    with self.assertRaisesRegex(ValueError, 'view must be uint32, got int32'):
      call(jnp.arange(2), jnp.arange(2))
