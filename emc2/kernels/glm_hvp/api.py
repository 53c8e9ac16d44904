"""The Hessian of a generalised linear model meets a vector."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.glm_hvp import blocked, pallas_gpu, pallas_tpu, reference


class Product(NamedTuple):
  """What :func:`glm_hvp` and :func:`glm_hvp_padded` return."""

  image: jax.Array  # (d,): A' (c * A v).
  scores: jax.Array  # (n,): A v.


_NO_KERNEL = 'want dense features; XLA gathers padded ones well enough.'


def glm_hvp(
  features: jax.typing.ArrayLike,
  curvature: jax.typing.ArrayLike,
  vector: jax.typing.ArrayLike,
  *,
  implementation: str = 'auto',
) -> Product:
  r"""Multiplies the Hessian of a generalised linear model with a vector.

  A loss :math:`\sum_i w_i \ell(a_i^\top x)` has, with the curvatures
  :math:`c_i = w_i \ell''(a_i^\top x)`,

  .. math::
    \nabla^2 f(x) \, v = A^\top (c \circ A v).

  Two products of matrices read A twice, and do little else. Here a tile of rows
  stays in fast memory for the second product, so that A is read once. The
  scores A v are given too, since line searches along v live on them. No
  gradient is defined through a kernel.

  .. note::
    Sums are of float32, whatever the dtype of the features, and numbers are
    never rounded to bfloat16. A tile has whole rows, so there is a bound on
    d, beyond which nothing is won by tiles: on a TPU 8,192 of float32 and
    16,384 of bfloat16; on a Hopper GPU 32 to 4,096, of whole 16 bytes to a row
    and with at least 4 rows; on a CPU 8,192, and at least four tiles of
    256 KiB. On a CPU, features of bfloat16 take four times as long as of
    float32, for their widening. `jax.vmap` over vectors that share their
    features makes products of two matrices, by XLA; over features, one call for
    all of them.

  Args:
    features: A, (n, d), float32 or bfloat16; float64 has no kernel but on a
      CPU, and neither has float16.
    curvature: c, (n,), float32, or float64 if the features are; of any sign.
    vector: v, (d,), of the dtype of `curvature`.
    implementation: static; 'auto' takes 'blocked' on a CPU, 'pallas_tpu' or
      'pallas_gpu' for arguments that they take, where the features cannot be
      split over devices: there is one device, or the program is that of one
      device in :func:`jax.shard_map`. Else 'xla', two products. A name takes
      just that one.

  Returns:
    `image` A' (c * A v), (d,), and `scores` A v, (n,), of the dtype of
    `vector`. Where devices hold rows each, their images add up to the image.
    Where they hold columns, scores have to be added up before the second
    product, and this is of no use.

  Raises:
    ValueError: a shape or dtype does not fit, or `implementation` is unknown.
    NotImplementedError: the named implementation does not take these arguments.

  Examples:
    >>> features = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> image, scores = glm_hvp(
    ...     features, jnp.array([0.5, 1.0]), jnp.array([2.0, 1.0]))
    >>> image.tolist(), scores.tolist()
    ([5.0, 8.0], [2.0, 4.0])

  References:
    Jiang, Raman, Sabach, Mokhtari, Hong, Cevher, Krylov Cubic Regularized
    Newton: A Subspace Second-Order Method with Dimension-Free Convergence Rate,
    2024, https://arxiv.org/abs/2401.03058
  """
  args = [jnp.asarray(x) for x in (features, curvature, vector)]
  features = args[0]
  if features.ndim != 2 or 0 in features.shape or not _is_float(features):
    raise ValueError(
      'features must be a float matrix (n, d) with rows and columns, got '
      f'{features.dtype} of shape {features.shape}.'
    )
  _check_vectors(*features.shape, _wide(features), *args[1:])
  return Product(*_dense(implementation)(*mesh.vary_alike(*args)))


def glm_hvp_padded(
  ids: jax.typing.ArrayLike,
  values: jax.typing.ArrayLike | None,
  curvature: jax.typing.ArrayLike,
  vector: jax.typing.ArrayLike,
  *,
  implementation: str = 'auto',
) -> Product:
  r"""As :func:`glm_hvp`, of rows that are sparse and padded to one width.

  .. math::
    (A v)_i = \sum_k x_{ki} v_{j_{ki}}, \quad
    (A^\top t)_j = \sum_{k, i : j_{ki} = j} x_{ki} t_i.

  .. note::
    A kernel for TPUs lays a tile of rows out as a dense one in fast memory: it
    makes some 3 w n d operations, and reads the two tables alone. It takes
    d up to 4,096 and w up to 256. Elsewhere XLA gathers and scatters; a
    Hopper GPU does so in the second-level cache. On a CPU a scatter is slow,
    and a transposed table that is gathered from is faster.

  Args:
    ids: j, (w, n), uint16, uint32 or another integer dtype: the columns of the
      entries of row i are `ids[:, i]`. In [0, d]; d is padding. Not checked. An
      id that stands twice in a row counts twice.
    values: x, (w, n), any float dtype; None where all are 1.
    curvature: c, (n,), float32 or float64.
    vector: v, (d,), of the dtype of `curvature`.
    implementation: static; as in :func:`glm_hvp`, of 'auto', 'xla' and
      'pallas_tpu'.

  Returns:
    `image`, (d,), and `scores`, (n,), of the dtype of `vector`.

  Raises:
    ValueError: a shape or dtype does not fit, or `implementation` is unknown.
    NotImplementedError: the named implementation does not take these arguments.

  Examples:
    >>> ids = jnp.array([[0, 0], [2, 1]], jnp.uint16)
    >>> values = jnp.array([[1.0, 1.0], [9.0, 2.0]])
    >>> image, scores = glm_hvp_padded(
    ...     ids, values, jnp.array([0.5, 1.0]), jnp.array([2.0, 1.0]))
    >>> image.tolist(), scores.tolist()
    ([5.0, 8.0], [2.0, 4.0])
  """
  ids, curvature, vector = (jnp.asarray(x) for x in (ids, curvature, vector))
  values = None if values is None else jnp.asarray(values)
  if (
    ids.ndim != 2
    or 0 in ids.shape
    or not jnp.issubdtype(ids.dtype, jnp.integer)
  ):
    raise ValueError(
      'ids must be an integer table (w, n) with rows and columns, got '
      f'{ids.dtype} of shape {ids.shape}.'
    )
  if vector.ndim == 1 and vector.shape[0] > jnp.iinfo(ids.dtype).max:
    raise ValueError(
      f'ids must hold the id {vector.shape[0]} of padding, got {ids.dtype}.'
    )
  if values is not None and (
    values.shape != ids.shape or not _is_float(values)
  ):
    raise ValueError(
      f'values must be floats of the shape {ids.shape} of ids, or None, got '
      f'{values.dtype} of shape {values.shape}.'
    )
  dtype = _wide(vector if values is None else values)
  width = vector.shape[0] if vector.ndim == 1 else 'd'
  _check_vectors(ids.shape[1], width, dtype, curvature, vector)
  args = mesh.vary_alike(ids, values, curvature, vector)
  kernels = {
    'pallas_tpu': lowering.Kernel(
      'tpu',
      pallas_tpu.padded,
      pallas_tpu.padded_unsupported(ids, values, vector),
    ),
    'pallas_gpu': lowering.Kernel('cuda', reference.padded, _NO_KERNEL),
  }
  if implementation == 'auto' and not lowering.is_whole():
    implementation = 'xla'
  found = lowering.dispatch(implementation, reference.padded, kernels, *args)
  return Product(*found)


def tpu_takes_padded(
  ids: jax.Array, values: jax.Array | None, vector: jax.Array
) -> bool:
  """Whether a TPU has a kernel for arguments of :func:`glm_hvp_padded`.

  Who has a layout that is gathered from twice asks before taking another.
  """
  return pallas_tpu.padded_unsupported(ids, values, vector) is None


def _is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def _wide(x):
  """float32, or float64 for that."""
  return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _check_vectors(n, d, dtype, curvature, vector):
  for name, x, length in (('curvature', curvature, n), ('vector', vector, d)):
    if x.shape != (length,) or x.dtype != dtype:
      raise ValueError(
        f'{name} must be {dtype} of shape ({length},), got {x.dtype} of shape '
        f'{x.shape}.'
      )


def _dispatch(implementation, *args):
  kernels = {
    'blocked': ('cpu', blocked),
    'pallas_tpu': ('tpu', pallas_tpu),
    'pallas_gpu': ('cuda', pallas_gpu),
  }
  kernels = {
    name: lowering.Kernel(
      platform, module.dense, module.dense_unsupported(*args)
    )
    for name, (platform, module) in kernels.items()
  }
  if implementation == 'auto' and not lowering.is_whole():
    implementation = 'xla'
  return lowering.dispatch(implementation, reference.dense, kernels, *args)


def _dense(implementation):
  """All but the checks; under `vmap`, many vectors make a matrix."""

  @jax.custom_batching.custom_vmap
  def call(features, curvature, vector):
    return _dispatch(implementation, features, curvature, vector)

  @call.def_vmap
  def _(axis_size, in_batched, *args):
    del axis_size
    axes = [0 if batched else None for batched in in_batched]
    one = functools.partial(_dispatch, implementation)
    if implementation == 'auto' and not in_batched[0]:
      one = reference.dense
    return jax.vmap(one, axes)(*args), (True, True)

  return call
