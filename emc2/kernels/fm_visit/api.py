"""Both halves of a visit: checks, then an implementation."""

import functools

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.fm_visit import pallas_gpu, pallas_tpu, reference

_KERNELS = {
  'pallas_tpu': ('tpu', pallas_tpu),
  'pallas_gpu': ('cuda', pallas_gpu),
}


def gradient(
  cell: reference.Bags | jax.typing.ArrayLike,
  multipliers: jax.typing.ArrayLike,
  sums: jax.typing.ArrayLike,
  factors: jax.typing.ArrayLike,
  *,
  implementation: str = 'auto',
) -> tuple[jax.Array, jax.Array]:
  r"""How the losses of rows pull at the parameters of features.

  For entries x of n rows and D features, slopes G of the rows' losses in their
  scores and sums A over all features,

  .. math::
    x^\top G, \qquad x^\top (G \circ A) - V \circ (x \circ x)^\top G,

  of the linear weights and of the factors V. A kernel reads x once and never
  stores its squares.

  Args:
    cell: x, (n, D), or the bags of its D features, whose table are the rows.
    multipliers: G, (n,).
    sums: A, (n, K).
    factors: V, (D, K), K at least 0.
    implementation: static; 'auto' takes the kernel of the platform that the
      program is lowered for if there is one for these arguments, else 'xla'.
      'xla', 'pallas_tpu' or 'pallas_gpu' take just that one; kernels are for
      dense cells of float32.

  Returns:
    The two sums, (D,) and (D, K).

  Raises:
    ValueError: a shape does not fit, or `implementation` is unknown.
    NotImplementedError: the named implementation does not take these arguments.

  Examples:
    >>> cell = jnp.array([[1.0, 0.0], [2.0, 1.0]])
    >>> sums = cell @ jnp.ones((2, 1))
    >>> linear, factors = gradient(
    ...     cell, jnp.array([1.0, -1.0]), sums, jnp.ones((2, 1)))
    >>> linear.tolist(), factors.tolist()
    ([-1.0, -1.0], [[-2.0], [-2.0]])

  References:
    Raman, Vishwanathan, DS-FACTO: Doubly Separable Factorization Machines,
    2020, https://arxiv.org/abs/2004.13940; Rendle, Factorization Machines,
    2010, equation 4.
  """
  cell, multipliers, sums, factors = jax.tree.map(
    jnp.asarray, (cell, multipliers, sums, factors)
  )
  num_rows = multipliers.shape[0]
  if sums.ndim != 2 or factors.ndim != 2 or sums.shape[0] != num_rows:
    raise ValueError(
      f'sums must be ({num_rows}, K) and factors (D, K), got {sums.shape} and '
      f'{factors.shape}.'
    )
  if sums.shape[1] != factors.shape[1]:
    raise ValueError(
      f'sums must have the rank {factors.shape[1]} of factors, got '
      f'{sums.shape[1]}.'
    )
  if isinstance(cell, reference.Bags):
    _refuse_kernels(implementation)
    return reference.gradient(cell, multipliers, sums, factors)
  _check_cell(cell, num_rows, factors.shape[0])
  return _dispatch('gradient', implementation, cell, multipliers, sums, factors)


def accumulate(
  cell: reference.Bags | jax.typing.ArrayLike,
  linear: jax.typing.ArrayLike,
  squares: jax.typing.ArrayLike,
  factors: jax.typing.ArrayLike,
  num_rows: int,
  *,
  implementation: str = 'auto',
) -> tuple[jax.Array, jax.Array]:
  r"""What the parameters of features add to the sums of rows.

  .. math::
    x V, \qquad x w - \tfrac12 (x \circ x) s.

  Args:
    cell: x, (n, D), or the bags of its n rows, whose table are the features.
    linear: w, (D,).
    squares: s, (D,): the squared lengths of the factors.
    factors: V, (D, K).
    num_rows: n. Static.
    implementation: as of :func:`gradient`.

  Returns:
    The two sums, (n, K) and (n,).

  Raises:
    ValueError: a shape does not fit, or `implementation` is unknown.
    NotImplementedError: the named implementation does not take these arguments.

  Examples:
    >>> cell = jnp.array([[1.0, 2.0]])
    >>> one = jnp.ones(2)
    >>> sums, rest = accumulate(cell, one, one, one[:, None], 1)
    >>> sums.tolist(), rest.tolist()
    ([[3.0]], [0.5])
  """
  cell, linear, squares, factors = jax.tree.map(
    jnp.asarray, (cell, linear, squares, factors)
  )
  num_features = factors.shape[0]
  if linear.shape != (num_features,) or squares.shape != (num_features,):
    raise ValueError(
      f'linear and squares must be ({num_features},), as long as factors, got '
      f'{linear.shape} and {squares.shape}.'
    )
  if isinstance(cell, reference.Bags):
    _refuse_kernels(implementation)
    return reference.accumulate(cell, linear, squares, factors, num_rows)
  _check_cell(cell, num_rows, num_features)
  return _dispatch('accumulate', implementation, cell, linear, squares, factors)


def _check_cell(cell, num_rows, num_features):
  if cell.shape != (num_rows, num_features):
    raise ValueError(
      f'cell must be ({num_rows}, {num_features}), of rows and features, got '
      f'{cell.shape}.'
    )


def _refuse_kernels(implementation):
  """Bags have no kernel: gathers of rows are what XLA does well enough."""
  if implementation in _KERNELS:
    raise NotImplementedError(f'{implementation}: want a dense cell, got bags.')
  if implementation not in ('auto', 'xla'):
    raise ValueError(
      f'{implementation=} is not one of auto, xla, {", ".join(_KERNELS)}.'
    )


def _dispatch(name, implementation, *args):
  args = mesh.vary_alike(*args)
  plain = getattr(reference, name)
  if name == 'accumulate':
    plain = functools.partial(plain, num_rows=args[0].shape[0])
  kernels = {
    key: lowering.Kernel(
      platform, getattr(module, name), module.unsupported(*args)
    )
    for key, (platform, module) in _KERNELS.items()
  }
  return lowering.dispatch(implementation, plain, kernels, *args)
