"""Online LDA: a NumPy loop, and batch inference as its limit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import algorithm
from emc2 import mesh as mesh_lib
from emc2.topics.lda import documents as documents_lib
from emc2.topics.lda import expectations, fading, inference, svi

from tests.topics.lda import inference_test

ALPHA, ETA = 0.3, 0.05
NUM_WORDS, NUM_TOPICS = 30, 4


def make(**settings):
  defaults = dict(num_documents=20, alpha=ALPHA, eta=ETA)
  return svi.svi(NUM_TOPICS, NUM_WORDS, **(defaults | settings))


def make_batch(rows, counts=None, width=32):
  counts = inference_test.make_counts() if counts is None else counts
  documents = inference_test.make_documents(counts)
  return documents_lib.pad(documents, np.asarray(rows), width)


def make_start(num_documents=20, seed=2):
  rng = np.random.default_rng(seed)
  return rng.gamma(1.0, 3.0, (num_documents, NUM_TOPICS))


def find_step(counts, word_sums, start, *, rate, num_documents, **settings):
  """New word sums, the loss and the most steps, by a loop over documents."""
  logs = inference_test.log_word_weights(word_sums)
  new = np.zeros(word_sums.shape)
  log_likelihood, most = 0.0, 0
  for row, first in zip(counts, start, strict=True):
    gamma, phi, steps = inference_test.find_gamma(
      row, logs, ALPHA, start=first, **settings
    )
    before = first
    if steps > 1:
      again = dict(settings, max_steps=steps - 1)
      before = (
        inference_test.find_gamma(row, logs, ALPHA, start=first, **again)[0]
        - ALPHA
      )
    theta = inference_test.special.digamma(before + ALPHA)
    theta -= inference_test.special.digamma(np.sum(before + ALPHA))
    log_likelihood += row @ np.log(np.exp(theta + logs).sum(1))
    new += row[:, None] * phi
    most = max(most, steps)
  new *= num_documents / len(counts)
  word_sums = (1 - rate) * word_sums + rate * new
  return word_sums, -log_likelihood / counts.sum(), most


class SviTest(parameterized.TestCase):
  def test_matches_numpy(self):
    self._check_matches_numpy(
      'float64', dict(tolerance=0.5, step_size=lambda t: 0.1 / (1 + t))
    )

  @parameterized.parameters(
    ('float32', dict()),
    ('float64', dict(max_steps=2, num_documents=1_000, step_size=0.25)),
  )
  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self, dtype, settings):
    self._check_matches_numpy(dtype, settings)

  def _check_matches_numpy(self, dtype, settings):
    """Minibatches of five documents, or of one that has fewer words than V."""
    counts, word_sums = (
      inference_test.make_counts(),
      inference_test.make_word_sums(),
    )
    rtol = 1e-9 if dtype == 'float64' else 2e-3
    rates = settings.get('step_size', lambda t: (64 + t) ** -0.7)
    rates = rates if callable(rates) else lambda t: settings['step_size']
    oracle = dict(num_documents=20, max_steps=100, tolerance=1e-3) | settings
    oracle.pop('step_size', None)
    with jax.enable_x64(dtype == 'float64'):
      method = make(**settings)
      step = jax.jit(method.step)
      state = method.init(jax.random.key(0), jnp.asarray(word_sums, dtype))
      for t, rows in enumerate(([0, 1, 2, 3, 4], [9, 5, 8, 6, 7], [11], [0])):
        start = make_start(len(rows), seed=t)
        state, info = step(
          jax.random.key(0),
          state,
          make_batch(rows, width=29),
          jnp.asarray(start, dtype),
        )
        word_sums, loss, most = find_step(
          counts[rows], word_sums, start, rate=rates(t), **oracle
        )
        np.testing.assert_allclose(info.loss, loss, rtol=rtol)
        np.testing.assert_allclose(info.step_size, rates(t), rtol=1e-6)
        self.assertEqual(info.steps, most)
      found = np.asarray(svi.word_sums(state))
      totals = np.asarray(state.totals)
    self.assertEqual(found.dtype, dtype)
    self.assertEqual(state.count, 4)
    np.testing.assert_allclose(found, word_sums, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(totals, word_sums.sum(0), rtol=rtol)

  @pytest.mark.slow
  def test_contains_batch_inference(self):
    """All documents, a whole step, and one step of gamma: an iteration of VI.

    That is, all responsibilities from the last sums and then all sums.
    """
    counts = inference_test.make_counts()
    word_sums, start = inference_test.make_word_sums(), make_start()
    gamma = ALPHA + start
    with jax.enable_x64(True):
      method = make(step_size=1.0, max_steps=1)
      state = method.init(jax.random.key(0), jnp.asarray(word_sums))
      batch, sums = make_batch(np.arange(20)), jnp.asarray(start)
      step = jax.jit(method.step)
      infer = jax.jit(
        functools.partial(inference.infer, alpha=ALPHA, max_steps=1)
      )
      for _ in range(5):
        weights = inference_test.log_word_weights(word_sums)
        scores = inference_test.special.digamma(gamma)[:, None] + weights
        phi = inference_test.special.softmax(scores, -1)
        tokens = counts[:, :, None] * phi
        gamma, word_sums = ALPHA + tokens.sum(1), tokens.sum(0)
        before = svi.word_sums(state)
        state, _ = step(jax.random.key(0), state, batch, sums)
        weights = expectations.word_weights(
          before, before.sum(0), ETA, NUM_WORDS
        )
        sums = infer(batch, weights[0], start=sums).documents
        np.testing.assert_allclose(
          svi.word_sums(state), word_sums, rtol=0, atol=1e-10
        )
        np.testing.assert_allclose(sums + ALPHA, gamma, rtol=0, atol=1e-10)

  @pytest.mark.slow
  def test_draws(self):
    """Gamma(c, 1 / c) for topics and, anew by key, for documents."""
    method = make(concentration=4.0, max_steps=1)
    state = method.init(jax.random.key(1))
    lambdas = np.asarray(svi.word_sums(state)) + ETA
    np.testing.assert_allclose(lambdas.mean(), 1, atol=0.15)
    np.testing.assert_allclose(lambdas.var(), 1 / 4, rtol=0.4)
    batch = make_batch([0, 1])
    calm = make(concentration=4.0, max_steps=1, random_start=False)
    for random, some in ((True, method), (False, calm)):
      step = jax.jit(some.step)
      first, second = [
        np.asarray(step(jax.random.key(i), state, batch)[0].words.rows)
        for i in range(2)
      ]
      self.assertEqual(np.max(np.abs(first - second)) > 1e-3, random)
    draws = svi._draw(jax.random.key(0), (1_000, 3), 4.0, jnp.float32, None)
    np.testing.assert_allclose(draws.mean(0), 1, atol=0.08)
    np.testing.assert_allclose(draws.var(0), 1 / 4, atol=0.06)

  def test_empty_documents_and_batches(self):
    method = make(step_size=0.5, random_start=False)
    state = method.init(jax.random.key(0))
    after, info = jax.jit(method.step)(
      jax.random.key(0), state, make_batch([3, -1])
    )
    self.assertEqual(info.loss, 0)
    np.testing.assert_allclose(
      svi.word_sums(after), svi.word_sums(state) / 2, rtol=1e-6
    )

  @pytest.mark.slow
  def test_finds_the_topics(self):
    """Two groups of words that never meet; the bound finds them."""
    rng = np.random.default_rng(0)
    counts = np.zeros((200, NUM_WORDS), np.int64)
    for row in counts:
      half = rng.integers(2) * 15
      row[half : half + 15] = rng.poisson(2.0, 15)
    method = svi.svi(2, NUM_WORDS, num_documents=200, random_start=False)
    rows = rng.integers(0, 200, (40, 50))
    batches = [make_batch(some, counts) for some in rows]
    batches = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    state = method.init(jax.random.key(3))
    state, info = jax.jit(
      lambda state, batches: algorithm.scan(
        jax.random.key(0), state, batches, method.step
      )
    )(state, batches)
    halves = np.asarray(svi.word_sums(state)).reshape(2, 15, 2).sum(1)
    halves /= np.asarray(state.totals)
    np.testing.assert_allclose(halves.max(1), 1, atol=0.1)
    self.assertLess(info.loss[-1], info.loss[0] - 0.3)

  @parameterized.parameters('shard_map', 'jit')
  @pytest.mark.slow
  def test_eight_devices_equal_one(self, how):
    batch = make_batch(np.arange(16))
    key = jax.random.key(5)
    method = make()
    state = method.init(jax.random.key(0))
    want, told = jax.jit(method.step)(key, state, batch)
    spec = jax.sharding.PartitionSpec(mesh_lib.DATA)
    if how == 'shard_map':
      mesh = mesh_lib.make(data=8)
      whole = jax.sharding.PartitionSpec()
      step = jax.shard_map(
        make(axis_name=mesh_lib.DATA).step,
        mesh=mesh,
        in_specs=(whole, svi.shardings(mesh), spec),
        out_specs=(svi.shardings(mesh), whole),
      )
    else:
      mesh = mesh_lib.make(data=4, fsdp=2)
      step = method.step
      self.assertEqual(
        svi.shardings(mesh).words.rows, jax.sharding.PartitionSpec('fsdp')
      )
    state = mesh_lib.place(state, mesh, svi.shardings(mesh))
    batch = mesh_lib.place(batch, mesh, spec)
    step = jax.jit(step)
    found, info = step(key, state, batch)
    self.assertEqual(info.steps, told.steps)
    np.testing.assert_allclose(info.loss, told.loss, rtol=1e-5)
    np.testing.assert_allclose(
      svi.word_sums(found), svi.word_sums(want), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found.totals, want.totals, rtol=1e-4)
    if how == 'shard_map':
      text = step.lower(key, state, batch).as_text()
      # Words, ratios and weights; loss, tokens and sums; steps.
      self.assertEqual(text.count('stablehlo.all_gather"'), 3)
      self.assertEqual(text.count('stablehlo.all_reduce"'), 4)

  def test_same_types_abstract_and_donated(self):
    method, batch = make(random_start=False), make_batch([0, 1])
    types = lambda tree: jax.tree.map(
      lambda x: (x.shape, x.dtype, x.weak_type), tree
    )
    abstract = jax.eval_shape(method.init, jax.random.key(0))
    state = method.init(jax.random.key(0))
    self.assertEqual(types(abstract), types(state))
    step = jax.jit(method.step, donate_argnums=1)
    after, _ = step(jax.random.key(0), state, batch)
    self.assertEqual(types(after), types(abstract))
    self.assertTrue(state.words.rows.is_deleted())

  @parameterized.parameters(
    (dict(num_documents=0), 'num_documents'),
    (dict(step_size=0.0), 'step_size'),
    (dict(step_size=1.5), 'step_size'),
    (dict(max_steps=0), 'max_steps'),
    (dict(tolerance=-1.0), 'tolerance'),
    (dict(concentration=0.0), 'concentration'),
    (dict(alpha=0.0), 'alpha'),
    (dict(eta=0.0), 'eta'),
  )
  def test_refuses(self, settings, name):
    with self.assertRaisesRegex(ValueError, f'^{name} must'):
      make(**settings)

  def test_refuses_what_does_not_fit(self):
    method = make()
    for shape in ((29, 4), (30, 5), (30,)):
      with self.assertRaisesRegex(ValueError, r'^word_sums must be \(30, 4\)'):
        method.init(jax.random.key(0), jnp.zeros(shape))
    batch = documents_lib.Batch(np.zeros(3, np.int32), np.zeros(3))
    with self.assertRaisesRegex(ValueError, '^batch must have'):
      method.step(jax.random.key(0), method.init(jax.random.key(0)), batch)


class FadingTest(parameterized.TestCase):
  @parameterized.parameters(0.01, 0.5, 1.0)
  def test_matches_numpy(self, rate):
    """Through some hundred steps, and what the scale is multiplied in."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 2))
    fading_table = fading.make(jnp.float32(table))
    mix = jax.jit(fading.mix)
    scales = []
    for _ in range(100):
      ids, updates = rng.integers(0, 6, (2, 3)), rng.normal(size=(2, 3, 2))
      fading_table = mix(
        fading_table, jnp.float32(rate), jnp.int32(ids), jnp.float32(updates)
      )
      table *= 1 - rate
      np.add.at(table, ids, rate * updates)
      scales.append(float(fading_table.scale))
    np.testing.assert_allclose(
      fading.value(fading_table), table, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      fading.take(fading_table, jnp.int32([[3, 1]])),
      table[[[3, 1]]],
      rtol=1e-4,
      atol=1e-5,
    )
    self.assertBetween(min(scales), 1e-6, 1)
    np.testing.assert_allclose(scales[0], max(1 - rate, (rate == 1) * 1.0))

  def test_power(self):
    t = jnp.arange(3.0)
    np.testing.assert_allclose(
      fading.power(0.9, 1_000.0, 10.0)(t),
      10 * (1_000 + np.arange(3)) ** -0.9,
      rtol=1e-5,
    )
    for given, name in (
      (dict(exponent=0.5), 'exponent'),
      (dict(delay=0.5), 'delay'),
      (dict(delay=4.0, exponent=1.0, scale=5.0), 'scale'),
    ):
      with self.assertRaisesRegex(ValueError, f'^{name} must'):
        fading.power(**given)


class LossTest(parameterized.TestCase):
  def test_is_finite_where_plain_weights_vanish(self):
    """A word that has faded from all topics."""
    method = make(eta=0.001, step_size=0.5, random_start=False)
    state = method.init(jax.random.key(0), jnp.zeros((NUM_WORDS, NUM_TOPICS)))
    weights = expectations.exp_digamma(svi.word_sums(state) + 0.001)
    np.testing.assert_array_equal(weights, jnp.zeros_like(weights))
    step = jax.jit(method.step)
    after, info = step(jax.random.key(0), state, make_batch([0]))
    # exp(psi(x)) is about exp(-1 / x): every token has -1000 nats.
    self.assertBetween(float(info.loss), 900, 1_100)
    num_tokens = inference_test.make_counts()[0].sum()
    np.testing.assert_allclose(
      svi.word_sums(after).sum(), 20 * num_tokens / 2, rtol=1e-5
    )
