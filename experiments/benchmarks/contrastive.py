"""The contrastive methods: how fast, how exact, how well they train.

Cases, for `--only`:

- `loss`: embeddings given, one forward and backward pass of the loss, 50,000
  samples, d = 128, against what PyTorch users run (`peers_contrastive.py`);
- `gradient error`, `rate`, `toy`: problems with a known gradient, by the
  protocols of `contrastive_toys.py`;
- `step`: a whole training step of EMC² over one of SimCLR, same small ResNet,
  same Adam, stored images of 32 x 32 pixels and no augmentation, which would
  only hide what the method costs;
- `overflow`: how many old states lose their weight at their capacity;
- `kernel`: the Pallas kernels over plain JAX, where there is an accelerator.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import contrastive
from emc2.contrastive import emc2 as emc2_lib
from emc2.contrastive import simclr, sogclr
from emc2.experiments.benchmarks import contrastive_toys as toys
from emc2.experiments.benchmarks import harness
from emc2.kernels import metropolis, row_logsumexp
from emc2.kernels.metropolis import specs as metropolis_specs
from emc2.kernels.row_logsumexp import specs as row_logsumexp_specs

PACKAGES = ('jax', 'jaxlib', 'numpy')
BETA = 5.0
BURN_IN = 0.5
NUM_BATCHES = 16
LOOPS = 50

_OURS = 'emc2.experiments.benchmarks.contrastive'
_PEERS = str(pathlib.Path(__file__).parent / 'peers_contrastive.py')


def make(
  method: str, num_samples: int, **settings: Any
) -> contrastive.Estimator:
  """Makes a method by its name, at the temperature of this benchmark."""
  settings['inverse_temperature'] = BETA
  if method == 'simclr':
    return simclr.simclr(**settings)
  if method == 'sogclr':
    return sogclr.sogclr(num_samples, gamma=0.9, **settings)
  if method == 'emc2':
    return emc2_lib.emc2(num_samples, burn_in=BURN_IN, **settings)
  raise ValueError(f'method must be simclr, sogclr or emc2, got {method!r}.')


def draw_batches(
  num_samples: int, batch_size: int, num_views: int | None, data: Any = ()
) -> list[contrastive.Batch]:
  """Some batches of distinct samples, to be taken in turn."""
  rng = np.random.default_rng(0)
  found = []
  for number in range(NUM_BATCHES):
    index = rng.choice(num_samples, batch_size, replace=False)
    view = contrastive.draw_views(jax.random.key(number), batch_size, num_views)
    found.append(contrastive.Batch(jnp.asarray(index, jnp.int32), view, data))
  return found


def time_loss(
  *, method: str, batch_size: int, num_samples: int, size: int, **settings: Any
):
  """One forward and backward pass of a loss of given embeddings.

  What the incoming states of EMC² are embedded to is given as well.
  """
  estimator = make(method, num_samples, **settings)
  num_views = settings.get('num_views')
  keys = jax.random.split(jax.random.key(0), 3)
  rows = _views(keys[0], batch_size, size)
  chains = 2 * batch_size if num_views else batch_size
  states = _views(keys[1], batch_size, size)[:chains]

  @functools.partial(jax.jit, donate_argnums=0)
  def step(memory, count, rows, states, batch):
    def loss_fn(rows, states, memory):
      given = iter((rows, states))
      embed_fn = lambda params, data, index, view: next(given)
      key = jax.random.fold_in(keys[2], count)
      return estimator.surrogate(key, memory, (), batch, embed_fn)

    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (value, (memory, _)), grads = grad_fn(rows, states, memory)
    return memory, count + 1, value, grads

  memory = jax.jit(estimator.init)(keys[2], ())
  state = [memory, jnp.zeros([], jnp.int32)]
  some = draw_batches(num_samples, batch_size, num_views)

  def call():
    state[0], state[1], value, grads = step(*state, rows, states, some[0])
    some.append(some.pop(0))
    jax.block_until_ready((state, value, grads))

  return call


def _views(key, batch_size, size):
  """Two views of each of some samples, close to each other: (2B, d)."""
  sample_key, view_key = jax.random.split(key)
  samples = jax.random.normal(sample_key, (batch_size, size))
  noise = jax.random.normal(view_key, (2, batch_size, size))
  rows = (samples[None] + 0.5 * noise).reshape(2 * batch_size, size)
  return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


@functools.cache
def _training(method, image_size, num_samples, size, **settings):
  """Stored images, the first state of a run, and its jitted step."""
  from flax import nnx  # The losses alone need no network.

  from emc2.experiments import models

  shape = (image_size, image_size, 3)
  encoder = models.split(
    models.build(
      'resnet_small',
      image_shape=shape,
      embedding=size,
      hidden=size,
      rngs=nnx.Rngs(0),
    )
  )

  def embed_fn(params, data, index, view):
    images = data[index, view.astype(jnp.int32) % 2]
    return encoder.apply_embeddings(params, images.astype(jnp.float32) / 255)

  algorithm = contrastive.algorithm(
    make(method, num_samples, **settings), embed_fn, optax.adam(1e-3)
  )
  root = jax.random.key(0)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    key = jax.random.fold_in(root, state.count)
    return algorithm.step(key, state, batch)

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num_samples, 1, *shape))
  noise = rng.integers(-32, 33, (num_samples, 2, *shape))
  data = jnp.asarray(np.clip(images + noise, 0, 255), jnp.uint8)
  return data, jax.jit(algorithm.init)(root, encoder.params), step


def time_step(
  *,
  method: str,
  batch_size: int,
  num_views: int | None,
  after: int,
  image_size: int = 32,
  num_samples: int = 1024,
  size: int = 128,
  **settings: Any,
):
  """A whole training step, after so many steps of training."""
  if method == 'emc2':
    settings['num_views'] = num_views
  data, first, step = _training(
    method, image_size, num_samples, size, **settings
  )
  some = draw_batches(num_samples, batch_size, num_views, data)
  state = [jax.tree.map(jnp.copy, first)]

  def call():
    state[0], info = step(state[0], some[0])
    some.append(some.pop(0))
    jax.block_until_ready((state[0], info))

  for _ in range(after):
    call()
  return call


def _repeat(fn, args):
  """Runs a kernel many times in one program, each call after the last."""

  @jax.jit
  def run(*args):
    def body(number, drift):
      out = fn(number, drift, *args)
      return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(out))

    return jax.lax.fori_loop(0, LOOPS, body, jnp.zeros([]))

  return lambda: jax.block_until_ready(run(*args))


def time_metropolis(*, spec: str, implementation: str):
  """The sampler, `LOOPS` times."""
  spec = metropolis_specs.SPECS[spec]
  columns = _views(jax.random.key(0), spec.batch, spec.dim).astype(spec.dtype)
  position = jnp.arange(spec.rows, dtype=jnp.int32)
  start = jnp.full((spec.rows,), BETA / 2)

  def fn(number, drift, columns, position, start):
    return metropolis.metropolis(
      jnp.stack([number, number]).astype(jnp.uint32),
      columns[: spec.rows],
      columns,
      position,
      start + 1e-30 * drift,
      inverse_temperature=BETA,
      discard=spec.discard,
      implementation=implementation,
    )

  return _repeat(fn, (columns, position, start))


def time_row_logsumexp(*, spec: str, implementation: str):
  """The log-sum-exp and its gradient, `LOOPS` times."""
  spec = row_logsumexp_specs.SPECS[spec]
  columns = _views(jax.random.key(0), spec.batch, spec.dim).astype(spec.dtype)
  whole = spec.rows == 2 * spec.batch
  position = jnp.arange(spec.rows, dtype=jnp.int32)

  def fn(number, drift, columns):
    del number

    def loss_fn(columns):
      out = row_logsumexp.row_logsumexp(
        columns[: spec.rows],
        None if whole else columns,
        position,
        BETA + 1e-30 * drift,
        implementation=implementation,
      )
      return jnp.sum(out.value)

    return jax.value_and_grad(loss_fn)(columns)

  return _repeat(fn, (columns,))


CASES = {
  'loss': time_loss,
  'step': time_step,
  'metropolis': time_metropolis,
  'row_logsumexp': time_row_logsumexp,
}


def _gradient_error(method, **arguments):
  return toys.gradient_error(toys.METHODS[method], **arguments)


def _rate_slope(method, **arguments):
  return toys.rate_slope(toys.METHODS[method], **arguments)[0]


def _training_toy(method, **arguments):
  ended = toys.training_toy(toys.METHODS[method], **arguments)
  return ended.squared_gradient.tolist(), ended.loss.tolist()


def _overflow(*, batch_size, num_views, capacity, num_steps, num_samples=1024):
  """Share of old states lost in the last tenth of a training run."""
  data, first, step = _training(
    'emc2', 8, num_samples, 128, num_views=num_views, capacity=capacity
  )
  some = draw_batches(num_samples, batch_size, num_views, data)
  state = jax.tree.map(jnp.copy, first)
  found = []
  for number in range(num_steps):
    state, info = step(state, some[number % NUM_BATCHES])
    found.append(float(info.memory.overflow))
  return float(np.mean(found[-max(1, num_steps // 10) :]))


VALUES = {
  'overflow': _overflow,
  'gradient_error': _gradient_error,
  'rate_slope': _rate_slope,
  'training_toy': _training_toy,
  'full_gradient': toys.full_gradient,
}


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, some of each kind at tiny sizes."""
  return [
    *_loss_cases(smoke),
    *_gradient_error_cases(smoke),
    *_rate_cases(smoke),
    *_toy_cases(smoke),
    *_step_cases(smoke),
    *_overflow_cases(smoke),
    *_kernel_cases(smoke),
  ]


