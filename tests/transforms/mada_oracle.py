"""MADA as NumPy loops over its definition, in float64.

The derivatives are complex steps of the update itself: no slope is written
down here.
"""

import dataclasses

import numpy as np

NAMES = ('b1', 'b2', 'b3', 'rho', 'c', 'gamma')
LOW = (0.01, 0.501, 0.0, 0.0, 0.0, 0.0)
HIGH = (0.99, 0.99, 0.99, 1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Family:
  """Which member it is, and what no step changes."""

  eps: float = 1e-6
  lion_b1: float = 0.95
  lion_b2: float = 0.98
  maximum: bool = False
  released_lion: bool = False
  released_init: bool = False
  through_mean: bool = False


@dataclasses.dataclass
class Tensor:
  """The six arrays that one tensor carries."""

  m: np.ndarray
  v: np.ndarray
  n: np.ndarray
  v_bar: np.ndarray
  last: np.ndarray
  lion: np.ndarray

  @classmethod
  def zeros(cls, shape, family=None):
    of = Family() if family is None else family
    tensor = cls(*(np.zeros(shape) for _ in range(6)))
    if of.released_init:
      tensor.v = tensor.v + 1e-15
      tensor.v_bar = tensor.v_bar + 1e-15
    return tensor


def _sign(x):
  return np.sign(np.real(x))


def _maximum(a, b):
  return np.where(np.real(a) >= np.real(b), a, b)


def advance(s, g, q, t, family):
  """The direction u_t and the tensor after it; `q` may be complex."""
  b1, b2, b3, rho, c, gamma = q
  d = g - s.last
  n = s.n
  if t == 1:
    if family.released_init:
      n = g**2
    else:
      d = np.zeros_like(g)
  corrected = g + b3 * d
  side = _sign(corrected**2 - s.v)
  y = s.v + corrected**2 * side
  target = c * corrected**2 + (1 - c) * y
  m = b1 * s.m + (1 - b1) * g
  v = b2 * s.v + (1 - b2) * target
  n = b3 * n + (1 - b3) * d
  if family.maximum:
    v_bar = _maximum(s.v_bar, v)
  else:
    v_bar = (v + (t - 1) * s.v_bar) / t
  lion = family.lion_b2 * s.lion + (1 - family.lion_b2) * g
  momentum = lion if family.released_lion else s.lion
  sign = np.sign(family.lion_b1 * momentum + (1 - family.lion_b1) * g)
  m_hat = m / (1 - b1**t)
  seen = v_bar if family.through_mean else np.real(v_bar)
  v_hat = (rho * v + (1 - rho) * seen) / (1 - b2**t)
  # The root has no derivative at 0.
  v_hat = np.where(np.real(v_hat) < 1e-24, np.real(v_hat), v_hat)
  root = np.sqrt(v_hat)
  u = gamma * (m_hat + b3 * n) / (root + family.eps) + (1 - gamma) * sign
  return u, Tensor(m, v, n, v_bar, g, lion)


def slopes(s, g, q, t, family):
  """Derivatives of u_t in each of the six coefficients."""
  result = []
  for i in range(6):
    moved = np.array(q, complex)
    moved[i] += 1e-30j
    result.append(np.imag(advance(s, g, moved, t, family)[0]) / 1e-30)
  return result


def vector(values, defaults):
  """Six numbers from one, from some by name, or from none."""
  if values is None:
    values = {}
  if not isinstance(values, dict):
    values = dict.fromkeys(NAMES, values)
  return np.array(
    [values.get(k, d) for k, d in zip(NAMES, defaults, strict=True)], float
  )


def run(
  params,
  grad_fn,
  num_steps,
  rate=lambda t: 0.1,
  *,
  start=(0.9, 0.95, 0.0, 0.0, 1.0, 1.0),
  family=None,
  learn=NAMES,
  rates=None,
  momenta=None,
  bounds=None,
  clip=10.0,
  hyper_start=0,
  delay=0,
  decay=0.0,
  hyper_grad_fn=None,
):
  """Steps 1 to `num_steps` of section 3.3.

  Args:
    params: Arrays by name.
    grad_fn: From t and params to gradients.
    num_steps: How many.
    rate: From t to the learning rate.
    start: First coefficients.
    family: What `Family` says; the default is its default.
    learn: Names of those that learn.
    rates: Of the hyper-steps: one, or by name; the transform's own by default.
    momenta: Likewise, 0 by default.
    bounds: (low, high) by name.
    clip: Of each hyper-gradient, or None.
    hyper_start: Number of steps before learning.
    delay: 1 uses the coefficients of the step before.
    decay: Of tensors with two axes or more.
    hyper_grad_fn: Like `grad_fn`, what the hyper-gradient reads instead.

  Returns:
    Params, and rows (num_steps, 6) of the coefficients after each step, of
    the momenta and of the hyper-gradients.
  """
  family = Family() if family is None else family
  hyper_grad_fn = hyper_grad_fn or grad_fn
  params = {k: np.asarray(p, float) for k, p in params.items()}
  tensors = {k: Tensor.zeros(p.shape, family) for k, p in params.items()}
  rates = vector(rates, (1e-4, 1e-4, 0.02, 0.02, 0.02, 0.02))
  momenta = vector(momenta, (0.0,) * 6)
  box = dict(zip(NAMES, zip(LOW, HIGH, strict=True), strict=True)) | (
    bounds or {}
  )
  low, high = (np.array([box[k][i] for k in NAMES]) for i in (0, 1))
  q, buffer = np.array(start, float), np.zeros(6)
  before = None
  history = [], [], []
  for t in range(1, num_steps + 1):
    grads, hyper_grads = grad_fn(t, params), hyper_grad_fn(t, params)
    h = np.zeros(6)
    if before is not None and t > hyper_start:
      old, old_grads, old_q, old_rate = before
      for k in params:
        parts = slopes(old[k], old_grads[k], old_q, t - 1, family)
        products = [np.sum(hyper_grads[k] * part) for part in parts]
        h -= old_rate * np.where([name in learn for name in NAMES], products, 0)
    if clip is not None:
      h = h * np.minimum(1, clip / (np.abs(h) + 1e-6))
    buffer = momenta * buffer + h
    new = np.clip(q - rates * buffer, low, high)
    used, q = (q, new) if delay else (new, new)
    before = dict(tensors), grads, used, rate(t)
    for k in params:
      u, tensors[k] = advance(tensors[k], grads[k], used, t, family)
      shrink = rate(t) * decay if params[k].ndim > 1 else 0.0
      params[k] = params[k] - shrink * params[k] - rate(t) * u
    for rows, row in zip(history, (q, buffer, h), strict=True):
      rows.append(row.copy())
  return params, *(np.array(rows) for rows in history)
