"""The largest entries: exact whatever the array holds, on every path."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from emc2.kernels import lowering
from emc2.kernels.top_k import threshold, top_k

D = threshold.MIN_SIZE + 7  # Not a multiple of a word.


def _oracle(x, k):
  return np.sort(np.lexsort((np.arange(x.size), -np.abs(x)))[:k])


def _array(kind, size=D, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(size=size)
  few = rng.choice(size, 300, replace=False)
  if kind == 'zeros':
    x = np.zeros(size)
  elif kind == 'few':
    x = np.where(np.isin(np.arange(size), few), x, 0.0)
  elif kind == 'ties':
    x = np.round(2 * x)
  elif kind == 'one magnitude':
    x = np.sign(x)
  elif kind == 'denormal':
    x = x * np.finfo(dtype).tiny / 1000
  elif kind == 'infinite':
    x[few] = np.inf * np.sign(x[few])
  elif kind == 'hidden':  # All large entries lie where no sample is taken.
    x = x / 1e6
    seen = jax.jit(threshold._sample)(jnp.arange(size, dtype=jnp.float32))
    unseen = np.setdiff1d(np.arange(size), np.asarray(seen).astype(int))
    x[unseen[:4000]] *= 1e9
  return x.astype(dtype)


KINDS = (
  'normal',
  'zeros',
  'few',
  'ties',
  'one magnitude',
  'denormal',
  'infinite',
)


_run = jax.jit(top_k, static_argnames=('k', 'implementation'))
_run_at_once = jax.jit(threshold.top_k, static_argnames=('k', 'at_once'))


def _check(test, x, k, implementation='auto'):
  found = _run(x, k=k, implementation=implementation)
  values, indices = jax.tree.map(np.asarray, found)
  test.assertEqual(indices.dtype, np.int32)
  np.testing.assert_array_equal(np.sort(indices), _oracle(x, k))
  np.testing.assert_array_equal(values, x[indices])


class TopKTest(parameterized.TestCase):
  @parameterized.product(kind=KINDS, implementation=('threshold', 'xla'))
  def test_equals_a_stable_sort(self, kind, implementation):
    x = _array(kind)
    for k in (1, 1700):
      _check(self, x, k, implementation=implementation)

  @parameterized.parameters('normal', 'few', 'ties', 'one magnitude')
  @pytest.mark.slow
  def test_lists_made_at_once(self, kind):
    x = _array(kind)
    values, indices = map(np.asarray, _run_at_once(x, k=1700, at_once=True))
    np.testing.assert_array_equal(np.sort(indices), _oracle(x, 1700))
    np.testing.assert_array_equal(values, x[indices])

  @parameterized.parameters(301, D)
  @pytest.mark.slow
  def test_any_count(self, k):
    _check(self, _array('few'), k, implementation='threshold')

  @parameterized.parameters(1, 31, 32, 33, 100)
  def test_short(self, size):
    x = _array('normal', max(size, 300))[:size]
    _check(self, x, 1)
    _check(self, x, size)

  def test_sizes_of_a_whole_number_of_words(self):
    _check(self, _array('ties', threshold.MIN_SIZE), 1000)

  def test_a_sample_that_misleads(self):
    size = 1 << 19
    x = _array('hidden', size)
    _check(self, x, 5000, implementation='threshold')

  @pytest.mark.slow
  def test_float64_is_compared_in_float64(self):
    with jax.enable_x64(True):
      x = 1 + 1e-12 * _array('normal', dtype=np.float64)
      self.assertEqual(np.unique(x.astype(np.float32)).size, 1)
      _check(self, x, 170, implementation='threshold')

  def test_nan_counts_as_the_largest(self):
    x = _array('infinite')
    x[[5, 77]] = np.nan
    for implementation in ('threshold', 'xla'):
      indices = top_k(x, 2, implementation=implementation).indices
      self.assertCountEqual(indices.tolist(), [5, 77])

  @pytest.mark.slow
  def test_under_vmap(self):
    x = np.stack([_array('normal'), _array('ties'), _array('zeros')])
    mapped = jax.jit(jax.vmap(lambda x: top_k(x, 50)))(x)
    for row, indices in zip(x, np.asarray(mapped.indices), strict=True):
      np.testing.assert_array_equal(np.sort(indices), _oracle(row, 50))

  @parameterized.parameters(100, D)
  @pytest.mark.slow
  def test_gradient_reaches_what_was_found(self, size):
    x = _array('normal', max(size, 300))[:size]
    loss = lambda x: jnp.sum(jnp.square(top_k(x, 5).values))
    expected = np.zeros_like(x)
    expected[_oracle(x, 5)] = 2 * x[_oracle(x, 5)]
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-6)

  @pytest.mark.slow
  def test_in_shard_map(self):
    mesh = jax.make_mesh((2,), ('data',))
    spec = jax.P('data')
    x = np.concatenate([_array('normal'), _array('ties')])
    x = jax.device_put(x, jax.NamedSharding(mesh, spec))
    run = jax.shard_map(
      lambda x: top_k(x, 50), mesh=mesh, in_specs=spec, out_specs=spec
    )
    _, indices = jax.jit(run)(x)
    x, indices = np.asarray(x), np.asarray(indices)
    for part, own in zip(np.split(x, 2), np.split(indices, 2), strict=True):
      np.testing.assert_array_equal(np.sort(own), _oracle(part, 50))

  @parameterized.parameters('cpu', 'cuda')
  def test_does_not_sort_the_array(self, platform):
    spec = jax.ShapeDtypeStruct((D,), jnp.float32)
    for implementation, sorts in (('auto', False), ('xla', True)):
      run = lambda x, how=implementation: top_k(x, 50, implementation=how)
      text = lowering.lower_for(run, spec, platform=platform).as_text()
      found = re.search(rf'chlo\.top_k.*tensor<{D}x', text) is not None
      self.assertEqual(found, sorts)

  @parameterized.parameters(0, -1, D + 1)
  def test_rejects_a_count_out_of_range(self, k):
    with self.assertRaisesRegex(ValueError, r'k must lie in \[1, '):
      top_k(jnp.zeros(D), k)

  def test_rejects_what_it_does_not_take(self):
    with self.assertRaisesRegex(ValueError, 'x must be a vector'):
      top_k(jnp.zeros((3, 3)), 1)
    with self.assertRaisesRegex(ValueError, 'x must be a vector'):
      top_k(jnp.zeros(3, jnp.int32), 1)
    with self.assertRaisesRegex(ValueError, "'sorted' is not one of"):
      top_k(jnp.zeros(3), 1, implementation='sorted')
    with self.assertRaisesRegex(NotImplementedError, 'threshold: want'):
      top_k(jnp.zeros(3), 1, implementation='threshold')


if __name__ == '__main__':
  absltest.main()
