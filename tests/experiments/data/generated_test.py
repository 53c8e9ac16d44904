"""Generated problems: their recipes, and the optimum that is known."""

import numpy as np
import scipy.optimize
import scipy.special
from absl.testing import parameterized

from emc2.experiments.data import generated


def objective(weights, rows, labels, ridge):
  """The regularised mean cross-entropy and its gradient, in NumPy."""
  scores = rows @ weights
  size = len(labels)
  logs = scipy.special.logsumexp(scores, axis=1)
  loss = np.mean(logs - scores[np.arange(size), labels])
  error = np.exp(scores - logs[:, None])
  error[np.arange(size), labels] -= 1
  gradient = rows.T @ error / size + ridge * weights
  return loss + ridge / 2 * np.sum(weights**2), gradient


class SoftmaxTest(parameterized.TestCase):
  def test_optimum_of_the_specification(self):
    train, test = generated.softmax()
    self.assertEqual((train.rows.shape, test.num_rows), ((960, 20), 0))
    rows = train.rows.to_dense().astype(np.float64)

    def flat(weights):
      loss, gradient = objective(
        weights.reshape(20, 24), rows, train.labels, 1e-3
      )
      return loss, gradient.ravel()

    found = scipy.optimize.minimize(
      flat,
      np.zeros(480),
      jac=True,
      method='L-BFGS-B',
      options=dict(maxiter=2000, ftol=1e-15, gtol=1e-8),
    )
    self.assertAlmostEqual(flat(np.zeros(480))[0], 3.17805, places=5)
    self.assertAlmostEqual(found.fun, 1.546392914, places=6)

  def test_test_rows_do_not_change_the_others(self):
    alone, _ = generated.softmax()
    train, test = generated.softmax(num_test=30)
    np.testing.assert_array_equal(alone.rows.values, train.rows.values)
    np.testing.assert_array_equal(alone.labels, train.labels)
    self.assertEqual(test.rows.shape, (30, 20))
    other, _ = generated.softmax(seed=1)
    self.assertNotEqual(other.labels.tolist(), train.labels.tolist())


class LogisticTest(parameterized.TestCase):
  def test_recipe_of_the_specification(self):
    """Each line of `krylov_crn.md` §6 in its own words."""
    found = generated.logistic()
    self.assertEqual(found.rows.shape, (1000, 300))
    self.assertEqual((found.rows.dtype, found.labels.dtype), ('f8', 'i4'))
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=300) for _ in range(1000)])
    for j in range(300):
      rows[:, j] /= np.sqrt(j + 1)
    rows = np.stack([row / np.sqrt(row @ row) for row in rows])
    np.testing.assert_allclose(found.rows, rows, rtol=1e-12)
    weights = 3 * rng.normal(size=300)
    np.testing.assert_array_equal(found.weights, weights)
    chance = 1 / (1 + np.exp(-2 * (rows @ weights)))
    labels = [rng.random() < p for p in chance]
    np.testing.assert_array_equal(found.labels, labels)

  def test_seed(self):
    alike = [generated.logistic(50, 9, seed=seed).labels for seed in (3, 3, 4)]
    np.testing.assert_array_equal(alike[0], alike[1])
    self.assertNotEqual(alike[0].tolist(), alike[2].tolist())


