"""How logistic regression is fitted today: the solvers of SciPy.

Served by `worker.py`; needs NumPy and SciPy. A problem comes as a file of
`numpy.savez` with `indptr`, `indices`, `data` and `shape` of its features and
`labels` in {0, 1}. The objective is the mean logistic loss plus `ridge / 2`
times the sum of squares, in float64, from weights of 0.5.
"""

import contextlib
import time

import numpy as np

PACKAGES = ('numpy', 'scipy')

METHODS = {
  'L-BFGS-B': dict(maxcor=20, ftol=0, gtol=0, maxfun=10**6, maxls=50),
  'trust-ncg': dict(gtol=0),
  'trust-krylov': dict(gtol=0),
  'Newton-CG': dict(xtol=0),
}


def read(path):
  """Features, compressed by rows, and labels."""
  import scipy.sparse

  with np.load(path) as found:
    places = (found[name].astype(np.int32) for name in ('indices', 'indptr'))
    parts = found['data'].astype(np.float64), *places
    features = scipy.sparse.csr_array(parts, shape=tuple(found['shape']))
    return features, found['labels'].astype(np.float64)


class Objective:
  """Value, gradient and Hessian products; keeps what they share."""

  def __init__(self, features, labels, ridge):
    self.features, self.labels, self.ridge = features, labels, ridge
    self.transposed = features.T.tocsr()  # Faster than `features.T @`.
    self.point = None
    self.num_gradients = self.num_products = 0

  def _move(self, point):
    if self.point is None or not np.array_equal(point, self.point):
      self.point = np.array(point)
      scores = self.features @ point
      small = np.exp(-np.abs(scores))
      losses = np.maximum(scores, 0) + np.log1p(small)
      self.value = np.mean(losses - self.labels * scores)
      self.value += self.ridge / 2 * point @ point
      self.chances = np.where(scores >= 0, 1, small) / (1 + small)
      self.curvature = None

  def gradient(self, point):
    """(d,)."""
    self._move(point)
    self.num_gradients += 1
    errors = (self.chances - self.labels) / len(self.labels)
    return self.transposed @ errors + self.ridge * self.point

  def value_and_gradient(self, point):
    """(), (d,)."""
    gradient = self.gradient(point)
    return self.value, gradient

  def product(self, point, vector):
    """The Hessian at a point, times a vector."""
    self._move(point)
    self.num_products += 1
    if self.curvature is None:
      self.curvature = self.chances * (1 - self.chances) / len(self.labels)
    scores = self.features @ vector
    return self.transposed @ (self.curvature * scores) + self.ridge * vector


class _Stop(Exception):
  """The gradient is small enough, or time is up."""


def solve(*, path, ridge, method, tolerances, seconds):
  """What it took until the norm of a gradient was at most each tolerance.

  Args:
    path: Of the problem.
    ridge: mu.
    method: Of `METHODS`.
    tolerances: Falling.
    seconds: After which it is cut off.

  Returns:
    For each tolerance `cpu` and `wall` seconds, `gradients` and `products`, or
    None where it was not reached; and the least `norm` seen.
  """
  from scipy import optimize

  objective = Objective(*read(path), ridge)
  start = np.full(objective.features.shape[1], 0.5)
  objective.product(start, start)  # What a first call loads is not its speed.
  objective.point, objective.num_products = None, 0
  reached, least = [], np.inf
  wall, cpu = time.perf_counter(), time.process_time()

  def watch(gradient):
    nonlocal least
    norm = float(np.linalg.norm(gradient))
    least = min(least, norm)
    took = time.perf_counter() - wall
    while len(reached) < len(tolerances) and norm <= tolerances[len(reached)]:
      reached.append(
        dict(
          cpu=time.process_time() - cpu,
          wall=took,
          gradients=objective.num_gradients,
          products=objective.num_products,
        )
      )
    if len(reached) == len(tolerances) or took > seconds:
      raise _Stop
    return gradient

  def value_and_gradient(point):
    value, gradient = objective.value_and_gradient(point)
    return value, watch(gradient)

  def product(point, vector):
    if time.perf_counter() - wall > seconds:  # Some inner solves never end.
      raise _Stop
    return objective.product(point, vector)

  hessian = {} if method == 'L-BFGS-B' else dict(hessp=product)
  options = METHODS[method] | dict(maxiter=10**6)
  with contextlib.suppress(_Stop):
    optimize.minimize(
      value_and_gradient,
      start,
      jac=True,
      method=method,
      options=options,
      **hessian,
    )
  reached += [None] * (len(tolerances) - len(reached))
  return dict(reached=reached, norm=least)


def gradient_norm(path, ridge, point):
  """At a point, in float64: the judge of all."""
  objective = Objective(*read(path), ridge)
  return float(np.linalg.norm(objective.gradient(np.asarray(point))))


def time_product(*, path):
  """One Hessian product."""
  objective = Objective(*read(path), 0.0)
  rng = np.random.default_rng(0)
  point, vector = rng.normal(size=(2, objective.features.shape[1]))
  objective.product(point, vector)
  return lambda: objective.product(point, vector)


CASES = {'product': time_product}
VALUES = {'solve': solve}
