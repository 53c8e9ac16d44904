"""Means of workers' codes against loops in NumPy, and what must be refused."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import compression, transforms
from emc2 import mesh as mesh_lib
from emc2.compression import identity, low_rank, memories, sign, sparse

from tests import processes
from tests.compression import collective_bytes
from tests.transforms import averages_compressed

WORKERS = 8
SHAPE = (6, 8)


def _grads(steps=4, workers=WORKERS, shape=SHAPE, dtype=np.float32):
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=(steps, workers, *shape)).astype(dtype)
  return {'w': draw(shape), 'b': draw(shape[-1:])}


def _top(x, k):
  """Zeros but for the k largest entries of x."""
  flat = np.zeros_like(x).reshape(-1)
  where = np.argsort(-np.abs(x.reshape(-1)), kind='stable')[:k]
  flat[where] = x.reshape(-1)[where]
  return flat.reshape(x.shape)


def _functions(tx, mesh=None, params_specs=None, dtype=jnp.float32, **kwargs):
  """`init()` and `step(grads, state)`, both jitted, over the workers."""
  mesh = mesh_lib.make(data=WORKERS) if mesh is None else mesh
  params_specs = jax.P() if params_specs is None else params_specs
  specs = transforms.compressed_mean_specs(params_specs)
  is_spec = lambda x: isinstance(x, jax.P)
  split = jax.tree.map(
    lambda spec: jax.P('data', *spec), params_specs, is_leaf=is_spec
  )
  map_ = functools.partial(jax.shard_map, mesh=mesh, **kwargs)
  init = map_(tx.init, in_specs=(params_specs,), out_specs=specs)
  step = map_(
    lambda grads, state: tx.update(jax.tree.map(lambda g: g[0], grads), state),
    in_specs=(split, specs),
    out_specs=(params_specs, specs),
  )
  params = {'w': jnp.zeros(SHAPE, dtype), 'b': jnp.zeros(SHAPE[1:], dtype)}
  return functools.partial(jax.jit(init), params), jax.jit(step)


def _run(tx, grads, **kwargs):
  """The means of each step, stacked, and the last state."""
  init, step = _functions(tx, dtype=grads['w'].dtype, **kwargs)
  state, means = init(), []
  for t in range(grads['w'].shape[0]):
    mean, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state)
    means.append(jax.tree.map(np.asarray, mean))
  return jax.tree.map(lambda *leaves: np.stack(leaves), *means), state


class CompressedMeanTest(parameterized.TestCase):
  def test_matches_numpy(self):
    write = lambda e, p, sent, g: p - sent
    self._check_numpy(memories.full(), write, 1.0)

  @parameterized.parameters(
    (memories.none(), lambda e, p, sent, g: 0.0 * p, 0.0),
    (memories.partial(0.75), lambda e, p, sent, g: e + g - sent, 0.25),
  )
  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self, memory, write, gain):
    self._check_numpy(memory, write, gain)

  def _check_numpy(self, memory, write, gain):
    """And sums of what was sent and is kept are sums of gradients."""
    self.enterContext(jax.enable_x64(True))
    grads = _grads(dtype=np.float64)
    tx = transforms.compressed_mean(sparse.top_k(5), memory=memory)
    means, state = _run(tx, grads)
    kept = np.zeros((WORKERS, *SHAPE))
    for t, g in enumerate(grads['w']):
      carried = g + gain * kept
      sent = np.stack([_top(one, 5) for one in carried])
      kept = write(kept, carried, sent, g)
      np.testing.assert_allclose(means['w'][t], sent.mean(0), atol=1e-12)
    np.testing.assert_allclose(means['b'], grads['b'].mean(1), atol=1e-12)
    self.assertEqual((state.count, state.skipped), (4, 0))
    if gain:
      np.testing.assert_allclose(state.memories['w'], kept, atol=1e-12)
      np.testing.assert_allclose(
        means['w'].sum(0) + kept.mean(0), grads['w'].mean(1).sum(0), atol=1e-12
      )

  def test_a_code_that_loses_nothing_gives_the_mean(self):
    self._check_mean(identity.identity())

  @pytest.mark.slow
  def test_all_entries_give_the_mean(self):
    self._check_mean(sparse.top_k(fraction=1.0))

  def _check_mean(self, code):
    tx = transforms.compressed_mean(code, codes_leaf=lambda leaf: True)
    grads = _grads()
    means, state = _run(tx, grads)
    for name, mean in means.items():
      np.testing.assert_allclose(mean, grads[name].mean(1), atol=1e-6)
      np.testing.assert_array_equal(state.memories[name], 0)

  def test_start_step(self):
    grads, code = _grads(), sparse.top_k(5)
    means, state = _run(transforms.compressed_mean(code, start_step=2), grads)
    np.testing.assert_allclose(
      means['w'][:2], grads['w'][:2].mean(1), atol=1e-6
    )
    rest = jax.tree.map(lambda g: g[2:], grads)
    want, _ = _run(transforms.compressed_mean(code), rest)
    np.testing.assert_allclose(means['w'][2:], want['w'], atol=1e-6)
    words = [48 + 8 + 1, 5 + 6 + 8 + 1]
    np.testing.assert_array_equal(state.words, words)
    bits = transforms.sent_bits(state, start_step=2)
    self.assertEqual(bits, 32 * 2 * sum(words))

  def test_learning_rate(self):
    """The memory keeps updates; at a rate of 0 nothing is sent."""
    rates = np.array([0.5, 0.0, 0.25, 1.0], np.float32)
    tx = transforms.compressed_mean(
      sparse.top_k(5), learning_rate=lambda count: jnp.asarray(rates)[count]
    )
    grads = _grads()
    means, state = _run(tx, grads)
    kept = np.zeros((WORKERS, *SHAPE), np.float32)
    for t, (g, rate) in enumerate(zip(grads['w'], rates, strict=True)):
      if not rate:
        np.testing.assert_array_equal(means['w'][t], 0)
        np.testing.assert_allclose(means['b'][t], grads['b'][t].mean(0), 1e-5)
        continue
      carried = rate * g + kept
      sent = np.stack([_top(one, 5) for one in carried])
      kept = carried - sent
      np.testing.assert_allclose(means['w'][t], sent.mean(0) / rate, 1e-5, 1e-6)
    np.testing.assert_allclose(state.memories['w'], kept, 1e-5, 1e-6)

  def test_skips_what_is_not_finite(self):
    self._check_skips('w')

  @pytest.mark.slow
  def test_skips_what_is_not_finite_in_what_is_not_coded(self):
    self._check_skips('b')

  def _check_skips(self, name):
    grads = _grads(steps=3)
    grads[name][1, 5, ..., 2] = np.nan if name == 'w' else np.inf
    means, state = _run(transforms.compressed_mean(sparse.top_k(5)), grads)
    for mean in means.values():
      np.testing.assert_array_equal(mean[1], 0)
    fine = jax.tree.map(lambda g: g[::2], grads)
    want, after = _run(transforms.compressed_mean(sparse.top_k(5)), fine)
    np.testing.assert_array_equal(means['w'][2], want['w'][1])
    np.testing.assert_array_equal(state.memories['w'], after.memories['w'])
    self.assertEqual((state.count, state.skipped), (2, 1))

  @pytest.mark.slow
  def test_lets_through_what_is_not_finite(self):
    grads = _grads(steps=2)
    grads['b'][0, 5, 2] = np.nan
    tx = transforms.compressed_mean(sparse.top_k(5), skip_nonfinite=False)
    means, state = _run(tx, grads)
    self.assertTrue(np.isnan(means['b'][0, 2]))
    self.assertTrue(np.isfinite(means['b'][1]).all())
    np.testing.assert_array_equal(state.words, [48 + 8, 5 + 6 + 8])

  @parameterized.parameters(
    ({}, ('w',)),
    ({'min_compression_rate': 3.0}, ()),
    ({'codes_leaf': lambda leaf: len(leaf.shape) == 1}, ('b',)),
  )
  def test_which_leaves_are_coded(self, options, names):
    """Half of the entries of `w` take 32 of 64 bits for each; `b` is short."""
    tx = transforms.compressed_mean(sparse.block_k(fraction=0.5), **options)
    params = {'w': jnp.zeros(SHAPE), 'b': jnp.zeros(SHAPE[1])}
    state = jax.eval_shape(tx.init, params)
    for name in params:
      coded = bool(jax.tree.leaves(state.memories[name]))
      self.assertEqual(coded, name in names)

  def test_shards_of_params(self):
    """Each shard is coded as if it were alone."""
    grads = _grads(workers=4)
    tx = transforms.compressed_mean(low_rank.power_sgd(1))
    specs = {'w': jax.P('fsdp', None), 'b': jax.P()}
    means, state = _run(
      tx, grads, mesh=mesh_lib.make(data=4, fsdp=2), params_specs=specs
    )
    self.assertEqual(state.memories['w'].shape, (8, 3, 8))
    self.assertEqual(
      state.memories['w'].sharding.shard_shape((8, 3, 8)), (1, 3, 8)
    )
    self.assertEqual(state.codes['w'].shape, (2, 8, 1))
    for i in range(2):
      rows = slice(3 * i, 3 * i + 3)
      q = np.asarray(low_rank_start(tx))
      kept = np.zeros((4, 3, 8))
      for t in range(4):
        carried = grads['w'][t][:, rows] + kept
        p = (carried @ q).sum(0)
        p /= np.linalg.norm(p)
        own = np.swapaxes(carried, 1, 2) @ p
        kept = carried - p @ np.swapaxes(own, 1, 2)
        q = own.mean(0)
        np.testing.assert_allclose(means['w'][t, rows], p @ q.T, atol=1e-5)

  @parameterized.parameters((sparse.top_k(5),), (sign.scaled_sign(),))
  def test_words_are_the_operands_of_collectives(self, code):
    self._check_words(code)

  @parameterized.parameters(
    (low_rank.power_sgd(2),), (sparse.block_k(fraction=0.25),)
  )
  @pytest.mark.slow
  def test_words_are_the_operands_of_more_collectives(self, code):
    self._check_words(code)

  def _check_words(self, code):
    init, step = _functions(transforms.compressed_mean(code))
    grads = jax.tree.map(lambda g: jnp.asarray(g[0]), _grads())
    state = init()
    compiled = step.lower(grads, state).compile()
    _, state = step(grads, state)
    found = collective_bytes.operand_bytes(compiled)
    self.assertEqual(8 * found, transforms.sent_bits(state))
    wire = compression.wire_bits(code, SHAPE)
    self.assertEqual(8 * found, wire + 32 * SHAPE[1] + 32)

  def test_workers_draw_alike_by_their_key(self):
    code = sparse.random_k(fraction=0.25)
    grads = _grads(steps=2)
    make = lambda seed: transforms.compressed_mean(
      code, memory=memories.none(), key=jax.random.key(seed)
    )
    (one, _), (other, _) = (_run(make(seed), grads) for seed in (1, 2))
    where = [one['w'][0] != 0, one['w'][1] != 0, other['w'][0] != 0]
    for mask in where:
      self.assertEqual(mask.sum(), 12)
    np.testing.assert_allclose(
      one['w'][0], where[0] * grads['w'][0].mean(0), atol=1e-6
    )
    self.assertFalse(np.array_equal(where[0], where[1]))
    self.assertFalse(np.array_equal(where[0], where[2]))

  def test_reset_memory(self):
    grads = _grads(steps=1)
    tx = transforms.compressed_mean(
      sparse.top_k(5), memory=memories.sketched(0.5, 0.5)
    )
    _, state = _run(tx, grads)
    kept = state.memories['w']
    self.assertGreater(np.abs(kept.table).max(), 0)
    cleared = transforms.reset_memory(state).memories['w']
    np.testing.assert_array_equal(cleared.table, 0)
    np.testing.assert_array_equal(cleared.hashes.signs, kept.hashes.signs)

  def test_narrow_gradients(self):
    self._check_narrow(jnp.bfloat16)

  @pytest.mark.slow
  def test_narrow_gradients_of_another_type(self):
    self._check_narrow(jnp.float16)

  def _check_narrow(self, dtype):
    tx = transforms.compressed_mean(sparse.top_k(1), axis_name=None)
    g = jnp.array([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]], dtype)
    state = tx.init(g)
    updates, state = tx.update(g, state)
    self.assertEqual(updates.dtype, dtype)
    self.assertEqual(state.memories.dtype, jnp.float32)

  @pytest.mark.slow
  def test_two_processes_equal_one(self):
    path = pathlib.Path(self.create_tempdir().full_path, 'means.npy')
    processes.run('tests.transforms.averages_compressed', 2, str(path))
    mesh = mesh_lib.make(jax.devices()[:4], data=4)
    np.testing.assert_allclose(
      np.load(path), averages_compressed.means(mesh), atol=1e-6
    )


def low_rank_start(tx):
  """The factor that PowerSGD starts from, for a shard of `w`."""
  params = {'w': jnp.zeros((3, 8)), 'b': jnp.zeros(8)}
  return tx.init(params).codes['w'][0]


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'min_compression_rate': 0.0}, 'min_compression_rate must be'),
    ({'start_step': -1}, 'start_step must be at least 0'),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      transforms.compressed_mean(identity.identity(), **options)

  def test_gradients_that_are_averaged_already(self):
    tx = transforms.compressed_mean(sparse.top_k(5))
    mesh = mesh_lib.make(data=WORKERS)
    params, x = jnp.zeros(SHAPE), jnp.ones((WORKERS, *SHAPE))

    def update(cast):
      def work(params, x):
        state = tx.init(params)
        params = cast(params)
        return tx.update(jax.grad(lambda w: jnp.sum(w * x[0]))(params), state)

      specs = jax.P(), jax.P('data')
      out = jax.P(), transforms.compressed_mean_specs()
      return jax.shard_map(work, mesh=mesh, in_specs=specs, out_specs=out)

    own = lambda params: jax.lax.pcast(params, 'data', to='varying')
    jax.eval_shape(update(own), params, x)
    with self.assertRaisesRegex(ValueError, 'each worker.s own.*pcast'):
      jax.eval_shape(update(lambda params: params), params, x)

  @pytest.mark.slow
  def test_goes_without_the_check(self):
    means, _ = _run(
      transforms.compressed_mean(sparse.top_k(5)), _grads(1), check_vma=False
    )
    want, _ = _run(transforms.compressed_mean(sparse.top_k(5)), _grads(1))
    np.testing.assert_allclose(means['w'], want['w'], atol=1e-6)

  def test_an_axis_that_is_not_there(self):
    tx = transforms.compressed_mean(identity.identity(), axis_name='workers')
    params = jnp.zeros(SHAPE)
    with self.assertRaisesRegex(ValueError, 'axis_name must be.*workers'):
      tx.update(params, tx.init(params))

  def test_leaves(self):
    tx = transforms.compressed_mean(sparse.top_k(5), axis_name=None)
    with self.assertRaisesRegex(ValueError, r"\['n'\] must be float.*int32"):
      tx.init({'n': jnp.zeros(SHAPE, jnp.int32)})
    state = tx.init({'w': jnp.zeros(SHAPE)})
    with self.assertRaisesRegex(ValueError, r"\['w'\] must have the shape"):
      tx.update({'w': jnp.zeros((8, 6))}, state)
    with self.assertRaisesRegex(ValueError, r"\['w'\] must be float"):
      tx.update({'w': jnp.zeros(SHAPE, jnp.int32)}, state)
    small = transforms.compressed_mean(
      sparse.top_k(50), axis_name=None, codes_leaf=lambda leaf: True
    )
    with self.assertRaisesRegex(ValueError, 'k must be at most'):
      small.init({'w': jnp.zeros(SHAPE)})

  def test_params_split_over_the_workers(self):
    with self.assertRaisesRegex(ValueError, "must not split.*'data'"):
      transforms.compressed_mean_specs({'w': jax.P('data')})


class PowersgdMomentumTest(parameterized.TestCase):
  def test_steady_gain(self):
    tx = transforms.powersgd_momentum(0.9)
    g = jnp.ones(3)
    state = tx.init(g)
    for _ in range(200):
      updates, state = tx.update(g, state)
    np.testing.assert_allclose(updates, 11.0, rtol=1e-5)

  def test_no_decay_doubles(self):
    tx = optax.chain(transforms.powersgd_momentum(0.0), optax.scale(-1.0))
    g = jnp.array([1.0, 2.0])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, -2 * g)
