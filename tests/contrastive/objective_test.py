"""The exact objective against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.contrastive import objective


def _embeddings(num_samples, num_views, size=5, seed=0):
  rows = np.random.default_rng(seed).normal(size=(num_samples, num_views, size))
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _loop(x, beta):
  num_samples, num_views, _ = x.shape
  losses = []
  for i in range(num_samples):
    others = np.delete(x, i, axis=0).reshape(-1, x.shape[-1])
    for v in range(num_views):
      total = np.log(np.sum(np.exp(beta * others @ x[i, v])))
      for w in range(num_views):
        if v != w:
          losses.append(total - beta * x[i, v] @ x[i, w])
  return np.mean(losses)


class GlobalLossTest(parameterized.TestCase):
  @parameterized.product(
    shape=[(2, 2), (7, 2), (5, 3)], beta=[0.5, 14.28], block_size=[4]
  )
  def test_equals_a_loop(self, shape, beta, block_size):
    self._check_equals_a_loop(shape, beta, block_size)

  @parameterized.product(
    shape=[(2, 2), (7, 2), (5, 3)], beta=[0.5, 14.28], block_size=[1, 1024]
  )
  @pytest.mark.slow
  def test_equals_a_loop_elsewhere(self, shape, beta, block_size):
    self._check_equals_a_loop(shape, beta, block_size)

  def _check_equals_a_loop(self, shape, beta, block_size):
    x = _embeddings(*shape)
    got = objective.global_loss(
      jnp.float32(x), inverse_temperature=beta, block_size=block_size
    )
    np.testing.assert_allclose(got, _loop(x, beta), rtol=1e-5, atol=1e-5)

  @pytest.mark.slow
  def test_gradient_by_differences(self):
    x = _embeddings(4, 2)
    loss = lambda x: objective.global_loss(
      x, inverse_temperature=5.0, block_size=3
    )
    got = jax.grad(loss)(jnp.float32(x))
    want = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
      step = np.zeros_like(x)
      step[place] = 1e-6
      want[place] = (_loop(x + step, 5.0) - _loop(x - step, 5.0)) / 2e-6
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  def test_survives_low_temperature(self):
    x = jnp.float32(_embeddings(4, 2))
    loss = objective.global_loss(x, inverse_temperature=200.0)
    self.assertTrue(np.isfinite(loss))

  @parameterized.parameters(((1, 2, 3),), ((4, 1, 3),), ((4, 3),))
  def test_refuses(self, shape):
    with self.assertRaisesRegex(ValueError, 'm, A >= 2, got shape'):
      objective.global_loss(jnp.ones(shape), inverse_temperature=1.0)


class EmbedAllTest(parameterized.TestCase):
  @parameterized.parameters(1, 4, 100)
  def test_order_and_blocks(self, block_size):
    table = jnp.float32(_embeddings(5, 4))
    views = jnp.array([[3, 0, 1]] * 5, jnp.uint32)
    embed_fn = lambda params, data, index, view: params[index, view]
    got = objective.embed_all(
      table, (), embed_fn, num_samples=5, views=views, block_size=block_size
    )
    np.testing.assert_array_equal(got, table[:, jnp.array([3, 0, 1])])
