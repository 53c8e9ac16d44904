"""Schedules against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.sphere import schedules


class GeometricTest(parameterized.TestCase):
  @parameterized.parameters((0.1, 1e-3), (1e-3, 0.1), (2.0, 2.0))
  def test_closed_form(self, start, stop):
    schedule = schedules.geometric(start, stop, 50)
    count = jnp.arange(80, dtype=jnp.int32)
    want = start * (stop / start) ** np.minimum(np.arange(80) / 50, 1)
    np.testing.assert_allclose(jax.vmap(schedule)(count), want, rtol=1e-6)

  def test_is_as_wide_as_jax(self):
    with jax.enable_x64(True):
      got = schedules.geometric(1.0, 1e-8, 7)(jnp.int32(5))
      np.testing.assert_allclose(got, 1e-8 ** (5 / 7), rtol=1e-14)

  @parameterized.parameters(
    (0.0, 1.0, 5, 'start must be finite and positive, got 0.0'),
    (1.0, np.inf, 5, 'stop must be finite and positive, got inf'),
    (1.0, np.nan, 5, 'stop must be finite and positive, got nan'),
    (1.0, 1.0, 0, 'num_steps must be at least 1, got 0'),
  )
  def test_refuses(self, start, stop, num_steps, message):
    with self.assertRaisesRegex(ValueError, message):
      schedules.geometric(start, stop, num_steps)


class EvaluateTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_numbers_arrays_and_functions(self, dtype):
    count = jnp.int32(3)
    for value in (1.5, jnp.float32(1.5), lambda count: count / 2):
      got = schedules.evaluate(value, count, dtype)
      self.assertEqual((got.dtype, got.shape, got), (dtype, (), 1.5))
