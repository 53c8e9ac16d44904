"""A block of classes visits some rows: kernels for Hopper GPUs.

Blocks run at once and share no sums, so there are two passes: one holds rows
and streams classes, and tells their log-sum-exp; the other the reverse, and
tells the gradient. Together they make 6 n D K operations, not 4, and take any
normalizer that rows may then have.

Weights, errors and features of float32 are split into three parts, of whose
nine products six are summed: all that float32 keeps. Features of bfloat16 are
one part, and three products suffice.
"""

import math

import jax
import jax.numpy as jnp

from emc2.kernels import hopper, lowering
from emc2.kernels.softmax_block import reference

_SHARED_BYTES = 219 * 1024  # Of 227 KiB; the rest is for barriers and rows.
_PARTS = 3  # Numbers of 16 bits to a float.
# A warpgroup accumulates its classes in registers: 128 a thread for 64 x 256.
_MAX_FEATURES = 256
_LOG2E = math.log2(math.e)


def unsupported(features, weights):
  """Why the kernels do not take these arguments, or None."""
  if features.shape[1] > _MAX_FEATURES:
    return f'want at most {_MAX_FEATURES} features, got {features.shape[1]}.'
  for x in (features, weights):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return f'want float32 or bfloat16, got {x.dtype}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _plan(n, m, d, held_parts, streamed_parts):
  """Warpgroups of a block, tiles in flight, tiles of a share, shares."""

  def fits(groups, flight):
    rows = groups * hopper.HELD * held_parts
    rows += flight * hopper.STREAMED * streamed_parts
    return 2 * d * rows <= _SHARED_BYTES

  # Two groups halve the traffic of what is streamed. Where there is room for
  # one tile alone, its copy is waited for.
  plans = ((2, 2), (1, 2)) if n > hopper.HELD else ((1, 2),)
  groups, flight = next((p for p in plans if fits(*p)), (1, 1))
  return groups, flight, *hopper.shares(-(-n // (groups * hopper.HELD)), m)


def _stream(x, y, x_stats, y_stats, **settings):
  """As `hopper.stream`, of whole arrays; statistics come with their padding."""
  (n, d), m = x.shape, y.shape[0]
  parts = lambda a: 1 if a.dtype == jnp.bfloat16 else _PARTS
  wide = -(-d // 64) * 64
  groups, flight, steps, shares = _plan(n, m, wide, parts(x), parts(y))
  held = groups * hopper.HELD
  length = steps * shares * hopper.STREAMED
  rows = -(-n // held) * held
  out = [
    jax.ShapeDtypeStruct((rows, *shape), jnp.float32)
    for shape in settings.pop('shapes')
  ]
  return hopper.stream(
    hopper.split(hopper.pad(x, held), _PARTS),
    hopper.split(hopper.pad(y, length), _PARTS),
    [hopper.pad(stat, held, value) for stat, value in x_stats],
    [hopper.pad(stat, length, value) for stat, value in y_stats],
    out=out,
    groups=groups,
    flight=flight,
    shares=shares,
    **settings,
  )


def _classes(weights, num_valid):
  """(K,), int32: numbers of classes; -1 for padding."""
  numbers = jnp.arange(weights.shape[1], dtype=jnp.int32)
  return jnp.where(numbers < num_valid, numbers, -1)


def _labels(labels, num_valid):
  """Labels in the block, and -2, which no class has, for others."""
  labels = reference.within(labels, num_valid)
  return jnp.where(labels < 0, -2, labels)


def score(features, weights, labels, num_valid, *, interpret=False):
  """As `reference.score`."""
  n = features.shape[0]

  def carry():
    zeros = jnp.zeros((hopper.HELD,), jnp.float32)
    return jnp.full_like(zeros, -jnp.inf), zeros, zeros

  def body(xs, x_stats, ys, y_stats, state):
    (label,), (number,) = x_stats, y_stats
    old, total, label_scores = state
    s = hopper.inner_products(xs, ys, interpret)
    number = hopper.along_columns(number, s.shape)
    logits = jnp.where(number < 0, -jnp.inf, _LOG2E * s)
    top = jnp.maximum(old, jnp.max(logits, axis=1))
    # Of padding alone, the largest is no number to subtract.
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    p = jnp.exp2(logits - hopper.along_rows(shift, s.shape))
    total = jnp.exp2(old - shift) * total + jnp.sum(p, axis=1)
    chosen = hopper.along_rows(label, s.shape) == number
    label_scores += jnp.sum(jnp.where(chosen, s, 0.0), axis=1)
    return top, total, label_scores

  def finish(state):
    top, total, label_scores = state
    return top / _LOG2E + jnp.log(total), label_scores

  logsumexp, label_scores = _stream(
    features,
    weights.T,
    [(_labels(labels, num_valid), -2)],
    [(_classes(weights, num_valid), -1)],
    carry=carry,
    body=body,
    finish=finish,
    shapes=[(), ()],
    name='softmax_block_scores',
    interpret=interpret,
  )
  return reference.Scored(
    jax.nn.logsumexp(logsumexp, axis=0)[:n], jnp.sum(label_scores, axis=0)[:n]
  )


def visit(
  features,
  weights,
  normalizers,
  labels,
  row_weights,
  num_valid,
  *,
  normalizer,
  interpret=False,
):
  """As `reference.visit`."""
  (d, k), wide = weights.shape, -(-weights.shape[0] // 64) * 64
  scored = score(features, weights, labels, num_valid, interpret=interpret)
  normalizers = reference.normalize(normalizers, scored.logsumexp, normalizer)

  def carry():
    return jnp.zeros((hopper.HELD, wide), jnp.float32)

  def body(xs, x_stats, ys, y_stats, acc):
    s = hopper.inner_products(xs, ys, interpret)
    number = hopper.along_rows(x_stats[0], s.shape)
    u, label, row_weight = (hopper.along_columns(y, s.shape) for y in y_stats)
    p = jnp.exp2(_LOG2E * s - u)
    errors = row_weight * jnp.where(number == label, p - 1.0, p)
    errors = jnp.where(number < 0, 0.0, errors)
    errors = hopper.split_in_registers(errors, _PARTS)
    return hopper.accumulate(acc, errors, ys, interpret)

  (gradient,) = _stream(
    weights.T,
    features,
    [(_classes(weights, num_valid), -1)],
    [
      (normalizers * _LOG2E, 0),
      (_labels(labels, num_valid), -2),
      (row_weights, 0),
    ],
    carry=carry,
    body=body,
    finish=lambda acc: (acc,),
    shapes=[(wide,)],
    name='softmax_block',
    interpret=interpret,
  )
  gradient = jnp.sum(gradient, axis=0)[:k, :d].T
  return reference.Visit(gradient.astype(weights.dtype), *scored)
