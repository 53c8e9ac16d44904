"""Products of sliced matrices against dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.separable import sliced

MULTIPLY = jax.jit(jax.vmap(sliced.add_matmul))


def draw(num_parts, num_rows, num_columns, seed=0):
  """Parts whose rows are of very different lengths."""
  rng = np.random.default_rng(seed)
  density = np.minimum(1, 3 / (1 + np.arange(num_rows)))[:, None]
  shape = num_parts, num_rows, num_columns
  dense = rng.normal(size=shape) * (rng.random(shape) < density)
  return rng.permuted(dense, axis=1)


def cut(dense):
  parts, rows, ids = np.nonzero(dense)
  order = np.random.default_rng(1).permutation(len(rows))
  parts, rows, ids = (x[order] for x in (parts, rows, ids))
  return sliced.cut(
    rows,
    ids.astype(np.int32),
    dense[parts, rows, ids].astype('float32'),
    parts,
    dense.shape[1],
    len(dense),
  )


class SlicedTest(parameterized.TestCase):
  @parameterized.parameters((3, 50, 70), (1, 5, 100))
  def test_is_a_product(self, num_parts, num_rows, num_columns):
    dense = draw(num_parts, num_rows, num_columns)
    rng = np.random.default_rng(2)
    table = rng.normal(size=(num_parts, num_columns, 4)).astype('float32')
    total = rng.normal(size=(num_parts, num_rows, 4)).astype('float32')
    found = MULTIPLY(total, cut(dense), table)
    np.testing.assert_allclose(found, total + dense @ table, atol=1e-5)

  def test_without_entries(self):
    dense = np.zeros((2, 50, 70))
    matrix = cut(dense)
    table = np.ones((2, 70, 4), 'float32')
    total = np.ones((2, 50, 4), 'float32')
    np.testing.assert_array_equal(MULTIPLY(total, matrix, table), total)

  def test_slope_is_the_transpose(self):
    dense = draw(1, 20, 30)[0]
    matrix = jax.tree.map(lambda x: jnp.asarray(x[0]), cut(dense[None]))
    multiply = functools.partial(sliced.add_matmul, jnp.zeros((20, 2)), matrix)
    table = np.random.default_rng(3).normal(size=(30, 2)).astype('float32')
    value = lambda table: (multiply(table) ** 2).sum()
    got = jax.jit(jax.grad(value))(jnp.asarray(table))
    np.testing.assert_allclose(got, 2 * dense.T @ (dense @ table), atol=1e-4)

  def test_holds_entries_once_and_little_else(self):
    dense = draw(3, 200, 300)
    matrix = cut(dense)
    number = sum(np.count_nonzero(x) for x in matrix.values)
    self.assertEqual(number, np.count_nonzero(dense))
    for width, ids, values, rows in zip(sliced.WIDTHS, *matrix, strict=True):
      self.assertEqual(ids.shape, values.shape)
      self.assertEqual([ids.dtype, rows.dtype], [np.int32, np.int32])
      self.assertEqual(ids.size, width * rows.size)
      self.assertEqual(rows.shape[1] % sliced.HEIGHT, 0)
      # No row twice in a slice: its sums are added at once.
      for slice_ in rows.reshape(-1, sliced.HEIGHT):
        slice_ = slice_[slice_ < 200]
        self.assertEqual(len(slice_), len(set(slice_.tolist())))
    self.assertLess(sum(x.size for x in matrix.ids), 2 * number)
