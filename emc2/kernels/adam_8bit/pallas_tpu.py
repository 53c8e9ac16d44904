"""A step over a leaf on a TPU: each array is read once and written once.

A row of lanes holds the scales of 128 blocks, whose entries stand in rows of
their own; a comparison of two counters turns the one into the other.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2 import mesh
from emc2.compression import blockwise
from emc2.kernels.adam_8bit import reference

_LANES, _SUBLANES = 128, 8
# Blocks of a program: eight rows of scales. Wider ones do not fit beside.
_BLOCKS = _SUBLANES * _LANES
_MOST_WIDTH = 512


def unsupported(grad, coded, settings):
  """Why the kernel does not take a leaf, or None."""
  *lead, width = coded.mu.shape
  num_blocks = 1
  for n in lead:
    num_blocks *= n
  if any(x.dtype != jnp.float32 for x in (grad, coded.mu_scale)):
    return 'want float32 throughout.'
  if width % _LANES or width > _MOST_WIDTH:
    return f'want a block size of 128, 256, 384 or 512, got {width}.'
  if num_blocks % _LANES or grad.size != num_blocks * width:
    return (
      'want a multiple of 128 whole blocks, got '
      f'{grad.size} entries in blocks of {width}.'
    )
  if any(book.kind == 'table' for book in (settings.mu, settings.nu)):
    return 'want dynamic or linear codes, got a table.'
  return None


def _kernel(scalars_ref, grad_ref, *refs, settings):
  mu_ref, mu_scale_ref, nu_ref, nu_scale_ref, update_ref, *out_refs = refs
  k = reference.Scalars(
    *(scalars_ref[i] for i in range(len(reference.Scalars._fields)))
  )
  square = (_LANES, _LANES)
  same = jax.lax.broadcasted_iota(
    jnp.int32, square, 0
  ) == jax.lax.broadcasted_iota(jnp.int32, square, 1)
  column = lambda row: jnp.sum(jnp.where(same, row, 0.0), axis=1, keepdims=True)
  row = lambda column: jnp.sum(
    jnp.where(same, column, 0.0), axis=0, keepdims=True
  )

  @pl.loop(0, _SUBLANES)
  def _(i):
    own, line = pl.ds(i * _LANES, _LANES), pl.ds(i, 1)
    decode = lambda codes, scale, book: (
      book.decode(codes[own, :].astype(jnp.int32)) * column(scale[line, :])
    )
    grad = grad_ref[own, :]
    mu, nu = reference.move(
      grad,
      decode(mu_ref, mu_scale_ref, settings.mu),
      decode(nu_ref, nu_scale_ref, settings.nu),
      k,
    )
    update_ref[own, :] = reference.direction(mu, nu, k)
    books = (settings.mu, settings.keep_sign), (settings.nu, settings.floor)
    for x, (book, keep), codes_ref, scale_ref in zip(
      (mu, nu), books, out_refs[::2], out_refs[1::2], strict=True
    ):
      scale = jnp.max(jnp.abs(x), axis=1, keepdims=True)
      scale_ref[line, :] = row(scale)
      y = x * blockwise.inverse_scale(scale)
      codes_ref[own, :] = book.encode(y, keep_sign=keep)


def step(grad, coded, k, settings, *, interpret=False):
  """As :func:`reference.step`, of (n,) and rows, if not :func:`unsupported`."""
  num_blocks, width = coded.mu.shape
  scalars, grad, *leaves = mesh.vary_alike(jnp.stack(k), grad, *coded)
  lanes = (num_blocks // _LANES, _LANES)
  leaves = [x.reshape(lanes) if x.ndim == 1 else x for x in leaves]
  wide = pl.BlockSpec((_BLOCKS, width), lambda i: (i, 0))
  scales = pl.BlockSpec((_SUBLANES, _LANES), lambda i: (i, 0))
  like = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )
  specs = [wide, wide, scales, wide, scales]
  given = [grad.reshape(num_blocks, width), *leaves]
  update, *after = pl.pallas_call(
    functools.partial(_kernel, settings=settings),
    grid=(pl.cdiv(num_blocks, _BLOCKS),),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *specs],
    out_specs=specs,
    out_shape=[like(x) for x in given],
    input_output_aliases={i + 1: i for i in range(len(given))},
    interpret=interpret,
    name='adam_8bit',
  )(scalars, *given)
  mu, mu_scale, nu, nu_scale = after
  flat = lambda x: x.reshape(-1)
  return flat(update), reference.Coded(mu, flat(mu_scale), nu, flat(nu_scale))
