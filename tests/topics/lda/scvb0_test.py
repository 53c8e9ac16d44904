"""SCVB0: a NumPy loop over tokens, written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import algorithm
from emc2 import mesh as mesh_lib
from emc2.topics.lda import scvb0

from tests.topics.lda import inference_test, svi_test

ALPHA, ETA = 0.3, 0.05
NUM_WORDS, NUM_TOPICS = 30, 4


def make(**settings):
  defaults = dict(num_tokens=500.0, alpha=ALPHA, eta=ETA)
  return scvb0.scvb0(NUM_TOPICS, NUM_WORDS, **(defaults | settings))


def find_step(
  counts, word_sums, *, rate, document_rate, burn_in=1, num_tokens=500.0
):
  """New word sums and the loss, token by token."""
  totals = word_sums.sum(0)
  beta = (word_sums + ETA) / (totals + NUM_WORDS * ETA)
  new, loss = np.zeros(word_sums.shape), 0.0
  for row in counts:
    length, seen = row.sum(), 0
    sums = np.full(NUM_TOPICS, length / NUM_TOPICS)
    for number in range(burn_in + 1):
      for word in np.flatnonzero(row):
        share = beta[word] * (sums + ALPHA)
        phi = share / share.sum()
        step_size = document_rate(seen)
        for _ in range(row[word]):
          sums = (1 - step_size) * sums + step_size * length * phi
        seen += row[word]
        if number == burn_in:
          new[word] += row[word] * phi
          likelihood = share.sum() / (length + NUM_TOPICS * ALPHA)
          loss -= row[word] * np.log(likelihood)
  new *= num_tokens / counts.sum()
  return (1 - rate) * word_sums + rate * new, loss / counts.sum()


class Scvb0Test(parameterized.TestCase):
  @parameterized.parameters(
    ('float32', dict()), ('float64', dict(burn_in=3, num_tokens=9_000.0))
  )
  def test_matches_numpy(self, dtype, settings):
    self._check_matches_numpy(dtype, settings)

  @parameterized.parameters(
    ('float64', dict(burn_in=0)),
    ('float64', dict(step_size=0.25)),
    ('float64', dict(document_step_size=0.1)),
    ('float64', dict(document_step_size=lambda t: 1 / (2 + t))),
  )
  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self, dtype, settings):
    self._check_matches_numpy(dtype, settings)

  def _check_matches_numpy(self, dtype, settings):
    counts = inference_test.make_counts()
    word_sums = inference_test.make_word_sums()
    rtol = 1e-10 if dtype == 'float64' else 1e-4
    given = settings.get('document_step_size', lambda t: (10 + t) ** -0.9)
    oracle = {
      name: settings[name]
      for name in ('burn_in', 'num_tokens')
      if name in settings
    }
    with jax.enable_x64(dtype == 'float64'):
      method = make(**settings)
      step = jax.jit(method.step)
      state = method.init(jax.random.key(0), jnp.asarray(word_sums, dtype))
      for t, rows in enumerate(([0, 1, 2, 3, 4], [9, 5, 8, 6, 7])):
        batch = svi_test.make_batch(rows)
        state, info = step(jax.random.key(0), state, batch)
        rate = settings.get('step_size', 10 * (1_000 + t) ** -0.9)
        word_sums, loss = find_step(
          counts[rows],
          word_sums,
          rate=rate,
          document_rate=given if callable(given) else lambda _: 0.1,
          **oracle,
        )
        np.testing.assert_allclose(info.loss, loss, rtol=rtol)
        np.testing.assert_allclose(info.step_size, rate, rtol=1e-5)
      found, totals = np.asarray(scvb0.word_sums(state)), state.totals
      np.testing.assert_allclose(totals, word_sums.sum(0), rtol=rtol)
    self.assertEqual(found.dtype, dtype)
    np.testing.assert_allclose(found, word_sums, rtol=rtol, atol=rtol)

  @parameterized.parameters(0.0, 0.2, 1.0)
  def test_shares_out_the_tokens_at_first(self, concentration):
    state = make(concentration=concentration).init(jax.random.key(0))
    sums = np.asarray(scvb0.word_sums(state))
    np.testing.assert_allclose(sums.sum(1), 500 / NUM_WORDS, rtol=1e-5)
    np.testing.assert_allclose(state.totals, sums.sum(0), rtol=1e-5)
    largest = sums.max(1).mean() / (500 / NUM_WORDS)
    want = {0.0: (0.999, 1.001), 0.2: (0.7, 0.99), 1.0: (0.4, 0.65)}
    self.assertBetween(largest, *want[concentration])

  @pytest.mark.slow
  def test_finds_the_topics(self):
    """Two groups of words that never meet."""
    rng = np.random.default_rng(0)
    counts = np.zeros((200, NUM_WORDS), np.int64)
    for row in counts:
      half = rng.integers(2) * 15
      row[half : half + 15] = rng.poisson(2.0, 15)
    method = scvb0.scvb0(2, NUM_WORDS, num_tokens=float(counts.sum()))
    batches = [
      svi_test.make_batch(rows, counts)
      for rows in rng.integers(0, 200, (300, 50))
    ]
    batches = jax.tree.map(lambda *x: np.stack(x), *batches)
    state = method.init(jax.random.key(1))
    state, info = jax.jit(
      lambda state, batches: algorithm.scan(
        jax.random.key(0), state, batches, method.step
      )
    )(state, batches)
    halves = np.asarray(scvb0.word_sums(state)).reshape(2, 15, 2).sum(1)
    halves /= np.asarray(state.totals)
    np.testing.assert_allclose(halves.max(1), 1, atol=0.1)
    self.assertLess(info.loss[-1], info.loss[0] - 0.3)

  def test_eight_devices_equal_one(self):
    self._check_eight_devices_equal_one('shard_map')

  @pytest.mark.slow
  def test_eight_devices_equal_one_by_jit_alone(self):
    self._check_eight_devices_equal_one('jit')

  def _check_eight_devices_equal_one(self, how):
    batch = svi_test.make_batch(np.arange(16))
    key, method = jax.random.key(5), make()
    state = method.init(jax.random.key(0))
    want, told = jax.jit(method.step)(key, state, batch)
    spec = jax.sharding.PartitionSpec(mesh_lib.DATA)
    whole = jax.sharding.PartitionSpec()
    mesh = mesh_lib.make(data=4, fsdp=2)
    step = method.step
    if how == 'shard_map':
      mesh = mesh_lib.make(data=8)
      step = jax.shard_map(
        make(axis_name=mesh_lib.DATA).step,
        mesh=mesh,
        in_specs=(whole, scvb0.shardings(mesh), spec),
        out_specs=(scvb0.shardings(mesh), whole),
      )
    state = mesh_lib.place(state, mesh, scvb0.shardings(mesh))
    batch = mesh_lib.place(batch, mesh, spec)
    found, info = jax.jit(step)(key, state, batch)
    np.testing.assert_allclose(info.loss, told.loss, rtol=1e-5)
    np.testing.assert_allclose(
      scvb0.word_sums(found), scvb0.word_sums(want), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found.totals, want.totals, rtol=1e-4)

  def test_same_types_abstract_and_donated(self):
    method, batch = make(), svi_test.make_batch([0, 3, -1])
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
    (dict(num_tokens=0.0), 'num_tokens'),
    (dict(step_size=0.0), 'step_size'),
    (dict(document_step_size=1.5), 'document_step_size'),
    (dict(burn_in=-1), 'burn_in'),
    (dict(concentration=-1.0), 'concentration'),
    (dict(alpha=0.0), 'alpha'),
    (dict(eta=0.0), 'eta'),
  )
  def test_refuses(self, settings, name):
    with self.assertRaisesRegex(ValueError, f'^{name} must'):
      make(**settings)
