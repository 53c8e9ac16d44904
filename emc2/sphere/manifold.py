r"""The product of spheres: tangent spaces, retractions, uniform points.

Points are rows :math:`x_i` of unit length; vectors are rows of one shape with
them. All but :func:`check_points` work on leading batch axes too.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_NUM_TERMS = 11
"""Of the series below; at r = 1 the first one left out is below 1e-21."""


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
  """Row-wise inner products of (..., k) with their like, (..., 1)."""
  products = a * b
  if products.shape[-1] > 8:
    return jnp.sum(products, axis=-1, keepdims=True)
  # On a CPU a reduction over so few numbers takes about six times as long.
  return functools.reduce(jnp.add, jnp.split(products, products.shape[-1], -1))


def normalize(points: jax.typing.ArrayLike) -> jax.Array:
  r"""Scales each row to unit length, :math:`y_i / \|y_i\|`.

  Args:
    points: (..., n, k), float. A row of norm below 1e-12 has no direction worth
      the name, and one of zeros gives NaN; nothing is refused.

  Returns:
    (..., n, k), of unit rows.

  Examples:
    >>> normalize(jnp.array([[3.0, 4.0], [0.0, -2.0]]))
    Array([[ 0.6,  0.8],
           [ 0. , -1. ]], dtype=float32)
  """
  points = jnp.asarray(points)
  return points / jnp.sqrt(inner(points, points))


def project(
  points: jax.typing.ArrayLike, vectors: jax.typing.ArrayLike
) -> jax.Array:
  r"""Takes from each vector its radial part.

  .. math::
    P_x v = v - \langle v, x \rangle x.

  Args:
    points: (..., n, k), unit rows :math:`x`.
    vectors: (..., n, k), any rows :math:`v` of the same dtype.

  Returns:
    (..., n, k): the nearest tangent vectors at the points.

  Examples:
    >>> project(jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]]))
    Array([[0., 4.]], dtype=float32)
  """
  points, vectors = jnp.asarray(points), jnp.asarray(vectors)
  return vectors - inner(vectors, points) * points


def retract(
  points: jax.typing.ArrayLike, vectors: jax.typing.ArrayLike
) -> jax.Array:
  r"""Moves along the vectors and back onto the sphere.

  .. math::
    R_x(v) = \frac{x + v}{\|x + v\|}

  For tangent vectors it agrees with :func:`exponential` up to
  :math:`\|v\|^3 / 3`.

  Args:
    points: (..., n, k), unit rows :math:`x`.
    vectors: (..., n, k), tangent rows :math:`v` of the same dtype.

  Returns:
    (..., n, k), of unit rows.

  Examples:
    >>> retract(jnp.array([[0.0, 3.0]]), jnp.array([[4.0, 0.0]]))
    Array([[0.8, 0.6]], dtype=float32)
  """
  return normalize(jnp.asarray(points) + jnp.asarray(vectors))


def exponential(
  points: jax.typing.ArrayLike, vectors: jax.typing.ArrayLike
) -> jax.Array:
  r"""Follows the great circles that leave along the vectors.

  .. math::
    \exp_x(v) = x \cos \|v\| + v \, \frac{\sin \|v\|}{\|v\|}

  It has all derivatives, at :math:`v = 0` too.

  Args:
    points: (..., n, k), unit rows :math:`x`.
    vectors: (..., n, k), tangent rows :math:`v` of the same dtype; their
      lengths are angles in radians.

  Returns:
    (..., n, k), of unit rows, up to rounding and to what the vectors hold of
    the radial direction.

  Examples:
    >>> v = jnp.array([[0.0, jnp.pi / 6]])
    >>> exponential(jnp.array([[1.0, 0.0]]), v).round(4)
    Array([[0.866, 0.5  ]], dtype=float32)
  """
  points, vectors = jnp.asarray(points), jnp.asarray(vectors)
  cosine, sinc = _cosine_and_sinc(inner(vectors, vectors))
  return points * cosine + vectors * sinc


def _cosine_and_sinc(square):
  """`cos r` and `sin(r) / r` of r², each smooth in r² down to 0."""
  near = square < 1
  # Neither branch may see the arguments where its derivatives are bad.
  small, large = jnp.where(near, square, 0), jnp.where(near, 1, square)
  cosine = sinc = jnp.zeros_like(square)
  for term in reversed(range(_NUM_TERMS)):
    sign = -1 if term % 2 else 1
    cosine = cosine * small + sign / math.factorial(2 * term)
    sinc = sinc * small + sign / math.factorial(2 * term + 1)
  radius = jnp.sqrt(large)
  return (
    jnp.where(near, cosine, jnp.cos(radius)),
    jnp.where(near, sinc, jnp.sin(radius) / radius),
  )


def transport(
  points: jax.typing.ArrayLike, vectors: jax.typing.ArrayLike
) -> jax.Array:
  r"""Carries tangent vectors of other points to the tangent spaces at these.

  The vector transport by projection, :math:`P_y v` for :math:`v` at
  :math:`x`: it needs no :math:`x`, never lengthens a vector, and differs from
  the parallel transport along a step of length :math:`\theta` by
  :math:`(1 - \cos \theta)` of the part that points along the step.

  Args:
    points: (..., n, k), unit rows :math:`y`: where the vectors go.
    vectors: (..., n, k), rows :math:`v` of the same dtype.

  Returns:
    (..., n, k): tangent vectors at the points.

  Examples:
    >>> transport(jnp.array([[1.0, 0.0]]), jnp.array([[-0.6, 0.8]]))
    Array([[0. , 0.8]], dtype=float32)
  """
  return project(points, vectors)


def limit(
  vectors: jax.typing.ArrayLike, max_norm: jax.typing.ArrayLike
) -> jax.Array:
  r"""Shortens each row that is longer than a bound.

  .. math::
    v \min\Big(1, \frac{c}{\|v\|}\Big)

  The squares of huge entries do not overflow.

  Args:
    vectors: (..., n, k), rows :math:`v` of finite entries.
    max_norm: (), :math:`c > 0`; infinity shortens nothing.

  Returns:
    (..., n, k).

  Examples:
    >>> limit(jnp.array([[3.0, 4.0], [0.0, 0.1]]), 0.5)
    Array([[0.3, 0.4],
           [0. , 0.1]], dtype=float32)
  """
  vectors = jnp.asarray(vectors)
  max_norm = jnp.asarray(max_norm).astype(vectors.dtype)
  peak = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
  # XLA multiplies by the inverse, which may not be so small that it is lost.
  peak = jnp.minimum(peak, jnp.finfo(vectors.dtype).max / 16)
  unit = vectors / jnp.where(peak > 0, peak, 1)
  norm = jnp.linalg.norm(unit, axis=-1, keepdims=True)
  norm = jnp.where(peak > 0, norm, 1)
  return jnp.where(peak > max_norm / norm, unit * (max_norm / norm), vectors)


def move(
  points: jax.typing.ArrayLike,
  vectors: jax.typing.ArrayLike,
  max_step: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  r"""Retracts along vectors of bounded length.

  Args:
    points: (..., n, k), unit rows.
    vectors: (..., n, k), tangent rows of the same dtype.
    max_step: (), the bound, positive. None means :math:`0.5 / \sqrt n`, about a
      seventh of the mean distance to the nearest point on the ordinary sphere.

  Returns:
    The points (..., n, k), and the share (...) of the vectors that were longer.

  Examples:
    >>> points = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> vectors = jnp.array([[0.0, 9.0], [0.0, 0.0]])
    >>> move(points, vectors, 0.75)
    (Array([[0.8, 0.6],
           [0. , 1. ]], dtype=float32), Array(0.5, dtype=float32))
  """
  points, vectors = jnp.asarray(points), jnp.asarray(vectors)
  if max_step is None:
    max_step = 0.5 / math.sqrt(points.shape[-2])
  shorter = limit(vectors, max_step)
  longer = jnp.any(shorter != vectors, axis=-1)
  return retract(points, shorter), jnp.mean(longer, axis=-1, dtype=points.dtype)


def check_max_step(max_step: jax.typing.ArrayLike | None) -> None:
  """Refuses a number that is not above zero; None and arrays pass."""
  if isinstance(max_step, int | float) and not max_step > 0:
    raise ValueError(f'max_step must be positive, got {max_step}.')


def draw_uniform(
  key: jax.Array,
  num_points: int,
  dim: int,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Draws independent uniform points: Gaussian rows, normalised.

  Args:
    key: PRNG key.
    num_points: n, at least 1. Static.
    dim: k, at least 2: the points lie on the sphere in k dimensions. Static.
    dtype: A float dtype; None means the default one of JAX.

  Returns:
    (n, k), of unit rows.

  Raises:
    ValueError: If `num_points` or `dim` is too small.

  Examples:
    >>> points = draw_uniform(jax.random.key(0), 5, 3)
    >>> jnp.linalg.norm(points, axis=1).round(5)
    Array([1., 1., 1., 1., 1.], dtype=float32)
  """
  if num_points < 1:
    raise ValueError(f'num_points must be at least 1, got {num_points}.')
  if dim < 2:
    raise ValueError(f'dim must be at least 2, got {dim}.')
  dtype = jnp.result_type(float) if dtype is None else dtype
  return normalize(jax.random.normal(key, (num_points, dim), dtype))


