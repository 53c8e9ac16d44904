"""Where rows, features and classes of softmax regression lie."""

import jax
import numpy as np
from absl.testing import parameterized

from emc2.separable import mlr_cells, rows, sliced

CUT = dict(num_workers=3, slots=2, num_minibatches=4)


def draw(num_rows=70, num_features=5, num_classes=15):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(num_rows, num_features)).astype('float32')
  y = rng.permutation(np.arange(num_rows) % num_classes)
  return x, y


class SplitTest(parameterized.TestCase):
  def test_rows_and_classes_are_dealt_once(self):
    x, y = draw()
    batch, layout = mlr_cells.split(x, y, 15, **CUT)
    self.assertEqual(batch.features.shape, (3, 4, 6, 5))
    self.assertEqual(batch.classes.shape, (6, 3))
    types = [leaf.dtype for leaf in jax.tree.leaves(batch)]
    whole = [np.int32] * 2
    self.assertEqual(types, [np.float32, np.int32, np.float32, *whole])
    np.testing.assert_array_equal(batch.sizes, [[3, 3, 3, 2, 2, 2]] * 3)
    for ids, count in ((layout.row_ids, 70), (batch.classes, 15)):
      np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(count))
    # No part has two more than another, and padding comes last.
    for ids in (layout.row_ids.reshape(12, 6), batch.classes):
      kept = ids >= 0
      self.assertLessEqual(np.ptp(kept.sum(1)), 1)
      self.assertTrue(np.all(np.diff(kept.astype(int), axis=1) <= 0))
    np.testing.assert_array_equal(batch.weights, layout.row_ids >= 0)
    np.testing.assert_array_equal(layout.sort_rows(batch.features), x)
    self.assertEqual(np.abs(batch.features[layout.row_ids < 0]).max(), 0)
    block, place = np.divmod(layout.sort_rows(batch.labels), 3)
    np.testing.assert_array_equal(batch.classes[block, place], y)
    names = layout.classes(layout.sort_rows(batch.labels))
    np.testing.assert_array_equal(names, y)

  def test_order_is_random(self):
    x, y = draw()
    one, other, again = (
      mlr_cells.split(x, y, 15, seed=seed, **CUT)[1] for seed in (0, 1, 0)
    )
    self.assertGreater(np.mean(one.row_ids != other.row_ids), 0.8)
    self.assertGreater(np.mean(one.class_ids != other.class_ids), 0.5)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    self.assertGreater(np.mean(one.row_ids.ravel() != np.arange(72)), 0.8)

  def test_weights_of_rows(self):
    x, y = draw()
    omega = np.random.default_rng(1).uniform(0, 3, 70)
    batch, layout = mlr_cells.split(x, y, 15, row_weights=omega, **CUT)
    self.assertEqual(batch.weights.dtype, np.float32)
    got = layout.sort_rows(batch.weights)
    np.testing.assert_array_equal(got, omega.astype('float32'))
    self.assertEqual(np.abs(batch.weights[layout.row_ids < 0]).max(), 0)

  def test_layout_there_and_back(self):
    for features in (draw()[0], rows.from_dense(draw()[0])):
      _, layout = mlr_cells.split(features, draw()[1], 15, **CUT)
      w = np.random.default_rng(2).normal(size=(5, 15))
      placed = layout.place_weights(w)
      self.assertEqual(placed.shape, (6, 5, 3))
      np.testing.assert_array_equal(layout.sort_weights(placed), w)
      gone = np.moveaxis(placed, 1, 2)[layout.class_ids < 0]
      self.assertEqual(np.abs(gone).max(), 0)
      for q, ids in enumerate(layout.class_ids):
        kept = ids >= 0
        want = w[layout.feature_ids][:, ids[kept]]
        np.testing.assert_array_equal(placed[q][:, kept], want)
      with self.assertRaisesRegex(ValueError, r'shape \(5, 15\), got \(15, 5'):
        layout.place_weights(w.T)

  def test_like_shares_classes_and_features(self):
    rng = np.random.default_rng(3)
    x, y = draw()
    x[rng.random(x.shape) < np.linspace(0.9, 0.1, 5)] = 0
    x[:, 3] = 1
    _, layout = mlr_cells.split(rows.from_dense(x), y, 15, **CUT)
    counts = np.count_nonzero(x, axis=0)[layout.feature_ids]
    self.assertTrue(np.all(np.diff(counts) <= 0))
    # An empty row, and classes without a row, are allowed for a test.
    test = rows.from_dense(np.zeros((20, 5), 'float32'))
    labels = np.full(20, 7)
    batch, other = mlr_cells.split(test, labels, 15, like=layout, seed=9, **CUT)
    np.testing.assert_array_equal(other.class_ids, layout.class_ids)
    np.testing.assert_array_equal(other.feature_ids, layout.feature_ids)
    np.testing.assert_array_equal(batch.classes, layout.class_ids)
    names = other.classes(other.sort_rows(batch.labels))
    np.testing.assert_array_equal(names, labels)

  def test_sparse_rows_hold_what_dense_rows_do(self):
    rng = np.random.default_rng(4)
    x, y = draw()
    x[rng.random(x.shape) < 0.5] = 0
    x[:, 2] = 1
    batch, layout = mlr_cells.split(rows.from_dense(x), y, 15, **CUT)
    rows_, columns = batch.features
    sorted_x = x[:, layout.feature_ids]

    @jax.jit
    def multiply(matrix, total, table):
      one = lambda matrix: sliced.add_matmul(total, matrix, table)
      return jax.vmap(jax.vmap(one))(matrix)

    eye = np.eye(5, dtype='float32')
    got = multiply(rows_, np.zeros((6, 5), 'float32'), eye)
    np.testing.assert_array_equal(layout.sort_rows(got), sorted_x)
    eye = np.eye(6, dtype='float32')
    got = multiply(columns, np.zeros((5, 6), 'float32'), eye)
    got = layout.sort_rows(np.moveaxis(got, 2, 3))
    np.testing.assert_array_equal(got, sorted_x)

  @parameterized.parameters(
    (dict(features=np.ones(4)), r'features must have shape \(N, D\)'),
    (dict(labels=np.array([0, 1, 4, 2])), r'in \[0, 4\), got 4 in row 2'),
    (dict(labels=np.array([0, -1, 3, 2])), r'in \[0, 4\), got -1 in row 1'),
    (dict(labels=np.arange(3)), r'4 integers, got int64 of shape \(3,\)'),
    (dict(labels=np.arange(4.0)), '4 integers, got float64'),
    (dict(labels=np.array([0, 1, 3, 3])), 'none of class 2'),
    (dict(features=np.diag([1.0, 0, 1, 1])), 'whole row, got row 1'),
    (dict(features=np.diag([1.0, 1, np.nan, 1])), 'be finite, got row 2'),
    (dict(row_weights=np.ones(3)), r'row_weights must be 4 .* shape \(3,\)'),
    (dict(row_weights=-np.ones(4)), 'at least 0'),
    (dict(row_weights=np.zeros(4)), 'not all 0'),
    (dict(row_weights=np.full(4, np.inf)), 'finite'),
    (dict(num_workers=0), 'num_workers must be at least 1, got 0'),
    (dict(slots=0), 'slots must be at least 1'),
    (dict(num_minibatches=-1), 'num_minibatches must be at least 1'),
    (dict(num_workers=5), 'at least the 5 blocks, got 4'),
    (dict(slots=5), 'at least the 5 blocks, got 4'),
    (dict(num_minibatches=5), 'each of the 5 minibatches, got 4'),
  )
  def test_refuses(self, wrong, message):
    given = dict(features=np.eye(4), labels=np.arange(4), num_classes=4)
    with self.assertRaisesRegex(ValueError, message):
      mlr_cells.split(**(given | wrong))

  def test_refuses_sparse(self):
    sparse = rows.from_dense(np.diag([1.0, 0, 1]))
    with self.assertRaisesRegex(ValueError, 'whole row, got row 1'):
      mlr_cells.split(sparse, np.arange(3), 3)
    values = np.array([1, np.inf], 'float32')
    with self.assertRaisesRegex(ValueError, 'finite, got inf in row 2'):
      mlr_cells.split(sparse._replace(values=values), np.arange(3), 3)
    batch, _ = mlr_cells.split(sparse, np.zeros(3, int), 3, allow_empty=True)
    self.assertEqual(batch.weights.sum(), 3)

  def test_refuses_another_layout(self):
    x, y = draw()
    _, layout = mlr_cells.split(x, y, 15, **CUT)
    for features, cut in ((x[:, :4], CUT), (x, CUT | dict(slots=1))):
      with self.assertRaisesRegex(ValueError, 'like must have'):
        mlr_cells.split(features, y, 15, like=layout, **cut)
