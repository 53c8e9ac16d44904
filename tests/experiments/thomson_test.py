"""The Thomson experiment: every optimiser, every setting, every picture."""

import json
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import (
  runner,
  thomson,
  thomson_figure,
  thomson_methods,
)
from emc2.sphere import basin_hopping, configurations, minimize

from tests.experiments import case

ICOSAHEDRON = 49.165253057629
SMALL = dict(n=6, restarts=2, num_steps=20, optimizers='gradient_descent')


def _energy(points, exponent=1.0):
  """The sum over pairs, one after another."""
  total = 0.0
  for i, x in enumerate(points):
    for y in points[:i]:
      r = np.linalg.norm(x - y)
      total += -np.log(r) if exponent == 0 else r**-exponent
  return total


def _num_alike(points):
  """Ordered pairs of points, like a point and itself, that see the same."""
  apart = np.sort(np.linalg.norm(points[:, None] - points, axis=-1))
  return np.sum(np.abs(apart[:, None] - apart).max(axis=-1) < 0.02)


def _problem(**settings):
  given = dict(n=6, k=3, s=1.0, num_steps=60, hops=1) | settings
  config = thomson.Config(restarts=2, dtype='float32', **given)
  return thomson.make_problem(config, thomson.draw_starts(config, ''))


class ThomsonTest(case.ExperimentTestCase):
  def setUp(self):
    super().setUp()
    # Optax's bias correction counts on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def _run(self, folder='run', **settings):
    config = thomson.Config(**(SMALL | settings))
    return runner.start(config, thomson.run, self.folder / folder)

  @pytest.mark.slow
  def test_every_optimizer_comes_close_to_the_icosahedron(self):
    results = self._run(n=12, optimizers='all', num_steps=160, hops=2)
    self.assertEqual(
      results, json.loads((self.folder / 'run/result.json').read_text())
    )
    names = list(thomson_methods.METHODS)
    metrics = ('energy', 'relative_gap', 'seconds')
    own = {f'{name}.{metric}' for name in names for metric in metrics}
    self.assertContainsSubset(own, results)
    self.assertEqual(
      set(results) - own,
      {
        *('energy', 'best_known', 'relative_gap', 'seconds', 'gradient_norm'),
        *('min_distance', 'num_defects', 'total_defect_charge'),
      },
    )
    self.assertAlmostEqual(results['energy'], ICOSAHEDRON, delta=1e-11)
    self.assertLess(abs(results['relative_gap']), 1e-9)
    self.assertLessEqual(results['gradient_norm'], 1e-10)
    edge = 2 / np.sqrt((5 + 5**0.5) / 2)
    self.assertAlmostEqual(results['min_distance'], edge, delta=1e-8)
    self.assertEqual(results['num_defects'], 12)
    self.assertEqual(results['total_defect_charge'], 12)
    points = np.loadtxt(self.folder / 'run/points.csv', delimiter=',')
    self.assertEqual(points.shape, (12, 3))
    np.testing.assert_allclose(_energy(points), results['energy'], rtol=1e-14)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 50_000)

    loose = {'pair_sgd': 1e-2, 'annealing': 1e-3, 'penalty': 1e-5}
    loose |= {'adam': 1e-5, 'row_adam': 1e-5, 'momentum': 1e-4}
    loose |= {'augmented_lagrangian': 1e-6}
    for name in names:
      gap = results[f'{name}.relative_gap']
      self.assertBetween(gap, -1e-12, loose.get(name, 1e-8), msg=name)
      self.assertGreater(results[f'{name}.seconds'], 0)
      values = runner.read_metrics(self.folder / 'run' / name)
      steps, energies = values['energy']
      self.assertEqual(steps[-1], 3 if name == 'basin_hopping' else 160)
      self.assertEqual(energies[-1], results[f'{name}.energy'])
      self.assertTrue(np.all(np.diff(energies) <= 0))
      # A mean of equal numbers may be less by a rounding.
      self.assertTrue(np.all(values['loss'][1] >= energies - 1e-12))
    total = sum(results[f'{name}.seconds'] for name in names)
    self.assertAlmostEqual(results['seconds'], total)

  @parameterized.parameters(
    # A square by its logarithm, and a simplex.
    (4, 2, 0.0, -4 * np.log(2)),
    (5, 4, 2.0, 10 * 4 / 10),
  )
  @pytest.mark.slow
  def test_dimension_and_exponent(self, n, k, s, energy):
    results = self._run(n=n, k=k, s=s)
    self.assertAlmostEqual(results['energy'], energy, delta=1e-9)
    self.assertAlmostEqual(results['best_known'], energy, delta=1e-9)
    self.assertNotIn('num_defects', results)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 20_000)

  @pytest.mark.slow
  def test_nothing_is_said_of_what_is_not_known(self):
    results = self._run(n=7, s=1.5, dtype='float32')
    self.assertNotIn('best_known', results)
    self.assertNotIn('relative_gap', results)
    self.assertNotIn('gradient_descent.relative_gap', results)
    # The search was in float32, and the result is not.
    energy = results['gradient_descent.energy']
    self.assertEqual(float(np.float32(energy)), energy)
    points = np.loadtxt(self.folder / 'run/points.csv', delimiter=',')
    np.testing.assert_allclose(
      _energy(points, 1.5), results['energy'], rtol=1e-13
    )
    self.assertLessEqual(results['gradient_norm'], 1e-10)

  def test_tolerance_ends_the_polish(self):
    config = thomson.Config(n=6, tolerance=1e-1)
    points = thomson.draw_starts(config, '')[0]
    polished, energy, norm = thomson.polish(config, points)
    self.assertBetween(norm, 1e-6, 1e-1)
    self.assertAlmostEqual(energy, _energy(polished), delta=1e-9)

  def test_seed_and_restarts(self):
    draw = lambda **settings: thomson.draw_starts(
      thomson.Config(**settings), ''
    )
    self.assertEqual(draw(restarts=3).shape, (3, 12, 3))
    self.assertGreater(np.abs(draw() - draw(seed=1)).max(), 0.1)

  def test_symmetric_starts(self):
    draw = lambda name, **settings: thomson.draw_starts(
      thomson.Config(n=24, restarts=3, **settings), name
    )
    plain = draw('lbfgs')
    np.testing.assert_array_equal(plain, draw('basin_hopping', symmetric=False))
    np.testing.assert_array_equal(
      draw('lbfgs', k=4), draw('basin_hopping', k=4)
    )
    for points, random in zip(draw('basin_hopping'), plain, strict=True):
      self.assertGreater(_num_alike(points), 24)
      self.assertEqual(_num_alike(random), 24)

  def _train(self, folder, name, **settings):
    config = thomson.Config(**(SMALL | {'dtype': 'float32'} | settings))
    method = thomson_methods.METHODS[name](_problem(num_steps=20))
    return thomson.train(config, name, method, self.folder / folder)

  @pytest.mark.slow
  def test_goes_on_after_a_cut(self):
    whole = self._train('whole', 'annealing')
    train = runner.train

    def cut(*args, num_steps, **kwargs):
      train(*args, num_steps=num_steps // 2, **kwargs)
      raise KeyboardInterrupt

    with (
      mock.patch.object(runner, 'train', cut),
      self.assertRaises(KeyboardInterrupt),
    ):
      self._train('cut', 'annealing')
    again = self._train('cut', 'annealing')
    np.testing.assert_array_equal(again[0], whole[0])
    self.assertEqual(again[1], whole[1])

  @pytest.mark.slow
  def test_8_devices_equal_1(self):
    eight = self._train('eight', 'momentum', restarts=8)
    with mock.patch.object(jax, 'device_count', return_value=1):
      one = self._train('one', 'momentum', restarts=8)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-4, atol=1e-5)
    self.assertAlmostEqual(eight[1], one[1], delta=1e-5)

  @parameterized.parameters((8, 8), (16, 8), (4, 1))
  def test_chains_are_placed_over_the_devices(self, restarts, devices):
    keys = jax.random.split(jax.random.key(0), restarts)
    points, energy = jnp.zeros((restarts, 6, 3)), jnp.zeros(restarts)
    state = thomson.State(keys, points, energy)
    state, everywhere = thomson.place(state)
    for x in state:
      self.assertEqual(x.sharding.num_devices, devices)
      self.assertEqual(x.sharding.shard_shape(x.shape)[0], restarts // devices)
    self.assertEqual(everywhere is None, devices == 1)

  @parameterized.parameters(
    ({'n': 1}, 'n must be at least 2, got 1'),
    ({'k': 1}, 'k must be at least 2, got 1'),
    ({'s': -1.0}, 's must be finite and at least 0, got -1'),
    ({'s': float('nan')}, 's must be finite and at least 0, got nan'),
    ({'s': float('inf')}, 's must be finite and at least 0, got inf'),
    ({'restarts': 0}, 'restarts must be at least 1, got 0'),
    ({'num_steps': 0}, 'num_steps must be at least 1, got 0'),
    ({'hops': -1}, 'hops must be at least 0, got -1'),
    ({'seed': -1}, 'seed must be at least 0, got -1'),
    ({'tolerance': -1.0}, 'tolerance must be .* at least 0, got -1'),
    ({'tolerance': float('nan')}, 'tolerance must be .* got nan'),
    ({'dtype': 'int8'}, "dtype must be 'float32' or 'float64', got 'int8'"),
    ({'optimizers': 'sgd'}, "must be 'all' or some of .*'lbfgs'.* got 'sgd'"),
    ({'optimizers': ''}, "must be 'all' or some of .* got ''"),
    ({'optimizers': 'adam,adam'}, "must differ, got 'adam,adam'"),
    ({'optimizers': 'spherical_lbfgs', 'k': 4}, 'k must be 3 for .* got 4'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  def test_all_are_those_that_suit_the_dimension(self):
    self.assertLen(thomson.check(thomson.Config()), 11)
    names = thomson.check(thomson.Config(k=4))
    self.assertEqual(
      set(thomson_methods.METHODS) - set(names), {'spherical_lbfgs'}
    )


class MethodsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  @parameterized.parameters((3, 1.0, 4 * 50**-1.5), (3, 2.0, 4.7 * 50**-2.0))
  def test_step_size(self, k, s, want):
    problem = _problem(n=50, k=k, s=s)
    self.assertAlmostEqual(problem.step_size / want, 1, delta=0.01)

  def test_step_size_is_bounded_by_the_push_of_distant_points(self):
    problem = _problem(n=60, k=5, s=0.0)
    self.assertEqual(problem.push, 59 / 2)
    self.assertAlmostEqual(problem.step_size, 0.9 / 29.5)

  def test_push_is_the_median_of_the_radial_force(self):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(1, 5, 3))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    for s in (0.0, 1.0, 2.5):
      radial = []
      for i, x in enumerate(points[0]):
        others = np.delete(points[0], i, axis=0)
        r = np.linalg.norm(x - others, axis=1, keepdims=True)
        force = (s or 1.0) * (x - others) * r ** -(s + 2)
        radial.append(x @ force.sum(axis=0))
      got = thomson_methods.push_outwards(np.float32(points), s)
      self.assertAlmostEqual(got / np.median(radial), 1, delta=1e-5)

  def _scan(self, name, num_steps, **settings):
    problem = _problem(num_steps=num_steps, **settings)
    method = thomson_methods.METHODS[name](problem)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(problem.num_points, 3)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    key = jax.random.key(0)

    def body(state, number):
      key_now = jax.random.fold_in(key, number)
      state, points, energy = method.step(key_now, state, number)
      return state, (points, energy)

    return jax.jit(
      lambda state: jax.lax.scan(body, state, jnp.arange(num_steps))
    )(method.init(key, jnp.asarray(points)))

  @parameterized.parameters((5, 5), (6, 5))
  @pytest.mark.slow
  def test_pair_sgd_takes_as_many_pairs_as_there_are(self, n, matchings):
    state, _ = self._scan('pair_sgd', 3, n=n)
    self.assertEqual(state.count, 3 * matchings)

  @pytest.mark.slow
  def test_penalty_leaves_the_sphere_and_multipliers_do_not(self):
    violation = {}
    for name in ('penalty', 'augmented_lagrangian'):
      state, (points, energies) = self._scan(name, 300)
      params = np.asarray(state.search.params)
      violation[name] = np.abs(np.sum(params**2, axis=1) - 1)
      np.testing.assert_allclose(energies[-1], 9.985281374239, rtol=1e-6)
      np.testing.assert_allclose(np.linalg.norm(points, axis=-1), 1, rtol=1e-6)
      # Measured at the start and the ends of the stages only.
      self.assertEqual(np.sum(np.isfinite(energies)), 8)
    push = _problem().push
    # The octahedron's push over that of the weights.
    want = 9.985281374239 / 6 / (2e3 * push)
    np.testing.assert_allclose(violation['penalty'], want, rtol=0.02)
    self.assertLess(_energy(params), 9.985282)
    np.testing.assert_array_less(violation['augmented_lagrangian'], 3e-6)

  @pytest.mark.slow
  def test_basin_hopping_goes_to_the_nearest_minimum_first(self):
    def fake_minimize(points, energy_fn, *_, **__):
      return types.SimpleNamespace(points=points, energy=energy_fn(points))

    def fake_propose(key, points, **_):
      return points[::-1], jnp.int32(0)

    with (
      mock.patch.object(minimize, 'minimize', fake_minimize),
      mock.patch.object(basin_hopping, 'propose', fake_propose),
    ):
      method = thomson_methods.METHODS['basin_hopping'](_problem(hops=1))
      self.assertEqual(method.num_steps, 2)
      config = thomson.Config(n=6, restarts=1, dtype='float32')
      points = jnp.asarray(thomson.draw_starts(config, 'lbfgs')[0])
      key = jax.random.key(0)
      state = method.init(key, points)
      state, best, energy = method.step(key, state, jnp.int32(0))
      np.testing.assert_array_equal(best, points)
      self.assertAlmostEqual(float(energy), _energy(points), delta=1e-4)
      np.testing.assert_array_equal(state.points, points)
      state, *_ = method.step(key, state, jnp.int32(1))
      np.testing.assert_array_equal(state.points, points[::-1])


class FigureTest(parameterized.TestCase):
  def test_cells_are_counted_by_their_neighbours(self):
    points = configurations.icosahedron()
    degrees = np.array([5] * 10 + [7, 4])
    curves = {'a': (np.array([0.1, 0.2]), np.array([2.0, 1.0]))}
    drawn = thomson_figure.draw(
      points,
      degrees,
      curves,
      title='twelve',
      reference=1.0,
      reference_name='one',
    )
    left, right = drawn.axes
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    self.assertEqual(labels, ['5: 10', '7: 1', 'other: 1'])
    # What lies behind is not drawn.
    self.assertLess(len(left.collections[0].get_paths()), 12)
    self.assertEqual(left.get_title(), 'twelve')
    self.assertIn('one', right.get_ylabel())
    np.testing.assert_array_equal(right.lines[0].get_ydata(), [1, 1e-16])

  def test_a_curve_ends_where_it_last_fell(self):
    seconds = np.arange(1.0, 6.0)
    energies = np.array([3.0, 2.0, 1.5, 1.5, 1.5])
    drawn = thomson_figure.draw(
      np.eye(4),
      None,
      {'a': (seconds, energies)},
      title='',
      reference=1.0,
      reference_name='',
    )
    curve, dot = drawn.axes[1].lines
    np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(dot.get_xdata(), [3])
    bars = drawn.axes[0].patches
    self.assertEqual(sum(bar.get_height() for bar in bars), 6)
