"""Tests of the all-pairs energies: the entrance and the plain JAX reference."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.test_util import check_grads

from emc2.kernels import riesz
from emc2.kernels.riesz import reference
from emc2.kernels.riesz.specs import SPECS

EXPONENTS = (0.0, 1.0, 3.0)
OTHERS = (0.5, 2.0, 12.0)


def oracle(rows, columns, exponent):
  """Potentials and gradients of each row by a loop, in float64."""
  rows = np.asarray(rows, np.float64)
  points = rows if columns is None else np.asarray(columns, np.float64)
  potential, gradient = np.zeros(len(rows)), np.zeros_like(rows)
  for i, x in enumerate(rows):
    others = points if columns is not None else np.delete(points, i, axis=0)
    d = x - others
    r = np.linalg.norm(d, axis=1)
    if exponent == 0:
      potential[i] = -np.log(r).sum()
      gradient[i] = -(d / r[:, None] ** 2).sum(axis=0)
    else:
      potential[i] = (r**-exponent).sum()
      force = exponent * d / r[:, None] ** (exponent + 2)
      gradient[i] = -force.sum(axis=0)
  return potential, gradient


def sphere(n, k, seed=0, dtype='float64'):
  """Random points, but none so close that others do not count."""
  rng = np.random.default_rng(seed)
  points = np.zeros((0, k))
  while len(points) < n:
    x = rng.normal(size=k)
    x /= np.linalg.norm(x)
    if not len(points) or np.linalg.norm(points - x, axis=1).min() > 0.5 / n:
      points = np.vstack([points, x])
  return points.astype(dtype)


def error(got, want):
  return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


class Float64TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))


class ForwardTest(Float64TestCase):
  @parameterized.product(exponent=EXPONENTS, shape=[(2, 2), (200, 3)])
  def test_among(self, exponent, shape):
    self._check_among(exponent, shape)

  @parameterized.product(exponent=OTHERS, shape=[(2, 2), (200, 3)])
  @pytest.mark.slow
  def test_among_elsewhere(self, exponent, shape):
    self._check_among(exponent, shape)

  def _check_among(self, exponent, shape):
    x = sphere(*shape)
    got = jax.jit(functools.partial(riesz.riesz, exponent=exponent))(x)
    potential, gradient = oracle(x, None, exponent)
    self.assertLess(error(got.potential, potential), 1e-13)
    # Sums of s / r^(s + 2) cancel; the nearest two are 0.001 apart.
    self.assertLess(error(got.gradient, gradient), 2e-12)

  @parameterized.product(exponent=(0.0, 1.0), dim=(4, 8, 9, 24))
  @pytest.mark.slow
  def test_dimensions(self, exponent, dim):
    x = sphere(130, dim)
    got = riesz.riesz(x, exponent=exponent)
    potential, gradient = oracle(x, None, exponent)
    self.assertLess(error(got.potential, potential), 1e-12)
    self.assertLess(error(got.gradient, gradient), 1e-12)

  @parameterized.product(exponent=(1.0,), sizes=[(5, 3), (1, 300)])
  def test_between(self, exponent, sizes):
    self._check_between(exponent, sizes)

  @parameterized.product(exponent=(0.0, 2.5), sizes=[(5, 3), (1, 300)])
  @pytest.mark.slow
  def test_between_elsewhere(self, exponent, sizes):
    self._check_between(exponent, sizes)

  def _check_between(self, exponent, sizes):
    n, m = sizes
    x = sphere(n + m, 3)
    got = riesz.riesz(x[:n], x[n:], exponent=exponent)
    potential, gradient = oracle(x[:n], x[n:], exponent)
    self.assertLess(error(got.potential, potential), 1e-13)
    self.assertLess(error(got.gradient, gradient), 1e-12)

  @parameterized.parameters(
    ('float32', 0.0, 3),
    ('float32', 1.0, 3),
    ('float32', 3.0, 10),
    ('bfloat16', 1.0, 3),
  )
  @pytest.mark.slow
  def test_lower_precision(self, dtype, exponent, dim):
    """Sums of differences: no worse than plain JAX, whatever the distances."""
    x = jnp.asarray(sphere(300, dim), dtype)
    got = riesz.riesz(x, exponent=exponent)
    self.assertEqual(got.potential.dtype, x.dtype)
    self.assertEqual(got.gradient.dtype, x.dtype)
    potential, gradient = oracle(x.astype('float64'), None, exponent)
    bound = 2e-6 if dtype == 'float32' else 2**-8
    self.assertLess(error(got.potential, potential), bound)
    self.assertLess(error(got.gradient, gradient), bound)

  @parameterized.parameters('float32', 'float64')
  @pytest.mark.slow
  def test_close_pair(self, dtype):
    """A pair at 1e-3 must not drown what the others give to it."""
    x = sphere(200, 3)
    x[1] = x[0] + 1e-3 * np.array([x[0, 1], -x[0, 0], 0])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    potential, gradient = oracle(x, None, 1.0)
    got = riesz.riesz(x, exponent=1.0)
    self.assertLess(error(got.potential, potential), 1e-6)
    self.assertLess(error(got.gradient, gradient), 1e-6)

  @parameterized.parameters(
    (0.0, 'float32'), (1.0, 'float32'), (1.0, 'float64')
  )
  @pytest.mark.slow
  def test_tile_size_does_not_matter(self, exponent, dtype):
    x = sphere(301, 3, dtype=dtype)
    potential, gradient = oracle(x, None, exponent)
    texts = set()
    for size in (7, 64, 2048):
      with mock.patch.object(
        reference, '_tile_size', lambda n, _, size=size: min(size, n)
      ):
        fn = jax.jit(lambda x: reference.forward(x, None, exponent))
        got = fn(x)
        texts.add(fn.lower(x).as_text())
      bound = 1e-12 if dtype == 'float64' else 1e-5
      self.assertLess(error(got[0], potential), bound)
      self.assertLess(error(got[1], gradient), bound)
    self.assertLen(texts, 3)

  @parameterized.parameters(1, 130)
  @pytest.mark.slow
  def test_batches(self, num):
    x = np.stack([sphere(20, 3, seed) for seed in range(num)])
    y = np.stack([sphere(11, 3, seed + 500) for seed in range(num)])
    for columns in (None, y):
      got = riesz.riesz(x, columns, exponent=1.0)
      for i in range(num):
        want = oracle(x[i], None if columns is None else y[i], 1.0)
        self.assertLess(error(got.potential[i], want[0]), 1e-12)
        self.assertLess(error(got.gradient[i], want[1]), 1e-12)

  @pytest.mark.slow
  def test_vmap_is_one_call_with_a_batch(self):
    x = np.stack([sphere(20, 3, seed) for seed in range(12)])
    call = functools.partial(riesz.riesz, exponent=1.0)
    twice = jax.vmap(jax.vmap(call))(x.reshape(3, 4, 20, 3))
    np.testing.assert_array_equal(
      twice.gradient.reshape(12, 20, 3), call(x).gradient
    )
    shared = jax.vmap(lambda y: riesz.riesz(x[0, :5], y, exponent=1.0))(x[1:])
    want = oracle(x[0, :5], x[4], 1.0)
    self.assertLess(error(shared.gradient[3], want[1]), 1e-12)
    seen = []
    forward = reference.forward

    def spy(rows, *rest):
      seen.append(rows.shape)
      return forward(rows, *rest)

    with mock.patch.object(reference, 'forward', spy):
      jax.vmap(functools.partial(call, implementation='xla'))(x)
    self.assertEqual(seen[-1], (12, 20, 3))


class MemoryTest(Float64TestCase):
  @parameterized.parameters('sphere_4000', 'sphere_20000_float64')
  def test_grows_as_n(self, name):
    """20,000 points in 1 GiB; here, in a few megabytes."""
    x, _ = SPECS[name].args()
    for fn in (
      functools.partial(riesz.riesz, exponent=1.0),
      jax.grad(lambda x: jnp.sum(riesz.riesz(x, exponent=1.0).potential)),
    ):
      memory = jax.jit(fn).lower(x).compile().memory_analysis()
      tiles = 12 * reference._TILE_ENTRIES * x.dtype.itemsize
      points = x.shape[0] * x.shape[1] * x.dtype.itemsize
      pairs = x.shape[0] ** 2 * x.dtype.itemsize
      self.assertLess(memory.temp_size_in_bytes, 16 * points + tiles)
      self.assertLess(memory.temp_size_in_bytes, pairs / 4)


class DerivativeTest(Float64TestCase):
  @parameterized.parameters((1.0, 3), (2.5, 9))
  @pytest.mark.slow
  def test_against_plain_jax(self, exponent, dim):
    self.check_against_plain_jax(exponent, dim)

  @parameterized.parameters((0.0, 3), (2.0, 2))
  @pytest.mark.slow
  def test_against_plain_jax_of_others(self, exponent, dim):
    self.check_against_plain_jax(exponent, dim)

  def check_against_plain_jax(self, exponent, dim):
    """Both derivatives."""
    x, v = sphere(13, dim), np.random.default_rng(1).normal(size=(13, dim))

    def plain(x):
      i, j = np.triu_indices(13, 1)
      r = jnp.linalg.norm(x[i] - x[j], axis=1)
      return jnp.sum(-jnp.log(r) if exponent == 0 else r**-exponent)

    def ours(x):
      return jnp.sum(riesz.riesz(x, exponent=exponent).potential) / 2

    forward = lambda fn: jax.jvp(jax.grad(fn), (x,), (v,))[1]
    backward = lambda fn: jax.grad(lambda x: jnp.vdot(jax.grad(fn)(x), v))(x)
    for take in (lambda fn: fn(x), lambda fn: jax.grad(fn)(x), forward):
      np.testing.assert_allclose(take(ours), take(plain), rtol=1e-9)
    np.testing.assert_allclose(backward(ours), forward(plain), rtol=1e-9)

  @parameterized.parameters((1.0, 3))
  @pytest.mark.slow
  def test_rows_and_columns(self, exponent, block):
    x = sphere(11, 3)
    call = functools.partial(riesz.riesz, exponent=exponent)
    with mock.patch.object(reference, '_TANGENT_ENTRIES', block):
      check_grads(call, (x[:4], x[4:]), order=1, rtol=1e-5)
      check_grads(call, (x,), order=1, rtol=1e-5)

  def test_under_vmap_and_jit(self):
    x = np.stack([sphere(9, 3, seed) for seed in range(4)])
    value = lambda x: jnp.sum(riesz.riesz(x, exponent=1.0).potential)
    got = jax.jit(jax.vmap(jax.grad(value)))(x)
    for i in range(4):
      want = oracle(x[i], None, 1.0)[1]
      np.testing.assert_allclose(got[i] / 2, want, rtol=1e-9)


class EntranceTest(parameterized.TestCase):
  @parameterized.parameters(
    ((3,), None, 1.0, 'rows must be a float array of shape'),
    ((4, 3), (4, 2), 1.0, 'columns must be'),
    ((2, 4, 3), (4, 3), 1.0, 'columns must be'),
    ((4, 3), None, -1.0, 'exponent must be positive'),
    ((4, 3), None, float('nan'), 'exponent must be positive'),
    ((4, 3), None, float('inf'), 'exponent must be positive'),
    ((0, 3), None, 1.0, 'rows must have points'),
  )
  def test_refuses(self, rows, columns, exponent, message):
    columns = None if columns is None else jnp.zeros(columns)
    with self.assertRaisesRegex(ValueError, message):
      riesz.riesz(jnp.zeros(rows), columns, exponent=exponent)

  def test_refuses_other_dtypes(self):
    with self.assertRaisesRegex(ValueError, 'rows must be a float array'):
      riesz.riesz(jnp.zeros((4, 3), jnp.int32), exponent=1.0)
    with self.assertRaisesRegex(ValueError, 'must have the dtype of rows'):
      riesz.riesz(
        jnp.zeros((4, 3)), jnp.zeros((4, 3), jnp.bfloat16), exponent=1.0
      )

  def test_refuses_an_unknown_implementation(self):
    with self.assertRaisesRegex(ValueError, re.escape("'fast' is not one of")):
      riesz.riesz(jnp.eye(3), exponent=1.0, implementation='fast')

  @parameterized.parameters('pallas_tpu', 'pallas_gpu')
  def test_named_kernels_never_fall_back(self, name):
    call = functools.partial(riesz.riesz, exponent=1.0, implementation=name)
    with self.assertRaisesRegex(
      (NotImplementedError, ValueError), 'cpu|Hopper|interpret'
    ):
      jax.jit(call)(jnp.eye(3)).potential.block_until_ready()
