"""Small classifiers of digits."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import nnx

from emc2.experiments.models import digits


class ClassifierTest(parameterized.TestCase):
  @parameterized.parameters(*digits.KINDS)
  def test_flat_images_are_the_same(self, kind):
    model = digits.Classifier(kind, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    logits = model(images)
    self.assertEqual(logits.shape, (3, 10))
    np.testing.assert_array_equal(model(images.reshape(3, 64)), logits)

  def test_perceptron_is_two_products(self):
    model = digits.Classifier('mlp', rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (3, 64))
    params = nnx.to_pure_dict(nnx.state(model))
    apply = lambda part, x: x @ part['kernel'] + part['bias'][None]
    want = apply(params['head'], jnp.tanh(apply(params['body'], images)))
    np.testing.assert_allclose(model(images), want, atol=1e-6)

  def test_widths_are_channels(self):
    wide = digits.Classifier('cnn', widths=(16, 32), rngs=nnx.Rngs(0))
    self.assertEqual(wide.body.num_features, 4 * 4 * 32)
