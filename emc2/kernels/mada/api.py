"""The two passes over a leaf that a step of MADA makes."""

import functools

import jax
import numpy as np

from emc2.kernels import lowering
from emc2.kernels.mada import blocked, pallas_tpu, reference


def advance(
  moments: reference.Moments,
  grad: jax.Array,
  k: reference.Scalars,
  settings: reference.Settings,
) -> reference.Moments:
  """Takes a gradient into the moments.

  Args:
    moments: Of one leaf, of any float dtypes.
    grad: Of the shape of the leaf: the gradient of update t.
    k: Of update t.
    settings: Static.

  Returns:
    The moments after `grad`, in their dtypes.
  """
  wide, up = _widen(grad, k)
  after = reference.advance(*jax.tree.map(up, (moments, grad)), wide, settings)
  return jax.tree.map(lambda a, b: a.astype(b.dtype), after, moments)


def exchange(
  moments: reference.Moments,
  grad: jax.Array,
  new_grad: jax.Array,
  hyper_grad: jax.Array | None,
  k: reference.Scalars,
  settings: reference.Settings,
  *,
  implementation: str = 'auto',
) -> tuple[reference.Moments, jax.Array, jax.Array]:
  """Takes in a gradient, keeps the next, and projects on the slopes.

  Args:
    moments: Of one leaf, of any float dtypes.
    grad: Of the shape of the leaf: the gradient of update t.
    new_grad: The same: what takes the place of `grad`.
    hyper_grad: The same: the gradient of the loss after update t; None says
      that this is `new_grad`.
    k: Of update t.
    settings: Static.
    implementation: Static; 'auto' takes 'blocked' on a CPU and 'pallas_tpu' on
      a TPU for leaves that they take, where a leaf cannot be split over
      devices: there is one device, or the program is that of one device in
      :func:`jax.shard_map`. Else 'xla'.

  Returns:
    The moments after `grad`, in their dtypes; `new_grad`, in that of `grad`;
    and the inner products of `hyper_grad` with the derivatives of u_t in each
    coefficient: (6,), 0 for a coefficient that the moments fix.

  Raises:
    ValueError: If `implementation` is unknown.
    NotImplementedError: If it does not take this leaf.
  """
  wide, up = _widen(new_grad, k)
  given = moments, grad, new_grad, hyper_grad
  fixed = lambda module: functools.partial(module.exchange, settings=settings)
  # Else the casts would be arrays beside.
  alike = all(leaf.dtype == new_grad.dtype for leaf in jax.tree.leaves(given))
  kernels = {
    'blocked': lowering.Kernel(
      'cpu',
      fixed(blocked),
      blocked.unsupported(new_grad) if alike else 'want one dtype.',
    ),
    'pallas_tpu': lowering.Kernel(
      'tpu', fixed(pallas_tpu), pallas_tpu.unsupported(moments, grad)
    ),
  }
  if implementation == 'auto' and not lowering.is_whole():
    implementation = 'xla'
  after, kept, products = lowering.dispatch(
    implementation,
    fixed(reference),
    kernels,
    *jax.tree.map(up, given),
    wide,
  )
  down = lambda a, b: a.astype(b.dtype)
  return jax.tree.map(down, after, moments), down(kept, grad), products


def direction(
  moments: reference.Moments,
  grad: jax.Array,
  k: reference.Scalars,
  settings: reference.Settings,
) -> jax.Array:
  """The update before the learning rate.

  Args:
    moments: Of one leaf, of any float dtypes, before `grad`.
    grad: Of the shape of the leaf: the gradient of update t.
    k: Of update t.
    settings: Static.

  Returns:
    u_t, of the shape and dtype of `grad`.
  """
  wide, up = _widen(grad, k)
  args = jax.tree.map(up, (moments, grad))
  return reference.direction(*args, wide, settings).astype(grad.dtype)


def _widen(grad, k):
  """The scalars, and a cast of arrays, in the dtype that a leaf computes in."""
  dtype = np.promote_types(grad.dtype, np.float32)
  return k.astype(dtype), lambda x: x.astype(dtype)
