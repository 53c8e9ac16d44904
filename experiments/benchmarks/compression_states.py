"""Optimisers with states in 8 bits: their speed, their size, their path.

Cases, for `--only`:

- `states: step`: a step on 50 million parameters in ten leaves, jitted, with
  params and state donated, against `optax.adam`, against the AdamW of
  bitsandbytes in 8 bits, and that of torch in 32;
- `states: kernel`: the step on one leaf by parts of the cache on a CPU, or by
  the kernel of the accelerator, against plain JAX;
- `states: bytes`: what the state holds for each parameter;
- `states: digits`: the training loss and the test accuracy of a perceptron on
  digits over those of Adam in 32 bits, by seeds.
"""

import functools
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import transforms
from emc2.compression import blockwise
from emc2.experiments.benchmarks import harness, optimizer_steps
from emc2.experiments.data import digits
from emc2.kernels import adam_8bit

PACKAGES = ('jax', 'jaxlib', 'optax', 'numpy')

_OURS = __name__
_PEERS = str(pathlib.Path(__file__).with_name('peers_compression_states.py'))
_LEAVES = 10

OPTIMIZERS = {
  'adam': functools.partial(optax.adam, 1e-3),
  'adamw_8bit': functools.partial(transforms.adamw_8bit, 1e-3),
  'adamw_8bit_2048': functools.partial(
    transforms.adamw_8bit, 1e-3, block_size=2048
  ),
  'quantize_state': lambda: transforms.quantize_state(optax.adam(1e-3)),
}


def _draw(count, *shape):
  draw = np.random.default_rng(0).standard_normal
  return [jnp.asarray(1e-2 * draw(shape, np.float32)) for _ in range(count)]


def time_step(*, optimizer: str, rows: int, columns: int, leaves: int):
  """A step on so many matrices, with the same gradients each time."""
  tx = OPTIMIZERS[optimizer]()
  params = _draw(leaves, rows, columns)
  grads = _draw(leaves, rows, columns)
  return optimizer_steps.repeat(tx, params, grads)


def time_kernel(*, implementation: str, rows: int, columns: int):
  """The step on one matrix."""
  (grad,) = _draw(1, rows, columns)
  mu = blockwise.zeros_like(grad)
  nu = blockwise.zeros_like(grad, blockwise.UNSIGNED)
  k = adam_8bit.Scalars.of(0.9, 0.999, 1e-8, jnp.asarray(9.0), jnp.float32)
  run = functools.partial(adam_8bit.step, implementation=implementation)
  run = jax.jit(run, donate_argnums=(0, 1, 2))
  carry = grad, mu, nu

  def call():
    nonlocal carry
    carry = jax.block_until_ready(run(*carry, k))

  return call


CASES = {'step': time_step, 'kernel': time_kernel}


def state_bytes(*, optimizer: str) -> float:
  """Bytes of the state for each float32 parameter."""
  params = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
  state = jax.eval_shape(OPTIMIZERS[optimizer]().init, params)
  leaves = jax.tree.leaves(state)
  return sum(x.size * x.dtype.itemsize for x in leaves if x.ndim) / 2**22


def train_digits(
  *, optimizer: str, num_seeds: int, num_epochs: int, **options
) -> dict[str, float]:
  """Trains 64-128-10 perceptrons: loss, accuracy and the largest update.

  Args:
    optimizer: 'adam' or 'adamw_8bit'.
    num_seeds: Of the first weights and of the order of examples.
    num_epochs: Of 1500 examples, 32 at a time.
    **options: Of the 8-bit optimiser.

  Returns:
    Means over seeds of the final training loss and of the test accuracy, and
    the largest entry of any update before the learning rate.
  """
  splits = [digits.read(split) for split in ('train', 'test')]
  images = np.concatenate([x.images for x in splits]).reshape(-1, 64)
  labels = jnp.asarray(np.concatenate([x.labels for x in splits]))
  images = jnp.asarray(images, jnp.float32) / float(np.max(images))
  num_train, batch = 1500, 32
  tx = optax.scale_by_adam()
  if optimizer != 'adam':
    tx = transforms.scale_by_adam_8bit(min_8bit_size=1024, **options)

  def loss_fn(params, rows, of):
    hidden = jax.nn.relu(rows @ params['w1'] + params['b1'][None])
    logits = hidden @ params['w2'] + params['b2'][None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, of)
    return jnp.mean(loss), jnp.mean(jnp.argmax(logits, axis=-1) == of)

  def run(key):
    first, second, order = jax.random.split(key, 3)
    params = {
      'w1': jax.random.normal(first, (64, 128)) * (2 / 64) ** 0.5,
      'b1': jnp.zeros(128),
      'w2': jax.random.normal(second, (128, 10)) * (1 / 128) ** 0.5,
      'b2': jnp.zeros(10),
    }

    def step(carry, places):
      params, state = carry
      grads, _ = jax.grad(loss_fn, has_aux=True)(
        params, images[places], labels[places]
      )
      updates, state = tx.update(grads, state, params)
      most = optax.tree.max(jax.tree.map(jnp.abs, updates))
      updates = jax.tree.map(lambda u: -1e-3 * u, updates)
      return (optax.apply_updates(params, updates), state), most

    epoch = lambda key: jax.random.permutation(key, num_train)[
      : num_train // batch * batch
    ].reshape(-1, batch)
    places = jax.vmap(epoch)(jax.random.split(order, num_epochs))
    (params, _), most = jax.lax.scan(
      step, (params, tx.init(params)), places.reshape(-1, batch)
    )
    loss, _ = loss_fn(params, images[:num_train], labels[:num_train])
    _, accuracy = loss_fn(params, images[num_train:], labels[num_train:])
    return loss, accuracy, jnp.max(most)

  found = [jax.jit(run)(jax.random.key(seed)) for seed in range(num_seeds)]
  losses, accuracies, most = zip(*found, strict=True)
  return {
    'loss': statistics.mean(map(float, losses)),
    'accuracy': statistics.mean(map(float, accuracies)),
    'most': max(map(float, most)),
  }


