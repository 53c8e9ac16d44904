"""Langevin dynamics: a loop, a known law, and a known angle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import algorithm, sphere
from emc2.sphere import langevin, schedules

KEY = jax.random.key(0)


def _unit(n, k, seed=0):
  rows = np.random.default_rng(seed).normal(size=(n, k))
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _coulomb(points):
  a, b = np.triu_indices(points.shape[0], 1)
  return jnp.sum(1 / jnp.linalg.norm(points[a] - points[b], axis=1))


def _coulomb_loop(points):
  """Energy and gradient, in NumPy."""
  energy, gradient = 0.0, np.zeros_like(points)
  for i, x in enumerate(points):
    for j, y in enumerate(points):
      if i != j:
        r = np.linalg.norm(x - y)
        energy += 0.5 / r
        gradient[i] -= (x - y) / r**3
  return energy, gradient


def _loop(points, noise, rate, heat, cap):
  """One step, in float64."""
  energy, gradient = _coulomb_loop(points)
  moved, squares, limited = [], 0.0, 0
  for x, g, xi in zip(points, gradient, noise, strict=True):
    g, xi = g - (g @ x) * x, xi - (xi @ x) * x
    u = -rate * g + np.sqrt(2 * rate * heat) * xi
    size = np.linalg.norm(u)
    if size > cap:
      u, limited = u * cap / size, limited + 1
    squares += g @ g
    moved.append((x + u) / np.linalg.norm(x + u))
  return np.array(moved), (energy, np.sqrt(squares), limited / len(points))


def _run(method, points, num_steps):
  run = jax.jit(
    lambda state: algorithm.scan(
      jax.random.key(1), state, jnp.arange(num_steps), method.step
    )
  )
  return run(method.init(KEY, points))


class WideTest(parameterized.TestCase):
  """In float64."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.named_parameters(
    ('plain', {}),
    ('bound', dict(max_step=0.05)),
    ('gradient', dict(has_gradient=True)),
  )
  def test_matches_a_loop(self, options):
    self._check_matches_a_loop(options)

  @parameterized.named_parameters(
    (
      'schedules',
      dict(
        step_size=lambda count: 1 / (32 * (1 + count % 2)),
        temperature=lambda count: 1 / (2 + count % 4 // 3 * 2),
      ),
    ),
    ('cold', dict(temperature=0.0)),
    ('array', dict(step_size=np.float32(0.015625))),
    ('no_bound', dict(max_step=np.inf)),
  )
  @pytest.mark.slow
  def test_matches_a_loop_elsewhere(self, options):
    self._check_matches_a_loop(options)

  def _check_matches_a_loop(self, options):
    points = _unit(7, 3)
    settings = {'step_size': 0.02, 'temperature': 0.4, **options}
    energy_fn = _coulomb
    if 'has_gradient' in options:
      energy_fn = jax.value_and_grad(_coulomb)
    method = langevin.langevin(energy_fn, **settings)
    state, step = method.init(KEY, points), jax.jit(method.step)
    at = lambda value, count: value(count) if callable(value) else float(value)
    limited = 0.0
    for count in range(6):
      key = jax.random.key(count)
      noise = np.asarray(jax.random.normal(key, points.shape))
      points, want = _loop(
        points,
        noise,
        at(settings['step_size'], count),
        at(settings['temperature'], count),
        settings.get('max_step', 0.5 / np.sqrt(7)),
      )
      state, info = step(key, state, None)
      np.testing.assert_allclose(state.points, points, atol=1e-12)
      np.testing.assert_allclose(info, want, rtol=1e-11)
      limited += want[2]
    self.assertEqual(state.count, 6)
    if 'max_step' in options:
      self.assertEqual(limited > 0, np.isfinite(options['max_step']))

  def test_has_gradient_differentiates_nothing(self):
    opaque = lambda x: (jnp.float64(3.0), jnp.ones_like(x))
    method = langevin.langevin(
      opaque, step_size=0.1, temperature=0.0, has_gradient=True
    )
    state = method.init(KEY, np.eye(2))
    state, info = method.step(KEY, state, None)
    want = np.array([[1.0, -0.1], [-0.1, 1.0]]) / np.sqrt(1.01)
    np.testing.assert_allclose(state.points, want, rtol=1e-14)
    self.assertEqual(info.energy, 3.0)

  def test_two_points_follow_their_angle(self):
    self._check_two_points(0.4, 0.1)

  @pytest.mark.slow
  def test_two_points_follow_their_angle_elsewhere(self):
    self._check_two_points(2.0, 0.3)

  def _check_two_points(self, start, rate):
    """Identity 8."""
    points = np.array([[1, 0, 0], [np.cos(start), np.sin(start), 0]])
    method = langevin.langevin(
      _coulomb, step_size=rate, temperature=0.0, max_step=np.inf
    )
    state, step = method.init(KEY, points), jax.jit(method.step)
    angle, steps = start, 0
    while angle < 3.13 and steps < 400:
      x, y = np.asarray(state.points)
      got = np.arctan2(np.linalg.norm(np.cross(x, y)), x @ y)
      np.testing.assert_allclose(got, angle, rtol=0, atol=1e-12)
      half = angle / 2
      angle += 2 * np.arctan(rate * np.cos(half) / (4 * np.sin(half) ** 2))
      state, _ = step(KEY, state, None)
      steps += 1
    self.assertGreater(steps, 20)
    self.assertGreater(angle, 3.1)


class NarrowTest(parameterized.TestCase):
  @parameterized.parameters((2.0, 1.0), (2.0, 4.0))
  @pytest.mark.slow
  def test_law_of_a_field(self, field, temperature):
    """It is that of von Mises and Fisher, at field / temperature."""
    n, num_steps = 20_000, 300
    energy_fn = lambda points: -field * jnp.sum(points[:, 2])
    # Each point relaxes at a rate above 2 T.
    method = langevin.langevin(
      energy_fn,
      step_size=0.01 / temperature,
      temperature=temperature,
      max_step=np.inf,
    )
    points = jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (n, 1))
    state, infos = _run(method, points, num_steps)
    ratio = field / temperature
    mean = 1 / np.tanh(ratio) - 1 / ratio
    square = 1 - 2 * mean / ratio
    heights = np.asarray(state.points)[:, 2]
    # A step of 0.01 leaves a bias of that order, next to the noise.
    error = 4.5 / np.sqrt(n) * np.std(heights) + 0.005
    self.assertLess(abs(heights.mean() - mean), error)
    error = 4.5 / np.sqrt(n) * np.std(heights**2) + 0.005
    self.assertLess(abs(np.mean(heights**2) - square), error)
    self.assertEqual(np.max(infos.limited), 0)

  @pytest.mark.slow
  def test_anneals_to_the_icosahedron(self):
    chains, num_steps = 4, 600
    method = langevin.langevin(
      _coulomb,
      step_size=0.05,
      temperature=schedules.geometric(0.1, 1e-5, num_steps),
    )
    draw = lambda key: sphere.draw_uniform(key, 12, 3)
    points = jax.vmap(draw)(jax.random.split(KEY, chains))
    keys = jax.random.split(jax.random.key(1), chains)
    run = lambda key, points: algorithm.scan(
      key, method.init(key, points), jnp.arange(num_steps), method.step
    )
    _, infos = jax.jit(jax.vmap(run))(keys, points)
    np.testing.assert_allclose(infos.energy[:, -1], 49.165253, rtol=1e-4)

  def test_keeps_types_and_compiles_once(self):
    self._check_types(jnp.float32)

  @pytest.mark.slow
  def test_keeps_types_of_narrow_points(self):
    self._check_types(jnp.bfloat16)

  def _check_types(self, dtype):
    method = langevin.langevin(
      lambda points: jnp.sum(points),
      step_size=0.1,
      temperature=schedules.geometric(1.0, 0.1, 10),
    )
    state = method.init(KEY, jnp.asarray(_unit(5, 3), dtype))
    before = jax.tree.map(jax.typeof, state)
    step = jax.jit(method.step)
    for _ in range(2):
      state, _ = step(KEY, state, None)
    self.assertEqual(jax.tree.map(jax.typeof, state), before)
    self.assertEqual(step._cache_size(), 1)

  @parameterized.parameters(
    (dict(step_size=0.0), 'step_size must be finite and positive, got 0.0'),
    (dict(step_size=np.nan), 'step_size must be finite'),
    (dict(temperature=-1.0), 'temperature .* at least 0, got -1.0'),
    (dict(temperature=np.inf), 'temperature must be finite'),
    (dict(max_step=-2.0), 'max_step must be positive, got -2.0'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      langevin.langevin(
        _coulomb, **{'step_size': 0.1, 'temperature': 0.1, **settings}
      )
