"""Softmax regression by loops, in NumPy and float64."""

import numpy as np
from scipy import optimize, special


def toy():
  """N = 200, D = 7, K = 5; ridge 1e-2."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 7))
  scores = x @ rng.normal(size=(7, 5))
  return x, np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)


def synthetic(num_rows=960, num_features=20, num_classes=24):
  """Section 6.3 of the specification; ridge 1e-3."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(num_rows, num_features)) / np.sqrt(num_features) * 2
  scores = x @ (rng.normal(size=(num_features, num_classes)) * 1.5)
  return x, np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)


def objective(w, x, y, ridge, omega=None):
  """L, equation (1)."""
  omega = np.ones(len(x)) if omega is None else omega
  z = x @ w
  losses = special.logsumexp(z, axis=1) - z[np.arange(len(y)), y]
  return np.sum(omega * losses) / omega.sum() + 0.5 * ridge * np.sum(w**2)


def gradient(w, x, y, ridge, omega=None):
  omega = np.ones(len(x)) if omega is None else omega
  errors = special.softmax(x @ w, axis=1)
  errors[np.arange(len(y)), y] -= 1
  return x.T @ (omega[:, None] * errors) / omega.sum() + ridge * w


def separated(w, b, x, y, ridge):
  """F, equation (2)."""
  z = x @ w
  labels = z[np.arange(len(y)), y]
  total = np.exp(z + b[:, None]).sum()
  return 0.5 * ridge * np.sum(w**2) - 1 + (total - np.sum(labels + b)) / len(y)


def separated_gradient(w, b, x, y, ridge):
  """By w and by b, equation (4)."""
  p = np.exp(x @ w + b[:, None])
  hot = np.eye(w.shape[1])[y]
  return x.T @ (p - hot) / len(y) + ridge * w, (p.sum(1) - 1) / len(y)


def pairs(w, b, x, y, ridge):
  """(N, K): the terms of equation (3)."""
  num_rows, num_classes = len(x), w.shape[1]
  found = np.empty((num_rows, num_classes))
  for i in range(num_rows):
    for k in range(num_classes):
      z = x[i] @ w[:, k]
      found[i, k] = (
        ridge * w[:, k] @ w[:, k] / 2
        - (y[i] == k) * z
        - (b[i] + 1) / num_classes
        + np.exp(z + b[i])
      ) / num_rows
  return found


def mean_of_pair_steps(w, b, x, y, ridge):
  """Of the brackets of (5) and (6), with their K, over all pairs."""
  by_w, by_b = np.zeros_like(w), np.zeros_like(b)
  num_rows, num_classes = len(x), w.shape[1]
  for i in range(num_rows):
    for k in range(num_classes):
      p = np.exp(x[i] @ w[:, k] + b[i])
      slope = ridge * w[:, k] + (p - (y[i] == k)) * x[i]
      by_w[:, k] += num_classes * slope
      by_b[i] += num_classes * (p - 1 / num_classes)
  return by_w / (num_rows * num_classes), by_b / (num_rows * num_classes)


def minimize(x, y, num_classes, ridge, num_iterations=5000):
  """The optimum by L-BFGS: weights and objective."""
  shape = x.shape[1], num_classes

  def ask(w):
    w = w.reshape(shape)
    return objective(w, x, y, ridge), gradient(w, x, y, ridge).ravel()

  found = optimize.minimize(
    ask,
    np.zeros(np.prod(shape)),
    jac=True,
    method='L-BFGS-B',
    options=dict(maxiter=num_iterations, maxfun=10**6, ftol=0, gtol=1e-11),
  )
  return found.x.reshape(shape), found.fun


def travel(num_workers, slots):
  """The block of worker p at visit t."""
  total = num_workers * slots
  return [
    [(p * slots + t) % total for p in range(num_workers)] for t in range(total)
  ]


