"""Adam of rows against a loop over the lines of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import transforms


def _grads(steps):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return [{'w': draw(5, 3), 'v': draw(4)} for _ in range(steps)]


def _loop(grads, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0):
  """The last update, in float64, one row after another."""
  result = {}
  for name in grads[0]:
    sequence = [np.asarray(g[name], np.float64) for g in grads]
    result[name] = np.zeros_like(sequence[0])
    for at in np.ndindex(sequence[0].shape[:-1]):
      m, v = 0.0, 0.0
      for t, g in enumerate(sequence, start=1):
        m = b1 * m + (1 - b1) * g[at]
        v = b2 * v + (1 - b2) * (g[at] @ g[at]) / len(g[at])
        root = np.sqrt(v / (1 - b2**t) + eps_root)
        result[name][at] = m / (1 - b1**t) / (root + eps)
  return result


def _run(tx, grads):
  state = tx.init(jax.tree.map(jnp.asarray, grads[0]))
  step = jax.jit(tx.update)
  for g in grads:
    updates, state = step(jax.tree.map(jnp.asarray, g), state)
  return updates


OPTIONS = ({}, {'b1': 0.5}, {'b2': 0.5}, {'eps': 1.0}, {'eps_root': 1.0})


class ScaleByRowAdamTest(parameterized.TestCase):
  @parameterized.parameters(*OPTIONS)
  def test_matches_a_loop(self, **options):
    grads = _grads(6)
    got = _run(transforms.scale_by_row_adam(**options), grads)
    want = _loop(grads, **options)
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5)

  def test_each_option_counts(self):
    ends = [_loop(_grads(6), **options)['w'] for options in OPTIONS]
    for other in ends[1:]:
      self.assertGreater(np.abs(other - ends[0]).max(), 1e-2)

  def test_turns_with_the_rows(self):
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    grads = [{'w': g['w']} for g in _grads(6)]
    turned = [{'w': (g['w'] @ turn).astype(np.float32)} for g in grads]
    gaps = []
    for tx in (transforms.scale_by_row_adam(), optax.scale_by_adam()):
      with jax.numpy_dtype_promotion('standard'):
        gap = _run(tx, turned)['w'] - _run(tx, grads)['w'] @ turn
      gaps.append(np.abs(gap).max())
    self.assertLess(gaps[0], 1e-5)
    self.assertGreater(gaps[1], 0.1)


class ContractTest(parameterized.TestCase):
  def test_takes_extra_args_in_a_chain(self):
    tx = transforms.scale_by_row_adam()
    g = jax.tree.map(jnp.asarray, _grads(1)[0])
    want, _ = tx.update(g, tx.init(g))
    chain = optax.chain(optax.identity(), tx)
    got, _ = chain.update(g, chain.init(g), g, value=1.0, other=2)
    jax.tree.map(np.testing.assert_array_equal, got, want)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_keeps_types_and_compiles_once(self, dtype):
    tx = transforms.scale_by_row_adam()
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    state, step = tx.init(cast(_grads(1)[0])), jax.jit(tx.update)
    before = jax.tree.map(jax.typeof, state)
    for g in map(cast, _grads(2)):
      updates, state = step(g, state)
    self.assertEqual(jax.tree.map(jax.typeof, state), before)
    self.assertEqual(
      jax.tree.map(jax.typeof, updates), jax.tree.map(jax.typeof, g)
    )
    self.assertEqual(step._cache_size(), 1)

  def test_abstract_init(self):
    tx = transforms.scale_by_row_adam()
    shape = lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype)
    params = jax.tree.map(jnp.asarray, _grads(1)[0])
    got = jax.eval_shape(tx.init, jax.tree.map(shape, params))
    self.assertEqual(got, jax.tree.map(shape, tx.init(params)))

  def test_injected_hyperparameters_are_traced(self):
    tx = optax.inject_hyperparams(transforms.scale_by_row_adam)(b1=0.9)
    grads = [jax.tree.map(jnp.asarray, g) for g in _grads(2)]
    step = jax.jit(tx.update)
    _, state = step(grads[0], tx.init(grads[0]))
    state.hyperparams['b1'] = jnp.float32(0.0)
    updates, _ = step(grads[1], state)
    self.assertEqual(step._cache_size(), 1)
    # Without a first moment each row is parallel to its gradient.
    across = updates['w'] - jnp.sum(
      updates['w'] * grads[1]['w'], axis=1, keepdims=True
    ) * grads[1]['w'] / jnp.sum(grads[1]['w'] ** 2, axis=1, keepdims=True)
    np.testing.assert_allclose(across, 0, atol=1e-5)

  def test_masked_and_partitioned(self):
    grads = jax.tree.map(jnp.asarray, _grads(1)[0])
    tx = transforms.scale_by_row_adam()
    want = _loop([grads])
    for wrapped in (
      optax.masked(tx, {'w': True, 'v': False}),
      optax.partition(
        {'adam': tx, 'plain': optax.identity()}, {'w': 'adam', 'v': 'plain'}
      ),
    ):
      got, _ = wrapped.update(grads, wrapped.init(grads), grads)
      np.testing.assert_allclose(got['w'], want['w'], rtol=1e-5)
      np.testing.assert_array_equal(got['v'], grads['v'])

  def test_sharded_equals_one_device(self):
    rng = np.random.default_rng(2)
    grads = [rng.normal(size=(16, 3)).astype(np.float32) for _ in 'abc']
    tx = transforms.scale_by_row_adam()
    want = _run(tx, grads)
    mesh = mesh_lib.make(fsdp=8)
    spec = jax.sharding.PartitionSpec('fsdp')
    placed = [mesh_lib.place(g, mesh, spec) for g in grads]
    state, step = tx.init(placed[0]), jax.jit(tx.update)
    for g in placed:
      updates, state = step(g, state)
    np.testing.assert_allclose(updates, want, rtol=1e-6)
    self.assertEqual(state.mu.sharding.spec, spec)
    self.assertEqual(state.nu.shape, (16, 1))
    self.assertEqual(state.nu.sharding.spec[0], 'fsdp')
