"""What others fit a linear model with, on the host in float64: SciPy's methods.

The objectives are what a user of SciPy would write with care: a stable loss by
one exponential a row, products by compressed rows or by BLAS, and what belongs
to a point kept for all that is asked at it.
"""

import warnings
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special
from sklearn import exceptions, linear_model

from emc2.experiments import krylov_newton_trace as trace_lib

SCIPY = {
  'trust_krylov': 'trust-krylov',
  'newton_cg': 'Newton-CG',
  'l_bfgs_b': 'L-BFGS-B',
}
SKLEARN = {
  'sklearn_lbfgs': 'lbfgs',
  'sklearn_newton_cholesky': 'newton-cholesky',
}
"""Methods by the names that SciPy and scikit-learn have for them."""


class Logistic:
  r"""The mean logistic loss of rows, and half the ridge times :math:`|x|^2`.

  Args:
    rows: (n, d), float64: an array, or a matrix of SciPy in compressed rows.
    labels: (n,), 0 or 1.
    ridge: At least 0.
  """

  def __init__(self, rows: Any, labels: np.ndarray, ridge: float):
    self.rows, self.labels = rows, labels.astype(np.float64)
    self.ridge, self.size = ridge, rows.shape[1]
    # Sums over compressed rows are a third faster than over columns.
    self._columns = rows.T if isinstance(rows, np.ndarray) else rows.T.tocsr()
    self._x = None

  def _go_to(self, x):
    if self._x is not None and np.array_equal(x, self._x):
      return
    self._x, self._scores = x.copy(), self.rows @ x
    # All that is needed hangs on exp(-|score|), which cannot overflow.
    small = np.exp(-np.abs(self._scores))
    self._small, share = small, 1 / (1 + small)
    self._chance = np.where(self._scores >= 0, share, small * share)
    self._curvature = None

  def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
    """The objective at x (d,), and its gradient (d,)."""
    self._go_to(x)
    scores = self._scores
    losses = np.log1p(self._small) + np.maximum(scores, 0)
    value = np.mean(losses - self.labels * scores)
    errors = (self._chance - self.labels) / scores.size
    gradient = self._columns @ errors + self.ridge * x
    return value + self.ridge / 2 * (x @ x), gradient

  def hvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The Hessian at x times v, (d,)."""
    self._go_to(x)
    if self._curvature is None:
      chance = self._chance
      self._curvature = chance * (1 - chance) / chance.size
    images = self._curvature * (self.rows @ v)
    return self._columns @ images + self.ridge * v


class Softmax:
  r"""The mean cross-entropy, and half the ridge times :math:`|x|^2`.

  Args:
    rows: (n, width), float64.
    labels: (n,), int, in [0, num_classes).
    num_classes: K; a point has the shape (width * K,).
    ridge: At least 0.
  """

  def __init__(
    self, rows: np.ndarray, labels: np.ndarray, num_classes: int, ridge: float
  ):
    self.rows, self.labels, self.ridge = rows, labels, ridge
    self.shape = rows.shape[1], num_classes
    self.size = rows.shape[1] * num_classes
    self._of_label = np.arange(len(labels)), labels
    self._x = None

  def _go_to(self, x):
    if self._x is not None and np.array_equal(x, self._x):
      return
    self._x = x.copy()
    self._scores = self.rows @ x.reshape(self.shape)
    high = self._scores.max(axis=1, keepdims=True)
    powers = np.exp(self._scores - high)
    total = powers.sum(axis=1, keepdims=True)
    self._logs = (high + np.log(total))[:, 0]
    self._chances = powers / total

  def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
    """The objective at x (d,), and its gradient (d,)."""
    self._go_to(x)
    value = np.mean(self._logs - self._scores[self._of_label])
    errors = self._chances.copy()
    errors[self._of_label] -= 1
    gradient = (self.rows.T @ errors).ravel() / len(errors) + self.ridge * x
    return value + self.ridge / 2 * (x @ x), gradient

  def hvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The Hessian at x times v, (d,)."""
    self._go_to(x)
    images = self._chances * (self.rows @ v.reshape(self.shape))
    images -= self._chances * images.sum(axis=1, keepdims=True)
    product = (self.rows.T @ images).ravel() / len(images)
    return product + self.ridge * v