def check_points(points: jax.typing.ArrayLike) -> None:
  r"""Refuses on the host what has no finite energy or lies off the sphere.

  A norm may be off by :math:`\epsilon^{3/4}` (2e-12 in float64, 6e-6 in
  float32); two points coincide below a distance of 1e-12 or
  :math:`2 \epsilon`, whichever is more. Time grows as :math:`n \log n` and
  memory as :math:`n`.

  Args:
    points: (n, k), float.

  Raises:
    ValueError: If the shape or dtype is another, n or k is below 2, an entry is
      not finite, a row is not of unit length, or two rows coincide.

  Examples:
    >>> check_points(jnp.eye(3))
    >>> check_points(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    Traceback (most recent call last):
    ...
    ValueError: points must be unit rows, but row 1 has norm 2.
  """
  points = np.asarray(points)
  dtype = points.dtype
  if points.ndim != 2 or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      'points must be a float array of shape (n, k), got '
      f'{dtype} of shape {points.shape}.'
    )
  num_points, dim = points.shape
  if num_points < 2:
    raise ValueError(f'points must be at least n = 2, got {num_points}.')
  if dim < 2:
    raise ValueError(f'points must have dimension k >= 2, got {dim}.')
  points = points.astype(np.float64)
  bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
  if bad.size:
    raise ValueError(
      f'points must be finite, but row {bad[0]} is {points[bad[0]]}.'
    )
  epsilon = float(jnp.finfo(dtype).eps)
  norm = np.linalg.norm(points, axis=1)
  bad = np.flatnonzero(np.abs(norm - 1) > epsilon**0.75)
  if bad.size:
    row = bad[0]
    raise ValueError(
      f'points must be unit rows, but row {row} has norm {norm[row]:.16g}.'
    )
  pair = _coincident(points, max(1e-12, 2 * epsilon))
  if pair is not None:
    i, j, distance = pair
    raise ValueError(
      f'points must be distinct, but rows {i} and {j} are {distance:.3g} apart.'
    )


def _coincident(points, tolerance):
  """Two rows (i, j, distance) closer than `tolerance`, or None."""
  # Rows that close are as close along any line, and few others are.
  line = np.random.default_rng(0).normal(size=points.shape[1])
  along = points @ (line / np.linalg.norm(line))
  order = np.argsort(along)
  along = along[order]
  for offset in range(1, len(points)):
    first = np.flatnonzero(along[offset:] - along[:-offset] <= tolerance)
    if not first.size:
      return None
    i, j = order[first], order[first + offset]
    distance = np.linalg.norm(points[i] - points[j], axis=1)
    nearest = np.argmin(distance)
    if distance[nearest] < tolerance:
      i, j = sorted((int(i[nearest]), int(j[nearest])))
      return i, j, distance[nearest]
  return None
