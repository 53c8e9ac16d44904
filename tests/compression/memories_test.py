"""What memories feed back, what keeps them bounded, and what does not."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import compression
from emc2.compression import (
  compressor,
  identity,
  low_rank,
  memories,
  quantize,
  sketch,
  sparse,
)

SHAPE = (5, 12)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(code, memory, gradients, key):
  """What is sent of gradients (T, n, m), and the states of the memory."""
  shape, dtype = gradients.shape[1:], gradients.dtype
  of_code, of_memory, steps = jax.random.split(key, 3)

  def step(carry, inputs):
    state, kept = carry
    gradient, key = inputs
    carried = memory.carry(kept, gradient)
    done = compression.reduce(code, [state], [carried], [key])
    sent = done.sent[0]
    kept = memory.write(kept, carried, sent, gradient, key)
    return (done.states[0], kept), (sent, kept)

  start = (
    code.init(shape, dtype, of_code),
    memory.begin(shape, dtype, of_memory),
  )
  # The types that a step returns, which codes with draws have after it.
  keys = jax.random.split(steps, len(gradients))
  return jax.lax.scan(step, start, (gradients, keys))[1]


def _gradients(steps=20, shape=SHAPE, dtype=np.float64):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(steps, *shape)), dtype)


def _drop() -> compressor.Compressor:
  """A code that keeps nothing."""
  return compressor.Compressor(
    name='nothing',
    compress=lambda state, x, key: ((), state),
    decompress=lambda state, payload, like: jnp.zeros(like.shape, like.dtype),
    bits=lambda shape: 0,
  )


class IdentitiesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(
    (sparse.block_k(fraction=0.1),), (low_rank.power_sgd(1),)
  )
  def test_sketch_holds_the_sketch_of_the_sum(self, code):
    memory, gradients = memories.sketched(0.5, 0.6), _gradients(300)
    key = jax.random.key(0)
    sent, kept = _run(code, memory, gradients, key)
    lost = np.sum(np.asarray(gradients - sent), axis=0)
    hashes = jax.tree.map(lambda x: np.asarray(x[-1]), kept.hashes)
    want = np.zeros((5, 6))
    for j, (bucket, sign) in enumerate(zip(*hashes, strict=True)):
      want[:, bucket] += sign * lost[:, j]
    np.testing.assert_allclose(kept.table[-1], want, atol=1e-11)

  @parameterized.parameters(
    (memories.coded(identity.identity()),),
    (memories.coded(sparse.top_k(fraction=1.0)),),
    (memories.partial(0.0),),
    (memories.two_level(sparse.top_k(60), _drop()),),
    (memories.sketched(1.0, 0.0, hashing='balanced'),),
  )
  @pytest.mark.slow
  def test_what_loses_nothing_is_the_full_memory(self, memory):
    code, gradients = sparse.top_k(4), _gradients()
    want, _ = _run(code, memories.full(), gradients, jax.random.key(0))
    got, _ = _run(code, memory, gradients, jax.random.key(0))
    np.testing.assert_allclose(got, want, atol=1e-12)

  @pytest.mark.slow
  def test_first_level_loses_what_the_second_keeps(self):
    first, code, gradients = sparse.top_k(6), sparse.top_k(4), _gradients()
    run = functools.partial(_run, code, key=jax.random.key(0))
    plain, _ = run(memories.coded(first), gradients=gradients)
    dropped = memories.two_level(first, _drop())
    np.testing.assert_array_equal(run(dropped, gradients=gradients)[0], plain)
    kept = memories.two_level(first, identity.identity())
    sent, state = run(kept, gradients=gradients)
    like = jax.ShapeDtypeStruct(SHAPE, jnp.float64)
    last = jax.tree.map(lambda x: x[-1], state)
    held = first.decompress(last.first.state, last.first.payload, like)
    held = held + last.second.payload
    np.testing.assert_allclose(sent.sum(0) + held, gradients.sum(0), atol=1e-12)

  def test_largest_entries_as_memory(self):
    """hEFSGD, against its loop."""
    memory = memories.coded(sparse.top_k(fraction=0.2))
    gradients = _gradients(5)
    sent, _ = _run(sparse.top_k(4), memory, gradients, jax.random.key(0))

    def top(x, k):
      flat = np.zeros(x.size)
      where = np.argsort(-np.abs(x.reshape(-1)))[:k]
      flat[where] = x.reshape(-1)[where]
      return flat.reshape(x.shape)

    kept = np.zeros(SHAPE)
    for got, gradient in zip(sent, np.asarray(gradients), strict=True):
      carried = gradient + kept
      want = top(carried, 4)
      kept = top(carried - want, 12)
      np.testing.assert_allclose(got, want, atol=1e-12)

  def test_dtype_of_the_table(self):
    memory = memories.sketched(0.5, 0.5, dtype=jnp.float16)
    sent, kept = _run(sparse.top_k(4), memory, _gradients(5), jax.random.key(0))
    self.assertEqual(kept.table.dtype, jnp.float16)
    self.assertEqual(sent.dtype, jnp.float64)
    self.assertEqual(memory.nbytes(SHAPE), 2 * 5 * 6)

  @parameterized.parameters(
    (memories.none(), 0),
    (memories.full(), 4 * 60),
    (memories.partial(), 4 * 60),
    (memories.sketched(0.5), 4 * 5 * 6),
    (memories.coded(quantize.cast(jnp.bfloat16)), 2 * 60),
    (memories.coded(sparse.block_k(12)), 4 * 12),
    (
      memories.two_level(sparse.block_k(12), sparse.block_k(6)),
      4 * (12 + 6),
    ),
  )
  def test_bytes(self, memory, want):
    self.assertEqual(memory.nbytes(SHAPE), want)


class StabilityTest(parameterized.TestCase):
  @parameterized.parameters(
    # Load, retention, whether the sketch of a projection stays bounded.
    (4, 0.6, True),
    (4, 0.4, False),
  )
  def test_rule(self, load, retention, stable):
    self._check_rule(load, retention, stable)

  @parameterized.parameters((2, 0.1, True), (8, 0.76, True), (8, 0.7, False))
  @pytest.mark.slow
  def test_rule_elsewhere(self, load, retention, stable):
    self._check_rule(load, retention, stable)

  def _check_rule(self, load, retention, stable):
    """(1 - retention) times the largest load must not be above 2."""
    make = functools.partial(
      memories.sketched, 1 / load, retention, hashing='balanced'
    )
    shape = (2, 64)
    zeros = jnp.zeros((60, *shape))
    if stable:
      memory = make()
    else:
      with self.assertWarnsRegex(UserWarning, 'retention must be at least'):
        make().begin(shape, jnp.float32, jax.random.key(0))
      memory = make()

    @jax.jit
    def largest(key):
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        state = memory.begin(shape, jnp.float32, key)
      state = state._replace(table=jnp.ones_like(state.table))

      def step(state, gradient):
        # The code sends all, so that the error of the rule is all there is.
        carried = memory.carry(state, gradient)
        return memory.write(state, carried, carried, gradient, key), ()

      return jnp.max(jnp.abs(jax.lax.scan(step, state, zeros)[0].table))

    size = largest(jax.random.key(0))
    if stable:
      self.assertLess(size, 1.01)
    else:
      self.assertGreater(size, 1e2)

  def test_warns_of_uniform_hashes_that_are_known(self):
    memory = memories.sketched(0.05, 0.5)
    begin = lambda key: memory.begin((2, 200), jnp.float32, key)
    with self.assertWarnsRegex(UserWarning, 'smaller buckets'):
      begin(jax.random.key(0))
    jax.jit(begin)(jax.random.key(0))

  @pytest.mark.slow
  def test_sketching_again_diverges(self):
    """Section 5.5: increments converge where sketches of queries blow up."""
    size, workers, steps = 1000, 4, 400
    curvature = jnp.linspace(0.1, 1.0, size)[None]
    code = sparse.block_k(fraction=0.1)

    @functools.partial(jax.jit, static_argnums=0)
    def energies(memory, key):
      of_memory, of_start, of_steps = jax.random.split(key, 3)
      begin = memory.begin(curvature.shape, jnp.float32, of_memory)
      start = jax.random.normal(of_start, curvature.shape)
      kept = jax.tree.map(lambda x: jnp.stack([x] * workers), begin)

      def step(carry, key):
        x, kept = carry
        noise = jax.random.normal(key, (workers, *x.shape))
        gradients = curvature[None] * x[None] + 0.01 * noise

        def work(kept, gradient):
          carried = memory.carry(kept, gradient)
          state, done_key = code.init(x.shape, x.dtype, key), key
          done = compression.reduce(code, [state], [carried], [done_key])
          sent = done.sent[0]
          return sent, memory.write(kept, carried, sent, gradient, key)

        sent, kept = jax.vmap(work)(kept, gradients)
        energy = jnp.sum((curvature * x) ** 2)
        return (x - 0.05 * sent.mean(0), kept), energy

      keys = jax.random.split(of_steps, steps)
      return jax.lax.scan(step, (start, kept), keys)[1]

    key = jax.random.key(0)
    again = energies(memories.coded(sketch.count_sketch(0.2)), key)
    self.assertFalse(again[10] < 1e6 * again[0])
    for memory in (memories.full(), memories.sketched(0.2, 0.9)):
      found = energies(memory, key)
      self.assertLess(found[-1], 0.1 * found[0])

  @pytest.mark.slow
  def test_threshold_of_the_plain_form(self):
    """A code of variance theta needs theta < delta / (1 - delta)."""
    theta = 1.0
    noisy = compressor.Compressor(
      name='noisy',
      compress=lambda state, x, key: (
        x
        * (1 + jnp.sqrt(theta) * jax.random.rademacher(key, x.shape, x.dtype)),
        state,
      ),
      decompress=lambda state, payload, like: payload,
      bits=lambda shape: 0,
    )
    gradients = jnp.ones((200, 1, 200))
    for fraction, bounded in ((0.1, False), (0.9, True)):
      code = sparse.block_k(fraction=fraction)
      _, kept = _run(code, memories.coded(noisy), gradients, jax.random.key(0))
      energy = np.sum(np.asarray(kept.payload[-1], np.float64) ** 2)
      self.assertEqual(bool(energy < 1e4), bounded, msg=f'{energy}')


class RefusalsTest(parameterized.TestCase):
  @parameterized.parameters(
    (memories.partial, {'retention': 1.0}, 'retention must be in'),
    (memories.partial, {'retention': -0.1}, 'retention must be in'),
    (memories.sketched, {'retention': 1.0}, 'retention must be in'),
    (memories.sketched, {'size': 0.0}, 'size must be in'),
    (memories.sketched, {'hashing': 'x'}, 'hashing must be one of'),
  )
  def test_refuses(self, make, options, message):
    with self.assertRaisesRegex(ValueError, message):
      make(**options)
