"""The two passes over a leaf that a step of MADA makes."""

import jax
import numpy as np

from emc2.kernels.mada import reference


def advance(
  moments: reference.Moments,
  grad: jax.Array,
  hyper_grad: jax.Array | None,
  k: reference.Scalars,
  settings: reference.Settings,
) -> tuple[reference.Moments, jax.Array | None]:
  """Takes a gradient into the moments; projects a later one on the slopes.

  Args:
    moments: Of one leaf, of any float dtypes.
    grad: Of the shape of the leaf: the gradient of update t.
    hyper_grad: The same: the gradient after update t; None for no slopes.
    k: Of update t.
    settings: Static.

  Returns:
    The moments after `grad`, in their dtypes, and the inner products of
    `hyper_grad` with the derivatives of u_t in each coefficient: (6,), 0 for a
    coefficient that the moments fix; None without `hyper_grad`.
  """
  wide, up = _widen(grad, k)
  args = jax.tree.map(up, (moments, grad))
  if hyper_grad is None:
    after, products = reference.advance(*args, wide, settings), None
  else:
    after, products = reference.advance_and_project(
      *args, up(hyper_grad), wide, settings
    )
  return jax.tree.map(lambda a, b: a.astype(b.dtype), after, moments), products


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
