"""Every code of the tables: its bits, its flags, its constants, its laws."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh
from emc2.compression import (
  compose,
  compressor,
  identity,
  quantize,
  sign,
  sparse,
)

SHAPE = (5, 12)
DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Row:
  """What the papers say of a code of 60 entries.

  Attributes:
    make: The code.
    floats: How many travel.
    planes: Bits of each packed code.
    packed: How many codes are packed.
    bits: Others that travel.
    delta: The constant of contraction.
    omega: The constant of variance.
    allreducible: Whether payloads add up.
    homogeneous: Whether C(a x) = a C(x).
  """

  make: Callable[[], compressor.Compressor]
  floats: int = 0
  planes: int = 0
  packed: int = 60
  bits: int = 0
  delta: float | None = None
  omega: float | None = None
  allreducible: bool = False
  homogeneous: bool = True


# Of 3 levels, on all entries and on the 6 that are kept.
_BETA = 60**0.5 / 3
_BETA_OF_KEPT = 6 / 9
_own = functools.partial(sparse.random_k, shared=False)

ROWS = {
  'identity': Row(identity.identity, 60, delta=1, omega=0, allreducible=True),
  'top_k': Row(lambda: sparse.top_k(6), 6, 6, 6, delta=0.1),
  'random_k': Row(lambda: sparse.random_k(6), 6, delta=0.1, allreducible=True),
  'random_k_scaled': Row(
    lambda: sparse.random_k(6, scaled=True), 6, omega=9, allreducible=True
  ),
  'random_k_most': Row(
    lambda: sparse.random_k(48, scaled=True),
    floats=48,
    delta=0.75,
    omega=0.25,
    allreducible=True,
  ),
  'random_k_own': Row(lambda: _own(fraction=0.1), 6, 6, 6, delta=0.1),
  'block_k': Row(lambda: sparse.block_k(6), 6, delta=0.1, allreducible=True),
  'block_k_scaled': Row(
    lambda: sparse.block_k(fraction=0.1, scaled=True),
    floats=6,
    omega=9,
    allreducible=True,
  ),
  'sign': Row(sign.scaled_sign, 1, 1, delta=1 / 60),
  'sign_3_norm': Row(
    lambda: sign.scaled_sign(norm=3), 1, 1, delta=60 ** (2 / 3 - 2)
  ),
  'vote': Row(sign.majority_vote, planes=1, homogeneous=False),
  'qsgd': Row(lambda: quantize.qsgd(3), 1, 3, omega=_BETA),
  'qsgd_fine': Row(
    lambda: quantize.qsgd(15), 1, 5, delta=1 - 60 / 225, omega=60 / 225
  ),
  'qsgd_scaled': Row(
    lambda: quantize.qsgd(3, scaled=True), 1, 3, delta=1 / (1 + _BETA)
  ),
  'qsgd_as_coded': Row(
    lambda: quantize.qsgd(3, scaled=True, beta_rule='k_over_s2'),
    floats=1,
    planes=3,
    delta=1 / (1 + 60 / 9),
  ),
  'k_level': Row(lambda: quantize.k_level(3), 2, 2, omega=60 / 18),
  'rotated': Row(
    lambda: quantize.rotated(7), 2, 3, 64, delta=1 - 14 / 49, omega=14 / 49
  ),
  'bfloat16': Row(quantize.cast, bits=16 * 60, delta=1 - 2.0**-16),
  'float16': Row(
    lambda: quantize.cast(jnp.float16, allreducible=True),
    bits=16 * 60,
    delta=0,
    allreducible=True,
    homogeneous=False,
  ),
  'blocks_8bit': Row(quantize.blocks_8bit, 1, bits=8 * 60, delta=1 - 0.003215),
  'blocks_8bit_stochastic': Row(
    lambda: quantize.blocks_8bit(25, rounding='stochastic'),
    floats=3,
    bits=8 * 60,
    delta=1 - 0.0009307,
    omega=0.0009307,
  ),
  'quantized_top_k': Row(
    lambda: compose.quantized(sparse.top_k(6), 3),
    floats=1,
    planes=3 + 6,
    packed=6,
    delta=0.1 / (1 + _BETA_OF_KEPT),
  ),
  'quantized_top_k_unscaled': Row(
    lambda: compose.quantized(sparse.top_k(6), 3, scaled=False),
    floats=1,
    planes=3 + 6,
    packed=6,
    delta=0.1 * (1 - _BETA_OF_KEPT),
  ),
  'quantized_random_k': Row(
    lambda: compose.quantized(_own(6, scaled=True), 3, scaled=False),
    floats=1,
    planes=3 + 6,
    packed=6,
    omega=10 * (1 + _BETA_OF_KEPT) - 1,
  ),
  'signed_top_k': Row(
    lambda: compose.signed(sparse.top_k(6)), 1, 1 + 6, 6, delta=1 / 60
  ),
  'signed_block_k': Row(
    lambda: compose.signed(sparse.block_k(6), norm=4),
    floats=1,
    planes=1,
    packed=6,
    delta=6**-0.5 / 60,
  ),
  'top_k_in_bfloat16': Row(
    lambda: compose.composed(sparse.top_k(6), quantize.cast()),
    planes=6,
    packed=6,
    bits=16 * 6,
    delta=0.1 * (1 - 2.0**-16),
  ),
}


# One of each way to code.
QUICK = (
  'top_k',
  'random_k_scaled',
  'block_k_scaled',
  'sign',
  'qsgd',
  'k_level',
  'rotated',
  'blocks_8bit_stochastic',
  'quantized_random_k',
)


def _decoded(code, x, key):
  """What an array is after it has been sent."""
  of_state, of_code = jax.random.split(key)
  state = code.init(x.shape, x.dtype, of_state)
  payload, state = code.compress(state, x, of_code)
  return code.decompress(state, payload, jax.ShapeDtypeStruct.like(x))


@functools.cache
def _many(name):
  """Decodes one array under many keys."""
  code = ROWS[name].make()
  each = jax.vmap(functools.partial(_decoded, code), in_axes=(None, 0))
  return jax.jit(each)


def _keys(num=DRAWS):
  return jax.random.split(jax.random.key(0), num)


def _heavy():
  """A few entries carry most of the norm; float32."""
  rng = np.random.default_rng(0)
  return (rng.normal(size=SHAPE) ** 3).astype(np.float32)


class TableTest(parameterized.TestCase):
  @parameterized.parameters(*ROWS)
  def test_constants_bits_and_flags(self, name):
    row, code = ROWS[name], ROWS[name].make()
    bits = 32 * row.floats + row.bits
    self.assertEqual(code.bits(SHAPE), bits + row.planes * row.packed)
    words = -(-row.packed // 32)
    wire = compressor.wire_bits(code, SHAPE)
    self.assertEqual(wire, bits + row.planes * 32 * words)
    for found, want in [
      (code.delta(SHAPE), row.delta),
      (code.omega(SHAPE), row.omega),
    ]:
      if want is None:
        self.assertIsNone(found)
      else:
        self.assertAlmostEqual(found, want, places=6)
    self.assertEqual(code.allreducible, row.allreducible)
    self.assertEqual(code.unbiased, row.omega is not None)

  @parameterized.parameters(*QUICK)
  def test_laws(self, name):
    self._check_laws(name)
    self._check_scale_and_zeros(name)

  @parameterized.parameters(*(name for name in ROWS if name not in QUICK))
  @pytest.mark.slow
  def test_laws_of_all(self, name):
    self._check_laws(name)
    self._check_scale_and_zeros(name)

  def _check_laws(self, name):
    row, x = ROWS[name], _heavy()
    found = np.asarray(_many(name)(jnp.asarray(x), _keys()), np.float64)
    self.assertEqual(found.shape, (DRAWS, *SHAPE))
    size = np.sum(np.square(x, dtype=np.float64))
    lost = np.sum((found - x) ** 2, axis=(1, 2)) / size
    noise = 3 * np.std(lost) / DRAWS**0.5 + 1e-12
    if row.delta is not None:
      self.assertLessEqual(np.mean(lost), 1 - row.delta + noise)
    if row.omega is not None:
      self.assertLessEqual(np.mean(lost), row.omega + noise)
      # The mean of many draws loses less by as many.
      bias = np.sum((np.mean(found, axis=0) - x) ** 2) / size
      self.assertLessEqual(bias, 6 * np.mean(lost) / DRAWS + 1e-12)

  def _check_scale_and_zeros(self, name):
    x, decode = jnp.asarray(_heavy()), _many(name)
    once, scaled = decode(x, _keys()), decode(4 * x, _keys())
    if ROWS[name].homogeneous:
      np.testing.assert_array_equal(4 * once, scaled)
    zeros = decode(0 * x, _keys())
    want = 1 if name == 'vote' else 0
    np.testing.assert_array_equal(zeros, np.full(zeros.shape, want))

  @parameterized.parameters(
    'identity', 'sign', 'qsgd', 'k_level', 'rotated', 'blocks_8bit'
  )
  def test_one_entry(self, name):
    decode = jax.jit(functools.partial(_decoded, ROWS[name].make()))
    found = decode(jnp.float32(-3), jax.random.key(1))
    self.assertEqual(found, -3)

  @parameterized.parameters(
    sparse.top_k,
    sparse.random_k,
    _own,
    sparse.block_k,
    lambda fraction: compose.signed(sparse.top_k(fraction=fraction)),
  )
  def test_one_entry_of_one(self, make):
    code = make(fraction=0.1)
    decode = jax.jit(functools.partial(_decoded, code))
    found = decode(jnp.full((1, 1), -3.0), jax.random.key(1))
    np.testing.assert_array_equal(found, [[-3]])
    self.assertEqual(code.bits(()), 33 if 'sign' in code.name else 32)


class WorkersTest(parameterized.TestCase):
  def test_all_get_the_mean_of_what_each_sent(self):
    names = [
      'random_k_own',
      'rotated',
      'quantized_top_k',
    ]
    codes = [ROWS[name].make() for name in names]
    rows = np.random.default_rng(1).normal(size=(4, *SHAPE))
    rows = jnp.asarray(rows, jnp.float32)

    def run(rows, key):
      found = []
      for code in codes:
        state = code.init(SHAPE, rows.dtype, jax.random.fold_in(key, 1))
        reduced = compressor.reduce(code, [state], [rows[0]], [key], mesh.DATA)
        found.append((reduced.sent[0][None], reduced.mean[0], reduced.states))
      return found

    split, whole = jax.P(mesh.DATA), jax.P()
    found = jax.jit(
      jax.shard_map(
        run,
        mesh=mesh.make(jax.devices()[:4], data=4),
        in_specs=(split, whole),
        out_specs=[(split, whole, whole)] * len(codes),
      )
    )(rows, jax.random.key(2))
    for name, (sent, mean, _) in zip(names, found, strict=True):
      sent, mean = np.asarray(sent), np.asarray(mean)
      np.testing.assert_allclose(
        sent.mean(axis=0), mean, rtol=1e-5, atol=1e-5, err_msg=name
      )
      self.assertFalse(np.array_equal(sent[0], sent[1]), name)
