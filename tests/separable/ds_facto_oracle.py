"""DS-FACTO by loops in float64, written from its specification."""

import numpy as np


def synthetic(loss, seed=0, num_rows=960):
  """The synthetic problem of the specification, section 6."""
  rng = np.random.default_rng(seed)
  d, k = 32, 4
  x = rng.normal(size=(num_rows, d)) * (rng.random((num_rows, d)) < 0.4)
  machine = 0.3, 0.5 * rng.normal(size=d), 0.4 * rng.normal(size=(d, k))
  f = scores(machine, x)
  if loss == 'squared':
    return x, f + 0.1 * rng.normal(size=num_rows)
  chance = 1 / (1 + np.exp(-2 * f))
  return x, np.where(rng.random(num_rows) < chance, 1.0, -1.0)


def first(num_features, rank, std=0.1, seed=7):
  """Parameters to begin with."""
  draw = np.random.default_rng(seed).normal(size=(num_features, rank))
  return 0.0, np.zeros(num_features), std * draw


def score_by_pairs(machine, x):
  """Equation (1), of a row."""
  w0, w, v = machine
  total = w0 + sum(w[d] * x[d] for d in range(len(x)))
  for d in range(len(x)):
    for e in range(d + 1, len(x)):
      total += v[d] @ v[e] * x[d] * x[e]
  return total


def sums(machine, x):
  """The sums of rows: a and r."""
  _, w, v = machine
  return x @ v, x @ w - 0.5 * (x * x) @ (v * v).sum(1)


def scores(machine, x):
  """Equation (2)."""
  a, r = sums(machine, x)
  return machine[0] + r + 0.5 * (a * a).sum(1)


def losses(loss, f, y):
  """Of each row."""
  if loss == 'squared':
    return 0.5 * (f - y) ** 2
  return np.logaddexp(0, -y * f)


def slopes(loss, f, y):
  """Equation (4)."""
  return f - y if loss == 'squared' else -y / (1 + np.exp(y * f))


def descend(machine, x, y, loss, *, eta, ridge, num_steps):
  """Steps along the gradient of the whole objective; the bias first."""
  w0, w, v = machine
  for _ in range(num_steps):
    a, _ = sums((w0, w, v), x)
    f = scores((w0, w, v), x)
    w0 -= eta * slopes(loss, f, y).mean()
    g = slopes(loss, scores((w0, w, v), x), y)
    w_slope = x.T @ g / len(y) + ridge * w
    v_slope = x.T @ (g[:, None] * a) - v * ((x * x).T @ g)[:, None]
    w, v = w - eta * w_slope, v - eta * (v_slope / len(y) + ridge * v)
  return w0, w, v


def descend_by_rows(machine, x, y, *, eta, ridge, num_epochs):
  """LibFM's stochastic descent for labels -1 and 1, without a bias."""
  w0, w, v = machine[0], machine[1].copy(), machine[2].copy()
  for _ in range(num_epochs):
    for row, label in zip(x, y, strict=True):
      a = row @ v
      f = w0 + row @ w + 0.5 * (a @ a - (row**2) @ (v**2).sum(1))
      g = -label / (1 + np.exp(label * f))
      for d in np.flatnonzero(row):
        w[d] -= eta * (g * row[d] + ridge * w[d])
        slope = row[d] * a - v[d] * row[d] ** 2
        v[d] -= eta * (g * slope + ridge * v[d])
  return w0, w, v


def run(machine, x, y, loss, layout, *, mode, eta, ridge, num_passes):
  """Section 3.5 by loops over visits; the bias moves as a pass begins.

  Args:
    machine: (w_0, w, V) to begin with.
    x: (N, D).
    y: (N,).
    loss: 'squared' or 'logistic'.
    layout: Who has which rows, in which batches, and which block has what.
    mode: 'fused', 'two_pass' or 'incremental'.
    eta: Step size, of the pass.
    ridge: Of both.
    num_passes: How many.

  Returns:
    The machine, and a and r of all rows as the workers know them.
  """
  w0, w, v = machine[0], machine[1].copy(), machine[2].copy()
  workers = [[b[b >= 0] for b in own] for own in layout.row_ids]
  blocks = [ids[ids >= 0] for ids in layout.feature_ids]
  width, total = len(workers), len(blocks)
  here = total // width
  a, r = sums((w0, w, v), x)

  def visit(p, q, next_a, next_r, update, add):
    ids = blocks[q]
    own = np.concatenate(workers[p])
    for rows in workers[p] if update else []:
      part = x[np.ix_(rows, ids)]
      g = frozen[rows]
      if mode == 'incremental':
        f = w0 + r[rows] + 0.5 * (a[rows] ** 2).sum(1)
        g = slopes(loss, f, y[rows])
      w_slope = part.T @ g / len(rows) + ridge * w[ids]
      v_slope = part.T @ (g[:, None] * a[rows])
      v_slope -= v[ids] * ((part * part).T @ g)[:, None]
      v_slope = v_slope / len(rows) + ridge * v[ids]
      old = w[ids].copy(), v[ids].copy()
      w[ids] -= size * w_slope
      v[ids] -= size * v_slope
      if mode == 'incremental':
        part = x[np.ix_(own, ids)]
        a[own] += part @ (v[ids] - old[1])
        squares = (v[ids] ** 2).sum(1) - (old[1] ** 2).sum(1)
        r[own] += part @ (w[ids] - old[0]) - 0.5 * (part * part) @ squares
    if add:
      part = x[np.ix_(own, ids)]
      next_a[own] += part @ v[ids]
      squares = (v[ids] ** 2).sum(1)
      next_r[own] += part @ w[ids] - 0.5 * (part * part) @ squares

  phases = [(1, 0), (0, 1)] if mode == 'two_pass' else [(1, 1)]
  for number in range(num_passes):
    size = eta(number)
    f = w0 + r + 0.5 * (a * a).sum(1)
    w0 -= size * slopes(loss, f, y).mean()
    frozen = slopes(loss, w0 + r + 0.5 * (a * a).sum(1), y)
    next_a, next_r = np.zeros_like(a), np.zeros_like(r)
    for update, add in phases:
      for t in range(total):
        for p in range(width):
          q = (p + t // here) % width * here + t % here
          visit(p, q, next_a, next_r, update, add)
    a, r = next_a, next_r
  return (w0, w, v), a, r
