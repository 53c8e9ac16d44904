"""How logistic regression is fitted today: the solvers of SciPy.

Served by `worker.py`, in our Python, which has SciPy too. A problem comes as a
file of `numpy.savez` with `indptr`, `indices`, `data` and `shape` of its
features and `labels` in {0, 1}. The objective is the mean logistic loss plus
`ridge / 2` times the sum of squares, in float64, from weights of 0.5.
"""

import contextlib
import time

import numpy as np

from emc2.experiments import krylov_newton_peers

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


def read_objective(path, ridge):
  """What all minimise."""
  return krylov_newton_peers.Logistic(*read(path), ridge)


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

  objective = read_objective(path, ridge)
  start = np.full(objective.size, 0.5)
  # What a first call loads is not its speed.
  objective.hvp(np.zeros_like(start), start)
  reached, least = [], np.inf
  num_gradients = num_products = 0
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
          gradients=num_gradients,
          products=num_products,
        )
      )
    if len(reached) == len(tolerances) or took > seconds:
      raise _Stop
    return gradient

  def value_and_gradient(point):
    nonlocal num_gradients
    num_gradients += 1
    value, gradient = objective.value_and_gradient(point)
    return value, watch(gradient)

  def hvp(point, vector):
    nonlocal num_products
    num_products += 1
    if time.perf_counter() - wall > seconds:  # Some inner solves never end.
      raise _Stop
    return objective.hvp(point, vector)

  hessian = {} if method == 'L-BFGS-B' else dict(hessp=hvp)
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
  _, gradient = read_objective(path, ridge).value_and_gradient(point)
  return float(np.linalg.norm(gradient))


def time_product(*, path):
  """One Hessian product."""
  objective = read_objective(path, 0.0)
  rng = np.random.default_rng(0)
  point, vector = rng.normal(size=(2, objective.size))
  objective.hvp(point, vector)
  return lambda: objective.hvp(point, vector)


VALUES = {'solve': solve}
