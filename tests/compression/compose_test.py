"""Composed codes: bits, errors and the algorithms that they reduce to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.compression import (
  compose,
  compressor,
  identity,
  quantize,
  sign,
  sparse,
)


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def _decoded(code, x, key):
  payload, state = code.compress(code.init(x.shape, x.dtype, key), x, key)
  return code.decompress(state, payload, jax.ShapeDtypeStruct.like(x))


class BitsTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda: sparse.top_k(40), 1680),
    (lambda: compose.quantized(sparse.top_k(40), 16), 672),
    (lambda: compose.signed(sparse.top_k(40)), 472),
    (identity.identity, 20800),
    (lambda: sparse.random_k(40), 1280),
    (lambda: sparse.random_k(40, shared=False), 1680),
    (lambda: compose.signed(sparse.random_k(40)), 72),
    (sign.scaled_sign, 682),
    (lambda: quantize.qsgd(16, scaled=True), 3932),
  )
  def test_of_650_entries(self, make, want):
    self.assertEqual(make().bits((65, 10)), want)


class QuantizedTest(parameterized.TestCase):
  @parameterized.parameters(
    (16, False, 0.598, 0.939),
    (16, True, 0.616, 0.928),
    (64, False, 0.565, 0.902),
    (64, True, 0.566, 0.902),
    (4, True, 0.838, 0.971),
  )
  def test_contraction(self, levels, scaled, want, bound):
    # By the law of a coin between two levels, summed exactly.
    code = compose.quantized(sparse.top_k(100), levels, scaled=scaled)
    beta = min(100 / levels**2, 10 / levels)
    lost = []
    for seed in range(20):
      x = _normal(1000, seed=seed)
      kept = np.sort(np.abs(x))[-100:]
      norm, energy = np.linalg.norm(kept), np.sum(kept**2)
      part = np.modf(levels * kept / norm)[0]
      variance = np.sum(part * (1 - part)) * (norm / levels) ** 2
      gain = 1 / (1 + beta) if scaled else 1
      error = (1 - gain) ** 2 * energy + gain**2 * variance
      lost.append((np.sum(x**2) - energy + error) / np.sum(x**2))
    self.assertAlmostEqual(np.mean(lost), want, delta=0.015)
    self.assertAlmostEqual(1 - code.delta((1000,)), bound, delta=1e-3)

  def test_what_is_no_contraction(self):
    code = compose.quantized(sparse.top_k(100), 4, scaled=False)
    with self.assertRaisesRegex(
      ValueError, 'beta < 1 .* 100 entries: beta = 2.5'
    ):
      code.init((1000,), jnp.float32, jax.random.key(0))
    # An unbiased code need not be one.
    own = sparse.random_k(100, shared=False, scaled=True)
    code = compose.quantized(own, 4, scaled=False)
    code.init((1000,), jnp.float32, jax.random.key(0))
    self.assertIsNone(code.delta((1000,)))
    self.assertAlmostEqual(code.omega((1000,)), 10 * 3.5 - 1)

  def test_rule_of_the_authors(self):
    codes = [
      compose.quantized(sparse.top_k(100), 5, beta_rule=rule)
      for rule in ('min', 'k_over_s2')
    ]
    found = [code.delta((1000,)) for code in codes]
    np.testing.assert_allclose(found, [0.1 / 3, 0.1 / 5])

  def test_levels_of_kept_entries(self):
    with jax.enable_x64(True):
      x = jnp.asarray(_normal(50))
      code = compose.quantized(sparse.top_k(10), 16)
      run = jax.jit(functools.partial(_decoded, code))
      found = np.asarray(run(x, jax.random.key(0)))
      kept = np.argsort(-np.abs(np.asarray(x)))[:10]
      norm = np.linalg.norm(np.asarray(x)[kept])
      counts = found * (1 + 10 / 256) * 16 / norm
      np.testing.assert_allclose(counts, np.round(counts), atol=1e-12)
      self.assertLess(np.max(np.abs(counts - x * 16 / norm)[kept]), 1)
      np.testing.assert_array_equal(np.delete(found, kept), 0)

  @parameterized.parameters(sparse.random_k, sparse.block_k)
  def test_refuses_one_draw_for_all(self, make):
    with self.assertRaisesRegex(ValueError, 'sparsifier must draw for each'):
      compose.quantized(make(3), 4)

  def test_refuses_what_is_not_sparse(self):
    code = compose.composed(quantize.cast(), sign.scaled_sign())
    with self.assertRaisesRegex(ValueError, 'must send sparse.Entries, got'):
      code.bits((3,))


class SignedTest(parameterized.TestCase):
  @parameterized.parameters((1, 0.577), (2, 0.918), (3, 0.960), (8, 0.983))
  def test_what_is_lost(self, norm, want):
    code = compose.signed(sparse.top_k(100), norm=norm)
    with jax.enable_x64(True):
      run = jax.jit(functools.partial(_decoded, code))
      lost = []
      for seed in range(10):
        x = _normal(1000, seed=seed)
        found = np.asarray(run(jnp.asarray(x), jax.random.key(0)))
        lost.append(np.sum((found - x) ** 2) / np.sum(x**2))
        kept = np.sort(np.abs(x))[-100:]
        size = np.sum(kept**norm) ** (1 / norm)
        exact = np.sum(x**2) - (2 * np.sum(kept) - size) * size / 100
        self.assertAlmostEqual(lost[-1] * np.sum(x**2) / exact, 1, places=12)
    self.assertAlmostEqual(np.mean(lost), want, delta=0.01)
    bound = 1 / 1000 if norm <= 2 else 100 ** (2 / norm - 1) / 1000
    self.assertAlmostEqual(code.delta((1000,)), bound, places=12)
    self.assertLessEqual(max(lost), 1 - bound)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'norm must be at least 1, got 0.5'):
      compose.signed(sparse.top_k(3), norm=0.5)
    with self.assertRaisesRegex(ValueError, 'must keep entries as they are'):
      compose.signed(sparse.random_k(3, scaled=True))


class ReductionsTest(parameterized.TestCase):
  """What error feedback with one worker is, by loops in NumPy."""

  def _feed_back(self, code, steps=12, size=30):
    """What is sent, and the memory after each step."""
    run = jax.jit(functools.partial(_decoded, code))
    memory, sent, memories = np.zeros(size), [], []
    for step in range(steps):
      carried = memory + _normal(size, seed=step)
      key = jax.random.fold_in(jax.random.key(0), step)
      sent.append(np.asarray(run(jnp.asarray(carried), key)))
      memory = carried - sent[-1]
      memories.append(memory)
    return np.array(sent), np.array(memories)

  def test_top_k_is_sgd_with_memory(self):
    with jax.enable_x64(True):
      sent, _ = self._feed_back(sparse.top_k(4))
    memory = np.zeros(30)
    for step in range(12):
      memory += _normal(30, seed=step)
      kept = np.argsort(-np.abs(memory), kind='stable')[:4]
      want = np.zeros(30)
      want[kept] = memory[kept]
      memory[kept] = 0
      np.testing.assert_allclose(sent[step], want, atol=1e-12)

  def test_all_entries_signed_is_sign_sgd(self):
    with jax.enable_x64(True):
      found, _ = self._feed_back(compose.signed(sparse.top_k(30)))
      want, _ = self._feed_back(sign.scaled_sign())
    np.testing.assert_allclose(found, want, rtol=1e-12)
    memory = np.zeros(30)
    for step in range(12):
      memory += _normal(30, seed=step)
      sent = np.mean(np.abs(memory)) * np.sign(memory)
      np.testing.assert_allclose(found[step], sent, rtol=1e-12)
      memory -= sent

  @parameterized.parameters(
    identity.identity,
    lambda: sparse.top_k(30),
    lambda: sparse.block_k(fraction=1.0),
  )
  def test_what_keeps_all_has_no_memory(self, make):
    with jax.enable_x64(True):
      _, memories = self._feed_back(make())
    np.testing.assert_array_equal(memories, np.zeros((12, 30)))

  @parameterized.parameters(
    (lambda: sparse.top_k(4), True),
    (lambda: sparse.block_k(4), True),
    (lambda: compose.quantized(sparse.top_k(4), 16), False),
    (lambda: compose.signed(sparse.top_k(4)), False),
  )
  def test_memory_is_what_was_not_sent(self, make, plain):
    with jax.enable_x64(True):
      sent, memories = self._feed_back(make())
    total = sum(_normal(30, seed=step) for step in range(12))
    np.testing.assert_allclose(
      np.sum(sent, axis=0) + memories[-1], total, atol=1e-12
    )
    # A plain sparse code leaves nothing of what it keeps.
    kept = sent[-1] != 0
    self.assertEqual(np.sum(kept), 4)
    self.assertEqual(np.all(memories[-1][kept] == 0), plain)

  def test_memory_stays_below_its_bound(self):
    _, memories = self._feed_back(sparse.top_k(6), steps=30)
    gradients = [_normal(30, seed=step) for step in range(30)]
    bound = 2 * 0.8 * 1.8 / 0.2**2 * np.max(np.sum(np.square(gradients), 1))
    self.assertLess(np.max(np.sum(memories**2, axis=1)), bound)


class WorkersTest(parameterized.TestCase):
  def test_added_in_one_pass(self):
    code = compose.quantized(sparse.top_k(3), 4)
    rows = jnp.asarray(_normal(4, 2, 9), jnp.float32)
    like = jax.ShapeDtypeStruct((2, 9), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    state = code.init(like.shape, like.dtype, keys[0])
    compress = lambda x, key: code.compress(state, x, key)[0]
    decode = lambda payload: code.decompress(state, payload, like)

    @jax.jit
    def run(rows, keys):
      payloads = jax.vmap(compress)(rows, keys)
      each = jax.vmap(decode)(payloads)
      return code.accumulate(state, payloads, like), jnp.sum(each, axis=0)

    found, want = run(rows, keys)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)

  def test_names_and_flags(self):
    code = compose.quantized(sparse.top_k(3), 4)
    self.assertEqual(code.name, 'top-k, QSGD, 4 levels, scaled')
    self.assertFalse(code.shared_key)
    self.assertTrue(compose.signed(sparse.block_k(3)).shared_key)
    self.assertIsInstance(code, compressor.Compressor)
