"""Qsparse-local-SGD as a loop in NumPy, as the paper writes it, and toy codes.

Algorithms 1 and 2, with models, anchors and memories in full.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import compression


def largest(k):
  """A code that keeps the k largest entries, without packing."""

  def compress(state, x, key):
    del key
    flat = x.reshape(-1)
    _, places = jax.lax.top_k(jnp.abs(flat), min(k, flat.size))
    return (flat[places], places), state

  def decompress(state, payload, like):
    del state
    values, places = payload
    flat = jnp.zeros(math.prod(like.shape), like.dtype)
    return flat.at[places].set(values).reshape(like.shape)

  return compression.Compressor(
    'largest',
    compress,
    decompress,
    bits=lambda shape: 64 * min(k, math.prod(shape)),
    delta=lambda shape: min(1, k / math.prod(shape)),
  )


def everything():
  """A code that loses nothing."""
  return compression.Compressor(
    'everything',
    lambda state, x, key: (x, state),
    lambda state, payload, like: payload,
    bits=lambda shape: 32 * math.prod(shape),
    allreducible=True,
  )


def noisy(shared):
  """Multiplies by a random number, of each worker or of all."""

  def compress(state, x, key):
    return x * jax.random.uniform(key, (), x.dtype), state

  return compression.Compressor(
    'noisy',
    compress,
    lambda state, payload, like: payload,
    bits=lambda shape: 32 * math.prod(shape),
    shared_key=shared,
  )


def sgd(rate, beta=None):
  """SGD with Nesterov's momentum, strict about dtypes as Optax is not."""

  def init_fn(params):
    count = jnp.zeros([], jnp.int32)
    return count, None if beta is None else jax.tree.map(jnp.zeros_like, params)

  def update_fn(gradients, state, params):
    del params
    count, trace = state
    now = rate(count) if callable(rate) else rate
    scale = lambda g: g * jnp.asarray(-now, g.dtype)
    if beta is not None:
      grow = lambda g, t: g + beta * t
      trace = jax.tree.map(grow, gradients, trace)
      gradients = jax.tree.map(grow, gradients, trace)
    return jax.tree.map(scale, gradients), (count + 1, trace)

  return optax.GradientTransformation(init_fn, update_fn)


def keep_largest(x, k):
  """What `largest` sends, in NumPy."""
  kept = np.argsort(-np.abs(x), kind='stable')[:k]
  sent = np.zeros_like(x)
  sent[kept] = x[kept]
  return sent


def keep_signs(x, k):
  """The signs of the k largest entries, with their mean magnitude."""
  y = keep_largest(x, k)
  return np.where(y != 0, np.sign(x) * np.abs(y).sum() / k, 0)


def qsparse(x, gradient, targets, table, rate, code, *, memory=True, beta=0.0):
  """Runs R workers.

  Args:
    x: (d,), where all start.
    gradient: (model (d,), target) -> (d,).
    targets: (T, R, ...): what each worker sees in each step.
    table: (T,) or (T, R), bool: after which steps workers upload.
    rate: t -> step size.
    code: (d,) -> (d,).
    memory: Whether they remember.
    beta: Nesterov's momentum of the local steps, never reset.

  Returns:
    A dict of lists, of what holds after each step: 'master' (d,), 'local',
    'memory' (R, d), and 'virtual' (d,): the model that moves by the mean of the
    gradients at the local models.
  """
  num_workers = targets.shape[1]
  master, virtual = x.copy(), x.copy()
  local, anchor = np.tile(x, (num_workers, 1)), np.tile(x, (num_workers, 1))
  m, trace = np.zeros_like(local), np.zeros_like(local)
  found = {'master': [], 'local': [], 'memory': [], 'virtual': []}
  table = np.broadcast_to(table.reshape(len(table), -1), targets.shape[:2])
  for t, (row, due) in enumerate(zip(targets, table, strict=True)):
    moves = np.zeros_like(local)
    for r in range(num_workers):
      g = gradient(local[r], row[r])
      trace[r] = g + beta * trace[r]
      moves[r] = rate(t) * (g + beta * trace[r] if beta else g)
      local[r] = local[r] - moves[r]
    virtual = virtual - moves.mean(axis=0)
    total = np.zeros_like(x)
    for r in np.flatnonzero(due):
      delta = m[r] + anchor[r] - local[r]
      sent = code(delta)
      total += sent
      if memory:
        m[r] = delta - sent
    master = master - total / num_workers
    anchor[due], local[due] = master, master
    for name, value in (
      ('master', master),
      ('local', local),
      ('memory', m),
      ('virtual', virtual),
    ):
      found[name].append(value.copy())
  return {name: np.stack(values) for name, values in found.items()}
