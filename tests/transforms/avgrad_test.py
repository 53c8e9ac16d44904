"""AVGrad against a loop over its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

from emc2 import transforms


def _grads(num_steps=8):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape)
  return [{'w': draw(5, 3), 'v': draw(4)} for _ in range(num_steps)]


def _loop(grads, rate, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, decays='vw'):
  """Params from 1, in float64, one tensor after another."""
  result = {}
  for name in grads[0]:
    p, m, v, seen = np.ones_like(grads[0][name]), 0.0, 0.0, []
    for t, grad in enumerate(grads, start=1):
      g = grad[name]
      m = b1 * m + (1 - b1) * g
      v = b2 * v + (1 - b2) * g**2
      seen.append(v)
      root = np.sqrt(np.mean(seen, axis=0) / (1 - b2**t))
      u = m / (1 - b1**t) / (root + eps)
      p = p - rate(t) * (u + decay * p * (name in decays))
    result[name] = p
  return result


def _run(tx, grads, dtype):
  params = jax.tree.map(lambda g: jnp.ones_like(g, dtype), grads[0])
  state, step = tx.init(params), jax.jit(tx.update)
  for g in grads:
    g = jax.tree.map(lambda g: jnp.asarray(g, dtype), g)
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def _gap(a, b):
  return max(np.abs(np.asarray(a[k], np.float64) - b[k]).max() for k in b)


# The options, and the same in the words of the loop.
CASES = (
  ({}, {}),
  ({'b1': 0.5}, {'b1': 0.5}),
  ({'b2': 0.5}, {'b2': 0.5}),
  ({'eps': 1.0}, {'eps': 1.0}),
  ({'weight_decay': 0.5}, {'decay': 0.5}),
  (
    {'weight_decay': 0.5, 'mask': {'w': True, 'v': False}},
    {'decay': 0.5, 'decays': 'w'},
  ),
)


def _rate(t):
  return 0.1 / t


class AvgradTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_matches_a_loop(self, options, words):
    grads = _grads()
    with jax.enable_x64(True):
      wide = lambda count: count.astype(jnp.float64)
      tx = transforms.avgrad(lambda count: 0.1 / (1 + wide(count)), **options)
      got = _run(tx, grads, jnp.float64)
    self.assertLess(_gap(got, _loop(grads, _rate, **words)), 1e-12)

  def test_matches_a_loop_in_float32(self):
    grads = _grads()
    got = _run(transforms.avgrad(0.1), grads, jnp.float32)
    self.assertLess(_gap(got, _loop(grads, lambda t: 0.1)), 1e-5)

  def test_each_option_counts(self):
    ends = [_loop(_grads(), _rate, **words) for _, words in CASES]
    for end in ends[1:]:
      self.assertGreater(_gap(end, ends[0]), 1e-2)
    self.assertGreater(_gap(ends[-1], ends[-2]), 1e-2)

  def test_is_adam_at_first(self):
    """The mean of one second moment is itself."""
    grads = _grads(1)
    with jax.numpy_dtype_promotion('standard'):
      adam = _run(optax.adam(0.1), grads, jnp.float32)
    got = _run(transforms.avgrad(0.1), grads, jnp.float32)
    self.assertLess(_gap(got, adam), 1e-6)

  def test_mean_of_a_constant(self):
    """In closed form, after many steps as after few."""
    tx = transforms.scale_by_avgrad(b2=0.9)
    g = jnp.full(2, 3.0)

    def step(state, _):
      _, state = tx.update(g, state)
      return state, state.nu_mean

    _, means = jax.jit(lambda: jax.lax.scan(step, tx.init(g), length=300))()
    t = np.arange(1, 301)
    want = 9 * (1 - 0.9 * (1 - 0.9**t) / (t * 0.1))
    np.testing.assert_allclose(means[:, 0], want, rtol=1e-5)

  @parameterized.parameters(
    (jnp.float32, None, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, None, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.float32),
  )
  def test_dtypes(self, dtype, mu_dtype, first):
    """The second moments are wide, whatever the params and the first."""
    tx = transforms.scale_by_avgrad(mu_dtype=mu_dtype)
    params = jnp.ones(3, dtype)
    state = tx.init(params)
    for _ in range(2):
      self.assertEqual(state.mu.dtype, first)
      self.assertEqual(state.nu.dtype, jnp.float32)
      self.assertEqual(state.nu_mean.dtype, jnp.float32)
      updates, state = jax.jit(tx.update)(params, state)
      self.assertEqual(updates.dtype, dtype)

  def test_mean_moves_late(self):
    """A narrow mean would stand still from some step 256 on."""
    tx = transforms.scale_by_avgrad(b1=0.0, b2=0.0)

    def step(state, t):
      g = jnp.where(t < 500, 1, 3).astype(jnp.bfloat16)
      return tx.update(g, state)[1], None

    start = tx.init(jnp.zeros([], jnp.bfloat16))
    run = lambda: jax.lax.scan(step, start, jnp.arange(1000))[0]
    np.testing.assert_allclose(jax.jit(run)().nu_mean, 5.0, rtol=1e-3)
