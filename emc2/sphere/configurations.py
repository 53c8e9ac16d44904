r"""Coordinates of the symmetric configurations whose energies are known.

All are NumPy arrays of float64 on the host, (n, k) with unit rows. The codes in
more than four dimensions come from two of them, the roots of the lattice E8 and
the shortest vectors of the Leech lattice: one fixes a vector of the lattice,
takes the points that have one inner product with it, and looks at what is left
of these across it.
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from emc2.sphere import closed_forms

_GOLDEN = (1 + np.sqrt(5.0)) / 2


def polygon(num_points: int) -> np.ndarray:
  """The regular polygon.

  Args:
    num_points: n >= 2.

  Returns:
    (n, 2), float64.

  Raises:
    ValueError: If n < 2.

  Examples:
    >>> polygon(4).round(12) + 0.0
    array([[ 1.,  0.],
           [ 0.,  1.],
           [-1.,  0.],
           [ 0., -1.]])
  """
  if num_points < 2:
    raise ValueError(f'num_points must be at least 2, got {num_points}.')
  angle = 2 * np.pi * np.arange(num_points) / num_points
  return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def simplex(num_points: int, dim: int | None = None) -> np.ndarray:
  """The regular simplex: all inner products are -1 / (n - 1).

  Args:
    num_points: n >= 2.
    dim: k >= max(2, n - 1); None means the least. The simplex lies on a great
      sphere of dimension n - 2, and the other coordinates are 0.

  Returns:
    (n, k), float64.

  Raises:
    ValueError: If n < 2, or k is too small.

  Examples:
    >>> points = simplex(4)
    >>> (points @ points.T * 3).round(9)
    array([[ 3., -1., -1., -1.],
           [-1.,  3., -1., -1.],
           [-1., -1.,  3., -1.],
           [-1., -1., -1.,  3.]])
  """
  if num_points < 2:
    raise ValueError(f'num_points must be at least 2, got {num_points}.')
  least = max(2, num_points - 1)
  dim = least if dim is None else dim
  if dim < least:
    raise ValueError(
      f'dim must be at least {least} for {num_points} points, got {dim}.'
    )
  # The unit vectors of R^n, seen across the vector of ones.
  points = _across(np.eye(num_points), np.ones((1, num_points)))
  return np.pad(points, ((0, 0), (0, dim - num_points + 1)))


def cross_polytope(dim: int) -> np.ndarray:
  """The unit vectors and their negatives: a square, an octahedron and so on.

  Args:
    dim: k >= 2.

  Returns:
    (2k, k), float64; the first k rows are the identity.

  Raises:
    ValueError: If k < 2.

  Examples:
    >>> cross_polytope(2) + 0.0
    array([[ 1.,  0.],
           [ 0.,  1.],
           [-1.,  0.],
           [ 0., -1.]])
  """
  if dim < 2:
    raise ValueError(f'dim must be at least 2, got {dim}.')
  return np.concatenate([np.eye(dim), -np.eye(dim)])


def bipyramid() -> np.ndarray:
  """Two poles and an equilateral triangle on the equator.

  Of five points it has the least energy for exponents up to 15.048..., from
  where on a pyramid over a square has less.

  Returns:
    (5, 3), float64.

  References:
    Schwartz, `The Phase Transition in 5 Point Energy Minimization
    <https://arxiv.org/abs/1610.03303>`_, 2016.
  """
  equator = np.pad(polygon(3), ((0, 0), (0, 1)))
  return np.concatenate([equator, [[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]])


def cube() -> np.ndarray:
  """The corners of the cube; no minimum of the energy.

  Returns:
    (8, 3), float64.
  """
  return _signs(3) / np.sqrt(3.0)


def icosahedron() -> np.ndarray:
  """The corners of the icosahedron, with three of its axes along our own.

  Returns:
    (12, 3), float64.
  """
  corners = [
    np.roll([0.0, a, b * _GOLDEN], shift)
    for shift in range(3)
    for a, b in _signs(2)
  ]
  return _normalize(np.stack(corners))


def dodecahedron() -> np.ndarray:
  """The corners of the dodecahedron that is dual to :func:`icosahedron`.

  Returns:
    (20, 3), float64; no minimum of the energy.
  """
  corners = [
    np.roll([0.0, a * _GOLDEN, b / _GOLDEN], shift)
    for shift in range(3)
    for a, b in _signs(2)
  ]
  return _normalize(np.concatenate([_signs(3), np.stack(corners)]))


def cell_24() -> np.ndarray:
  """The corners of the 24-cell, the roots of the lattice D4.

  Returns:
    (24, 4), float64. No universal optimum, though no better 24 points are
    known for the exponents 1 and 2.
  """
  return _pairs_of_signs(4) / np.sqrt(2.0)


def cell_600() -> np.ndarray:
  """The corners of the 600-cell, the unit icosians.

  Returns:
    (120, 4), float64.
  """
  even = [p for p in itertools.permutations(range(4)) if _is_even(p)]
  quarter = [
    np.array([a * _GOLDEN, b, c / _GOLDEN, 0.0])[list(p)] / 2
    for p in even
    for a, b, c in _signs(3)
  ]
  return np.concatenate([cross_polytope(4), _signs(4) / 2, np.stack(quarter)])


def e8_roots() -> np.ndarray:
  """The shortest vectors of the lattice E8.

  Returns:
    (240, 8), float64.
  """
  halves = _signs(8) / 2
  halves = halves[np.prod(halves, axis=1) > 0]
  return np.concatenate([_pairs_of_signs(8), halves]) / np.sqrt(2.0)


def leech() -> np.ndarray:
  """The shortest vectors of the Leech lattice.

  Returns:
    (196560, 24), float64: 38 MB.

  References:
    Conway and Sloane, `Sphere Packings, Lattices and Groups
    <https://doi.org/10.1007/978-1-4757-6568-7>`_, 1999, chapter 4, section 11.
  """
  return _leech() / np.sqrt(32.0)


def derived(points: np.ndarray, product: float) -> np.ndarray:
  """The points at one inner product with the first, as seen across it.

  Their components across the first point, scaled to unit length: a code of one
  dimension less. The neighbours of a corner make the vertex figure.

  Args:
    points: (n, k), unit rows, k >= 3.
    product: Their inner product with the first point, in (-1, 1), to 1e-9.

  Returns:
    (m, k - 1), float64.

  Raises:
    ValueError: If no point has that inner product with the first one.

  Examples:
    >>> derived(icosahedron(), 5**-0.5).shape  # A pentagon.
    (5, 2)
  """
  found = points[np.abs(points @ points[0] - product) < 1e-9]
  if not len(found) or not -1 < product < 1:
    raise ValueError(
      'product must be in (-1, 1) and that of a point with the first one, '
      f'got {product}.'
    )
  return _across(found, points[:1])


def named() -> dict[str, tuple[int, int]]:
  """Lists what :func:`make` makes.

  Returns:
    Each name to (k, n), the dimension and the number of points.

  Examples:
    >>> named()['600-cell']
    (4, 120)
  """
  codes = closed_forms.CODES
  return {name: (codes[name].dim, codes[name].num_points) for name in _MAKERS}


def make(name: str) -> np.ndarray:
  """Makes a configuration by its name.

  Args:
    name: One of :func:`named`.

  Returns:
    (n, k), float64, unit rows. Those in 21 dimensions or more are picked from
    :func:`leech`, in less than a second.

  Raises:
    ValueError: If there is no such name.

  Examples:
    >>> make('schlafli_27').shape
    (27, 6)

  References:
    Cohn and Kumar, `Universally optimal distribution of points on spheres
    <https://arxiv.org/abs/math/0607446>`_, 2007, table 1.
  """
  if name not in _MAKERS:
    raise ValueError(f'name must be one of {list(_MAKERS)}, got {name!r}.')
  return _MAKERS[name]()


def identify(points: np.ndarray, tolerance: float = 1e-6) -> str | None:
  """Names the configuration that has the same inner products.

  The sorted inner products of all pairs decide, so that rotations, reflections
  and the order of the points do not.

  Args:
    points: (n, k), unit rows.
    tolerance: By how much an inner product may differ.

  Returns:
    'polygon', 'simplex' or 'cross-polytope', or else one of :func:`named`, or
    None. Memory grows as the square of n where the numbers fit a name.

  Examples:
    >>> identify(make('cube')), identify(cell_24()[:5])
    ('cube', None)
  """
  num_points, dim = points.shape
  found = None
  for name, products in _candidates(num_points, dim):
    if found is None:
      upper = np.triu_indices(num_points, 1)
      found = np.sort((points @ points.T)[upper])
    if np.max(np.abs(found - products)) <= tolerance:
      return name
  return None


def _candidates(num_points, dim):
  """Yields the names that fit the numbers, with sorted products of pairs."""
  pairs = num_points * (num_points - 1) // 2
  spread = lambda products: np.repeat(
    sorted(products),
    [round(num_points * products[t] / 2) for t in sorted(products)],
  )
  if dim == 2:
    steps = np.subtract.outer(np.arange(num_points), np.arange(num_points))
    steps = steps[np.triu_indices(num_points, 1)]
    yield 'polygon', np.sort(np.cos(2 * np.pi * steps / num_points))
  if 2 <= num_points <= dim + 1:
    yield 'simplex', np.full(pairs, -1 / (num_points - 1))
  if num_points == 2 * dim:
    yield 'cross-polytope', spread({-1.0: 1, 0.0: num_points - 2})
  for name, numbers in named().items():
    if numbers == (dim, num_points):
      yield name, spread(closed_forms.CODES[name].products)


def _normalize(points):
  return points / np.linalg.norm(points, axis=1, keepdims=True)


def _across(points, fixed):
  """Unit components across the rows of `fixed`, in a basis of that space."""
  # The last rows of the basis are what the singular values leave out.
  basis = np.linalg.svd(fixed)[2][len(fixed) :]
  return _normalize(points @ basis.T)


def _signs(dim):
  """(2^k, k): all rows of 1 and -1."""
  return np.array(list(itertools.product([1.0, -1.0], repeat=dim)))


def _pairs_of_signs(dim):
  """(2k(k - 1), k): all rows with two entries of 1 or -1, and 0 elsewhere."""
  eye = np.eye(dim)
  rows = [
    a * eye[i] + b * eye[j]
    for i, j in itertools.combinations(range(dim), 2)
    for a, b in _signs(2)
  ]
  return np.stack(rows)


def _is_even(permutation):
  swapped = [a > b for a, b in itertools.combinations(permutation, 2)]
  return sum(swapped) % 2 == 0


def _golay():
  """(4096, 24), 0 and 1: the words of the extended binary Golay code."""
  # The cyclic code of length 23 that x^11 + x^10 + x^6 + x^5 + x^4 + x^2 + 1
  # generates, with a parity bit.
  generator = np.zeros(23, np.int64)
  generator[[0, 2, 4, 5, 6, 10, 11]] = 1
  basis = np.stack([np.roll(generator, shift) for shift in range(12)])
  basis = np.concatenate([basis, basis.sum(axis=1, keepdims=True)], axis=1)
  messages = (_signs(12) < 0).astype(np.int64)
  return messages @ basis % 2


@functools.cache
def _leech():
  """(196560, 24), int8: the shortest vectors, times the root of 8."""
  words, eye = _golay(), np.eye(24, dtype=np.int64)
  fours = 4 * _pairs_of_signs(24)
  # Twos on a word of weight 8, with an even number of minus signs.
  octads = words[words.sum(axis=1) == 8]
  signs = _signs(8)
  signs = signs[np.prod(signs, axis=1) > 0]
  twos = np.zeros((len(octads), len(signs), 24))
  where = np.nonzero(octads)[1].reshape(-1, 1, 8)
  np.put_along_axis(
    twos, np.broadcast_to(where, (*twos.shape[:2], 8)), 2 * signs[None], axis=2
  )
  # One -3 and 23 ones, with all signs changed on a word.
  ones = (1 - 2 * words)[:, None, :] * (1 - 4 * eye)
  parts = [fours, twos.reshape(-1, 24), ones.reshape(-1, 24)]
  vectors = np.concatenate([part.astype(np.int8) for part in parts])
  vectors.flags.writeable = False
  return vectors


def _leech_code(*conditions):
  """The shortest vectors with these products with fixed ones, across them.

  Args:
    *conditions: Pairs of a vector of the lattice, times the root of 8, by its
      first entries (all others are its last), and the inner product with it.

  Returns:
    (n, 24 - m), of m conditions.
  """
  vectors, fixed = _leech(), []
  for entries, product in conditions:
    row = np.full(24, entries[-1], np.float32)
    row[: len(entries)] = entries
    # These small whole numbers are exact in float32.
    vectors = vectors[vectors.astype(np.float32) @ row == product]
    fixed.append(row)
  return _across(vectors.astype(np.float64), np.stack(fixed).astype(np.float64))


def _gosset_56():
  return derived(e8_roots(), 1 / 2)


def _schlafli_27():
  return derived(_gosset_56(), 1 / 3)


def _clebsch_16():
  return derived(_schlafli_27(), 1 / 4)


def _leech_4600():
  return _leech_code(([4, 4, 0], 16))


def _isotropic_891():
  return _leech_code(([4, 4, 0], 16), ([4, 0, 4, 0], 16))


def _equiangular_552():
  return _leech_code(([5, 1], 24))


def _higman_sims_100():
  return _leech_code(([4, -4, 0], 16), ([5, 1], 24))


def _mclaughlin_275():
  return derived(_equiangular_552(), 1 / 5)


def _mclaughlin_162():
  return derived(_mclaughlin_275(), 1 / 6)


def _isotropic_112():
  return derived(_mclaughlin_275(), -1 / 4)


_MAKERS: Mapping[str, Callable[[], np.ndarray]] = {
  'bipyramid': bipyramid,
  'cube': cube,
  'icosahedron': icosahedron,
  'dodecahedron': dodecahedron,
  '24-cell': cell_24,
  '600-cell': cell_600,
  'clebsch_16': _clebsch_16,
  'schlafli_27': _schlafli_27,
  'gosset_56': _gosset_56,
  'e8_240': e8_roots,
  'isotropic_112': _isotropic_112,
  'mclaughlin_162': _mclaughlin_162,
  'higman_sims_100': _higman_sims_100,
  'mclaughlin_275': _mclaughlin_275,
  'isotropic_891': _isotropic_891,
  'equiangular_552': _equiangular_552,
  'leech_4600': _leech_4600,
  'leech_196560': leech,
}
