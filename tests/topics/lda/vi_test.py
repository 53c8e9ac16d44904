"""Batch VI against a loop over all responsibilities."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.topics import lda
from emc2.topics.lda import vi

from tests.topics.lda import corpora, oracle

K, V = 5, 60
PRIORS = dict(alpha=0.2, eta=0.05)


def cut(num_shards=1, num_blocks=1):
  documents = corpora.draw(45, V, K, num_empty=1).documents
  cells, _ = lda.cut(
    documents, num_shards=num_shards, num_blocks=num_blocks, tile=32
  )
  return cells._replace(
    counts=cells.counts.astype(np.float64),
    dense=cells.dense.astype(np.float64),
  )


def bounds_of(cells, states):
  bound = jax.jit(functools.partial(lda.elbo, num_words=V, **PRIORS))
  return [float(bound(state.documents, state.words, cells)) for state in states]


class ViTest(parameterized.TestCase):
  @parameterized.parameters(1, 3)
  def test_a_step(self, document_steps):
    with jax.enable_x64(True):
      cells = cut()
      method = vi.vi(K, V, document_steps=document_steps, **PRIORS)
      state = method.init(jax.random.key(0), cells)
      phi = np.full((1, 1, cells.counts.size, K), 1 / K)
      want = oracle.Serial(cells, phi, V, PRIORS['alpha'], PRIORS['eta'])
      want.documents[0], want.words = map(np.array, state[:2])
      words = want.words.copy()
      for _ in range(document_steps):
        want.words = words.copy()
        want.esvi_pass()
        again = oracle.Serial(cells, want.phi, V, want.alpha, want.eta)
        want.documents = again.documents
      state, info = jax.jit(method.step)(jax.random.key(1), state, cells)
    np.testing.assert_allclose(state.documents, again.documents[0], atol=1e-10)
    np.testing.assert_allclose(state.words, again.words, atol=1e-10)
    self.assertTrue(np.isfinite(info.loss))

  def test_bound_never_falls(self):
    with jax.enable_x64(True):
      cells = cut(1, 3)
      method = vi.vi(K, V, **PRIORS)
      step = jax.jit(method.step)
      states = [jax.jit(method.init)(jax.random.key(0), cells)]
      for t in range(15):
        states.append(step(jax.random.key(t), states[-1], cells)[0])
      bounds = bounds_of(cells, states)
    self.assertGreaterEqual(np.min(np.diff(bounds)), -1e-12 * abs(bounds[0]))
    self.assertGreater(bounds[-1], bounds[0] + 100)

  @pytest.mark.slow
  def test_blocks_and_devices_do_not_matter(self):
    with jax.enable_x64(True):
      cells = cut(4, 4)
      mesh = mesh_lib.make(jax.devices()[:4], ring=4)
      batch = mesh_lib.place(cells, mesh, lda.cells.specs())
      method = vi.vi(K, V, axis_name=mesh_lib.RING, **PRIORS)
      method = lda.on_ring(method, mesh, vi.shardings())
      state = jax.jit(method.init)(jax.random.key(0), batch)
      first = jax.device_get(state)
      step = jax.jit(method.step)
      text = step.lower(jax.random.key(0), state, batch).as_text()
      self.assertEqual(text.count('"stablehlo.all_reduce"'), 2)
      self.assertEqual(text.count('"stablehlo.collective_permute"'), 0)
      for t in range(3):
        state, info = step(jax.random.key(t), state, batch)

      shifts = np.arange(4, dtype=np.int32)[:, None, None, None]
      documents = cells.documents + shifts * cells.dense.shape[2]
      merge = lambda x: np.moveaxis(x, 0, 1).reshape(1, 4, -1, 32)
      alone = lda.Cells(
        merge(documents),
        merge(cells.words),
        merge(cells.counts),
        np.zeros((1, 4, len(first.documents), 0)),
      )
      method = vi.vi(K, V, **PRIORS)
      want, step = first, jax.jit(method.step)
      for t in range(3):
        want, want_info = step(jax.random.key(t), want, alone)
    np.testing.assert_allclose(state.documents, want.documents, atol=1e-10)
    np.testing.assert_allclose(state.words, want.words, atol=1e-10)
    np.testing.assert_allclose(info.loss, want_info.loss, rtol=1e-12)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'document_steps must be at least'):
      vi.vi(K, V, document_steps=0)
    with self.assertRaisesRegex(ValueError, 'num_topics must be at least 2'):
      vi.vi(1, V)
