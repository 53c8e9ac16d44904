"""Row log-sum-exp over the negatives of a batch: Pallas kernels for TPU.

Both kernels hold one block of rows and stream tiles of the others past it, so
that a tile of similarities lives and dies in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2.kernels.row_logsumexp import reference

_MAX_FEATURES = 2048
_LANES = 128


def unsupported(rows, columns):
  """Why the kernels do not take these arguments, or None."""
  del columns
  if rows.shape[1] > _MAX_FEATURES:
    return f'want at most {_MAX_FEATURES} features, got {rows.shape[1]}.'
  return None


def _blocks(n, c, d):
  """Rows held and columns streamed at once: (held, streamed)."""
  if d <= 512:
    held, streamed = 256, 512
  elif d <= 1024:
    held, streamed = 128, 256
  else:
    held, streamed = 128, 128
  up = lambda k: pl.cdiv(k, _LANES) * _LANES
  return min(held, up(n)), min(streamed, up(c))


def _pad(x, *multiples):
  """Fills up each axis with zeros to a multiple."""
  widths = [(0, -k % m) for k, m in zip(x.shape, multiples, strict=True)]
  return jnp.pad(x, widths) if any(w for _, w in widths) else x


def _working(x):
  """The matrix unit takes bfloat16 and float32."""
  return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def _dot(x, y, contract):
  exact = x.dtype == jnp.float32
  return jax.lax.dot_general(
    x,
    y,
    ((contract[:1], contract[1:]), ((), ())),
    # One pass of the matrix unit keeps 8 bits of a float32: too few for a
    # similarity that is multiplied by an inverse temperature of 200.
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def _forward_kernel(
  rows_ref,
  columns_ref,
  image_ref,
  scale_ref,
  value_ref,
  mean_ref,
  top_ref,
  total_ref,
  moment_ref,
  *,
  c,
):
  # Columns lie on sublanes and rows on lanes: a reduction over columns is then
  # elementwise work, and what belongs to rows is dense.
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    moment_ref[...] = jnp.zeros_like(moment_ref)

  s = _dot(columns_ref[...], rows_ref[...], (1, 1))
  column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0) + step * s.shape[0]
  column_image = jnp.where(column < c // 2, column, column - c // 2)
  out = (column >= c) | (column_image == image_ref[...])
  logits = jnp.where(out, -jnp.inf, scale_ref[...] * s)
  old = top_ref[...]
  top = jnp.maximum(old, jnp.max(logits, axis=0, keepdims=True))
  # Two columns of a tile, an even number of them, show different images: no row
  # meets only its own, and the maximum is finite from the first tile on.
  p = jnp.exp(logits - top)
  fade = jnp.exp(old - top)
  total = fade * total_ref[...] + jnp.sum(p, axis=0, keepdims=True)
  moment = fade * moment_ref[...] + jnp.sum(p * s, axis=0, keepdims=True)
  top_ref[...], total_ref[...], moment_ref[...] = top, total, moment

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    value_ref[...] = top_ref[...] + jnp.log(total_ref[...])
    mean_ref[...] = moment_ref[...] / total_ref[...]


def forward(rows, columns, image, scale, *, interpret=False):
  """As `reference.forward`."""
  columns = rows if columns is None else columns
  n, d, c = rows.shape[0], rows.shape[1], columns.shape[0]
  held, streamed = _blocks(n, c, d)
  varying = jax.typeof(rows).manual_axis_type
  rows = _pad(_working(rows), held, _LANES)
  columns = _pad(_working(columns), streamed, _LANES)
  stats = [_pad(x[None, :], 1, held) for x in (image, scale)]
  per_row = pl.BlockSpec((1, held), lambda i, j: (0, i))
  value, mean = pl.pallas_call(
    functools.partial(_forward_kernel, c=c),
    grid=(rows.shape[0] // held, columns.shape[0] // streamed),
    in_specs=[
      pl.BlockSpec((held, rows.shape[1]), lambda i, j: (i, 0)),
      pl.BlockSpec((streamed, rows.shape[1]), lambda i, j: (j, 0)),
      per_row,
      per_row,
    ],
    out_specs=[per_row] * 2,
    out_shape=[
      jax.ShapeDtypeStruct(
        (1, rows.shape[0]), jnp.float32, manual_axis_type=varying
      )
    ]
    * 2,
    scratch_shapes=[pltpu.VMEM((1, held), jnp.float32)] * 3,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='row_logsumexp_forward',
  )(rows, columns, *stats)
  return value[0, :n], mean[0, :n]


def _pull_kernel(x_ref, y_ref, x_image_ref, y_image_ref, *refs):
  """Adds to the block of x what the tile of y pulls it with."""
  *stats, out_ref, acc_ref = refs
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  y = y_ref[...]
  s = _dot(x_ref[...], y, (1, 1))
  pull = jnp.zeros_like(s)
  for scale, value, weight in zip(*[iter(stats)] * 3, strict=True):
    # A probability is at most 1; a column of padding, which is no negative,
    # must not overflow before its zeros are multiplied in.
    exponent = jnp.minimum(scale[...] * s - value[...], 0.0)
    pull += weight[...] * jnp.exp(exponent)
  pull = jnp.where(x_image_ref[...] == y_image_ref[...], 0.0, pull)
  acc_ref[...] += _dot(pull.astype(y.dtype), y, (1, 0))

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def _pull(x, y, x_image, y_image, x_stats, y_stats, interpret):
  """sum_j (w_i p_ij + w_j p_ji) y_j, each term where its stats are given.

  Args:
    x: (n, d); i runs over its rows.
    y: (c, d); j runs over its rows.
    x_image: (n,), int32.
    y_image: (c,), int32.
    x_stats: scale, value, weight of (n,) each, or (): the first term.
    y_stats: the same of (c,), or (): the second term.
    interpret: static, as in `pallas_call`.

  Returns:
    (n, d), in the dtype of x.
  """
  n, d = x.shape
  held, streamed = _blocks(n, y.shape[0], d)
  dtype, varying = x.dtype, jax.typeof(x).manual_axis_type
  x = _pad(_working(x), held, _LANES)
  y = _pad(_working(y), streamed, _LANES)
  as_x = lambda v: _pad(v[:, None], held, 1)
  as_y = lambda v: _pad(v[None, :], 1, streamed)
  per_x = pl.BlockSpec((held, 1), lambda i, j: (i, 0))
  per_y = pl.BlockSpec((1, streamed), lambda i, j: (0, j))
  block = pl.BlockSpec((held, x.shape[1]), lambda i, j: (i, 0))
  tile = pl.BlockSpec((streamed, x.shape[1]), lambda i, j: (j, 0))
  out = pl.pallas_call(
    _pull_kernel,
    grid=(x.shape[0] // held, y.shape[0] // streamed),
    in_specs=[block, tile, per_x, per_y]
    + [per_x] * len(x_stats)
    + [per_y] * len(y_stats),
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying),
    scratch_shapes=[pltpu.VMEM((held, x.shape[1]), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='row_logsumexp_pull',
  )(
    x,
    y,
    as_x(x_image),
    as_y(y_image),
    *map(as_x, x_stats),
    *map(as_y, y_stats),
  )
  return out[:n, :d].astype(dtype)


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
