"""Point groups of R^3, and starts that are symmetric from the outset.

A minimum of many points is often symmetric, and a search among the symmetric
ones meets it sooner: an optimiser keeps the symmetry of its start up to
rounding. All is NumPy on the host, in float64.
"""

import functools
import itertools
import re

import numpy as np

from emc2.sphere import configurations

GROUPS = (
  'Ci',
  'C2',
  'C3',
  'C5',
  'S4',
  'S6',
  'D2',
  'D3',
  'D4',
  'D5',
  'D6',
  'D2d',
  'D3d',
  'D4d',
  'D5d',
  'D6d',
  'T',
  'Th',
  'O',
  'I',
)
"""Groups that find the best known points; see :func:`possible`."""

_HALF_X = np.diag([1.0, -1.0, -1.0])
_HALF_Z = np.diag([-1.0, -1.0, 1.0])
_MIRROR_Y = np.diag([1.0, -1.0, 1.0])
_MIRROR_Z = np.diag([1.0, 1.0, -1.0])
_INVERSION = -np.eye(3)
_CYCLE = np.roll(np.eye(3), 1, axis=0)  # A third of a turn about (1, 1, 1).
_SWAP = np.eye(3)[[1, 0, 2]]  # A mirror of the tetrahedron.


def _turn(order):
  """The rotation by 2 pi / order about the last axis."""
  angle = 2 * np.pi / order
  cos, sin = np.cos(angle), np.sin(angle)
  return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def _fifth_turn():
  """A fifth of a turn about a corner of the icosahedron of our axes."""
  x, y, z = configurations.icosahedron()[-1]
  cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
  angle = 2 * np.pi / 5
  turned = np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
  return np.eye(3) + turned


def _generators(name):
  """Elements that generate the group of that name."""
  cubic = {
    'T': [_HALF_Z, _CYCLE],
    'Td': [_HALF_Z, _CYCLE, _SWAP],
    'Th': [_HALF_Z, _CYCLE, _INVERSION],
    'O': [_turn(4), _CYCLE],
    'Oh': [_turn(4), _CYCLE, _INVERSION],
    'I': [_HALF_Z, _CYCLE, _fifth_turn()],
    'Ih': [_HALF_Z, _CYCLE, _fifth_turn(), _INVERSION],
    'Ci': [_INVERSION],
    'Cs': [_MIRROR_Z],
  }
  if name in cubic:
    return cubic[name]
  match = re.fullmatch(r'([CDS])([1-9][0-9]{0,2})([vhd]?)', name)
  family, order, suffix = match.groups() if match else ('', '0', '')
  order = int(order)
  if family == 'C' and suffix != 'd':
    more = {'': [], 'v': [_MIRROR_Y], 'h': [_MIRROR_Z]}[suffix]
    return [_turn(order), *more]
  if family == 'D' and suffix != 'v' and order > 1:
    turn = _turn(2 * order) @ _MIRROR_Z if suffix == 'd' else _turn(order)
    more = [_MIRROR_Z] if suffix == 'h' else []
    return [turn, _HALF_X, *more]
  if family == 'S' and not suffix and order % 2 == 0:
    return [_turn(order) @ _MIRROR_Z]
  raise ValueError(
    'group must be T, Td, Th, O, Oh, I, Ih, Ci, Cs, or for a number n below '
    f'1000 Cn, Cnv, Cnh, Dn, Dnh, Dnd (n >= 2) or Sn (n even), got {name!r}.'
  )


