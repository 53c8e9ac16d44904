"""The bound against its formula and against exact evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import special

from emc2 import mesh as mesh_lib
from emc2.topics import lda
from emc2.topics.lda import esvi

from tests.topics.lda import corpora, oracle

ALPHA, ETA, K, V = 0.3, 0.05, 4, 41


def best_phi(documents, words, pairs):
  """The responsibilities that the bound takes, by NumPy."""
  ids, word_ids, counts, _ = pairs
  gamma, lambdas = documents + ALPHA, words + ETA
  totals = words.sum(0) + V * ETA
  scores = special.digamma(gamma)[ids] + special.digamma(lambdas)[word_ids]
  phi = special.softmax(scores - special.digamma(totals), 1)
  return ids, word_ids, counts, phi


class ElboTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.documents = corpora.draw(29, V, K, num_empty=1).documents

  def cells(self, num_shards, num_blocks):
    cells, _ = lda.cut(
      self.documents, num_shards=num_shards, num_blocks=num_blocks, tile=16
    )
    return cells._replace(
      counts=cells.counts.astype(np.float64),
      dense=cells.dense.astype(np.float64),
    )

  @parameterized.parameters(1, 3)
  @pytest.mark.slow
  def test_equals_its_formula(self, num_blocks):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      cells = self.cells(1, num_blocks)
      shape = (1, num_blocks, cells.counts[0, 0].size, K)
      phi = rng.dirichlet(np.ones(K), shape[:3])
      serial = oracle.Serial(cells, phi, V, ALPHA, ETA)
      got = lda.elbo(
        jnp.asarray(serial.documents[0]),
        jnp.asarray(serial.words),
        jax.tree.map(jnp.asarray, cells),
        num_words=V,
        alpha=ALPHA,
        eta=ETA,
      )
    documents = serial.documents.reshape(-1, K)
    words = serial.words.reshape(-1, K)
    pairs = best_phi(documents, words, serial.pairs())
    settings = dict(num_words=V, alpha=ALPHA, eta=ETA)
    want = oracle.elbo(documents, words, pairs, **settings)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    self.assertGreater(float(got), serial.elbo())

  def test_one_topic_is_exact_bayes(self):
    counts = corpora.to_dense(self.documents)
    with jax.enable_x64(True):
      cells, layout = lda.cut(self.documents, num_blocks=2)
      cells = cells._replace(counts=cells.counts.astype(np.float64))
      lengths = layout.document_ids[0]
      got = lda.elbo(
        jnp.asarray(counts.sum(1)[lengths][:, None]),
        jnp.asarray(layout.place_words(counts.sum(0)[:, None])),
        jax.tree.map(jnp.asarray, cells),
        num_words=V,
        alpha=ALPHA,
        eta=ETA,
      )
    gammaln = special.gammaln
    words = counts.sum(0)
    want = gammaln(V * ETA) - V * gammaln(ETA) + np.sum(gammaln(ETA + words))
    want -= gammaln(V * ETA + words.sum())
    np.testing.assert_allclose(got, want, rtol=1e-11)

  @pytest.mark.slow
  def test_a_ring_equals_one_device(self):
    with jax.enable_x64(True):
      cells = self.cells(4, 8)
      mesh = mesh_lib.make(jax.devices()[:4], ring=4)
      batch = mesh_lib.place(cells, mesh, lda.cells.specs())
      method = esvi.esvi(K, V, axis_name=mesh_lib.RING)
      method = lda.on_ring(method, mesh, esvi.shardings())
      state = jax.jit(method.init)(jax.random.key(0), batch)
      spec = jax.sharding.PartitionSpec
      settings = dict(num_words=V, alpha=ALPHA, eta=ETA)
      got = jax.jit(
        jax.shard_map(
          lambda *args: lda.elbo(*args, axis_name=mesh_lib.RING, **settings),
          mesh=mesh,
          in_specs=(spec(mesh_lib.RING),) * 2 + (lda.cells.specs(),),
          out_specs=spec(),
        )
      )(state.documents, state.words, batch)
      shifts = np.arange(4, dtype=np.int32)[:, None, None, None]
      alone = cells._replace(
        documents=cells.documents + shifts * cells.dense.shape[2]
      )
      merge = lambda x: np.moveaxis(x, 0, 1).reshape(1, 8, -1, x.shape[3])
      empty = np.zeros((1, 8, state.documents.shape[0], 0))
      alone = lda.Cells(*[merge(x) for x in alone[:3]], dense=empty)
      want = lda.elbo(
        *jax.device_put(jax.device_get(state[:2])),
        jax.tree.map(jnp.asarray, alone),
        **settings,
      )
    np.testing.assert_allclose(got, want, rtol=1e-12)
