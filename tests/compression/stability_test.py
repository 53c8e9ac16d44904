"""What keeps a sketched memory bounded, with real codes and workers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import transforms
from emc2.compression import (
  identity,
  low_rank,
  memories,
  quantize,
  sign,
  sketch,
  sparse,
)

BLOCKS = sparse.block_k(fraction=0.1)
PROJECTIONS = {
  'block_k': sparse.block_k(fraction=0.75),
  'top_k': sparse.top_k(fraction=0.5),
  'power_sgd': low_rank.power_sgd(1),
}


def _sketched_again(size, retention):
  """What `memories.sketched` must not be: it sketches what it queried."""
  code = sketch.count_sketch(size)
  memory = memories.sketched(size, retention)

  def write(state, carried, sent, gradient, key):
    like = jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
    held = code.decompress(state.hashes, state.table, like)
    table, _ = code.compress(state.hashes, held + gradient - sent, key)
    return state._replace(table=table)

  return memory._replace(write=write)


class ProjectionsTest(parameterized.TestCase):
  """Of nothing but what a sketch holds, behind codes that lose a part of it."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(0.4, 0.5)
  def test_rule(self, retention):
    """(1 - retention) times the largest load must not be above 2."""
    self._check_rule('power_sgd', retention)

  @parameterized.product(code=list(PROJECTIONS), retention=(0.4, 0.5, 0.55))
  @pytest.mark.slow
  def test_rule_of_all(self, code, retention):
    self._check_rule(code, retention)

  def _check_rule(self, code, retention):
    shape, load = (4, 32), 4
    tx = transforms.compressed_mean(
      PROJECTIONS[code],
      memory=memories.sketched(1 / load, retention, hashing='balanced'),
      axis_name=None,
      codes_leaf=lambda leaf: True,
    )

    @jax.jit
    def norms(key):
      zeros = jnp.zeros(shape, jnp.float64)
      state = tx.init(zeros)
      table = jax.random.normal(key, state.memories.table.shape, jnp.float64)
      state = state._replace(memories=state.memories._replace(table=table))

      def step(state, _):
        _, state = tx.update(zeros, state)
        return state, jnp.linalg.norm(state.memories.table)

      sizes = jax.lax.scan(step, state, length=100)[1]
      return jnp.concatenate([jnp.linalg.norm(table)[None], sizes])

    if retention < 0.5:
      with self.assertWarnsRegex(UserWarning, 'retention must be at least 0.5'):
        found = norms(jax.random.key(0))
      self.assertGreater(found[-1], 1e3 * found[0])
      return
    # At the limit full buckets turn their signs, and keep their sizes.
    found = norms(jax.random.key(0))
    np.testing.assert_array_less(found[1:] / found[:-1], 1 + 1e-12)
    if retention > 0.5:
      self.assertLess(found[-1], 0.99 * found[0])

  def test_spectrum(self):
    """A step is symmetric, of eigenvalues in [1 - gain max load, 1]."""
    shape, size, gain = (2, 24), 0.25, 0.3
    memory = memories.sketched(size, 1 - gain)
    tx = transforms.compressed_mean(
      PROJECTIONS['block_k'], memory=memory, axis_name=None
    )

    @jax.jit
    def matrix():
      zeros = jnp.zeros(shape, jnp.float64)
      state = tx.init(zeros)
      table = state.memories.table

      def step(flat):
        kept = state.memories._replace(table=flat.reshape(table.shape))
        _, after = tx.update(zeros, state._replace(memories=kept))
        return after.memories.table.reshape(-1)

      basis = jnp.eye(table.size, dtype=jnp.float64)
      return jax.vmap(step)(basis), state.memories.hashes.buckets

    found, buckets = matrix()
    np.testing.assert_allclose(found, found.T, atol=1e-15)
    values = np.linalg.eigvalsh(found)
    least = 1 - gain * np.bincount(buckets[0]).max()
    self.assertGreaterEqual(values[0], least - 1e-12)
    self.assertLessEqual(values[-1], 1 + 1e-12)
    self.assertLess(values[0], 0.8)


