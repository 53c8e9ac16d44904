"""All-pairs Riesz potentials and their gradients."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.riesz import pallas_gpu, pallas_tpu, reference

_KERNELS = {
  'pallas_tpu': ('tpu', pallas_tpu),
  'pallas_gpu': ('cuda', pallas_gpu),
}


class Riesz(NamedTuple):
  """What :func:`riesz` returns, in the dtype of the rows."""

  potential: jax.Array  # (..., n): sum_j r_ij^-s, or -log r_ij.
  gradient: jax.Array  # (..., n, k): of the potential in its own row.


def _dispatch(implementation, exponent, rows, columns):
  """Runs the chosen implementation."""
  fixed = lambda module: functools.partial(_forward, module, exponent)
  reason = lambda module: module.unsupported(rows, columns, exponent)
  kernels = {
    name: lowering.Kernel(platform, fixed(module), reason(module))
    for name, (platform, module) in _KERNELS.items()
  }
  return lowering.dispatch(
    implementation, fixed(reference), kernels, rows, columns
  )


def _forward(module, exponent, rows, columns):
  return Riesz(*module.forward(rows, columns, exponent))


def _batched(implementation, exponent):
  """The kernel; under `vmap` one call with a leading axis more."""

  @jax.custom_batching.custom_vmap
  def call(rows, columns):
    return _dispatch(implementation, exponent, rows, columns)

  @call.def_vmap
  def _(axis_size, in_batched, rows, columns):
    spread = lambda x: jnp.broadcast_to(x, (axis_size, *x.shape))
    sets = [
      x if batched is None or batched else spread(x)
      for x, batched in zip((rows, columns), in_batched, strict=True)
    ]
    return call(*sets), Riesz(True, True)

  return call


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _riesz(implementation, exponent, rows, columns):
  return _batched(implementation, exponent)(rows, columns)


@_riesz.defjvp
def _riesz_jvp(implementation, exponent, primals, tangents):
  out = _riesz(implementation, exponent, *primals)
  # No kernel: second derivatives are rarely taken, at twice the work or more.
  moved = reference.tangent(*primals, *tangents, exponent)
  return out, Riesz(*moved)


def _check(rows, columns, exponent):
  """Raises what :func:`riesz` promises to raise."""
  if rows.ndim < 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
    raise ValueError(
      'rows must be a float array of shape (..., n, k), got'
      f' {rows.dtype} of shape {rows.shape}.'
    )
  *batch, n, k = rows.shape
  if n < 1 or k < 1:
    raise ValueError(f'rows must have points, got shape {rows.shape}.')
  if columns is not None:
    if (*columns.shape[:-2], columns.shape[-1:]) != (*batch, (k,)):
      raise ValueError(
        f'columns must be (..., m, {k}) with the leading axes of rows,'
        f' {tuple(batch)}, got shape {columns.shape}.'
      )
    if columns.dtype != rows.dtype:
      raise ValueError(
        f'columns must have the dtype of rows, {rows.dtype}, got'
        f' {columns.dtype}.'
      )
  if not (math.isfinite(exponent) and exponent >= 0):
    raise ValueError(
      'exponent must be positive, or 0 for the logarithmic energy, got'
      f' {exponent}.'
    )


def riesz(
  rows: jax.typing.ArrayLike,
  columns: jax.typing.ArrayLike | None = None,
  *,
  exponent: float,
  implementation: str = 'auto',
) -> Riesz:
  r"""Potential of each row among points, and its gradient.

  With :math:`r_{ij} = \|x_i - y_j\|` and :math:`s` the exponent,

  .. math::
    V_i = \sum_j r_{ij}^{-s}, \qquad
    G_i = \frac{\partial V_i}{\partial x_i}
        = -s \sum_j \frac{x_i - y_j}{r_{ij}^{s + 2}},

  and for :math:`s = 0`, :math:`V_i = -\sum_j \log r_{ij}`,
  :math:`G_i = -\sum_j (x_i - y_j) / r_{ij}^2`. Without columns the
  :math:`y_j` are the rows themselves, :math:`j \ne i`, and :math:`G` is the
  gradient of the energy :math:`\frac12 \sum_i V_i`. No array of all pairs is
  ever made: memory is O(n).

  .. note::
    A pair at distance 0 gives infinity or NaN. In float64 on a CPU the gradient
    comes from sums of :math:`s / r^{s + 2}` that cancel, with a relative error
    of some :math:`10^{-16} \sqrt{n}` where points are spread evenly.

  Differentiable any number of times, forward and backward, in both arguments;
  derivatives of `gradient` run in plain JAX.

  Args:
    rows: (..., n, k), float. bfloat16 and float16 are computed in float32.
    columns: (..., m, k) of the same dtype and leading axes, none of them one of
      the rows; or None.
    exponent: :math:`s \ge 0`; static.
    implementation: 'auto', a kernel where the shape fits on TPU and Hopper GPUs
      and plain JAX elsewhere; or 'xla', 'pallas_tpu', 'pallas_gpu'; static.

  Returns:
    The potentials and gradients.

  Raises:
    ValueError: a shape, a dtype or `exponent` breaks its rule, or
      `implementation` is not known.
    NotImplementedError: the named kernel does not take this shape.

  Examples:
    >>> points = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    >>> riesz(points, exponent=2.0).potential
    Array([0.75, 0.75, 1.  ], dtype=float32)

  References:
    Saff and Kuijlaars, `Distributing many points on a sphere
    <https://doi.org/10.1007/BF03024331>`_, 1997.
  """
  rows = jnp.asarray(rows)
  columns = None if columns is None else jnp.asarray(columns)
  exponent = float(exponent)
  _check(rows, columns, exponent)
  return _riesz(implementation, exponent, *mesh.vary_alike(rows, columns))
