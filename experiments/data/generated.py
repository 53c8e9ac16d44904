"""Generated problems of one-layer models, some with a known optimum."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.special

from emc2.experiments.data import examples
from emc2.separable import rows as rows_lib


class Interactions(NamedTuple):
  """A factorisation machine and what it says of random rows."""

  train: examples.Examples
  test: examples.Examples
  bias: float
  weights: np.ndarray  # (D,), float64.
  factors: np.ndarray  # (D, K), float64.


class Extreme(NamedTuple):
  """Rows of few kinds, for which the best weights are known."""

  train: examples.Examples
  test: examples.Examples
  kinds: scipy.sparse.csr_array  # (D, D): a kind a row, orthonormal.
  kind_ids: np.ndarray  # (N,), int32: the kind of each row to train on.


class Logistic(NamedTuple):
  """Rows of two classes."""

  rows: np.ndarray  # (N, D), float64.
  labels: np.ndarray  # (N,), int32: 0 or 1.
  weights: np.ndarray  # (D,), float64.


def softmax(
  num_rows: int = 960,
  num_features: int = 20,
  num_classes: int = 24,
  *,
  num_test: int = 0,
  seed: int = 0,
) -> tuple[examples.Examples, examples.Examples]:
  """Dense rows whose classes a linear soft-max draws.

  With the defaults the problem of `ds_mlr.md` §6.3 (a), whose optimum for a
  ridge of 1e-3 is 1.546392914 (L-BFGS).

  Args:
    num_rows: N.
    num_features: D.
    num_classes: K.
    num_test: Further rows of the same model.
    seed: At least 0; rows to train on do not hang on `num_test`.

  Returns:
    The examples to train on, and to test on (none by default).
  """
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.normal(size=(n, num_features)) / num_features**0.5 * 2
  x = draw(num_rows)
  weights = rng.normal(size=(num_features, num_classes)) * 1.5
  names = tuple(map(str, range(num_classes)))

  def label(x):
    labels = np.argmax(x @ weights + rng.gumbel(size=(len(x), num_classes)), 1)
    return examples.Examples(
      rows_lib.from_dense(x), labels.astype(np.int32), names
    )

  return label(x), label(draw(num_test))


def logistic(
  num_rows: int = 1_000, num_features: int = 300, *, seed: int = 0
) -> Logistic:
  """Dense rows of norm 1 and two classes, which a linear score draws.

  With the defaults the small problem of `krylov_crn.md` §6: feature j, from 1,
  has the scale :math:`j^{-1/2}` before rows are normalised, weights are
  :math:`N(0, 3^2)`, and a row with score :math:`f` has class 1 with probability
  :math:`1 / (1 + e^{-2 f})`. That one is separable: the least mean loss, 0, is
  approached and never reached.

  Args:
    num_rows: N.
    num_features: D.
    seed: At least 0.

  Returns:
    The problem, in float64: how many steps a method takes here hangs on digits
    that float32 has not.
  """
  rng = np.random.default_rng(seed)
  scale = np.arange(1, num_features + 1) ** -0.5
  rows = rng.normal(size=(num_rows, num_features)) * scale
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  weights = 3 * rng.normal(size=num_features)
  chance = scipy.special.expit(2 * rows @ weights)
  labels = (rng.random(num_rows) < chance).astype(np.int32)
  return Logistic(rows, labels, weights)


def extreme(
  num_rows: int = 20_000,
  num_features: int = 2_048,
  num_classes: int = 1_000,
  *,
  width: int = 16,
  faithful: float = 0.8,
  num_test: int = 2_000,
  seed: int = 0,
) -> Extreme:
  """Many classes, and an optimum that :func:`extreme_optimum` finds exactly.

  A row is one of D orthonormal kinds, each of which has `width` features, and
  each feature stands in as many kinds. A kind has a class of its own choice,
  which its rows have with probability `faithful`, or else any class. Both kinds
  and favourite classes follow Zipf's law. As the ridge does not change when the
  features are rotated, the problem falls apart into one for each kind.

  Args:
    num_rows: N.
    num_features: D, a multiple of `width`.
    num_classes: K.
    width: Features of a row, a power of 2.
    faithful: In [0, 1].
    num_test: Further rows of the same kinds.
    seed: At least 0.

  Returns:
    The problem.

  Raises:
    ValueError: If `width` is no power of 2 or does not divide D.
  """
  if width < 1 or width & (width - 1) or num_features % width:
    raise ValueError(
      f'width must be a power of 2 that divides num_features={num_features}, '
      f'got {width}.'
    )
  rng = np.random.default_rng(seed)
  block = scipy.linalg.hadamard(width) / np.sqrt(width)
  block = scipy.sparse.csr_array(block)
  blocks = scipy.sparse.block_diag(
    [block] * (num_features // width), format='csr'
  )
  kinds = blocks[:, rng.permutation(num_features)]
  favourites = rng.permutation(num_classes)[
    _zipf(rng, num_features, num_classes, 0.5)
  ]
  names = tuple(map(str, range(num_classes)))

  def draw(count):
    ids = _zipf(rng, count, num_features, 0.5)
    any_class = rng.integers(0, num_classes, count)
    labels = np.where(rng.random(count) < faithful, favourites[ids], any_class)
    rows = rows_lib.from_csr(scipy.sparse.csr_array(kinds[ids]))
    return ids.astype(np.int32), examples.Examples(
      rows, labels.astype(np.int32), names
    )

  ids, train = draw(num_rows)
  return Extreme(train, draw(num_test)[1], kinds, ids)


def extreme_optimum(problem: Extreme, ridge: float) -> tuple[float, np.ndarray]:
  r"""The least regularised mean cross-entropy, and where it lies.

  For kind :math:`d`, of share :math:`r = n_d / N`, with :math:`c_k = n_{dk} /
  N` and :math:`u = \log \sum_k e^{w_k}`, the best scores satisfy

  .. math::
    \lambda w_k = c_k - r e^{w_k - u}, \quad\text{so}\quad
    w_k = c_k / \lambda - \omega(\log(r / \lambda) + c_k / \lambda - u),

  with Wright's :math:`\omega(s) + \log \omega(s) = s`, and
  :math:`\sum_k \omega = r / \lambda` has one root :math:`u \ge \log K`, to
  which Newton's method rises from there, for the sum is convex in :math:`u`.

  Args:
    problem: Of :func:`extreme`.
    ridge: Lambda, above 0.

  Returns:
    The objective, and the weights (D, K), float64.

  Raises:
    ValueError: If `ridge` is not above 0.
  """
  if not ridge > 0:
    raise ValueError(f'ridge must be above 0, got {ridge}.')
  train = problem.train
  num_kinds, num_classes = problem.kinds.shape[0], train.num_classes
  ones = np.ones(train.num_rows)
  counts = scipy.sparse.csr_array(
    (ones, (problem.kind_ids, train.labels)), (num_kinds, num_classes)
  )
  counts.sum_duplicates()
  shares = np.asarray(counts.sum(axis=1)).ravel() / train.num_rows
  pulls = counts.data / train.num_rows / ridge  # Where a kind has a class.
  kinds = np.repeat(np.arange(num_kinds), np.diff(counts.indptr))
  absent = num_classes - np.diff(counts.indptr)  # Whose pull is 0.
  used = shares > 0
  mass = shares / ridge
  logs = np.log(np.where(used, mass, 1.0))
  u = np.full(num_kinds, np.log(num_classes))
  omega = lambda s: scipy.special.wrightomega(s)
  for _ in range(200):
    present = omega(logs[kinds] + pulls - u[kinds])
    other = omega(logs - u)
    total = np.bincount(kinds, present, num_kinds) + absent * other
    slope = np.bincount(kinds, present / (1 + present), num_kinds)
    slope += absent * other / (1 + other)
    step = np.where(used, (total - mass) / slope, 0.0)
    u += step
    if np.abs(step).max() < 1e-14 * u.max():
      break
  present = omega(logs[kinds] + pulls - u[kinds])
  other = np.where(used, omega(logs - u), 0.0)
  scores = np.repeat(-other[:, None], num_classes, axis=1)
  scores[kinds, counts.indices] = pulls - present
  loss = shares @ np.where(used, u, 0.0)
  loss -= ridge * np.sum(pulls * scores[kinds, counts.indices])
  return loss + ridge / 2 * np.sum(scores**2), problem.kinds.T @ scores


def text(
  num_rows: int = 20_000,
  num_features: int = 5_001,
  num_classes: int = 1_000,
  *,
  num_words: int = 49,
  own_words: int = 30,
  num_test: int = 0,
  seed: int = 0,
) -> tuple[examples.Examples, examples.Examples]:
  """Documents of Zipf's words, a part of which hang on the class.

  Half of the words of a document are of a class's own, drawn once, and half of
  all words; of both the first are the most frequent. A row is that of
  log counts at norm 1, and a last feature that is 1 for all. Every class has a
  row at least.

  Args:
    num_rows: N, at least K.
    num_features: D, of which the last one is the constant.
    num_classes: K.
    num_words: Tokens of a document in the mean; some stand twice in it.
    own_words: Different words of a class.
    num_test: Further rows of the same classes.
    seed: At least 0.

  Returns:
    The examples to train on, and to test on (none by default).
  """
  if num_rows < num_classes:
    raise ValueError(
      f'num_rows must be at least num_classes={num_classes}, got {num_rows}.'
    )
  rng = np.random.default_rng(seed)
  vocabulary = num_features - 1
  own = rng.integers(0, vocabulary, (num_classes, own_words))
  names = tuple(map(str, range(num_classes)))

  def draw(labels):
    lengths = 1 + rng.poisson(num_words - 1, labels.size)
    rows = np.repeat(np.arange(labels.size), lengths)
    general = _zipf(rng, rows.size, vocabulary, 1.0)
    special = own[labels[rows], _zipf(rng, rows.size, own_words, 1.0)]
    words = np.where(rng.random(rows.size) < 0.5, general, special)
    ones = np.ones(rows.size)
    shape = labels.size, vocabulary
    counts = scipy.sparse.csr_array((ones, (rows, words)), shape)
    counts.sum_duplicates()
    counts.data = 1 + np.log(counts.data)
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    counts.data /= np.repeat(norms, np.diff(counts.indptr))
    constant = np.ones((labels.size, 1))
    return examples.Examples(
      rows_lib.from_csr(scipy.sparse.hstack([counts, constant], format='csr')),
      labels.astype(np.int32),
      names,
    )

  more = _zipf(rng, num_rows - num_classes, num_classes, 0.5)
  labels = rng.permutation(np.concatenate([np.arange(num_classes), more]))
  train = draw(labels)
  return train, draw(_zipf(rng, num_test, num_classes, 0.5))


def interactions(
  num_rows: int = 960,
  num_features: int = 32,
  rank: int = 4,
  *,
  task: str = 'classification',
  density: float = 0.4,
  noise: float = 0.1,
  num_test: int = 0,
  seed: int = 0,
) -> Interactions:
  r"""Rows whose features act in pairs, as a factorisation machine says.

  With the defaults the problems of `ds_facto.md` §6 (a) and (b): normal values
  where a feature is active, :math:`w_0 = 0.3`, :math:`w_d \sim N(0, 0.5^2)`,
  :math:`v_{dk} \sim N(0, 0.4^2)`, and of the score :math:`f` either the label
  1 with probability :math:`1 / (1 + e^{-2 f})`, else -1, or the number
  :math:`f` with noise.

  Args:
    num_rows: N.
    num_features: D.
    rank: K.
    task: 'classification' or 'regression'.
    density: The share of features that are active, in (0, 1].
    noise: Its standard deviation in regression.
    num_test: Further rows of the same model.
    seed: At least 0.

  Returns:
    The rows with labels -1 and 1 or numbers, float32, and the model.

  Raises:
    ValueError: If there is no such task.
  """
  tasks = ('classification', 'regression')
  if task not in tasks:
    raise ValueError(f'task must be one of {tasks}, got {task!r}.')
  rng = np.random.default_rng(seed)

  def draw(count):
    shape = count, num_features
    return rng.normal(size=shape) * (rng.random(shape) < density)

  x = draw(num_rows)
  bias, weights = 0.3, 0.5 * rng.normal(size=num_features)
  factors = 0.4 * rng.normal(size=(num_features, rank))

  def label(x):
    squares = (x @ factors) ** 2 - x**2 @ factors**2
    scores = bias + x @ weights + squares.sum(axis=1) / 2
    if task == 'regression':
      labels = scores + noise * rng.normal(size=len(x))
    else:
      chance = scipy.special.expit(2 * scores)
      labels = np.where(rng.random(len(x)) < chance, 1.0, -1.0)
    return examples.Examples(rows_lib.from_dense(x), labels.astype(np.float32))

  return Interactions(label(x), label(draw(num_test)), bias, weights, factors)


def _zipf(
  rng: np.random.Generator, count: int, size: int, power: float
) -> np.ndarray:
  """Numbers below `size`, number i as often as (1 + i)^-power says; int64."""
  ends = np.cumsum((1.0 + np.arange(size)) ** -power)
  found = np.searchsorted(ends, rng.random(count) * ends[-1], 'right')
  return np.minimum(found, size - 1)
