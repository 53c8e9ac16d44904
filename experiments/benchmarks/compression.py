"""Codes for gradients: what a step of one worker costs, and what it sends.

Cases, for `--only`:

- `code`: one step of one worker on 25 million entries, 5000 x 5000, with error
  feedback: the gradient is added to the memory, the payload is made, and so
  are what it stands for and what is lost. Buffers are donated, payloads are
  outputs. Against torch, and against the same maths in plain jax.numpy, which
  packs no bits;
- `feedback`: the largest entries with their memory, in place and without the
  dense array that they stand for: what a code costs that asks for none;
- `select`: the largest entries alone, against `jax.lax.top_k`;
- `sketch`: insertion into a count sketch, against a scatter;
- `wire`: bits of a payload for each entry.

The states of optimisers in 8 bits follow, from `compression_states`.
"""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp

from emc2 import compression
from emc2.experiments.benchmarks import compression_states, harness
from emc2.kernels import count_sketch, top_k

PACKAGES = ('jax', 'jaxlib', 'numpy')

_OURS = __name__
_PEERS = str(pathlib.Path(__file__).parent / 'peers_compression.py')
_SIDE = 5000


def _code(name, value):
  """One of our codes by the name of its case."""
  from emc2.compression import low_rank, quantize, sign, sparse

  return {
    'top_k': lambda: sparse.top_k(fraction=value),
    'random_k': lambda: sparse.random_k(fraction=value),
    'block': lambda: sparse.block_k(fraction=value),
    'sign': sign.scaled_sign,
    'bfloat16': lambda: quantize.cast(jnp.bfloat16),
    'qsgd': lambda: quantize.qsgd(value),
    'power_sgd': lambda: low_rank.power_sgd(value),
  }[name]()


def _plain(name, value):
  """`(p, key, q) -> (what p is sent as, q)` as one writes it first."""

  def largest(p, key, q):
    del key
    flat = p.reshape(-1)
    _, indices = jax.lax.top_k(jnp.abs(flat), int(value * p.size))
    sent = jnp.zeros_like(flat).at[indices].set(flat[indices])
    return sent.reshape(p.shape), q

  def random(p, key, q):
    flat, k = p.reshape(-1), int(value * p.size)
    indices = jax.random.choice(key, p.size, (k,), replace=False)
    sent = jnp.zeros_like(flat).at[indices].set(flat[indices])
    return sent.reshape(p.shape), q

  def block(p, key, q):
    flat, k = p.reshape(-1), int(value * p.size)
    start = jax.random.randint(key, (), 0, p.size)
    after = (jnp.arange(p.size) - start) % p.size
    return jnp.where(after < k, flat, 0.0).reshape(p.shape), q

  def sign(p, key, q):
    del key
    scale = jnp.mean(jnp.abs(p))
    return jnp.where(p >= 0, scale, -scale), q

  def bfloat16(p, key, q):
    del key
    return p.astype(jnp.bfloat16).astype(jnp.float32), q

  def qsgd(p, key, q):
    norm = jnp.linalg.norm(p)
    levels = jnp.abs(p) * (value / norm)
    low = jnp.floor(levels)
    up = jax.random.uniform(key, p.shape) < levels - low
    return jnp.sign(p) * (low + up) * (norm / value), q

  def power_sgd(p, key, q):
    del key
    left, _ = jnp.linalg.qr(p @ q)
    q = p.T @ left
    return left @ q.T, q

  return {
    'top_k': largest,
    'random_k': random,
    'block': block,
    'sign': sign,
    'bfloat16': bfloat16,
    'qsgd': qsgd,
    'power_sgd': power_sgd,
  }[name]


def _draw(side):
  keys = jax.random.split(jax.random.key(0))
  return [jax.random.normal(key, (side, side)) for key in keys]


def _repeat(step, grad, memory, *rest):
  """A call that feeds a step what it returned, in the same buffers."""
  key = jax.random.key(1)
  run = jax.jit(step, donate_argnums=(0, 1, 2), keep_unused=True)
  payload = jax.eval_shape(step, grad, memory, None, *rest, key)[2]
  payload = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), payload)
  carry = grad, memory, payload, *rest

  def call():
    nonlocal carry
    carry = jax.block_until_ready(run(*carry, key))
    return carry

  return call


