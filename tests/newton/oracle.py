"""The methods in NumPy, from the papers, and the problems they are tested on.

Values are subtracted as the papers write them, and roots found by bisection.
"""

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
  """A run of K steps."""

  xs: np.ndarray  # (K + 1, d)
  values: np.ndarray  # (K + 1,)
  gradient_norms: np.ndarray  # (K,), of the point before a step.
  regularizations: np.ndarray  # (K,)
  decreases: np.ndarray  # (K,)
  trials: np.ndarray  # (K,), int.
  qualities: np.ndarray  # (K,); of Krylov spaces, else 0.


class Objective(NamedTuple):
  """A mean loss over rows, and a ridge."""

  features: np.ndarray  # (n, d)
  labels: np.ndarray  # (n,)
  loss: str = 'logistic'
  ridge: float = 0.0
  sample_weight: np.ndarray | None = None

  @property
  def weights(self):
    if self.sample_weight is None:
      return np.full(len(self.labels), 1 / len(self.labels))
    return self.sample_weight / self.sample_weight.sum()

  def value(self, x):
    z, y = self.features @ x, self.labels
    each = {
      'logistic': lambda: np.logaddexp(0, z) - y * z,
      'squared': lambda: 0.5 * (z - y) ** 2,
      'poisson': lambda: np.exp(z) - y * z,
    }[self.loss]()
    return self.weights @ each + 0.5 * self.ridge * (x @ x)

  def gradient(self, x):
    z = self.features @ x
    mean = {
      'logistic': lambda: 1 / (1 + np.exp(-z)),
      'squared': lambda: z,
      'poisson': lambda: np.exp(z),
    }[self.loss]()
    errors = self.weights * (mean - self.labels)
    return self.features.T @ errors + self.ridge * x

  def curvature(self, x):
    """(n,), of rows and with their weights."""
    z = self.features @ x
    each = {
      'logistic': lambda: 1 / (1 + np.exp(-z)) / (1 + np.exp(z)),
      'squared': lambda: np.ones_like(z),
      'poisson': lambda: np.exp(z),
    }[self.loss]()
    return self.weights * each

  def hessian(self, x):
    scaled = self.curvature(x)[:, None] * self.features
    return self.features.T @ scaled + self.ridge * np.eye(len(x))


def lanczos(matvec, start, num_steps):
  """Orthonormal columns V, and T = V'HV with all off-diagonals."""
  basis = [start / np.linalg.norm(start)]
  diagonal, off_diagonal, scale = [], [], 0.0
  while True:
    w = matvec(basis[-1])
    diagonal.append(basis[-1] @ w)
    before = off_diagonal[-1] if off_diagonal else 0.0
    scale = max(scale, abs(diagonal[-1]) + before)
    for _ in range(2):
      for v in basis:
        w = w - (v @ w) * v
    off_diagonal.append(np.linalg.norm(w))
    if off_diagonal[-1] <= 1e-6 * scale:
      off_diagonal[-1] = 0.0
      break
    if len(basis) == num_steps:
      break
    basis.append(w / off_diagonal[-1])
  inner = off_diagonal[: len(basis) - 1]
  matrix = np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1)
  return np.stack(basis, axis=1), matrix, np.array(off_diagonal)


def solve_cubic(matrix, gradient, regularization):
  """The minimum of g's + s'Hs / 2 + M |s|^3 / 6 for H that is semidefinite."""
  values, vectors = np.linalg.eigh(matrix)
  values, c = np.maximum(values, 0), vectors.T @ gradient
  low, high = 0.0, np.sqrt(regularization * np.linalg.norm(gradient) / 2)
  for _ in range(200):
    shift = (low + high) / 2
    if np.linalg.norm(c / (values + shift)) > 2 * shift / regularization:
      low = shift
    else:
      high = shift
  return -vectors @ (c / (values + high))


def model(matrix, gradient, regularization, step):
  """q(s)."""
  cubic = regularization / 6 * np.linalg.norm(step) ** 3
  return gradient @ step + 0.5 * step @ matrix @ step + cubic


