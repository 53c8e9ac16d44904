"""Tests of the choice between implementations."""

import jax
import jax.numpy as jnp
from absl.testing import parameterized

from emc2.kernels import lowering

# Each leaves an operation of its own in the program.
KERNELS = {
  'pallas_tpu': lowering.Kernel('tpu', jnp.sin, None),
  'pallas_gpu': lowering.Kernel('cuda', jnp.tanh, None),
}


class DispatchTest(parameterized.TestCase):
  def _text(self, platform, implementation, kernels):
    fn = lambda x: lowering.dispatch(implementation, jnp.cos, kernels, x)
    lowered = lowering.lower_for(
      fn, jax.ShapeDtypeStruct((3,), jnp.float32), platform=platform
    )
    return lowered.as_text()

  @parameterized.parameters(
    ('auto', 'cpu', 'cosine'),
    ('auto', 'tpu', 'sine'),
    ('auto', 'cuda', 'tanh'),
    ('xla', 'tpu', 'cosine'),
    ('pallas_tpu', 'tpu', 'sine'),
    ('pallas_gpu', 'cuda', 'tanh'),
  )
  def test_takes_one(self, implementation, platform, want):
    text = self._text(platform, implementation, KERNELS)
    for name in ('cosine', 'sine', 'tanh'):
      self.assertEqual(f'stablehlo.{name} ' in text, name == want, name)

  def test_auto_passes_over_what_does_not_fit(self):
    kernels = KERNELS | {'pallas_tpu': lowering.Kernel('tpu', jnp.sin, 'odd')}
    self.assertIn('stablehlo.cosine', self._text('tpu', 'auto', kernels))
    self.assertIn('stablehlo.tanh', self._text('cuda', 'auto', kernels))

  def test_a_name_that_does_not_fit_raises(self):
    kernels = {'pallas_tpu': lowering.Kernel('tpu', jnp.sin, 'want even.')}
    with self.assertRaisesRegex(NotImplementedError, 'pallas_tpu: want even.'):
      self._text('tpu', 'pallas_tpu', kernels)

  def test_a_name_of_another_platform_raises(self):
    with self.assertRaises(NotImplementedError):
      self._text('cpu', 'pallas_tpu', KERNELS)

  def test_an_unknown_name_raises(self):
    message = "'cuda' is not one of auto, xla, pallas_tpu, pallas_gpu"
    with self.assertRaisesRegex(ValueError, message):
      self._text('cuda', 'cuda', KERNELS)

  def test_absent_arguments_pass(self):
    default = lambda x, y: x if y is None else y
    kernels = {'pallas_tpu': lowering.Kernel('tpu', default, None)}
    got = lowering.dispatch('auto', default, kernels, jnp.ones(2), None)
    self.assertEqual(got.shape, (2,))
