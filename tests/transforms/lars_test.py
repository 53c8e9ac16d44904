"""LARS against a loop over the lines of its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms

SCHEDULE = optax.linear_schedule(0.0, 2.0, 6)


def _params():
  rng = np.random.default_rng(0)
  return {
    'bias': rng.normal(size=4).astype(np.float32),
    'kernel': rng.normal(size=(3, 4)).astype(np.float32),
    'scale': np.float32(rng.normal()),
    'start': np.zeros((2, 2), np.float32),
    'still': rng.normal(size=(2, 2)).astype(np.float32),
  }


def _grads(steps):
  rng = np.random.default_rng(1)
  draw = lambda p: np.asarray(rng.normal(size=np.shape(p)), np.float32)
  grads = [jax.tree.map(draw, _params()) for _ in range(steps)]
  for g in grads:
    g['still'] = np.zeros((2, 2), np.float32)
  return grads


def _loop(
  params,
  grads,
  rate,
  *,
  decay=0.0,
  trust=0.001,
  momentum=0.9,
  decayed=lambda p: p.ndim > 1,
  rescaled=lambda p: p.ndim > 1,
):
  """The definition, in float64, one tensor after another."""
  result = {}
  for name in params:
    p = np.asarray(params[name], np.float64)
    mu = np.zeros_like(p)
    for t, grad in enumerate(grads):
      g = np.asarray(grad[name], np.float64)
      if decayed(p):
        g = g + decay * p
      norms = np.sqrt(np.sum(p**2)), np.sqrt(np.sum(g**2))
      if rescaled(p) and min(norms) > 0:
        g = g * trust * norms[0] / norms[1]
      mu = momentum * mu + g
      p = p - rate(t) * mu
    result[name] = p
  return result


def _run(tx, params, grads):
  params = jax.tree.map(jnp.asarray, params)
  state = tx.init(params)
  step = jax.jit(tx.update)
  for g in grads:
    updates, state = step(jax.tree.map(jnp.asarray, g), state, params)
    params = optax.apply_updates(params, updates)
  return params


def _assert_near(got, want, rtol=1e-5):
  for name in want:
    np.testing.assert_allclose(
      got[name], want[name], rtol=rtol, atol=rtol, err_msg=name
    )


class LarsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('plain', {}, {}),
    (
      'decay_everywhere',
      {'weight_decay': 0.1, 'weight_decay_mask': True},
      {'decay': 0.1, 'decayed': lambda p: True},
    ),
  )
  def test_matches_a_loop(self, options, loop_options):
    self._check_matches_a_loop(options, loop_options)

  @parameterized.named_parameters(
    ('decay', {'weight_decay': 0.1}, {'decay': 0.1}),
    ('trust', {'trust_coefficient': 0.1}, {'trust': 0.1}),
    ('momentum', {'momentum': 0.5}, {'momentum': 0.5}),
    (
      'decay_of_vectors',
      {
        'weight_decay': 0.1,
        'weight_decay_mask': lambda tree: jax.tree.map(
          lambda p: p.ndim == 1, tree
        ),
      },
      {'decay': 0.1, 'decayed': lambda p: p.ndim == 1},
    ),
    (
      'rescale_everywhere',
      {'trust_ratio_mask': True},
      {'rescaled': lambda p: True},
    ),
  )
  @pytest.mark.slow
  def test_matches_a_loop_elsewhere(self, options, loop_options):
    self._check_matches_a_loop(options, loop_options)

  def _check_matches_a_loop(self, options, loop_options):
    grads = _grads(10)
    rate = lambda t: 2.0 * min(t / 6, 1.0)
    want = _loop(_params(), grads, rate, **loop_options)
    tx = transforms.lars(SCHEDULE, **options)
    _assert_near(_run(tx, _params(), grads), want)

  def test_each_option_counts(self):
    """Each case above would fail if its option were ignored."""
    grads, rate = _grads(10), lambda t: 2.0 * min(t / 6, 1.0)
    options = [
      {'decay': 0.1},
      {'trust': 0.1},
      {'momentum': 0.5},
      {'decay': 0.1, 'decayed': lambda p: True},
      {'decay': 0.1, 'decayed': lambda p: p.ndim == 1},
      {'rescaled': lambda p: True},
    ]
    plain = _loop(_params(), grads, rate)
    for option in options:
      other = _loop(_params(), grads, rate, **option)
      gaps = [np.abs(plain[name] - other[name]).max() for name in plain]
      self.assertGreater(max(gaps), 1e-3, msg=option)

  def test_rate_comes_after_momentum(self):
    """A step taken while the rate was 0 still moves, once the rate rises."""
    params = {'w': jnp.ones((2, 2))}
    push, rest = {'w': jnp.ones((2, 2))}, {'w': jnp.zeros((2, 2))}
    schedule = lambda count: jnp.where(count == 0, 0.0, 1.0)
    moved = {}
    for name, make in (('ours', transforms.lars), ('optax', optax.lars)):
      tx = make(schedule, trust_coefficient=0.5, momentum=0.9)
      state = tx.init(params)
      _, state = tx.update(push, state, params)
      updates, _ = tx.update(rest, state, params)
      moved[name] = updates['w']
    np.testing.assert_allclose(moved['ours'], np.full((2, 2), -0.45), rtol=1e-6)
    np.testing.assert_array_equal(moved['optax'], np.zeros((2, 2)))

  def test_equals_optax_at_a_constant_rate(self):
    params = {'w': _params()['kernel']}
    grads = [{'w': g['kernel']} for g in _grads(5)]
    want = _run(optax.lars(0.3, weight_decay=0.1), params, grads)
    got = _run(transforms.lars(0.3, weight_decay=0.1), params, grads)
    _assert_near(got, want)
