"""Newton methods beside their peers: objectives, clocks, runs and the table."""

import dataclasses
import gzip
import json
import math
import time
from unittest import mock

import jax
import numpy as np
import pytest
import scipy.sparse
from absl.testing import parameterized

from emc2 import newton
from emc2.experiments import krylov_newton, runner
from emc2.experiments import krylov_newton_head as head_lib
from emc2.experiments import krylov_newton_methods as methods_lib
from emc2.experiments import krylov_newton_peers as peers
from emc2.experiments import krylov_newton_trace as trace_lib

from tests.experiments import case

TINY = dict(num_rows=60, num_features=8, ridge=1e-2)


def _softmax(num_rows=40, width=3, num_classes=4, ridge=0.1):
  rng = np.random.default_rng(0)
  rows = np.pad(
    rng.normal(size=(num_rows, width)), ((0, 0), (0, 1)), constant_values=1.0
  )
  labels = rng.integers(0, num_classes, num_rows).astype(np.int32)
  return peers.Softmax(rows, labels, num_classes, ridge)


def _logistic(kind='dense', ridge=0.1, scale=1.0):
  rng = np.random.default_rng(1)
  rows = scale * rng.normal(size=(30, 5)) * (rng.random((30, 5)) < 0.6)
  labels = rng.integers(0, 2, 30)
  if kind == 'sparse':
    rows = scipy.sparse.csr_array(rows)
  return peers.Logistic(rows, labels, ridge)


class ObjectiveTest(parameterized.TestCase):
  @parameterized.parameters('dense', 'sparse')
  def test_logistic(self, kind):
    objective, rng = _logistic(kind), np.random.default_rng(2)
    x = rng.normal(size=5)
    rows = _logistic().rows
    value = 0.05 * np.sum(x**2)
    for row, label in zip(rows, objective.labels, strict=True):
      chance = 1 / (1 + np.exp(-sum(row * x)))
      value -= np.log(chance if label else 1 - chance) / 30
    found, gradient = objective.value_and_gradient(x)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    self._check_derivatives(objective, x, gradient)

  def test_softmax(self):
    objective, rng = _softmax(), np.random.default_rng(2)
    x = rng.normal(size=objective.size)
    weights, value = x.reshape(4, 4), 0.05 * np.sum(x**2)
    for row, label in zip(objective.rows, objective.labels, strict=True):
      powers = np.exp(row @ weights)
      value -= np.log(powers[label] / powers.sum()) / 40
    found, gradient = objective.value_and_gradient(x)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    self._check_derivatives(objective, x, gradient)

  def _check_derivatives(self, objective, x, gradient):
    v = np.random.default_rng(3).normal(size=x.size)
    ahead, slope_ahead = objective.value_and_gradient(x + 1e-5 * v)
    behind, slope_behind = objective.value_and_gradient(x - 1e-5 * v)
    np.testing.assert_allclose(v @ gradient, (ahead - behind) / 2e-5, rtol=1e-7)
    np.testing.assert_allclose(
      objective.hvp(x, v), (slope_ahead - slope_behind) / 2e-5, rtol=1e-6
    )

  def test_large_scores(self):
    """No overflow, which is an error here, and no rounding to 0 or 1."""
    x = np.ones(5)
    with np.errstate(all='raise', under='ignore'):
      objective = _logistic(scale=1e4, ridge=0.0)
      value, gradient = objective.value_and_gradient(x)
      scores = objective.rows @ x
      wrong = np.where(objective.labels > 0, -scores, scores)
      np.testing.assert_allclose(value, np.mean(np.maximum(wrong, 0)), rtol=0.1)
      objective.hvp(x, x)
      _softmax().value_and_gradient(np.linspace(-1e4, 1e4, 16))
    self.assertTrue(np.all(np.isfinite(gradient)))

  def test_points_are_told_apart(self):
    """What belongs to a point is kept for that point alone."""
    for objective in (_logistic(), _softmax()):
      x = np.zeros(objective.size)
      v = np.random.default_rng(4).normal(size=objective.size)
      first = objective.hvp(x, v)
      other, _ = objective.value_and_gradient(v)
      x += v  # In place, as SciPy's L-BFGS-B does.
      value, _ = objective.value_and_gradient(x)
      self.assertEqual(value, other)
      self.assertGreater(np.abs(objective.hvp(x, v) - first).max(), 1e-3)


class TraceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path

  def _trace(self, look=None, **limits):
    all_limits = dict(gradient_tol=0.0, max_iterations=9, max_seconds=60.0)
    limits = trace_lib.Limits(**(all_limits | limits))
    look = look or _logistic().value_and_gradient
    return trace_lib.Trace('toy', look, limits, self.folder)

  def test_clock_stands_while_it_looks(self):
    now = 5.0

    def look(x):
      nonlocal now
      now += 1_000
      return _logistic().value_and_gradient(x)

    clock = mock.patch.object(time, 'perf_counter', lambda: now)
    with clock, self._trace(look) as trace:
      trace.run()
      now += 0.25
      self.assertFalse(trace.is_overdue())
      self.assertFalse(trace.look(np.ones(5), 1, trace_lib.Work(2, 3, 4)))
      trace.halt()
      trace.run()
      now += 0.5
      trace.halt()
      trace.look(np.zeros(5), 2, trace_lib.Work(5, 6, 7))
      trace.run()
      now += 60
      self.assertTrue(trace.is_overdue())
      trace.end(trace_lib.End.STUCK, accuracy=0.5)
    curve, numbers = trace_lib.read_ended(self.folder)
    self.assertEqual(numbers, {'accuracy': 0.5, 'result': 2})
    self.assertEqual(curve.iterations.tolist(), [1, 2])
    counted = [curve.hvps, curve.gradients, curve.evaluations]
    self.assertEqual(np.stack(counted).tolist(), [[2, 5], [3, 6], [4, 7]])
    self.assertEqual(curve.seconds.tolist(), [0.25, 0.75])
    value, gradient = _logistic().value_and_gradient(np.ones(5))
    self.assertAlmostEqual(curve.objective[0], value, places=12)
    self.assertAlmostEqual(curve.gradient_norm[0], np.linalg.norm(gradient))

  @parameterized.parameters(
    (dict(), 8, False, trace_lib.End.LIMIT),
    (dict(), 9, True, trace_lib.End.LIMIT),
    (dict(gradient_tol=10.0), 1, True, trace_lib.End.CONVERGED),
    (dict(max_seconds=1e-9), 1, True, trace_lib.End.LIMIT),
  )
  def test_limits(self, limits, iterations, want, reason):
    with self._trace(**limits) as trace:
      trace.run()
      self.assertEqual(
        trace.look(np.ones(5), iterations, trace_lib.Work()), want
      )
      trace.end()
    self.assertEqual(trace_lib.read_ended(self.folder)[1]['result'], reason)

  def test_ends_are_results_of_newton_methods(self):
    """A method's own result is taken for why it ended."""
    ends = trace_lib.End
    for result, end in (
      (newton.Result.OK, ends.LIMIT),
      (newton.Result.CONVERGED, ends.CONVERGED),
      (newton.Result.SEARCH_FAILED, ends.STUCK),
      (newton.Result.NON_FINITE, ends.NON_FINITE),
    ):
      self.assertEqual(int(result), int(end))

  def test_what_is_not_finite_is_no_point(self):
    self.assertIsNone(trace_lib.read_ended(self.folder))
    with self._trace() as trace:
      trace.look(np.ones(5), 0, trace_lib.Work())
      self.assertTrue(trace.look(np.full(5, np.nan), 1, trace_lib.Work()))
      np.testing.assert_array_equal(trace.point, np.ones(5))
      self.assertIsNone(trace_lib.read_ended(self.folder))
      trace.end()
    curve, numbers = trace_lib.read_ended(self.folder)
    self.assertEqual(curve.iterations.tolist(), [0])
    self.assertEqual(numbers['result'], trace_lib.End.NON_FINITE)


