"""Steps of MADA: what they cost over those of Adam, and what they bring.

Cases, for `--only`:

- `step`: one step on 50 million parameters in ten leaves, jitted, with params
  and state donated, against `optax.adam`; the bytes alone say 3.6 in the exact
  order and 2.4 with `hyper_delay`, where one pass does;
- `pass`: the first of the two passes over a leaf, against plain JAX;
- `state`: what the state holds for each parameter;
- `robust`: Adam's and MADA's final training loss from twelve starts of the
  betas, good and bad, by seeds, and whether they differ.
"""

import functools
import tempfile

import jax
import jax.numpy as jnp
import optax

from emc2 import transforms
from emc2.experiments import optimizer_search, runner
from emc2.experiments.benchmarks import harness, optimizer_steps
from emc2.kernels import mada

PACKAGES = ('jax', 'jaxlib', 'optax', 'numpy', 'scipy', 'flax')

_OURS = __name__
_LEAVES = 10

OPTIMIZERS = {
  'adam': functools.partial(optax.adam, 1e-3),
  'avgrad': functools.partial(transforms.avgrad, 1e-3),
  'mada': functools.partial(transforms.mada, 1e-3, weight_decay=0.0),
  'mada_delayed': functools.partial(
    transforms.mada, 1e-3, weight_decay=0.0, hyper_delay=1
  ),
  'mada_without_lion': functools.partial(
    transforms.mada,
    1e-3,
    weight_decay=0.0,
    learn=('b1', 'b2', 'b3', 'rho', 'c'),
  ),
  'mada_bfloat16': functools.partial(
    transforms.mada, 1e-3, weight_decay=0.0, mu_dtype=jnp.bfloat16
  ),
}


def _draw(side, *seeds):
  key = jax.random.key(0)
  one = lambda seed: jax.random.normal(
    jax.random.fold_in(key, seed), (side, side)
  )
  return [1e-2 * one(seed) for seed in seeds]


def time_step(*, optimizer: str, side: int):
  """A step on ten square leaves, with the same gradients each time."""
  tx = OPTIMIZERS[optimizer]()
  params = _draw(side, *range(_LEAVES))
  grads = _draw(side, *range(_LEAVES, 2 * _LEAVES))
  return optimizer_steps.repeat(tx, params, grads)


def time_pass(*, implementation: str, side: int):
  """The pass with derivatives over one square leaf."""
  m, v, bar, n, previous, lion, grad, later = _draw(side, *range(8))
  moments = mada.Moments(m, v**2, bar**2, n, previous, lion)
  start = jnp.asarray((0.9, 0.95, 0.1, 0.5, 0.9, 0.9))
  k = mada.Scalars.of(start, jnp.int32(10), mada.Constants())

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def run(moments, grad, later):
    return mada.exchange(
      *(moments, grad, later, later, k, mada.Settings()),
      implementation=implementation,
    )

  carry = moments, grad

  def call():
    nonlocal carry
    *carry, _ = jax.block_until_ready(run(*carry, later))

  return call


CASES = {'step': time_step, 'pass': time_pass}


def state_bytes(*, optimizer: str) -> float:
  """Bytes of the state for each float32 parameter."""
  params = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
  state = jax.eval_shape(OPTIMIZERS[optimizer]().init, params)
  leaves = jax.tree.leaves(state)
  return sum(x.size * x.dtype.itemsize for x in leaves if x.size >= 1e6) / 1e6


def robust(**settings) -> dict[str, float]:
  """What the experiment comes to, in a folder that goes again."""
  with tempfile.TemporaryDirectory() as folder:
    config = optimizer_search.Config(**settings)
    return runner.start(config, optimizer_search.run, folder)


VALUES = {'state_bytes': state_bytes, 'robust': robust}


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  return [
    *_step_cases(smoke),
    *_pass_cases(smoke),
    *_state_cases(),
    *_robust_cases(smoke),
  ]


