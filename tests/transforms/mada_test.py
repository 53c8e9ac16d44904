"""MADA against a loop over its definition, and what it has to be at corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms

from tests.transforms import mada_oracle

NAMES = transforms.COEFFICIENTS
INSIDE = dict(zip(NAMES, (0.8, 0.9, 0.3, 0.6, 0.7, 0.6), strict=True))
ADAM = {'b3': 0.0, 'rho': 1.0, 'c': 1.0, 'gamma': 1.0}
RATES = {'b1': 5e-3, 'b2': 5e-3}
NUM_STEPS = 30

SHAPES = {'matrix': (4, 3), 'vector': (5,)}


def _problem(case='plain'):
  """Params, and gradients at each: curvature times params, and noise.

  Cases that take a program of their own have one tensor, to compile less.
  """
  rng = np.random.default_rng(0)
  draw = lambda draw: {k: draw(shape) for k, shape in SHAPES.items()}
  params = draw(lambda shape: rng.normal(size=shape))
  curvature = draw(lambda shape: rng.uniform(0.5, 2.0, size=shape))
  noise = draw(lambda shape: rng.normal(size=(NUM_STEPS, *shape)))
  # One entry has no gradient, ever.
  curvature['matrix'][0, 0] = 0.0
  noise['matrix'][:, 0, 0] = 0.0
  names = SHAPES if CASES[case].keys() <= {*TRACED, *NAMES} else ['matrix']
  pick = lambda tree: {name: tree[name] for name in names}
  return pick(params), pick(curvature), pick(noise)


def _clip(grads, norm):
  size = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
  return {k: g * min(1.0, norm / size) for k, g in grads.items()}


# What the transform is told, by the words of the loop where they differ.
CASES = {
  'plain': {},
  'rates': {'hyper_learning_rate': dict.fromkeys(NAMES, 0.1)},
  'momentum': {'hyper_momentum': dict.fromkeys(NAMES, 0.9)},
  'some_rates': {
    'hyper_learning_rate': {'b1': 0.01},
    'hyper_momentum': {'rho': 0.9},
    'learn': ('b1', 'b2', 'rho'),
  },
  'clip': {'hyper_clip': 0.05},
  'no_clip': {
    'hyper_clip': None,
    'hyper_learning_rate': 10.0,
    'hyper_momentum': 0.5,
  },
  'starts_later': {'hyper_start': 10},
  'delay': {'hyper_delay': 1},
  'amsgrad': {'second_moment': 'amsgrad'},
  'released': {'lion_mode': 'released', 'init_mode': 'released'},
  'through_mean': {'hyper_through_mean': True},
  'lion_b1': {'lion_b1': 0.5},
  'lion_b2': {'lion_b2': 0.5},
  'eps': {'eps': 0.1},
  'decay': {'weight_decay': 0.5},
  'bounds': {'bounds': {'rho': (0.55, 0.65), 'b1': (0.79, 0.81)}},
  'learns_two': {'learn': ('b1', 'b2')},
  'learns_none': {'learn': ()},
  'alone': {'hyper_start': 0},
  'elsewhere': {'b1': 0.5, 'b2': 0.7, 'b3': 0.6, 'rho': 0.2, 'c': 0.3},
  # What is fixed there is not computed.
  'no_differences': {'b3': 0.0, 'learn': ('b1', 'b2', 'rho', 'c', 'gamma')},
  'no_lion': {'gamma': 1.0, 'learn': ('b1', 'b2', 'b3', 'rho', 'c')},
  'neither': {**ADAM, 'rho': 0.5, 'learn': ('b1', 'b2', 'rho', 'c')},
}
# Numbers that can be traced share a program.
TRACED = (
  'eps',
  'lion_b1',
  'lion_b2',
  'hyper_learning_rate',
  'hyper_momentum',
  'hyper_clip',
  'weight_decay',
)
# Those that lack what the others have are not even traced as numbers.
FIXED = ('no_differences', 'no_lion', 'neither')
# One program for many numbers, and two of others.
QUICK = (
  'plain',
  'rates',
  'momentum',
  'clip',
  'lion_b1',
  'lion_b2',
  'eps',
  'decay',
  'elsewhere',
  'amsgrad',
  'neither',
)


def _settings(case):
  base = {
    **INSIDE,
    'hyper_learning_rate': dict.fromkeys(NAMES, 0.02) | RATES,
    'hyper_momentum': dict.fromkeys(NAMES, 0.0),
    'hyper_clip': 10.0,
    'eps': 1e-3,
    'lion_b1': 0.95,
    'lion_b2': 0.98,
    'weight_decay': 0.0,
  }
  return {**base, **CASES[case]}


def _rate(t):
  """From 0: the first update goes nowhere, and teaches nothing."""
  return 0.05 * min((t - 1) / 5, 1.0)


@functools.cache
def _want(case):
  told = _settings(case)
  family = mada_oracle.Family(
    eps=told['eps'],
    lion_b1=told['lion_b1'],
    lion_b2=told['lion_b2'],
    maximum=told.get('second_moment') == 'amsgrad',
    released_lion=told.get('lion_mode') == 'released',
    released_init=told.get('init_mode') == 'released',
    through_mean=told.get('hyper_through_mean', False),
  )
  params, curvature, noise = _problem(case)
  return mada_oracle.run(
    params,
    lambda t, p: {k: curvature[k] * p[k] + noise[k][t - 1] for k in p},
    NUM_STEPS,
    _rate,
    start=[told[k] for k in NAMES],
    family=family,
    learn=told.get('learn', NAMES),
    rates=told['hyper_learning_rate'],
    momenta=told['hyper_momentum'],
    bounds=told.get('bounds'),
    clip=told['hyper_clip'],
    hyper_start=told.get('hyper_start', 0),
    delay=told.get('hyper_delay', 0),
    decay=told['weight_decay'],
  )


def _train(tx, params, curvature, noise):
  """Params at the end, coefficients and their momenta after each step."""

  def step(carry, noise):
    params, state = carry
    grad = lambda p, a, e: a * p + e
    grads = jax.tree.map(grad, params, curvature, noise)
    updates, state = tx.update(grads, state, params)
    coefficients = optax.tree.get(state, 'coefficients')
    trace = optax.tree.get(state, 'trace')
    carry = optax.apply_updates(params, updates), state
    return carry, (coefficients, trace)

  (params, _), rows = jax.lax.scan(step, (params, tx.init(params)), noise)
  return params, *rows


@functools.cache
def _program(static):
  static = dict(static)
  static['bounds'] = dict(static.get('bounds', ()))
  schedule = lambda t: 0.05 * jnp.minimum(t.astype(jnp.zeros([]).dtype) / 5, 1)

  @jax.jit
  def run(traced, *problem):
    return _train(transforms.mada(schedule, **static, **traced), *problem)

  return run


def _got(case, dtype):
  told = _settings(case)
  if 'bounds' in told:
    told['bounds'] = tuple(told['bounds'].items())
  number = lambda k: k in TRACED or (k in NAMES and case not in FIXED)
  traced = {k: v for k, v in told.items() if number(k) and v is not None}
  static = {k: v for k, v in told.items() if k not in traced}
  problem = jax.tree.map(lambda x: jnp.asarray(x, dtype), _problem(case))
  return _program(tuple(static.items()))(traced, *problem)


def _gap(a, b):
  """The greatest between two runs."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in pairs)


