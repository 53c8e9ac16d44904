"""Count sketches: insertion and query against a loop, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from emc2.kernels import count_sketch


def _inputs(n, m, width, dtype=np.float32):
  rng = np.random.default_rng(n + m)
  v = rng.normal(size=(n, m)).astype(dtype)
  buckets = rng.integers(0, width, m).astype(np.int32)
  return v, buckets, rng.choice([-1, 1], m).astype(np.int8)


def _oracle(v, buckets, signs, width):
  table = np.zeros((v.shape[0], width))
  for column, (bucket, sign) in enumerate(zip(buckets, signs, strict=True)):
    table[:, bucket] += float(sign) * v[:, column]
  return table


class CountSketchTest(parameterized.TestCase):
  @parameterized.product(
    shape=((1, 7, 3), (8, 20, 5), (19, 30, 1), (33, 64, 100)),
    implementation=('blocked', 'xla'),
  )
  def test_insertion_equals_a_loop(self, shape, implementation):
    v, buckets, signs = _inputs(*shape)
    table = count_sketch.insert(
      v, buckets, signs, shape[2], implementation=implementation
    )
    self.assertEqual(table.dtype, jnp.float32)
    expected = _oracle(v, buckets, signs, shape[2])
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-5)

  def test_float64_is_added_in_float64(self):
    with jax.enable_x64(True):
      v, buckets, signs = _inputs(11, 30, 4, np.float64)
      table = count_sketch.insert(v, buckets, signs, 4)
      expected = _oracle(v, buckets, signs, 4)
      np.testing.assert_allclose(table, expected, rtol=1e-14, atol=1e-14)

  def test_query_is_the_transpose_of_insertion(self):
    v, buckets, signs = _inputs(5, 12, 4)
    table = jnp.arange(20, dtype=jnp.float32).reshape(5, 4)
    insert = lambda v: count_sketch.insert(v, buckets, signs, 4)
    (pulled,) = jax.vjp(insert, v)[1](table)
    found = count_sketch.query(table, buckets, signs)
    np.testing.assert_array_equal(found, pulled)
    np.testing.assert_array_equal(
      found, np.asarray(table)[:, buckets] * signs[None, :]
    )

  def test_apart_columns_come_back(self):
    v, _, signs = _inputs(9, 12, 12)
    buckets = np.random.default_rng(0).permutation(12).astype(np.int32)
    table = count_sketch.insert(v, buckets, signs, 12)
    np.testing.assert_array_equal(count_sketch.query(table, buckets, signs), v)

  def test_in_shard_map(self):
    mesh = jax.make_mesh((4,), ('data',))
    v, buckets, signs = _inputs(40, 30, 6)
    run = jax.shard_map(
      lambda v: count_sketch.insert(v, buckets, signs, 6),
      mesh=mesh,
      in_specs=jax.P('data'),
      out_specs=jax.P('data'),
    )
    placed = jax.device_put(v, jax.NamedSharding(mesh, jax.P('data')))
    expected = _oracle(v, buckets, signs, 6)
    table = jax.jit(run)(placed)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-5)

  def test_rejects_what_it_does_not_take(self):
    v, buckets, signs = _inputs(5, 12, 4)
    with self.assertRaisesRegex(ValueError, 'v must be a float32 or float64'):
      count_sketch.insert(v[0], buckets, signs, 4)
    with self.assertRaisesRegex(ValueError, 'v must have a column for each'):
      count_sketch.insert(v[:, :4], buckets, signs, 4)
    with self.assertRaisesRegex(ValueError, 'buckets must be an int32 vector'):
      count_sketch.insert(v, signs, signs, 4)
    with self.assertRaisesRegex(ValueError, 'signs must have the shape'):
      count_sketch.query(v, buckets, signs[1:])
    with self.assertRaisesRegex(ValueError, 'width must be at least 1, got 0'):
      count_sketch.insert(v, buckets, signs, 0)
    with self.assertRaisesRegex(ValueError, "'other' is not one of"):
      count_sketch.insert(v, buckets, signs, 4, implementation='other')


if __name__ == '__main__':
  absltest.main()
