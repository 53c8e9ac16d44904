"""The paper's formulas, row by row and component by component, in float64."""

import numpy as np
from scipy import special, stats

ALPHA, BETA, MEAN, DEGREES, SCALE = 1.5, 0.7, 0.3, 5.0, 0.4
"""Priors of all the tests."""


def points(seed, num_rows, dim, num_clusters=4):
  """Clusters that overlap a little, of unequal sizes."""
  rng = np.random.default_rng(seed)
  centers = 3 * rng.normal(size=(num_clusters, dim))
  which = rng.integers(num_clusters, size=num_rows)
  return centers[which] + rng.normal(size=(num_rows, dim)), which


def starts(seed, num_rows, num_components):
  return np.random.default_rng(seed).dirichlet(
    np.ones(num_components), num_rows
  )


def log_weights(z):
  alpha = ALPHA + z.sum(0)
  return special.digamma(alpha) - special.digamma(alpha.sum())


def diagonal(x, z):
  """a, b, m, beta of each component."""
  count = z.sum(0)
  beta = BETA + count
  a = DEGREES / 2 + count / 2
  b, m = [], []
  for k in range(z.shape[1]):
    m.append((BETA * MEAN + z[:, k] @ x) / beta[k])
    square = z[:, k] @ x**2 + BETA * MEAN**2 - beta[k] * m[-1] ** 2
    b.append(1 / (2 * SCALE) + square / 2)
  return a, np.array(b), np.array(m), beta


def diagonal_scores(x, z, rows=slice(None)):
  """Of some of the rows, with the posteriors that all of them give."""
  a, b, m, beta = diagonal(x, z)
  u, weights = np.zeros(z[rows].shape), log_weights(z)
  dim = x.shape[1]
  for i, row in enumerate(x[rows]):
    for k in range(z.shape[1]):
      log_tau = special.digamma(a[k]) - np.log(b[k])
      u[i, k] = weights[k] + log_tau.sum() / 2 - dim / 2 * np.log(2 * np.pi)
      distance = np.sum(a[k] / b[k] * (row - m[k]) ** 2)
      u[i, k] -= (dim / beta[k] + distance) / 2
  return u


def diagonal_elbo(x, z):
  """As the specification writes it out, term by term."""
  a, b, m, beta = diagonal(x, z)
  num_components, a0, b0 = z.shape[1], DEGREES / 2, 1 / (2 * SCALE)
  alpha, weights = ALPHA + z.sum(0), log_weights(z)
  gammaln = special.gammaln
  with np.errstate(divide='ignore', invalid='ignore'):
    bound = np.nansum(z * (diagonal_scores(x, z) - np.log(z)))
  bound += gammaln(num_components * ALPHA) - num_components * gammaln(ALPHA)
  bound += np.sum((ALPHA - 1) * weights)
  bound -= gammaln(alpha.sum()) - gammaln(alpha).sum()
  bound -= np.sum((alpha - 1) * weights)
  for k in range(num_components):
    tau, log_tau = a[k] / b[k], special.digamma(a[k]) - np.log(b[k])
    prior = np.log(BETA / (2 * np.pi)) / 2 + log_tau / 2
    prior -= BETA / 2 * ((m[k] - MEAN) ** 2 * tau + 1 / beta[k])
    prior += a0 * np.log(b0) - gammaln(a0) + (a0 - 1) * log_tau - b0 * tau
    own = np.log(beta[k] / (2 * np.pi)) / 2 + log_tau / 2 - 0.5
    own += a[k] * np.log(b[k]) - gammaln(a[k]) + (a[k] - 1) * log_tau
    own -= b[k] * tau
    bound += np.sum(prior - own)
  return bound


def full_scores(x, z):
  u, weights = np.zeros(z.shape), log_weights(z)
  dim = x.shape[1]
  for k in range(z.shape[1]):
    count = z[:, k].sum()
    beta, nu = BETA + count, DEGREES + count
    mean = z[:, k] @ x / count
    m = (BETA * MEAN + count * mean) / beta
    inverse = np.eye(dim) / SCALE
    inverse += ((x - mean).T * z[:, k]) @ (x - mean)
    inverse += BETA * count / beta * np.outer(mean - MEAN, mean - MEAN)
    w = np.linalg.inv(inverse)
    log_det = sum(special.digamma((nu + 1 - j) / 2) for j in range(1, dim + 1))
    log_det += dim * np.log(2) + np.linalg.slogdet(w)[1]
    for i, row in enumerate(x):
      distance = nu * (row - m) @ w @ (row - m)
      u[i, k] = weights[k] + log_det / 2 - dim / 2 * np.log(2 * np.pi)
      u[i, k] -= (dim / beta + distance) / 2
  return u


def multinomial_scores(x, z, prior):
  u, weights = np.zeros(z.shape), log_weights(z)
  for k in range(z.shape[1]):
    counts = prior + z[:, k] @ x
    log_beta = special.digamma(counts) - special.digamma(counts.sum())
    u[:, k] = weights[k] + x @ log_beta
  return u


def full_evidence(x):
  """Log p(X) by the chain rule: each row given those before is Student's t."""
  total, dim = 0.0, x.shape[1]
  for i, row in enumerate(x):
    before = x[:i]
    beta, nu = BETA + i, DEGREES + i
    mean = before.mean(0) if i else np.zeros(dim)
    m = (BETA * MEAN + i * mean) / beta
    inverse = np.eye(dim) / SCALE + (before - mean).T @ (before - mean)
    inverse += BETA * i / beta * np.outer(mean - MEAN, mean - MEAN)
    freedom = nu - dim + 1
    shape = inverse * (beta + 1) / (beta * freedom)
    total += stats.multivariate_t(m, shape, df=freedom).logpdf(row)
  return total


def diagonal_evidence(x):
  """The same, dimension by dimension."""
  return sum(full_evidence_of_one(x[:, j]) for j in range(x.shape[1]))


def full_evidence_of_one(x):
  """In one dimension the two families are the same."""
  return full_evidence(x[:, None])


def multinomial_evidence(x, prior):
  """Log p(X) by Polya's urn: each symbol given those before."""
  total, seen = 0.0, np.full(x.shape[1], prior)
  for row in x:
    for symbol, times in enumerate(row):
      for _ in range(int(times)):
        total += np.log(seen[symbol] / seen.sum())
        seen[symbol] += 1
  return total


def softmax(u):
  return special.softmax(u, axis=1)
