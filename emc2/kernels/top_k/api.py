"""The largest entries by magnitude: checks, then an implementation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2.kernels import lowering
from emc2.kernels.top_k import reference, threshold

# Not for TPUs, where gathers of single entries are slow.
_THRESHOLD = {'threshold': 'cpu', 'threshold_gpu': 'cuda'}


class TopK(NamedTuple):
  """What :func:`top_k` returns."""

  values: jax.Array  # (k,): of the dtype of the array, with their signs.
  indices: jax.Array  # (k,), int32: distinct, in any order.


def _dispatch(implementation, k, x):
  """Runs the chosen implementation."""
  fixed = lambda module, **how: lambda x: TopK(*module.top_k(x, k, **how))
  kernels = {
    name: lowering.Kernel(
      platform,
      fixed(threshold, at_once=platform != 'cpu'),
      threshold.unsupported(x),
    )
    for name, platform in _THRESHOLD.items()
  }
  return lowering.dispatch(implementation, fixed(reference), kernels, x)


def _one_by_one(implementation, k):
  """The search; under `vmap` one array after the other.

  A batch would run each of its loops for all arrays to the end.
  """

  @jax.custom_batching.custom_vmap
  def call(x):
    return _dispatch(implementation, k, x)

  @call.def_vmap
  def _(axis_size, in_batched, x):
    del axis_size, in_batched
    return jax.lax.map(call, x), TopK(True, True)

  return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _top_k(implementation, k, x):
  if threshold.unsupported(x) is None:
    return _one_by_one(implementation, k)(x)
  return _dispatch(implementation, k, x)


@_top_k.defjvp
def _top_k_jvp(implementation, k, primals, tangents):
  (x,), (dx,) = primals, tangents
  out = _top_k(implementation, k, x)
  moved = dx.at[out.indices].get(mode='promise_in_bounds')
  return out, TopK(moved, jnp.zeros(out.indices.shape, jax.dtypes.float0))


def top_k(
  x: jax.typing.ArrayLike, k: int, *, implementation: str = 'auto'
) -> TopK:
  """The k entries of largest magnitude; of equals, those that come first.

  There are exactly k of them whatever the array holds. NaN counts as larger
  than infinity. Differentiable, at the entries that were found.

  Args:
    x: (d,), float32 or float64.
    k: 1 to d; static.
    implementation: Static; 'auto' takes 'threshold' on a CPU and
      'threshold_gpu' on a GPU, which do not sort the array, where it is large
      enough, and else 'xla', which does.

  Returns:
    The entries and where they stand, in any order.

  Raises:
    ValueError: `x` is no such array, `k` is out of range, or `implementation`
      is unknown.
    NotImplementedError: The named implementation does not take this array.

  Examples:
    >>> values, indices = top_k(jnp.array([1.0, -3.0, 2.0, -2.0]), 2)
    >>> sorted(zip(indices.tolist(), values.tolist()))
    [(1, -3.0), (2, 2.0)]
  """
  x = jnp.asarray(x)
  if x.ndim != 1 or x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(
      f'x must be a vector of float32 or float64, got {x.dtype} of shape'
      f' {x.shape}.'
    )
  if not 1 <= k <= x.size:
    raise ValueError(f'k must lie in [1, {x.size}], got {k}.')
  return _top_k(implementation, int(k), x)
