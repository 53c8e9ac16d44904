"""CVB0 against a loop over all responsibilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.topics import lda
from emc2.topics.lda import cvb0

from tests.topics.lda import corpora, oracle

K, V = 5, 60
PRIORS = dict(alpha=0.2, eta=0.05)


def cut(num_shards=1, num_blocks=1):
  documents = corpora.draw(45, V, K, num_empty=1).documents
  cells, _ = lda.cut(
    documents, num_shards=num_shards, num_blocks=num_blocks, tile=32
  )
  return cells._replace(counts=cells.counts.astype(np.float64))


class Cvb0Test(parameterized.TestCase):
  @parameterized.parameters(1, 3)
  def test_equals_the_serial_loop(self, num_blocks):
    with jax.enable_x64(True):
      cells = cut(1, num_blocks)
      method = cvb0.cvb0(K, V, concentration=1.0, **PRIORS)
      state = jax.jit(method.init)(jax.random.key(0), cells)
      phi = np.asarray(state.phi).reshape(1, num_blocks, -1, K)
      want = oracle.Serial(cells, phi, V, PRIORS['alpha'], PRIORS['eta'])
      step = jax.jit(method.step)
      for t in range(3):
        lengths = want.documents.sum(-1)
        state, info = step(jax.random.key(t), state, cells)
        want.cvb0_pass(32)
        np.testing.assert_allclose(
          state.documents, want.documents[0], atol=1e-11
        )
        np.testing.assert_allclose(state.words, want.words, atol=1e-11)
        np.testing.assert_allclose(want.documents.sum(-1), lengths, atol=1e-9)
    self.assertTrue(np.isfinite(info.loss))

  @pytest.mark.slow
  def test_loss_is_of_a_token_given_the_others(self):
    """One topic set at a time, so that each pair can be looked at."""
    with jax.enable_x64(True):
      documents = corpora.from_dense(np.array([[2, 0, 1], [0, 3, 1]]))
      cells, _ = lda.cut(documents, tile=5, seed=None)
      cells = cells._replace(counts=cells.counts.astype(np.float64))
      method = cvb0.cvb0(2, 3, concentration=1.0, **PRIORS)
      state = method.init(jax.random.key(3), cells)
      _, info = method.step(jax.random.key(0), state, cells)
    phi = np.asarray(state.phi)[0, 0][:4]
    counts, ids, word_ids = (
      np.asarray(x).ravel()[:4]
      for x in (cells.counts, cells.documents, cells.words)
    )
    loss = 0.0
    for n, d, w, own in zip(counts, ids, word_ids, phi, strict=True):
      by_document = np.asarray(state.documents)[d] - own + PRIORS['alpha']
      by_word = np.asarray(state.words)[0, w] - own + PRIORS['eta']
      totals = np.asarray(state.totals) - own + 3 * PRIORS['eta']
      theta = by_document / by_document.sum()
      loss -= n * np.log(np.sum(theta * by_word / totals))
    np.testing.assert_allclose(info.loss, loss / counts.sum(), rtol=1e-12)

  @parameterized.parameters(4, 8)
  @pytest.mark.slow
  def test_ring_keeps_all_tokens_and_learns(self, num_blocks):
    with jax.enable_x64(True):
      cells = cut(4, num_blocks)
      mesh = mesh_lib.make(jax.devices()[:4], ring=4)
      batch = mesh_lib.place(cells, mesh, lda.cells.specs())
      method = cvb0.cvb0(K, V, axis_name=mesh_lib.RING, **PRIORS)
      method = lda.on_ring(method, mesh, cvb0.shardings())
      state = jax.jit(method.init)(jax.random.key(0), batch)
      step, losses = jax.jit(method.step), []
      for t in range(10):
        state, info = step(jax.random.key(t), state, batch)
        losses.append(float(info.loss))
      state = jax.device_get(state)
    counts = cells.counts.sum()
    np.testing.assert_allclose(state.totals.sum(), counts, rtol=1e-12)
    np.testing.assert_allclose(state.totals, state.words.sum((0, 1)), rtol=1e-9)
    phi = state.phi.reshape(-1, K)
    np.testing.assert_allclose(phi.sum(1), 1, atol=1e-12)
    tokens = (cells.counts.reshape(-1, 1) * phi).sum(0)
    np.testing.assert_allclose(tokens, state.totals, rtol=1e-9)
    self.assertLess(losses[-1], losses[0] - 0.3)

  @pytest.mark.slow
  def test_refreshing_mends_drift(self):
    with jax.enable_x64(True):
      cells = cut(1, 3)
      found = {}
      for every in (0, 1):
        method = cvb0.cvb0(K, V, refresh_every=every, **PRIORS)
        state = method.init(jax.random.key(0), cells)
        spoilt = state._replace(words=state.words + 0.5)
        state, _ = jax.jit(method.step)(jax.random.key(0), spoilt, cells)
        found[every] = float(jnp.sum(state.words))
    tokens = cells.counts.sum()
    np.testing.assert_allclose(found[1], tokens, rtol=1e-12)
    self.assertGreater(found[0], tokens + 100)

  def test_compiles_once_and_donates(self):
    cells = jax.tree.map(np.float32, cut(1, 2)._asdict())
    cells = lda.Cells(
      cells['documents'].astype(np.int32),
      cells['words'].astype(np.int32),
      cells['counts'],
      cells['dense'],
    )
    method = cvb0.cvb0(K, V)
    step = jax.jit(method.step, donate_argnums=1)
    state = jax.jit(method.init)(jax.random.key(0), cells)
    for t in range(3):
      state, info = step(jax.random.key(t), state, cells)
    self.assertEqual(step._cache_size(), 1)
    self.assertTrue(np.isfinite(info.loss))

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'alpha must be finite and above 0'):
      cvb0.cvb0(K, V, alpha=-0.1)
    dense, _ = lda.cut(corpora.draw(20, V, K).documents, dense_share=0.1)
    with self.assertRaisesRegex(ValueError, 'cells must have no dense words'):
      cvb0.cvb0(K, V).init(jax.random.key(0), dense)