class QuadraticTest(parameterized.TestCase):
  """Four workers' noisy gradients of a quadratic function, in 1000 dimensions.

  The noise is such that plain SGD comes to 1.3e-4 of the energy of the first
  gradient.
  """

  def _energies(self, code, memory, steps, seed=0):
    """Of the gradients at each step, in parts of that of the first."""
    size, workers, noise, rate = 1000, 4, 0.118, 0.05
    curvature = jnp.linspace(0.1, 1.0, size)[None]
    tx = transforms.compressed_mean(
      code, memory=memory, skip_nonfinite=False, codes_leaf=lambda leaf: True
    )

    @jax.jit
    def run(key):
      of_start, of_steps = jax.random.split(key)
      start = jax.random.normal(of_start, curvature.shape)
      state = tx.init(start)
      state = jax.tree.map(lambda x: jnp.stack([x] * workers), state)

      def step(carry, key):
        x, state = carry
        gradient = curvature * x
        noisy = gradient[None] + noise * jax.random.normal(
          key, (workers, *x.shape)
        )
        means, state = jax.vmap(tx.update, axis_name='data')(noisy, state)
        return (x - rate * means[0], state), jnp.sum(gradient**2)

      keys = jax.random.split(of_steps, steps)
      return jax.lax.scan(step, (start, state), keys)[1]

    found = np.asarray(run(jax.random.key(seed)), np.float64)
    return found / found[0]

  def _last(self, code, memory):
    return self._energies(code, memory, 3000)[-500:].mean()

  @pytest.mark.slow
  def test_what_loses_little_comes_near_to_no_code(self):
    plain = self._last(identity.identity(), memories.none())
    full = self._last(BLOCKS, memories.full())
    eight_bits = self._last(BLOCKS, memories.coded(quantize.blocks_8bit()))
    unbiased = sparse.block_k(fraction=0.1, scaled=True)
    unbiased = self._last(unbiased, memories.none())
    np.testing.assert_allclose(plain, 1.3e-4, rtol=0.1)
    np.testing.assert_allclose(full, 1.9e-4, rtol=0.25)
    np.testing.assert_allclose(eight_bits, full, rtol=0.03)
    np.testing.assert_allclose(unbiased, 1.6e-3, rtol=0.1)

  @parameterized.parameters(0.5, 0.9, 0.99)
  @pytest.mark.slow
  def test_sums_of_sketches_converge(self, retention):
    found = self._last(BLOCKS, memories.sketched(0.2, retention))
    self.assertLess(found, 1e-3)

  @parameterized.parameters(
    (memories.coded(sketch.count_sketch(0.2)), 10),
    (_sketched_again(0.2, 0.9), 10),
    (memories.sketched(0.2, 0.0), 2000),
  )
  @pytest.mark.slow
  def test_diverges(self, memory, steps):
    found = self._energies(BLOCKS, memory, steps + 1)
    # What overflowed is no number.
    self.assertFalse(found.max() < 1e6)


class WorkersTest(parameterized.TestCase):
  """On eight devices."""

  def _run(self, code, memory, steps=4, dtype=np.float32):
    """What each worker got, (steps, workers, n, m), and their memories."""
    mesh, shape = mesh_lib.make(data=8), (6, 16)
    tx = transforms.compressed_mean(
      code, memory=memory, codes_leaf=lambda leaf: True
    )
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(steps, 8, *shape)).astype(dtype)
    specs = transforms.compressed_mean_specs()
    params = jnp.zeros(shape, dtype)
    map_ = functools.partial(jax.shard_map, mesh=mesh)
    init = jax.jit(map_(tx.init, in_specs=(jax.P(),), out_specs=specs))

    def step(state, gradient):
      mean, state = tx.update(gradient[0], state)
      return state, jax.lax.pcast(mean, 'data', to='varying')[None]

    each = jax.P(None, 'data')
    run = map_(
      lambda state, gradients: jax.lax.scan(step, state, gradients),
      in_specs=(specs, each),
      out_specs=(specs, each),
    )
    state, own = jax.jit(run)(init(params), gradients)
    return own, state.memories

  @parameterized.parameters((low_rank.power_sgd(2),), (sparse.top_k(5),))
  @pytest.mark.slow
  def test_all_devices_get_the_same_bits(self, code):
    self._check_bits(code)

  @parameterized.parameters(
    (sparse.block_k(fraction=0.25),), (sign.scaled_sign(),), (quantize.qsgd(4),)
  )
  @pytest.mark.slow
  def test_all_devices_get_the_same_bits_of_more(self, code):
    self._check_bits(code)

  def _check_bits(self, code):
    own, _ = self._run(code, memories.sketched(0.5, 0.9))

    @functools.partial(
      jax.shard_map,
      mesh=own.sharding.mesh,
      in_specs=jax.P(None, 'data'),
      out_specs=jax.P(),
    )
    def differences(own):
      is_first = jax.lax.axis_index('data') == 0
      first = jax.lax.psum(jnp.where(is_first, own, 0), 'data')
      return jax.lax.psum(jnp.abs(own - first), 'data')

    # Apart from what made them: in one program it may be made twice.
    np.testing.assert_array_equal(jax.jit(differences)(own), 0)
    self.assertGreater(np.abs(own).max(), 0.1)

  @parameterized.parameters(
    (sparse.block_k(fraction=0.25),), (low_rank.power_sgd(1),)
  )
  @pytest.mark.slow
  def test_a_bucket_for_each_column_is_the_full_memory(self, code):
    self.enterContext(jax.enable_x64(True))
    run = functools.partial(self._run, code, steps=10, dtype=np.float64)
    want, residual = run(memories.full())
    got, kept = run(memories.sketched(1.0, 0.0, hashing='balanced'))
    np.testing.assert_allclose(got, want, atol=1e-12)
    hashes = jax.tree.map(lambda x: np.asarray(x[0]), kept.hashes)
    self.assertLen(set(hashes.buckets.tolist()), 16)
    table = np.asarray(kept.table)[..., hashes.buckets] * hashes.signs
    np.testing.assert_allclose(table, residual, atol=1e-12)