class LoopTest(parameterized.TestCase):
  @parameterized.parameters(*QUICK)
  def test_matches_the_loop(self, case):
    self._check_loop(case)

  @parameterized.parameters(*(case for case in CASES if case not in QUICK))
  @pytest.mark.slow
  def test_matches_the_loop_elsewhere(self, case):
    self._check_loop(case)

  def _check_loop(self, case):
    """Params, coefficients and momenta, step by step."""
    params, coefficients, trace, _ = _want(case)
    with jax.enable_x64(True):
      got = _got(case, jnp.float64)
    self.assertLess(_gap(got, (params, coefficients, trace)), 1e-10)

  def test_matches_the_loop_in_float32(self):
    self._check_loop_in_float32('amsgrad')

  @parameterized.parameters('alone', 'neither')
  @pytest.mark.slow
  def test_matches_the_loop_in_float32_elsewhere(self, case):
    self._check_loop_in_float32(case)

  def _check_loop_in_float32(self, case):
    params, coefficients, trace, _ = _want(case)
    got = _got(case, jnp.float32)
    self.assertLess(_gap(got, (params, coefficients, trace)), 1e-3)

  def test_each_option_counts(self):
    """Each case would fail if its option were ignored."""
    for case in CASES:
      if case not in ('plain', 'alone', *FIXED):
        ends = _want(case)[0]['matrix'], _want(case)[1]
        plain = _want('plain' if len(_problem(case)[0]) > 1 else 'alone')
        gap = _gap(ends, (plain[0]['matrix'], plain[1]))
        self.assertGreater(gap, 1e-4, msg=case)

  def test_each_coefficient_learns(self):
    _, coefficients, _, h = _want('plain')
    self.assertGreater(np.abs(coefficients[-1] - coefficients[0]).min(), 1e-3)
    np.testing.assert_array_equal(h[:2], np.zeros((2, 6)))
    self.assertGreater(np.abs(h[2]).min(), 0)

  def test_clipped_gradients_and_their_own(self):
    """In a chain: moments of the clipped, slopes along those before."""
    params, curvature, noise = _problem()
    raw = lambda t, p: {k: curvature[k] * p[k] + noise[k][t - 1] for k in p}
    want, coefficients, _, _ = mada_oracle.run(
      params,
      lambda t, p: _clip(raw(t, p), 1.0),
      10,
      start=[INSIDE[k] for k in NAMES],
      family=mada_oracle.Family(eps=1e-3),
      hyper_grad_fn=raw,
    )
    tx = optax.chain(
      optax.clip_by_global_norm(1.0),
      transforms.mada(0.1, **INSIDE, eps=1e-3, weight_decay=0.0),
    )
    ends = []
    with jax.enable_x64(True):
      step = jax.jit(tx.update)
      for tells in (True, False):
        p = jax.tree.map(jnp.asarray, params)
        state = tx.init(p)
        for t in range(1, 11):
          g = raw(t, p)
          told = {'hyper_grads': g} if tells else {}
          updates, state = step(g, state, p, **told)
          p = optax.apply_updates(p, updates)
        q = jnp.stack(list(transforms.mada_coefficients(state).values()))
        ends.append((p, q))
    self.assertLess(_gap(ends[0], (want, coefficients[-1])), 1e-10)
    self.assertGreater(_gap(ends[1], (want, coefficients[-1])), 1e-4)

  @pytest.mark.slow
  def test_many_starts_at_once(self):
    """`vmap` over betas equals a loop."""
    params, curvature, noise = (
      jax.tree.map(np.float32, tree) for tree in _problem('alone')
    )
    noise = jax.tree.map(lambda e: e[:10], noise)

    def run(b1, b2):
      tx = transforms.mada(0.05, b1, b2, eps=1e-3, hyper_learning_rate=0.01)
      return _train(tx, params, curvature, noise)

    starts = np.float32([[0.1, 0.6], [0.9, 0.95]]).T
    many = jax.jit(jax.vmap(run))(*starts)
    single = jax.jit(run)
    for at, start in enumerate(starts.T):
      got = jax.tree.map(lambda leaf, at=at: leaf[at], many)
      self.assertLess(_gap(got, single(*start)), 1e-5)


class StateTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, 7),
    ({'gamma': 1.0, 'learn': ('b1', 'b2', 'b3', 'rho', 'c')}, 6),
    ({'b3': 0.0, 'learn': ('b1', 'b2', 'rho', 'c', 'gamma')}, 5),
    ({**ADAM, 'learn': ('b1', 'b2')}, 4),
    ({**ADAM, 'learn': ()}, 3),
    ({'learn': (), 'b3': 0.5, 'gamma': 0.5}, 6),
  )
  def test_size(self, options, copies):
    tx = transforms.scale_by_mada(0.1, **options)
    params = {'matrix': jnp.zeros((300, 4)), 'vector': jnp.zeros(100)}
    state = jax.eval_shape(tx.init, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    self.assertEqual(size, copies * 1300 + 2 + 3 * 6)

  @parameterized.parameters(
    (jnp.float32, None, jnp.float32, jnp.float32),
    (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, None, jnp.bfloat16, jnp.float32),
    (jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32),
  )
  def test_dtypes(self, dtype, mu_dtype, narrow, wide):
    """Second moments are wide; coefficients are too, whatever the params."""
    tx = transforms.scale_by_mada(0.1, mu_dtype=mu_dtype)
    params = jnp.ones(3, dtype)
    state = tx.init(params)
    for _ in range(2):
      moments = state.moments
      for name in ('mu', 'delta', 'previous', 'lion'):
        self.assertEqual(getattr(moments, name).dtype, narrow, msg=name)
      for name in ('nu', 'nu_bar'):
        self.assertEqual(getattr(moments, name).dtype, wide, msg=name)
      self.assertEqual(state.grads.dtype, narrow)
      for name in ('coefficients', 'used', 'trace', 'learning_rate'):
        self.assertEqual(getattr(state, name).dtype, jnp.float32, msg=name)
      updates, state = jax.jit(tx.update)(params, state)
      self.assertEqual(updates.dtype, dtype)

  def test_coefficients_are_found(self):
    """In chains and wrappers; and what it says where there are none."""
    made = (
      optax.chain(optax.clip(1.0), transforms.mada(0.1, b1=0.7)),
      optax.inject_hyperparams(
        transforms.mada,
        static_args=(*NAMES, 'hyper_start', 'hyper_delay', 'mask'),
      )(0.1, b1=0.7),
      optax.MultiSteps(transforms.mada(0.1, b1=0.7), 2),
    )
    for tx in made:
      found = transforms.mada_coefficients(tx.init(jnp.ones(3)))
      self.assertEqual(tuple(found), NAMES)
      np.testing.assert_allclose(found['b1'], 0.7, rtol=1e-6)
      self.assertEqual(found['c'].shape, ())
    with self.assertRaisesRegex(KeyError, 'must hold a ScaleByMadaState'):
      transforms.mada_coefficients(optax.adam(0.1).init(jnp.ones(3)))
    two = optax.chain(transforms.mada(0.1), transforms.mada(0.1))
    with self.assertRaises(KeyError):
      transforms.mada_coefficients(two.init(jnp.ones(3)))

  def test_what_it_uses_is_told(self):
    """The delay is of one step; nothing learnt stays to the last bit."""
    g = jnp.float32(_problem()[2]['vector'])
    for delay in (0, 1):
      tx = transforms.scale_by_mada(
        0.1, **INSIDE, hyper_delay=delay, hyper_learning_rate=0.1
      )
      state, step = tx.init(g[0]), jax.jit(tx.update)
      for t in range(6):
        last, (_, state) = state, step(g[t], state)
        want = last if delay else state
        np.testing.assert_array_equal(state.used, want.coefficients)


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'learn': ('beta1',)}, "learn must name some of .* got 'beta1'"),
    ({'bounds': {'lr': (0.0, 1.0)}}, "bounds must name some of .* got 'lr'"),
    (
      {'hyper_learning_rate': {'x': 0.1}},
      "hyper_learning_rate must name some of .* got 'x'",
    ),
    (
      {'hyper_momentum': {'x': 0.1}},
      "hyper_momentum must name some of .* got 'x'",
    ),
    ({'b2': 0.999}, r'b2 must be in its bounds \[0.501, 0.99\], got 0.999'),
    ({'b1': 0.0}, r'b1 must be in its bounds \[0.01, 0.99\], got 0.0'),
    ({'rho': 1.5}, r'rho must be in its bounds'),
    ({'c': float('nan')}, r'c must be in its bounds'),
    (
      {'bounds': {'c': (0.6, 0.4)}},
      r"bounds\['c'\] must be \(low, high\), 0 <= low <= high <= 1, got",
    ),
    ({'bounds': {'gamma': (0.0, 1.1)}}, r"bounds\['gamma'\] must be"),
    (
      {'bounds': {'b2': (0.5, 1.0)}},
      r"bounds\['b2'\] must be \(low, high\), 0 < low <= high < 1, got",
    ),
    ({'bounds': {'b1': (0.0, 0.95)}}, r"bounds\['b1'\] must be"),
    ({'hyper_learning_rate': -0.1}, 'hyper_learning_rate.*must be at least 0'),
    (
      {'hyper_learning_rate': {'c': float('nan')}},
      r"hyper_learning_rate\['c'\] must be at least 0, got nan",
    ),
    ({'hyper_momentum': 1.0}, r'hyper_momentum.* must be in \[0, 1\), got 1'),
    (
      {'hyper_momentum': {'b3': -0.1}},
      r"hyper_momentum\['b3'\] must be in \[0, 1\), got -0.1",
    ),
    ({'eps': 0.0}, 'eps must be positive, got 0'),
    ({'eps': float('nan')}, 'eps must be positive, got nan'),
    ({'lion_b1': 1.0}, r'lion_b1 must be in \[0, 1\), got 1'),
    ({'lion_b2': -0.1}, r'lion_b2 must be in \[0, 1\), got -0.1'),
    ({'hyper_clip': 0.0}, 'hyper_clip must be positive, got 0'),
    ({'hyper_start': -1}, 'hyper_start must be at least 0, got -1'),
    ({'hyper_delay': 2}, r'hyper_delay must be one of \(0, 1\), got 2'),
    ({'second_moment': 'max'}, "second_moment must be one of .* got 'max'"),
    ({'lion_mode': 'code'}, "lion_mode must be one of .* got 'code'"),
    ({'init_mode': 'code'}, "init_mode must be one of .* got 'code'"),
    (
      {'hyper_through_mean': True, 'second_moment': 'amsgrad'},
      "hyper_through_mean needs second_moment='avgrad', got 'amsgrad'",
    ),
  )
  def test_arguments(self, options, message):
    for make in (transforms.scale_by_mada, transforms.mada):
      with self.assertRaisesRegex(ValueError, message):
        make(0.1, **options)

  def test_bounds_may_be_widened(self):
    tx = transforms.mada(0.1, b2=0.999, bounds={'b2': (0.5, 0.9999)})
    found = transforms.mada_coefficients(tx.init(jnp.ones(2)))
    np.testing.assert_allclose(found['b2'], 0.999, rtol=1e-6)

  def test_a_learning_rate_is_needed(self):
    for make in (transforms.scale_by_mada, transforms.mada):
      with self.assertRaisesRegex(TypeError, 'learning_rate'):
        make()

  @parameterized.parameters(jnp.int32, jnp.complex64, jnp.bool_)
  def test_leaves(self, dtype):
    params = {'good': jnp.ones(2), 'bad': jnp.ones(2, dtype)}
    message = f'params must be of real floats, got {jnp.dtype(dtype)}'
    with self.assertRaisesRegex(TypeError, message):
      transforms.mada(0.1).init(params)

  def test_decay_needs_params(self):
    tx, g = transforms.mada(0.1), jnp.ones((2, 2))
    with self.assertRaisesRegex(ValueError, 'params'):
      jax.eval_shape(lambda: tx.update(g, tx.init(g)))
