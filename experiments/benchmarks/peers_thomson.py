"""What the Thomson problem runs on today: NumPy, and SciPy's L-BFGS-B.

Served by `worker.py`; needs NumPy and SciPy, which this project's own Python
has. :class:`InPlace` is the fastest form that we found in NumPy: the squared
distances are one matrix product, whose extra column brings the constant; four
passes over the pairs follow, in place; the force is a matrix product again,
whose extra column brings the sum of the weights. :class:`Plain` is the same
without its care for memory, as one writes it first.
"""

import numpy as np

PACKAGES = ('numpy', 'scipy')
_WHOLE = 512  # Up to here the pairs of all points stay in the cache.
_BLOCK = 32


def draw(num_points, count, seed=0):
  """Uniform starts (count, n, 3) in float64, the same for all who ask."""
  rows = np.random.default_rng(seed).normal(size=(count, num_points, 3))
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class InPlace:
  """Coulomb's energy and its gradient, into arrays made once."""

  def __init__(self, num_points):
    n = num_points
    block = n if n <= _WHOLE else _BLOCK
    self._left = np.full((n, 4), 2.0)
    self._right = np.ones((n, 4))
    self._sums = np.empty((n, 4))
    self._potential = np.empty(n)
    self._scratch = np.empty((2, block, n))
    self._blocks = [
      (slice(i, min(i + block, n)), i) for i in range(0, n, block)
    ]

  def __call__(self, points):
    """Gives the energy, the potentials (n,) and the gradient (n, 3)."""
    n = len(points)
    np.multiply(points, -2, out=self._left[:, :3])
    self._right[:, :3] = points
    for rows, first in self._blocks:
      a, b = self._scratch[:, : rows.stop - rows.start]
      np.matmul(self._left[rows], self._right.T, out=a)
      a.ravel()[first :: n + 1] = np.inf
      np.divide(1, a, out=a)
      np.sqrt(a, out=b)
      np.sum(b, axis=1, out=self._potential[rows])
      np.multiply(a, b, out=a)
      np.matmul(a, self._right, out=self._sums[rows])
    gradient = self._sums[:, :3] - self._sums[:, 3:] * points
    return self._potential.sum() / 2, self._potential, gradient


class Plain:
  """The same, each step a new array."""

  def __init__(self, num_points):
    del num_points

  def __call__(self, points):
    """Gives the energy, the potentials (n,) and the gradient (n, 3)."""
    squares = 2 - 2 * points @ points.T
    np.fill_diagonal(squares, np.inf)
    inverse = 1 / np.sqrt(squares)
    weights = inverse / squares
    potential = inverse.sum(axis=1)
    gradient = weights @ points - weights.sum(axis=1, keepdims=True) * points
    return potential.sum() / 2, potential, gradient


FORMS = {'in place': InPlace, 'plain': Plain}


def minimize(start, energy_fn, *, tolerance, memory=10):
  """SciPy's L-BFGS-B on `F(Y) = E(Y / |Y|)`.

  It ends when the norm of the tangent gradient is at most the tolerance, or
  when its line search finds no lower energy.

  Returns:
    The energy, that norm, and the number of evaluations.
  """
  from scipy import optimize

  last = {}

  def value_and_gradient(flat):
    rows = flat.reshape(-1, 3)
    length = np.sqrt(np.einsum('ij,ij->i', rows, rows))[:, None]
    points = rows / length
    value, potential, gradient = energy_fn(points)
    # On the sphere <x, G> is half the potential, below zero.
    gradient += (potential / 2)[:, None] * points
    last['energy'] = value
    last['norm'] = np.sqrt(np.vdot(gradient, gradient))
    gradient /= length
    return value, gradient.ravel()

  def callback(flat):
    del flat
    if last['norm'] <= tolerance:
      raise StopIteration

  done = optimize.minimize(
    value_and_gradient,
    start.ravel(),
    jac=True,
    method='L-BFGS-B',
    callback=callback,
    options={
      'maxcor': memory,
      'ftol': 0,
      'gtol': 0,
      'maxiter': 20_000,
      'maxfun': 20_000,
    },
  )
  return last['energy'], last['norm'], done.nfev


def time_solve(*, num_points, count, tolerance, form='in place'):
  """Solves from some starts, one after another."""
  starts = draw(num_points, count)
  energy_fn = FORMS[form](num_points)

  def call():
    for start in starts:
      minimize(start, energy_fn, tolerance=tolerance)

  return call


def time_energy(*, num_points, count=1, form='in place'):
  """Energies and gradients of some sets of points, one after another."""
  sets = draw(num_points, count)
  energy_fn = FORMS[form](num_points)

  def call():
    for points in sets:
      energy_fn(points)

  return call


def solved(*, num_points, count, tolerance, form='in place'):
  """Energies, norms and evaluations, each a list over the starts."""
  energy_fn = FORMS[form](num_points)
  found = [
    minimize(start, energy_fn, tolerance=tolerance)
    for start in draw(num_points, count)
  ]
  return [[float(x) for x in column] for column in zip(*found, strict=True)]


CASES = {'solve': time_solve, 'energy': time_energy}
VALUES = {'solved': solved}