# Our method, its settings, their case, its name, targets by batch size.
_LOSSES = (
  (
    'EMC2, 2 fixed views',
    ('emc2', {'num_views': 2}),
    ('released_sampler', 'released sampler, restated in torch'),
    {4: 0.05, 32: 0.03, 256: 0.06, 1024: 0.08},
  ),
  (
    'EMC2, fresh views',
    ('emc2', {}),
    ('released_sampler', 'released sampler, restated in torch'),
    {4: 0.05, 32: 0.03, 256: 0.06, 1024: 0.08},
  ),
  (
    'SogCLR',
    ('sogclr', {}),
    ('gc_loss', 'LibAUC GCLoss'),
    {4: 0.1, 32: 0.1, 256: 0.4, 1024: 0.45},
  ),
  (
    'SimCLR',
    ('simclr', {}),
    ('nt_xent', 'torch NT-Xent by hand'),
    {4: None, 32: 1.0, 256: 0.4, 1024: 0.4},
  ),
  (
    'SimCLR',
    ('simclr', {}),
    ('metric_learning', 'pytorch-metric-learning NTXentLoss'),
    {32: None, 256: 0.001},
  ),
)


def _loss_cases(smoke):
  found = []
  for name, (method, settings), (their, peer), targets in _LOSSES:
    for batch_size, bound in targets.items():
      if smoke and batch_size != 32:
        continue
      problem = dict(batch_size=batch_size, num_samples=50_000, size=128)
      ours = harness.Side(
        _OURS, 'loss', {'method': method} | settings | problem
      )
      theirs = harness.Side(
        _PEERS, their, {'inverse_temperature': BETA} | problem, peer=True
      )
      run = functools.partial(
        _race,
        name=f'loss: {name}, B={batch_size}',
        metric='forward and backward',
        ours=ours,
        theirs=theirs,
        peer=peer,
        target=bound and harness.Target(bound),
      )
      found.append(harness.Case(f'loss: {name}, B={batch_size}, {their}', run))
  return found


