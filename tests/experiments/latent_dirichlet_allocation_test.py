"""The scikit-learn estimator beside scikit-learn's own."""

import pickle
from unittest import mock

import numpy as np
import pytest
import scipy.sparse
import sklearn.decomposition
from absl.testing import parameterized
from sklearn import base
from sklearn.utils import estimator_checks

from emc2.experiments import latent_dirichlet_allocation

Ours = latent_dirichlet_allocation.LatentDirichletAllocation
METHODS = latent_dirichlet_allocation.LEARNING_METHODS
PRIORS = dict(doc_topic_prior=0.1, topic_word_prior=0.05)

QUICK = (
  'check_estimator_sparse_tag',
  'check_estimators_nan_inf',
  'check_fit1d',
  'check_fit2d_1feature',
  'check_n_features_in',
)
"""Checks that are tried in every run; `test_all_checks` tries all."""


def _counts(num_documents=60, num_words=40, num_topics=3, length=50):
  rng = np.random.default_rng(0)
  topics = rng.dirichlet(np.full(num_words, 0.1), num_topics)
  shares = rng.dirichlet(np.full(num_topics, 0.2), num_documents)
  return np.stack([rng.multinomial(length, p) for p in shares @ topics])


class LatentDirichletAllocationTest(parameterized.TestCase):
  @parameterized.parameters(np.float32, np.float64)
  @pytest.mark.slow
  def test_equal_topics_score_as_in_sklearn(self, dtype):
    counts = _counts()
    settings = dict(PRIORS, mean_change_tol=1e-6, max_doc_update_iter=1000)
    theirs = sklearn.decomposition.LatentDirichletAllocation(
      3, random_state=0, **settings
    ).fit(counts)
    ours = Ours(3, max_iter=1, random_state=0, **settings).fit(counts)
    ours.components_ = theirs.components_
    wide = _counts(20, length=30).astype(np.float64)
    wide[3] = 0
    unseen = wide.astype(dtype)
    shares = ours.transform(unseen)
    self.assertEqual(shares.dtype, dtype)
    np.testing.assert_allclose(shares, theirs.transform(wide), atol=2e-5)
    np.testing.assert_allclose(
      ours.transform(unseen, normalize=False),
      theirs.transform(wide, normalize=False),
      rtol=1e-3,
    )
    np.testing.assert_allclose(
      ours.score(unseen), theirs.score(wide), rtol=1e-6
    )
    np.testing.assert_allclose(
      ours.perplexity(unseen), theirs.perplexity(wide), rtol=1e-6
    )

  @parameterized.parameters(*METHODS)
  @pytest.mark.slow
  def test_fits_about_as_well_as_sklearn(self, method):
    counts = _counts()
    theirs = sklearn.decomposition.LatentDirichletAllocation(
      3, random_state=0, max_iter=30, **PRIORS
    ).fit(counts)
    ours = Ours(
      3, random_state=0, max_iter=30, learning_method=method, batch_size=20
    ).set_params(**PRIORS)
    shares = ours.fit_transform(scipy.sparse.csr_matrix(counts))
    self.assertEqual(shares.shape, (60, 3))
    self.assertEqual(ours.components_.shape, (3, 40))
    self.assertEqual(ours.n_iter_, 30)
    self.assertEqual(ours.n_features_in_, 40)
    self.assertEqual(ours.n_batch_iter_, 90 if method == 'svi' else 0)
    self.assertLess(ours.bound_, 1.1 * theirs.bound_)
    self.assertEqual(ours.bound_, ours.perplexity(counts))
    total = counts.sum() if method != 'svi' else ours.components_.sum() - 6
    np.testing.assert_allclose(ours.components_.sum(), total + 6, rtol=1e-4)
    again = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(again.transform(counts), shares)

  @parameterized.parameters(
    ('cvb0', dict(doc_topic_prior=0.5)),
    ('cvb0', dict(topic_word_prior=0.5)),
    ('cvb0', dict(learning_method='vi')),
    ('cvb0', dict(max_iter=3)),
    ('cvb0', dict(random_state=1)),
    ('esvi', dict(n_blocks=1)),
    ('svi', dict(learning_decay=0.9)),
    ('svi', dict(learning_offset=50.0)),
    ('svi', dict(batch_size=30)),
    ('svi', dict(mean_change_tol=1.0)),
    ('svi', dict(max_doc_update_iter=1)),
  )
  @pytest.mark.slow
  def test_parameters_count(self, method, given):
    counts = _counts()
    settings = dict(learning_method=method, max_iter=2, random_state=0)
    settings |= dict(batch_size=20, **PRIORS)
    self.enter_context(mock.patch.object(Ours, 'perplexity', return_value=0.0))
    one, other = (
      Ours(3, **chosen).fit(counts).components_
      for chosen in (settings, settings | given)
    )
    change = np.abs(one - other).max()
    if 'topic_word_prior' in given:
      change -= 0.45
    self.assertGreater(change, 1e-3)

  def test_partial_fit_goes_on(self):
    counts = _counts()
    model = Ours(3, batch_size=20, total_samples=60, random_state=0, **PRIORS)
    model.partial_fit(counts[:30])
    self.assertEqual(model.n_batch_iter_, 2)
    first = model.perplexity(counts)
    for _ in range(10):
      model.partial_fit(counts[30:]).partial_fit(counts[:30])
    self.assertLess(model.perplexity(counts), 0.9 * first)
    more = Ours(3, total_samples=600, random_state=0, **PRIORS)
    more.partial_fit(counts[:30])
    self.assertGreater(more.components_.sum(), 2 * model.components_.sum())
    with self.assertRaisesRegex(ValueError, 'features'):
      model.partial_fit(counts[:, :10])

  @pytest.mark.slow
  def test_one_topic(self):
    counts = _counts()
    for method in METHODS:
      model = Ours(1, learning_method=method, max_iter=1).fit(counts)
      np.testing.assert_array_equal(model.transform(counts), np.ones((60, 1)))
      if method != 'svi':
        want = counts.sum(0)[None] + 1.0
        np.testing.assert_allclose(model.components_, want, rtol=1e-6)

  @parameterized.parameters(
    (dict(n_components=0), 'n_components must be an integer, at least 1'),
    (dict(doc_topic_prior=0.0), 'doc_topic_prior must be finite and above 0'),
    (dict(topic_word_prior=-1.0), 'topic_word_prior must be finite and above'),
    (dict(learning_method='batch'), "learning_method must be one of .*'batch'"),
    (dict(learning_decay=0.5), r'learning_decay must lie in \(0.5, 1\]'),
    (dict(learning_offset=0.0), 'learning_offset must be at least 1'),
    (dict(max_iter=0), 'max_iter must be an integer, at least 1, got 0'),
    (dict(batch_size=0), 'batch_size must be an integer, at least 1, got 0'),
    (dict(total_samples=0), 'total_samples must be at least 1, got 0'),
    (dict(n_blocks=0), 'n_blocks must be an integer, at least 1, got 0'),
    (dict(mean_change_tol=-1.0), 'mean_change_tol must be at least 0'),
    (dict(max_doc_update_iter=0), 'max_doc_update_iter must be an integer'),
  )
  def test_bad_parameters(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      Ours(**given).fit(_counts())

  def test_bad_matrices(self):
    with self.assertRaisesRegex(ValueError, 'Negative values in data'):
      Ours().fit(-_counts())
    with self.assertRaisesRegex(ValueError, 'at least one token'):
      Ours().fit(np.zeros((3, 4)))
    with self.assertRaisesRegex(NotImplementedError, 'sub_sampling'):
      Ours(2, max_iter=1).fit(_counts()).perplexity(_counts(), True)

  @pytest.mark.slow
  def test_quick_checks(self):
    model = Ours(learning_method='svi', max_iter=1)
    found = {
      check.func.__name__: check
      for estimator, check in estimator_checks.estimator_checks_generator(model)
    }
    self.assertLessEqual(set(QUICK), set(found))
    for name in QUICK:
      with self.subTest(name):
        found[name](base.clone(model))

  @parameterized.parameters(*METHODS)
  @pytest.mark.slow
  def test_all_checks(self, method):
    """All of scikit-learn's but that for arrays of other libraries."""
    found = estimator_checks.check_estimator(
      Ours(learning_method=method), on_fail=None, on_skip=None
    )
    wrong = {
      x['check_name'] for x in found if x['status'] not in ('passed', 'skipped')
    }
    self.assertEqual(wrong, set())