class ExtremeTest(parameterized.TestCase):
  @parameterized.product(ridge=(1e-1, 1e-3, 1e-6), width=(1, 4))
  def test_gradient_vanishes_at_the_optimum(self, ridge, width):
    problem = generated.extreme(300, 24, 9, width=width, num_test=5)
    best, weights = generated.extreme_optimum(problem, ridge)
    rows = problem.train.rows.to_dense().astype(np.float64)
    loss, gradient = objective(weights, rows, problem.train.labels, ridge)
    self.assertAlmostEqual(loss, best, places=7)
    self.assertLess(np.abs(gradient).max(), 1e-7)

  def test_kinds(self):
    problem = generated.extreme(5000, 64, 7, width=8, faithful=1.0, num_test=50)
    kinds = problem.kinds.toarray()
    np.testing.assert_allclose(kinds @ kinds.T, np.eye(64), atol=1e-12)
    self.assertEqual(set(np.count_nonzero(kinds, axis=0)), {8})
    rows = problem.train.rows.to_dense()
    np.testing.assert_allclose(rows, kinds[problem.kind_ids], rtol=1e-6)
    self.assertEqual(problem.test.rows.shape, (50, 64))
    for kind in range(64):  # All faithful: a kind has one class.
      labels = problem.train.labels[problem.kind_ids == kind]
      self.assertLess(len(set(labels)), 2)
    counts = np.bincount(problem.kind_ids)
    self.assertGreater(counts[:8].sum(), 2 * counts[-8:].sum())
    _, any_class = generated.extreme(5000, 64, 7, width=8, faithful=0.0)[:2]
    self.assertLen(set(any_class.labels), 7)

  def test_refuses(self):
    for width in (3, 0, 32):
      with self.assertRaisesRegex(ValueError, 'width must be a power of 2'):
        generated.extreme(10, 48, 4, width=width)
    problem = generated.extreme(10, 8, 4, width=2)
    for ridge in (0.0, -1.0, np.nan):
      with self.assertRaisesRegex(ValueError, 'ridge must be above 0'):
        generated.extreme_optimum(problem, ridge)


class TextTest(parameterized.TestCase):
  def test_rows(self):
    train, test = generated.text(2000, 301, 50, num_test=100)
    self.assertEqual(
      (train.rows.shape, test.rows.shape), ((2000, 301), (100, 301))
    )
    self.assertSetEqual(set(train.labels), set(range(50)))
    dense = train.rows.to_dense()
    np.testing.assert_array_equal(dense[:, -1], 1)
    np.testing.assert_allclose(
      np.linalg.norm(dense[:, :-1], axis=1), 1, rtol=1e-5
    )
    frequent = np.count_nonzero(dense[:, :300], axis=0)
    self.assertGreater(frequent[:10].mean(), 3 * frequent[-100:].mean())
    again, _ = generated.text(2000, 301, 50)
    np.testing.assert_array_equal(train.rows.values, again.rows.values)
    few, _ = generated.text(2000, 301, 50, num_words=5)
    self.assertLess(few.rows.values.size, train.rows.values.size / 3)
    with self.assertRaisesRegex(ValueError, 'num_rows must be at least num_c'):
      generated.text(10, 301, 50)


class InteractionsTest(parameterized.TestCase):
  @parameterized.parameters('classification', 'regression')
  def test_labels_follow_the_scores(self, task):
    found = generated.interactions(task=task, num_test=4000)
    self.assertEqual(found.train.rows.shape, (960, 32))
    x = found.test.rows.to_dense().astype(np.float64)
    self.assertAlmostEqual(np.mean(x != 0), 0.4, delta=0.01)
    self.assertAlmostEqual(x[x != 0].std(), 1, delta=0.01)
    scores = np.full(len(x), found.bias)
    for d in range(32):
      scores += found.weights[d] * x[:, d]
      for e in range(d):
        scores += found.factors[d] @ found.factors[e] * x[:, d] * x[:, e]
    labels = found.test.labels
    if task == 'regression':
      self.assertAlmostEqual(np.std(labels - scores), 0.1, delta=0.01)
      loud = generated.interactions(task=task, noise=3.0)
      self.assertGreater(np.std(loud.train.labels), np.std(labels))
    else:
      self.assertSetEqual(set(labels), {-1.0, 1.0})
      chance = scipy.special.expit(2 * scores)
      for low in (0.0, 0.25, 0.5, 0.75):
        part = (chance >= low) & (chance < low + 0.25)
        want = chance[part].mean()
        self.assertAlmostEqual(np.mean(labels[part] > 0), want, delta=0.08)

  def test_options(self):
    found = generated.interactions(50, 9, 2, density=1.0, seed=1)
    self.assertEqual(found.train.rows.values.size, 50 * 9)
    self.assertEqual(found.factors.shape, (9, 2))
    with self.assertRaisesRegex(ValueError, "task must be one of .* got 'fm'"):
      generated.interactions(task='fm')