def _race(context, **arguments):
  return [context.race(**arguments)]


_SIMCLR = 'SimCLR, decoupled'
_EMC2 = ('EMC2', 'EMC2, burn-in 0.5', 'EMC2, uniform proposals')


def _methods(smoke):
  return (_SIMCLR, 'EMC2') if smoke else tuple(toys.METHODS)


def _gradient_error_cases(smoke):
  sizes = dict(num_samples=16, size=4, visits=2) if smoke else {}
  bounds = {4: 0.35} if smoke else {4: 0.35, 16: 0.3}

  def run(context, batch_size, bound):
    name = f'gradient error: {{}}, B={batch_size}'
    arguments = dict(batch_size=batch_size) | sizes
    errors = {
      method: context.value(
        harness.Side(_OURS, 'gradient_error', {'method': method} | arguments)
      )
      for method in _methods(smoke)
    }
    return [
      _compare(
        name.format(method),
        '|mean g - grad L| / |grad L|',
        [error],
        [errors[_SIMCLR]],
        method,
        bound,
      )
      for method, error in errors.items()
    ]

  return [
    harness.Case(
      f'gradient error, B={batch_size}',
      functools.partial(run, batch_size=batch_size, bound=bound),
    )
    for batch_size, bound in bounds.items()
  ]