class _OutOfTime(Exception):
  """Raised inside an iteration, which SciPy would end in its own time."""


def minimize(
  name: str,
  objective: Logistic | Softmax,
  start: np.ndarray,
  trace: trace_lib.Trace,
  *,
  memory: int,
) -> trace_lib.End | None:
  """Runs a method of SciPy until the trace says that it has to end.

  Its own tolerances are 0, so that all methods end by the same rule.

  Args:
    name: One of `SCIPY`.
    objective: What is minimised.
    start: (d,), float64.
    trace: Follows it.
    memory: Pairs of differences that L-BFGS-B keeps.

  Returns:
    Why it ended, if the trace did not say so.
  """
  calls = dict.fromkeys(trace_lib.Work._fields, 0)
  iterations, ended = 0, trace.look(start, 0, trace_lib.Work())
  if ended:
    return None

  def value_and_gradient(x):
    _check_time(trace)
    calls['gradients'] += 1
    calls['evaluations'] += 1
    return objective.value_and_gradient(x)

  def hvp(x, v):
    _check_time(trace)
    calls['hvps'] += 1
    return objective.hvp(x, v)

  def look(xk):
    nonlocal iterations, ended
    trace.halt()
    iterations += 1
    ended = trace.look(xk, iterations, trace_lib.Work(**calls))
    if ended:
      raise StopIteration
    trace.run()

  most = 10**9
  options = {
    'trust_krylov': dict(gtol=0.0, maxiter=most),
    'newton_cg': dict(xtol=0.0, maxiter=most),
    'l_bfgs_b': dict(
      ftol=0.0, gtol=0.0, maxcor=memory, maxiter=most, maxfun=most
    ),
  }[name]
  second = {} if name == 'l_bfgs_b' else {'hessp': hvp}
  with warnings.catch_warnings(), np.errstate(all='ignore'):
    warnings.simplefilter('ignore')  # The end says what they say.
    trace.run()
    try:
      scipy.optimize.minimize(
        value_and_gradient,
        start.copy(),
        jac=True,
        method=SCIPY[name],
        callback=look,
        options=options,
        **second,
      )
    except _OutOfTime:
      return trace_lib.End.LIMIT
    finally:
      trace.halt()
  return None if ended else trace_lib.End.STUCK


def _check_time(trace):
  if trace.is_overdue():
    raise _OutOfTime


def fit_sklearn(
  name: str,
  objective: Softmax,
  trace: trace_lib.Trace,
  limits: trace_lib.Limits,
) -> trace_lib.End | None:
  """Fits scikit-learn's logistic regression, which starts from 0.

  It tells nothing on its way, and ends where no entry of the gradient is above
  the tolerance.

  Args:
    name: One of `SKLEARN`.
    objective: What is minimised; the constant is a feature as any other.
    trace: Follows it.
    limits: Of these the seconds do not bind it.

  Returns:
    Why it ended, if the trace did not say so.
  """
  strength = objective.ridge * len(objective.labels)
  model = linear_model.LogisticRegression(
    C=1 / strength if strength else np.inf,
    fit_intercept=False,
    solver=SKLEARN[name],
    tol=limits.gradient_tol,
    max_iter=limits.max_iterations,
  )
  if trace.look(np.zeros(objective.size), 0, trace_lib.Work()):
    return None
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    trace.run()
    model.fit(objective.rows, objective.labels)
    trace.halt()
  weights = np.zeros(objective.shape)
  weights[:, model.classes_] = model.coef_.T
  trace.look(weights.ravel(), int(model.n_iter_[0]), trace_lib.Work())
  return None
