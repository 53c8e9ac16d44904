"""MADA where large gradients are rare and Adam goes the wrong way.

The online problem of Reddi et al., `On the Convergence of Adam and Beyond
<https://arxiv.org/abs/1904.09237>`_, 2018: the loss is 1010 x at each 101st
step and -10 x at the others, on [-1, 1], so that -1 is best.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import transforms

METHODS = ('adam', 'avgrad', 'half', 'mada')
NUM_STEPS = 200_000
RATE = 1e-3


class _Ends(NamedTuple):
  x: jax.Array  # (2,): after half of the steps, and all.
  rho: jax.Array  # The same.
  regret: jax.Array  # The same: per step.


def _run(tx):
  """Plays the game."""

  def step(carry, t):
    x, state, inside, regret = carry
    slope = jnp.where(t % 101 == 1, 1010.0, -10.0).astype(x.dtype)
    regret = regret + slope * (x + 1)
    # On the bound the loss does not change with the coefficients.
    u, state = tx.update(slope, state, x, hyper_grads=slope * inside)
    moved = x - RATE * u
    x = jnp.clip(moved, -1.0, 1.0)
    inside = (x == moved).astype(x.dtype)
    return (x, state, inside, regret), None

  def half(carry, start):
    steps = start + jnp.arange(1, NUM_STEPS // 2 + 1)
    carry, _ = jax.lax.scan(step, carry, steps)
    x, state, _, regret = carry
    rho = transforms.mada_coefficients(state)['rho']
    return carry, _Ends(x, rho, regret / steps[-1].astype(x.dtype))

  x = jnp.zeros([])
  carry = x, tx.init(x), jnp.ones([]), jnp.zeros([])
  starts = jnp.array([0, NUM_STEPS // 2])
  return jax.lax.scan(half, carry, starts)[1]


@functools.cache
def _ends():
  def learned(rho, rate):
    """Adam, what lies between and AVGrad do not learn; MADA starts at Adam."""
    return _run(
      transforms.scale_by_mada(
        RATE,
        b2=0.99,
        rho=rho,
        learn=('b3', 'rho', 'c'),
        hyper_learning_rate=rate,
        hyper_momentum=0.9,
        hyper_clip=None,
      )
    )

  def amsgrad():
    return _run(
      transforms.scale_by_mada(RATE, b2=0.99, learn=(), second_moment='amsgrad')
    )

  with jax.enable_x64(True):
    rho, rate = jnp.array([1.0, 0.0, 0.5, 1.0]), jnp.array([0.0, 0, 0, 0.1])
    many, one = jax.jit(lambda: (jax.vmap(learned)(rho, rate), amsgrad()))()
  ends = {
    name: jax.tree.map(lambda leaf, at=at: np.asarray(leaf[at]), many)
    for at, name in enumerate(METHODS)
  }
  return {**ends, 'amsgrad': jax.tree.map(np.asarray, one)}


class ToyTest(parameterized.TestCase):
  @parameterized.parameters(
    # x after 1e5 and 2e5 steps, and the mean regret of the latter.
    ('adam', (0.996, 0.994), 0.223),
    ('amsgrad', (-0.082, -0.161), 0.128),
    ('avgrad', (-0.104, -0.204), 0.134),
    ('half', (0.928, 0.994), 0.214),
    ('mada', (0.389, 0.328), 0.156),
  )
  @pytest.mark.slow
  def test_ends_where_the_specification_says(self, method, xs, regret):
    ends = _ends()[method]
    np.testing.assert_allclose(ends.x, xs, rtol=0, atol=1.1e-3)
    np.testing.assert_allclose(ends.regret[1], regret, rtol=0, atol=1.1e-3)

  @pytest.mark.slow
  def test_learns_to_leave_adam(self):
    rho = _ends()['mada'].rho
    np.testing.assert_allclose(rho[0], 0.04, atol=5e-3)
    self.assertLess(rho[1], 5e-3)

  @pytest.mark.slow
  def test_order_of_the_regrets(self):
    regrets = {name: ends.regret[1] for name, ends in _ends().items()}
    order = ('amsgrad', 'avgrad', 'mada', 'adam')
    self.assertEqual(sorted(order, key=regrets.get), list(order))

  def test_finds_a_minimum_wherever_it_stands(self):
    """Noisy quadratics: near by at a constant rate, nearer at a lower one."""
    a = np.linspace(1.0, 4.0, 8, dtype=np.float32)

    def run(rho, rate):
      tx = transforms.scale_by_mada(rate, rho=rho, learn=(), eps=1e-3)

      def step(carry, key):
        x, state, total = carry
        g = a * x + jax.random.normal(key, x.shape)
        u, state = tx.update(g, state)
        x = x - rate * u
        return (x, state, total), jnp.sum(a * jnp.square(x)) / 2

      x = jnp.ones(8)
      keys = jax.random.split(jax.random.key(0), 2000)
      _, losses = jax.lax.scan(step, (x, tx.init(x), 0.0), keys)
      return jnp.mean(losses[1000:])

    rho = np.float32([0.0, 0.25, 0.5, 1.0])
    grid = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    losses = np.asarray(jax.jit(grid)(rho, np.float32([0.03, 0.01])))
    # It starts at 10.
    self.assertLess(losses.max(), 0.5)
    self.assertTrue(np.all(losses[:, 1] < 0.5 * losses[:, 0]), msg=losses)
