"""The schedule at its closed-form points, the optimisers against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import parameterized

from emc2.experiments import schedules


def _loop(epochs, total, peak, warmup=10):
  if epochs < warmup:
    return peak * epochs / warmup
  return peak * 0.5 * (1 + np.cos(np.pi * (epochs - warmup) / (total - warmup)))


class WarmupCosineTest(parameterized.TestCase):
  @parameterized.parameters(
    # STL-10: 3125 steps an epoch, 100 epochs, peak 1e-4.
    (0, 0.0),
    (1, 1e-4 / 31_250),
    (15_625, 0.5e-4),
    (31_250, 1e-4),
    (31_250 + 281_250 // 3, 0.75e-4),
    (31_250 + 281_250 // 2, 0.5e-4),
    (31_250 + 2 * 281_250 // 3, 0.25e-4),
    (312_500, 0.0),
    (400_000, 0.0),
  )
  def test_stl10(self, count, want):
    schedule = schedules.warmup_cosine(
      1e-4, steps_per_epoch=3125, num_epochs=100
    )
    got = schedule(jnp.asarray(count, jnp.int32))
    self.assertEqual(got.dtype, jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-11)

  @parameterized.product(
    warmup=(0, 3, 10), total=(12, 30), traced=(False, True)
  )
  def test_equals_a_loop(self, warmup, total, traced):
    schedule = schedules.warmup_cosine(
      0.7, steps_per_epoch=7, num_epochs=total, warmup_epochs=warmup
    )
    counts = jnp.arange(7 * total + 1, dtype=jnp.int32)
    got = (jax.jit(schedule) if traced else schedule)(counts)
    want = [_loop(t / 7, total, 0.7, warmup) for t in range(7 * total + 1)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(4, 10)
  def test_a_short_run_is_all_warm_up(self, epochs):
    # The toy of the paper: 10 epochs of 125 steps.
    schedule = schedules.warmup_cosine(
      1e-3, steps_per_epoch=125, num_epochs=epochs
    )
    counts = jnp.arange(125 * epochs, dtype=jnp.int32)
    want = 1e-3 * np.arange(125 * epochs) / 1250
    np.testing.assert_allclose(schedule(counts), want, rtol=1e-5)

  @parameterized.parameters(
    dict(steps_per_epoch=0), dict(num_epochs=0), dict(warmup_epochs=-1)
  )
  def test_refuses(self, **wrong):
    kwargs = dict(steps_per_epoch=1, num_epochs=1) | wrong
    (name,) = wrong
    with self.assertRaisesRegex(ValueError, f'{name}.*{wrong[name]}'):
      schedules.warmup_cosine(1.0, **kwargs)


def _run(tx, params, grads):
  # Optax's Adam takes a power of an integer.
  with jax.numpy_dtype_promotion('standard'):
    state = tx.init(params)
    for grad in grads:
      updates, state = tx.update({'w': jnp.asarray(grad)}, state, params)
      params = optax.apply_updates(params, updates)
  return params['w']


class OptimiserTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.start = rng.normal(size=4).astype(np.float32)
    self.grads = rng.normal(size=(5, 4)).astype(np.float32)
    self.schedule = schedules.warmup_cosine(
      0.3, steps_per_epoch=1, num_epochs=4, warmup_epochs=2
    )
    self.rates = [0.0, 0.15, 0.3, 0.15, 0.0]

  @parameterized.parameters(0.0, 0.1)
  def test_adam(self, weight_decay):
    tx = schedules.adam(self.schedule, weight_decay=weight_decay)
    got = _run(tx, {'w': jnp.asarray(self.start)}, self.grads)
    w, m, v = self.start.astype(np.float64), np.zeros(4), np.zeros(4)
    for t, (rate, grad) in enumerate(zip(self.rates, self.grads, strict=True)):
      g = grad + weight_decay * w
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
      m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
      w = w - rate * m_hat / (np.sqrt(v_hat) + 1e-8)
    np.testing.assert_allclose(got, w, rtol=1e-4)

  @parameterized.product(weight_decay=(0.0, 0.1), momentum=(None, 0.9))
  def test_sgd(self, weight_decay, momentum):
    tx = schedules.sgd(
      self.schedule, weight_decay=weight_decay, momentum=momentum
    )
    got = _run(tx, {'w': jnp.asarray(self.start)}, self.grads)
    w, m = self.start.astype(np.float64), np.zeros(4)
    for rate, grad in zip(self.rates, self.grads, strict=True):
      m = (momentum or 0.0) * m + grad + weight_decay * w
      w = w - rate * m
    np.testing.assert_allclose(got, w, rtol=1e-4)

  @parameterized.parameters(schedules.adam, schedules.sgd)
  def test_takes_extra_arguments(self, make):
    tx, params = make(0.1, weight_decay=0.1), {'w': jnp.ones(3)}
    self.assertIsInstance(tx, optax.GradientTransformationExtraArgs)
    with jax.numpy_dtype_promotion('standard'):
      tx.update(params, tx.init(params), params, value=1.0, unknown=2)

  @parameterized.parameters(schedules.adam, schedules.sgd)
  def test_refuses_negative_decay(self, make):
    with self.assertRaisesRegex(ValueError, 'weight_decay.*-0.1'):
      make(0.1, weight_decay=-0.1)
