"""Row-sparse gradients before optimisers, dense and row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import indexed_slices, transforms
from emc2 import mesh as mesh_lib

P = jax.P
SHAPE = (7, 3)
OPTIMIZERS = {
  'sgd': functools.partial(optax.sgd, 0.1),
  'momentum': functools.partial(optax.sgd, 0.1, momentum=0.9),
  'adam': functools.partial(optax.adam, 0.1),
}


def _grads(steps=5, among=(1, 4, 5), shape=SHAPE):
  """Slices with rows of one number, and the same by loops."""
  rng = np.random.default_rng(0)
  for _ in range(steps):
    indices = rng.choice(among, 6)
    values = rng.normal(size=(6, *shape[1:])).astype(np.float32)
    dense = np.zeros(shape, np.float32)
    for value, index in zip(values, indices, strict=True):
      dense[index] += value
    yield indexed_slices.make(values, indices, shape), jnp.asarray(dense)


def _params(shape=SHAPE):
  rng = np.random.default_rng(1)
  return {
    'table': jnp.asarray(rng.normal(size=shape), jnp.float32),
    'bias': jnp.ones(4),
  }


def _train(tx, sparse, among=(1, 4, 5)):
  params = _params()
  state = tx.init(params)

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return transforms.apply_updates(params, updates), state

  for rows, dense in _grads(among=among):
    grads = {'table': rows if sparse else dense, 'bias': jnp.ones(4)}
    params, state = step(params, state, grads)
  return params, state


class DensifyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # Optax mixes dtypes.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def test_is_the_optimizer_on_dense_gradients(self):
    self._check_optimizer('adam')

  @parameterized.parameters('sgd', 'momentum')
  @pytest.mark.slow
  def test_is_other_optimizers_on_dense_gradients(self, name):
    self._check_optimizer(name)

  def _check_optimizer(self, name):
    tx = OPTIMIZERS[name]()
    got = _train(optax.chain(transforms.densify(), tx), sparse=True)
    want = _train(optax.chain(optax.identity(), tx), sparse=False)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      got,
      want,
    )

  @parameterized.parameters(False, True)
  def test_means_over_workers(self, keep_rows):
    self._check_means(keep_rows, 'auto')

  @parameterized.product(keep_rows=(False, True), strategy=('gather', 'dense'))
  @pytest.mark.slow
  def test_means_over_workers_elsewhere(self, keep_rows, strategy):
    self._check_means(keep_rows, strategy)

  def _check_means(self, keep_rows, strategy):
    """24 rows of 200: the model gathers."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(24, 3)).astype(np.float32)
    slices = indexed_slices.make(values, rng.integers(0, 9, 24), (200, 3))
    tx = transforms.densify(
      axis_name='data', keep_rows=keep_rows, strategy=strategy
    )

    def update(slices, weight):
      updates = {'table': slices, 'weight': weight}
      return tx.update(updates, tx.init(None))[0]

    got = jax.jit(
      jax.shard_map(
        update, mesh=mesh_lib.make(), in_specs=P('data'), out_specs=P()
      )
    )(slices, jnp.arange(8.0))
    table = got['table']
    keeps = keep_rows and strategy != 'dense'
    self.assertEqual(indexed_slices.is_slices(table), keeps)
    if keeps:
      np.testing.assert_array_equal(
        table.indices[:9], np.unique(slices.indices)
      )
      table = indexed_slices.to_dense(table)
    want = np.zeros((200, 3))
    np.add.at(want, np.asarray(slices.indices), values / 8)
    np.testing.assert_allclose(table, want, atol=1e-6)
    np.testing.assert_array_equal(got['weight'], [3.5])

  def test_objective(self):
    """70 rows on each of 8 workers, of 400: fewer bytes, but more memory."""
    rows = indexed_slices.IndexedSlices(
      jax.ShapeDtypeStruct((560, 64), jnp.float32),
      jax.ShapeDtypeStruct((560,), jnp.int32),
      (400, 64),
    )
    kept = []
    for objective in ('bytes', 'memory'):
      tx = transforms.densify(
        axis_name='data', objective=objective, keep_rows=True
      )
      update = jax.shard_map(
        lambda x, tx=tx: tx.update(x, optax.EmptyState())[0],
        mesh=mesh_lib.make(),
        in_specs=P('data'),
        out_specs=P(),
      )
      kept.append(indexed_slices.is_slices(jax.eval_shape(update, rows)))
    self.assertEqual(kept, [True, False])

  def test_wire_dtype(self):
    rows = indexed_slices.make(
      jnp.full((8, 1), 1.001), jnp.zeros(8, jnp.int32), (40, 1)
    )
    tx = transforms.densify(axis_name='data', wire_dtype=jnp.bfloat16)
    got = jax.jit(
      jax.shard_map(
        lambda x: tx.update(x, optax.EmptyState())[0],
        mesh=mesh_lib.make(),
        in_specs=P('data'),
        out_specs=P(),
      )
    )(rows)
    self.assertEqual((got.dtype, float(got[0, 0])), (jnp.float32, 1.0))

  @pytest.mark.slow
  def test_a_large_table_is_not_made_dense(self):
    rows = indexed_slices.make(
      jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), (100, 3)
    )
    tx = transforms.densify(max_dense_bytes=1199)
    with self.assertRaisesRegex(ValueError, r"\['a'\] .*=1199 .* got 1200"):
      tx.update({'a': rows}, tx.init(None))
    tx = transforms.densify(max_dense_bytes=1199, keep_rows=True)
    tx.update({'a': rows}, tx.init(None))

  @parameterized.parameters(
    (dict(strategy='tf'), "strategy must be one of .* got 'tf'"),
    (dict(objective='time'), "objective must be one of .* got 'time'"),
    (dict(wire_dtype=jnp.int8), 'wire_dtype must be a float dtype'),
  )
  def test_refuses(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      transforms.densify(**options)


class RowWiseTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def test_is_dense_where_all_rows_come(self):
    self._check_dense('adam')

  @parameterized.parameters('sgd', 'momentum')
  @pytest.mark.slow
  def test_others_are_dense_where_all_rows_come(self, name):
    self._check_dense(name)

  def _check_dense(self, name):
    """Among 3 rows, 6 draws of 5 steps leave none out."""
    make = OPTIMIZERS[name]
    rows = next(_grads(1))[0].indices
    self.assertLen(np.unique(rows), 3)
    lazy, _ = _train(transforms.row_wise(make()), sparse=True)
    dense, _ = _train(make(), sparse=False)
    # Of the others nothing moves in either.
    np.testing.assert_array_equal(lazy['bias'], dense['bias'])
    absent = [0, 2, 3, 6]
    np.testing.assert_array_equal(
      lazy['table'][jnp.array(absent)], _params()['table'][jnp.array(absent)]
    )

  def test_lazy_adam(self):
    """A loop over rows: those without a gradient keep moments and place."""
    lazy, (state, _) = _train(
      transforms.row_wise(optax.adam(0.1)), sparse=True, among=range(7)
    )
    dense, _ = _train(optax.adam(0.1), sparse=False, among=range(7))
    x = np.asarray(_params()['table'], np.float64)
    mu, nu = np.zeros(SHAPE), np.zeros(SHAPE)
    for t, (rows, grad) in enumerate(_grads(among=range(7)), start=1):
      grad = np.asarray(grad, np.float64)
      for i in np.unique(rows.indices):
        mu[i] = 0.9 * mu[i] + 0.1 * grad[i]
        nu[i] = 0.999 * nu[i] + 0.001 * grad[i] ** 2
        root = np.sqrt(nu[i] / (1 - 0.999**t)) + 1e-8
        x[i] -= 0.1 * mu[i] / (1 - 0.9**t) / root
    np.testing.assert_allclose(lazy['table'], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.mu['table'], mu, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.nu['table'], nu, rtol=1e-4, atol=1e-7)
    self.assertEqual(state.count, 5)
    # The dense one moves rows by what their moments remember.
    self.assertGreater(np.abs(dense['table'] - x).max(), 0.05)
    np.testing.assert_allclose(lazy['bias'], dense['bias'], rtol=1e-6)

  def test_state_of_rows(self):
    """One second moment for each row is a column of the state."""
    inner = optax.chain(transforms.scale_by_row_adam(), optax.scale(-0.1))
    got, (state, _) = _train(transforms.row_wise(inner), sparse=True)
    self.assertEqual(state.nu['table'].shape, (7, 1))
    moved = np.any(np.asarray(got['table'] != _params()['table']), axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), [1, 4, 5])
    np.testing.assert_array_equal(
      np.flatnonzero(np.asarray(state.nu['table'])), [1, 4, 5]
    )

  @pytest.mark.slow
  def test_masked_inside(self):
    mask = {'table': True, 'bias': False}
    tx = transforms.row_wise(optax.masked(optax.adam(0.1), mask))
    got, _ = _train(tx, sparse=True)
    want, _ = _train(transforms.row_wise(optax.adam(0.1)), sparse=True)
    np.testing.assert_allclose(got['table'], want['table'], rtol=1e-5)
    np.testing.assert_array_equal(got['bias'], np.full(4, 6.0))

  def test_after_densify(self):
    """Gathered rows are applied row by row."""
    tx = optax.chain(
      transforms.densify(keep_rows=True, strategy='gather'),
      transforms.row_wise(optax.adam(0.1)),
    )
    got, _ = _train(tx, sparse=True)
    want, _ = _train(transforms.row_wise(optax.adam(0.1)), sparse=True)
    np.testing.assert_array_equal(got['table'], want['table'])

  def test_touches_rows_alone(self):
    """No array of the table's size is computed but those written in place."""
    shape = (1 << 18, 8)
    tx = transforms.row_wise(optax.adam(0.1))
    table = jax.ShapeDtypeStruct(shape, jnp.float32)
    rows = indexed_slices.IndexedSlices(
      jax.ShapeDtypeStruct((4, 8), jnp.float32),
      jax.ShapeDtypeStruct((4,), jnp.int32),
      shape,
    )

    def step(table, state, rows):
      updates, state = tx.update(rows, state, table)
      return transforms.apply_updates(table, updates), state

    state = jax.eval_shape(tx.init, table)
    step = jax.jit(step, donate_argnums=(0, 1))
    analysis = step.lower(table, state, rows).compile().memory_analysis()
    self.assertGreater(analysis.alias_size_in_bytes, 3 * 4 * 8 << 18)
    self.assertLess(analysis.temp_size_in_bytes, 100_000)

  def test_refuses_state_without_rows(self):
    """Adafactor keeps means of columns."""
    params = jnp.zeros((200, 150))
    tx = transforms.row_wise(optax.scale_by_factored_rms())
    rows = indexed_slices.make(
      jnp.ones((2, 150)), jnp.zeros(2, jnp.int32), (200, 150)
    )
    with self.assertRaisesRegex(ValueError, 'inner must keep .* 200 rows'):
      tx.update(rows, tx.init(params), params)
