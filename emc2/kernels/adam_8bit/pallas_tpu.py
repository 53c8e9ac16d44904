"""A step over a leaf on a TPU: each array is read once and written once.

The kernel takes a leaf as it lies, for to split its rows into blocks would copy
it. Scales come with rows along lanes; a comparison of two counters turns a row
of lanes into the column that 128 rows of a block need, and back.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2 import mesh
from emc2.compression import blockwise
from emc2.kernels.adam_8bit import reference

_LANES, _SUBLANES = 128, 8
_MOST_WIDTH = 512  # More would not fit beside.


def unsupported(grad, coded, settings):
  """Why the kernel does not take a leaf, or None."""
  width = coded.mu.shape[-1]
  if any(x.dtype != jnp.float32 for x in (grad, coded.mu_scale)):
    return 'want float32 throughout.'
  if width % _LANES or width > _MOST_WIDTH:
    return f'want a block size of 128, 256, 384 or 512, got {width}.'
  rows = math.prod(grad.shape[:-1])
  if grad.ndim < 2 or grad.shape[-1] % width or rows % _LANES:
    return (
      'want a multiple of 128 rows of whole blocks, got shape '
      f'{grad.shape} in blocks of {width}.'
    )
  if any(book.kind == 'table' for book in (settings.mu, settings.nu)):
    return 'want dynamic or linear codes, got a table.'
  return None


def _kernel(scalars_ref, grad_ref, *refs, settings, width):
  """Some blocks of 128 rows."""
  mu_ref, mu_scale_ref, nu_ref, nu_scale_ref, update_ref, *out_refs = refs
  k = reference.Scalars(
    *(scalars_ref[i] for i in range(len(reference.Scalars._fields)))
  )
  count = functools.partial(
    jax.lax.broadcasted_iota, jnp.int32, (_LANES, _LANES)
  )
  same = count(0) == count(1)
  along = lambda axis, x: jnp.sum(
    jnp.where(same, x, 0.0), axis=axis, keepdims=True
  )
  books = (settings.mu, settings.keep_sign), (settings.nu, settings.floor)
  for i in range(mu_scale_ref.shape[0]):
    own, line = pl.ds(i * width, width), pl.ds(i, 1)
    decode = lambda codes_ref, scale_ref, book, own=own, line=line: (
      book.decode(codes_ref[:, own].astype(jnp.int32))
      * along(1, scale_ref[line, :])
    )
    mu, nu = reference.move(
      grad_ref[:, own],
      decode(mu_ref, mu_scale_ref, settings.mu),
      decode(nu_ref, nu_scale_ref, settings.nu),
      k,
    )
    update_ref[:, own] = reference.direction(mu, nu, k)
    for x, (book, keep), codes_ref, scale_ref in zip(
      (mu, nu), books, out_refs[::2], out_refs[1::2], strict=True
    ):
      scale = jnp.max(jnp.abs(x), axis=1, keepdims=True)
      scale_ref[line, :] = along(0, scale)
      y = x * blockwise.inverse_scale(scale)
      codes_ref[:, own] = book.encode(y, keep_sign=keep)


def step(grad, coded, k, settings, *, interpret=False):
  """One step on a leaf that is not :func:`unsupported`.

  Args:
    grad: (..., n), float32.
    coded: Blocks (..., n / B, B) and scales (..., n / B).
    k: Of this update.
    settings: Static.
    interpret: Static; whether to emulate the kernel.

  Returns:
    The update, of the shape of `grad`, and the moments in codes.
  """
  shape, width = grad.shape, coded.mu.shape[-1]
  columns = shape[-1]
  scalars, grad, *leaves = mesh.vary_alike(jnp.stack(k), grad, *coded)
  num_blocks = columns // width
  lie = lambda x: (
    x.reshape(-1, columns)
    if x.dtype == jnp.uint8
    else x.reshape(-1, num_blocks).T
  )
  given = [grad.reshape(-1, columns), *map(lie, leaves)]
  held = min(_SUBLANES, num_blocks)
  wide = pl.BlockSpec((_LANES, held * width), lambda i, j: (i, j))
  scales = pl.BlockSpec((held, _LANES), lambda i, j: (j, i))
  like = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )
  specs = [wide, wide, scales, wide, scales]
  update, *after = pl.pallas_call(
    functools.partial(_kernel, settings=settings, width=width),
    grid=(given[0].shape[0] // _LANES, pl.cdiv(num_blocks, held)),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *specs],
    out_specs=specs,
    out_shape=[like(x) for x in given],
    input_output_aliases={i + 1: i for i in range(len(given))},
    interpret=interpret,
    name='adam_8bit',
  )(scalars, *given)
  back = lambda x, old: (x if x.dtype == jnp.uint8 else x.T).reshape(old.shape)
  after = jax.tree.map(back, after, leaves)
  return update.reshape(shape), reference.Coded(*after)
