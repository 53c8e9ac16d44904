"""Sparse rows against SciPy."""

import types

import numpy as np
from absl.testing import parameterized
from scipy import sparse

from emc2.separable import rows


def draw(num_rows=9, num_features=6):
  rng = np.random.default_rng(0)
  dense = rng.normal(size=(num_rows, num_features)).astype('float32')
  dense[rng.random(dense.shape) < 0.6] = 0
  dense[3] = 0
  dense[5] = 1
  return dense


class RowsTest(parameterized.TestCase):
  def test_dense_and_back(self):
    dense = draw()
    found = rows.from_dense(dense)
    np.testing.assert_array_equal(found.to_dense(), dense)
    self.assertEqual(found.shape, dense.shape)
    self.assertEqual(found.num_rows, 9)
    want = sparse.csr_array(dense)
    np.testing.assert_array_equal(found.starts, want.indptr)
    np.testing.assert_array_equal(found.ids, want.indices)
    np.testing.assert_array_equal(found.row_ids, np.nonzero(dense)[0])
    types_ = [x.dtype for x in found[:3]]
    self.assertEqual(types_, [np.int64, np.int32, np.float32])

  def test_from_csr(self):
    dense = draw()
    found = rows.from_csr(sparse.csr_array(dense))
    np.testing.assert_array_equal(found.to_dense(), dense)

  def test_unsorted_twice_and_zero(self):
    matrix = sparse.csr_array(
      (
        np.array([1.0, 2.0, 3.0, 0.0, 4.0, -4.0]),
        np.array([3, 0, 3, 1, 2, 2]),
        np.array([0, 3, 4, 6]),
      ),
      shape=(3, 4),
    )
    found = rows.from_csr(matrix)
    np.testing.assert_array_equal(found.to_dense(), matrix.toarray())
    np.testing.assert_array_equal(found.starts, [0, 2, 2, 2])
    np.testing.assert_array_equal(found.ids, [0, 3])
    np.testing.assert_array_equal(found.values, np.float32([2, 4]))

  def test_take(self):
    dense = draw()
    chosen = np.array([5, 3, 0, 5])
    found = rows.from_dense(dense).take(chosen)
    np.testing.assert_array_equal(found.to_dense(), dense[chosen])
    none = rows.from_dense(dense).take(np.array([], int))
    self.assertEqual(none.shape, (0, 6))

  @parameterized.parameters(
    (dict(indptr=[0, 1]), 'must have 3 row pointers'),
    (dict(indices=[0]), 'as many indices as data'),
    (dict(indptr=[1, 1, 2]), 'rise from 0 to 2'),
    (dict(indptr=[0, 3, 2]), 'rise from 0 to 2'),
    (dict(indices=[0, 3]), r'features in \[0, 3\), got 0 to 3'),
    (dict(indices=[-1, 2]), r'features in \[0, 3\), got -1 to 2'),
    (dict(data=[1.0, np.nan]), 'must be finite, got nan in row 1'),
  )
  def test_refuses(self, wrong, message):
    given = dict(shape=(2, 3), indptr=[0, 1, 2], indices=[0, 2], data=[1, 2.0])
    with self.assertRaisesRegex(ValueError, message):
      rows.from_csr(types.SimpleNamespace(**(given | wrong)))

  def test_refuses_dense(self):
    with self.assertRaisesRegex(ValueError, r'shape \(N, D\), got \(3,\)'):
      rows.from_dense(np.ones(3))
    with self.assertRaisesRegex(ValueError, 'finite, got inf in row 1'):
      rows.from_dense(np.array([[1.0, 0.0], [0.0, np.inf]]))
