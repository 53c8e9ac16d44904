"""Insertion into and query of a count sketch: checks, then a choice."""

import functools

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.count_sketch import blocked, reference


def _check_matrix(name, x):
  if x.ndim != 2 or x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(
      f'{name} must be a float32 or float64 matrix, got {x.dtype} of shape'
      f' {x.shape}.'
    )


def _check_hashes(buckets, signs):
  if buckets.ndim != 1 or buckets.dtype != jnp.int32:
    raise ValueError(
      f'buckets must be an int32 vector, got {buckets.dtype} of shape'
      f' {buckets.shape}.'
    )
  if signs.shape != buckets.shape:
    raise ValueError(
      f'signs must have the shape of buckets, {buckets.shape}, got'
      f' {signs.shape}.'
    )


def insert(
  v: jax.typing.ArrayLike,
  buckets: jax.typing.ArrayLike,
  signs: jax.typing.ArrayLike,
  width: int,
  *,
  implementation: str = 'auto',
) -> jax.Array:
  """Adds each signed column of a matrix to the bucket that it is hashed to.

  Args:
    v: (n, m), float32 or float64.
    buckets: (m,), int32, in [0, width); not checked.
    signs: (m,), 1 or -1, of any real dtype.
    width: Buckets, at least 1; static.
    implementation: Static; 'auto' takes 'blocked' on a CPU, else 'xla'.

  Returns:
    (n, width), of the dtype of `v`: at [i, j] the sum of signs[c] v[i, c] over
    the columns c of bucket j.

  Raises:
    ValueError: An array has a wrong shape or dtype, `width` is below 1, or
      `implementation` is unknown.
  """
  v, buckets, signs = (jnp.asarray(x) for x in (v, buckets, signs))
  _check_matrix('v', v)
  _check_hashes(buckets, signs)
  if v.shape[1] != buckets.size:
    raise ValueError(
      f'v must have a column for each of {buckets.size} buckets, got shape'
      f' {v.shape}.'
    )
  if width < 1:
    raise ValueError(f'width must be at least 1, got {width}.')
  fixed = lambda module: functools.partial(module.insert, width=width)
  kernels = {'blocked': lowering.Kernel('cpu', fixed(blocked), None)}
  return lowering.dispatch(
    implementation,
    fixed(reference),
    kernels,
    *mesh.vary_alike(v, buckets, signs.astype(v.dtype)),
  )


def query(
  table: jax.typing.ArrayLike,
  buckets: jax.typing.ArrayLike,
  signs: jax.typing.ArrayLike,
) -> jax.Array:
  """Estimates the columns that :func:`insert` has added up.

  Args:
    table: (n, width), float32 or float64.
    buckets: (m,), int32, in [0, width); not checked.
    signs: (m,), 1 or -1, of any real dtype.

  Returns:
    (n, m), of the dtype of `table`: signs[c] table[i, buckets[c]].

  Raises:
    ValueError: An array has a wrong shape or dtype.
  """
  table, buckets, signs = (jnp.asarray(x) for x in (table, buckets, signs))
  _check_matrix('table', table)
  _check_hashes(buckets, signs)
  return reference.query(table, buckets, signs.astype(table.dtype))
