"""The algebra of count sketches, and their laws over the hashes."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import compression
from emc2.compression import sketch

SHAPE = (3, 4, 5)


def _matrix(hashes, width):
  """S as a matrix (m, W) that multiplies from the right."""
  columns = np.zeros((hashes.buckets.size, width))
  columns[np.arange(hashes.buckets.size), hashes.buckets] = hashes.signs
  return columns


class SketchTest(parameterized.TestCase):
  @parameterized.parameters('uniform', 'balanced')
  def test_matches_its_matrix(self, hashing):
    self.enterContext(jax.enable_x64(True))
    code = sketch.count_sketch(0.3, hashing=hashing)
    x = np.random.default_rng(0).normal(size=SHAPE)
    state = code.init(SHAPE, jnp.float64, jax.random.key(0))
    table, after = code.compress(state, jnp.asarray(x), jax.random.key(1))
    s = _matrix(state, 6)
    np.testing.assert_allclose(table, x.reshape(3, 20) @ s, atol=1e-12)
    like = jax.ShapeDtypeStruct(SHAPE, jnp.float64)
    got = code.decompress(after, table, like)
    want = (x.reshape(3, 20) @ s @ s.T).reshape(SHAPE)
    np.testing.assert_allclose(got, want, atol=1e-12)
    # Sketching what was queried multiplies each bucket by its load.
    again, _ = code.compress(state, got, jax.random.key(1))
    loads = np.asarray(sketch.loads(state, 6))
    np.testing.assert_allclose(again, np.asarray(table) * loads, atol=1e-12)
    self.assertEqual(sketch.max_load(state, 6), np.max(loads))
    if hashing == 'balanced':
      self.assertCountEqual(loads, [4, 4, 3, 3, 3, 3])

  @parameterized.parameters('uniform', 'balanced')
  def test_mean_and_variance_over_hashes(self, hashing):
    """E|U(S(v)) - v|^2 = omega |v|^2; (m - 1) / W for independent buckets."""
    code = sketch.count_sketch(0.2, hashing=hashing)
    x = np.random.default_rng(0).normal(size=(1, 400)).astype(np.float32)

    def draw(key):
      state = code.init(x.shape, jnp.float32, key)
      table, _ = code.compress(state, jnp.asarray(x), key)
      return code.decompress(state, table, x)

    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.lax.map(jax.jit(draw), keys))
    error = np.sum((drawn - x) ** 2, axis=(1, 2)) / np.sum(x**2)
    want = 399 / 80 if hashing == 'uniform' else 4.0
    self.assertAlmostEqual(code.omega(x.shape), want)
    np.testing.assert_allclose(error.mean(), want, rtol=0.03)
    spread = drawn.std(0) / np.sqrt(len(keys))
    np.testing.assert_array_less(np.abs(drawn.mean(0) - x), 5 * spread)

  def test_a_column_each_is_exact(self):
    code = sketch.count_sketch(1.0, hashing='balanced')
    x = jax.random.normal(jax.random.key(0), SHAPE)
    state = code.init(SHAPE, jnp.float32, jax.random.key(0))
    table, _ = code.compress(state, x, jax.random.key(1))
    np.testing.assert_array_equal(code.decompress(state, table, x), x)

  @parameterized.parameters(
    ((3, 4, 5), 0.3, (3, 6)), ((10,), 0.25, (1, 2)), ((5, 2), 0.1, (5, 1))
  )
  def test_bits(self, shape, size, table):
    code = sketch.count_sketch(size)
    self.assertEqual(sketch.table_shape(shape, size), table)
    self.assertEqual(code.bits(shape), 32 * table[0] * table[1])
    self.assertEqual(compression.wire_bits(code, shape), code.bits(shape))

  @parameterized.parameters(
    ({'size': 0.0}, 'size must be in'),
    ({'size': 1.5}, 'size must be in'),
    ({'hashing': 'murmur'}, 'hashing must be one of'),
  )
  def test_refuses(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      sketch.count_sketch(**options)
