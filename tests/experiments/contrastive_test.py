"""The contrastive experiment: every method, every preset, every way to load."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from PIL import Image

from emc2.experiments import contrastive, runner
from emc2.experiments import data as data_lib

from tests import processes

SMALL = dict(
  num_seeds=1,
  num_epochs=1,
  encoder='mlp',
  embedding=8,
  hidden=16,
  batch_size=8,
  num_evaluations=1,
  exact_epochs=1,
  steps_per_call=2,
)


def _folder(root, num_images=12, size=8):
  rng = np.random.default_rng(0)
  for split in ('train', 'test'):
    for name in ('left', 'right'):
      folder = root / split / name
      folder.mkdir(parents=True)
      for number in range(num_images):
        pixels = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{number}.png')
  return str(root)


class ContrastiveTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    # Optax's bias correction counts on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  @pytest.mark.slow
  def test_every_method_runs_and_is_drawn(self):
    methods = ','.join(contrastive.METHODS)
    settings = SMALL | {'batch_size': 64, 'steps_per_call': 1}
    config = contrastive.Config(method=methods, num_keys=128, **settings)
    results = runner.start(config, contrastive.run, self.folder)
    stored = json.loads((self.folder / 'result.json').read_text())
    self.assertEqual(results, stored)
    for method in contrastive.METHODS:
      self.assertBetween(results[f'{method}.probe_accuracy'], 0.2, 1.0)
      self.assertGreater(results[f'{method}.gradient_error'], 0)
      self.assertLess(results[f'{method}.global_loss'], 8.0)
      self.assertGreater(results[f'{method}.seconds_per_step'], 0)
    self.assertGreater((self.folder / 'figure.png').stat().st_size, 10_000)

  def _train(self, name, **settings):
    settings = SMALL | {'steps_per_call': 1} | settings
    config = contrastive.resolve(contrastive.Config(**settings))
    task = contrastive.open_task(config)
    method = contrastive.make_method(task, config.method)
    state = contrastive.train(task, method, 0, self.folder / name)
    return state.params

  @pytest.mark.slow
  def test_loaded_equals_resident(self):
    self.check_loaded(method='emc2', num_views=0)

  @parameterized.parameters(
    {'method': 'emc2', 'num_views': 2},
    {'method': 'emc2_resample', 'num_views': 0},
    {'method': 'negative_cache', 'num_views': 2},
  )
  @pytest.mark.slow
  def test_loaded_equals_resident_of_others(self, **settings):
    self.check_loaded(**settings)

  def check_loaded(self, **settings):
    """Images from files train as those in memory do."""
    settings['data'] = _folder(self.folder / 'images')
    resident = self._train('resident', **settings)
    loaded = self._train('loaded', memory_limit=1, **settings)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      resident,
      loaded,
    )

  @parameterized.parameters([1])
  @pytest.mark.slow
  def test_8_devices_equal_1(self, memory_limit):
    self.check_devices(memory_limit)

  @parameterized.parameters([data_lib.dataset.MEMORY_LIMIT])
  @pytest.mark.slow
  def test_8_devices_equal_1_of_others(self, memory_limit):
    self.check_devices(memory_limit)

  def check_devices(self, memory_limit):
    """Parameters after a training."""
    settings = dict(
      method='emc2',
      data=_folder(self.folder / 'images'),
      memory_limit=memory_limit,
      optimizer='sgd',
    )
    one = self._train('one', **settings)
    eight = self._train('eight', devices=8, **settings)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      one,
      eight,
    )

  @parameterized.parameters('emc2', 'negative_cache')
  @pytest.mark.slow
  def test_2_processes_equal_1_and_share_the_reading(self, method):
    settings = SMALL | dict(
      method=method,
      data=_folder(self.folder / 'images'),
      memory_limit=1,
      steps_per_call=1,
      optimizer='sgd',
    )
    results = []
    for number in (1, 2):
      folder = self.folder / str(number)
      folder.mkdir()
      processes.run(
        'tests.experiments.trains_contrastive',
        number,
        str(folder),
        json.dumps(settings),
      )
      results.append(dict(np.load(folder / 'params.npz')))
    one, two = results
    self.assertEqual(one.pop('read'), 2 * two.pop('read'))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      one,
      two,
    )

  @parameterized.parameters(
    ('digits', (8, 8, 1)),
    ('cifar10', (32, 32, 3)),
    ('stl10_resnet18', (96, 96, 3)),
    ('imagenet100_resnet50', (256, 256, 3)),
  )
  @pytest.mark.slow
  def test_presets_lower(self, preset, image_shape):
    config = contrastive.resolve(contrastive.Config(preset=preset))
    images = np.zeros((2 * config.batch_size, *image_shape), np.uint8)
    task = contrastive.make_task(config, data_lib.Dataset(images))
    method = contrastive.make_method(task, config.method.split(',')[0])
    key = jax.random.key(0)
    state = jax.eval_shape(method.init, key, task.encoder.params)
    data = contrastive.resident_data(task, 0)
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    batch = jax.tree.map(abstract, (jnp.int32(0), data))
    lowered = jax.jit(method.step).lower(key, state, batch)
    after, _ = lowered.out_info
    jax.tree.map(
      lambda a, b: self.assertEqual((a.shape, a.dtype), (b.shape, b.dtype)),
      after,
      state,
    )

  @parameterized.parameters(
    ({'preset': 'no'}, "preset must be one of .* got 'no'"),
    ({'method': 'emc2,no'}, "method must be one of .* got 'no'"),
    ({'optimizer': 'no'}, "optimizer must be one of .* got 'no'"),
    ({'recipe': 'no'}, "recipe must be one of .* got 'no'"),
    ({'encoder': 'no'}, "encoder must be one of .* got 'no'"),
    ({'dtype': 'no'}, "dtype must be one of .* got 'no'"),
    ({'batch_size': 1}, 'batch_size must be at least 2, got 1'),
    ({'batch_size': 2000}, 'batch_size must lie .* got 2000'),
    ({'batch_size': 4, 'devices': 8}, 'multiple of devices, 8, got 4'),
    ({'burn_in': 1.0}, r'burn_in must lie in \[0, 1\), got 1'),
    ({'inverse_temperature': -1.0}, 'inverse_temperature must be .* got -1'),
    ({'inverse_temperature': float('nan')}, 'inverse_temperature .* got nan'),
    ({'data': 'nowhere'}, 'nowhere: expected .* a folder'),
    ({'num_seeds': 0}, 'num_seeds must be at least 1, got 0'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    config = contrastive.Config(**given)
    with self.assertRaisesRegex(ValueError, message):
      runner.start(config, contrastive.run, self.folder)
    self.assertFalse((self.folder / 'emc2').exists())

  def test_every_setting_is_known_to_a_preset_or_has_a_default(self):
    for preset in contrastive.PRESETS:
      config = contrastive.resolve(contrastive.Config(preset=preset))
      for field in dataclasses.fields(config):
        if field.name != 'image_size':
          self.assertIsNotNone(getattr(config, field.name), field.name)

  def test_what_is_given_beats_the_preset(self):
    config = contrastive.Config(preset='stl10_resnet18', batch_size=64)
    self.assertEqual(contrastive.resolve(config).batch_size, 64)
    self.assertEqual(contrastive.resolve(config).encoder, 'resnet18')
