"""Rows and their numbers against loops over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import indexed_slices


def _draw(n=12, shape=(7, 3), seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(n, *shape[1:])).astype(dtype)
  return values, rng.integers(0, shape[0], n)


def _make(n=12, shape=(7, 3), seed=0, dtype=np.float32):
  return indexed_slices.make(*_draw(n, shape, seed, dtype), shape)


def _loop(values, indices, shape):
  dense = np.zeros(shape)
  for value, index in zip(values, indices, strict=True):
    if 0 <= index < shape[0]:
      dense[index] += value
  return dense


class IndexedSlicesTest(parameterized.TestCase):
  @parameterized.parameters((7, 3), (7,), (7, 2, 3))
  def test_to_dense_adds_rows_of_one_number(self, *shape):
    values, indices = _draw(shape=shape)
    slices = indexed_slices.make(values, indices, shape)
    want = _loop(values, indices, shape)
    got = jax.jit(indexed_slices.to_dense)(slices)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    order = np.random.default_rng(1).permutation(len(indices))
    moved = indexed_slices.make(values[order], indices[order], shape)
    got = indexed_slices.to_dense(moved)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  @pytest.mark.slow
  def test_float64(self):
    with jax.enable_x64(True):
      values, indices = _draw(200, (20, 3), dtype=np.float64)
      slices = indexed_slices.make(values, indices, (20, 3))
      want = _loop(values, indices, (20, 3))
      for same in (slices, indexed_slices.dedup(slices)):
        got = indexed_slices.to_dense(same)
        self.assertEqual(got.dtype, np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)

  @parameterized.parameters(np.int32, np.int64, np.uint32, np.int8)
  def test_numbers_outside_count_for_nothing(self, dtype):
    """A negative one is no row from the end."""
    outside = {
      np.int32: [-1, 7, 2**31 - 1, -(2**31)],
      np.int64: [-1, 7, 2**32 + 1, -(2**32)],
      np.uint32: [7, 8, 2**32 - 1, 2**31],
      np.int8: [-1, 7, 127, -128],
    }[dtype]
    indices = np.array([1, *outside], dtype)
    values = np.ones((5, 3), np.float32)
    with jax.enable_x64(dtype == np.int64):
      slices = indexed_slices.make(values, indices, (7, 3))
      self.assertEqual(slices.indices.dtype, np.int32)
      for same in (slices, indexed_slices.dedup(slices)):
        dense = np.asarray(indexed_slices.to_dense(same))
        np.testing.assert_array_equal(dense[1], 1)
        self.assertEqual(dense.sum(), 3)
        added = indexed_slices.add(jnp.ones((7, 3), jnp.float32), same)
        self.assertEqual(np.asarray(added).sum(), 24)

  def test_from_dense_and_back_is_exact(self):
    x = jnp.asarray(_draw()[0])
    slices = indexed_slices.from_dense(x)
    self.assertEqual(slices.num_slices, 12)
    np.testing.assert_array_equal(indexed_slices.to_dense(slices), x)

  def test_no_slice_is_zero(self):
    none = indexed_slices.make(np.zeros((0, 3), np.float32), _none(), (7, 3))
    for same in (none, indexed_slices.dedup(none)):
      np.testing.assert_array_equal(
        indexed_slices.to_dense(same), np.zeros((7, 3))
      )
      self.assertEqual(indexed_slices.norm(same), 0)

  @parameterized.parameters(None, 5, 9, 40)
  def test_dedup(self, size):
    rng = np.random.default_rng(2)
    indices = rng.choice([0, 3, 4, 6], 30)
    values = rng.normal(size=(30, 3)).astype(np.float32)
    slices = indexed_slices.make(values, indices, (7, 3))
    once = jax.jit(indexed_slices.dedup, static_argnums=1)(slices, size)
    size = 7 if size is None else size
    want = [0, 3, 4, 6] + [7] * (size - 4)
    np.testing.assert_array_equal(once.indices, want)
    np.testing.assert_array_equal(once.values[4:], 0)
    np.testing.assert_allclose(
      indexed_slices.to_dense(once),
      _loop(values, indices, (7, 3)),
      rtol=1e-5,
      atol=1e-6,
    )

  def test_dedup_loses_the_greatest_where_too_few_places_are(self):
    slices = _make(40)
    want = np.array(indexed_slices.to_dense(slices))
    want[3:] = 0
    got = indexed_slices.to_dense(indexed_slices.dedup(slices, 3))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  @pytest.mark.slow
  def test_the_filler_takes_no_place(self):
    indices = np.array([7, 7, 5, -3])
    slices = indexed_slices.make(np.ones((4, 3), np.float32), indices, (7, 3))
    once = indexed_slices.dedup(slices, 1)
    np.testing.assert_array_equal(once.indices, [5])
    np.testing.assert_array_equal(once.values, 1)
    filled = indexed_slices.dedup(slices)
    np.testing.assert_array_equal(filled.indices, [5, 7, 7, 7])
    np.testing.assert_array_equal(filled.values[1:], 0)

  @pytest.mark.slow
  def test_sums_of_16_bits_are_wide(self):
    """In bfloat16, 256 + 1 is 256."""
    slices = indexed_slices.make(
      jnp.ones((1000, 1), jnp.bfloat16), jnp.zeros(1000, jnp.int32), (2, 1)
    )
    for same in (slices, indexed_slices.dedup(slices)):
      dense = indexed_slices.to_dense(same)
      self.assertEqual(dense.dtype, jnp.bfloat16)
      self.assertEqual(float(dense[0, 0]), 1000)
    wide = indexed_slices.to_dense(slices, jnp.float32)
    self.assertEqual(wide.dtype, jnp.float32)

  def test_norm_is_of_the_array(self):
    slices = _make(40)
    want = np.linalg.norm(np.asarray(indexed_slices.to_dense(slices)))
    np.testing.assert_allclose(indexed_slices.norm(slices), want, rtol=1e-5)
    apart = np.linalg.norm(np.asarray(slices.values))
    self.assertGreater(abs(apart - want), 0.1)

  def test_shards_make_the_whole(self):
    slices = _make(shape=(8, 3))
    parts = [
      indexed_slices.to_dense(indexed_slices.shard(slices, i, 4))
      for i in range(4)
    ]
    whole = indexed_slices.to_dense(slices)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    with self.assertRaisesRegex(ValueError, 'num_shards must divide the 8'):
      indexed_slices.shard(slices, 0, 3)

  def test_is_a_pytree_of_two_arrays(self):
    slices = _make()
    self.assertLen(jax.tree.leaves(slices), 2)
    shapes = jax.eval_shape(indexed_slices.dedup, slices)
    self.assertEqual(shapes.dense_shape, (7, 3))
    self.assertEqual(shapes.dtype, np.float32)
    self.assertTrue(indexed_slices.is_slices(shapes))

  @parameterized.parameters(
    ((3, 2), (3,), (7, 3), ValueError, r'dense_shape must be .* got \(7, 3\)'),
    ((3, 2), (4,), (7, 2), ValueError, r'got \(3, 2\) and \(4,\)'),
    ((3, 2), (3, 1), (7, 2), ValueError, r'got \(3, 2\) and \(3, 1\)'),
    ((3,), (3,), (), ValueError, r'dense_shape must be .* got \(\)'),
    ((3,), (3,), (0,), ValueError, 'must have 1 to 2.* rows, got 0'),
    ((3,), (3,), (2**31,), ValueError, 'must have 1 to 2.* rows, got 21474'),
  )
  def test_refuses(self, values, indices, shape, error, message):
    with self.assertRaisesRegex(error, message):
      indexed_slices.make(np.zeros(values), np.zeros(indices, np.int32), shape)

  def test_refuses_dtypes(self):
    with self.assertRaisesRegex(TypeError, 'indices must be integers, got flo'):
      indexed_slices.make(np.zeros((3, 2)), np.zeros(3, np.float32), (7, 2))
    with self.assertRaisesRegex(TypeError, 'values must be floats, got int32'):
      indexed_slices.make(np.zeros((3, 2), np.int32), _none(3), (7, 2))
    wrong = indexed_slices.IndexedSlices(
      jnp.zeros((3, 2)), jnp.zeros(3, jnp.uint8), (7, 2)
    )
    with self.assertRaisesRegex(TypeError, 'table.indices must be int32, got'):
      indexed_slices.check(wrong, 'table')

  def test_refuses_what_does_not_add_up(self):
    with self.assertRaisesRegex(ValueError, r'dense_shape .* got \(6, 3\)'):
      indexed_slices.add(jnp.zeros((6, 3)), _make())
    with self.assertRaisesRegex(ValueError, 'size must be at least 1, got 0'):
      indexed_slices.dedup(_make(), 0)
    with self.assertRaisesRegex(ValueError, 'parts must be at least one'):
      indexed_slices.concatenate([])
    with self.assertRaisesRegex(ValueError, 'one dtype and dense_shape'):
      indexed_slices.concatenate([_make(), _make(shape=(8, 3))])


def _none(n=0):
  return np.zeros(n, np.int32)
