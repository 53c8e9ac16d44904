"""The experiment on softmax regression: data, settings and devices."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest
import scipy.special
from absl.testing import parameterized
from sklearn import metrics

from emc2.experiments import ds_mlr, ring_costs, runner
from emc2.experiments.data import examples, generated

from tests.experiments import case

SMALL = dict(workers='2', passes=3, steps_per_pass=4, evaluations=2)


def _data(num_rows=60, num_classes=5, ridge=1e-2, best=None):
  train, test = generated.softmax(num_rows, 6, num_classes, num_test=20)
  return ds_mlr.Data('toy', train, test, ridge, best)


class DsMlrTest(case.ExperimentTestCase):
  def setUp(self):
    super().setUp()
    # Optax's and TensorBoard's helpers count on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def _run(self, folder='run', **settings):
    config = ds_mlr.Config(**(SMALL | settings))
    with (
      mock.patch.object(ring_costs, 'device_counts', return_value=[1]),
      mock.patch.object(ring_costs, 'simulated', return_value={}),
    ):
      return runner.start(config, ds_mlr.run, self.folder / folder)

  def _made(self, data=None, num_workers=2, **given):
    """What a config asks of the split and of the method."""
    config = ds_mlr.Config(**(SMALL | given))
    cells, module = ds_mlr.mlr_cells, ds_mlr.ds_mlr
    split = mock.patch.object(cells, 'split', wraps=cells.split)
    made = mock.patch.object(module, 'ds_mlr', wraps=module.ds_mlr)
    with split as split, made as made:
      ds_mlr.make_method(config, data or _data(), num_workers)
    settings = split.call_args.kwargs | made.call_args.kwargs
    return settings, split.call_args.args[0]

  def _fit(self, config, data, num_workers):
    method = ds_mlr.make_method(config, data, num_workers)
    step, state = jax.jit(method.step), method.init(jax.random.key(0))
    for number in range(config.passes):
      state, _ = step(jax.random.key(1), state, (number, method.batch))
    return method.layout.sort_weights(state.weights)

  @pytest.mark.slow
  def test_synthetic(self):
    results = self._run(
      data='synthetic', workers='1,2', passes=40, steps_per_pass=32
    )
    self.assertEqual(
      results, json.loads((self.folder / 'run/result.json').read_text())
    )
    keys = {'objective', 'accuracy', 'macro_f1', 'passes', 'seconds'}
    self.assertEqual(
      set(results),
      {f'workers_{p}.{key}' for p in (1, 2) for key in keys}
      | {'devices_1.seconds_per_pass', 'optimum'},
    )
    # The constant lets it sink a little below the specification's optimum.
    self.assertBetween(results['optimum'], 1.53, 1.5463929)
    for workers in (1, 2):
      gap = results[f'workers_{workers}.objective'] - results['optimum']
      self.assertBetween(gap, 0, 0.1)
      series = runner.read_metrics(self.folder / f'run/workers_{workers}')
      steps, objective = series['objective']
      self.assertEqual(steps.tolist(), [0, 1, 40])
      self.assertAlmostEqual(objective[0], np.log(24), places=6)
      self.assertGreater(results[f'workers_{workers}.accuracy'], 0.3)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 30_000)

  @parameterized.parameters('docstrings', 'extreme', 'text')
  @pytest.mark.slow
  def test_data_without_a_download(self, name):
    found = ds_mlr.read(ds_mlr.Config(data=name))
    self.assertGreater(found.train.num_classes, 300)
    self.assertGreater(found.test.num_rows, 900)
    self.assertEqual(found.best is not None, name == 'extreme')
    self.assertEqual(found.ridge, ds_mlr.RIDGES[name])

  def test_reads_svmlight(self):
    train, test = self.folder / 'a.svm', self.folder / 'b.svm'
    train.write_text('3 1:1\n7 2:1\n3 1:1 3:1\n7 2:2\n')
    test.write_text('7 4:1\n5\n')
    config = ds_mlr.Config(data=f'{train},{test}')
    found = ds_mlr.read(config)
    self.assertEqual(found.train.class_names, ('3', '5', '7'))
    self.assertEqual(found.train.labels.tolist(), [0, 2, 0, 2])
    np.testing.assert_array_equal(
      found.test.rows.to_dense(), [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    )
    self.assertEqual(found.ridge, 0.25)
    found = ds_mlr.read(dataclasses.replace(config, intercept=False, ridge=0.5))
    self.assertEqual(found.train.rows.shape, (4, 4))
    self.assertEqual(found.ridge, 0.5)
    config = dataclasses.replace(config, data=str(train), held_out=0.25)
    found = ds_mlr.read(config)
    self.assertEqual((found.train.num_rows, found.test.num_rows), (3, 1))
    train.write_text('3 1:1\n3 2:1\n')
    with self.assertRaisesRegex(ValueError, 'a.svm: expected two classes or m'):
      ds_mlr.read(dataclasses.replace(config, held_out=0.5))

  def test_reads_digits_with_a_constant(self):
    found = ds_mlr.read(ds_mlr.Config(ridge=10.0))
    rows = found.train.rows.to_dense()
    self.assertEqual(rows.shape, (1437, 65))
    np.testing.assert_array_equal(rows[:, -1], 1)
    self.assertEqual((rows.min(), rows.max()), (0, 1))
    self.assertLess(found.best, np.log(10))

  def test_finds_the_optimum_of_the_specification(self):
    found = ds_mlr.read(ds_mlr.Config(data='synthetic', intercept=False))
    self.assertAlmostEqual(found.best, 1.546392914, places=6)
    self.assertEqual(found.ridge, 1e-3)

  def test_knows_the_extreme_optimum(self):
    make = generated.extreme
    small = lambda seed: make(300, 16, 5, width=4, num_test=9, seed=seed)
    with mock.patch.object(generated, 'extreme', small):
      found = ds_mlr.read(ds_mlr.Config(data='extreme', ridge=1e-2))
    self.assertAlmostEqual(
      found.best, ds_mlr.solve(found.train, 1e-2), places=7
    )

  def test_objective(self):
    data = _data()
    weights = np.random.default_rng(0).normal(size=(6, 5))
    x = data.train.rows.to_dense().astype(np.float64)
    logs = scipy.special.log_softmax(x @ weights, axis=1)
    want = -np.mean(logs[np.arange(60), data.train.labels])
    want += 0.05 * np.sum(weights**2)
    found, gradient = ds_mlr.objective(
      weights, data.train, 0.1, with_gradient=True
    )
    self.assertAlmostEqual(found, want, places=10)
    ahead = weights.copy()
    ahead[2, 3] += 1e-6
    slope = (ds_mlr.objective(ahead, data.train, 0.1) - found) / 1e-6
    self.assertAlmostEqual(gradient[2, 3], slope, places=5)

  def test_scores(self):
    data = _data()
    weights = np.random.default_rng(0).normal(size=(6, 5))
    found = ds_mlr.score(data, weights)
    predicted = np.argmax(data.test.rows.to_dense() @ weights, axis=1)
    labels = data.test.labels
    self.assertAlmostEqual(found['accuracy'], np.mean(predicted == labels), 6)
    want = metrics.f1_score(labels, predicted, average='macro')
    self.assertAlmostEqual(found['macro_f1'], want, places=6)

  @parameterized.parameters(
    (dict(refresh='fused'), dict(refresh='fused')),
    (dict(steps_per_pass=8), dict(num_minibatches=4)),
    (dict(steps_per_pass=0), dict(num_minibatches=20)),
    (dict(slots=2), dict(slots=2)),
    (dict(seed=3), dict(seed=3)),
    ({}, dict(inner=None, num_workers=2, ridge=1e-2, mesh=None)),
  )
  def test_settings_count(self, given, want):
    found, features = self._made(**given)
    self.assertEqual(want, {name: found[name] for name in want})
    self.assertIsInstance(features, np.ndarray)

  def test_step_sizes(self):
    steps = lambda **given: self._made(**given)[0]['step_size']
    self.assertAlmostEqual(steps()(3), 1.0)
    self.assertAlmostEqual(steps(step_size=0.2)(3), 0.1)
    self.assertAlmostEqual(steps(step_size=0.2, decay=1.0)(3), 0.05)
    self.assertAlmostEqual(steps(inner='adam')(3), 0.1)

  def test_sparse_rows_take_adam(self):
    rows = examples.rows_lib.from_dense(np.eye(60, 8, dtype=np.float32))
    given = examples.Examples(
      rows, np.arange(60, dtype=np.int32) % 3, ('a', 'b', 'c')
    )
    found, features = self._made(ds_mlr.Data('', given, given, 1e-2, None))
    self.assertIs(features, rows)
    one = jax.numpy.ones(())
    state, sizes = found['inner'].init(one), []
    for _ in range(5):  # Four steps of the first pass, then the next.
      updates, state = found['inner'].update(one, state)
      sizes.append(-float(updates))
    np.testing.assert_allclose(sizes[:4], 0.2, rtol=1e-3)
    self.assertAlmostEqual(sizes[4], 0.2 * 0.5**0.5, places=4)

  @pytest.mark.slow
  def test_mesh_equals_virtual(self):
    data, config = _data(), ds_mlr.Config(**SMALL)
    one = self._fit(config, data, 4)
    four = self._fit(dataclasses.replace(config, executor='mesh'), data, 4)
    np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-5)

  def test_measures_each_number_of_devices(self):
    config = ds_mlr.Config(**SMALL)
    with (
      mock.patch.object(ring_costs, 'device_counts', return_value=[1, 2, 8]),
      mock.patch.object(ring_costs, 'seconds_per_pass') as timed,
    ):
      timed.return_value = 2.0
      found = ds_mlr.measure(config, _data())
    self.assertEqual(found, {1: 2.0, 2: 2.0})  # Eight are more than classes.
    devices = [
      call.args[1].weights.sharding.num_devices for call in timed.call_args_list
    ]
    self.assertEqual(devices, [1, 2])

  @parameterized.parameters(
    ({'workers': '0'}, "workers must be numbers from 1 up.* got '0'"),
    ({'workers': '9', 'executor': 'mesh'}, 'workers must be at most the 8 dev'),
    ({'workers': '25'}, 'num_classes must be at least the 25 blocks, got 24'),
    ({'executor': 'ring'}, "executor must be one of .* got 'ring'"),
    ({'refresh': 'never'}, "refresh must be one of .* got 'never'"),
    ({'inner': 'sgd'}, "inner must be one of .* got 'sgd'"),
    ({'passes': 0}, 'passes must be at least 1, got 0'),
    ({'slots': 0}, 'slots must be at least 1, got 0'),
    ({'steps_per_pass': -1}, 'steps_per_pass must be at least 0, got -1'),
    ({'steps_per_pass': 2000}, 'features must have a row for each of the 2000'),
    ({'evaluations': 1}, 'evaluations must be at least 2, got 1'),
    ({'seed': -1}, 'seed must be at least 0, got -1'),
    ({'step_size': -1.0}, 'step_size must be finite and at least 0, got -1'),
    ({'decay': float('nan')}, 'decay must be finite and at least 0, got nan'),
    ({'ridge': -1.0}, 'ridge must be finite and at least 0, got -1'),
    ({'data': 'numbers'}, 'numbers: expected a file, got none'),
    ({'data': 'a,b,c'}, "data must name a file or two, .* got 'a,b,c'"),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**(dict(data='synthetic') | given))
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  @pytest.mark.slow
  def test_tells_of_too_large_steps(self):
    config = ds_mlr.Config(
      **(SMALL | dict(step_size=1e4, refresh='fused', passes=9))
    )
    data = _data()
    method = ds_mlr.make_method(config, data, 2)
    with self.assertRaisesRegex(ValueError, 'step_size must be smaller, or re'):
      ds_mlr.train(config, data, method, self.folder / 'run')
