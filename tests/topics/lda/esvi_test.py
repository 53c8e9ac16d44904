"""ESVI against loops over all responsibilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2.topics import lda
from emc2.topics.lda import esvi, vi

from tests import processes
from tests.topics.lda import corpora, oracle

K, V = 6, 90
ALPHA, ETA = 0.1, 0.02
PRIORS = dict(alpha=ALPHA, eta=ETA)


@functools.cache
def corpus():
  return corpora.draw(70, V, K, length=60, num_empty=2).documents


def cut(num_shards=1, num_blocks=1, tile=32, **settings):
  """Cells of float64 for a ring of devices, and their layout."""
  cells, layout = lda.cut(
    corpus(),
    num_shards=num_shards,
    num_blocks=num_blocks,
    tile=tile,
    **settings,
  )
  cells = cells._replace(
    counts=cells.counts.astype(np.float64),
    dense=cells.dense.astype(np.float64),
  )
  return cells, layout


@functools.cache
def make(num_shards=1, **settings):
  """The method, jitted, and the mesh it runs on."""
  settings = dict(PRIORS, storage='phi') | settings
  storage = settings['storage']
  if num_shards == 1:
    return jax.tree.map(jax.jit, esvi.esvi(K, V, **settings)), None
  mesh = mesh_lib.make(jax.devices()[:num_shards], ring=num_shards)
  method = esvi.esvi(K, V, axis_name=mesh_lib.RING, **settings)
  method = lda.on_ring(method, mesh, esvi.shardings(storage))
  return jax.tree.map(jax.jit, method), mesh


def place(cells, mesh):
  if mesh is None:
    return jax.tree.map(jnp.asarray, cells)
  return mesh_lib.place(cells, mesh, lda.cells.specs())


def serial(cells, state):
  """The oracle at a state that remembers responsibilities."""
  shape = (*cells.counts.shape[:2], -1, K)
  phi = np.asarray(state.memory.phi).reshape(shape)
  return oracle.Serial(cells, phi, V, ALPHA, ETA)


def run(num_passes, cells, settings, num_shards=1, key=0):
  """States after each pass, from the first, on the host."""
  method, mesh = make(num_shards, **settings)
  batch = place(cells, mesh)
  state = method.init(jax.random.key(key), batch)
  states = [jax.device_get(state)]
  for t in range(num_passes):
    step_key = jax.random.fold_in(jax.random.key(key + 1), t)
    state, info = method.step(step_key, state, batch)
    states.append(jax.device_get(state))
  return states, (jax.device_get(info) if num_passes else None)


class OracleTest(parameterized.TestCase):
  def test_equals_the_serial_loop(self):
    self._check_equals_the_serial_loop(4, 4)

  @parameterized.named_parameters(('blocks', 1, 5), ('long', 4, 12))
  @pytest.mark.slow
  def test_equals_the_serial_loop_elsewhere(self, num_shards, num_blocks):
    self._check_equals_the_serial_loop(num_shards, num_blocks)

  def _check_equals_the_serial_loop(self, num_shards, num_blocks):
    with jax.enable_x64(True):
      cells, _ = cut(num_shards, num_blocks)
      states, _ = run(5, cells, {}, num_shards)
      want = serial(cells, states[0])
      for state in states[1:]:
        want.esvi_pass()
        got = state.documents.reshape(want.documents.shape)
        np.testing.assert_allclose(got, want.documents, atol=1e-11)
        np.testing.assert_allclose(state.words, want.words, atol=1e-11)

  @parameterized.parameters((1, 5), (4, 4))
  @pytest.mark.slow
  def test_sums_of_cells_remember_as_much(self, num_shards, num_blocks):
    with jax.enable_x64(True):
      cells, _ = cut(num_shards, num_blocks)
      phi = run(4, cells, {}, num_shards)[0]
      cell = run(4, cells, dict(storage='cell'), num_shards)[0]
      for one, other in zip(phi, cell, strict=True):
        np.testing.assert_allclose(one.documents, other.documents, atol=1e-11)
        np.testing.assert_allclose(one.words, other.words, atol=1e-11)

  @pytest.mark.slow
  def test_dense_words_change_nothing(self):
    plain, layout = lda.cut(corpus(), num_blocks=3)
    dense, _ = lda.cut(corpus(), num_blocks=3, dense_share=0.3)
    self.assertGreater(dense.dense.shape[-1], 0)
    self.assertLess(np.sum(dense.counts), np.sum(plain.counts))
    with jax.enable_x64(False):
      settings = dict(storage='cell')
      first = run(0, plain, settings)[0][0]
      steps = []
      for cells in (plain, dense):
        method, _ = make(**settings)
        state = first
        for t in range(3):
          state, info = method.step(jax.random.key(t), state, cells)
        steps.append((state, info))
    for name in ('documents', 'words'):
      one, other = (getattr(state, name) for state, _ in steps)
      np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(steps[0][1].loss, steps[1][1].loss, rtol=1e-6)
    self.assertEqual(layout.num_words, V)

  @pytest.mark.slow
  def test_one_block_is_batch_vi(self):
    with jax.enable_x64(True):
      cells, _ = cut()
      states, _ = run(3, cells, {})
      want = vi.State(states[0].documents, states[0].words, np.int32(0))
      batch = place(cells, None)
      for state in states[1:]:
        method = vi.vi(K, V, **PRIORS)
        want, _ = jax.jit(method.step)(jax.random.key(0), want, batch)
        np.testing.assert_allclose(state.documents, want.documents, atol=1e-12)
        np.testing.assert_allclose(state.words, want.words, atol=1e-12)

  @pytest.mark.slow
  def test_loss_is_of_the_tokens_as_visited(self):
    with jax.enable_x64(True):
      cells, _ = cut()
      states, info = run(1, cells, {})
      want = serial(cells, states[0])
      ids, word_ids, counts, _ = want.pairs()
      documents, words = map(jnp.asarray, states[0][:2])
      weights = lda.expectations.document_weights(documents, ALPHA)
      others = lda.expectations.word_weights(
        words.reshape(-1, K), jnp.sum(words, (0, 1)), ETA, V
      )
      others = others.scaled * jnp.exp(others.logs)[:, None]
      weights, others = np.asarray(weights)[ids], np.asarray(others)[word_ids]
      scores = np.sum(weights * others, 1)
      loss = -np.sum(counts * np.log(scores)) / counts.sum()
      np.testing.assert_allclose(info.loss, loss, rtol=1e-12)


class BoundTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('ring', 4, 4, {}), ('stragglers', 4, 4, dict(active_prob=0.2))
  )
  def test_never_falls(self, num_shards, num_blocks, settings):
    self._check_never_falls(num_shards, num_blocks, settings)

  @parameterized.named_parameters(
    ('blocks', 1, 5, {}), ('stragglers_alone', 1, 5, dict(active_prob=0.5))
  )
  @pytest.mark.slow
  def test_never_falls_elsewhere(self, num_shards, num_blocks, settings):
    self._check_never_falls(num_shards, num_blocks, settings)

  def _check_never_falls(self, num_shards, num_blocks, settings):
    with jax.enable_x64(True):
      cells, _ = cut(num_shards, num_blocks)
      states, _ = run(12, cells, settings, num_shards)
      bounds = [serial(cells, state).elbo() for state in states]
    least = -1e-12 * abs(bounds[0])
    self.assertGreaterEqual(np.min(np.diff(bounds)), least)
    self.assertGreater(bounds[-1], bounds[0] + 100)

  def test_stale_totals_come_near(self):
    with jax.enable_x64(True):
      cells, _ = cut(4, 4)
      exact = run(30, cells, {}, 4)[0][-1]
      stale = run(30, cells, dict(pi_sync='epoch'), 4)[0][-1]
      exact, stale = (serial(cells, state) for state in (exact, stale))
      self.assertGreater(np.max(np.abs(exact.words - stale.words)), 1e-6)
      gap = abs(exact.elbo() - stale.elbo())
      self.assertLess(gap, 0.02 * abs(exact.elbo()))

  @pytest.mark.slow
  def test_more_blocks_learn_faster(self):
    bounds = []
    with jax.enable_x64(True):
      for num_blocks in (1, 4, 15):
        cells, _ = cut(1, num_blocks)
        state = run(6, cells, {}, key=3)[0][-1]
        bounds.append(serial(cells, state).elbo())
    self.assertLess(bounds[0], bounds[1])
    self.assertLess(bounds[0], bounds[2])


class InvariantTest(parameterized.TestCase):
  @parameterized.parameters('cell', 'phi', 'topk')
  @pytest.mark.slow
  def test_tokens_are_kept(self, storage):
    with jax.enable_x64(True):
      cells, layout = cut(4, 4)
      state = run(6, cells, dict(storage=storage), 4)[0][-1]
    lengths = np.asarray(corpora.to_dense(corpus()).sum(1))
    got = layout.sort_documents(state.documents.sum(1))
    np.testing.assert_allclose(got, lengths, atol=1e-8)
    counts = corpora.to_dense(corpus()).sum(0)
    got = layout.sort_words(state.words.sum(-1))
    np.testing.assert_allclose(got, counts, atol=1e-8)
    np.testing.assert_allclose(state.totals, state.words.sum((0, 1)), rtol=1e-9)

  @pytest.mark.slow
  def test_many_topics_lose_no_token_in_float32(self):
    # The weights of a rare word in 512 topics underflow unless scaled.
    cells, _ = cut(1, 2)
    method = esvi.esvi(512, V, storage='phi', concentration=100.0)
    state = method.init(jax.random.key(0), cells)
    for number in range(3):
      state, _ = method.step(jax.random.key(number), state, cells)
    tokens = float(corpora.to_dense(corpus()).sum())
    np.testing.assert_allclose(float(state.words.sum()), tokens, rtol=1e-4)

  @parameterized.parameters('cell', 'topk')
  @pytest.mark.slow
  def test_refreshing_mends_drift(self, storage):
    with jax.enable_x64(True):
      cells, _ = cut(4, 4)
      kept = run(2, cells, dict(storage=storage, refresh_every=0), 4)[0][-1]
      method, mesh = make(4, storage=storage, refresh_every=1)
      spoilt = kept._replace(totals=kept.totals + 3.0)
      specs = esvi.shardings(storage)
      spoilt = mesh_lib.place(spoilt, mesh, specs)
      batch = place(cells, mesh)
      state, _ = method.step(jax.random.key(0), spoilt, batch)
      total = np.asarray(state.words).sum((0, 1))
      np.testing.assert_allclose(state.totals, total, rtol=1e-12)
      method, _ = make(4, storage=storage, refresh_every=0)
      state, _ = method.step(jax.random.key(0), spoilt, batch)
      total = np.asarray(state.words).sum((0, 1))
      self.assertGreater(np.min(np.asarray(state.totals) - total), 2.9)

  def test_equal_responsibilities_stay_equal(self):
    with jax.enable_x64(True):
      cells, _ = cut(1, 3)
      method, _ = make()
      first = run(0, cells, {})[0][0]
      phi = np.full_like(first.memory.phi, 1 / K)
      want = serial(cells, first._replace(memory=esvi.PhiMemory(phi)))
      state = esvi.State(
        want.documents[0],
        want.words,
        want.words.sum((0, 1)),
        esvi.PhiMemory(phi),
        np.int32(0),
      )
      for t in range(3):
        state, _ = method.step(jax.random.key(t), state, place(cells, None))
      np.testing.assert_allclose(state.memory.phi, 1 / K, atol=1e-15)

  def test_draws_lie_on_the_simplex(self):
    self._check_draws_lie_on_the_simplex(0.5)

  @parameterized.parameters(0.0, 1.0)
  @pytest.mark.slow
  def test_draws_lie_on_the_simplex_elsewhere(self, concentration):
    self._check_draws_lie_on_the_simplex(concentration)

  def _check_draws_lie_on_the_simplex(self, concentration):
    with jax.enable_x64(True):
      cells, _ = cut()
      state = run(0, cells, dict(concentration=concentration))[0][0]
    phi = state.memory.phi.reshape(-1, K)
    np.testing.assert_allclose(phi.sum(-1), 1, atol=1e-12)
    # The variance of an entry tells the parameter.
    want = (1 / K) * (1 - 1 / K) / (K * concentration + 1)
    np.testing.assert_allclose(np.var(phi), want, rtol=0.1)

  def test_order_of_documents_does_not_matter(self):
    dense = corpora.to_dense(corpus())
    order = np.random.default_rng(0).permutation(len(dense))
    sums = []
    with jax.enable_x64(True):
      for rows in (np.arange(len(dense)), order):
        documents = corpora.from_dense(dense[rows])
        cells, layout = lda.cut(documents, num_blocks=3, tile=32)
        cells = cells._replace(
          counts=cells.counts.astype(np.float64),
          dense=cells.dense.astype(np.float64),
        )
        state = start_by_word(cells, layout)
        method, _ = make(storage='cell')
        for t in range(3):
          state, _ = method.step(jax.random.key(t), state, cells)
        sums.append(layout.sort_words(state.words))
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-9)


def start_by_word(cells, layout):
  """A state whose responsibilities depend on the word alone."""
  num_blocks = cells.counts.shape[1]
  words = cells.words[0].reshape(num_blocks, -1)
  words = np.take_along_axis(layout.word_ids, words, 1)
  phi = 1.1 + np.sin((1.0 + words[..., None]) * np.arange(1, K + 1))
  phi /= phi.sum(-1, keepdims=True)
  want = oracle.Serial(cells, phi[None], V, ALPHA, ETA)
  by_document = np.zeros((num_blocks, *want.documents[0].shape))
  for block in range(num_blocks):
    tokens = want.counts[0, block][:, None] * want.phi[0, block]
    np.add.at(by_document[block], want.ids[0, block], tokens)
  return esvi.State(
    want.documents[0],
    want.words,
    want.words.sum((0, 1)),
    esvi.CellMemory(by_document, want.words[None]),
    np.int32(0),
  )


class TopkTest(parameterized.TestCase):
  @parameterized.parameters('mean', 'meanfield')
  @pytest.mark.slow
  def test_all_topics_are_esvi(self, tail):
    with jax.enable_x64(True):
      cells, _ = cut(1, 3)
      full = run(4, cells, {})[0][-1]
      settings = dict(storage='topk', top_c=K, tail=tail)
      every = run(4, cells, settings)[0][-1]
    np.testing.assert_allclose(full.words, every.words, atol=1e-10)

  @parameterized.parameters('mean', 'meanfield')
  @pytest.mark.slow
  def test_remembers_the_largest(self, tail):
    """A pass with C = 2 sets what NumPy sets."""
    with jax.enable_x64(True):
      cells, _ = cut()
      first = run(0, cells, {})[0][0]
      settings = dict(storage='topk', top_c=2, tail=tail)
      memory = run(0, cells, settings)[0][0].memory
      method, _ = make(**settings)
      state = first._replace(memory=memory)
      state, _ = method.step(jax.random.key(0), state, place(cells, None))
      got = jax.device_get(state.memory)
      full, _ = make()
      full, _ = full.step(jax.random.key(0), first, place(cells, None))
      phi = np.asarray(full.memory.phi).reshape(-1, K)
    topics = np.argsort(-phi, 1)[:, :2]
    np.testing.assert_array_equal(got.topics.reshape(-1, 2), topics)
    want = np.take_along_axis(phi, topics, 1)
    if tail == 'meanfield':
      logs = np.log(phi)
      np.put_along_axis(logs, topics, 0, 1)
      rest = (K - 2) * np.exp(logs.sum(1, keepdims=True) / (K - 2))
      want /= want.sum(1, keepdims=True) + rest
    np.testing.assert_allclose(got.phi.reshape(-1, 2), want, rtol=1e-9)

  @pytest.mark.slow
  def test_few_topics_come_near_and_one_does_not(self):
    bounds = {}
    with jax.enable_x64(True):
      documents = corpora.draw(300, 200, 10, length=80).documents
      cells, _ = lda.cut(documents, num_blocks=4)
      counts = cells.counts.astype(np.float64)
      batch = cells._replace(
        counts=counts, dense=cells.dense.astype(np.float64)
      )
      for top_c in (16, 4, 1):
        method = esvi.esvi(16, 200, storage='topk', top_c=top_c, eta=0.05)
        step = jax.jit(method.step)
        state = jax.jit(method.init)(jax.random.key(0), batch)
        for t in range(30):
          state, _ = step(jax.random.key(t), state, batch)
        bounds[top_c] = float(
          lda.elbo(
            state.documents,
            state.words,
            batch,
            num_words=200,
            alpha=0.1,
            eta=0.05,
          )
        )
    self.assertLess(abs(bounds[4] - bounds[16]), 0.02 * abs(bounds[16]))
    self.assertLess(bounds[1], bounds[4] - 0.02 * abs(bounds[16]))


class RingTest(parameterized.TestCase):
  def collectives(self, num_blocks, **settings):
    cells, _ = lda.cut(corpus(), num_shards=4, num_blocks=num_blocks, tile=32)
    method, mesh = make(4, refresh_every=0, **settings)
    batch = place(cells, mesh)
    state = jax.eval_shape(method.init, jax.random.key(0), batch)
    state = jax.tree.map(
      lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
      ),
      state,
      esvi.shardings(settings['storage']),
    )
    text = method.step.lower(jax.random.key(0), state, batch).as_text()
    names = ('collective_permute', 'all_reduce', 'all_gather', 'all_to_all')
    return {name: text.count(f'"stablehlo.{name}"') for name in names}

  def test_exchanges(self):
    self._check_exchanges('phi')

  @parameterized.parameters('cell', 'topk')
  @pytest.mark.slow
  def test_exchanges_elsewhere(self, storage):
    self._check_exchanges(storage)

  def _check_exchanges(self, storage):
    """A block and K floats a visit; at the end, a loss."""
    want = dict(collective_permute=1, all_reduce=2, all_gather=0, all_to_all=0)
    self.assertEqual(self.collectives(4, storage=storage), want)
    # The last block of a pass has nothing to travel beside.
    want['collective_permute'] = 2
    self.assertEqual(self.collectives(8, storage=storage), want)

  def test_exchanges_of_stale_totals(self):
    """In the loop only the block."""
    found = self.collectives(4, storage='phi', pi_sync='epoch')
    self.assertEqual(found['collective_permute'], 1)
    self.assertEqual(found['all_reduce'], 2)

  def test_holds_its_share(self):
    self._check_holds_its_share('phi', 8)

  @parameterized.parameters(('cell', 4), ('topk', 4))
  @pytest.mark.slow
  def test_holds_its_share_elsewhere(self, storage, num_blocks):
    self._check_holds_its_share(storage, num_blocks)

  def _check_holds_its_share(self, storage, num_blocks):
    cells, _ = lda.cut(corpus(), num_shards=4, num_blocks=num_blocks, tile=32)
    method, mesh = make(4, storage=storage)
    state = method.init(jax.random.key(0), place(cells, mesh))
    share = lambda x: x.addressable_shards[0].data.nbytes / x.nbytes
    self.assertEqual(share(state.documents), 1 / 4)
    self.assertEqual(share(state.words), 1 / 4)
    self.assertEqual(share(state.totals), 1)
    for leaf in jax.tree.leaves(state.memory):
      self.assertEqual(share(leaf), 1 / 4)

  @pytest.mark.slow
  def test_two_processes_equal_one(self):
    processes.run('tests.topics.lda.travels', 2)


class ContractTest(parameterized.TestCase):
  def test_compiles_once_and_donates(self):
    self._check_compiles_once_and_donates('phi')

  @parameterized.parameters('cell', 'topk')
  @pytest.mark.slow
  def test_compiles_once_and_donates_elsewhere(self, storage):
    self._check_compiles_once_and_donates(storage)

  def _check_compiles_once_and_donates(self, storage):
    cells, _ = lda.cut(corpus(), num_blocks=3)
    method = esvi.esvi(K, V, storage=storage)
    step = jax.jit(method.step, donate_argnums=1)
    state = jax.jit(method.init)(jax.random.key(0), cells)
    abstract = jax.eval_shape(method.init, jax.random.key(0), cells)
    self.assertEqual(
      jax.tree.map(jnp.shape, state), jax.tree.map(jnp.shape, abstract)
    )
    for t in range(3):
      state, info = step(jax.random.key(t), state, cells)
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(int(state.count), 3)
    self.assertTrue(np.isfinite(info.loss))

  @parameterized.named_parameters(
    ('topics', dict(num_topics=1), 'num_topics must be at least 2, got 1'),
    ('words', dict(num_words=0), 'num_words must be at least 1, got 0'),
    ('alpha', dict(alpha=0.0), 'alpha must be finite and above 0, got 0.0'),
    ('eta', dict(eta=float('nan')), 'eta must be finite and above 0, got nan'),
    ('storage', dict(storage='all'), "storage must be one of .* got 'all'"),
    ('tail', dict(tail='no'), "tail must be one of .* got 'no'"),
    ('pi_sync', dict(pi_sync='no'), "pi_sync must be one of .* got 'no'"),
    ('active', dict(active_prob=0.0), r'active_prob must lie in \(0, 1\]'),
    ('draws', dict(concentration=-1.0), 'concentration must be at least 0'),
    ('refresh', dict(refresh_every=-1), 'refresh_every must be at least 0'),
    ('top_c', dict(storage='topk', top_c=7), r'top_c must lie in \[1, 6\]'),
    ('no_top_c', dict(storage='topk', top_c=0), r'top_c must lie in \[1, 6\]'),
    ('not_topk', dict(top_c=2), "top_c goes with storage='topk'"),
  )
  def test_refuses(self, settings, message):
    settings = dict(num_topics=K, num_words=V) | settings
    with self.assertRaisesRegex(ValueError, message):
      esvi.esvi(**settings)

  def test_refuses_cells_of_many_shards(self):
    cells, _ = lda.cut(corpus(), num_shards=2, num_blocks=2)
    method = esvi.esvi(K, V)
    with self.assertRaisesRegex(ValueError, 'one shard on one device, got 2'):
      method.init(jax.random.key(0), cells)

  def test_refuses_dense_words_where_pairs_are_remembered(self):
    cells, _ = lda.cut(corpus(), dense_share=0.2)
    method = esvi.esvi(K, V, storage='phi')
    with self.assertRaisesRegex(ValueError, 'cells must have no dense words'):
      method.init(jax.random.key(0), cells)
