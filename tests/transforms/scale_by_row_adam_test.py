"""Adam of rows against a loop over the lines of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

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
