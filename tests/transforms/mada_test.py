"""MADA against a loop over its definition, and what it has to be at corners."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
  'one_rate': {'hyper_learning_rate': 0.1, 'hyper_momentum': 0.9},
  'some_rates': {
    'hyper_learning_rate': {'b1': 0.01},
    'hyper_momentum': {'rho': 0.9},
    'learn': ('b1', 'b2', 'rho'),
  },
  'clip': {'hyper_clip': 0.05},
  'no_clip': {'hyper_clip': None, 'hyper_learning_rate': 10.0},
  'starts_later': {'hyper_start': 10},
  'starts_after_one': {'hyper_start': 1},
  'delay': {'hyper_delay': 1},
  'amsgrad': {'second_moment': 'amsgrad'},
  'released_lion': {'lion_mode': 'released'},
  'released_init': {'init_mode': 'released'},
  'through_mean': {'hyper_through_mean': True},
  'lion_b1': {'lion_b1': 0.5},
  'lion_b2': {'lion_b2': 0.5},
  'eps': {'eps': 0.1},
  'decay': {'weight_decay': 0.5},
  'bounds': {'bounds': {'rho': (0.55, 0.65), 'b1': (0.79, 0.81)}},
  'learns_two': {'learn': ('b1', 'b2')},
  'learns_one': {'learn': ('c',)},
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
  @parameterized.parameters(*CASES)
  def test_matches_the_loop(self, case):
    """Params, coefficients and momenta, step by step."""
    params, coefficients, trace, _ = _want(case)
    with jax.enable_x64(True):
      got = _got(case, jnp.float64)
    self.assertLess(_gap(got, (params, coefficients, trace)), 1e-10)

  @parameterized.parameters('plain', 'amsgrad', 'neither')
  def test_matches_the_loop_in_float32(self, case):
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
        self.assertGreater(gap, 1e-3, msg=case)

  def test_each_coefficient_learns(self):
    _, coefficients, _, h = _want('plain')
    self.assertGreater(np.abs(coefficients[-1] - coefficients[0]).min(), 1e-3)
    np.testing.assert_array_equal(h[:2], np.zeros((2, 6)))
    self.assertGreater(np.abs(h[2]).min(), 0)