def _step_cases(smoke):
  side = 64 if smoke else 2236
  targets = {
    'mada': 3.8,
    'mada_delayed': 2.6,
    'mada_without_lion': None,
    'mada_bfloat16': None,
    'avgrad': 1.0,
  }

  def run(context, name, target):
    make = lambda optimizer: harness.Side(
      _OURS, 'step', {'optimizer': optimizer, 'side': side}
    )
    return [
      context.race(
        name=f'step: {name}, {_LEAVES * side**2 / 1e6:.3g}M parameters',
        metric='one step, float32',
        ours=make(name),
        theirs=make('adam'),
        peer='optax.adam',
        target=target and harness.Target(target),
      )
    ]

  return [
    harness.Case(
      f'step: {name}', functools.partial(run, name=name, target=target)
    )
    for name, target in targets.items()
  ]


def _pass_cases(smoke):
  side = 96 if smoke else 2236

  def run(context):
    make = lambda form: harness.Side(
      _OURS, 'pass', {'implementation': form, 'side': side}
    )
    return [
      context.race(
        name=f'pass: blocks of the cache, {side**2 / 1e6:.3g}M parameters',
        metric='moments and inner products, float32',
        ours=make('blocked'),
        theirs=make('xla'),
        peer='plain JAX',
      )
    ]

  return [harness.Case('pass', run)]


def _state_cases():
  def run(context):
    ask = lambda name: context.value(
      harness.Side(_OURS, 'state_bytes', {'optimizer': name})
    )
    targets = {'mada_bfloat16': 20.0}
    return [
      harness.Row(
        name=f'state: {name}',
        metric='state for each float32 parameter',
        unit='B',
        ours=harness.Figure.exact(ask(name)),
        peer='optax.adam',
        theirs=harness.Figure.exact(ask('adam')),
        ratio=harness.Figure.exact(ask(name) / ask('adam')),
        target=(
          harness.Target(targets[name], of='ours') if name in targets else None
        ),
      )
      for name in ('mada', 'mada_without_lion', 'mada_bfloat16', 'avgrad')
    ]

  return [harness.Case('state', run)]


def _robust_cases(smoke):
  sizes = {'num_seeds': 5, 'num_steps': 1000}
  if smoke:
    sizes = {'num_seeds': 1, 'num_steps': 8, 'b1': '0.01,0.9', 'b2': '0.99'}

  def run(context, rate):
    settings = sizes | {
      'problem': 'digits',
      'digits_model': 'mlp',
      'optimizers': 'adam,hyper_adam,mada',
      'learning_rate': rate,
    }
    found = context.value(harness.Side(_OURS, 'robust', settings))
    name = f'robust: digits, rate {rate:g}'
    rows = []
    for method in ('hyper_adam', 'mada'):
      for of, bound in (('max', 0.1), ('median', 1.0)):
        ours = found[f'digits.{method}.{of}']
        theirs = found[f'digits.adam.{of}']
        held = method == 'mada' and rate >= 1e-2
        rows.append(
          harness.Row(
            name=f'{name}, {method}',
            metric=f'final training loss, {of} over starts and seeds',
            unit='',
            ours=harness.Figure.exact(ours),
            peer='optax.adam',
            theirs=harness.Figure.exact(theirs),
            ratio=harness.Figure.exact(ours / theirs),
            target=harness.Target(bound) if held else None,
          )
        )
    test = 'digits.mada_vs_adam'
    rows.append(
      harness.Row(
        name=f'{name}, mada',
        metric='p-value of equal losses from bad starts (Wilcoxon)',
        unit='',
        ours=harness.Figure.exact(found[f'{test}.p_value']),
        note=f'{found[f"{test}.num_pairs"]:.0f} pairs of start and seed, '
        f'median difference {found[f"{test}.median_difference"]:.2g}',
      )
    )
    return rows

  return [
    harness.Case(f'robust: {rate:g}', functools.partial(run, rate=rate))
    for rate in ((1e-2,) if smoke else (1e-3, 1e-2, 3e-2))
  ]
