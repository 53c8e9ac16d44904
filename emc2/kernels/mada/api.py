"""The two passes over a leaf that a step of MADA makes."""

import functools

import jax
import numpy as np

from emc2.kernels.mada import blocked, reference

_IMPLEMENTATIONS = {'xla': reference.exchange, 'blocked': blocked.exchange}


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
  hyper_grad: jax.Array,
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
    hyper_grad: The same: the gradient of the loss after update t.
    k: Of update t.
    settings: Static.
    implementation: Static; 'auto' takes 'blocked' for leaves of some size on a
      CPU where a leaf cannot be split over devices: there is one device, or
      the program is that of one device in :func:`jax.shard_map`. Else 'xla'.

  Returns:
    The moments after `grad`, in their dtypes; `new_grad`, in that of `grad`;
    and the inner products of `hyper_grad` with the derivatives of u_t in each
    coefficient: (6,), 0 for a coefficient that the moments fix.

  Raises:
    ValueError: If `implementation` is unknown.
    NotImplementedError: If it does not take this leaf.
  """
  if implementation not in ('auto', *_IMPLEMENTATIONS):
    raise ValueError(
      f'{implementation=} is not one of auto, {", ".join(_IMPLEMENTATIONS)}.'
    )
  wide, up = _widen(hyper_grad, k)
  given = moments, grad, new_grad, hyper_grad
  run = _choose(implementation, given, hyper_grad)
  after, kept, products = run(*jax.tree.map(up, given), wide, settings=settings)
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


def _choose(implementation, given, grad):
  """The pass with derivatives, as a function of arrays and the settings."""
  # Else the casts would be arrays beside.
  alike = all(leaf.dtype == grad.dtype for leaf in jax.tree.leaves(given))
  fits = alike and blocked.choose_block(grad.size) is not None
  if implementation == 'auto':
    if not fits or not _is_whole():
      return reference.exchange
    return _by_platform
  if implementation == 'blocked' and not fits:
    raise NotImplementedError(
      'blocked: want a leaf in one dtype, whose size has a divisor in '
      f'[{blocked.LEAST}, {blocked.MOST}], got {grad.dtype} of {grad.size}.'
    )
  return _IMPLEMENTATIONS[implementation]


def _by_platform(*args, settings):
  fixed = lambda run: functools.partial(run, settings=settings)
  return jax.lax.platform_dependent(
    *args,
    cpu=fixed(blocked.exchange),
    default=fixed(reference.exchange),
  )


def _is_whole():
  """Whether XLA has nothing to split: the loop would gather what it did."""
  if jax.device_count() == 1:
    return True
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