def _compare(name, metric, ours, simclr_figures, method, bound):
  """A row of some method against SimCLR, a target for those of the paper."""
  mean = lambda x: math.fsum(x) / len(x)
  figure = lambda x: harness.Figure(mean(x), min(x), max(x))
  row = harness.Row(name=name, metric=metric, unit='', ours=figure(ours))
  if method == _SIMCLR:
    return row
  target = harness.Target(bound) if bound and method in _EMC2 else None
  return dataclasses.replace(
    row,
    peer=_SIMCLR,
    theirs=figure(simclr_figures),
    ratio=harness.Figure.exact(mean(ours) / mean(simclr_figures)),
    target=target,
  )


def _rate_cases(smoke):
  sizes = {}
  if smoke:
    sizes = dict(lengths=(10, 20), seeds=(0,), num_samples=8, size=4, width=2)
  methods = ('EMC2, uniform proposals', 'EMC2, burn-in 0.5', _SIMCLR)

  def run(context, method):
    slope = context.value(
      harness.Side(_OURS, 'rate_slope', {'method': method} | sizes)
    )
    metric, bound = 'slope of log mean |grad L|^2 over log T', -0.2
    if method == _SIMCLR:
      metric, slope, bound = f'|{metric}|', abs(slope), 0.1
    return [
      harness.Row(
        name=f'rate: {method}, B=4',
        metric=metric,
        unit='',
        ours=harness.Figure.exact(slope),
        target=harness.Target(bound, of='ours'),
      )
    ]

  return [
    harness.Case(f'rate: {method}', functools.partial(run, method=method))
    for method in (methods[1:] if smoke else methods)
  ]


def _toy_cases(smoke):
  sizes = {}
  if smoke:
    sizes = dict(num_steps=10, seeds=(0,), num_samples=8, size=4, width=2)

  def run(context, batch_size):
    arguments = dict(batch_size=batch_size) | sizes
    ended = {
      method: context.value(
        harness.Side(_OURS, 'training_toy', {'method': method} | arguments)
      )
      for method in _methods(smoke)
    }
    rows = []
    for number, metric in enumerate(('final |grad L|^2', 'final L')):
      for method, figures in ended.items():
        rows.append(
          _compare(
            f'toy: {method}, B={batch_size}',
            metric,
            figures[number],
            ended[_SIMCLR][number],
            method,
            None if number else 0.2,
          )
        )
    return rows

  def run_full(context):
    steps = {'num_steps': 10, 'seeds': (0,)} if smoke else {}
    side = harness.Side(_OURS, 'full_gradient', steps)
    found = context.value(side)
    return [
      harness.Row(
        name='toy: exact gradients',
        metric=metric,
        unit='',
        ours=harness.Figure.exact(value),
      )
      for metric, value in zip(
        ('final |grad L|^2', 'final L'), found, strict=True
      )
    ]

  found = [
    harness.Case(
      f'toy, B={batch_size}', functools.partial(run, batch_size=batch_size)
    )
    for batch_size in ((4,) if smoke else (2, 4, 8))
  ]
  return [*found, harness.Case('toy, exact gradients', run_full)]


