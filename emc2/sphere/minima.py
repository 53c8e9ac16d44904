"""The least energies that are known, and how sure each of them is.

`minima.csv` holds them for chosen numbers of points, dimensions and exponents,
and `icosadeltahedral.csv` the local minima of the icosadeltahedral nets.
"""

import csv
import functools
import importlib.resources
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from emc2.sphere import closed_forms

SOURCES: Mapping[str, str] = {
  'exact': 'Proved to be least, and given by a closed form.',
  'table+computed': 'Published, and computed anew to the same 2e-8.',
  'table_recalled+computed': (
    'Computed; agrees with the published value, which was recalled and not '
    'looked up, to 1e-9, for 468 points to 1.3e-7.'
  ),
  'computed': 'The best of one search; no published value was compared.',
  'computed_2seeds': 'Two independent searches agree to 1e-6.',
  'computed_upper_bound': 'The best of searches that disagree.',
}
"""What the source of a minimum says of it."""

TARGETS = ('exact', 'table+computed', 'table_recalled+computed')
"""The sources of energies that a search should reach, and will not beat."""


class Minimum(NamedTuple):
  """The least energy that is known of so many points."""

  energy: float  # Each pair once; the table gives 9 or 10 decimals.
  configuration: str
  """'polygon', 'simplex', 'cross-polytope', a name that
  :func:`emc2.sphere.configurations.make` takes, a point group after
  Schoenflies, or '' where none is known."""
  source: str  # One of `SOURCES`.

  @property
  def is_bound(self) -> bool:
    """Whether it is an upper bound only, which a better search may beat."""
    return self.source not in TARGETS


class NetMinimum(NamedTuple):
  """The local minimum that an icosadeltahedral net falls into."""

  num_points: int  # 10 (h^2 + h k + k^2) + 2.
  energy: float  # Of the exponent 1, to 9 decimals.
  point_group: str  # 'Ih', or 'I' where the net is chiral.


def best_known(
  num_points: int, dim: int = 3, exponent: float = 1.0
) -> Minimum | None:
  """The least energy known of n points on the sphere of R^k.

  Polygons (k = 2), simplices (n <= k + 1), cross-polytopes (n = 2k) and the
  sharp codes of :data:`emc2.sphere.closed_forms.CODES` are optimal for every
  exponent, and five points in R^3 are a bipyramid up to the exponent 15: there
  a closed form gives the energy to full precision. All else is looked up.

  Args:
    num_points: n >= 2.
    dim: k >= 2.
    exponent: s >= 0; 0 gives the logarithmic energy.

  Returns:
    The minimum, or None if there is neither a closed form nor a row.

  Raises:
    ValueError: If n < 2, k < 2, or s is negative or not finite.

  Examples:
    >>> best_known(7)
    Minimum(energy=14.452977414, configuration='D5h', source='table+computed')
    >>> best_known(972).is_bound
    True
    >>> best_known(27, dim=6, exponent=2.0).configuration
    'schlafli_27'

  References:
    Cohn and Kumar, `Universally optimal distribution of points on spheres
    <https://arxiv.org/abs/math/0607446>`_, 2007; Schwartz, `The Phase
    Transition in 5 Point Energy Minimization
    <https://arxiv.org/abs/1610.03303>`_, 2016; Wales, McKay and Altschuler,
    `Defect motifs for spherical topologies
    <https://doi.org/10.1103/PhysRevB.79.224115>`_, 2009, for the published
    Coulomb energies on the sphere of R^3.
  """
  if dim < 2:
    raise ValueError(f'dim must be at least 2, got {dim}.')
  if num_points < 2:
    raise ValueError(f'num_points must be at least 2, got {num_points}.')
  if not 0 <= exponent < math.inf:
    raise ValueError(f'exponent must be at least 0 and finite, got {exponent}.')
  exact = _closed_form(num_points, dim, exponent)
  return exact or _table().get((dim, float(exponent)), {}).get(num_points)


def tabulated(dim: int = 3, exponent: float = 1.0) -> dict[int, Minimum]:
  """The rows of the table of one dimension and exponent.

  Args:
    dim: k >= 2.
    exponent: s >= 0; 0 gives the logarithmic energy.

  Returns:
    Each n to its minimum, n ascending; empty if the table has none.

  Examples:
    >>> list(tabulated(dim=3, exponent=0.0))
    [12, 50, 100]
  """
  return dict(_table().get((dim, float(exponent)), {}))


@functools.cache
def icosadeltahedral_minima() -> Mapping[tuple[int, int], NetMinimum]:
  """Local minima of the Coulomb energy that the icosadeltahedral nets reach.

  Each is stable, and the target of a descent from
  :func:`emc2.sphere.symmetry.icosadeltahedral`. Eleven of them, from 12 points
  to 392, are the best known; most others are not.

  Returns:
    (h, k), h >= k, to the minimum, for all nets of up to 972 points.

  Examples:
    >>> icosadeltahedral_minima()[2, 1]
    NetMinimum(num_points=72, energy=2255.001190975, point_group='I')
  """
  return {
    (int(row['h']), int(row['k'])): NetMinimum(
      int(row['num_points']), float(row['energy']), row['point_group']
    )
    for row in _rows('icosadeltahedral.csv')
  }


def _closed_form(num_points, dim, exponent):
  """The minimum where it is proved, or None."""
  exact = lambda energy, name: Minimum(energy, name, 'exact')
  if dim == 2:
    return exact(closed_forms.polygon(num_points, exponent), 'polygon')
  if num_points <= dim + 1:
    return exact(closed_forms.simplex(num_points, exponent), 'simplex')
  if num_points == 2 * dim:
    return exact(closed_forms.cross_polytope(dim, exponent), 'cross-polytope')
  for name, code in closed_forms.CODES.items():
    # From s = 15.048... on a pyramid beats the bipyramid.
    is_least = code.is_optimal or (name == 'bipyramid' and exponent <= 15)
    if is_least and (code.dim, code.num_points) == (dim, num_points):
      return exact(closed_forms.code(name, exponent), name)
  return None


@functools.cache
def _table() -> Mapping[tuple[int, float], Mapping[int, Minimum]]:
  """(k, s) to n to the minimum."""
  table = {}
  for row in _rows('minima.csv'):
    of = table.setdefault((int(row['dim']), float(row['exponent'])), {})
    of[int(row['num_points'])] = Minimum(
      float(row['energy']), row['configuration'], row['source']
    )
  return table


def _rows(name: str) -> Iterator[dict[str, str]]:
  """Reads a file that lies beside this one."""
  path = importlib.resources.files('emc2.sphere') / name
  with path.open(encoding='utf-8', newline='') as file:
    yield from csv.DictReader(file)