class Loops:
  """Visits one after another; minibatches in the order of the layout."""

  def __init__(
    self, x, y, layout, *, refresh, ridge, eta, omega=None, momentum=0.0
  ):
    self.x, self.y, self.refresh, self.ridge = x, y, refresh, ridge
    self.eta, self.layout, self.momentum = eta, layout, momentum
    self.omega = np.ones(len(x)) if omega is None else omega
    self.blocks = [ids[ids >= 0] for ids in layout.class_ids]
    num_classes = layout.num_classes
    self.w = np.zeros((x.shape[1], num_classes))
    self.velocity = np.zeros_like(self.w)
    self.u = np.full(len(x), np.log(num_classes))
    sizes = np.array([len(ids) for ids in self.blocks])
    self.table = np.tile(np.log(sizes), (len(x), 1))
    self.acc = np.full(len(x), -np.inf)
    self.count = 0

  def train(self, num_passes, numbers):
    for _ in range(num_passes):
      self.one_pass(numbers)
    return self

  def one_pass(self, numbers):
    parts = (self.update, self.gather)
    if self.refresh == 'two_pass':
      for part in parts:
        for row in numbers:
          for p, q in enumerate(row):
            part(p, q)
    else:
      for row in numbers:
        for p, q in enumerate(row):
          self.update(p, q)
          self.gather(p, q)
    if self.refresh != 'sgd':
      self.u = self.acc
    self.acc = np.full(len(self.x), -np.inf)
    self.count += 1

  def minibatches(self, p):
    for ids in self.layout.row_ids[p]:
      yield ids[ids >= 0]

  def update(self, p, q):
    ids, eta = self.blocks[q], self.eta(self.count)
    for rows in self.minibatches(p):
      total = self.omega[rows].sum()
      if not total:
        continue
      z = self.x[rows] @ self.w[:, ids]
      own, u = special.logsumexp(z, axis=1), self.u[rows]
      if self.refresh == 'floor':
        u = self.u[rows] = np.maximum(u, own)
      elif self.refresh == 'table':
        others = np.delete(self.table[rows], q, axis=1)
        u = np.logaddexp(special.logsumexp(others, axis=1), own)
        self.table[rows, q] = own
      elif self.refresh == 'sgd':
        slope = np.exp(own - u) - len(ids) / self.layout.num_classes
        self.u[rows] = u + eta * slope
      errors = np.exp(z - u[:, None]) - (self.y[rows, None] == ids)
      slope = self.x[rows].T @ (self.omega[rows, None] * errors) / total
      slope += (
        self.ridge * self.w[:, ids] + self.momentum * (self.velocity[:, ids])
      )
      self.velocity[:, ids] = slope
      self.w[:, ids] -= eta * slope

  def gather(self, p, q):
    for rows in self.minibatches(p):
      z = self.x[rows] @ self.w[:, self.blocks[q]]
      own = special.logsumexp(z, axis=1)
      self.acc[rows] = np.logaddexp(self.acc[rows], own)
      self.table[rows, q] = own


def fit_poisson(b, x, y, num_classes, ridge, num_steps=100):
  """The exact W-step: ridge Poisson regression of each class by Newton."""
  w = np.zeros((x.shape[1], num_classes))
  value = lambda w, hot: (
    np.mean(np.exp(x @ w + b) - hot * (x @ w)) + 0.5 * ridge * w @ w
  )
  for k in range(num_classes):
    hot = (y == k).astype(float)
    for _ in range(num_steps):
      p = np.exp(x @ w[:, k] + b)
      slope = x.T @ (p - hot) / len(x) + ridge * w[:, k]
      curvature = (x.T * p) @ x / len(x) + ridge * np.eye(len(slope))
      move, size = np.linalg.solve(curvature, slope), 1.0
      while value(w[:, k] - size * move, hot) > value(w[:, k], hot) + 1e-15:
        size /= 2
      w[:, k] -= size * move
      if np.abs(move).max() < 1e-14:
        break
  return w