def minimize(
  objective,
  x,
  num_steps,
  space,
  regularization=2e-3,
  shrink=0.5,
  max_trials=64,
  adaptive=True,
  target=-np.inf,
):
  """Steps in spaces until a value falls to `target`.

  Args:
    objective: What to minimise.
    x: (d,), where from.
    num_steps: At most.
    space: `(k, x, g)` to a basis V (d, m), V'HV and a quality.
    regularization: M of M / 6.
    shrink: What M is multiplied by before a step.
    max_trials: After so many the run ends.
    adaptive: Whether M changes.
    target: A value that is low enough.

  Returns:
    What happened.
  """
  xs, values, found = [x], [objective.value(x)], []
  for k in range(num_steps):
    if values[-1] <= target:
      break
    gradient = objective.gradient(x)
    basis, matrix, quality = space(k, x, gradient)
    small = basis.T @ gradient
    largest = max(np.linalg.eigvalsh(matrix).max(), 0)
    accepted = False
    for number in range(1, max_trials + 1):
      if adaptive and number == 1:
        regularization *= shrink
      elif adaptive:
        regularization /= shrink
      regularization = max(regularization, 1e-12 * (1 + largest))
      step = solve_cubic(matrix, small, regularization)
      decrease = -model(matrix, small, regularization, step)
      value = objective.value(x + basis @ step)
      noise = 4 * np.finfo(float).eps * abs(values[-1])
      if not adaptive or value <= values[-1] - decrease + noise:
        accepted = True
        break
    if not accepted:
      break
    x = x + basis @ step
    xs.append(x)
    values.append(value)
    size = np.linalg.norm(gradient)
    found.append((size, regularization, decrease, number, quality))
  columns = [np.array(column) for column in zip(*found, strict=True)]
  return Run(np.array(xs), np.array(values), *columns)


def krylov(objective, x, num_steps, subspace_dim, **settings):
  """Krylov cubic-regularised Newton."""

  def space(k, x, gradient):
    del k
    curvature = objective.curvature(x)
    matvec = lambda v: (
      objective.features.T @ (curvature * (objective.features @ v))
      + objective.ridge * v
    )
    basis, matrix, betas = lanczos(matvec, gradient, subspace_dim)
    quality = 2 / np.sum(1 / betas) if betas.all() else 0.0
    return basis, matrix, quality

  return minimize(objective, x, num_steps, space, **settings)


def full(objective, x, num_steps, **settings):
  """Cubic-regularised Newton of Nesterov and Polyak."""
  space = lambda k, x, gradient: (np.eye(len(x)), objective.hessian(x), 0.0)
  return minimize(objective, x, num_steps, space, **settings)


def coordinates(objective, x, num_steps, draw, **settings):
  """Stochastic subspace cubic Newton on coordinates `draw(k)` (m,)."""

  def space(k, x, gradient):
    del gradient
    ids = np.asarray(draw(k))
    columns = objective.features[:, ids]
    matrix = columns.T @ (objective.curvature(x)[:, None] * columns)
    matrix += objective.ridge * np.eye(len(ids))
    return np.eye(len(x))[:, ids], matrix, 0.0

  return minimize(objective, x, num_steps, space, **settings)


def minimum(objective, x, num_steps=200):
  """The lowest value, and where; by full steps."""
  run = full(objective, x, num_steps)
  return run.values.min(), run.xs[run.values.argmin()]


def logistic(num_rows, num_features, ridge=0.0, seed=0, decay=0.5):
  """The generated problem of the specification, section 6."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(num_rows, num_features))
  features *= np.arange(1.0, num_features + 1) ** -decay
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  truth = 3 * rng.normal(size=num_features)
  odds = 1 / (1 + np.exp(-2 * features @ truth))
  labels = (rng.random(num_rows) < odds).astype(float)
  return Objective(features, labels, ridge=ridge)
