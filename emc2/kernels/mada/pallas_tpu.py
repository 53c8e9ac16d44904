"""The first pass over a leaf on a TPU: read once, written once, in place.

XLA splits the pass among several programs, for six sums and seven outputs: with
the second pass it moves 196 bytes for each parameter, where the two need 96.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2 import mesh
from emc2.kernels.mada import reference

_LANES, _SUBLANES = 128, 8
# Entries of a block: sixteen arrays, twice each, must fit into 16 MiB.
_MOST = 16_384


def unsupported(moments, grad):
  """Why the kernel does not take a leaf, or None."""
  if any(x.dtype != jnp.float32 for x in jax.tree.leaves((moments, grad))):
    return 'want float32 throughout.'
  if grad.ndim < 2 or grad.shape[-1] % _LANES or _rows(grad) % _SUBLANES:
    return (
      'want a last axis of a multiple of 128, and a multiple of 8 rows, got '
      f'shape {grad.shape}.'
    )
  return None


def _rows(grad):
  return grad.size // grad.shape[-1]


def _block(rows, columns):
  """Rows and columns of a block: divisors, in whole tiles."""
  divisor = lambda n, unit, most: next(
    size for size in range(min(n, most), 0, -unit) if n % size == 0
  )
  wide = divisor(columns, _LANES, 1024 // _LANES * _LANES)
  return divisor(rows, _SUBLANES, max(_SUBLANES, _MOST // wide)), wide


def _kernel(scalars_ref, *refs, given, settings):
  """One block. The sums of all blocks gather in the last reference."""
  moments, grad, new_grad, hyper_grad = jax.tree.unflatten(
    given, [ref[...] for ref in refs[: given.num_leaves]]
  )
  outputs, sums_ref = refs[given.num_leaves : -1], refs[-1]
  k = reference.Scalars(
    *(scalars_ref[i] for i in range(len(reference.Scalars._fields)))
  )
  after, kept, products = reference.exchange(
    moments, grad, new_grad, hyper_grad, k, settings
  )
  for ref, value in zip(outputs, jax.tree.leaves((after, kept)), strict=True):
    ref[...] = value

  @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
  def _():
    for i in range(6):
      sums_ref[i] = jnp.zeros([], jnp.float32)

  for i in range(6):
    sums_ref[i] += products[i]


def exchange(
  moments, grad, new_grad, hyper_grad, k, settings, *, interpret=False
):
  """As :func:`reference.exchange`, for what is not :func:`unsupported`."""
  shape, rows, columns = grad.shape, _rows(grad), grad.shape[-1]
  leaves, given = jax.tree.flatten((moments, grad, new_grad, hyper_grad))
  scalars, *leaves = mesh.vary_alike(jnp.stack(k), *leaves)
  leaves = [x.reshape(rows, columns) for x in leaves]
  kept, outer = jax.tree.flatten((moments, grad))
  block = _block(rows, columns)
  spec = pl.BlockSpec(block, lambda i, j: (i, j))
  scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
  like = functools.partial(
    jax.ShapeDtypeStruct,
    dtype=jnp.float32,
    manual_axis_type=jax.typeof(leaves[0]).manual_axis_type,
  )
  *fresh, sums = pl.pallas_call(
    functools.partial(_kernel, given=given, settings=settings),
    grid=(rows // block[0], columns // block[1]),
    in_specs=[scalar] + [spec] * len(leaves),
    out_specs=[spec] * len(kept) + [scalar],
    out_shape=[like((rows, columns)) for _ in kept] + [like((6,))],
    input_output_aliases={i + 1: i for i in range(len(kept))},
    interpret=interpret,
    name='mada_exchange',
  )(scalars, *leaves)
  after, kept = outer.unflatten([x.reshape(shape) for x in fresh])
  return after, kept, sums
