"""Noise in tangent spaces: its size, and the distribution it leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms

from tests.transforms import coulomb


def _sample(step_size, temperature, steps=1, **options):
  """Noise at 4,000 points, one update after another."""
  tx = transforms.add_tangent_noise(
    jax.random.key(0), step_size, temperature, **options
  )
  points = jnp.asarray(coulomb.uniform(0, 4000, 3))
  state, results = tx.init(points), []
  for _ in range(steps):
    updates, state = tx.update(jnp.zeros_like(points), state, points)
    results.append(np.asarray(updates))
  return points, results


class AddTangentNoiseTest(parameterized.TestCase):
  @parameterized.parameters((0.5, 0.25), (2.0, 0.25), (0.5, 4.0))
  def test_variance(self, step_size, temperature):
    points, [noise] = _sample(step_size, temperature)
    np.testing.assert_allclose(np.sum(noise * points, axis=1), 0, atol=1e-6)
    # Two tangent directions at each point; 8,000 draws in all.
    got = np.sum(noise**2) / 8000
    np.testing.assert_allclose(got, 2 * step_size * temperature, rtol=0.06)

  def test_schedules(self):
    halve = optax.exponential_decay(1.0, transition_steps=1, decay_rate=0.5)
    for pair in ((halve, 2.0), (2.0, halve)):
      _, results = _sample(*pair, steps=4)
      got = [np.sum(noise**2) / 8000 for noise in results]
      np.testing.assert_allclose(got, [4.0, 2.0, 1.0, 0.5], rtol=0.06)

  def test_schedules_that_end_below_zero(self):
    end = lambda count: jnp.where(count == 0, 1.0, -1e-9)
    _, [first, second] = _sample(1.0, end, steps=2)
    self.assertGreater(np.abs(first).max(), 1)
    np.testing.assert_array_equal(second, 0)

  def test_each_update_draws_anew(self):
    _, [first, second] = _sample(1.0, 1.0, steps=2)
    correlation = np.sum(first * second) / np.sum(first**2)
    self.assertLess(abs(correlation), 0.05)

  def test_adds_to_the_updates(self):
    tx = transforms.add_tangent_noise(jax.random.key(0), 0.1, 0.0)
    points = jnp.eye(3)
    updates, _ = tx.update(2 * points, tx.init(points), points)
    np.testing.assert_array_equal(updates, 2 * points)

  @pytest.mark.slow
  def test_numbers_of_another_dtype(self):
    for dtype in (jnp.float64, jnp.bfloat16):
      with jax.enable_x64(True):
        points = jnp.eye(3, dtype=dtype)
        tx = transforms.add_tangent_noise(
          jax.random.key(0), jnp.float32(0.1), 0.5
        )
        updates, _ = tx.update(points, tx.init(points), points)
      self.assertEqual(updates.dtype, dtype)

  @pytest.mark.slow
  def test_reaches_the_gibbs_distribution(self):
    """A dipole in a field: its mean is Langevin's coth(1/T) - T."""
    rate, temperature = 0.02, 0.5
    noise = transforms.add_tangent_noise(jax.random.key(1), rate, temperature)
    tx = transforms.riemannian(optax.chain(optax.sgd(rate), noise))
    points = jnp.asarray(coulomb.uniform(0, 4000, 3))
    field = jnp.broadcast_to(jnp.array([0.0, 0.0, -1.0]), points.shape)

    def step(carry, _):
      points, state = carry
      updates, state = tx.update(field, state, points)
      points = optax.apply_updates(points, updates)
      return (points, state), jnp.mean(points[:, 2])

    carry = points, tx.init(points)
    means = jax.jit(lambda c: jax.lax.scan(step, c, length=600))(carry)[1]
    want = 1 / np.tanh(1 / temperature) - temperature
    # The step's own bias is of the order of the rate.
    np.testing.assert_allclose(np.mean(means[300:]), want, atol=0.01)
