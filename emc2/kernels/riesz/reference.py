r"""All-pairs Riesz potentials and gradients, in plain `jax.numpy`.

Written for a CPU. Points lie coordinate by coordinate, and a tile of weights
:math:`w_{ij} = s / r_{ij}^{s + 2}` stays in the cache of a core. Each pair of
points is met once: a tile is summed along both of its sides.

XLA fuses no two sums of a tile into one loop, and each loop over a tile costs
as much as the tile. So in float64 the gradient is one matrix product for each
side, :math:`\sum_j w_{ij} x_j - x_i \sum_j w_{ij}`, whose terms cancel: its
rounding is that of :math:`\sum_j w_{ij}`, on a sphere some :math:`\sqrt{n}`
times that of :math:`\sum_j w_{ij} (x_i - x_j)`. Float64 has the digits to
spare. Lower precisions sum the differences, at half the speed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A tile of float64 of this size lies in the second-level cache of a core.
_TILE_ENTRIES = 2**16
# Less is met twice by smaller tiles, but to call the loops of one costs as much
# as some thousand pairs, unless many sets of points share the call.
_MIN_TILE = 80
_FEW_POINTS = 160
_ALIGN = 8
# Second derivatives take this many pairs at once.
_TANGENT_ENTRIES = 2**17
# Above it the squared distances come from inner products.
_MAX_DIFFERENCE_DIM = 8

_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def weight(r2: jax.Array, exponent: float) -> jax.Array:
  """`w` in the gradient `-w (x - y)` of `r^-s`, or of `-log r` where `s` is 0.

  Args:
    r2: squared distances, positive.
    exponent: `s`, static.

  Returns:
    `s / r^(s + 2)`, or `1 / r^2`, like `r2`.
  """
  if exponent == 0:
    return 1 / r2
  if exponent % 2 == 0:
    return exponent * jax.lax.integer_pow(1 / r2, int(exponent) // 2 + 1)
  if exponent % 2 == 1:
    return exponent * jax.lax.integer_pow(_rsqrt(r2), int(exponent) + 2)
  return exponent * jnp.exp(-(exponent / 2 + 1) * jnp.log(r2))


def potential(r2: jax.Array, w: jax.Array, exponent: float) -> jax.Array:
  """`r^-s`, or `-log r`, of squared distances and their :func:`weight`."""
  return -jnp.log(r2) / 2 if exponent == 0 else w * r2 * (1 / exponent)


def _rsqrt(x):
  """`x ** -0.5`; in float64 by multiplications alone.

  A square root and a division would wait for one slow unit. Half the bits
  taken from a constant leave an error `e` of 3 %; a step of fourth order takes
  it to `35/8 e^4`, and one of third order then to `5/2 e^3`, the rounding.
  """
  if x.dtype != jnp.float64:
    return jax.lax.rsqrt(x)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint64)
  half = jax.lax.shift_right_logical(bits, jnp.uint64(1))
  y = jax.lax.bitcast_convert_type(
    jnp.uint64(0x5FE6EB50C7B537A9) - half, jnp.float64
  )
  h = 1 - x * y * y
  y = y + y * h * (0.5 + h * (0.375 + h * 0.3125))
  h = 1 - x * y * y
  return y + y * h * (0.5 + h * 0.375)


def _differences(x, y):
  """(g, k, m), (g, k, l) -> k arrays (g, m, l)."""
  return [x[:, c, :, None] - y[:, c, None, :] for c in range(x.shape[1])]


def _squared_distances(x, y):
  """(g, k, m), (g, k, l) -> (g, m, l)."""
  if x.shape[1] <= _MAX_DIFFERENCE_DIM:
    return functools.reduce(jnp.add, [d * d for d in _differences(x, y)])
  norm = lambda z: jnp.sum(z * z, axis=1)
  inner = _dot('gkm,gkl->gml', x, y)
  r2 = norm(x)[:, :, None] + norm(y)[:, None, :] - 2 * inner
  return jnp.maximum(r2, jnp.finfo(x.dtype).tiny)


def _meet(x, y, exponent, *, x_real=None, y_real=None, same=False):
  """What the points of a tile get from each other.

  Args:
    x: (g, k, m).
    y: (g, k, l).
    exponent: static.
    x_real: (m,), 1 for a point and 0 for padding; None if there is none.
    y_real: (l,), the same for y.
    same: whether x and y are the same points.

  Returns:
    Potential (g, m) and gradient (g, k, m) for x, and the same for y. Apart, so
    that a caller who wants one of them does not pay for the other.
  """
  r2 = _squared_distances(x, y)
  if same:
    # Before the power, which is infinite at 0; the difference is 0 anyway, but
    # not the potential.
    index = jnp.arange(x.shape[2])
    diagonal = (index[:, None] == index[None, :])[None]
    r2 = jnp.where(diagonal, 1.0, r2)
  w = weight(r2, exponent)
  if same:
    w = jnp.where(diagonal, 0.0, w)
  real = None
  if x_real is not None or y_real is not None:
    ones = lambda z: jnp.ones(z.shape[2], z.dtype)
    x_real = ones(x) if x_real is None else x_real
    y_real = ones(y) if y_real is None else y_real
    real = (x_real[:, None] * y_real[None, :])[None]
    w *= real
  # One array for all sums, not one made anew in each.
  w = jax.lax.optimization_barrier(w)
  p = potential(r2, w, exponent)
  if exponent == 0 and real is not None:
    p *= real
  potentials = jnp.sum(p, axis=2), jnp.sum(p, axis=1)
  if x.dtype == jnp.float64 or x.shape[1] > _MAX_DIFFERENCE_DIM:
    basis = lambda z: jnp.concatenate([jnp.ones_like(z[:, :1]), z], axis=1)
    of_x = _rows(_dot('gml,glq->gmq', w, _rows(basis(y))))
    of_y = _dot('gqm,gml->gql', basis(x), w)
    for_x = of_x[:, 1:] - x * of_x[:, :1]
    for_y = of_y[:, 1:] - y * of_y[:, :1]
  else:
    forces = [w * d for d in _differences(x, y)]
    for_x = -jnp.stack([jnp.sum(f, axis=2) for f in forces], axis=1)
    for_y = jnp.stack([jnp.sum(f, axis=1) for f in forces], axis=1)
  return (potentials[0], for_x), (potentials[1], for_y)


def _rows(x):
  return jnp.swapaxes(x, -1, -2)


def _fold(
  count: int,
  take: Callable[[jax.Array], Any],
  add: Callable[[jax.Array, Any, Any], Any],
  total: Any,
) -> Any:
  """`total = add(i, take(i), total)` for each `i` below `count`.

  What is taken travels in the state of the loop. XLA would slice it within the
  loop over a tile, for each pair anew and without vectors.
  """

  def body(i, carry):
    taken, total = carry
    return take(i + 1), add(i, taken, total)

  return jax.lax.fori_loop(0, count, body, (take(0), total))[1]


def _at(x, i):
  """Row i, or the last one beyond it."""
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _add_at(total, i, part):
  """Adds to row i of each array."""
  add = jax.lax.dynamic_update_index_in_dim
  return jax.tree.map(lambda x, y: add(x, _at(x, i) + y, i, 0), total, part)


def _nothing(tiles):
  """Potentials and gradients of 0 for tiles (count, g, k, size)."""
  count, g, _, size = tiles.shape
  zeros = jnp.zeros_like(tiles, shape=(count, g, size))
  return zeros, jnp.zeros_like(tiles)


def _to_tiles(x, size, outside):
  """(g, n, k) -> tiles (count, g, k, size), and which points are real.

  Padding lies on a line outwards from `outside` of all points: no distance to
  it is 0. The second result, 1 for a point, is (count, size), or None if all
  are.
  """
  g, n, k = x.shape
  count = -(-n // size)
  extra = count * size - n
  real = None
  if extra:
    steps = jnp.arange(1, extra + 1, dtype=x.dtype)[None, :, None]
    padding = jnp.broadcast_to(outside * steps, (g, extra, k))
    x = jnp.concatenate([x, padding], axis=1)
    real = (jnp.arange(count * size) < n).reshape(count, size).astype(x.dtype)
  return x.reshape(g, count, size, k).transpose(1, 0, 3, 2), real


def _from_tiles(total, n):
  """Potential (g, n) and gradient (g, n, k) of the points in the tiles."""
  potential, gradient = total
  count, g, k, size = gradient.shape
  potential = jnp.swapaxes(potential, 0, 1).reshape(g, count * size)
  gradient = gradient.transpose(1, 0, 3, 2).reshape(g, count * size, k)
  return potential[:, :n], gradient[:, :n]


def _outside(x):
  """Beyond all coordinates of x (g, n, k): (g, 1, 1)."""
  return 2 * jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True) + 1


def _tile_size(n, num):
  """Points in a tile, of n in each of `num` sets."""
  most = max(math.isqrt(_TILE_ENTRIES // num), _MIN_TILE)
  if n <= _FEW_POINTS:
    return -(-n // -(-n // most)) if num > 1 else n
  if num == 1 and n < 2 * most:
    most //= 2
  # Whole vectors, and of those sizes the largest with the least padding.
  sizes = range(most // 2 // _ALIGN * _ALIGN, most + 1, _ALIGN)
  return min(sizes, key=lambda size: (-n % size, -size))


def _among(x, size, exponent):
  """Potential (g, n) and gradient (g, n, k) of x (g, n, k) by itself."""
  n = x.shape[1]
  x, real = _to_tiles(x, size, _outside(x))
  count = x.shape[0]

  def own(i, tile, total):
    x_i, real_i = tile
    for_i, _ = _meet(
      x_i, x_i, exponent, x_real=real_i, y_real=real_i, same=True
    )
    return _add_at(total, i, for_i)

  # Each pair once: tile i and the one that comes 1, 2, ... after it, in a ring.
  both = lambda p: (p % count, (p % count + p // count + 1) % count)

  def pair(p, tiles, total):
    (x_i, real_i), (x_j, real_j) = tiles
    for_i, for_j = _meet(x_i, x_j, exponent, x_real=real_i, y_real=real_j)
    i, j = both(p)
    return _add_at(_add_at(total, i, for_i), j, for_j)

  if count == 1:
    value, gradient = _meet(x[0], x[0], exponent, same=True)[0]
    return value, _rows(gradient)
  take = lambda i: jax.tree.map(lambda z: _at(z, i), (x, real))
  total = _fold(count, take, own, _nothing(x))
  take_both = lambda p: tuple(take(i) for i in both(p))
  num_pairs = count * (count - 1) // 2
  return _from_tiles(_fold(num_pairs, take_both, pair, total), n)


def _between(x, y, size, y_size, exponent):
  """Potential (g, n) and gradient (g, n, k) of x by y (g, m, k)."""
  n = x.shape[1]
  outside = jnp.maximum(_outside(x), _outside(y))
  x, x_real = _to_tiles(x, size, outside)
  y, y_real = _to_tiles(y, y_size, -outside)
  count = y.shape[0]

  def pair(i, tiles, total):
    (x_i, x_real_i), (y_j, y_real_j) = tiles
    for_i, _ = _meet(x_i, y_j, exponent, x_real=x_real_i, y_real=y_real_j)
    return _add_at(total, i // count, for_i)

  def take(i):
    at = lambda j: lambda z: _at(z, j)
    return (
      jax.tree.map(at(i // count), (x, x_real)),
      jax.tree.map(at(i % count), (y, y_real)),
    )

  num_pairs = x.shape[0] * count
  return _from_tiles(_fold(num_pairs, take, pair, _nothing(x)), n)


def forward(rows, columns, exponent):
  """Potentials and gradients.

  Args:
    rows: (..., n, k), any float dtype.
    columns: (..., m, k) of the same dtype, or None for the rows themselves.
    exponent: static.

  Returns:
    potential (..., n) and gradient (..., n, k), in the dtype of the rows.
  """
  *batch, n, k = rows.shape
  working = jnp.float32 if rows.dtype.itemsize < 4 else rows.dtype

  num = math.prod(batch)
  sets = [rows] if columns is None else [rows, columns]
  sizes = [_tile_size(z.shape[-2], num) for z in sets]

  def group(sets):
    sets = [z.astype(working) for z in sets]
    meet = _among if columns is None else _between
    return jax.tree.map(
      lambda z: z.astype(rows.dtype), meet(*sets, *sizes, exponent)
    )

  together = max(1, _TILE_ENTRIES // (sizes[0] * sizes[-1]))
  sets = [z.reshape(num, *z.shape[-2:]) for z in sets]
  value, gradient = _in_groups(group, sets, min(num, together))
  return value.reshape(*batch, n), gradient.reshape(*batch, n, k)


def _in_groups(fn, sets, size):
  """Applies fn to at most `size` sets of points at a time."""
  num = sets[0].shape[0]
  count = -(-num // size)
  if count == 1:
    return fn(sets)
  size = -(-num // count)
  # The last group is filled up with sets that are in it already.
  index = jnp.minimum(jnp.arange(count * size), num - 1).reshape(count, size)
  out = jax.lax.map(lambda i: fn([z[i] for z in sets]), index)
  return jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:])[:num], out)


def tangent(rows, columns, d_rows, d_columns, exponent):
  r"""Derivatives of :func:`forward` along a direction.

  With :math:`d = x_i - y_j` and :math:`\dot d` its direction, a pair adds
  :math:`-w \, d \cdot \dot d` to the potential and
  :math:`-w \dot d + (s + 2) w (d \cdot \dot d) d / r^2` to the gradient.

  Args:
    rows: as for `forward`.
    columns: as for `forward`.
    d_rows: like rows.
    d_columns: like columns.
    exponent: static.

  Returns:
    The derivatives of the potential and the gradient.
  """
  if columns is None:
    y, d_y = rows, d_rows
  else:
    y, d_y = columns, d_columns
  n, k = rows.shape[-2:]
  m = y.shape[-2]
  size = max(1, min(m, _TANGENT_ENTRIES // math.prod(rows.shape[:-1])))
  count = -(-m // size)
  last = count * size - m
  # Blocks of columns come first; the last one is filled up and masked.
  fill = lambda z: jnp.pad(z, [(0, 0)] * (z.ndim - 2) + [(0, last), (0, 0)])
  cut = lambda z: jnp.moveaxis(
    fill(z).reshape(*z.shape[:-2], count, size, k), -3, 0
  )
  index = jnp.arange(count * size).reshape(count, size)

  @jax.checkpoint
  def add(total, block):
    y, d_y, j = block
    keep = jnp.broadcast_to(j < m, (n, size))
    if columns is None:
      keep &= jnp.arange(n)[:, None] != j[None, :]
    d = rows[..., :, None, :] - y[..., None, :, :]
    d_dot = d_rows[..., :, None, :] - d_y[..., None, :, :]
    r2 = jnp.where(keep, jnp.sum(d * d, axis=-1), 1.0)
    w = jnp.where(keep, weight(r2, exponent), 0.0)
    along = w * jnp.sum(d * d_dot, axis=-1)
    twice = (exponent + 2) * along / r2
    value = -jnp.sum(along, axis=-1)
    gradient = twice[..., None] * d - w[..., None] * d_dot
    return (total[0] + value, total[1] + jnp.sum(gradient, axis=-2)), None

  total = jnp.zeros_like(rows[..., 0]), jnp.zeros_like(rows)
  return jax.lax.scan(add, total, (cut(y), cut(d_y), index))[0]
