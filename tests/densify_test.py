"""Adding, exchanging and densifying gradients of few rows."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import densify, indexed_slices
from emc2 import mesh as mesh_lib

from tests import processes

P = jax.P


def _slices(n, shape, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(n, *shape[1:])).astype(dtype)
  return indexed_slices.make(values, rng.integers(0, shape[0], n), shape)


def _dense(grad):
  """In float64, by a loop."""
  if not indexed_slices.is_slices(grad):
    return np.asarray(grad, np.float64)
  dense = np.zeros(grad.dense_shape)
  for value, index in zip(
    np.asarray(grad.values), np.asarray(grad.indices), strict=True
  ):
    if 0 <= index < len(dense):
      dense[index] += value
  return dense


class ChooseTest(parameterized.TestCase):
  @parameterized.parameters((246, 'gather'), (247, 'dense'), (0, 'gather'))
  def test_crossover_of_bytes(self, num_slices, want):
    self.assertEqual(densify.choose(1000, 64, num_slices, 8, 4, 4), want)

  @parameterized.parameters((124, 'gather'), (125, 'dense'))
  def test_crossover_of_memory(self, num_slices, want):
    got = densify.choose(1000, 64, num_slices, 8, objective='memory')
    self.assertEqual(got, want)

  @parameterized.parameters(
    (dict(value_bytes=2), 242),  # 2 * 1000 * 128 / (8 * 132) = 242.4.
    (dict(index_bytes=8), 242),  # 2 * 1000 * 256 / (8 * 264) = 242.4.
    (dict(sharded=True), 123),  # The half of 246.15.
    (dict(sharded=True, objective='memory'), 15),  # 1000 / 8 / 8 = 15.6.
  )
  def test_options_move_the_crossover(self, options, last):
    ways = [densify.choose(1000, 64, n, 8, **options) for n in (last, last + 1)]
    self.assertEqual(ways, ['gather', 'dense'])

  @parameterized.product(
    num_workers=(2, 3, 8, 64),
    extra=(0, 1, 10_000),
    objective=('bytes', 'memory'),
  )
  def test_tied_weights_are_dense(self, num_workers, extra, objective):
    got = densify.choose(
      33_708, 1024, 33_708 + extra, num_workers, objective=objective
    )
    self.assertEqual(got, 'dense')

  def test_one_worker_asks_for_memory(self):
    ways = [densify.choose(1000, 64, n, 1) for n in (999, 1000)]
    self.assertEqual(ways, ['gather', 'dense'])

  @parameterized.parameters(
    (dict(num_rows=0), 'num_rows must be at least 1, got 0'),
    (dict(width=0), 'width must be at least 1'),
    (dict(num_slices=-1), 'num_slices must be at least 0'),
    (dict(num_workers=0), 'num_workers must be at least 1'),
    (dict(value_bytes=0), 'value_bytes must be at least 1'),
    (dict(index_bytes=-1), 'index_bytes must be at least 0'),
    (dict(objective='time'), "objective must be one of .* got 'time'"),
  )
  def test_refuses(self, given, message):
    settings = dict(num_rows=9, width=2, num_slices=1, num_workers=2) | given
    with self.assertRaisesRegex(ValueError, message):
      densify.choose(**settings)


class AccumulateTest(parameterized.TestCase):
  @parameterized.product(
    strategy=densify.STRATEGIES, counts=((0, 1), (1, 0), (1, 1))
  )
  def test_all_strategies_are_one_sum(self, strategy, counts):
    self._check_all_strategies_are_one_sum(strategy, counts)

  @parameterized.product(
    strategy=densify.STRATEGIES, counts=((0, 2), (2, 0), (2, 2))
  )
  @pytest.mark.slow
  def test_all_strategies_are_one_sum_elsewhere(self, strategy, counts):
    self._check_all_strategies_are_one_sum(strategy, counts)

  def _check_all_strategies_are_one_sum(self, strategy, counts):
    num_dense, num_sparse = counts
    with jax.enable_x64(True):
      shape, rng = (6, 3), np.random.default_rng(0)
      grads = [_slices(5, shape, i, np.float64) for i in range(num_sparse)]
      grads += [jnp.asarray(rng.normal(size=shape)) for _ in range(num_dense)]
      got = densify.accumulate(grads, strategy)
      want = sum(map(_dense, grads))
      np.testing.assert_allclose(_dense(got), want, rtol=0, atol=1e-12)
    if len(grads) == 1:
      self.assertIs(got, grads[0])
      return
    num_rows = {
      'tf': 5 * num_sparse + 6 * num_dense,
      'densify_if_any_dense': 10,
      'auto': 6,  # Of 10 rows no more than V can differ.
    }
    keeps_rows = num_sparse and (strategy == 'tf' or not num_dense)
    if keeps_rows and strategy in num_rows:
      self.assertEqual(got.num_slices, num_rows[strategy])
    else:
      self.assertFalse(indexed_slices.is_slices(got))

  @pytest.mark.slow
  def test_float32(self):
    grads = [_slices(500, (6, 3)), jnp.ones((6, 3))]
    want = sum(map(_dense, grads))
    for strategy in densify.STRATEGIES:
      got = _dense(densify.accumulate(grads, strategy))
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

  def test_sums_of_16_bits_are_wide(self):
    rows = indexed_slices.make(
      jnp.ones((1000, 1), jnp.bfloat16), jnp.zeros(1000, jnp.int32), (2, 1)
    )
    got = densify.accumulate([rows, jnp.zeros((2, 1), jnp.bfloat16)])
    self.assertEqual((got.dtype, float(got[0, 0])), (jnp.bfloat16, 1000))

  def test_tensorflow_example(self):
    """Issue 21243: the sum of row 1 and the sum of all of E = ones(3, 5)."""
    loss_fn = lambda rows, table: jnp.sum(rows**2) + jnp.sum(table**2)
    table = jnp.ones((3, 5))
    ids = jnp.array([1])
    _, grads = densify.embedding_grad_slices(loss_fn, table, ids, table)
    tf = densify.accumulate(grads, 'tf')
    self.assertEqual(sorted(tf.indices.tolist()), [0, 1, 1, 2])
    np.testing.assert_array_equal(tf.values, np.full((4, 5), 2))
    for strategy in ('densify_if_any_dense', 'sparse_as_dense', 'dedup'):
      got = densify.accumulate(grads, strategy)
      np.testing.assert_array_equal(got[:, 0], [2, 4, 2])

  def test_row_counts_of_openseq2seq(self):
    tied = [
      jax.ShapeDtypeStruct((32_768, 512), jnp.float32),
      *[
        indexed_slices.IndexedSlices(
          jax.ShapeDtypeStruct((128 * 56, 512), jnp.float32),
          jax.ShapeDtypeStruct((128 * 56,), jnp.int32),
          (32_768, 512),
        )
      ]
      * 2,
    ]
    got = jax.eval_shape(lambda *grads: densify.accumulate(grads, 'tf'), *tied)
    self.assertEqual(2 * got.num_slices, 94_208)

  def test_sizes_of_the_paper(self):
    v, h, n = 33_708, 1024, 33_708 + 10_000
    dense = indexed_slices.num_bytes((v, h), np.float32)
    self.assertAlmostEqual(dense / 1e6, 138.07, places=2)
    gathered = [indexed_slices.num_bytes((p * n, h), 'f4') for p in (4, 16, 64)]
    np.testing.assert_allclose(
      np.array(gathered) / 1e9, [0.716, 2.86, 11.458], rtol=2e-3
    )
    self.assertAlmostEqual(gathered[-1] / dense, 82.99, places=2)

  def test_refuses(self):
    rows = _slices(5, (6, 3))
    for grads, error, message in (
      ([], ValueError, 'grads must be at least one, got none'),
      ([rows, jnp.ones((5, 3))], ValueError, 'must have one shape and dtype'),
      ([rows, jnp.ones((6, 3), 'bfloat16')], ValueError, 'one shape and dtype'),
      ([rows, jnp.ones((6, 3), int)], TypeError, r'grads\[1\] must be .* int'),
    ):
      with self.assertRaisesRegex(error, message):
        densify.accumulate(grads)
    with self.assertRaisesRegex(ValueError, "strategy must be .* got 'sum'"):
      densify.accumulate([rows], 'sum')
    with self.assertRaisesRegex(ValueError, 'max_dense_bytes=71 .* got 72'):
      densify.accumulate([rows, rows], 'dedup', max_dense_bytes=71)
    densify.accumulate([rows, rows], 'dedup', max_dense_bytes=72)


def _on_workers(fn, num_workers, *args, out_specs=None, check_vma=True):
  """Runs `fn` on shards of the leading axis of all leaves."""
  mesh = mesh_lib.make(jax.devices()[:num_workers], data=num_workers)
  sharded = jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=P('data'),
    out_specs=P() if out_specs is None else out_specs,
    check_vma=check_vma,
  )
  return jax.jit(sharded), args


def _stacked(num_workers, n, shape):
  """Rows of all workers, one after another, and the mean of what they mean."""
  slices = _slices(num_workers * n, shape)
  return slices, _dense(slices) / num_workers


class ReduceTest(parameterized.TestCase):
  @parameterized.product(
    strategy=('auto', 'gather', 'dense'), num_slices=(3, 40)
  )
  def test_every_way_is_the_mean(self, strategy, num_slices):
    slices, want = _stacked(8, num_slices, (40, 3))
    fn, args = _on_workers(
      lambda x: densify.reduce_slices(x, 'data', strategy), 8, slices
    )
    got = fn(*args)
    gathers = strategy == 'gather' or strategy == 'auto' and num_slices == 3
    self.assertEqual(indexed_slices.is_slices(got), gathers)
    if gathers:
      self.assertEqual(got.num_slices, 8 * num_slices)
    np.testing.assert_allclose(
      _dense(got), want, rtol=0, atol=1e-6 * np.abs(want).max()
    )

  def test_collectives_are_those_of_the_model(self):
    """Two to gather any number of tables, one to sum; small ones together."""
    slices, _ = _stacked(8, 3, (40, 3))
    tree = {'a': slices, 'b': slices, 'c': jnp.ones((8, 2))}
    for strategy, want in (('gather', [2, 1]), ('dense', [0, 1])):
      fn, args = _on_workers(
        lambda x, s=strategy: densify.reduce_slices(x, 'data', s), 8, tree
      )
      text = fn.lower(*args).as_text()
      found = [
        len(re.findall(rf'stablehlo\.{name}\b', text))
        for name in ('all_gather', 'all_reduce')
      ]
      self.assertEqual(found, want)

  def test_sums_of_a_tree(self):
    slices, mean = _stacked(4, 3, (40, 3))
    ones = jnp.ones((4, 2))
    reduce = functools.partial(densify.reduce_slices, axis_name='data')
    fn, args = _on_workers(
      lambda x: reduce(x, average=False), 4, [slices, ones]
    )
    rows, dense = fn(*args)
    np.testing.assert_allclose(_dense(rows), 4 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dense, [[4, 4]])

  @parameterized.parameters('gather', 'dense')
  def test_wire_dtype(self, strategy):
    slices, want = _stacked(8, 5, (40, 3))
    reduce = lambda x: densify.reduce_slices(
      x, 'data', strategy, wire_dtype=jnp.bfloat16
    )
    fn, args = _on_workers(reduce, 8, slices)
    self.assertIn('bf16', fn.lower(*args).as_text())
    got = fn(*args)
    self.assertEqual(got.dtype, jnp.float32)
    error = np.abs(_dense(got) - want).max() / np.abs(want).max()
    self.assertBetween(error, 1e-4, 1e-1)

  @parameterized.parameters('gather', 'dense', 'auto')
  def test_sharded_rows(self, strategy):
    slices, want = _stacked(8, 2, (40, 3))
    fn, args = _on_workers(
      lambda x: (
        indexed_slices.to_dense(part)
        if indexed_slices.is_slices(
          part := densify.reduce_scatter_slices(x, 'data', strategy)
        )
        else part
      ),
      8,
      slices,
      out_specs=P('data'),
    )
    got = fn(*args)
    self.assertEqual(got.shape, (40, 3))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    text = fn.lower(*args).as_text()
    self.assertEqual('reduce_scatter' in text, strategy == 'dense')

  def test_sharded_rows_of_arrays(self):
    """Worker i has i ones."""
    rows = jnp.repeat(jnp.arange(4.0), 8)[:, None]
    for average, want in ((True, 1.5), (False, 6.0)):
      reduce = lambda x, a=average: densify.reduce_scatter_slices(
        x, 'data', average=a
      )
      fn, args = _on_workers(reduce, 4, rows, out_specs=P('data'))
      np.testing.assert_array_equal(fn(*args), np.full((8, 1), want))

  @parameterized.parameters('gather', 'dense')
  def test_equals_one_device(self, strategy):
    """The gradient of the whole batch, of a looked-up and a tied table."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(24, 4)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 24, (16, 5)), jnp.int32)

    def loss_fn(rows, table):
      return jnp.mean(jax.nn.logsumexp(rows @ table.T, axis=-1))

    def grads(table, ids):
      local = jax.lax.pcast(table, 'data', to='varying')
      loss, grads = densify.embedding_grad_slices(loss_fn, table, ids, local)
      kind = 'tf' if strategy == 'gather' else 'densify_if_any_dense'
      mean = densify.reduce_slices(
        densify.accumulate(grads, kind), 'data', strategy
      )
      return jax.lax.pmean(loss, 'data'), mean

    mesh = mesh_lib.make()
    fn = jax.jit(
      jax.shard_map(grads, mesh=mesh, in_specs=(P(), P('data')), out_specs=P())
    )
    loss, got = fn(table, ids)
    whole = lambda table: loss_fn(table[ids], table)
    want_loss, want = jax.value_and_grad(whole)(table)
    self.assertAlmostEqual(float(loss), float(want_loss), places=5)
    np.testing.assert_allclose(
      _dense(got), want, rtol=0, atol=1e-6 * np.abs(want).max()
    )
    if strategy == 'gather':
      self.assertEqual(got.num_slices, 8 * (24 + 10))

  @pytest.mark.slow
  def test_loss_curves_of_all_ways_are_one(self):
    """200 steps with tied weights: eight workers, and all on one device."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(0.1 * rng.normal(size=(256, 16)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 256, (200, 64, 2)), jnp.int32)

    def loss_fn(rows, table, targets):
      logits = rows @ table.T
      right = jnp.take_along_axis(logits, targets[:, None], axis=1)
      return jnp.mean(jax.nn.logsumexp(logits, axis=1) - right[:, 0])

    def on_one(table, ids):
      whole = lambda table: loss_fn(table[ids[:, 0]], table, ids[:, 1])
      return jax.value_and_grad(whole)(table)

    def on_workers(strategy, way, table, ids):
      local = jax.lax.pcast(table, 'data', to='varying')
      loss, grads = densify.embedding_grad_slices(
        functools.partial(loss_fn, targets=ids[:, 1]), table, ids[:, 0], local
      )
      total = densify.accumulate(grads, strategy)
      mean = densify.reduce_slices(total, 'data', way)
      if indexed_slices.is_slices(mean):
        mean = indexed_slices.to_dense(mean)
      return jax.lax.pmean(loss, 'data'), mean

    curves = []
    for settings in (None, ('tf', 'gather'), ('densify_if_any_dense', 'auto')):
      grad = on_one
      if settings:
        grad = jax.shard_map(
          functools.partial(on_workers, *settings),
          mesh=mesh_lib.make(),
          in_specs=(P(), P('data')),
          out_specs=P(),
        )

      def step(table, ids, grad=grad):
        loss, mean = grad(table, ids)
        return table - 2.0 * mean, loss

      _, losses = jax.jit(functools.partial(jax.lax.scan, step))(table, ids)
      curves.append(np.asarray(losses))
    self.assertLess(curves[0][-1], curves[0][0])
    for other in curves[1:]:
      np.testing.assert_allclose(other, curves[0], rtol=1e-4)

  def test_bytes_held_grow_with_workers_only_where_gathered(self):
    held = {}
    for num_workers in (2, 4, 8):
      for strategy in ('gather', 'dense'):
        slices, _ = _stacked(num_workers, 5, (40, 3))
        fn, args = _on_workers(
          lambda x, s=strategy: densify.reduce_slices(x, 'data', s),
          num_workers,
          slices,
        )
        shapes = jax.eval_shape(fn, *args)
        held[num_workers, strategy] = sum(
          leaf.size * 4 for leaf in jax.tree.leaves(shapes)
        )
    for num_workers in (2, 4, 8):
      self.assertEqual(held[num_workers, 'gather'], num_workers * 5 * 4 * 4)
      self.assertEqual(held[num_workers, 'dense'], 40 * 3 * 4)

  def test_one_worker(self):
    rows, dense = _slices(3, (40, 3)), jnp.ones(2)
    got = densify.reduce_slices([rows, dense], None)
    np.testing.assert_array_equal(got[0].values, rows.values)
    np.testing.assert_array_equal(got[1], dense)
    got = densify.reduce_slices(rows, None, 'dense')
    np.testing.assert_allclose(got, _dense(rows), atol=1e-6)

  def test_what_was_summed_before_is_refused(self):
    rows, _ = _stacked(8, 3, (40, 3))

    def reduce(x):
      total = jax.tree.map(lambda leaf: jax.lax.psum(leaf, 'data'), x.values)
      done = indexed_slices.make(total, x.indices, (40, 3))
      return densify.reduce_slices({'table': done}, 'data')

    fn, args = _on_workers(reduce, 8, rows)
    with self.assertRaisesRegex(ValueError, r"\['table'\] must be .*pcast"):
      fn(*args)
    fn, args = _on_workers(reduce, 8, rows, check_vma=False)
    fn(*args)  # Where types say nothing, it cannot know.

  def test_equal_indices_of_all_workers(self):
    """Values differ, indices do not: types of both must be made alike."""
    values = jnp.arange(8.0)[:, None]

    def reduce(values):
      rows = indexed_slices.make(values, jnp.zeros(1, jnp.int32), (9, 1))
      return densify.reduce_slices(rows, 'data', 'gather')

    fn, args = _on_workers(reduce, 8, values)
    self.assertEqual(_dense(fn(*args))[0, 0], 3.5)

  def test_refuses(self):
    rows = _slices(3, (40, 3))
    reduce = densify.reduce_slices
    with self.assertRaisesRegex(ValueError, "axis_name must .* got 'workers'"):
      reduce(rows, 'workers')
    with self.assertRaisesRegex(ValueError, "strategy must be .* got 'tf'"):
      reduce(rows, None, 'tf')
    with self.assertRaisesRegex(ValueError, 'wire_dtype must be a float'):
      reduce(rows, None, wire_dtype=jnp.int8)
    with self.assertRaisesRegex(ValueError, r"\['a'\] .* max_dense_bytes=9"):
      reduce({'a': rows}, None, 'dense', max_dense_bytes=9)
    with self.assertRaisesRegex(TypeError, r"\['b'\] must be .* got int32"):
      reduce({'a': rows, 'b': jnp.ones(2, jnp.int32)}, None)
    fn, args = _on_workers(
      lambda x: densify.reduce_scatter_slices(x, 'data'),
      8,
      _slices(16, (41, 3)),
      out_specs=P('data'),
    )
    with self.assertRaisesRegex(ValueError, 'must divide the rows .* got 41'):
      fn(*args)

  @pytest.mark.slow
  def test_two_processes_equal_one(self):
    found = []
    for count in (1, 2):
      path = pathlib.Path(self.create_tempdir().full_path, 'means.npz')
      processes.run('tests.reduces_slices', count, str(path))
      found.append(dict(np.load(path)))
    for name, value in found[0].items():
      np.testing.assert_allclose(found[1][name], value, atol=1e-7)


class EmbeddingTest(parameterized.TestCase):
  def test_is_the_gradient_of_the_table(self):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(9, 2, 3)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=3), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 9, (4, 5)), jnp.int32)
    loss_fn = lambda rows, weight: jnp.sum(jnp.tanh(rows @ weight))
    loss, (slices, got) = jax.jit(
      functools.partial(densify.embedding_grad_slices, loss_fn)
    )(table, ids, weight)
    want_loss, (want, of_weight) = jax.value_and_grad(
      lambda table, weight: loss_fn(table[ids], weight), argnums=(0, 1)
    )(table, weight)
    self.assertEqual(slices.values.shape, (20, 2, 3))
    self.assertAlmostEqual(float(loss), float(want_loss), places=5)
    np.testing.assert_allclose(_dense(slices), want, atol=1e-6)
    np.testing.assert_allclose(got, of_weight, atol=1e-5)

  def test_no_array_of_the_table_is_made(self):
    table = jax.ShapeDtypeStruct((1 << 20, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    loss_fn = lambda rows: jnp.sum(rows**2)
    grads = functools.partial(densify.embedding_grad_slices, loss_fn)
    compiled = jax.jit(grads).lower(table, ids).compile()
    analysis = compiled.memory_analysis()
    self.assertLess(analysis.output_size_in_bytes, 1000)
    self.assertLess(analysis.temp_size_in_bytes, 100_000)

  def test_what_is_masked_does_not_learn(self):
    ids = jnp.array([0, 0, 2])
    mask = jnp.array([True, False, True])
    loss_fn = lambda rows: jnp.sum(rows)
    _, (slices,) = densify.embedding_grad_slices(
      loss_fn, jnp.ones((3, 2)), ids, mask=mask
    )
    np.testing.assert_array_equal(slices.indices, [0, 3, 2])
    np.testing.assert_array_equal(_dense(slices)[:, 0], [1, 0, 1])

  def test_refuses(self):
    grads = functools.partial(
      densify.embedding_grad_slices, jnp.sum, jnp.ones((3, 2))
    )
    for ids in ([0, 3], [-1, 0]):
      with self.assertRaisesRegex(ValueError, r'ids must lie in \[0, 3\), got'):
        grads(jnp.array(ids))
      loss, _ = jax.jit(grads)(jnp.array(ids))
      self.assertTrue(np.isnan(loss))
    with self.assertRaisesRegex(TypeError, 'ids must be integers, got float32'):
      grads(jnp.ones(2))
    with self.assertRaisesRegex(ValueError, 'mask must have the shape of ids'):
      grads(jnp.array([0, 1]), mask=jnp.array([True]))
