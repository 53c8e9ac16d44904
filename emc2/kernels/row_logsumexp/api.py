"""Row log-sum-exp over the negatives of a contrastive batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.row_logsumexp import pallas_gpu, pallas_tpu, reference

_KERNELS = {
  'pallas_tpu': ('tpu', pallas_tpu),
  'pallas_gpu': ('cuda', pallas_gpu),
}


class RowLogsumexp(NamedTuple):
  """What :func:`row_logsumexp` returns."""

  value: jax.Array  # (n,), float32: log sum_j exp(scale_a rows_a . columns_j).
  mean: jax.Array  # (n,), float32: sum_j p_aj rows_a . columns_j; no gradient.


def _dispatch(direction, implementation, rows, columns, *stats):
  """Runs `direction` of the chosen implementation."""
  pick = lambda module: getattr(module, direction)
  kernels = {
    name: lowering.Kernel(
      platform, pick(module), module.unsupported(rows, columns)
    )
    for name, (platform, module) in _KERNELS.items()
  }
  return lowering.dispatch(
    implementation, pick(reference), kernels, rows, columns, *stats
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_logsumexp(implementation, rows, columns, image, scale):
  return _dispatch('forward', implementation, rows, columns, image, scale)


def _row_logsumexp_fwd(implementation, rows, columns, image, scale):
  value, mean = _row_logsumexp(implementation, rows, columns, image, scale)
  return (value, mean), (rows, columns, image, scale, value, mean)


def _row_logsumexp_bwd(implementation, residuals, cotangents):
  rows, columns, image, scale, value, mean = residuals
  cotangent, _ = cotangents
  d_rows, d_columns = _dispatch(
    'backward', implementation, rows, columns, image, scale, value, cotangent
  )
  return d_rows, d_columns, None, cotangent * mean


_row_logsumexp.defvjp(_row_logsumexp_fwd, _row_logsumexp_bwd)


def _check(rows, columns, position, scale):
  """Raises what :func:`row_logsumexp` promises to raise."""
  if rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
    raise ValueError(
      f'rows must be a float array of shape (n, d), got {rows.dtype} of shape'
      f' {rows.shape}.'
    )
  n, d = rows.shape
  if columns is None:
    c = n
  else:
    if columns.ndim != 2 or columns.shape[1] != d:
      raise ValueError(f'columns must be (c, {d}), got shape {columns.shape}.')
    if columns.dtype != rows.dtype:
      raise ValueError(
        f'columns must have the dtype of rows, {rows.dtype}, got'
        f' {columns.dtype}.'
      )
    if position is None:
      raise ValueError('position must be given with columns, got None.')
    if position.shape != (n,) or not jnp.issubdtype(
      position.dtype, jnp.integer
    ):
      raise ValueError(
        f'position must be an int array of shape ({n},), got'
        f' {position.dtype} of shape {position.shape}.'
      )
    c = columns.shape[0]
  if c % 2:
    raise ValueError(f'columns must come in pairs of views, got {c} of them.')
  if c < 4:
    raise ValueError(
      f'a batch must have at least 2 images for a negative, got {c // 2}.'
    )
  if scale.shape not in ((), (n,)) or not jnp.issubdtype(
    scale.dtype, jnp.floating
  ):
    raise ValueError(
      f'scale must be a float, one or of shape ({n},), got {scale.dtype} of'
      f' shape {scale.shape}.'
    )


def row_logsumexp(
  rows: jax.typing.ArrayLike,
  columns: jax.typing.ArrayLike | None,
  position: jax.typing.ArrayLike | None,
  scale: jax.typing.ArrayLike,
  *,
  implementation: str = 'auto',
) -> RowLogsumexp:
  r"""Log-sum-exp of each row's similarities to its negatives.

  Of a global batch of :math:`B` images the columns are the :math:`2B`
  embeddings: :math:`f_j` and :math:`f_{B+j}` are the two views of image
  :math:`j`. The rows are some or all of them, row :math:`a` being column
  :math:`t_a`. With :math:`N_a` the columns of all images but its own and
  :math:`\beta_a` the inverse temperature,

  .. math::
    v_a = \log \sum_{j \in N_a} e^{\beta_a \langle f_{t_a}, f_j \rangle}, \quad
    \mu_a = \sum_{j \in N_a} p_{aj} \langle f_{t_a}, f_j \rangle, \quad
    p_{aj} = e^{\beta_a \langle f_{t_a}, f_j \rangle - v_a},

  and :math:`\partial v_a / \partial \beta_a = \mu_a`. The losses of SimCLR,
  SogCLR and iSogCLR reduce to :math:`v` with constant weights.

  The similarities never exist as a whole: memory grows as :math:`n + c`.
  Gradients flow from `value` to `rows`, `columns` and `scale`, in reverse
  mode.

  .. note::
    Sums, exponentials and logarithms are in float32, whatever the dtype of the
    embeddings, and so are products of float32 embeddings; the kernel for GPUs
    makes these from pairs of bfloat16, to a relative error of
    :math:`2^{-16}`. The kernels round the weights that multiply bfloat16
    embeddings in the backward pass to bfloat16.

  Args:
    rows: (n, d), any float dtype; need not be of unit length.
    columns: (c, d), c = 2B, of the same dtype. None says that the rows are all
      the columns, in order, so n = c; the gradient then costs a third less.
    position: (n,), int, in [0, c): :math:`t_a`. Not read where columns are
      None, and None will do there.
    scale: () or (n,), float: :math:`\beta_a`.
    implementation: static; 'auto' takes the kernel of the platform that the
      program is lowered for if there is one for these shapes, else 'xla'.
      'xla', 'pallas_tpu' or 'pallas_gpu' take just that one.

  Returns:
    `value` :math:`v` and `mean` :math:`\mu`.

  Raises:
    ValueError: an argument has a wrong shape or dtype, there are fewer than
      two images, or `implementation` is unknown.
    NotImplementedError: the named implementation does not take these shapes.

  Examples:
    >>> f = jnp.eye(4)[jnp.array([0, 1, 0, 2])]  # Two images, two views each.
    >>> row_logsumexp(f, None, None, 10.0).mean
    Array([0., 0., 0., 0.], dtype=float32)
    >>> row_logsumexp(f[:1], f, jnp.array([0]), 10.0).value  # log 2
    Array([0.6931472], dtype=float32)

  References:
    Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive
    Learning of Visual Representations, 2020, equation 1,
    https://arxiv.org/abs/2002.05709; Yuan et al., Provable Stochastic
    Optimization for Global Contrastive Learning, 2022,
    https://arxiv.org/abs/2202.12387
  """
  rows, scale = jnp.asarray(rows), jnp.asarray(scale)
  if columns is not None:
    columns = jnp.asarray(columns)
    position = None if position is None else jnp.asarray(position)
  _check(rows, columns, position, scale)
  n = rows.shape[0]
  if columns is None:
    image = reference.column_image(n)
  else:
    image = position.astype(jnp.int32) % (columns.shape[0] // 2)
  scale = jnp.broadcast_to(scale.astype(jnp.float32), (n,))
  rows, columns, image, scale = mesh.vary_alike(rows, columns, image, scale)
  return RowLogsumexp(
    *_row_logsumexp(implementation, rows, columns, image, scale)
  )
