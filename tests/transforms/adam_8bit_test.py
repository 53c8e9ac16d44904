"""Tests of optimisers whose moments are kept in 8-bit blocks."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import transforms
from emc2.compression import blockwise

_COLLECTIVES = 'all-reduce|all-gather|all-to-all|reduce-scatter|permute'


def _grads(shape, count):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(count)
  ]


@jax.numpy_dtype_promotion('standard')  # As optax needs it.
def _run(tx, grads):
  state, step = tx.init(grads[0]), jax.jit(tx.update)
  updates = []
  for grad in grads:
    update, state = step(grad, state)
    updates.append(update)
  return updates, state


def _decode(state):
  return [np.asarray(blockwise.dequantize(x)) for x in (state.mu, state.nu)]


class ScaleByAdam8bitTest(parameterized.TestCase):
  def test_first_step_is_that_of_adam(self):
    self._check_first_step(16)

  @parameterized.parameters(1, 256)
  @pytest.mark.slow
  def test_first_step_of_other_blocks_is_that_of_adam(self, block_size):
    self._check_first_step(block_size)

  def _check_first_step(self, block_size):
    tx = transforms.scale_by_adam_8bit(block_size=block_size, min_8bit_size=0)
    grad = _grads((4, 64), 1)
    want, _ = _run(optax.scale_by_adam(), grad)
    got, _ = _run(tx, grad)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)

  def test_small_leaves_are_those_of_adam(self):
    grads = _grads((4, 64), 5)
    want, _ = _run(optax.scale_by_adam(), grads)
    got, state = _run(transforms.scale_by_adam_8bit(min_8bit_size=257), grads)
    self.assertEqual(state.mu.dtype, jnp.float32)
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-5, atol=1e-6)

  @parameterized.named_parameters(
    ('all', True, 0),
    ('one', {'table': True, 'rest': False}, 1),
    ('none', None, 2),
  )
  def test_keep32_mask(self, mask, count):
    params = {'table': jnp.zeros((8, 8)), 'rest': jnp.zeros((8, 8))}
    for keep in (mask, lambda _: mask):
      tx = transforms.scale_by_adam_8bit(min_8bit_size=0, keep32_mask=keep)
      mu = tx.init(params).mu
      coded = [isinstance(x, blockwise.Quantized) for x in mu.values()]
      self.assertEqual(sum(coded), count)

  def test_block_of_one_follows_adam(self):
    """A second moment alone in its block is exact; signs are kept."""
    grads = [jnp.abs(g) for g in _grads((64,), 20)]
    tx = transforms.scale_by_adam_8bit(
      b2=0.99, block_size=1, min_8bit_size=0, symmetric=True
    )
    want, _ = _run(optax.scale_by_adam(b2=0.99), grads)
    got, _ = _run(tx, grads)
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-5)

  def test_stalls_as_specified(self):
    self._check_stalls_as_specified(0.99, 2000, (1, 0.350, 0.070, 0.0099))

  @pytest.mark.slow
  def test_stalls_as_specified_elsewhere(self):
    self._check_stalls_as_specified(0.999, 2000, (1, 0.4973, 0.0993, 0.00986))

  def _check_stalls_as_specified(self, b2, steps, want):
    """Rounded to the nearest, a moment rests within half a distance."""
    tx = transforms.scale_by_adam_8bit(b2=b2, block_size=4, min_8bit_size=0)
    nu = blockwise.quantize(
      jnp.asarray([1, 0.5, 0.1, 0.01]), blockwise.UNSIGNED, block_size=4
    )
    state = tx.init(jnp.zeros(4))._replace(nu=nu)
    grad = jnp.asarray([1.0, 0, 0, 0])
    step = lambda _, state: tx.update(grad, state)[1]
    state = jax.jit(lambda s: jax.lax.fori_loop(0, steps, step, s))(state)
    np.testing.assert_allclose(_decode(state)[1], want, rtol=0.01)

  @pytest.mark.slow
  def test_stochastic_rounding_does_not_stall(self):
    grad, nu = jnp.asarray([1.0, 0, 0, 0]), jnp.asarray([1, 0.5, 0.1, 0.01])

    def run(key):
      tx = transforms.scale_by_adam_8bit(
        block_size=4, min_8bit_size=0, rounding='stochastic', key=key
      )
      state = tx.init(grad)._replace(
        nu=blockwise.quantize(nu, blockwise.UNSIGNED, block_size=4)
      )
      step = lambda _, state: tx.update(grad, state)[1]
      state = jax.lax.fori_loop(0, 1000, step, state)
      return blockwise.dequantize(state.nu)

    keys = jax.random.split(jax.random.key(0), 200)
    mean = jax.jit(jax.vmap(run))(keys).mean(axis=0)
    start = _round_trip(nu)
    np.testing.assert_allclose(mean[1:], start[1:] * 0.999**1000, rtol=0.1)

  def test_floor(self):
    """Without it a small entry beside a large one is divided by eps."""
    grads = [jnp.asarray([1.0, 1e-4])] * 5 + [jnp.asarray([1.0, 0.0])]
    largest = []
    for floor in (True, False):
      tx = transforms.scale_by_adam_8bit(
        block_size=2, min_8bit_size=0, floor=floor
      )
      updates, _ = _run(tx, grads)
      largest.append(max(float(jnp.max(jnp.abs(u))) for u in updates))
    self.assertLess(largest[0], 2)
    self.assertGreater(largest[1], 1e3)

  def test_map_and_symmetric(self):
    params = jnp.zeros((4, 64))
    init = lambda **options: transforms.scale_by_adam_8bit(
      min_8bit_size=0, block_size=64, **options
    ).init(params)
    self.assertEqual(init(map='linear').nu.codebook.kind, 'linear')
    self.assertTrue(init(symmetric=True).mu.codebook.symmetric)

  def test_state_is_under_27_percent(self):
    params = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    size = lambda tx: sum(
      x.size * x.dtype.itemsize
      for x in jax.tree.leaves(jax.eval_shape(tx.init, params))
      if x.ndim
    )
    for block_size, share in ((256, 2.03125), (2048, 2.0039)):
      tx = transforms.scale_by_adam_8bit(block_size=min(block_size, 1024))
      share = share if block_size <= 1024 else 2 * (1 + 4 / 1024)
      self.assertEqual(size(tx), share * 2**20)
      self.assertLess(size(tx), 0.27 * size(optax.scale_by_adam()))

  @parameterized.parameters(
    ({'block_size': 0}, 'block_size must be'),
    ({'b1': 1.0}, r'b1 must lie in \[0, 1\)'),
    ({'b2': -0.1}, r'b2 must lie in \[0, 1\)'),
    ({'eps': 0.0}, 'eps must be finite and above 0'),
    ({'map': 'tree'}, 'map must be one of'),
    ({'min_8bit_size': -1}, 'min_8bit_size must be at least 0'),
    ({'rounding': 'stochastic'}, 'key must be given'),
  )
  def test_refuses(self, options, words):
    with self.assertRaisesRegex(ValueError, words):
      transforms.scale_by_adam_8bit(**options)

  def test_refuses_integers(self):
    params = {'count': jnp.zeros(4, jnp.int32)}
    with self.assertRaisesRegex(ValueError, r"\['count'\] must be of real"):
      transforms.scale_by_adam_8bit().init(params)


def _round_trip(nu):
  coded = blockwise.quantize(nu, blockwise.UNSIGNED, block_size=4)
  return blockwise.dequantize(coded)


class ShardingTest(parameterized.TestCase):
  """Each device codes what it has, and tells nobody."""

  def test_equals_one_device_and_does_not_communicate(self):
    self._check_devices(('data', 'fsdp'))

  @parameterized.parameters((('fsdp',),), ((None, 'fsdp'),))
  @pytest.mark.slow
  def test_equals_one_device_and_does_not_communicate_elsewhere(self, axes):
    self._check_devices(axes)

  def _check_devices(self, axes):
    tx = transforms.scale_by_adam_8bit(
      block_size=16, min_8bit_size=0, strict_shards=True
    )
    grads = _grads((8, 128), 3)
    want, want_state = _run(tx, grads)
    mesh = mesh_lib.make(data=2, fsdp=4)
    placed = mesh_lib.place(grads, mesh, jax.P(*axes))
    got, state = _run(tx, placed)
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-6)
    np.testing.assert_array_equal(state.mu.codes, want_state.mu.codes)
    np.testing.assert_array_equal(state.nu.codes, want_state.nu.codes)
    codes = state.mu.codes.sharding
    self.assertTrue(codes.is_equivalent_to(placed[0].sharding, 2))
    text = jax.jit(tx.update).lower(placed[0], state).compile().as_text()
    self.assertEmpty(re.findall(_COLLECTIVES, text))

  def test_in_shard_map_parts_are_padded(self):
    tx = transforms.scale_by_adam_8bit(block_size=16, min_8bit_size=0)
    grads = _grads((8, 24), 2)
    mesh = mesh_lib.make(fsdp=8)

    def run(*grads):
      return _run(tx, grads)[0][-1]

    split = jax.P('fsdp')
    got = jax.jit(
      jax.shard_map(run, mesh=mesh, in_specs=(split,) * 2, out_specs=split)
    )
    # Rows of their own are what a device has.
    want = [_run(tx, [g[i] for g in grads])[0][-1] for i in range(8)]
    np.testing.assert_allclose(got(*grads), jnp.stack(want), rtol=1e-5)

  def test_strict_shards(self):
    tx = transforms.scale_by_adam_8bit(
      block_size=64, min_8bit_size=0, strict_shards=True
    )
    mesh = mesh_lib.make(fsdp=8)
    params = mesh_lib.place(jnp.zeros((8, 128)), mesh, jax.P(None, 'fsdp'))
    with self.assertRaisesRegex(ValueError, 'multiple of block_size=64'):
      tx.init(params)


class QuantizeStateTest(parameterized.TestCase):
  def test_adam_is_8bit_adam(self):
    grads = _grads((8, 64), 5)
    options = {'block_size': 16, 'min_8bit_size': 0}
    got, state = _run(
      transforms.quantize_state(optax.scale_by_adam(), **options), grads
    )
    want, want_state = _run(transforms.scale_by_adam_8bit(**options), grads)
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-4, atol=1e-5)
    inner = state.inner_state
    self.assertEqual(inner.mu.codebook, blockwise.SIGNED)
    self.assertEqual(inner.nu.codebook, blockwise.UNSIGNED)
    same = np.asarray(inner.nu.codes == want_state.nu.codes)
    self.assertGreater(same.mean(), 0.98)

  @parameterized.named_parameters(
    ('momentum', functools.partial(optax.sgd, 0.1, momentum=0.9), 1),
    ('rmsprop', functools.partial(optax.rmsprop, 0.1), 1),
    ('adagrad', functools.partial(optax.adagrad, 0.1), 1),
    ('lion', functools.partial(optax.lion, 0.1), 1),
    ('amsgrad', functools.partial(optax.amsgrad, 0.1), 3),
    ('lars', functools.partial(transforms.lars, 0.1), 1),
  )
  @pytest.mark.slow
  def test_takes_any_optimiser(self, make, count):
    """Large arrays are coded, and the direction is nearly the same."""
    params = {'large': jnp.ones((16, 64)), 'small': jnp.ones(4)}
    grads = jax.tree.map(jnp.sin, params)
    with jax.numpy_dtype_promotion('standard'):
      tx = transforms.quantize_state(make(), min_8bit_size=1024, block_size=64)
      state, inner = tx.init(params), make().init(params)
      for _ in range(3):
        got, state = tx.update(grads, state, params)
        want, inner = make().update(grads, inner, params)
    is_coded = lambda x: isinstance(x, blockwise.Quantized)
    leaves = jax.tree.leaves(state, is_leaf=is_coded)
    self.assertEqual(sum(map(is_coded, leaves)), count)
    for name in params:
      np.testing.assert_allclose(got[name], want[name], rtol=0.02)

  def test_keep32_mask_and_fields(self):
    params = {'table': jnp.ones((8, 64)), 'rest': jnp.ones((8, 64))}
    tx = transforms.quantize_state(
      optax.adam(0.1),
      min_8bit_size=0,
      keep32_mask={'table': True, 'rest': False},
      unsigned_fields=('mu',),
    )
    adam = jax.eval_shape(tx.init, params).inner_state[0]
    self.assertEqual(adam.mu['table'].dtype, jnp.float32)
    self.assertFalse(adam.mu['rest'].codebook.signed)
    self.assertTrue(adam.nu['rest'].codebook.signed)

  @pytest.mark.slow
  def test_checkpoint_knows_its_map(self):
    """Other numbers, or other blocks, are no continuation."""
    make = lambda **options: transforms.quantize_state(
      optax.trace(0.9), min_8bit_size=0, **{'block_size': 16} | options
    )
    (grad,) = _grads((8, 64), 1)
    _, state = _run(make(), [grad])
    path = pathlib.Path(self.create_tempdir().full_path, 'state')
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, state)
      checkpointer.wait_until_finished()
      again = checkpointer.restore(path, make().init(grad))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # A checkpoint is found by names and shapes.
    stored = lambda state: {
      jax.tree_util.keystr(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for options in ({'map': 'linear'}, {'block_size': 32}):
      self.assertNotEqual(stored(make(**options).init(grad)), stored(state))
