"""Tests of the embedding for 8-bit states."""

import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized
from flax import nnx

from emc2 import transforms
from emc2.compression import blockwise
from emc2.experiments.models import stable_embedding


def _make(**options):
  return stable_embedding.StableEmbedding(40, 24, rngs=nnx.Rngs(0), **options)


class StableEmbeddingTest(parameterized.TestCase):
  def test_first_rows(self):
    model = _make(padding=3)
    table = np.asarray(model.stable_table[...])
    limit = np.sqrt(6 / 64)
    self.assertLessEqual(np.abs(table).max(), limit)
    self.assertGreater(np.abs(table).max(), 0.97 * limit)
    np.testing.assert_array_equal(table[3], 0)
    self.assertTrue(np.all(np.any(table[:3] != 0, axis=1)))

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_rows_are_normalised(self, dtype):
    model = _make(dtype=dtype)
    tokens = jnp.array([[0, 5], [39, 5]])
    got = model(tokens)
    self.assertEqual((got.shape, got.dtype), ((2, 2, 24), dtype))
    rows = np.asarray(model.stable_table[...])[np.asarray(tokens)]
    centred = rows - rows.mean(-1, keepdims=True)
    want = centred / np.sqrt(rows.var(-1, keepdims=True) + 1e-5)
    rtol = 1e-4 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol, rtol)

  def test_its_state_stays_in_32_bits(self):
    params = nnx.state(_make(), nnx.Param)
    params = {'embed': nnx.to_pure_dict(params), 'head': jnp.zeros((24, 40))}
    for make in (
      transforms.scale_by_adam_8bit,
      lambda **options: transforms.quantize_state(
        optax.scale_by_adam(), **options
      ),
    ):
      tx = make(keep32_mask=stable_embedding.keep32_mask, min_8bit_size=512)
      state = tx.init(params)
      mu = getattr(state, 'inner_state', state).mu
      self.assertEqual(mu['embed']['stable_table'].dtype, jnp.float32)
      self.assertIsInstance(mu['head'], blockwise.Quantized)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, r'padding must lie in \[0, 40\)'):
      _make(padding=40)