def time_code(*, name: str, value: float, side: int, feedback: bool = True):
  """A step with one of our codes, in memory that is there already."""
  code = _code(name, value)

  def step(grad, memory, payload, state, key):
    del payload
    p = grad + memory if feedback else grad
    payload = ()
    if code.reduce is None:
      like = jax.ShapeDtypeStruct(p.shape, p.dtype)
      payload, state = code.compress(state, p, key)
      sent = code.decompress(state, payload, like)
    else:
      done = compression.reduce(code, [state], [p], [key])
      (sent,), (state,) = done.sent, done.states
    return sent, p - sent if feedback else memory, payload, state

  grad, memory = _draw(side)
  state = code.init(grad.shape, grad.dtype, jax.random.key(2))
  return _repeat(step, grad, memory, state)


def time_plain(*, name: str, value: float, side: int, feedback: bool = True):
  """The same with the form that one writes first."""
  code = _plain(name, value)

  def step(grad, memory, payload, q, key):
    del payload
    p = grad + memory if feedback else grad
    sent, q = code(p, key, q)
    return sent, p - sent if feedback else memory, (), q

  grad, memory = _draw(side)
  q = None
  if name == 'power_sgd':
    q = jax.random.normal(jax.random.key(2), (side, value))
  return _repeat(step, grad, memory, q)


