"""The experiment on factorisation machines: files, settings and devices."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import ds_facto, ring_costs, ring_figure, runner
from emc2.experiments.data import examples, generated
from emc2.ring import simulate

from tests.experiments import case

COUNTS = ring_costs.COUNTS
SMALL = dict(workers='2', passes=3, rank=2, steps_per_pass=4, evaluations=2)


def _data(loss='logistic', num_rows=60):
  tasks = {'logistic': 'classification', 'squared': 'regression'}
  found = generated.interactions(num_rows, 8, 2, task=tasks[loss], num_test=20)
  return ds_facto.Data('toy', found.train, found.test, loss)


class DsFactoTest(case.ExperimentTestCase):
  def setUp(self):
    super().setUp()
    # Optax's and TensorBoard's helpers count on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def _run(self, folder='run', **settings):
    config = ds_facto.Config(**(SMALL | settings))
    with (
      mock.patch.object(ring_costs, 'device_counts', return_value=[1]),
      mock.patch.object(ring_costs, 'simulated', return_value={}),
    ):
      return runner.start(config, ds_facto.run, self.folder / folder)

  def _fit(self, config, data, num_workers=2):
    method = ds_facto.make_method(config, data, num_workers)
    step, state = jax.jit(method.step), method.init(jax.random.key(config.seed))
    for number in range(config.passes):
      state, info = step(jax.random.key(1), state, (number, method.cells))
    return ds_facto.ds_facto.collect(state, method.layout), info['loss']

  @pytest.mark.slow
  def test_ratings(self):
    path = self.folder / 'ratings.csv'
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 9, (2, 300))
    stars = np.clip(3 + (users % 3 - 1) * (items % 3 - 1), 1, 5)
    lines = [
      f'u{u},i{i},{s}' for u, i, s in zip(users, items, stars, strict=True)
    ]
    path.write_text('\n'.join(['user,item,stars', *lines]))
    results = self._run(data=str(path), workers='1,3', passes=40)
    self.assertEqual(
      results, json.loads((self.folder / 'run/result.json').read_text())
    )
    keys = {'objective', 'rmse', 'passes', 'seconds'}
    self.assertEqual(
      set(results),
      {f'workers_{p}.{key}' for p in (1, 3) for key in keys}
      | {'devices_1.seconds_per_pass'},
    )
    for workers in (1, 3):
      self.assertEqual(results[f'workers_{workers}.passes'], 40)
      self.assertLess(results[f'workers_{workers}.rmse'], 0.6 * stars.std())
      series = runner.read_metrics(self.folder / f'run/workers_{workers}')
      steps, objective = series['objective']
      self.assertEqual(steps.tolist(), [0, 1, 40])
      self.assertEqual(objective[-1], results[f'workers_{workers}.objective'])
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 30_000)

  @pytest.mark.slow
  def test_generated(self):
    sizes = dict(num_rows=400, num_test=100)
    with mock.patch.object(ds_facto, 'GENERATED', sizes):
      for loss, score in (('', 'logloss'), ('squared', 'rmse')):
        results = self._run(score, loss=loss, passes=30)
        keys = {'objective', score, 'passes', 'seconds'}
        keys |= {'accuracy'} if score == 'logloss' else set()
        keys |= {'devices_1.seconds_per_pass'}
        self.assertEqual(set(results), keys)
        _, scores = runner.read_metrics(self.folder / score / 'workers_2')[
          score
        ]
        self.assertLess(scores[-1], scores[0])

  def test_reads_svmlight(self):
    train, test = self.folder / 'a.svm', self.folder / 'b.svm'
    train.write_text('3 1:1\n5 2:1\n3 1:1 3:1\n5 2:2\n')
    test.write_text('5 4:1\n')
    config = ds_facto.Config(data=f'{train},{test}')
    found = ds_facto.read(config)
    self.assertEqual(found.loss, 'logistic')
    self.assertEqual(found.train.labels.tolist(), [-1, 1, -1, 1])
    self.assertEqual(found.test.rows.shape, (1, 4))
    config = dataclasses.replace(config, loss='squared')
    self.assertEqual(ds_facto.read(config).train.labels.tolist(), [3, 5, 3, 5])
    config = dataclasses.replace(config, data=str(train), held_out=0.25)
    found = ds_facto.read(config)
    self.assertEqual((found.train.num_rows, found.test.num_rows), (3, 1))
    train.write_text('3 1:1\n5 2:1\n4 1:1\n')
    self.assertEqual(ds_facto.read(config).loss, 'squared')
    with self.assertRaisesRegex(ValueError, 'a.svm: expected two different'):
      ds_facto.read(dataclasses.replace(config, loss='logistic'))

  def test_scores(self):
    params = ds_facto.ds_facto.Params(
      np.float32(1), np.float32([1, -3]), np.zeros((2, 1), np.float32)
    )
    rows = examples.rows_lib.from_dense(np.float32([[1, 0], [0, 1], [0, 0]]))
    given = examples.Examples(rows, np.float32([1, -1, -1]))
    data = ds_facto.Data('', given, given, 'logistic')
    found = ds_facto.score(data, params)  # Scores 2, -2 and 1.
    want = np.mean(np.log1p(np.exp([-2, -2, 1])))
    self.assertAlmostEqual(found['logloss'], want, places=6)
    self.assertAlmostEqual(found['accuracy'], 2 / 3)
    found = ds_facto.score(data._replace(loss='squared'), params)
    self.assertAlmostEqual(found['rmse'], (4 / 3) ** 0.5, places=6)  # Clipped.

  def _made(self, data=None, num_workers=2, **given):
    """What a config asks of the cells and of the method."""
    config, module = ds_facto.Config(**(SMALL | given)), ds_facto.ds_facto
    cut = mock.patch.object(
      ds_facto.fm_cells, 'cut', wraps=ds_facto.fm_cells.cut
    )
    made = mock.patch.object(module, 'ds_facto', wraps=module.ds_facto)
    with cut as cut, made as made:
      ds_facto.make_method(config, data or _data(), num_workers)
    return cut.call_args.kwargs | made.call_args.kwargs, made.call_args.args

  @parameterized.parameters(
    (dict(ridge=0.5), dict(ridge_linear=0.5, ridge_factors=0.5)),
    (dict(init_std=1.0), dict(init_std=1.0)),
    (dict(steps_per_pass=8), dict(steps_per_visit=4)),
    (dict(mode='two_pass'), dict(mode='two_pass')),
    (dict(slots=2), dict(slots=2)),
    ({}, dict(inner=None, num_workers=2, loss='logistic', mesh=None)),
  )
  def test_settings_count(self, given, want):
    found, (num_features, rank) = self._made(**given)
    self.assertEqual(want, {name: found[name] for name in want})
    self.assertEqual((num_features, rank), (8, 2))

  def test_step_sizes(self):
    steps = lambda **given: self._made(**given)[0]['step_size']
    self.assertAlmostEqual(steps()(3), 0.5)
    self.assertAlmostEqual(steps(step_size=0.2)(3), 0.1)
    self.assertAlmostEqual(steps(step_size=0.2, decay=1.0)(3), 0.05)
    self.assertAlmostEqual(steps(inner='adam', step_size=0.2)(3), 0.1)

  def test_inner_transformations(self):
    """Which are chosen, and that their steps shrink from pass to pass."""
    rows = 2 * np.eye(60, 8, dtype=np.float32)
    rows[8:, 0] = -2
    sparse = examples.Examples(
      examples.rows_lib.from_dense(rows),
      np.ones(60, np.float32),
    )
    sparse = ds_facto.Data('', sparse, sparse, 'logistic')
    dense, one = _data('squared'), jax.numpy.ones(())
    size = np.abs(dense.train.rows.values).sum() / 60  # Of a row, in the mean.
    for given, wants in (
      (dict(inner='none', data=_data('squared')), None),
      (dict(data=dense), 0.06 / size),
      (dict(data=sparse), 0.03),
      (dict(inner='adagrad', step_size=0.5), 0.5),
    ):
      inner = self._made(**given)[0]['inner']
      if wants is None:
        self.assertIsNone(inner)
        continue
      state, sizes = inner.init(one), []
      for _ in range(5):  # Four steps of the first pass, then the next.
        updates, state = inner.update(one, state)
        sizes.append(-float(updates))
      self.assertAlmostEqual(sizes[0], wants, delta=0.06 * wants)
      if given.get('inner') != 'adagrad':
        np.testing.assert_allclose(sizes[:4], wants, rtol=1e-3)
      ratio = (4 / 5) ** 0.5 if given.get('inner') == 'adagrad' else 1.0
      self.assertAlmostEqual(sizes[4] / sizes[3], ratio * 0.5**0.5, delta=0.03)

  def test_seed_counts(self):
    data = _data()
    found = []

    def note(state, *_, key, **settings):
      found.append((np.asarray(state.blocks.factors), key))
      return state

    for seed in (0, 0, 1):
      config = ds_facto.Config(**(SMALL | dict(seed=seed)))
      method = ds_facto.make_method(config, data, 1)
      with mock.patch.object(runner, 'train', note):
        ds_facto.train(config, data, method, self.folder)
    (one, key), (again, _), (other, other_key) = found
    np.testing.assert_array_equal(one, again)
    self.assertGreater(np.abs(one - other).max(), 0.01)
    self.assertNotEqual(key, other_key)

  def test_steps_are_those_of_all_workers(self):
    config = ds_facto.Config(steps_per_pass=16)
    for workers, steps in ((1, 16), (3, 5), (8, 2), (32, 1)):
      with mock.patch.object(ds_facto.fm_cells, 'cut') as cut:
        cut.side_effect = StopIteration
        with self.assertRaises(StopIteration):
          ds_facto.make_method(config, _data(), workers)
      self.assertEqual(cut.call_args.kwargs['steps_per_visit'], steps)

  @pytest.mark.slow
  def test_mesh_equals_virtual(self):
    data = _data('squared')
    config = ds_facto.Config(**(SMALL | dict(workers='4')))
    one, _ = self._fit(config, data, 4)
    four, _ = self._fit(dataclasses.replace(config, executor='mesh'), data, 4)
    for x, y in zip(one, four, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)

  def test_measures_each_number_of_devices(self):
    config = ds_facto.Config(**(SMALL | dict(passes=1)))
    with (
      mock.patch.object(ring_costs, 'device_counts', return_value=[1, 2]),
      mock.patch.object(ring_costs, 'seconds_per_pass') as timed,
    ):
      timed.return_value = 2.0
      self.assertEqual(ds_facto.measure(config, _data()), {1: 2.0, 2: 2.0})
    devices = [
      call.args[1].sums.sharding.num_devices for call in timed.call_args_list
    ]
    self.assertEqual(devices, [1, 2])

  @parameterized.parameters(
    ({'workers': '0'}, "workers must be numbers from 1 up.* got '0'"),
    ({'workers': '1,x'}, 'workers must be numbers from 1 up'),
    ({'workers': '2,2'}, 'workers must not repeat'),
    ({'workers': '9', 'executor': 'mesh'}, 'workers must be at most the 8 dev'),
    ({'workers': '99'}, 'features must have at least 99 columns'),
    ({'executor': 'ring'}, "executor must be one of .* got 'ring'"),
    ({'mode': 'sgd'}, "mode must be one of .* got 'sgd'"),
    ({'loss': 'hinge'}, "loss must be one of .* got 'hinge'"),
    ({'inner': 'sgd'}, "inner must be one of .* got 'sgd'"),
    ({'rank': -1}, 'rank must be at least 0, got -1'),
    ({'passes': 0}, 'passes must be at least 1, got 0'),
    ({'slots': 0}, 'slots must be at least 1, got 0'),
    ({'steps_per_pass': 0}, 'steps_per_pass must be at least 1, got 0'),
    ({'evaluations': 1}, 'evaluations must be at least 2, got 1'),
    ({'seed': -1}, 'seed must be at least 0, got -1'),
    ({'step_size': -1.0}, 'step_size must be finite and at least 0, got -1'),
    ({'decay': float('nan')}, 'decay must be finite and at least 0, got nan'),
    ({'ridge': -1.0}, 'ridge must be finite and at least 0, got -1'),
    ({'init_std': 0.0}, 'init_std must be finite and above 0'),
    ({'data': 'ratings'}, 'ratings: expected a file, got none'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    sizes = dict(num_rows=200, num_test=5)
    with (
      mock.patch.object(ds_facto, 'GENERATED', sizes),
      self.assertRaisesRegex(ValueError, message),
    ):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  @pytest.mark.slow
  def test_tells_of_too_large_steps(self):
    data, config = (
      _data('squared'),
      ds_facto.Config(**(SMALL | dict(step_size=100.0, inner='none'))),
    )
    method = ds_facto.make_method(config, data, 2)
    with self.assertRaisesRegex(
      ValueError, 'step_size must be smaller .* in p'
    ):
      ds_facto.train(config, data, method, self.folder / 'run')


class RingCostsTest(parameterized.TestCase):
  def test_simulated(self):
    cases = {
      'wide': (simulate.Workload(1e12, 1e6, 10**6), simulate.Machine()),
      'narrow': (simulate.Workload(1e12, 1e9, 15), simulate.Machine()),
    }
    with (
      mock.patch.object(ring_costs, 'COUNTS', (1, 8)),
      mock.patch.object(ring_costs, '_VISITS', (64, 128)),
    ):
      found = ring_costs.simulated(cases)
    self.assertEqual(found['wide'].workers.tolist(), [1, 8])
    self.assertEqual(found['narrow'].workers.tolist(), [1])  # 2 P blocks.
    ring, bulk = found['wide'].ring, found['wide'].bulk
    self.assertAlmostEqual(ring[0], 1, delta=0.1)
    self.assertTrue(np.all(ring <= [1.1, 8]))
    self.assertTrue(np.all(ring[1:] > bulk[1:]))
    self.assertEqual(max(COUNTS), 4096)

  def test_memory(self):
    shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)
    found = ring_costs.memory(lambda x: (x, (), x[:, 0]), shape(4, 5))
    self.assertEqual(found, ring_costs.Memory(blocks=4, rows=20))

  def test_due_passes(self):
    self.assertEqual(ring_costs.due_passes(100, 4), {0, 1, 10, 100})
    self.assertEqual(ring_costs.due_passes(1, 9), {0, 1})

  def test_seconds(self):
    calls = []

    def step(key, state, constants):
      calls.append(1)
      return state + constants[1], {}

    one = jax.numpy.ones(())
    found = ring_costs.seconds_per_pass(step, one, one, least=0.0)
    self.assertGreater(found, 0)
    self.assertLen(calls, 1)  # Compiled once.

  @parameterized.parameters((1, [1]), (2, [1, 2]), (6, [1, 2, 4]))
  def test_device_counts(self, count, want):
    with mock.patch.object(jax, 'device_count', return_value=count):
      self.assertEqual(ring_costs.device_counts(), want)


class RingFigureTest(parameterized.TestCase):
  def test_draws_what_is_given(self):
    n = np.arange(4.0)
    curve = ring_figure.Curve(n, n / 2, 3 - n / 2, n / 9)
    speed_up = ring_costs.SpeedUp(np.array([1, 8]), n[1:3], n[1:3] / 2)
    drawn = ring_figure.draw(
      {1: curve, 2: curve},
      {1: 1.0, 2: 1.5},
      {'a case': speed_up},
      {1: ring_costs.Memory(2.0**20, 2.0**21), 2: ring_costs.Memory(9, 9)},
      objective='gap',
      score='F1',
      best=1.0,
      title='Toy',
    )
    by_passes, by_seconds, speed_ups, scores, _, memory = drawn.axes
    np.testing.assert_allclose(by_passes.lines[0].get_ydata(), 2 - n[1:] / 2)
    np.testing.assert_allclose(by_seconds.lines[1].get_xdata(), n[1:] / 2)
    np.testing.assert_allclose(scores.lines[0].get_ydata(), n[1:] / 9)
    np.testing.assert_allclose(speed_ups.lines[-1].get_ydata(), [1, 1.5])
    self.assertEqual(memory.lines[0].get_ydata()[0], 2.0)
    self.assertEqual(by_passes.get_ylabel(), 'gap')
    self.assertEqual(scores.get_ylabel(), 'F1')
    shared = by_seconds.get_xlabel()
    self.assertEqual(shared, 'seconds of passes, on one shared device')
    alone = ring_figure.draw(
      {1: curve},
      {1: 1.0},
      {},
      {1: ring_costs.Memory(1, 1)},
      objective='',
      score='',
      title='',
      shared=False,
    )
    self.assertEqual(alone.axes[1].get_xlabel(), 'seconds of passes')
