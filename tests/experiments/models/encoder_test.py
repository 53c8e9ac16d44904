"""Encoders: their sizes are torchvision's, their functions are pure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from flax import nnx

from emc2.experiments import models
from emc2.experiments.models import encoder as encoder_lib
from emc2.experiments.models import layers, resnet


def _build(name='convnet', image_shape=(8, 8, 1), seed=0, **kwargs):
  kwargs = dict(embedding=6, hidden=10) | kwargs
  rngs = nnx.Rngs(seed)
  return models.build(name, image_shape=image_shape, rngs=rngs, **kwargs)


def _abstract(*args, **kwargs):
  return models.split(nnx.eval_shape(lambda: _build(*args, **kwargs)))


def _count(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _images(n=3, image_shape=(8, 8, 1), seed=0):
  values = np.random.default_rng(seed).uniform(size=(n, *image_shape))
  return jnp.asarray(values, jnp.float32)


class SizeTest(parameterized.TestCase):
  # torchvision's totals less batch norm (2 per channel) and fc.
  def test_trunk_is_that_of_torchvision(self):
    self._check_trunk_is_that_of_torchvision(
      'resnet18', 'group', 11_689_512 - 513_000
    )

  @parameterized.parameters(
    ('resnet18', 'none', 11_689_512 - 9_600 - 513_000),
    ('resnet50', 'none', 25_557_032 - 53_120 - 2_049_000),
    ('resnet50', 'group', 25_557_032 - 2_049_000),
    ('resnet18_cifar', 'none', 11_166_912 - (49 - 9) * 3 * 64),
    ('resnet50_cifar', 'none', 23_454_912 - (49 - 9) * 3 * 64),
  )
  @pytest.mark.slow
  def test_trunk_is_that_of_torchvision_elsewhere(self, name, norm, want):
    self._check_trunk_is_that_of_torchvision(name, norm, want)

  def _check_trunk_is_that_of_torchvision(self, name, norm, want):
    pure = _abstract(name, (96, 96, 3), norm=norm)
    self.assertEqual(_count(pure.params['trunk']), want)

  @parameterized.parameters(
    ('resnet18', 512, 512, 0, 512), ('resnet50', 2048, 2048, 1, 128)
  )
  def test_head_is_that_of_the_paper(self, name, width, hidden, k, embedding):
    pure = _abstract(
      name, (96, 96, 3), hidden=hidden, projector_layers=k, embedding=embedding
    )
    want = (width + 1) * hidden + k * (hidden + 1) * hidden
    want += (hidden + 1) * embedding
    head = {k: v for k, v in pure.params.items() if k != 'trunk'}
    self.assertEqual(_count(head), want)

  @parameterized.parameters(
    # Mlp: 64 -> 10. ConvNet: 9 taps of 1*16 + 16*32 + 32*64.
    ('mlp', 65 * 10),
    ('convnet', 9 * (16 + 16 * 32 + 32 * 64)),
  )
  def test_small_trunks(self, name, want):
    self.assertEqual(_count(_abstract(name).params['trunk']), want)

  @parameterized.parameters(
    ('imagenet', 96, 3, (1, 2, 4, 4)), ('cifar', 32, 4, (1, 2, 4, 4))
  )
  def test_maps(self, stem, size, want, widths):
    self._check_maps(stem, size, want, widths)

  @parameterized.parameters(
    ('imagenet', 224, 7, (1, 2, 4, 4)), ('cifar', 36, 5, (1, 2, 4, 4))
  )
  @pytest.mark.slow
  def test_maps_elsewhere(self, stem, size, want, widths):
    self._check_maps(stem, size, want, widths)

  def _check_maps(self, stem, size, want, widths):
    for block, expansion in ((resnet.BasicBlock, 1), (resnet.Bottleneck, 4)):
      make = lambda block=block: resnet.ResNet(
        (size, size, 3),
        block=block,
        depths=(1, 1, 2, 1),
        widths=widths,
        stem=stem,
        rngs=nnx.Rngs(0),
      )
      graphdef, params = nnx.split(nnx.eval_shape(make))
      maps = jax.eval_shape(
        lambda p, x, g=graphdef: nnx.merge(g, p).maps(x),
        params,
        jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
      )
      self.assertEqual(maps.shape, (2, want, want, 4 * expansion))

  def test_refuses_an_unknown_stem(self):
    with self.assertRaisesRegex(ValueError, "stem.*'stl'"):
      resnet.ResNet(
        (8, 8, 1),
        block=resnet.BasicBlock,
        depths=(1,),
        widths=(2,),
        stem='stl',
        rngs=nnx.Rngs(0),
      )


class BlockTest(parameterized.TestCase):
  """One block of each kind against plain `lax`, the order written out."""

  def _conv(self, images, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
      images,
      kernel[...],
      (stride, stride),
      ((padding, padding), (padding, padding)),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  @parameterized.parameters((4, 2), (4, 1), (3, 1))
  @pytest.mark.slow
  def test_basic(self, inputs, stride):
    block = resnet.BasicBlock(
      inputs, 4, stride=stride, norm='none', dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    images = _images(2, (7, 7, inputs))
    want = jax.nn.relu(self._conv(images, block.conv1.kernel, stride, 1))
    want = self._conv(want, block.conv2.kernel, 1, 1)
    if (inputs, stride) == (4, 1):
      want = jax.nn.relu(want + images)
    else:
      kernel = block.shortcut.conv.kernel
      want = jax.nn.relu(want + self._conv(images, kernel, stride, 0))
    np.testing.assert_allclose(block(images), want, rtol=1e-5, atol=1e-5)

  def test_bottleneck_strides_in_its_3x3(self):
    self._check_bottleneck_strides_in_its_3x3(8, 2)

  @parameterized.parameters((8, 1), (4, 1))
  @pytest.mark.slow
  def test_bottleneck_strides_in_its_3x3_elsewhere(self, inputs, stride):
    self._check_bottleneck_strides_in_its_3x3(inputs, stride)

  def _check_bottleneck_strides_in_its_3x3(self, inputs, stride):
    block = resnet.Bottleneck(
      inputs, 2, stride=stride, norm='none', dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    images = _images(2, (7, 7, inputs))
    want = jax.nn.relu(self._conv(images, block.conv1.kernel, 1, 0))
    want = jax.nn.relu(self._conv(want, block.conv2.kernel, stride, 1))
    want = self._conv(want, block.conv3.kernel, 1, 0)
    if (inputs, stride) == (8, 1):
      want = jax.nn.relu(want + images)
    else:
      kernel = block.shortcut.conv.kernel
      want = jax.nn.relu(want + self._conv(images, kernel, stride, 0))
    np.testing.assert_allclose(block(images), want, rtol=1e-5, atol=1e-5)


class EncoderTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mlp', (8, 8, 1)),
    ('convnet', (9, 7, 3)),
    ('resnet_small', (12, 12, 3)),
  )
  @pytest.mark.slow
  def test_shapes_and_norms(self, name, image_shape):
    pure = models.split(_build(name, image_shape))
    images = _images(2, image_shape)
    embeddings = jax.jit(pure.apply_embeddings)(pure.params, images)
    features = jax.jit(pure.apply_features)(pure.params, images)
    self.assertEqual((embeddings.shape, features.shape), ((2, 6), (2, 10)))
    self.assertEqual((embeddings.dtype, features.dtype), (jnp.float32,) * 2)
    norms = np.linalg.norm(embeddings, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
    self.assertTrue(np.all(np.asarray(features) >= 0))

  def test_mlp_equals_numpy(self):
    pure = models.split(_build('mlp', projector_layers=2))
    images = _images()
    linear = lambda x, p: x @ np.float64(p['kernel']) + np.float64(p['bias'])
    p = pure.params
    h = np.float64(images).reshape(3, -1)
    h = np.maximum(linear(h, p['trunk']['layers']['linear0']), 0)
    h = np.maximum(linear(h, p['hidden']), 0)
    z = np.maximum(linear(h, p['projector']['linear0']), 0)
    z = np.maximum(linear(z, p['projector']['linear1']), 0)
    z = linear(z, p['out'])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    features = pure.apply_features(p, images)
    np.testing.assert_allclose(features, h, rtol=1e-5, atol=1e-6)
    embeddings = pure.apply_embeddings(p, images)
    np.testing.assert_allclose(embeddings, z, rtol=1e-4, atol=1e-5)

  @pytest.mark.slow
  def test_convnet_equals_lax(self):
    pure = models.split(_build())
    maps = images = _images()
    for i, stride in enumerate((1, 2, 2)):
      maps = jax.lax.conv_general_dilated(
        maps,
        pure.params['trunk']['convs'][f'conv{i}']['kernel'],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
      maps = jax.nn.relu(maps)
    hidden = pure.params['hidden']
    want = maps.reshape(3, -1) @ hidden['kernel'] + hidden['bias'][None, :]
    got = jax.jit(pure.apply_features)(pure.params, images)
    np.testing.assert_allclose(got, jax.nn.relu(want), rtol=1e-4, atol=1e-5)

  @pytest.mark.slow
  def test_each_image_stands_alone(self):
    # No state, and no statistics over the batch: also with group norm.
    trunk = resnet.ResNet(
      (8, 8, 3),
      block=resnet.Bottleneck,
      depths=(1, 1),
      widths=(32, 32),
      stem='imagenet',
      norm='group',
      rngs=nnx.Rngs(0),
    )
    model = models.Encoder(
      trunk, image_shape=(8, 8, 3), embedding=6, hidden=10, rngs=nnx.Rngs(1)
    )
    pure = models.split(model)
    apply_fn, images = jax.jit(pure.apply_embeddings), _images(2, (8, 8, 3))
    both = apply_fn(pure.params, images)
    np.testing.assert_array_equal(both, apply_fn(pure.params, images))
    alone = apply_fn(pure.params, images[:1])
    np.testing.assert_allclose(both[:1], alone, rtol=1e-4, atol=1e-5)

  @parameterized.parameters('mlp', 'convnet')
  @pytest.mark.slow
  def test_zero_image_is_finite(self, name):
    pure = models.split(_build(name))
    zeros = jnp.zeros((2, 8, 8, 1))
    loss = lambda p: jnp.sum(pure.apply_embeddings(p, zeros)[:, 0])
    grad_fn = jax.jit(jax.value_and_grad(loss))
    for params in (pure.params, jax.tree.map(jnp.zeros_like, pure.params)):
      value, grads = grad_fn(params)
      for leaf in (value, *jax.tree.leaves(grads)):
        self.assertTrue(np.all(np.isfinite(leaf)))

  @parameterized.parameters('mlp', 'convnet')
  @pytest.mark.slow
  def test_dtype_of_the_computation(self, name):
    full = models.split(_build(name))
    half = models.split(_build(name, dtype=jnp.bfloat16))
    for leaf in jax.tree.leaves(half.params):
      self.assertEqual(leaf.dtype, jnp.float32)
    images = _images()
    want = jax.jit(full.apply_embeddings)(full.params, images)
    got = jax.jit(half.apply_embeddings)(half.params, images)
    self.assertEqual(got.dtype, jnp.float32)
    # Rounded to 8 bits on the way, and normalised after that.
    np.testing.assert_allclose(got, want, atol=0.05)
    self.assertGreater(float(jnp.max(jnp.abs(got - want))), 1e-5)
    norms = np.linalg.norm(got, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)

  def test_options_change_the_network(self):
    plain = _count(_abstract().params)
    self.assertEqual(
      _count(_abstract(projector_layers=2).params) - plain, 2 * 11 * 10
    )
    self.assertEqual(_count(_abstract(embedding=7).params) - plain, 11)

  @parameterized.parameters(
    (dict(name='alexnet'), ValueError, "name.*'alexnet'"),
    (dict(norm='batch'), ValueError, "norm.*'batch'"),
    (dict(image_shape=(8, 8)), ValueError, r'image_shape.*\(8, 8\)'),
    (dict(image_shape=(0, 8, 1)), ValueError, r'image_shape.*\(0, 8, 1\)'),
    (dict(embedding=0), ValueError, 'embedding.*0'),
    (dict(hidden=0), ValueError, 'hidden.*0'),
    (dict(projector_layers=-1), ValueError, 'projector_layers.*-1'),
    (dict(name='mlp', norm='group'), NotImplementedError, "'mlp'.*'group'"),
    (dict(norm='group'), NotImplementedError, '32 groups.*16'),
  )
  def test_refuses(self, kwargs, error, message):
    with self.assertRaisesRegex(error, message):
      _build(**kwargs)

  @parameterized.parameters(
    (jnp.zeros((2, 8, 8, 3)), r'\(2, 8, 8, 3\)'),
    (jnp.zeros((8, 8, 1)), r'\(8, 8, 1\)'),
    (jnp.zeros((2, 8, 8, 1), jnp.uint8), 'uint8'),
  )
  def test_refuses_images(self, images, message):
    model = _build()
    for apply_fn in (model, model.features):
      with self.assertRaisesRegex(ValueError, f'images.*{message}'):
        apply_fn(images)


class SplitTest(parameterized.TestCase):
  def test_params_are_plain(self):
    params = models.split(_build('resnet_small')).params
    for path, leaf in jax.tree.leaves_with_path(params):
      self.assertIsInstance(leaf, jax.Array)
      for key in path:
        self.assertIsInstance(key, jax.tree_util.DictKey)
        self.assertIsInstance(key.key, str)

  def test_equals_the_module(self):
    model = _build(projector_layers=11)  # 'linear10' sorts before 'linear2'.
    pure, images = models.split(model), _images()
    got = pure.apply_embeddings(pure.params, images)
    np.testing.assert_array_equal(got, model(images))
    features = pure.apply_features(pure.params, images)
    np.testing.assert_array_equal(features, model.features(images))

  def test_trains_with_optax_under_scan(self):
    pure, images = models.split(_build()), _images(4)
    tx = optax.adam(1e-2)
    target = layers.unit_rows(jnp.asarray(np.eye(4, 6), jnp.float32))

    def loss_fn(params):
      return -jnp.mean(pure.apply_embeddings(params, images) * target)

    def step(carry, _):
      params, opt_state = carry
      value, grads = jax.value_and_grad(loss_fn)(params)
      updates, opt_state = tx.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), value

    carry = (pure.params, tx.init(pure.params))
    # Optax's Adam takes a power of an integer.
    with jax.numpy_dtype_promotion('standard'):
      _, values = jax.jit(lambda c: jax.lax.scan(step, c, length=60))(carry)
    self.assertLess(float(values[-1]), -0.16)  # The least is -4/24.

  def test_is_traced_once(self):
    pure, images, traces = models.split(_build()), _images(), []

    @jax.jit
    def apply_fn(params, images):
      traces.append(1)
      return pure.apply_embeddings(params, images)

    other = models.split(_build(seed=1)).params
    first, second = apply_fn(pure.params, images), apply_fn(other, images)
    self.assertLen(traces, 1)
    self.assertGreater(float(jnp.max(jnp.abs(first - second))), 1e-3)

  def test_draws_one_set_of_params_per_key(self):
    make = lambda rngs: models.build(
      'mlp', image_shape=(8, 8, 1), embedding=6, hidden=10, rngs=rngs
    )
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key: models.draw_params(make, key)
    many, images = jax.jit(jax.vmap(draw))(keys), _images()
    pure = models.split(make(nnx.Rngs(0)))
    got = jax.jit(jax.vmap(pure.apply_embeddings, (0, None)))(many, images)
    alone = jax.jit(lambda key: pure.apply_embeddings(draw(key), images))
    for number in range(3):
      want = alone(keys[number])
      np.testing.assert_allclose(got[number], want, rtol=1e-4, atol=1e-5)
    self.assertGreater(float(jnp.max(jnp.abs(got[0] - got[1]))), 1e-3)

  def test_equals_one_device_under_shard_map(self):
    pure, images = models.split(_build()), _images(8)
    mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def loss(params, images):
      rows = pure.apply_embeddings(params, images)
      return jax.lax.psum(jnp.sum(rows[:, 0]), 'data')

    sharded = jax.shard_map(
      loss, mesh=mesh, in_specs=(spec(), spec('data')), out_specs=spec()
    )
    got = jax.jit(jax.grad(sharded))(pure.params, images)
    whole = lambda p: jnp.sum(pure.apply_embeddings(p, images)[:, 0])
    want = jax.jit(jax.grad(whole))(pure.params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      got,
      want,
    )

  @parameterized.parameters('dropout', 'batch_norm')
  def test_refuses_other_state(self, kind):
    model = _build('mlp')
    rngs = nnx.Rngs(0)
    if kind == 'dropout':
      model.extra = nnx.Dropout(0.5, rngs=rngs)
    else:
      model.extra = nnx.BatchNorm(4, rngs=rngs)
    with self.assertRaisesRegex(ValueError, "model.*'extra'"):
      models.split(model)


@dataclasses.dataclass(frozen=True)
class _Preset:
  name: str
  image_shape: tuple[int, int, int]
  embedding: int
  hidden: int
  projector_layers: int


class PresetTest(parameterized.TestCase):
  @parameterized.parameters(
    _Preset('resnet18', (96, 96, 3), 512, 512, 0),
    _Preset('resnet50', (224, 224, 3), 128, 2048, 1),
  )
  @pytest.mark.slow
  def test_a_step_lowers(self, preset):
    kwargs = dataclasses.asdict(preset)
    pure = _abstract(kwargs.pop('name'), dtype=jnp.bfloat16, **kwargs)
    images = jax.ShapeDtypeStruct((4, *preset.image_shape), jnp.float32)
    loss = lambda p, x: jnp.sum(pure.apply_embeddings(p, x)[:, 0])
    traced = jax.jit(jax.grad(loss)).trace(pure.params, images)
    for platform in ('cpu', 'tpu'):
      lowered = traced.lower(lowering_platforms=(platform,))
      self.assertIn('bf16', lowered.as_text())

  def test_names(self):
    self.assertIs(models.NAMES, encoder_lib.NAMES)
    for name in models.NAMES:
      self.assertEqual(_abstract(name).params['out']['bias'].shape, (6,))
