r"""Energies that a formula gives, and what large numbers of points tend to.

Everything here is a Python float, computed on the host in double precision.
The energy of n points counts each pair once,

.. math::
  E_s = \sum_{i<j} \|x_i - x_j\|^{-s}, \qquad
  E_0 = -\sum_{i<j} \log \|x_i - x_j\|.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_ROOT5 = math.sqrt(5.0)


class Code(NamedTuple):
  """A configuration by the inner products of its points."""

  dim: int  # k: it lies on the unit sphere of R^k.
  num_points: int
  products: Mapping[float, float | int]
  """Each inner product t < 1 to m_t, the mean number of points at t of one."""
  is_optimal: bool
  """Whether it is proved to minimise the energy for every exponent s >= 0."""


CODES: Mapping[str, Code] = {
  'bipyramid': Code(3, 5, {-1.0: 0.4, -0.5: 1.2, 0.0: 2.4}, False),
  'cube': Code(3, 8, {-1.0: 1, -1 / 3: 3, 1 / 3: 3}, False),
  'icosahedron': Code(3, 12, {-1.0: 1, -1 / _ROOT5: 5, 1 / _ROOT5: 5}, True),
  'dodecahedron': Code(
    3, 20, {-1.0: 1, -_ROOT5 / 3: 3, -1 / 3: 6, 1 / 3: 6, _ROOT5 / 3: 3}, False
  ),
  '24-cell': Code(4, 24, {-1.0: 1, -0.5: 8, 0.0: 6, 0.5: 8}, False),
  '600-cell': Code(
    4,
    120,
    {
      -1.0: 1,
      -(1 + _ROOT5) / 4: 12,
      -0.5: 20,
      -(_ROOT5 - 1) / 4: 12,
      0.0: 30,
      (_ROOT5 - 1) / 4: 12,
      0.5: 20,
      (1 + _ROOT5) / 4: 12,
    },
    True,
  ),
  'clebsch_16': Code(5, 16, {-3 / 5: 5, 1 / 5: 10}, True),
  'schlafli_27': Code(6, 27, {-1 / 2: 10, 1 / 4: 16}, True),
  'gosset_56': Code(7, 56, {-1.0: 1, -1 / 3: 27, 1 / 3: 27}, True),
  'e8_240': Code(8, 240, {-1.0: 1, -0.5: 56, 0.0: 126, 0.5: 56}, True),
  'isotropic_112': Code(21, 112, {-1 / 3: 30, 1 / 9: 81}, True),
  'mclaughlin_162': Code(21, 162, {-2 / 7: 56, 1 / 7: 105}, True),
  'higman_sims_100': Code(22, 100, {-4 / 11: 22, 1 / 11: 77}, True),
  'mclaughlin_275': Code(22, 275, {-1 / 4: 112, 1 / 6: 162}, True),
  'isotropic_891': Code(22, 891, {-1 / 2: 42, -1 / 8: 512, 1 / 4: 336}, True),
  'equiangular_552': Code(23, 552, {-1.0: 1, -1 / 5: 275, 1 / 5: 275}, True),
  'leech_4600': Code(
    23, 4600, {-1.0: 1, -1 / 3: 891, 0.0: 2816, 1 / 3: 891}, True
  ),
  'leech_196560': Code(
    24,
    196560,
    {-1.0: 1, -0.5: 4600, -0.25: 47104, 0.0: 93150, 0.25: 47104, 0.5: 4600},
    True,
  ),
}
"""The codes that :func:`emc2.sphere.configurations.make` makes, by name."""


def code(name: str, exponent: float) -> float:
  """The energy of a code of `CODES`; see :func:`energy_from_products`.

  Args:
    name: One of `CODES`.
    exponent: s >= 0, of any size; 0 gives the logarithmic energy.

  Returns:
    The energy.

  Raises:
    ValueError: If there is no code of that name, or s is negative.

  Examples:
    >>> round(code('icosahedron', 1.0), 9), round(code('600-cell', 2.0), 9)
    (49.165253058, 5395.0)
  """
  if name not in CODES:
    raise ValueError(f'name must be one of {sorted(CODES)}, got {name!r}.')
  _, num_points, products, _ = CODES[name]
  return energy_from_products(num_points, products, exponent)


def energy_from_products(
  num_points: int, products: Mapping[float, float | int], exponent: float
) -> float:
  r"""The energy of points of whose inner products the distribution is known.

  .. math::
    E_s = \frac n2 \sum_t m_t (2 - 2t)^{-s/2}, \qquad
    E_0 = -\frac n4 \sum_t m_t \log(2 - 2t).

  Args:
    num_points: n >= 2.
    products: Each inner product t in [-1, 1) to :math:`m_t`, the number of
      points at t of a point, or its mean where it is not the same for all.
      These sum to n - 1.
    exponent: s >= 0; 0 gives the logarithmic energy.

  Returns:
    The energy.

  Raises:
    ValueError: If n < 2, an inner product lies outside [-1, 1), their numbers
      do not sum to n - 1, or s is negative.

  Examples:
    >>> energy_from_products(6, {0.0: 4, -1.0: 1}, 2.0)  # The octahedron.
    6.75

  References:
    Cohn and Kumar, `Universally optimal distribution of points on spheres
    <https://arxiv.org/abs/math/0607446>`_, 2007, table 1, holds the
    distributions of `CODES`.
  """
  _check_num_points(num_points)
  _check_exponent(exponent)
  if not all(-1 <= t < 1 for t in products):
    raise ValueError(f'products must lie in [-1, 1), got {sorted(products)}.')
  total = math.fsum(products.values())
  if not math.isclose(total, num_points - 1):
    raise ValueError(
      f'products must sum to num_points - 1 = {num_points - 1}, got {total}.'
    )
  terms = [m * _potential(2 - 2 * t, exponent) for t, m in products.items()]
  return num_points / 2 * math.fsum(terms)


def polygon(num_points: int, exponent: float) -> float:
  r"""The energy of the regular polygon, the least on the circle.

  .. math::
    E_s = \frac n2 \sum_{j=1}^{n-1} \Big(2 \sin\frac{\pi j}n\Big)^{-s}, \qquad
    E_0 = -\frac n2 \log n, \qquad E_2 = \frac{n (n^2 - 1)}{24}.

  Args:
    num_points: n >= 2.
    exponent: s >= 0; 0 gives the logarithmic energy.

  Returns:
    The energy.

  Raises:
    ValueError: If n < 2 or s is negative.

  Examples:
    >>> round(polygon(5, 1.0), 12), round(polygon(5, 2.0), 12)
    (6.881909602356, 5.0)
  """
  _check_num_points(num_points)
  _check_exponent(exponent)
  chords = (
    2 * math.sin(math.pi * j / num_points) for j in range(1, num_points)
  )
  return num_points / 2 * math.fsum(_potential(r * r, exponent) for r in chords)


def simplex(num_points: int, exponent: float) -> float:
  r"""The energy of the regular simplex, the least where n <= k + 1.

  .. math::
    E_s = \binom n2 \Big(\frac{2n}{n - 1}\Big)^{-s/2}

  Args:
    num_points: n >= 2; the simplex spans n - 1 dimensions.
    exponent: s >= 0; 0 gives the logarithmic energy.

  Returns:
    The energy.

  Raises:
    ValueError: If n < 2 or s is negative.

  Examples:
    >>> round(simplex(4, 1.0), 12)
    3.674234614175
  """
  _check_num_points(num_points)
  _check_exponent(exponent)
  squared = 2 * num_points / (num_points - 1)
  return math.comb(num_points, 2) * _potential(squared, exponent)


def cross_polytope(dim: int, exponent: float) -> float:
  r"""The energy of the cross-polytope, the least where n = 2k.

  .. math::
    E_s = 2k(k - 1) 2^{-s/2} + k 2^{-s}

  Args:
    dim: k >= 2.
    exponent: s >= 0; 0 gives the logarithmic energy.

  Returns:
    The energy.

  Raises:
    ValueError: If k < 2 or s is negative.

  Examples:
    >>> round(cross_polytope(3, 1.0), 12)
    9.985281374239
  """
  _check_dim(dim)
  _check_exponent(exponent)
  right = 2 * dim * (dim - 1) * _potential(2.0, exponent)
  return right + dim * _potential(4.0, exponent)


def uniform_mean(num_points: int, dim: int, exponent: float) -> float:
  r"""The mean energy of independent uniform points of the sphere.

  .. math::
    \mathbb E E_s = \binom n2 \frac{2^{k-2-s} \Gamma(\frac k2)
      \Gamma(\frac{k-1-s}2)}{\sqrt\pi \, \Gamma(k - 1 - \frac s2)}, \qquad
    \mathbb E E_0 = \binom n2 \Big(\frac{\psi(k-1) - \psi(\frac{k-1}2)}2
      - \log 2\Big).

  Args:
    num_points: n >= 2.
    dim: k >= 2.
    exponent: s in [0, k - 1); 0 gives the logarithmic energy.

  Returns:
    The mean.

  Raises:
    ValueError: If n < 2, k < 2 or s is outside [0, k - 1): the mean of a pair
      diverges from s = k - 1 on.

  Examples:
    >>> round(uniform_mean(10, 3, 1.0), 12)
    45.0
  """
  _check_num_points(num_points)
  _check_dim(dim)
  _check_exponent(exponent)
  if exponent >= dim - 1:
    raise ValueError(
      f'exponent must be less than dim - 1 = {dim - 1}, or the mean diverges, '
      f'got {exponent}.'
    )
  pairs = math.comb(num_points, 2)
  if exponent == 0:
    difference = _digamma_difference(dim - 1)
    return pairs * (difference / 2 - math.log(2.0))
  log_mean = (
    (dim - 2 - exponent) * math.log(2.0)
    + math.lgamma(dim / 2)
    + math.lgamma((dim - 1 - exponent) / 2)
    - math.lgamma(0.5)
    - math.lgamma(dim - 1 - exponent / 2)
  )
  return pairs * math.exp(log_mean)


def asymptotic(num_points: int, exponent: float) -> float:
  r"""The least energy on the sphere of R^3 to two terms, as it is conjectured.

  With the zeta function of the hexagonal lattice,
  :math:`\zeta_\Lambda(s) = 6 \cdot 3^{-s/2} \zeta(\tfrac s2)
  [\zeta(\tfrac s2, \tfrac13) - \zeta(\tfrac s2, \tfrac23)]`,

  .. math::
    E_s &\approx \frac{2^{-s}}{2 - s} n^2 + \frac12
      \Big(\frac{\sqrt3}{8\pi}\Big)^{s/2} \zeta_\Lambda(s) n^{1+s/2},
      \qquad s \ne 0, 2, \\
    E_2 &\approx \frac{n^2}8 \log n + \frac{n^2}2 \Big(
      \tfrac14[\gamma - \log(2\sqrt3\pi)] + \tfrac{\sqrt3}{4\pi}
      [\gamma_1(\tfrac23) - \gamma_1(\tfrac13)]\Big), \\
    E_0 &\approx \tfrac12 (\tfrac12 - \log 2) n^2 - \tfrac14 n \log n
      + \frac n2 \Big(2 \log 2 + \tfrac12 \log\tfrac23
      + 3 \log\frac{\sqrt\pi}{\Gamma(1/3)}\Big).

  The energy of the best known points lies above it for s = 1, by a part in
  :math:`10^3` at n = 50 and 77 in :math:`10^6` at 470.

  Args:
    num_points: n >= 2.
    exponent: s in [0, 4); 0 gives the logarithmic energy.

  Returns:
    The sum of the terms.

  Raises:
    ValueError: If n < 2 or s is outside [0, 4).

  Examples:
    >>> round(asymptotic(100, 1.0), 3)
    4446.949
    >>> round(asymptotic(100, 2.0), 2)
    5327.62

  References:
    Brauchart, Hardin and Saff, `The next-order term for optimal Riesz and
    logarithmic energy asymptotics on the sphere
    <https://arxiv.org/abs/1202.4037>`_, 2012: the conjectures for
    the sphere of R^3.
  """
  _check_num_points(num_points)
  _check_exponent(exponent)
  if exponent >= 4:
    raise ValueError(f'exponent must be less than 4, got {exponent}.')
  n = float(num_points)
  if exponent == 0:
    constant = 2 * math.log(2.0) + math.log(2 / 3) / 2
    constant += 3 * (math.log(math.pi) / 2 - math.lgamma(1 / 3))
    leading = (0.5 - math.log(2.0)) * n * n - n * math.log(n) / 2
    return (leading + constant * n) / 2
  if exponent == 2:
    return n * n * (math.log(n) / 8 + _inverse_square_constant() / 2)
  lattice = (math.sqrt(3.0) / (8 * math.pi)) ** (exponent / 2)
  lattice *= _hexagonal_zeta(exponent)
  mean = 2.0**-exponent / (2 - exponent)
  return mean * n * n + lattice / 2 * n ** (1 + exponent / 2)


def coulomb_fit(num_points: int) -> float:
  r"""A fit of the best known Coulomb energies on the sphere of R^3.

  .. math::
    E_1 \approx \frac{n^2}2 - 0.5523865 \, n^{3/2} + 0.0809 \, n^{1/2}

  It says at a glance whether a claimed energy can be: for n from 20 to 470 no
  best known one is further from it than 0.41.

  Args:
    num_points: n >= 2.

  Returns:
    The fitted energy.

  Raises:
    ValueError: If n < 2.

  Examples:
    >>> round(coulomb_fit(100), 2)  # The best known is 4448.35.
    4448.42
  """
  _check_num_points(num_points)
  root = math.sqrt(num_points)
  return num_points**2 / 2 - 0.5523865 * root**3 + 0.0809 * root


def _potential(squared: float, exponent: float) -> float:
  """Of two points, by the square of their distance."""
  if exponent == 0:
    return -math.log(squared) / 2
  return squared ** (-exponent / 2)


def _digamma_difference(m: int) -> float:
  """psi(m) - psi(m / 2) of an integer m >= 1, by psi(x + 1) = psi(x) + 1/x."""
  whole = math.fsum(1 / j for j in range(1, m))  # psi(m) - psi(1)
  if m % 2:
    # psi(1/2) = psi(1) - 2 log 2.
    half = math.fsum(2 / j for j in range(1, m, 2)) - 2 * math.log(2.0)
  else:
    half = math.fsum(1 / j for j in range(1, m // 2))
  return whole - half


# The sums below start where the corrections of Euler and Maclaurin, with these
# Bernoulli numbers B_2, B_4, ..., fall below the rounding of a double.
_START = 16
_BERNOULLI = (
  1 / 6,
  -1 / 30,
  1 / 42,
  -1 / 30,
  5 / 66,
  -691 / 2730,
  7 / 6,
)


def _hurwitz_zeta(s: float, a: float) -> float:
  """zeta(s, a) for s != 1, where its series diverges too (s <= 1)."""
  x = a + _START
  total = np.sum((a + np.arange(_START)) ** -s)
  total += x ** (1 - s) / (s - 1) + x**-s / 2
  rising = s  # s (s + 1) ... (s + 2j - 2)
  for j, bernoulli in enumerate(_BERNOULLI, start=1):
    total += bernoulli / math.factorial(2 * j) * rising * x ** (1 - s - 2 * j)
    rising *= (s + 2 * j - 1) * (s + 2 * j)
  return float(total)


def _stieltjes(a: float) -> float:
  """The first Stieltjes constant gamma_1(a)."""
  x = a + _START
  ahead = a + np.arange(_START)
  total = np.sum(np.log(ahead) / ahead)
  total += math.log(x) / (2 * x) - math.log(x) ** 2 / 2
  for j, bernoulli in enumerate(_BERNOULLI, start=1):
    # The derivative of order m of log(x) / x, which m odd makes positive here.
    m = 2 * j - 1
    harmonic = math.fsum(1 / i for i in range(1, m + 1))
    falling = math.factorial(m) * (math.log(x) - harmonic) / x ** (m + 1)
    total += bernoulli / math.factorial(2 * j) * falling
  return float(total)


def _hexagonal_zeta(s: float) -> float:
  """The zeta function of the hexagonal lattice of spacing 1, s != 2."""
  third = _hurwitz_zeta(s / 2, 1 / 3) - _hurwitz_zeta(s / 2, 2 / 3)
  return 6 * 3 ** (-s / 2) * _hurwitz_zeta(s / 2, 1.0) * third


def _inverse_square_constant() -> float:
  """Of n^2 in twice the energy of s = 2."""
  logarithm = np.euler_gamma - math.log(2 * math.sqrt(3.0) * math.pi)
  stieltjes = _stieltjes(2 / 3) - _stieltjes(1 / 3)
  return logarithm / 4 + math.sqrt(3.0) / (4 * math.pi) * stieltjes


def _check_num_points(num_points: int) -> None:
  if num_points < 2:
    raise ValueError(f'num_points must be at least 2, got {num_points}.')


def _check_dim(dim: int) -> None:
  if dim < 2:
    raise ValueError(f'dim must be at least 2, got {dim}.')


def _check_exponent(exponent: float) -> None:
  if not 0 <= exponent < math.inf:
    raise ValueError(f'exponent must be at least 0 and finite, got {exponent}.')