@functools.cache
def point_group(group: str) -> np.ndarray:
  """The elements of a point group.

  The main axis is the last of R^3. Those of T, O and I stand so that T is a
  subgroup of both, and I keeps :func:`emc2.sphere.configurations.icosahedron`.

  Args:
    group: Its name after Schoenflies: 'Ci', 'Cs', 'T', 'Td', 'Th', 'O', 'Oh',
      'I', 'Ih', or, for a number n < 1000, 'Cn', 'Cnv', 'Cnh', 'Dn', 'Dnh',
      'Dnd' (n >= 2) or 'Sn' (n even), such as 'D6d' and 'S4'.

  Returns:
    (|G|, 3, 3), orthogonal, the identity first. Read-only.

  Raises:
    ValueError: If there is no group of that name.

  Examples:
    >>> point_group('Th').shape
    (24, 3, 3)
    >>> np.linalg.det(point_group('Ci')).round(9)
    array([ 1., -1.])
  """
  generators = _generators(group)
  elements = [np.eye(3)]
  known = {_key(elements[0])}
  for element in elements:  # It grows until every product is known.
    for generator in generators:
      product = element @ generator
      if _key(product) not in known:
        known.add(_key(product))
        elements.append(product)
  stacked = np.stack(elements)
  stacked.flags.writeable = False
  return stacked


@functools.cache
def special_orbits(group: str) -> tuple[np.ndarray, ...]:
  """The orbits of the points on the axes of a group's rotations.

  A generic orbit has |G| points, and these have fewer. So have those of points
  on a mirror, which may lie anywhere on it, and are not listed.

  Args:
    group: A name that :func:`point_group` takes.

  Returns:
    Arrays (m, 3) of unit rows, those of fewest points first. Read-only.

  Raises:
    ValueError: If there is no group of that name.

  Examples:
    >>> [len(orbit) for orbit in special_orbits('I')]
    [12, 20, 30]
  """
  elements = point_group(group)
  orbits, known = [], set()
  for element in elements:
    is_rotation = np.linalg.det(element) > 0
    if not is_rotation or np.trace(element) > 3 - 1e-9:
      continue
    axis = _axis(element)
    for point in (axis, -axis):
      if _key(point) in known:
        continue
      images = elements @ point
      orbit = {_key(image): image for image in images}
      known |= orbit.keys()
      stacked = np.stack(list(orbit.values()))
      stacked.flags.writeable = False
      orbits.append(stacked)
  return tuple(sorted(orbits, key=len))


def possible(group: str, num_points: int) -> bool:
  """Whether :func:`symmetric_seed` can place that many points.

  Args:
    group: A name that :func:`point_group` takes.
    num_points: n >= 2.

  Returns:
    Whether special orbits and generic ones add up to n points.

  Raises:
    ValueError: If there is no group of that name.

  Examples:
    >>> [group for group in GROUPS if possible(group, 15)]
    ['C2', 'C3', 'C5', 'D3', 'D5']
  """
  return bool(_choices(group, num_points))


def symmetric_seed(
  rng: np.random.Generator,
  num_points: int,
  group: str,
  *,
  num_draws: int = 12,
) -> np.ndarray:
  r"""Draws points that a group maps to themselves.

  A random set of the group's special orbits such that |G| divides what is
  missing, then generic orbits until n points stand. Each of these is that of
  the one of some random unit vectors x which the points p before it, and its
  own images, repel least: of the least

  .. math::
    \sum_p \|x - p\|^{-3} + \sum_{R \in G, R \ne 1} \|x - R x\|^{-3}.

  Args:
    rng: Draws the choices; it is advanced.
    num_points: n >= 2.
    group: A name that :func:`point_group` takes.
    num_draws: How many random unit vectors compete for each orbit, at least 1.

  Returns:
    (n, 3), float64, unit rows.

  Raises:
    ValueError: If there is no group of that name, it cannot place n points, or
      `num_draws` is less than 1.

  Examples:
    >>> points = symmetric_seed(np.random.default_rng(0), 72, 'I')
    >>> image = points @ point_group('I')[7].T
    >>> bool(np.allclose(np.max(image @ points.T, axis=1), 1.0))
    True
  """
  if num_draws < 1:
    raise ValueError(f'num_draws must be at least 1, got {num_draws}.')
  choices = _choices(group, num_points)
  if not choices:
    raise ValueError(
      f'num_points must be at least 2 and fit orbits of {group}, '
      f'got {num_points}.'
    )
  elements, orbits = point_group(group), special_orbits(group)
  chosen = choices[rng.integers(len(choices))]
  points = np.concatenate([np.empty((0, 3)), *(orbits[i] for i in chosen)])
  while len(points) < num_points:
    draws = rng.normal(size=(num_draws, 3))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    images = np.einsum('gij,dj->dgi', elements, draws)
    others = np.broadcast_to(points, (num_draws, *points.shape))
    others = np.concatenate([images[:, 1:], others], axis=1)
    distance = np.linalg.norm(draws[:, None] - others, axis=2)
    repulsion = np.sum(distance**-3.0, axis=1)
    points = np.concatenate([points, images[np.argmin(repulsion)]])
  # Long products of matrices leave a rounding or two on the norms.
  return points / np.linalg.norm(points, axis=1, keepdims=True)


