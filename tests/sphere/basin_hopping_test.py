"""The walk over minima: its moves, its rule, and what it finds."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import algorithm, sphere
from emc2.sphere import basin_hopping, minimize

transforms = importlib.import_module('emc2.transforms')


def descend(n, max_evaluations=150):
  inner = optax.chain(optax.scale_by_lbfgs(8), optax.scale(-1.0))
  search = transforms.backtrack(
    inner, max_step=0.9 / np.sqrt(n), first_step=0.1 / np.sqrt(n)
  )

  def run(points):
    found = minimize.minimize(
      points,
      sphere.energy,
      search,
      tolerance=1e-5,
      max_evaluations=max_evaluations,
    )
    return found.points, found.energy

  return run


def stay(points):
  """A minimiser for what is about the walk and not about the energy."""
  return points, jnp.sum(points[:, 2])


@jax.jit
def propose(keys, points, move_probabilities):
  """A proposal for each key, compiled once."""
  draw = functools.partial(
    basin_hopping.propose, move_probabilities=move_probabilities
  )
  return jax.vmap(draw, in_axes=(0, None))(keys, points)


def keys(num, seed=1):
  return jax.random.split(jax.random.key(seed), num)


class MovesTest(parameterized.TestCase):
  @parameterized.parameters((0, 3), (1, 3), (2, 3), (3, 3))
  @pytest.mark.slow
  def test_lands_on_the_sphere(self, move, dim):
    x = sphere.draw_uniform(jax.random.key(0), 30, dim)
    moved, which = propose(keys(50), x, jnp.eye(4)[move])
    np.testing.assert_array_equal(which, move)
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 1, rtol=1e-5)
    changed = jnp.any(jnp.abs(moved - x[None]) > 1e-5, axis=-1).sum(axis=1)
    name = basin_hopping.MOVES[move]
    if name == 'reinsert':
      self.assertBetween(int(changed.max()), 2, 4)
      self.assertEqual(int(changed.min()), 1)
    elif name == 'kick':
      self.assertEqual(int(changed.min()), 30)
    else:
      # A cap is part of the sphere, of a size that changes.
      self.assertGreater(len(set(changed.tolist())), 5)
      self.assertLess(int(changed.min()), 15)

  @pytest.mark.slow
  def test_a_turned_cap_keeps_its_shape(self):
    x = sphere.draw_uniform(jax.random.key(0), 30, 3)
    moved = propose(keys(50), x, jnp.eye(4)[3])[0][2]
    inside = np.flatnonzero(jnp.any(jnp.abs(moved - x) > 1e-5, axis=1))
    self.assertGreater(len(inside), 3)
    gram = lambda y: np.asarray(y)[inside] @ np.asarray(y)[inside].T
    np.testing.assert_allclose(gram(moved), gram(x), atol=1e-5)

  @pytest.mark.slow
  def test_a_point_goes_where_there_is_room(self):
    """Two points almost meet, and one of them leaves for the empty half."""
    x = sphere.draw_uniform(jax.random.key(0), 30, 3)
    x = x.at[:, 2].set(jnp.abs(x[:, 2]))
    moved, _ = propose(keys(50), x, jnp.eye(4)[0])
    energies = jax.vmap(sphere.energy)(moved)
    self.assertLess(energies.mean(), sphere.energy(x))

  @pytest.mark.slow
  def test_probabilities(self):
    x = sphere.draw_uniform(jax.random.key(0), 30, 3)
    odds = jnp.array([0.5, 0.0, 0.25, 0.25])
    which = jnp.concatenate(
      [propose(keys(50, i), x, odds)[1] for i in range(40)]
    )
    found = np.bincount(which, minlength=4) / 2000
    np.testing.assert_allclose(found, odds, atol=0.04)


class WalkTest(parameterized.TestCase):
  def _run(self, num_steps, minimize=stay, n=10, seed=0, **settings):
    method = basin_hopping.basin_hopping(minimize, **settings)
    points = sphere.draw_uniform(jax.random.key(seed), n, 3)
    state = method.init(jax.random.key(1), points)
    run = jax.jit(functools.partial(algorithm.scan, step=method.step))
    return run(jax.random.key(2), state, jnp.arange(num_steps))

  @pytest.mark.slow
  def test_at_no_temperature_it_never_rises(self):
    state, infos = self._run(200, temperature=0.0, max_rejected=10**6)
    np.testing.assert_array_equal(state.energy, state.best_energy)
    self.assertFalse(infos.restarted.any())
    self.assertTrue(infos.accepted.any())
    self.assertFalse(infos.accepted.all())

  @pytest.mark.slow
  def test_metropolis(self):
    """The share of accepted rises of a size is exp(-size / T)."""
    heights = jnp.array(0.7)
    rise = lambda points: (points, heights + points[0, 0] * 0)
    method = basin_hopping.basin_hopping(rise, temperature=0.5)
    state = method.init(
      jax.random.key(0), sphere.draw_uniform(jax.random.key(1), 4, 3)
    )
    state = state._replace(energy=jnp.array(0.2))
    step = jax.jit(jax.vmap(lambda k: method.step(k, state)))
    _, infos = step(keys(4000, seed=2))
    want = np.exp(-0.5 / 0.5)
    self.assertAlmostEqual(float(infos.accepted.mean()), want, delta=0.03)

  @pytest.mark.slow
  def test_starts_anew_after_refusals(self):
    state, infos = self._run(300, temperature=0.0, max_rejected=5)
    self.assertTrue(infos.restarted.any())
    self.assertLessEqual(int(state.num_rejected), 5)
    # What was best before a restart is kept.
    np.testing.assert_array_equal(
      state.best_energy, jnp.minimum(infos.loss.min(), state.best_energy)
    )
    np.testing.assert_allclose(
      stay(state.best_points)[1], state.best_energy, rtol=1e-6
    )

  @pytest.mark.slow
  def test_lets_no_failed_minimum_in(self):
    fail = lambda points: (points, jnp.where(points[0, 0] > 0, jnp.nan, 1.0))
    state, infos = self._run(50, minimize=fail)
    self.assertTrue(jnp.isnan(infos.loss).any())
    self.assertFalse(infos.accepted[jnp.isnan(infos.loss)].any())
    self.assertFalse(jnp.isnan(state.energy))

  @pytest.mark.slow
  def test_vmapped_walks_find_the_minimum(self):
    """From poor minima of 16 points, of which 1 start in 4 ends higher."""
    # Optax counts the pairs of L-BFGS in both widths of integers.
    standard = jax.numpy_dtype_promotion('standard')
    with jax.enable_x64(True), standard:
      method = basin_hopping.basin_hopping(descend(16))
      points = jax.vmap(lambda k: sphere.draw_uniform(k, 16, 3, jnp.float64))(
        keys(4)
      )
      run = lambda key, x: algorithm.scan(
        key, method.init(key, x), jnp.arange(4), method.step
      )
      state, infos = jax.jit(jax.vmap(run))(keys(4), points)
      known = sphere.best_known(16).energy
      np.testing.assert_allclose(state.best_energy, known, rtol=1e-9)
      self.assertTrue(jnp.all(infos.best_energy[:, -1] == state.best_energy))

  @parameterized.parameters(
    ({'temperature': -1.0}, 'temperature must be at least 0'),
    ({'max_rejected': 0}, 'max_rejected must be at least 1'),
    ({'move_probabilities': (1.0,)}, 'move_probabilities must be one for each'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      basin_hopping.basin_hopping(stay, **settings)