def _step_cases(smoke):
  found = []
  for batch_size in (4,) if smoke else (32, 256):
    variants = {
      'reencode': {},
      'reencode, room for B/16': {'capacity': max(1, batch_size // 16)},
      'cached': {'out_of_batch': 'cached', 'embedding_size': 128},
      'drop': {'out_of_batch': 'drop'},
    }
    for num_views in (2, None):
      for variant, settings in variants.items():
        for after in (0, 20) if batch_size == 32 else (0,):
          problem = dict(batch_size=batch_size, after=after)
          problem['num_views'] = num_views
          if smoke:
            problem |= dict(image_size=4, num_samples=16)
          views = '2 fixed' if num_views else 'fresh'
          when = f'after {after} steps' if after else 'from the start'
          name = f'step: EMC2, {variant}, {views} views, B={batch_size}, {when}'
          race = functools.partial(
            _race,
            name=name,
            metric='training step, small ResNet, Adam',
            ours=harness.Side(
              _OURS, 'step', {'method': 'emc2'} | settings | problem
            ),
            theirs=harness.Side(_OURS, 'step', {'method': 'simclr'} | problem),
            peer='SimCLR of ours',
            target=harness.Target(1.1),
          )
          found.append(harness.Case(name, race))
  return found[:1] if smoke else found


def _overflow_cases(smoke):
  """What the speed of a small capacity costs: old states without weight."""
  num_steps = 1 if smoke else 200

  def run(context, batch_size, num_views):
    arguments = dict(batch_size=batch_size, num_views=num_views)
    arguments |= dict(capacity=batch_size // 16, num_steps=num_steps)
    share = context.value(harness.Side(_OURS, 'overflow', arguments))
    views = '2 fixed' if num_views else 'fresh'
    return [
      harness.Row(
        name=f'overflow: room for B/16, {views} views, B={batch_size}',
        metric=f'share of old states lost, {num_steps} steps, 8 pixels',
        unit='',
        ours=harness.Figure.exact(share),
      )
    ]

  return [
    harness.Case(
      f'overflow: B={batch_size}, views={num_views}',
      functools.partial(run, batch_size=batch_size, num_views=num_views),
    )
    for batch_size in (32, 256)
    for num_views in (2, None)
  ][: 1 if smoke else None]


def _kernel_cases(smoke):
  del smoke
  kernels = {
    'metropolis': metropolis_specs.SPECS,
    'row_logsumexp': row_logsumexp_specs.SPECS,
  }

  def run(context, kernel, spec):
    name = f'kernel: {kernel}, {spec}'
    metric = f'{LOOPS} calls'
    platform = {'cuda': 'gpu', 'gpu': 'gpu', 'tpu': 'tpu'}.get(context.platform)
    if platform is None:
      return [
        harness.Row(
          name=name,
          metric=metric,
          unit='us',
          peer='plain JAX',
          note='no accelerator that a kernel is for',
        )
      ]
    side = lambda implementation: harness.Side(
      _OURS,
      kernel,
      {'spec': spec, 'implementation': implementation},
      accelerated=True,
    )
    return _race(
      context,
      name=name,
      metric=metric,
      unit='us',
      ours=side(f'pallas_{platform}'),
      theirs=side('xla'),
      peer='plain JAX',
    )

  return [
    harness.Case(
      f'kernel: {kernel}, {spec}',
      functools.partial(run, kernel=kernel, spec=spec),
    )
    for kernel, specs in kernels.items()
    for spec in specs
  ]
