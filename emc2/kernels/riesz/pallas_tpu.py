"""All-pairs Riesz potentials and gradients: Pallas kernels for TPU.

Rows lie on lanes and columns on sublanes, and tiles of columns stream past a
block of rows. Up to 8 dimensions differences are taken, eight columns at a
time, so that a group of pairs, with the sums of its rows, stays in registers.
Above, squared distances and sums are products on the matrix unit:
`sum_j w_ij (x_i - y_j) = x_i sum_j w_ij - sum_j w_ij y_j`.

No step of Newton follows a reciprocal square root: where the chip's own is
coarse, as on v5e, the compiler has one already.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2.kernels.riesz import pair

_MAX_DIFFERENCE_DIM = 8
_MAX_DIM = 512
_LANES = 128
_SUBLANES = 8
_HELD = 512  # Rows of a block.
_STREAMED = 512  # Columns of a tile.
_UNROLL = 4  # Groups of eight columns, for one waits for the last.


def unsupported(rows, columns, exponent):
  """Why the kernels do not take these arguments, or None."""
  del columns, exponent
  if rows.dtype not in (jnp.float32, jnp.bfloat16):
    return f'want float32 or bfloat16, got {rows.dtype}.'
  if rows.shape[-1] > _MAX_DIM:
    return f'want at most {_MAX_DIM} dimensions, got {rows.shape[-1]}.'
  return None


def _mask(first_row, first_column, shape, *, m, among):
  """Which pairs of a (columns, rows) tile count."""
  column = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first_column
  mask = column < m
  if among:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first_row
    mask &= column != row
  return mask


def _by_differences(x_ref, y_ref, acc_ref, turned_ref, mask, exponent):
  """Adds a tile to (k + 1, 8, held); sublanes are summed in the end."""
  k, held = x_ref.shape
  turned_ref[...] = y_ref[...].T
  x = [
    jnp.broadcast_to(x_ref[c : c + 1, :], (_SUBLANES, held)) for c in range(k)
  ]

  def meet(i, sums):
    base = pl.multiple_of(i.astype(jnp.int32) * _SUBLANES, _SUBLANES)
    y = turned_ref[pl.ds(base, _SUBLANES), :]
    apart = [x[c] - y[:, c : c + 1] for c in range(k)]
    r2 = functools.reduce(jnp.add, [d * d for d in apart])
    if mask is not None:
      valid = mask(base, (_SUBLANES, held))
      r2 = jnp.where(valid, r2, 1.0)
    p, w = pair.terms(r2, jax.lax.rsqrt(r2), exponent)
    if mask is not None:
      p, w = jnp.where(valid, p, 0.0), jnp.where(valid, w, 0.0)
    value, *pulls = sums
    return value + p, *[g + w * d for g, d in zip(pulls, apart, strict=True)]

  zeros = (jnp.zeros((_SUBLANES, held), jnp.float32),) * (k + 1)
  sums = jax.lax.fori_loop(
    0, y_ref.shape[1] // _SUBLANES, meet, zeros, unroll=_UNROLL
  )
  for c, total in enumerate(sums):
    acc_ref[c] += total


def _by_products(x_ref, y_ref, acc_ref, mask, exponent):
  """Adds a tile to (k + 1, held)."""
  x, y = x_ref[...], y_ref[...]
  dot = functools.partial(
    jax.lax.dot_general,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  norm = lambda z: jnp.sum(z * z, axis=0, keepdims=True)
  inner = dot(y, x, (((0,), (0,)), ((), ())))
  r2 = norm(x) + norm(y).T - 2 * inner
  r2 = jnp.maximum(r2, jnp.finfo(jnp.float32).tiny)
  if mask is not None:
    valid = mask(0, r2.shape)
    r2 = jnp.where(valid, r2, 1.0)
  p, w = pair.terms(r2, jax.lax.rsqrt(r2), exponent)
  if mask is not None:
    p, w = jnp.where(valid, p, 0.0), jnp.where(valid, w, 0.0)
  total = lambda z: jnp.sum(z, axis=0, keepdims=True)
  acc_ref[:1] += total(p)
  acc_ref[1:] += x * total(w) - dot(y, w, (((1,), (0,)), ((), ())))


def _kernel(x_ref, y_ref, out_ref, acc_ref, *scratch, m, exponent, among):
  """Program (set of points, block of rows, tile of columns)."""
  step, (k, held), streamed = pl.program_id(2), x_ref.shape, y_ref.shape[1]
  first_row, first_column = pl.program_id(1) * held, step * streamed

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def mask(base, shape):
    return _mask(first_row, first_column + base, shape, m=m, among=among)

  if k <= _MAX_DIFFERENCE_DIM:
    add = functools.partial(_by_differences, x_ref, y_ref, acc_ref, *scratch)
  else:
    add = functools.partial(_by_products, x_ref, y_ref, acc_ref)

  masked = first_column + streamed > m
  if among:
    apart = (first_row + held <= first_column) | (
      first_column + streamed <= first_row
    )
    masked |= ~apart
  pl.when(masked)(lambda: add(mask, exponent))
  pl.when(~masked)(lambda: add(None, exponent))

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    if k <= _MAX_DIFFERENCE_DIM:
      for c in range(k + 1):
        out_ref[c : c + 1, :] = jnp.sum(acc_ref[c], axis=0, keepdims=True)
    else:
      out_ref[...] = acc_ref[...]


def forward(rows, columns, exponent, *, interpret=False):
  """As `reference.forward`."""
  *batch, n, k = rows.shape
  among = columns is None

  def lay(z, most):
    """(..., n, k) to (sets, k, n), filled up with zeros, and a block's size."""
    z = jnp.swapaxes(z.reshape(-1, *z.shape[-2:]), 1, 2).astype(jnp.float32)
    size = min(most, pl.cdiv(z.shape[2], _LANES) * _LANES)
    return jnp.pad(z, ((0, 0), (0, 0), (0, -z.shape[2] % size))), size

  x, held = lay(rows, _HELD)
  y, streamed = lay(rows if among else columns, _STREAMED)
  m = n if among else columns.shape[-2]
  scratch = [pltpu.VMEM((k + 1, held), jnp.float32)]
  if k <= _MAX_DIFFERENCE_DIM:
    scratch = [
      pltpu.VMEM((k + 1, _SUBLANES, held), jnp.float32),
      pltpu.VMEM((streamed, k), jnp.float32),
    ]
  sums = pl.pallas_call(
    functools.partial(_kernel, m=m, exponent=exponent, among=among),
    grid=(x.shape[0], x.shape[2] // held, y.shape[2] // streamed),
    in_specs=[
      pl.BlockSpec((None, k, held), lambda b, i, j: (b, 0, i)),
      pl.BlockSpec((None, k, streamed), lambda b, i, j: (b, 0, j)),
    ],
    out_specs=pl.BlockSpec((None, k + 1, held), lambda b, i, j: (b, 0, i)),
    out_shape=jax.ShapeDtypeStruct(
      (x.shape[0], k + 1, x.shape[2]),
      jnp.float32,
      manual_axis_type=jax.typeof(x).manual_axis_type,
    ),
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='riesz',
  )(x, y)
  potential = sums[:, 0, :n].reshape(*batch, n)
  gradient = jnp.swapaxes(sums[:, 1:, :n], 1, 2).reshape(rows.shape)
  gradient = pair.slope(exponent) * gradient
  return potential.astype(rows.dtype), gradient.astype(rows.dtype)
