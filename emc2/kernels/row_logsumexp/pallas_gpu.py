"""Row log-sum-exp over the negatives of a batch: kernels for Hopper GPUs.

Each compute warpgroup holds 64 rows in shared memory, past which the others
stream. A tile of similarities lives and dies in registers.

A bfloat16 array goes into the matrix units as it is; any other as two parts of
which three products are summed: the relative error of a product is then about
2^-16, against 2^-9 for one bfloat16 and 2^-11 for the units' own TF32.
"""

import math

import jax
import jax.numpy as jnp

from emc2.kernels import hopper, lowering
from emc2.kernels.row_logsumexp import reference

_SHARED_BYTES = 227 * 1024
_STEPS = 2  # Tiles in flight.
# A warpgroup accumulates its rows in registers: 128 a thread for 64 x 256.
_MAX_FEATURES = 256
_LOG2E = math.log2(math.e)


def unsupported(rows, columns):
  """Why the kernels do not take these arguments, or None."""
  del columns
  d = rows.shape[1]
  if d > _MAX_FEATURES:
    return f'want at most {_MAX_FEATURES} features, got {d}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _compute_groups(n, d, parts):
  """How many warpgroups share each streamed tile.

  Two halve the traffic, but hold twice the rows, and leave processors idle
  unless there are blocks for all.
  """
  plenty = n >= 2 * hopper.HELD * hopper.PROCESSORS
  shared = (
    2 * parts * -(-d // 64) * 64 * (2 * hopper.HELD + _STEPS * hopper.STREAMED)
  )
  return 2 if plenty and shared < _SHARED_BYTES - 8192 else 1


def _parts(x):
  return 1 if x.dtype == jnp.bfloat16 else 2


def forward(rows, columns, image, scale, *, interpret=False):
  """As `reference.forward`."""
  columns = rows if columns is None else columns
  (n, d), c, parts = rows.shape, columns.shape[0], _parts(rows)
  groups = _compute_groups(n, d, parts)
  held = groups * hopper.HELD

  def carry():
    zeros = jnp.zeros((hopper.HELD,), jnp.float32)
    return jnp.full_like(zeros, -jnp.inf), zeros, zeros

  def body(xs, x_stats, ys, y_stats, state):
    (own_image, slope), (y_image,) = x_stats, y_stats
    old, total, moment = state
    s = hopper.inner_products(xs, ys, interpret)
    other = hopper.along_columns(y_image, s.shape)
    out = (hopper.along_rows(own_image, s.shape) == other) | (other < 0)
    logits = jnp.where(out, -jnp.inf, hopper.along_rows(slope, s.shape) * s)
    # Two columns of a tile, an even number of them, show different images: no
    # row meets only its own, and the maximum is finite from the first tile on.
    top = jnp.maximum(old, jnp.max(logits, axis=1))
    p = jnp.exp2(logits - hopper.along_rows(top, s.shape))
    fade = jnp.exp2(old - top)
    total = fade * total + jnp.sum(p, axis=1)
    moment = fade * moment + jnp.sum(p * s, axis=1)
    return top, total, moment

  def finish(state):
    top, total, moment = state
    return top / _LOG2E + jnp.log(total), moment / total

  padded = hopper.pad(scale * _LOG2E, held)
  value, mean = hopper.stream(
    hopper.split(hopper.pad(rows, held), parts),
    hopper.split(hopper.pad(columns, hopper.STREAMED), parts),
    (hopper.pad(image, held), padded),
    (hopper.pad(reference.column_image(c), hopper.STREAMED, -1),),
    carry=carry,
    body=body,
    finish=finish,
    out=[jax.ShapeDtypeStruct(padded.shape, jnp.float32)] * 2,
    groups=groups,
    flight=_STEPS,
    shares=1,
    name='row_logsumexp_forward',
    interpret=interpret,
  )
  return value[0, :n], mean[0, :n]


def _pull(x, y, x_image, y_image, x_stats, y_stats, interpret):
  """sum_j (w_i p_ij + w_j p_ji) y_j, each term where its stats are given.

  Args:
    x: (n, d); i runs over its rows.
    y: (c, d); j runs over its rows.
    x_image: (n,), int32.
    y_image: (c,), int32.
    x_stats: scale, value, weight of (n,) each, or (): the first term.
    y_stats: the same of (c,), or (): the second term.
    interpret: static.

  Returns:
    (n, d), in the dtype of x.
  """
  (n, d), parts = x.shape, _parts(x)
  groups = _compute_groups(n, d, parts)
  held = groups * hopper.HELD
  xs = hopper.split(hopper.pad(x, held), parts)
  ys = hopper.split(hopper.pad(y, hopper.STREAMED), parts)
  shape = xs[0].shape

  def carry():
    return jnp.zeros((hopper.HELD, shape[1]), jnp.float32)

  def body(xs, x_stats, ys, y_stats, acc):
    s = hopper.inner_products(xs, ys, interpret)
    own_image, *x_stats = x_stats
    other_image, *y_stats = y_stats
    pull = jnp.zeros_like(s)
    for stats, along in (
      (x_stats, hopper.along_rows),
      (y_stats, hopper.along_columns),
    ):
      if stats:
        slope, value, weight = (along(stat, s.shape) for stat in stats)
        # A probability is at most 1; a column of padding, which is no
        # negative, must not overflow before its zeros are multiplied in.
        pull += weight * jnp.exp2(jnp.minimum(slope * s - value, 0.0))
    own = hopper.along_rows(own_image, s.shape) == hopper.along_columns(
      other_image, s.shape
    )
    pull = hopper.split_in_registers(jnp.where(own, 0.0, pull), parts)
    return hopper.accumulate(acc, pull, ys, interpret)

  def binary(stats, multiple):
    if not stats:
      return ()
    scale, value, weight = stats
    stats = (scale * _LOG2E, value * _LOG2E, weight)
    return tuple(hopper.pad(stat, multiple) for stat in stats)

  (out,) = hopper.stream(
    xs,
    ys,
    (hopper.pad(x_image, held), *binary(x_stats, held)),
    (hopper.pad(y_image, hopper.STREAMED), *binary(y_stats, hopper.STREAMED)),
    carry=carry,
    body=body,
    finish=lambda acc: (acc,),
    out=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    groups=groups,
    flight=_STEPS,
    shares=1,
    name='row_logsumexp_pull',
    interpret=interpret,
  )
  return out[0, :n, :d].astype(x.dtype)


def backward(rows, columns, image, scale, value, cotangent, *, interpret=False):
  """As `reference.backward`."""
  stats = (scale, value, cotangent * scale)
  if columns is None:
    return _pull(rows, rows, image, image, stats, stats, interpret), None
  column_image = reference.column_image(columns.shape[0])
  return (
    _pull(rows, columns, image, column_image, stats, (), interpret),
    _pull(columns, rows, column_image, image, (), stats, interpret),
  )
