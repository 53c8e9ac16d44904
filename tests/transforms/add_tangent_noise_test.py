"""Noise in tangent spaces: its size, and the distribution it leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
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

  def test_each_update_draws_anew(self):
    _, [first, second] = _sample(1.0, 1.0, steps=2)
    correlation = np.sum(first * second) / np.sum(first**2)
    self.assertLess(abs(correlation), 0.05)

  def test_adds_to_the_updates(self):
    tx = transforms.add_tangent_noise(jax.random.key(0), 0.1, 0.0)
    points = jnp.eye(3)
    updates, _ = tx.update(2 * points, tx.init(points), points)
    np.testing.assert_array_equal(updates, 2 * points)

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


class ContractTest(parameterized.TestCase):
  def _tx(self):
    return transforms.add_tangent_noise(jax.random.key(0), 0.1, 0.5)

  def test_takes_extra_args_in_a_chain(self):
    tx, points = self._tx(), jnp.eye(3)
    chain = optax.chain(optax.identity(), tx)
    want, _ = tx.update(points, tx.init(points), points)
    got, _ = chain.update(points, chain.init(points), points, value=1.0)
    np.testing.assert_array_equal(got, want)

  def test_missing_params_fail_by_name(self):
    tx = self._tx()
    with self.assertRaisesRegex(ValueError, 'params .* add_tangent_noise'):
      tx.update(jnp.eye(3), tx.init(jnp.eye(3)))

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_keeps_types_and_compiles_once(self, dtype):
    tx = transforms.add_tangent_noise(
      jax.random.key(0), 0.1, optax.linear_schedule(1.0, 0.0, 9)
    )
    points = {'a': jnp.eye(3, dtype=dtype), 'b': jnp.eye(2, dtype=dtype)}
    state, step = tx.init(points), jax.jit(tx.update)
    before = jax.tree.map(jax.typeof, state)
    for _ in range(2):
      updates, state = step(points, state, points)
    self.assertEqual(jax.tree.map(jax.typeof, state), before)
    self.assertEqual(
      jax.tree.map(jax.typeof, updates), jax.tree.map(jax.typeof, points)
    )
    self.assertEqual(step._cache_size(), 1)

  def test_float64(self):
    with jax.enable_x64(True):
      points = jnp.eye(3, dtype=jnp.float64)
      tx = transforms.add_tangent_noise(
        jax.random.key(0), jnp.float32(0.1), 0.5
      )
      updates, _ = tx.update(points, tx.init(points), points)
    self.assertEqual(updates.dtype, np.float64)

  def test_abstract_init(self):
    tx = self._tx()
    points = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    got = jax.eval_shape(tx.init, points)
    want = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
      tx.init(jnp.eye(3)),
    )
    self.assertEqual(got, want)

  def test_injected_hyperparameters_are_traced(self):
    make = optax.inject_hyperparams(
      transforms.add_tangent_noise, static_args=('key',)
    )
    tx = make(key=jax.random.key(0), step_size=0.1, temperature=0.5)
    points = jnp.eye(3)
    state, step = tx.init(points), jax.jit(tx.update)
    first, _ = step(0 * points, state, points)
    state.hyperparams['temperature'] = jnp.float32(2.0)
    second, _ = step(0 * points, state, points)
    self.assertEqual(step._cache_size(), 1)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-6)

  def test_masked(self):
    points = {'sphere': jnp.eye(3), 'flat': jnp.ones(2)}
    tx = optax.masked(self._tx(), {'sphere': True, 'flat': False})
    updates, _ = tx.update(points, tx.init(points), points)
    np.testing.assert_array_equal(updates['flat'], points['flat'])
    self.assertGreater(jnp.abs(updates['sphere'] - jnp.eye(3)).max(), 0.01)

  def test_sharded_equals_one_device(self):
    tx, points = self._tx(), jnp.asarray(coulomb.uniform(0, 16, 3))
    want, _ = tx.update(0 * points, tx.init(points), points)
    spec = jax.sharding.PartitionSpec('data')
    placed = mesh_lib.place(points, mesh_lib.make(data=8), spec)
    got, _ = jax.jit(tx.update)(0 * placed, tx.init(placed), placed)
    np.testing.assert_allclose(got, want, atol=1e-6)
