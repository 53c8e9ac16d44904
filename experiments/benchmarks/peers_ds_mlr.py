"""How softmax regression is fitted today: scikit-learn and torch.

Served by `worker.py`; needs NumPy, SciPy and the package that is asked for. A
problem comes as a file of `numpy.savez` with `indptr`, `indices`, `data` and
`shape` of its features and `labels`. The objective is the mean cross-entropy
plus `ridge / 2` times the sum of squares, from weights 0.
"""

import time

import numpy as np

PACKAGES = ('numpy', 'scipy', 'scikit-learn', 'torch')

DENSE = 0.25
"""Share of entries from which features are given as a dense matrix."""


def read(path, dtype):
  """Features, dense if most are not 0, and labels."""
  import scipy.sparse

  with np.load(path) as found:
    # scikit-learn wants 32 bits.
    places = (found[name].astype(np.int32) for name in ('indices', 'indptr'))
    parts = found['data'].astype(dtype), *places
    features = scipy.sparse.csr_array(parts, shape=tuple(found['shape']))
    labels = found['labels']
  if features.nnz >= DENSE * np.prod(features.shape):
    return features.toarray(), labels
  # Both peers want the older class.
  return scipy.sparse.csr_matrix(features), labels


def objective(features, labels, weights, ridge):
  """In float64; `weights` (D, K)."""
  from scipy import special

  weights = np.asarray(weights, np.float64)
  total = 0.0
  for start in range(0, len(labels), 2048):
    rows = slice(start, start + 2048)
    scores = features[rows].astype(np.float64) @ weights
    own = labels[rows]
    chosen = scores[np.arange(len(own)), own]
    total += np.sum(special.logsumexp(scores, axis=1) - chosen)
  return total / len(labels) + ridge / 2 * np.sum(weights**2)


class Clock:
  """Seconds of the CPU by all threads and of the wall, as it is read."""

  def __init__(self):
    self.cpu, self.wall, self.objective = [], [], []
    self._start = time.process_time(), time.perf_counter()

  def add(self, value):
    """One more point of the curve."""
    self.cpu.append(time.process_time() - self._start[0])
    self.wall.append(time.perf_counter() - self._start[1])
    self.objective.append(float(value))

  def read(self):
    """The curve."""
    return dict(cpu=self.cpu, wall=self.wall, objective=self.objective)


def fit_lbfgs(features, labels, *, ridge, steps):
  """scikit-learn's lbfgs; the curve holds each of its evaluations."""
  from sklearn import linear_model
  from sklearn.linear_model import _linear_loss

  clock = Clock()
  plain = _linear_loss.LinearModelLoss.loss_gradient

  def followed(self, *args, **settings):
    loss, gradient = plain(self, *args, **settings)
    clock.add(loss)
    return loss, gradient

  _linear_loss.LinearModelLoss.loss_gradient = followed
  try:
    model = _logistic(linear_model, labels, ridge, 'lbfgs', steps)
    model.fit(features, labels)
  finally:
    _linear_loss.LinearModelLoss.loss_gradient = plain
  return clock.read(), model.coef_.T


def fit_saga(features, labels, *, ridge, steps):
  """scikit-learn's saga for some passes; the curve is its end alone."""
  from sklearn import linear_model

  model = _logistic(linear_model, labels, ridge, 'saga', steps)
  clock = Clock()
  model.fit(features, labels)
  clock.add(np.nan)
  found = clock.read()
  found['objective'] = [objective(features, labels, model.coef_.T, ridge)]
  return found, model.coef_.T


def _logistic(linear_model, labels, ridge, solver, steps):
  return linear_model.LogisticRegression(
    C=1 / (ridge * len(labels)),
    solver=solver,
    max_iter=steps,
    tol=1e-12,
    fit_intercept=False,
    random_state=0,
  )


def fit_torch(features, labels, *, ridge, steps):
  """The LBFGS of torch, strong Wolfe; the curve is of its calls."""
  import torch

  torch.set_num_threads(1)
  if isinstance(features, np.ndarray):
    x = torch.tensor(features)
  else:
    parts = features.indptr, features.indices, features.data
    x = torch.sparse_csr_tensor(*map(torch.tensor, parts), features.shape)
  y = torch.tensor(labels, dtype=torch.int64)
  shape = features.shape[1], int(labels.max()) + 1
  weights = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
  solver = torch.optim.LBFGS(
    [weights],
    max_iter=steps,
    tolerance_grad=0,
    tolerance_change=0,
    history_size=10,
    line_search_fn='strong_wolfe',
  )
  clock = Clock()

  def closure():
    solver.zero_grad()
    loss = torch.nn.functional.cross_entropy(x @ weights, y)
    loss = loss + ridge / 2 * torch.sum(weights**2)
    loss.backward()
    clock.add(loss.detach())
    return loss

  solver.step(closure)
  return clock.read(), weights.detach().numpy()


FITS = {'lbfgs': fit_lbfgs, 'saga': fit_saga, 'torch': fit_torch}


def fit(*, peer, path, dtype, ridge, steps):
  """The curve of a peer."""
  import warnings

  warnings.simplefilter('ignore')
  features, labels = read(path, dtype)
  return FITS[peer](features, labels, ridge=ridge, steps=steps)[0]


VALUES = {'fit': fit}
CASES = {}
