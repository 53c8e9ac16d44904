"""The Gaussian mixture experiment: every algorithm, setting and file."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import gmm, gmm_figure, runner
from emc2.topics import mixture

from tests.experiments import case

SMALL = dict(num_passes=3, components=4, blocks=2, batch_size=50)


def _rows(num_rows=200, dim=2):
  rng = np.random.default_rng(0)
  centers = 6 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
  rows = np.zeros((num_rows, dim))
  rows[:, :2] = centers[rng.integers(4, size=num_rows)][:, :dim]
  return rows + rng.normal(size=(num_rows, dim)) + 100


class GmmTest(case.ExperimentTestCase):
  def setUp(self):
    super().setUp()
    # Optax's and TensorBoard's helpers count on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))
    one = mock.patch.object(jax, 'device_count', return_value=1)
    self.enter_context(one)

  def _run(self, folder='run', **settings):
    config = gmm.Config(**(SMALL | settings))
    return runner.start(config, gmm.run, self.folder / folder)

  def _file(self, rows, name='rows.npy'):
    path = self.folder / name
    if path.suffix == '.npy':
      np.save(path, rows)
    else:
      np.savetxt(path, rows, delimiter=',')
    return str(path)

  @pytest.mark.slow
  def test_every_algorithm_of_generated_data(self):
    with mock.patch.dict(gmm.GENERATED, blobs=(400, 3, 4)):
      results = self._run(components=0, num_passes=8, blocks=2)
    self.assertEqual(
      results, json.loads((self.folder / 'run/result.json').read_text())
    )
    keys = ('elbo', 'seconds', 'components', 'adjusted_rand')
    self.assertEqual(
      set(results),
      {f'{name}.{key}' for name in gmm.ALGORITHMS for key in keys},
    )
    for name in gmm.ALGORITHMS:
      steps, bounds = runner.read_metrics(self.folder / 'run' / name)['elbo']
      self.assertLen(steps, 9)
      self.assertEqual(bounds[-1], results[f'{name}.elbo'])
      self.assertGreater(bounds[-1], bounds[0])
      self.assertGreater(results[f'{name}.seconds'], 0)
      self.assertBetween(results[f'{name}.components'], 1, 4)
      if name == 'vi':
        self.assertGreaterEqual(np.diff(bounds).min(), -1e-3)
    self.assertGreater(results['svi.elbo'], results['svi_paper.elbo'])
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 30_000)

  @pytest.mark.slow
  def test_files_and_covariances(self):
    rows = np.random.default_rng(0).normal(size=(200, 2))
    rows = rows @ np.array([[1.0, 0.95], [0.0, 0.1]])
    found = []
    for name, covariance in (('npy', 'full'), ('csv', 'diagonal')):
      path = self._file(rows, f'rows.{name}')
      read = gmm.read(gmm.Config(data=path)).rows
      np.testing.assert_allclose(read, rows, rtol=1e-6)
      given = dict(data=path, covariance=covariance, components=2)
      found.append(self._run(name, algorithm='vi', **given))
    self.assertEqual(set(found[0]), {'vi.elbo', 'vi.seconds', 'vi.components'})
    self.assertGreater(found[0]['vi.elbo'], found[1]['vi.elbo'] + 100)

  @parameterized.parameters(
    dict(concentration=0.5),
    dict(mean_strength=0.1),
    dict(degrees=9.0),
    dict(scale=2.0),
    dict(components=6),
  )
  @pytest.mark.slow
  def test_settings_of_the_model_count(self, **given):
    statistics = mixture.Statistics(np.ones(6), np.full((6, 4), 2.0))
    bounds = []
    for settings in ({}, given):
      config = gmm.Config(**(SMALL | settings))
      data = gmm.read(dataclasses.replace(config, data=self._file(_rows())))
      model = gmm.make_model(config, data)
      count = data.num_components
      part = jax.tree.map(lambda x, n=count: jnp.float32(x[:n]), statistics)
      bounds.append(float(mixture.model.evidence_terms(model, part)))
    self.assertGreater(abs(bounds[0] - bounds[1]), 1e-3)

  @parameterized.parameters(
    ('blocks', 2, 'num_blocks'),
    ('mixing', 'ring', 'mixing'),
    ('inner_batch', 10, 'inner_batch'),
    ('active_prob', 0.5, 'active_prob'),
  )
  def test_settings_of_esvi_count(self, name, value, argument):
    config = gmm.Config(**(SMALL | {'components': 8, 'blocks': 4, name: value}))
    data = gmm.Data(_rows(40).astype(np.float32), None, 8)
    model = gmm.make_model(config, data)
    with mock.patch.object(mixture.esvi, 'esvi') as esvi:
      method = gmm.make_method(config, 'esvi', model, data)
    self.assertEqual(esvi.call_args.kwargs[argument], value)
    self.assertEqual(method.steps_per_pass, config.blocks)
    self.assertLen(method.constants.data, config.blocks)

  def test_seed_counts(self):
    """In what is generated, in the start and in the steps."""
    read = lambda seed: gmm.read(gmm.Config(seed=seed)).rows
    self.assertGreater(np.abs(read(0) - read(1)).max(), 0.1)
    np.testing.assert_array_equal(read(1), read(1))
    data = gmm.Data(_rows().astype(np.float32), None, 4)
    given = []
    for seed in (0, 1):
      config = gmm.Config(**(SMALL | {'seed': seed}))
      model = gmm.make_model(config, data)
      with mock.patch.object(runner, 'train') as train:
        train.side_effect = lambda state, *_, **settings: (
          given.append((state.statistics.count, settings['key'])) or state
        )
        gmm.train(config, 'vi', model, data, self.folder)
    (count, key), (other_count, other_key) = given
    self.assertGreater(np.abs(count - other_count).max(), 0.1)
    self.assertNotEqual(key, other_key)

  def test_batch_size_counts(self):
    data = gmm.Data(_rows().astype(np.float32), None, 4)
    steps = []
    for batch_size in (50, 100):
      config = gmm.Config(**(SMALL | dict(batch_size=batch_size)))
      model = gmm.make_model(config, data)
      method = gmm.make_method(config, 'svi', model, data)
      steps.append(method.steps_per_pass)
    self.assertEqual(steps, [4, 2])

  @parameterized.parameters(
    ({'algorithm': 'em'}, r"algorithm must be some of .*got 'em'"),
    ({'algorithm': ''}, "algorithm must be some of .*got ''"),
    ({'algorithm': 'vi,vi'}, "algorithm must not repeat, got 'vi,vi'"),
    ({'covariance': 'tied'}, "covariance must be one of .*got 'tied'"),
    ({'num_passes': 0}, 'num_passes must be at least 1, got 0'),
    ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
    ({'components': -1}, 'components must be at least 0, got -1'),
    ({'components': 1}, 'num_components must be at least 2, got 1'),
    ({'inner_batch': -1}, 'inner_batch must be at least 0, got -1'),
    ({'seed': -1}, 'seed must be at least 0, got -1'),
    ({'degrees': -1.0}, 'degrees must be finite and positive.* got -1'),
    ({'degrees': 1.0, 'covariance': 'full'}, 'degrees must be .* above dim'),
    ({'scale': float('nan')}, 'scale must be finite and positive.* got nan'),
    ({'concentration': 0.0}, 'concentration must be .* positive, got 0'),
    ({'mean_strength': 0.0}, 'mean_strength must be .* positive, got 0'),
    ({'blocks': 3}, 'num_blocks must divide the 4 components, got 3'),
    ({'blocks': 4}, 'num_blocks must leave at least 2'),
    ({'mixing': 'mix'}, "mixing must be one of .*got 'mix'"),
    ({'active_prob': 1.5}, r'active_prob must lie in \(0, 1\], got 1.5'),
    ({'batch_size': 20_000}, 'batch_size must be at most the 10000 rows'),
    ({'data': 'clusters'}, "data must be one of .*got 'clusters'"),
    ({'data': '/nowhere.npy'}, '/nowhere.npy: expected a matrix, got no such'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  def test_bad_files(self):
    path = self.folder / 'rows.csv'
    path.write_text('1,2\n3,x\n')
    for data, message in (
      (str(path), 'rows.csv: expected a matrix: .*row 1'),
      (
        self._file(np.zeros(3), 'a.npy'),
        r'expected a matrix of numbers \(N, D\)',
      ),
      (self._file(np.array([['a']]), 'b.npy'), 'expected a matrix of numbers'),
      (
        self._file(np.array([[1.0, 2], [3, np.inf]]), 'c.npy'),
        'got inf in row 2, col',
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        gmm.read(gmm.Config(data=data))
    (self.folder / 'rows.npy').write_bytes(b'')
    with self.assertRaisesRegex(ValueError, 'rows.npy: expected a matrix'):
      gmm.read(gmm.Config(data=str(self.folder / 'rows.npy')))

  @pytest.mark.slow
  def test_goes_on_after_a_cut(self):
    data = gmm.Data(_rows().astype(np.float32), None, 4)
    config = gmm.Config(**SMALL)
    model = gmm.make_model(config, data)
    fit = lambda folder: gmm.train(
      config, 'svi', model, data, self.folder / folder
    )
    whole, train = fit('whole'), runner.train

    def cut(*args, num_steps, **kwargs):
      train(*args, num_steps=2, **kwargs)
      raise KeyboardInterrupt

    with (
      mock.patch.object(runner, 'train', cut),
      self.assertRaises(KeyboardInterrupt),
    ):
      fit('cut')
    jax.tree.map(np.testing.assert_array_equal, whole, fit('cut'))


class DevicesTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_8_devices_equal_1(self):
    self.enter_context(jax.numpy_dtype_promotion('standard'))
    data = gmm.Data(_rows().astype(np.float32), None, 16)
    config = gmm.Config(blocks=8)
    model = gmm.make_model(config, data)
    z0 = np.random.default_rng(0).dirichlet(np.ones(16), 200)

    def fit(num_devices):
      with mock.patch.object(jax, 'device_count', return_value=num_devices):
        method = gmm.make_method(config, 'esvi', model, data)
      rows, step = method.constants, jax.jit(method.step)
      self.assertLen(rows.data.sharding.device_set, num_devices)
      state = jax.jit(method.init)(jax.random.key(0), rows, jnp.float32(z0))
      for number in range(8):
        state, _ = step(jax.random.key(number), state, (number, rows))
      self.assertLen(state.responsibilities.sharding.device_set, num_devices)
      return jax.device_get(method.statistics(state))

    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2),
      fit(8),
      fit(1),
    )


class FigureTest(parameterized.TestCase):
  @parameterized.product(dim=(1, 2, 5), covariance=tuple(gmm.COVARIANCES))
  def test_projected_covariances(self, dim, covariance):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, dim)) @ rng.normal(size=(dim, dim)) + 3
    config = gmm.Config(covariance=covariance)
    data = gmm.Data(rows.astype(np.float32), None, 2)
    model = gmm.make_model(config, data)
    z = np.zeros((50, 2))
    z[:20, 0] = z[20:, 1] = 1
    with jax.enable_x64(True):
      found = mixture.model.summarize(model, jnp.asarray(rows), jnp.asarray(z))
      found = jax.device_get(found)
    points, ellipses, names = gmm.project(model, found, rows)
    self.assertEqual((points.shape, ellipses.shape), ((50, 2), (2, 2, 3)))
    self.assertLen(names, 2)
    for part, ellipse in zip((points[:20], points[20:]), ellipses, strict=True):
      np.testing.assert_allclose(ellipse[:, 0], part.mean(0), atol=1e-5)
      if covariance == 'full':
        want = np.cov(part.T, bias=True)
        np.testing.assert_allclose(ellipse[:, 1:], want, atol=1e-4)
    if dim <= 2:
      np.testing.assert_allclose(points[:, :dim], rows, atol=1e-5)

  def test_draws_each_component_where_it_is(self):
    curve = np.arange(3.0), np.arange(3.0), np.array([-9.0, -2.0, -1.0])
    ellipses = np.array([[[1.0, 4.0, 0.0], [2.0, 0.0, 1.0]]])
    drawn = gmm_figure.draw(
      {'vi': curve, 'esvi': curve},
      np.zeros((9_000, 2)),
      ellipses,
      title='One.',
      axes=('x', 'y'),
    )
    left, middle, right = drawn.axes
    self.assertEqual(
      (left.get_xlabel(), middle.get_xlabel()), ('passes', 'seconds')
    )
    self.assertLen(left.lines, 2)
    self.assertLen(right.lines[0].get_xdata(), 3_000)
    (patch,) = right.patches
    self.assertEqual(tuple(patch.center), (1.0, 2.0))
    self.assertCountEqual((patch.width, patch.height), (3.0, 6.0))
