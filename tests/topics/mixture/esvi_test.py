"""The exact identities of ESVI, in float64 where they are exact."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.topics import mixture
from emc2.topics.mixture import model as model_lib

from tests.topics.mixture import oracle, vi_test

NUM_ROWS = 90


def fit(
  num_rotations,
  *,
  num_components=8,
  num_blocks=4,
  num_rows=NUM_ROWS,
  dtype='float64',
  refresh_every=7,
  seed=0,
  **settings,
):
  """The states and the bounds of a run; call it in `enable_x64`."""
  x = oracle.points(0, num_rows, 2)[0]
  z = oracle.starts(1, num_rows, num_components)
  model = vi_test.make_model(num_components)
  method = mixture.esvi.esvi(
    model, num_blocks=num_blocks, refresh_every=refresh_every, **settings
  )
  inner_batch = settings.get('inner_batch')
  rows = mixture.esvi.split_rows(
    jnp.asarray(x, dtype), num_blocks, inner_batch=inner_batch
  )
  state = method.init(jax.random.key(seed), rows, z)
  bound = lambda state: mixture.esvi.elbo(model, state)

  @jax.jit
  def run(state, keys):
    def body(state, key):
      state, _ = method.step(key, state, rows)
      return state, bound(state)

    return jax.lax.scan(body, state, keys)

  keys = jax.random.split(jax.random.key(seed + 1), num_rotations)
  last, bounds = run(state, keys)
  return state, last, np.concatenate([[float(bound(state))], bounds])


class EsviTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(),
    dict(mixing='ring'),
    dict(num_blocks=1),
    dict(num_blocks=2, inner_batch=1),
    dict(inner_batch=7),
    dict(mixing='ring', inner_batch=23),
    dict(active_prob=0.5),
    dict(active_prob=0.2, inner_batch=7),
  )
  def test_monotone_and_invariant(self, **settings):
    with jax.enable_x64(True):
      _, state, bounds = fit(48, **settings)
      z = mixture.esvi.responsibilities(state, NUM_ROWS)
      self.assertEqual(z.shape, (NUM_ROWS, 8))
      self.assertGreaterEqual(np.diff(bounds).min(), -1e-12 * abs(bounds[-1]))
      self.assertGreater(bounds[-1], bounds[0] + 20)
      np.testing.assert_allclose(np.sum(z, axis=1), 1, atol=48e-12)
      # What was added to fill the places has no mass.
      self.assertAlmostEqual(
        float(jnp.sum(state.responsibilities)), NUM_ROWS, delta=1e-9
      )
      x = oracle.points(0, NUM_ROWS, 2)[0]
      stored = mixture.esvi.statistics(state)
      np.testing.assert_allclose(stored.count, np.sum(z, axis=0), rtol=1e-9)
      np.testing.assert_allclose(
        stored.moments, np.asarray(z).T @ np.c_[x, x**2], rtol=1e-9, atol=1e-9
      )
    np.testing.assert_array_equal(np.sort(state.ids), np.arange(8))
    want = oracle.diagonal_elbo(x, np.asarray(z))
    np.testing.assert_allclose(bounds[-1], want, rtol=1e-10)

  def test_one_block_is_vi(self):
    x, z = oracle.points(0, NUM_ROWS, 2)[0], oracle.starts(1, NUM_ROWS, 8)
    with jax.enable_x64(True):
      model = vi_test.make_model(8)
      esvi = mixture.esvi.esvi(model, num_blocks=1)
      vi = mixture.vi.vi(model)
      data = jnp.asarray(x)
      rows = mixture.esvi.split_rows(data, 1)
      ours = esvi.init(jax.random.key(0), rows, z)
      theirs = vi.init(jax.random.key(0), data, z)
      vi_step, esvi_step = jax.jit(vi.step), jax.jit(esvi.step)
      for _ in range(3):
        want = model_lib.responsibilities(model, theirs.statistics, data)
        theirs, _ = vi_step(jax.random.key(0), theirs, data)
        ours, _ = esvi_step(jax.random.key(0), ours, rows)
        found = mixture.esvi.responsibilities(ours, NUM_ROWS)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-14)
        # Each the same sums in its own order, so no nearer than rounding.
        theirs = theirs._replace(statistics=mixture.esvi.statistics(ours))

  def test_fixed_blocks_keep_their_mass_and_stall(self):
    with jax.enable_x64(True):
      start, ring, bounds = fit(160, mixing='ring', num_rows=300)
      _, _, permuted = fit(160, num_rows=300)
      x, z = oracle.points(0, 300, 2)[0], oracle.starts(1, 300, 8)
      method, data = mixture.vi.vi(vi_test.make_model(8)), jnp.asarray(x)
      state = method.init(jax.random.key(0), data, z)
      step = jax.jit(method.step)
      for _ in range(40):
        state, info = step(jax.random.key(0), state, data)
      vi = float(info.elbo)
    masses = lambda state: (
      np.asarray(state.responsibilities)[:, np.asarray(start.ids)]
      .reshape(4, 4, 2, -1)
      .sum(2)
    )
    np.testing.assert_allclose(masses(ring), masses(start), rtol=0, atol=1e-12)
    self.assertLess(bounds[-1], vi - 50)
    self.assertLess(bounds[-1], permuted[-1] - 50)
    # Near VI's: two of the many local optima.
    self.assertGreater(permuted[-1], vi - 0.03 * abs(vi))

  def test_inner_batches_are_fresh(self):
    """One chunk of all rows is as fresh as none; smaller ones are fresher."""
    with jax.enable_x64(True):
      _, plain, _ = fit(3, num_blocks=2)
      _, whole, _ = fit(3, num_blocks=2, inner_batch=NUM_ROWS // 2)
      _, _, by_nines = fit(3, num_blocks=2, inner_batch=9)
      _, _, bounds = fit(3, num_blocks=2)
    np.testing.assert_allclose(
      plain.responsibilities, whole.responsibilities, rtol=0, atol=1e-12
    )
    self.assertGreater(abs(by_nines[-1] - bounds[-1]), 0.1)

  def test_inner_batch_of_1_is_the_papers_loop(self):
    x, z = oracle.points(0, 12, 2)[0], oracle.starts(1, 12, 4)
    with jax.enable_x64(True):
      _, state, _ = fit(
        2, num_components=4, num_blocks=1, num_rows=12, inner_batch=1
      )
    for _ in range(2):
      for i in range(12):
        z[i] = oracle.softmax(oracle.diagonal_scores(x, z))[i]
    found = mixture.esvi.responsibilities(state, 12)
    np.testing.assert_allclose(found, z, rtol=1e-8, atol=1e-12)

  def test_idle_places_change_nothing(self):
    x = jnp.float32(oracle.points(0, 40, 2)[0])
    method = mixture.esvi.esvi(
      vi_test.make_model(8), num_blocks=4, active_prob=0.3
    )
    rows = mixture.esvi.split_rows(x, 4)
    state = method.init(jax.random.key(0), rows)
    step, idle = jax.jit(method.step), []
    for number in range(40):
      before = state
      state, info = step(jax.random.key(number), state, rows)
      idle.append(np.asarray(info.moved) == 0)
      for place in np.flatnonzero(idle[-1]):
        np.testing.assert_array_equal(
          state.responsibilities[place], before.responsibilities[place]
        )
    self.assertBetween(np.mean(idle), 0.6, 0.8)
    self.assertGreater(np.std(np.mean(idle, axis=1)), 0.1)

  def test_refreshed_statistics_lose_what_drifted(self):
    x = jnp.float32(oracle.points(0, 40, 2)[0])
    rows = mixture.esvi.split_rows(x, 2)
    errors = []
    for refresh_every in (3, 4):
      method = mixture.esvi.esvi(
        vi_test.make_model(4), num_blocks=2, refresh_every=refresh_every
      )
      state = method.init(jax.random.key(0), rows)
      state = state._replace(
        statistics=jax.tree.map(lambda x: x + 0.5, state.statistics)
      )
      step = jax.jit(method.step)
      for number in range(3):
        state, _ = step(jax.random.key(number), state, rows)
      z = mixture.esvi.responsibilities(state, 40)
      count = mixture.esvi.statistics(state).count
      errors.append(np.abs(count - np.sum(z, axis=0)).max())
    self.assertLess(errors[0], 1e-4)
    self.assertGreater(errors[1], 0.4)

  def test_chunks_of_rows_that_overlap(self):
    """More rows than are taken at a time, and no multiple of it."""
    num_rows = model_lib.rows_at_once(2) + 11
    x = jnp.float32(oracle.points(0, num_rows, 1)[0])
    model = vi_test.make_model(2, 1)
    method = mixture.esvi.esvi(model, num_blocks=1)
    rows = mixture.esvi.split_rows(x, 1)
    state = method.init(jax.random.key(0), rows)
    want = model_lib.responsibilities(model, mixture.esvi.statistics(state), x)
    state, _ = jax.jit(method.step)(jax.random.key(0), state, rows)
    found = mixture.esvi.responsibilities(state, num_rows)
    np.testing.assert_allclose(found, want, atol=1e-5)
    count = mixture.esvi.statistics(state).count
    np.testing.assert_allclose(count, np.sum(found, axis=0), rtol=1e-3)

  def test_compiles_once_donates_and_starts_abstractly(self):
    x = jnp.float32(oracle.points(0, 40, 2)[0])
    method = mixture.esvi.esvi(vi_test.make_model(8), num_blocks=4)
    rows = mixture.esvi.split_rows(x, 4)
    types = lambda tree: jax.tree.map(
      lambda x: (x.shape, x.dtype, x.weak_type), tree
    )
    abstract = jax.eval_shape(method.init, jax.random.key(0), rows)
    state = method.init(jax.random.key(0), rows)
    self.assertEqual(types(abstract), types(state))
    step = jax.jit(method.step, donate_argnums=1)
    for number in range(3):
      before = state
      state, _ = step(jax.random.key(number), state, rows)
      self.assertTrue(before.responsibilities.is_deleted())
    self.assertEqual(step._cache_size(), 1)
    self.assertEqual(types(abstract), types(state))

  @parameterized.named_parameters(
    ('components', dict(model=vi_test.make_model(1)), 'num_components'),
    ('blocks', dict(num_blocks=0), 'num_blocks'),
    ('divide', dict(num_blocks=3), 'num_blocks'),
    ('single', dict(num_blocks=8), 'num_blocks'),
    ('mixing', dict(mixing='shuffle'), 'mixing'),
    ('inner_batch', dict(inner_batch=0), 'inner_batch'),
    ('refresh', dict(refresh_every=0), 'refresh_every'),
    ('active', dict(active_prob=0.0), 'active_prob'),
    ('nan', dict(active_prob=float('nan')), 'active_prob'),
  )
  def test_refuses(self, given, match):
    settings = dict(model=vi_test.make_model(8), num_blocks=4)
    with self.assertRaisesRegex(ValueError, f'^{match} must'):
      mixture.esvi.esvi(**(settings | given))

  def test_refuses_bad_rows_and_starts(self):
    method = mixture.esvi.esvi(
      vi_test.make_model(8), num_blocks=4, inner_batch=2
    )
    x, key = jnp.zeros((10, 2)), jax.random.key(0)
    rows = mixture.esvi.split_rows(x, 4, inner_batch=2)
    for z, match in (
      (np.full((10, 8), 1 / 8), 'apart'),
      (np.zeros((10, 8)), 'simplex'),
      (np.eye(8), 'a row for each of 10'),
    ):
      with self.assertRaisesRegex(ValueError, match):
        method.init(key, rows, z)
    state = method.init(key, rows)
    for bad, match in (
      (mixture.esvi.split_rows(x, 2), 'rows must lie in 4 places'),
      (mixture.esvi.split_rows(x, 4), 'multiple of inner_batch=2'),
    ):
      with self.assertRaisesRegex(ValueError, match):
        method.step(key, state, bad)
