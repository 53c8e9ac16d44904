"""Products of matrices against dense NumPy."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl.testing import parameterized

from emc2.kernels import glm_hvp
from emc2.newton import features


def _draw(shape, dtype='float32', ones=False):
  """A sparse matrix with empty, full and odd rows and columns."""
  rng = np.random.default_rng(sum(shape))
  n, d = shape
  dense = rng.normal(size=shape) * (rng.random(shape) < 0.15)
  dense[n // 3] = rng.normal(size=d)
  dense[:, d // 2] = rng.normal(size=n)
  dense[n // 2], dense[:, d // 3] = 0, 0
  dense = dense.astype(dtype)
  return (dense != 0).astype(dtype) if ones else dense


def _reordered(dense, order, num_columns):
  """The rows in the order of the layout, with its padding."""
  padding = (0, 1), (0, num_columns - dense.shape[1])
  return np.pad(dense, padding)[order]


_products = jax.jit(
  lambda a, c, v, t: (
    features.matvec(a, v),
    features.rmatvec(a, t),
    *features.hvp(a, c, v),
  )
)


class ProductsTest(parameterized.TestCase):
  def check(self, matrix, dense, rtol):
    """All products against those of the dense matrix."""
    rng = np.random.default_rng(1)
    draw = lambda size: rng.normal(size=size).astype(dense.dtype)
    c, v, t = draw(len(dense)), draw(dense.shape[1]), draw(len(dense))
    found = _products(matrix, c, v, t)
    wide = dense.astype(np.float64)
    want = wide @ v, t @ wide, (c * (wide @ v)) @ wide, wide @ v
    for one, other in zip(found, want, strict=True):
      self.assertEqual(one.dtype, dense.dtype)
      scale = 1 + np.abs(other).max(initial=0)
      np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * scale)

  @parameterized.product(
    shape=[(90, 40), (33, 150)],
    ones=[False, True],
    dtype=['float32', 'float64'],
  )
  def test_sparse(self, shape, ones, dtype):
    dense = _draw(shape, dtype, ones)
    with jax.enable_x64(dtype == 'float64'):
      matrix, order = features.from_csr(
        scipy.sparse.csr_array(dense), dtype=dtype
      )
      self.assertEqual(matrix.rows.whole[0].values is None, ones)
      # Each row once; which is long and which short is the oracle's to say.
      self.assertCountEqual(order, range(len(dense)))
      rtol = 1e-5 if dtype == 'float32' else 1e-13
      self.check(matrix, dense[order], rtol)

  @parameterized.parameters(2, 5, 64)
  def test_any_width_of_pieces(self, max_width):
    dense = _draw((70, 50))
    matrix, order = features.from_csr(
      scipy.sparse.csr_array(dense), max_width=max_width
    )
    for bucket in (*matrix.rows.pieces, *matrix.columns.pieces):
      self.assertLessEqual(bucket.ids.shape[0], max_width)
    self.assertEqual(matrix.rows.joined is None, max_width == 64)
    self.check(matrix, dense[order], 1e-5)

  @parameterized.parameters((1, 1), (1, 40), (40, 1), (3, 2))
  def test_small_shapes(self, *shape):
    dense = np.ones(shape, np.float32)
    matrix, order = features.from_csr(scipy.sparse.csr_array(dense))
    self.check(matrix, dense[order], 1e-6)

  def test_a_matrix_of_zeros(self):
    matrix, _ = features.from_csr(scipy.sparse.csr_array(np.zeros((4, 3))))
    self.check(matrix, np.zeros((4, 3), np.float32), 0)
    found = features.columns(matrix, jnp.array([0, 2]))
    np.testing.assert_array_equal(found, np.zeros((4, 2)))

  @parameterized.parameters((2, 1), (1, 2), (2, 3), (4, 4), (7, 1))
  def test_blocks_reassemble(self, num_row_blocks, num_column_blocks):
    blocks = dict(
      num_row_blocks=num_row_blocks, num_column_blocks=num_column_blocks
    )
    dense = _draw((61, 37))
    breadth = -(-37 // num_column_blocks) * num_column_blocks
    sparse, order = features.from_csr(scipy.sparse.csr_array(dense), **blocks)
    self.assertLen(order, -(-61 // num_row_blocks) * num_row_blocks)
    shape = num_row_blocks, num_column_blocks
    self.assertEqual(features.num_blocks(sparse), shape)
    for leaf in jax.tree.leaves(sparse):
      self.assertEqual(leaf.shape[:2], shape)
    self.check(sparse, _reordered(dense, order, breadth), 1e-5)
    padded, order = features.from_dense(dense, **blocks)
    self.check(padded, _reordered(dense, order, breadth), 1e-5)

  def test_own_block(self):
    dense = _draw((60, 36))
    matrix, order = features.from_csr(
      scipy.sparse.csr_array(dense), num_row_blocks=2, num_column_blocks=3
    )
    whole = _reordered(dense, order, 36).reshape(2, 30, 3, 12)
    shard = jax.tree.map(lambda x: x[1:, 2:], matrix)
    self.check(features.own_block(shard), whole[1, :, 2], 1e-5)

  def test_blocks_share_long_rows_evenly(self):
    lengths = np.full(64, 1)
    lengths[:8] = 30
    dense = (np.arange(40) < lengths[:, None]).astype(np.float32)
    matrix, _ = features.from_csr(
      scipy.sparse.csr_array(dense), num_row_blocks=8
    )
    size = sum(
      bucket.ids.size for bucket in (*matrix.rows.pieces, *matrix.rows.whole)
    )
    # All long rows in one block would be padded eightfold.
    self.assertLess(size, 1.5 * dense.sum())

  def test_what_stands_twice_is_added_up(self):
    matrix = types.SimpleNamespace(
      shape=(2, 3),
      indptr=[0, 4, 5],
      indices=[2, 0, 2, 1, 1],
      data=np.array([1.0, 2.0, 3.0, 0.0, 5.0]),
    )
    dense = np.array([[2, 0, 4], [0, 5, 0]], np.float32)
    found, order = features.from_csr(matrix)
    self.check(found, dense[order], 1e-6)
    self.check(features.squared(found), dense[order] ** 2, 1e-6)

  def test_padding_is_small(self):
    rng = np.random.default_rng(0)
    dense = rng.random((3000, 400)) < rng.random((3000, 1)) ** 3 * 0.3
    matrix, _ = features.from_csr(
      scipy.sparse.csr_array(dense.astype(np.float32))
    )
    for sums in (matrix.rows, matrix.columns):
      size = sum(b.ids.size for b in (*sums.pieces, *sums.whole))
      self.assertLess(size, 1.25 * dense.sum())
      self.assertEqual(sums.pieces[0].ids.dtype, np.uint16)

  def test_many_rows_take_wide_ids(self):
    n = 70_000
    matrix = types.SimpleNamespace(
      shape=(n, 2),
      indptr=np.arange(n + 1),
      indices=np.zeros(n, int),
      data=np.ones(n, np.float32),
    )
    found, _ = features.from_csr(matrix)
    t = np.arange(n) % 7
    got = features.rmatvec(found, jnp.asarray(t, jnp.float32))
    np.testing.assert_array_equal(got, [t.sum(), 0])
    self.assertEqual(found.columns.pieces[0].ids.dtype, np.uint32)
    self.assertEqual(found.rows.whole[0].ids.dtype, np.uint16)

  def test_many_vectors(self):
    dense = _draw((50, 30))
    sparse, order = features.from_csr(scipy.sparse.csr_array(dense))
    whole, _ = features.from_dense(dense[order])
    rng = np.random.default_rng(2)
    v = rng.normal(size=(4, 30)).astype(np.float32)
    c = rng.normal(size=50).astype(np.float32)
    for matrix in (sparse, whole):
      each = jax.jit(jax.vmap(features.hvp, (None, None, 0)))
      images, scores = each(matrix, c, v)
      np.testing.assert_allclose(scores, v @ dense[order].T, 1e-4, 1e-4)
      want = (c * (v @ dense[order].T)) @ dense[order]
      np.testing.assert_allclose(images, want, 1e-4, 1e-4)

  def test_many_matrices(self):
    dense = _draw((3 * 20, 10)).reshape(3, 20, 10)
    rng = np.random.default_rng(3)
    v = rng.normal(size=(3, 10)).astype(np.float32)
    c = rng.normal(size=(3, 20)).astype(np.float32)
    image, scores = jax.vmap(features.hvp)(
      features.Dense(jnp.asarray(dense)), c, v
    )
    want = np.einsum('bnd,bd->bn', dense, v)
    np.testing.assert_allclose(scores, want, 1e-4, 1e-5)
    want = np.einsum('bnd,bn->bd', dense, c * want)
    np.testing.assert_allclose(image, want, 1e-4, 1e-5)


class ColumnsTest(parameterized.TestCase):
  @parameterized.product(ones=[False, True], max_width=[3, 8, 64])
  def test_sparse(self, ones, max_width):
    dense = _draw((130, 24), ones=ones)
    matrix, order = features.from_csr(
      scipy.sparse.csr_array(dense), max_width=max_width
    )
    ids = jnp.array([12, 8, 3, 23, 0, 12])
    found = jax.jit(features.columns)(matrix, ids)
    np.testing.assert_array_equal(found, dense[order][:, ids])

  def test_more_entries_than_are_taken_at_once(self):
    dense = np.ones((3000, 4), np.float32)
    dense[::2, 1] = 0
    matrix, order = features.from_csr(scipy.sparse.csr_array(dense))
    found = jax.jit(features.columns)(matrix, jnp.array([3, 1, 0]))
    np.testing.assert_array_equal(found, dense[order][:, [3, 1, 0]])

  def test_dense(self):
    dense = _draw((9, 5))
    matrix, _ = features.from_dense(dense)
    found = features.columns(matrix, jnp.array([4, 0]))
    np.testing.assert_array_equal(found, dense[:, [4, 0]])


class ProgramTest(parameterized.TestCase):
  def test_nothing_is_scattered(self):
    matrix, _ = features.from_csr(scipy.sparse.csr_array(_draw((90, 40))))
    ones = jnp.ones(90), jnp.ones(40)
    text = jax.jit(features.hvp).lower(matrix, *ones).as_text()
    self.assertNotIn('stablehlo.scatter', text)
    self.assertIn('stablehlo.gather', text)

  def test_rows_in_one_piece_meet_a_kernel_on_a_tpu(self):
    dense = _draw((90, 40))
    chip = jax.sharding.AbstractDevice('TPU v5p', 2, 'tpu')
    mesh = jax.sharding.AbstractMesh((1,), ('data',), abstract_device=chip)
    product = jax.shard_map(
      features.hvp,
      mesh=mesh,
      in_specs=jax.P(),
      out_specs=jax.P(),
      check_vma=False,
    )
    vectors = jnp.ones(90), jnp.ones(40)
    for max_width, uncut in (16, False), (64, True):
      matrix, order = features.from_csr(
        scipy.sparse.csr_array(dense), max_width=max_width
      )
      widths = [bucket.ids.shape[0] for bucket in matrix.rows.whole]
      with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(product).trace(matrix, *vectors)
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
      count = np.count_nonzero(widths) if uncut else 0
      self.assertEqual(text.count('@tpu_custom_call'), count)

    kernel = glm_hvp.glm_hvp_padded
    plain = lambda *args, implementation: kernel(*args, implementation='xla')
    with mock.patch.object(glm_hvp, 'glm_hvp_padded', plain):
      found = features._hvp_on_tpu(matrix, *vectors)
    want = dense[order].sum(axis=1)
    np.testing.assert_allclose(found[1], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
      found[0], dense[order].T @ want, rtol=1e-5, atol=1e-4
    )

  def test_a_loop_keeps_narrow_ids(self):
    """Else XLA widens them in front of the loop, and reads twice as much."""
    matrix, _ = features.from_csr(
      scipy.sparse.csr_array(_draw((90, 40), ones=True))
    )

    def loop(matrix, c, v):
      body = lambda _, v: features.hvp(matrix, c, v)[0]
      return jax.lax.fori_loop(0, 5, body, v)

    ones = jnp.ones(90), jnp.ones(40)
    text = jax.jit(loop).lower(matrix, *ones).compile().as_text()
    (line,) = [line for line in text.splitlines() if ' while(' in line]
    self.assertIn('u16[', line)
    self.assertNotRegex(line, r's32\[\d+\]')


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(np.nan, np.inf, 1e39)
  def test_what_is_not_finite(self, value):
    dense = np.zeros((3, 2))
    dense[1, 1] = value
    with self.assertRaisesRegex(ValueError, 'features .* finite, got .* row 1'):
      features.from_csr(scipy.sparse.csr_array(dense))
    with self.assertRaisesRegex(ValueError, 'features .* finite, got .* row 1'):
      features.from_dense(dense)

  def test_wrong_indices(self):
    matrix = scipy.sparse.csr_array(np.eye(3))
    matrix.indices = np.array([0, 1, 3])
    with self.assertRaisesRegex(ValueError, r'features in \[0, 3\)'):
      features.from_csr(matrix)