def time_feedback(*, fraction: float, side: int):
  """Adds to the memory, takes the largest entries and clears them there."""
  grad, memory = _draw(side)
  k, rows = int(fraction * grad.size), max(1, side // 50)

  @functools.partial(jax.jit, donate_argnums=0)
  def run(memory, grad):
    # A sum of two whole arrays would be a third, which the system must map.
    def add(i, memory):
      start = jnp.minimum(i * rows, side - rows)
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows)
      row = start + jnp.arange(rows)[:, None]
      more = jnp.where(row >= i * rows, cut(grad), 0.0)
      return jax.lax.dynamic_update_slice_in_dim(
        memory, cut(memory) + more, start, 0
      )

    memory = jax.lax.fori_loop(0, -(-side // rows), add, memory).reshape(-1)
    found = top_k.top_k(memory, k)
    at = memory.at[found.indices]
    memory = at.set(0.0, mode='promise_in_bounds', unique_indices=True)
    return memory.reshape(side, side), found

  def call():
    nonlocal memory
    memory, found = jax.block_until_ready(run(memory, grad))
    return found

  return call


def time_select(*, implementation: str, fraction: float, side: int):
  """The largest entries of an array."""
  x = _draw(side)[0].reshape(-1)
  k = int(fraction * x.size)
  run = jax.jit(lambda x: top_k.top_k(x, k, implementation=implementation))
  return lambda: jax.block_until_ready(run(x))


def time_sketch(*, implementation: str, size: float, side: int):
  """The insertion of a square matrix."""
  v, _ = _draw(side)
  width = int(size * side)
  keys = jax.random.split(jax.random.key(3))
  buckets = jax.random.randint(keys[0], (side,), 0, width, jnp.int32)
  signs = jax.random.rademacher(keys[1], (side,), jnp.float32)
  run = jax.jit(
    lambda v: count_sketch.insert(
      v, buckets, signs, width, implementation=implementation
    )
  )
  return lambda: jax.block_until_ready(run(v))


CASES = {
  'code': time_code,
  'plain': time_plain,
  'feedback': time_feedback,
  'select': time_select,
  'sketch': time_sketch,
}


def wire_bits(*, name: str, value: float, side: int) -> float:
  """Bits of a payload for each entry."""
  shape = (side, side)
  return compression.wire_bits(_code(name, value), shape) / math.prod(shape)


VALUES = {'wire_bits': wire_bits}

# Case and value of a code; the case of the peer, its arguments beside, its
# name, and the target.
_RACES = (
  ('top_k', 0.01, 'top_k', {'fraction': 0.01}, 'torch.topk', 0.05),
  (
    'top_k',
    0.01,
    'top_k',
    {'fraction': 0.01, 'sampled': True},
    'torch, sampled threshold',
    0.4,
  ),
  ('top_k', 0.001, 'top_k', {'fraction': 0.001}, 'torch.topk', 0.1),
  ('sign', 0, 'sign', {}, 'torch', 0.15),
  ('block', 0.1, 'block', {'fraction': 0.1}, 'torch', 1.2),
  ('bfloat16', 0, 'bfloat16', {}, 'torch', 0.5),
  ('power_sgd', 4, 'power_sgd', {'rank': 4}, 'torch, by hand', 0.2),
  ('power_sgd', 32, 'power_sgd', {'rank': 32}, 'torch, by hand', 0.2),
  ('power_sgd', 4, 'hook', {'rank': 4}, "torch's DDP hook", 0.15),
)
_ALONE = (('random_k', 0.01), ('qsgd', 16))


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  side = 512 if smoke else _SIDE
  return [
    *_code_cases(side),
    *_feedback_cases(side),
    *_select_cases(side),
    *_sketch_cases(side),
    harness.Case('wire', functools.partial(_wire, side=side)),
    *compression_states.cases(smoke),
  ]


def _label(name, value):
  return f'{name} {value:g}' if value else name


def _code_cases(side):
  count = f'{side**2 / 1e6:.3g}M entries'

  def against_torch(context, name, value, case, arguments, peer, target):
    settings = {'name': name, 'value': value, 'side': side}
    settings['feedback'] = name != 'bfloat16'
    theirs = arguments | {'side': side}
    return [
      context.race(
        name=f'{_label(name, value)}, {count}',
        metric='one step, one worker',
        ours=harness.Side(_OURS, 'code', settings),
        theirs=harness.Side(_PEERS, case, theirs, peer=True),
        peer=peer,
        target=harness.Target(target),
      )
    ]

  def against_plain(context, name, value):
    settings = {'name': name, 'value': value, 'side': side}
    settings['feedback'] = name != 'bfloat16'
    return [
      context.race(
        name=f'{_label(name, value)}, {count}',
        metric='one step, one worker',
        ours=harness.Side(_OURS, 'code', settings),
        theirs=harness.Side(_OURS, 'plain', settings),
        peer='plain jax.numpy',
      )
    ]

  both = dict.fromkeys([*(race[:2] for race in _RACES), *_ALONE])
  return [
    *[
      harness.Case(
        f'code: {_label(*race[:2])}, {race[4]}',
        lambda context, race=race: against_torch(context, *race),
      )
      for race in _RACES
    ],
    *[
      harness.Case(
        f'code: {_label(*one)}, plain',
        lambda context, one=one: against_plain(context, *one),
      )
      for one in both
    ],
  ]


def _feedback_cases(side):
  def run(context, fraction, sampled, target):
    settings = {'fraction': fraction, 'side': side}
    theirs = settings | {'sampled': sampled, 'dense': False}
    return [
      context.race(
        name=f'feedback: {fraction:g} of {side**2 / 1e6:.3g}M entries',
        metric='values, indices and memory',
        ours=harness.Side(_OURS, 'feedback', settings),
        theirs=harness.Side(_PEERS, 'top_k', theirs, peer=True),
        peer='torch, sampled threshold' if sampled else 'torch.topk',
        target=harness.Target(target),
      )
    ]

  return [
    harness.Case(
      f'feedback: {fraction:g}' + ', sampled' * sampled,
      functools.partial(run, fraction=fraction, sampled=sampled, target=target),
    )
    for fraction, sampled, target in (
      (0.01, False, 0.05),
      (0.001, False, 0.1),
      (0.01, True, 0.4),
    )
  ]


def _select_cases(side):
  def run(context, fraction):
    make = lambda implementation: harness.Side(
      _OURS,
      'select',
      {'implementation': implementation, 'fraction': fraction, 'side': side},
    )
    return [
      context.race(
        name=f'select {fraction:g} of {side**2 / 1e6:.3g}M entries',
        metric='values and indices',
        ours=make('auto'),
        theirs=make('xla'),
        peer='jax.lax.top_k',
        target=harness.Target(0.2),
      )
    ]

  return [
    harness.Case(f'select: {x:g}', functools.partial(run, fraction=x))
    for x in (0.01, 0.001)
  ]


def _sketch_cases(side):
  def run(context):
    make = lambda implementation: harness.Side(
      _OURS,
      'sketch',
      {'implementation': implementation, 'size': 0.2, 'side': side},
    )
    return [
      context.race(
        name=f'sketch of {side**2 / 1e6:.3g}M entries in a fifth',
        metric='insertion',
        ours=make('auto'),
        theirs=make('xla'),
        peer='plain scatter',
      )
    ]

  return [harness.Case('sketch', run)]


def _wire(context, side):
  rows = []
  for name, value in dict.fromkeys([*(race[:2] for race in _RACES), *_ALONE]):
    if name == 'power_sgd':
      continue
    arguments = {'name': name, 'value': value, 'side': side}
    bits = context.value(harness.Side(_OURS, 'wire_bits', arguments))
    rows.append(
      harness.Row(
        name=f'wire: {_label(name, value)}',
        metric='payload for each entry',
        unit='bits',
        ours=harness.Figure.exact(bits),
        peer='float32',
        theirs=harness.Figure.exact(32.0),
        ratio=harness.Figure.exact(bits / 32),
      )
    )
  return rows
