"""Who lies next to whom: distances, and the defects of a triangulation."""

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 32
"""Rows at a time; against all columns."""

_UNROLL = 8
"""Coordinates in one pass over a block."""


def nearest_distances(points: jax.typing.ArrayLike) -> jax.Array:
  r"""The distance of each point to the nearest other one.

  .. math::
    d_i = \min_{j \ne i} \|x_i - x_j\|

  Taken from differences, so that small distances keep their digits, and in
  blocks of rows: memory grows as n.

  Args:
    points: (n, k), float, n at least 2; need not lie on a sphere.

  Returns:
    (n,).

  Raises:
    ValueError: If the shape is another.

  Examples:
    >>> nearest_distances(jnp.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]))
    Array([3., 3., 4.], dtype=float32)
  """
  points = jnp.asarray(points)
  if points.ndim != 2 or points.shape[0] < 2:
    raise ValueError(
      f'points must be (n, k) with n at least 2, got shape {points.shape}.'
    )
  num_points, dim = points.shape
  columns, column_ids = points.T, jnp.arange(num_points)
  excess = -num_points % _BLOCK
  rows = jnp.pad(points, ((0, excess), (0, 0))).reshape(-1, _BLOCK, dim)
  row_ids = jnp.arange(num_points + excess).reshape(-1, _BLOCK)

  def nearest(block):
    rows, row_ids = block

    def add(axis, square):
      difference = rows[:, axis, None] - columns[axis][None, :]
      return square + difference * difference

    itself = row_ids[:, None] == column_ids[None, :]
    square = jnp.where(itself, jnp.inf, 0.0).astype(points.dtype)
    square = jax.lax.fori_loop(0, dim, add, square, unroll=_UNROLL)
    return jnp.min(square, axis=1)

  square = jax.lax.map(nearest, (rows, row_ids))
  return jnp.sqrt(square.reshape(-1)[:num_points])


def min_distance(points: jax.typing.ArrayLike) -> jax.Array:
  r"""The smallest distance between two points, :math:`\min_i d_i`.

  Args:
    points: (n, k), as for :func:`nearest_distances`.

  Returns:
    ().

  Raises:
    ValueError: If the shape is another.

  Examples:
    >>> min_distance(jnp.eye(3)).round(4)
    Array(1.4142, dtype=float32)
  """
  return jnp.min(nearest_distances(points))


def degrees(triangles: jax.typing.ArrayLike, num_points: int) -> jax.Array:
  """Counts the neighbours of each point in a triangulation of a sphere.

  In a closed surface a point has as many neighbours as triangles, which the
  facets of the convex hull of points on the ordinary sphere are.

  .. note::
    A facet with more than three corners, such as a square, can be cut into
    triangles in several ways, and degrees depend on the way taken.

  Args:
    triangles: (f, 3), int, in any order and orientation;
      :func:`check_triangulation` checks it.
    num_points: n. Static.

  Returns:
    (n,), int32.

  Raises:
    ValueError: If the shape is another.

  Examples:
    >>> tetrahedron = jnp.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
    >>> degrees(tetrahedron, 4)
    Array([3, 3, 3, 3], dtype=int32)
  """
  triangles = jnp.asarray(triangles)
  if triangles.ndim != 2 or triangles.shape[1] != 3:
    raise ValueError(f'triangles must be (f, 3), got shape {triangles.shape}.')
  return jnp.zeros(num_points, jnp.int32).at[triangles.ravel()].add(1)


def disclination_charges(
  triangles: jax.typing.ArrayLike, num_points: int
) -> jax.Array:
  r"""By how much each point falls short of six neighbours.

  .. math::
    q_i = 6 - \deg i, \quad \sum_i q_i = 12

  The sum is Euler's: no triangulation of a sphere is free of defects.

  Args:
    triangles: (f, 3), as for :func:`degrees`.
    num_points: n. Static.

  Returns:
    (n,), int32: 0 in the flat lattice, 1 for the twelve corners of an
    icosahedron.

  Raises:
    ValueError: If the shape is another.

  Examples:
    >>> tetrahedron = jnp.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
    >>> disclination_charges(tetrahedron, 4)
    Array([3, 3, 3, 3], dtype=int32)
  """
  return 6 - degrees(triangles, num_points)


def check_triangulation(
  triangles: jax.typing.ArrayLike, num_points: int
) -> None:
  """Refuses on the host what is no triangulation of a sphere.

  Args:
    triangles: (f, 3), int: the corners of each triangle.
    num_points: n, at least 4.

  Raises:
    ValueError: If the shape or dtype is another, a corner is no point or comes
      twice in a triangle, a point is no corner, an edge does not have two
      triangles, or there are not 2 n - 4 triangles, as Euler's formula has it.

  Examples:
    >>> check_triangulation(np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3]]), 4)
    Traceback (most recent call last):
    ...
    ValueError: triangles must meet in pairs, but 1 has the edge (1, 2).
  """
  triangles = np.asarray(triangles)
  shape, dtype = triangles.shape, triangles.dtype
  if len(shape) != 2 or shape[1] != 3 or not np.issubdtype(dtype, np.integer):
    raise ValueError(
      f'triangles must be integers of shape (f, 3), got {dtype} of shape '
      f'{shape}.'
    )
  outside = triangles[(triangles < 0) | (triangles >= num_points)]
  if outside.size:
    raise ValueError(
      f'triangles must hold points in [0, {num_points}), got {outside[0]}.'
    )
  corners = np.sort(triangles, axis=1)
  flat = np.flatnonzero((corners[:, :-1] == corners[:, 1:]).any(axis=1))
  if flat.size:
    raise ValueError(
      'triangles must have three corners, but row '
      f'{flat[0]} is {triangles[flat[0]]}.'
    )
  unused = np.flatnonzero(np.bincount(triangles.ravel(), None, num_points) == 0)
  if unused.size:
    raise ValueError(f'triangles must use every point, but not {unused[0]}.')
  sides = np.concatenate(
    [corners[:, pair] for pair in ([0, 1], [0, 2], [1, 2])]
  )
  edges, times = np.unique(sides, axis=0, return_counts=True)
  odd = np.flatnonzero(times != 2)
  if odd.size:
    a, b = edges[odd[0]].tolist()
    raise ValueError(
      'triangles must meet in pairs, but '
      f'{times[odd[0]]} has the edge ({a}, {b}).'
    )
  if shape[0] != 2 * num_points - 4:
    raise ValueError(
      f'triangles of a sphere must be 2 n - 4 = {2 * num_points - 4}, got '
      f'{shape[0]}.'
    )