class KrylovNewtonTest(case.ExperimentTestCase):
  def _run(self, folder='run', **settings):
    config = krylov_newton.Config(**(TINY | settings))
    return runner.start(config, krylov_newton.run, self.folder / folder)

  def _run_alone(self, **settings):
    """Without what finds the least objective, which has to be compiled."""
    with mock.patch.object(
      krylov_newton, 'find_optimum', return_value=math.inf
    ):
      return self._run(**settings)

  def test_generated(self):
    names = [
      'krylov_3',
      'cubic_newton',
      'sscn_4',
      'optax_lbfgs',
      'trust_krylov',
      'newton_cg',
      'l_bfgs_b',
    ]
    make = methods_lib.make_advance
    with mock.patch.object(methods_lib, 'make_advance', wraps=make) as made:
      results = self._run(methods=','.join(names))
    self.assertEqual(made.call_count, 5)  # The reference shares one of four.
    for call in made.call_args_list:
      # Time of compiling is nowhere else than in the first call.
      self.assertEqual(make(*call.args)._cache_size(), 1)
    stored = json.loads((self.folder / 'run/result.json').read_text())
    self.assertEqual(results, stored)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 50_000)
    metrics = [
      'iterations',
      'hvps',
      'gradients',
      'evaluations',
      'seconds',
      'gradient_norm',
      'objective',
      'result',
      *(f'iterations_to_{gap}' for gap in krylov_newton.GAPS),
    ]
    want = {f'{name}.{metric}' for name in names for metric in metrics}
    want |= {f'{name}.compile_seconds' for name in names[:4]} | {'optimum'}
    self.assertEqual(set(results), want)
    for name in names:
      get = lambda metric, name=name: results[f'{name}.{metric}']
      tol = 1e-8
      if name in ('trust_krylov', 'newton_cg'):  # Which go no further.
        tol = 1e-6
      else:
        self.assertEqual(get('result'), 1, msg=name)
      self.assertLessEqual(get('gradient_norm'), tol, msg=name)
      # Of a ridge mu the gap is at most |g|^2 / (2 mu).
      gap = get('objective') - results['optimum']
      self.assertBetween(gap, 0, tol**2 / 0.02 + 1e-15, msg=name)
      self.assertGreater(get('seconds'), 0, msg=name)
      tries = [get(f'iterations_to_{gap}') for gap in krylov_newton.GAPS]
      self.assertEqual(tries, sorted(tries))
      self.assertBetween(tries[-1], 1, get('iterations'))
    self.assertEqual(
      results['krylov_3.hvps'], 3 * results['krylov_3.iterations']
    )
    self.assertEqual(
      results['krylov_3.gradients'], results['krylov_3.iterations']
    )
    self.assertEqual(
      results['cubic_newton.hvps'], 8 * results['cubic_newton.iterations']
    )
    for name in ('sscn_4', 'optax_lbfgs', 'l_bfgs_b'):
      self.assertEqual(results[f'{name}.hvps'], 0)
    for name in ('optax_lbfgs', 'l_bfgs_b'):
      self.assertGreaterEqual(
        results[f'{name}.gradients'], results[f'{name}.iterations']
      )
    self.assertGreater(
      results['sscn_4.iterations'], 2 * results['cubic_newton.iterations']
    )
    # What has ended is read back, and what has not is run again.
    (self.folder / 'run/l_bfgs_b/ended.json').unlink()
    with mock.patch.object(methods_lib, 'drive', side_effect=AssertionError):
      again = self._run(methods=','.join(names))
    self.assertNotEqual(results.pop('l_bfgs_b.seconds'), 0)
    again.pop('l_bfgs_b.seconds')
    self.assertEqual(results, again)

  @parameterized.parameters(('a.svm', open), ('a.svm.gz', gzip.open))
  def test_reads_svmlight(self, name, opened):
    path = self.folder / name
    with opened(path, 'wt') as file:
      file.write('+1 1:1 4:2\n-1 2:0.5\n-1 3:1\n+1 2:1 4:-1\n')
    config = krylov_newton.Config(data=str(path), ridge=0.5)
    data = krylov_newton.read(config, self.folder)
    self.assertEqual(data.objective.labels.tolist(), [1, 0, 0, 1])
    self.assertEqual(data.objective.rows.shape, (4, 4))
    self.assertEqual((data.title, data.start), (name, 0.5))
    self.assertEqual(data.objective.ridge, 0.5)

  def test_svmlight(self):
    rng, path = np.random.default_rng(0), self.folder / 'a.svm'
    lines = []
    for _ in range(50):
      ids = np.sort(rng.choice(40, 5, replace=False)) + 1
      pairs = ' '.join(f'{i}:1' for i in ids)
      lines.append(f'{3 if ids[0] < 5 else 7} {pairs}\n')
    path.write_text(''.join(lines))
    results = self._run_alone(
      data=str(path),
      methods='krylov_4,l_bfgs_b',
      dtype='float32',
      gradient_tol=1e-6,
    )
    self.assertEqual(results['krylov_4.result'], trace_lib.End.CONVERGED)
    self.assertAlmostEqual(
      results['krylov_4.objective'], results['l_bfgs_b.objective'], places=9
    )

  @parameterized.parameters(
    ('1 1:1\n2 1:2\n3 2:1\n', 'expected labels of two classes, got 3: 1, 2, 3'),
    ('1 1:1\n1 1:2\n', 'expected labels of two classes, got 1: 1'),
    ('1 1:1\n0 1:x\n', "a.svm:2: expected INDEX:VALUE, got '1:x'"),
  )
  def test_refuses_files(self, text, message):
    path = self.folder / 'a.svm'
    path.write_text(text)
    with self.assertRaisesRegex(ValueError, message):
      self._run(data=str(path))

  def test_encoder(self):
    """Of features that are there; the slow twin trains the encoder."""
    objective = _softmax(60, 4, 10)
    features = head_lib.Features(objective.rows, objective.labels)
    with mock.patch.object(
      head_lib, 'extract', return_value=(features, features)
    ) as extract:
      results = self._run_alone(
        data='encoder',
        methods='krylov_4,l_bfgs_b,sklearn_lbfgs',
        num_epochs=3,
        seed=5,
      )
    self.assertEqual(extract.call_args.kwargs, dict(num_epochs=3, seed=5))
    values = [
      results[f'{name}.objective']
      for name in ('krylov_4', 'l_bfgs_b', 'sklearn_lbfgs')
    ]
    np.testing.assert_allclose(values, results['optimum'], rtol=1e-8)
    self.assertEqual(results['krylov_4.result'], trace_lib.End.CONVERGED)
    self.assertEqual(
      results['krylov_4.hvps'], 4 * results['krylov_4.iterations']
    )
    self.assertNotIn('sklearn_lbfgs.hvps', results)
    accuracy = results['krylov_4.accuracy']
    self.assertEqual(accuracy, results['sklearn_lbfgs.accuracy'])
    self.assertBetween(accuracy, 0.2, 1.0)

  @pytest.mark.slow
  def test_encoder_that_is_trained(self):
    # Optax's bias correction counts on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))
    results = self._run(
      data='encoder',
      methods='krylov_10,optax_lbfgs,sklearn_newton_cholesky',
      num_epochs=5,
    )
    for name in ('krylov_10', 'optax_lbfgs', 'sklearn_newton_cholesky'):
      self.assertGreater(results[f'{name}.accuracy'], 0.85)
      np.testing.assert_allclose(
        results[f'{name}.objective'], results['optimum'], rtol=1e-8
      )

  def test_settings_count(self):
    def fit(**given):
      config = krylov_newton.Config(**(TINY | given))
      data = krylov_newton.read(config, self.folder)
      folder = self.folder / str(len(list(self.folder.iterdir())))
      device = krylov_newton.share(config, data)
      curve, _ = krylov_newton.fit(config, data, 'l_bfgs_b', device, folder)
      return curve

    first = fit()
    self.assertLess(first.gradient_norm[-1], 1e-8)
    for given in (
      dict(num_rows=50),
      dict(num_features=7),
      dict(ridge=1e-3),
      dict(seed=1),
    ):
      apart = fit(**given).objective[-1] - first.objective[-1]
      self.assertGreater(abs(apart), 1e-6, msg=given)
    # In fewer digits the rows are others, but not by much.
    apart = fit(dtype='float32').objective[-1] - first.objective[-1]
    self.assertBetween(abs(apart), 1e-12, 1e-6)
    self.assertGreater(fit(memory=1).iterations[-1], first.iterations[-1])
    self.assertBetween(fit(gradient_tol=1e-3).gradient_norm[-1], 1e-5, 1e-3)
    self.assertEqual(fit(max_iterations=2).iterations.tolist(), [0, 1, 2])
    self.assertEqual(fit(max_seconds=1e-9).iterations.tolist(), [0])
    objective = krylov_newton.read(
      krylov_newton.Config(**TINY), self.folder
    ).objective
    for start in (0.5, 2.0):
      value, _ = objective.value_and_gradient(np.full(8, start))
      self.assertEqual(fit(start=start).objective[0], value)
    self.assertEqual(fit().objective[0], fit(start=0.5).objective[0])

  def test_settings_of_the_device_count(self):
    config = krylov_newton.Config(**TINY)
    data = krylov_newton.read(config, self.folder)

    def begin(name='krylov_2', **given):
      changed = dataclasses.replace(config, **given)
      method = krylov_newton.make_method(changed, data, name)
      with jax.enable_x64(changed.dtype == 'float64'):
        placed = krylov_newton.place(data, changed.dtype)
        return method.init(jax.random.key(0), placed)

    self.assertEqual(begin().x.dtype, np.float64)
    self.assertEqual(begin(dtype='float32').x.dtype, np.float32)
    self.assertEqual(float(begin().regularization), 2e-3)
    self.assertEqual(float(begin(regularization=0.5).regularization), 0.5)
    state = begin('optax_lbfgs', memory=3).opt_state[0]
    self.assertEqual(state.diff_params_memory.shape, (3, 8))

  def test_defaults(self):
    for data, known, start in (
      ('generated', krylov_newton.LOGISTIC, 0.5),
      ('encoder', krylov_newton.HEAD, 0.0),
    ):
      config = krylov_newton.Config(data=data)
      self.assertEqual(krylov_newton.check(config), list(known))
      self.assertEqual(
        krylov_newton.choose(config, list(known), 300), list(known)
      )
      fewer = krylov_newton.choose(config, list(known), 20)
      self.assertIn('krylov_20', fewer)
      self.assertNotIn('sscn_50', fewer)
      features = head_lib.Features(np.ones((12, 2)), np.arange(12) % 10)
      with mock.patch.object(
        head_lib, 'extract', return_value=(features, features)
      ):
        self.assertEqual(krylov_newton.read(config, self.folder).start, start)

  @parameterized.parameters(
    (dict(methods='sgd'), "methods must be 'all' or some of .* got 'sgd'"),
    (dict(methods='krylov_0'), "methods must be .* got 'krylov_0'"),
    (dict(methods='krylov_9'), "at most the 8 dimensions .* got 'krylov_9'"),
    (dict(methods='sscn_9'), "at most the 8 dimensions .* got 'sscn_9'"),
    (dict(methods='krylov_2,krylov_2'), 'methods must differ'),
    (dict(data='encoder', methods='sscn_2'), "methods must be .* got 'sscn_2'"),
    (
      dict(data='encoder', methods='sklearn_lbfgs', start=0.5),
      'start must be 0 for scikit-learn, got 0.5',
    ),
    (dict(data='none.svm'), 'none.svm: expected a file, got none'),
    (dict(num_rows=0), 'num_rows must be at least 1, got 0'),
    (dict(num_features=0), 'num_features must be at least 1, got 0'),
    (dict(num_epochs=0), 'num_epochs must be at least 1, got 0'),
    (dict(max_iterations=0), 'max_iterations must be at least 1, got 0'),
    (dict(memory=0), 'memory must be at least 1, got 0'),
    (dict(seed=-1), 'seed must be at least 0, got -1'),
    (dict(ridge=-1.0), 'ridge must be at least 0, got -1'),
    (dict(gradient_tol=math.nan), 'gradient_tol must be at least 0, got nan'),
    (dict(max_seconds=0.0), 'max_seconds must be finite and above 0, got 0'),
    (dict(regularization=0.0), 'regularization must be finite and above 0'),
    (dict(start=math.inf), 'start must be finite, got inf'),
    (dict(dtype='bfloat16'), "dtype must be one of .* got 'bfloat16'"),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  def test_start_whose_objective_is_not_finite(self):
    with self.assertRaisesRegex(ValueError, 'start must have a finite objecti'):
      self._run(methods='l_bfgs_b', start=1e200)

  @parameterized.parameters(
    ('krylov_20', (15, 19, 23, 30)),
    ('krylov_10', (15, 19, 23, 32)),
    ('krylov_5', (25, 45, 66, 107)),
    ('cubic_newton', (15, 19, 23, 30)),
    ('sscn_100', (64, 118, 169, 275)),
    ('sscn_50', (178, 353, 541, 882)),
    ('krylov_10', (13, 17, 20, 27), 2000),
    ('sscn_100', (53, 81, 108, 162), 2000),
  )
  @pytest.mark.slow
  def test_table_of_the_specification(self, name, want, num_features=300):
    results = self._run(
      num_rows=1000,
      num_features=num_features,
      ridge=0.0,
      methods=name,
      gradient_tol=1e-8,
      max_seconds=60.0,
    )
    found = [
      results[f'{name}.iterations_to_{gap}'] for gap in krylov_newton.GAPS
    ]
    np.testing.assert_allclose(found, want, rtol=0.15)