def icosadeltahedral(h: int, k: int) -> np.ndarray:
  r"""The triangular net (h, k) on the icosahedron, projected on the sphere.

  Each face is the triangle of a hexagonal lattice whose side is h steps along
  one direction and k along the next, a sixth of a turn from it; the lattice
  points of all faces make

  .. math::
    n = 10 T + 2, \qquad T = h^2 + hk + k^2.

  Twelve have five neighbours, all others six. An optimiser makes a local
  minimum of it; see :func:`emc2.sphere.minima.icosadeltahedral_minima`.

  Args:
    h: At least 0.
    k: At least 0, and not 0 if h is. Nets (h, k) and (k, h) are mirror images.

  Returns:
    (n, 3), float64, unit rows.

  Raises:
    ValueError: If h or k is negative, or both are 0.

  Examples:
    >>> icosadeltahedral(2, 1).shape
    (72, 3)

  References:
    Caspar and Klug, `Physical principles in the construction of regular viruses
    <https://doi.org/10.1101/sqb.1962.027.001.005>`_, 1962.
  """
  if h < 0 or k < 0 or h + k == 0:
    raise ValueError(f'h and k must be at least 0, not both 0, got {h}, {k}.')
  size = h * h + h * k + k * k
  # With w a sixth of a turn, the side is the number h + k w, and a + b w has
  # along it and along the next side these coordinates, times T.
  weights = []
  for a, b in itertools.product(range(-k, h + 1), range(h + k + 1)):
    along, across = a * (h + k) + b * k, b * h - a * k
    if along >= 0 and across >= 0 and along + across <= size:
      weights.append((size - along - across, along, across))
  corners = configurations.icosahedron()
  points = {}
  for face in _faces(corners):
    for weight in weights:
      # A point on an edge belongs to two faces, and a corner to five.
      shares = zip(face, weight, strict=True)
      key = frozenset((corner, share) for corner, share in shares if share)
      points[key] = np.array(weight) @ corners[face]
  stacked = np.stack(list(points.values()))
  return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def _faces(corners):
  """Index triples of the icosahedron's faces, all turning one way."""
  near = corners @ corners.T > 0.4
  faces = []
  for a, b, c in itertools.combinations(range(len(corners)), 3):
    if near[a, b] and near[b, c] and near[a, c]:
      turns_left = np.linalg.det(corners[[a, b, c]]) > 0
      faces.append([a, b, c] if turns_left else [a, c, b])
  return faces


def _key(array):
  """What is the same for what differs by rounding only."""
  # Adding 0 makes a negative zero positive.
  return tuple((np.round(array, 6) + 0.0).flat)


def _axis(rotation):
  """A unit vector that a rotation, not the identity, leaves in place."""
  # Of the eigenvalue 1, which no other eigenvalue comes near.
  values, vectors = np.linalg.eig(rotation)
  axis = vectors[:, np.argmin(np.abs(values - 1))].real
  return axis / np.linalg.norm(axis)


def _choices(group, num_points):
  """The sets of special orbits that whole generic orbits fill up to n."""
  if num_points < 2:
    return []
  order = len(point_group(group))
  sizes = [len(orbit) for orbit in special_orbits(group)]
  subsets = itertools.chain.from_iterable(
    itertools.combinations(range(len(sizes)), count)
    for count in range(len(sizes) + 1)
  )
  missing = {
    chosen: num_points - sum(sizes[i] for i in chosen) for chosen in subsets
  }
  return [c for c, rest in missing.items() if rest >= 0 and rest % order == 0]