VALUES = {'state_bytes': state_bytes, 'train_digits': train_digits}


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  return [
    *_step_cases(smoke),
    *_kernel_cases(smoke),
    *_bytes_cases(),
    *_digits_cases(smoke),
  ]


def _step_cases(smoke):
  sizes = {'rows': 2048, 'columns': 2432, 'leaves': _LEAVES}
  if smoke:
    sizes = {'rows': 64, 'columns': 256, 'leaves': 2}
  size = sizes['rows'] * sizes['columns'] * sizes['leaves']

  def run(context, ours, peer, module, theirs, bound):
    side = lambda module, optimizer: harness.Side(
      module,
      'step',
      {'optimizer': optimizer, **sizes},
      peer=module == _PEERS,
    )
    return [
      context.race(
        name=f'states: {ours}, {size / 1e6:.3g}M parameters',
        metric='one step, float32 params',
        ours=side(_OURS, ours),
        theirs=side(module, theirs),
        peer=peer,
        target=bound and harness.Target(bound),
      )
    ]

  races = (
    ('adamw_8bit', 'optax.adam', _OURS, 'adam', None),
    ('adamw_8bit_2048', 'optax.adam', _OURS, 'adam', None),
    ('quantize_state', 'optax.adam', _OURS, 'adam', None),
    ('adamw_8bit', 'bitsandbytes AdamW8bit', _PEERS, 'adamw_8bit', 0.1),
    ('adamw_8bit', 'torch AdamW, fused', _PEERS, 'adamw', None),
  )
  names = ('ours', 'peer', 'module', 'theirs', 'bound')
  return [
    harness.Case(
      f'states: step: {race[0]} over {race[1]}',
      functools.partial(run, **dict(zip(names, race, strict=True))),
    )
    for race in races
  ]


def _kernel_cases(smoke):
  rows, columns = (1024, 256) if smoke else (2048, 2432)

  def run(context):
    side = lambda form: harness.Side(
      _OURS,
      'kernel',
      {'implementation': form, 'rows': rows, 'columns': columns},
    )
    name = f'states: kernel, {rows * columns / 1e6:.3g}M parameters'
    metric = 'decode, update, code'
    made = [
      context.race(
        name=f'{name}, parts of the cache',
        metric=metric,
        ours=side('blocked'),
        theirs=side('xla'),
        peer='plain JAX',
      )
    ]
    if context.platform == 'tpu':
      made.append(
        context.race_kernel(name, metric, _OURS, rows=4096, columns=4096)
      )
    return made

  return [harness.Case('states: kernel', run)]


def _bytes_cases():
  def run(context):
    ask = lambda name: context.value(
      harness.Side(_OURS, 'state_bytes', {'optimizer': name})
    )
    return [
      harness.Row(
        name=f'states: {name}',
        metric='state for each float32 parameter',
        unit='B',
        ours=harness.Figure.exact(ask(name)),
        peer='optax.adam',
        theirs=harness.Figure.exact(ask('adam')),
        ratio=harness.Figure.exact(ask(name) / ask('adam')),
        target=harness.Target(0.27),
      )
      for name in ('adamw_8bit', 'adamw_8bit_2048', 'quantize_state')
    ]

  return [harness.Case('states: bytes', run)]


def _digits_cases(smoke):
  sizes = {'num_seeds': 3, 'num_epochs': 30}
  if smoke:
    sizes = {'num_seeds': 1, 'num_epochs': 1}

  def run(context, name, options, bound):
    ask = lambda optimizer, **options: context.value(
      harness.Side(
        _OURS, 'train_digits', {'optimizer': optimizer, **sizes, **options}
      )
    )
    theirs, ours = ask('adam'), ask('adamw_8bit', **options)
    return [
      harness.Row(
        name=f'states: digits, {name}',
        metric='final training loss, mean of seeds',
        unit='',
        ours=harness.Figure.exact(ours['loss']),
        peer='Adam in 32 bits',
        theirs=harness.Figure.exact(theirs['loss']),
        ratio=harness.Figure.exact(ours['loss'] / theirs['loss']),
        target=bound and harness.Target(bound),
        note=f'accuracy {ours["accuracy"]:.3f} for {theirs["accuracy"]:.3f}, '
        f'largest update {ours["most"]:.3g} for {theirs["most"]:.3g}',
      )
    ]

  variants = {
    'dynamic, B = 256': ({}, 1.1),
    'dynamic, B = 2048': ({'block_size': 2048}, 1.1),
    'without floor, B = 256': ({'floor': False}, None),
    'linear without floor, B = 256': ({'map': 'linear', 'floor': False}, None),
  }
  return [
    harness.Case(
      f'states: digits: {name}',
      functools.partial(run, name=name, options=options, bound=bound),
    )
    for name, (options, bound) in variants.items()
  ]
