"""A scanned run equals a loop, and can be cut anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import algorithm


def _step(key, state, batch):
  noise = jax.random.normal(key)
  return state + batch * noise, noise


class ScanTest(parameterized.TestCase):
  def test_equals_a_loop(self):
    key, batches = jax.random.key(3), jnp.arange(1.0, 6.0)
    state, infos = algorithm.scan(key, jnp.zeros([]), batches, _step)
    want, noises = 0.0, []
    for number in range(5):
      noise = float(jax.random.normal(jax.random.fold_in(key, number)))
      want += float(batches[number]) * noise
      noises.append(noise)
    np.testing.assert_allclose(state, want, rtol=1e-6)
    np.testing.assert_array_equal(infos, np.float32(noises))

  @parameterized.parameters(1, 3)
  def test_continues_bit_for_bit(self, cut):
    key, batches = jax.random.key(0), jnp.arange(5.0)
    whole, _ = algorithm.scan(key, jnp.zeros([]), batches, _step)
    half, _ = algorithm.scan(key, jnp.zeros([]), batches[:cut], _step)
    rest, _ = algorithm.scan(key, half, batches[cut:], _step, start=cut)
    self.assertEqual(whole, rest)
    forgotten, _ = algorithm.scan(key, half, batches[cut:], _step)
    self.assertNotEqual(whole, forgotten)
