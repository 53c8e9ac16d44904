"""Unseen documents get the topics that a NumPy loop finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from absl.testing import parameterized
from scipy import special
from sklearn import decomposition

from emc2 import mesh as mesh_lib
from emc2.topics.lda import documents as documents_lib
from emc2.topics.lda import expectations, inference

ALPHA, ETA = 0.3, 0.05


def make_counts(num_documents=20, num_words=30, seed=0):
  """Dense counts; document 3 is empty, word 7 never occurs."""
  rng = np.random.default_rng(seed)
  counts = rng.poisson(rng.gamma(0.2, 4.0, (num_documents, num_words)))
  counts[3] = 0
  counts[:, 7] = 0
  return counts


def make_documents(counts):
  matrix = scipy.sparse.csr_array(counts)
  return documents_lib.from_csr(matrix, allow_no_tokens=True)


def make_word_sums(num_words=30, num_topics=4, seed=1):
  rng = np.random.default_rng(seed)
  sums = rng.gamma(0.3, 20.0, (num_words, num_topics))
  sums[7] = 0
  return sums


def log_word_weights(word_sums, eta=ETA):
  lambdas = word_sums + eta
  return special.digamma(lambdas) - special.digamma(lambdas.sum(0))


def find_gamma(counts, logs, alpha, max_steps, tolerance, start=None):
  """Gamma of one document, the phi that made it, and the steps, by loops."""
  num_topics = logs.shape[1]
  if start is None:
    gamma = np.full(num_topics, alpha + counts.sum() / num_topics)
  else:
    gamma = alpha + start
  change, steps = np.inf, 0
  while steps < max_steps and change >= tolerance:
    steps += 1
    scores = special.digamma(gamma) + logs
    phi = np.exp(scores - scores.max(1, keepdims=True))
    phi /= phi.sum(1, keepdims=True)
    new = np.full(num_topics, alpha)
    for word in np.flatnonzero(counts):
      new += counts[word] * phi[word]
    change = np.mean(np.abs(new - gamma))
    gamma = new
  return gamma, phi, steps


def find_perplexity(observed, evaluated, word_sums, alpha, eta, num_steps):
  logs = log_word_weights(word_sums, eta)
  total = 0.0
  beta = (word_sums + eta) / (word_sums + eta).sum(0)
  for seen, unseen in zip(observed, evaluated, strict=True):
    gamma = find_gamma(seen, logs, alpha, num_steps, 0.0)[0]
    theta = gamma / gamma.sum()
    for word in np.flatnonzero(unseen):
      total += unseen[word] * np.log(theta @ beta[word])
  return np.exp(-total / evaluated.sum())


def pad_all(documents, width=32):
  """With empty ones, so that a CPU works on groups of them."""
  rows = np.arange(documents.num_documents)
  rows = np.pad(rows, (0, -len(rows) % inference.GROUP), constant_values=-1)
  return documents_lib.pad(documents, rows, width)


class InferTest(parameterized.TestCase):
  @parameterized.parameters(
    ('float32', 1, 0.0, True), ('float32', 200, 1e-2, False)
  )
  def test_matches_numpy(self, dtype, max_steps, tolerance, starts):
    self._check_matches_numpy(dtype, max_steps, tolerance, starts)

  @parameterized.parameters(
    ('float32', 3, 0.0, False),
    ('float64', 1, 0.0, True),
    ('float64', 40, 0.0, False),
    ('float64', 200, 1e-2, True),
  )
  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self, dtype, max_steps, tolerance, starts):
    self._check_matches_numpy(dtype, max_steps, tolerance, starts)

  def _check_matches_numpy(self, dtype, max_steps, tolerance, starts):
    counts, word_sums = make_counts(), make_word_sums()
    logs = log_word_weights(word_sums)
    rng = np.random.default_rng(2)
    start = rng.gamma(1.0, 3.0, (24, 4)) if starts else None
    with jax.enable_x64(dtype == 'float64'):
      found = inference.infer(
        pad_all(make_documents(counts)),
        jnp.asarray(np.exp(logs), dtype),
        alpha=ALPHA,
        max_steps=max_steps,
        tolerance=tolerance,
        start=None if start is None else jnp.asarray(start, dtype),
      )
      found = jax.tree.map(np.asarray, found)
    self.assertEqual(found.documents.dtype, dtype)
    rtol = 1e-9 if dtype == 'float64' else 2e-3
    for row in range(20):
      given = None if start is None else start[row]
      gamma, phi, steps = find_gamma(
        counts[row], logs, ALPHA, max_steps, tolerance, given
      )
      self.assertEqual(found.steps[row], steps)
      np.testing.assert_allclose(
        found.documents[row] + ALPHA, gamma, rtol=rtol, atol=rtol / 10
      )
      for word in np.flatnonzero(counts[row]):
        scores = found.weights[row] * np.exp(logs[word])
        np.testing.assert_allclose(
          scores / scores.sum(), phi[word], rtol=rtol, atol=rtol / 10
        )

  @pytest.mark.slow
  def test_a_document_stands_for_itself(self):
    """Neither the others of a batch nor the padding make a difference."""
    documents = make_documents(make_counts())
    weights = jnp.float32(np.exp(log_word_weights(make_word_sums())))
    settings = dict(alpha=ALPHA, max_steps=100, tolerance=1e-3)
    whole = inference.infer(pad_all(documents), weights, **settings)
    self.assertGreater(len(set(whole.steps.tolist())), 3)
    for row in (0, 3, 5):
      batch = documents_lib.pad(documents, np.array([row, -1]), 64)
      alone = inference.infer(batch, weights, **settings)
      self.assertEqual(alone.steps[0], whole.steps[row])
      np.testing.assert_allclose(
        alone.documents[0], whole.documents[row], rtol=1e-4, atol=1e-5
      )
      np.testing.assert_array_equal(alone.documents[1], 0)

  @parameterized.parameters(2, 8)
  @pytest.mark.slow
  def test_splits_over_a_mesh(self, num_devices):
    """Two devices have a group each or more, eight have less."""
    batch = documents_lib.pad(
      make_documents(make_counts(40)), np.arange(32), width=32
    )
    weights = jnp.float32(np.exp(log_word_weights(make_word_sums())))
    infer = lambda batch: inference.infer(batch, weights, alpha=ALPHA)
    spec = jax.sharding.PartitionSpec(mesh_lib.DATA)
    split = jax.shard_map(
      infer,
      mesh=mesh_lib.make(jax.devices()[:num_devices], data=num_devices),
      in_specs=spec,
      out_specs=spec,
    )
    want, found = infer(batch), jax.jit(split)(batch)
    np.testing.assert_array_equal(found.steps, want.steps)
    np.testing.assert_allclose(found.documents, want.documents, rtol=1e-4)

  def test_refuses(self):
    batch = documents_lib.Batch(np.zeros(3, np.int32), np.zeros(3))
    with self.assertRaisesRegex(ValueError, '^batch must have'):
      inference.infer(batch, jnp.ones((3, 2)), alpha=ALPHA)


class WordWeightsTest(parameterized.TestCase):
  @parameterized.parameters(0.01, 1.0)
  @pytest.mark.slow
  def test_agrees_with_the_plain_ones(self, eta):
    sums = jnp.float32(make_word_sums())
    rest = sums.sum(0), eta, 30
    scaled, logs = expectations.word_weights(sums, *rest)
    sums = np.asarray(sums, np.float64)
    want = special.digamma(sums + eta) - special.digamma(sums.sum(0) + 30 * eta)
    found = np.log(np.maximum(scaled, 1e-30)) + np.asarray(logs)[:, None]
    # What is less than e^-60 of the largest may be 0.
    kept = want > want.max(1, keepdims=True) - 50
    np.testing.assert_allclose(found[kept], want[kept], rtol=1e-4, atol=1e-4)
    self.assertGreater(kept.sum(), 80)

  @pytest.mark.slow
  def test_shares_out_a_word_never_seen(self):
    """Where the plain weights are all 0."""
    sums = jnp.float32(make_word_sums()) * 100
    rest = sums.sum(0), 0.01, 30
    plain = expectations.exp_digamma(sums[7] + 0.01)
    np.testing.assert_array_equal(plain, np.zeros(4))
    scaled, _ = expectations.word_weights(sums, *rest)
    want = special.softmax(-special.digamma(np.asarray(rest[0]) + 0.3))
    found = np.asarray(scaled[7] / scaled[7].sum())
    np.testing.assert_allclose(found, want, rtol=1e-5)
    batch = documents_lib.Batch(jnp.int32([[7, 0]]), jnp.float32([[5, 0]]))
    found = inference.infer(batch, scaled, alpha=ALPHA)
    np.testing.assert_allclose(found.documents.sum(), 5, rtol=1e-5)


class TransformTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(),
    dict(alpha=1.5),
    dict(eta=0.7),
    dict(max_steps=2),
    dict(tolerance=0.3),
  )
  def test_matches_numpy(self, **given):
    settings = dict(alpha=ALPHA, eta=ETA, max_steps=100, tolerance=1e-3)
    settings |= given
    counts, word_sums = make_counts(), make_word_sums()
    found = inference.transform(
      np.float32(word_sums), make_documents(counts), **settings
    )
    logs = log_word_weights(word_sums, settings.pop('eta'))
    for row in range(20):
      gamma = find_gamma(counts[row], logs, **settings)[0]
      np.testing.assert_allclose(
        found[row], gamma / gamma.sum(), rtol=2e-3, atol=2e-4
      )
    np.testing.assert_allclose(found[3], 0.25, rtol=1e-6)

  @parameterized.parameters(1, 100)
  def test_agrees_with_scikit_learn(self, max_steps):
    counts = make_counts(60, 40, seed=4)
    peer = decomposition.LatentDirichletAllocation(
      5,
      doc_topic_prior=ALPHA,
      topic_word_prior=ETA,
      max_iter=4,
      random_state=0,
      max_doc_update_iter=max_steps,
    )
    peer.fit(counts)
    word_sums = peer.components_.T - ETA
    with jax.enable_x64(True):
      found = inference.transform(
        word_sums,
        make_documents(counts),
        alpha=ALPHA,
        eta=ETA,
        max_steps=max_steps,
      )
    self.assertEqual(found.dtype, np.float64)
    np.testing.assert_allclose(found, peer.transform(counts), atol=1e-7)

  @parameterized.parameters((0, 30), (5, 30))
  def test_takes_documents_without_tokens(self, *shape):
    word_sums = np.float32(make_word_sums())
    documents = make_documents(np.zeros(shape, np.int32))
    found = inference.transform(word_sums, documents, alpha=ALPHA, eta=ETA)
    np.testing.assert_array_equal(found, np.full((shape[0], 4), 0.25))

  def test_compiles_once_for_each_width(self):
    word_sums = np.float32(make_word_sums(num_topics=3))
    documents = make_documents(make_counts(40))
    run = lambda: inference.transform(word_sums, documents, alpha=1.0, eta=ETA)
    run()
    size = inference._infer._cache_size()
    run()
    self.assertEqual(inference._infer._cache_size(), size)

  @parameterized.parameters(
    (dict(alpha=0.0), 'alpha'),
    (dict(eta=-1.0), 'eta'),
    (dict(max_steps=0), 'max_steps'),
    (dict(tolerance=-1.0), 'tolerance'),
    (dict(word_sums=np.zeros((29, 4), np.float32)), 'word_sums'),
    (dict(word_sums=np.zeros((30, 4), np.int32)), 'word_sums'),
  )
  def test_refuses(self, given, name):
    settings = dict(word_sums=np.float32(make_word_sums()), alpha=1.0, eta=1.0)
    documents = make_documents(make_counts())
    with self.assertRaisesRegex(ValueError, f'^{name} must'):
      inference.transform(documents=documents, **(settings | given))


class PerplexityTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(), dict(alpha=2.0), dict(eta=0.7), dict(num_steps=1)
  )
  def test_matches_numpy(self, **given):
    settings = dict(alpha=ALPHA, eta=ETA, num_steps=200) | given
    observed, evaluated = make_counts(seed=3), make_counts(seed=5)
    word_sums = make_word_sums()
    found = inference.perplexity(
      np.float32(word_sums),
      make_documents(observed),
      make_documents(evaluated),
      **settings,
    )
    want = find_perplexity(observed, evaluated, word_sums, **settings)
    np.testing.assert_allclose(found, want, rtol=1e-4)

  def test_in_parts(self):
    """Pairs are gone through in parts; here each is one pair."""
    whole = inference.MAX_GATHERED
    self.addCleanup(setattr, inference, 'MAX_GATHERED', whole)
    documents = make_documents(make_counts())
    args = np.float32(make_word_sums()), documents, documents
    want = inference.perplexity(*args, alpha=ALPHA, eta=ETA)
    inference.MAX_GATHERED = 1
    found = inference.perplexity(*args, alpha=ALPHA, eta=ETA)
    np.testing.assert_allclose(found, want, rtol=1e-5)

  def test_of_topics_that_know_nothing(self):
    documents = make_documents(make_counts())
    word_sums = np.zeros((30, 4), np.float32)
    found = inference.perplexity(
      word_sums, documents, documents, alpha=ALPHA, eta=ETA
    )
    np.testing.assert_allclose(found, 30, rtol=1e-5)

  def test_refuses(self):
    word_sums = np.float32(make_word_sums())
    documents = make_documents(make_counts())
    for other, match in (
      (make_counts(19), 'evaluated must have the 20'),
      (make_counts() * 0, 'evaluated must have at least one'),
      (make_counts(num_words=31), r'word_sums must be \(31'),
    ):
      with self.assertRaisesRegex(ValueError, f'^{match}'):
        inference.perplexity(
          word_sums, documents, make_documents(other), alpha=1.0, eta=1.0
        )


class DocumentsTest(parameterized.TestCase):
  def test_without_tokens(self):
    matrix = scipy.sparse.csr_array((3, 4))
    with self.assertRaisesRegex(ValueError, '^matrix must .* one token'):
      documents_lib.from_csr(matrix)
    found = documents_lib.from_csr(matrix, allow_no_tokens=True)
    self.assertEqual((found.num_documents, found.num_tokens), (3, 0))

  @parameterized.parameters(
    dict(), dict(size=4), dict(max_places=64), dict(max_places=1)
  )
  def test_batches_hold_every_document_once(self, **settings):
    counts = np.tril(np.ones((40, 40), np.int32), -1)
    seen = []
    shapes = set()
    for ids, batch in documents_lib.batches(make_documents(counts), **settings):
      size, width = batch.counts.shape
      shapes.add((size, width))
      self.assertLessEqual(size, settings.get('size', 256))
      limit = settings.get('max_places', 1 << 30)
      self.assertLessEqual(size * width, max(limit, width))
      for row, words, numbers in zip(ids, *batch, strict=True):
        dense = np.bincount(words, numbers, 40)
        np.testing.assert_array_equal(dense, counts[row] if row >= 0 else 0)
      seen += ids[ids >= 0].tolist()
    self.assertCountEqual(seen, range(40))
    self.assertLen({width for _, width in shapes}, len(shapes))
