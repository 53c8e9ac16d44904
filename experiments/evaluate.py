"""What frozen features are worth: linear probes and nearest neighbours."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import linear_model, pipeline, preprocessing

PROBES = ('sgd', 'sklearn')
SCHEDULES = ('constant', 'cosine')
INITS = ('uniform', 'normal')
NORMAL_STD = 0.01

# Distances held at once by the nearest neighbours: 128 MiB of float32.
_MAX_DISTANCES = 2**25


def extract_features(
  apply_fn: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  images: Any,
  *,
  batch_size: int,
) -> np.ndarray:
  """Computes the features of many images, a batch at a time.

  All batches have one size, the last is filled up, so that one compiled
  function serves all calls with the same `apply_fn` and `batch_size`.

  Args:
    apply_fn: `(params, images) -> (n, d)`, each row of its own image alone;
      takes float32 in [0, 1].
    params: Of `apply_fn`.
    images: (n, height, width, channels), uint8 in [0, 255] or floats in [0, 1];
      an array, or anything with a `shape` that an array of numbers indexes.
    batch_size: Images at a time.

  Returns:
    (n, d), in the memory of the host.

  Raises:
    ValueError: If there are no images, or `batch_size` is below 1.

  Examples:
    >>> brightest = lambda params, x: x.max((1, 2))
    >>> images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    >>> extract_features(brightest, (), images, batch_size=2).round(2).tolist()
    [[0.0], [0.20000000298023224], [1.0]]
  """
  num_images = images.shape[0]
  if num_images < 1:
    raise ValueError(f'images must not be empty, got shape {images.shape}.')
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
  parts = []
  for start in range(0, num_images, batch_size):
    index = np.arange(start, start + batch_size)
    index = np.minimum(index, num_images - 1)
    batch = jax.device_put(np.asarray(images[index]))
    parts.append(jax.device_get(_apply(apply_fn, params, batch)))
  return np.concatenate(parts)[:num_images]


@functools.partial(jax.jit, static_argnums=0)
def _apply(apply_fn, params, images):
  if jnp.issubdtype(images.dtype, jnp.integer):
    images = images.astype(jnp.float32) / 255
  return apply_fn(params, images.astype(jnp.float32))


def linear_probe(
  key: jax.Array,
  train_features: jax.typing.ArrayLike,
  train_labels: jax.typing.ArrayLike,
  test_features: jax.typing.ArrayLike,
  test_labels: jax.typing.ArrayLike,
  *,
  num_classes: int,
  learning_rate: float = 1e-3,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  batch_size: int = 1024,
  num_epochs: int = 100,
  schedule: str = 'constant',
  init: str = 'uniform',
) -> float:
  r"""Trains a linear classifier by gradient descent, and tests it.

  The mean cross-entropy of each batch, by descent with momentum, over the
  samples in the order in which they stand, epoch after epoch; the last batch of
  an epoch is smaller where the batch size does not divide the samples.

  The defaults are the protocol of EMC²; it is under-converged by design, so
  compare it only with itself. SogCLR's recipe has `learning_rate=0.4,
  num_epochs=90, schedule='cosine', init='normal'`.

  Args:
    key: PRNG key, of the initial weights.
    train_features: (n, d), float.
    train_labels: (n,), integers in [0, num_classes).
    test_features: (m, d), float.
    test_labels: (m,), integers in [0, num_classes).
    num_classes: Static.
    learning_rate: Step size, at the start.
    momentum: In [0, 1).
    weight_decay: Of an L2 term of the gradient, on weights and bias.
    batch_size: Samples a step, static.
    num_epochs: Static.
    schedule: 'constant', or 'cosine': in epoch `e` of `E`, counted from 0, the
      step size is multiplied by :math:`(1 + \cos(\pi e / E)) / 2`. Static.
    init: 'uniform', weights and bias on :math:`\pm d^{-1/2}` as PyTorch has it,
      or 'normal', weights of standard deviation 0.01 and no bias. Static.

  Returns:
    Share of the test samples whose largest logit is their label's.

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.

  References:
    The released code of Yau et al., "EMC2", 2024,
    https://arxiv.org/abs/2404.10575, and of Yuan et al., "SogCLR", 2022,
    https://arxiv.org/abs/2202.12387.
  """
  train = _check(train_features, train_labels, num_classes, 'train')
  test = _check(test_features, test_labels, num_classes, 'test')
  _check_widths(train[0], test[0])
  for name, value, choices in (
    ('schedule', schedule, SCHEDULES),
    ('init', init, INITS),
  ):
    if value not in choices:
      raise ValueError(f'{name} must be one of {choices}, got {value!r}.')
  for name, value in (('batch_size', batch_size), ('num_epochs', num_epochs)):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}.')
  settings = np.array([learning_rate, momentum, weight_decay], np.float32)
  weights = fit_linear(
    key,
    *jax.device_put(train),
    jax.device_put(settings),
    num_classes=num_classes,
    batch_size=min(batch_size, train[0].shape[0]),
    num_epochs=num_epochs,
    schedule=schedule,
    init=init,
  )
  kernel, bias = jax.device_get((weights['kernel'], weights['bias']))
  predicted = np.argmax(test[0] @ kernel + bias[None, :], axis=1)
  return float(np.mean(predicted == test[1]))


@functools.partial(
  jax.jit,
  static_argnames=(
    'num_classes',
    'batch_size',
    'num_epochs',
    'schedule',
    'init',
  ),
)
def fit_linear(
  key: jax.Array,
  features: jax.Array,
  labels: jax.Array,
  settings: jax.Array,
  *,
  num_classes: int,
  batch_size: int,
  num_epochs: int,
  schedule: str,
  init: str,
) -> dict[str, jax.Array]:
  """Trains the classifier of :func:`linear_probe`, in one compiled loop.

  Args:
    key: PRNG key, of the initial weights.
    features: (n, d), float32.
    labels: (n,), int32.
    settings: (3,), float32: learning rate, momentum, weight decay.
    num_classes: Static, as all that follow.
    batch_size: At most n.
    num_epochs: As in :func:`linear_probe`.
    schedule: As in :func:`linear_probe`.
    init: As in :func:`linear_probe`.

  Returns:
    `kernel` (d, num_classes) and `bias` (num_classes,), float32.
  """
  num_samples, width = features.shape
  steps_per_epoch = -(-num_samples // batch_size)
  learning_rate, momentum, weight_decay = settings

  def rate(count):
    if schedule == 'constant':
      return learning_rate
    epoch = (count // steps_per_epoch).astype(jnp.float32)
    return learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * epoch / num_epochs))

  tx = optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.trace(decay=momentum),
    optax.scale_by_learning_rate(rate),
  )
  kernel_key, bias_key = jax.random.split(key)
  if init == 'uniform':
    bound = 1 / np.sqrt(width)
    draw = functools.partial(
      jax.random.uniform, minval=-bound, maxval=bound, dtype=jnp.float32
    )
    weights = {
      'kernel': draw(kernel_key, (width, num_classes)),
      'bias': draw(bias_key, (num_classes,)),
    }
  else:
    shape = (width, num_classes)
    weights = {
      'kernel': NORMAL_STD * jax.random.normal(kernel_key, shape),
      'bias': jnp.zeros((num_classes,), jnp.float32),
    }

  # Filled up to whole batches; what was filled in weighs nothing.
  missing = steps_per_epoch * batch_size - num_samples
  cut = lambda x: x.reshape(steps_per_epoch, batch_size, *x.shape[1:])
  features = cut(jnp.pad(features, ((0, missing), (0, 0))))
  labels = cut(jnp.pad(labels, (0, missing)))
  counted = cut(jnp.pad(jnp.ones((num_samples,), jnp.float32), (0, missing)))

  def loss_fn(weights, features, labels, counted):
    logits = features @ weights['kernel'] + weights['bias'][None, :]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.vdot(each, counted) / jnp.sum(counted)

  def step(carry, batch):
    weights, opt_state = carry
    grads = jax.grad(loss_fn)(weights, *batch)
    updates, opt_state = tx.update(grads, opt_state, weights)
    return (optax.apply_updates(weights, updates), opt_state), None

  def epoch(carry, _):
    return jax.lax.scan(step, carry, (features, labels, counted))

  carry = (weights, tx.init(weights))
  (weights, _), _ = jax.lax.scan(epoch, carry, length=num_epochs)
  return weights


def logistic_probe(
  train_features: jax.typing.ArrayLike,
  train_labels: jax.typing.ArrayLike,
  test_features: jax.typing.ArrayLike,
  test_labels: jax.typing.ArrayLike,
  *,
  num_classes: int,
  inverse_strength: float = 1.0,
  max_iterations: int = 1000,
) -> float:
  """Fits scikit-learn's logistic regression to convergence, and tests it.

  For data so small that :func:`linear_probe` hardly moves. Each feature is
  brought to mean 0 and variance 1 on the training samples.

  Args:
    train_features: (n, d), float.
    train_labels: (n,), integers in [0, num_classes), of at least two classes.
    test_features: (m, d), float.
    test_labels: (m,), integers in [0, num_classes).
    num_classes: How many labels there are.
    inverse_strength: scikit-learn's `C`; the larger, the less regularised.
    max_iterations: Of the solver.

  Returns:
    Share of the test samples that it gets right.

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.
  """
  train = _check(train_features, train_labels, num_classes, 'train')
  test = _check(test_features, test_labels, num_classes, 'test')
  _check_widths(train[0], test[0])
  model = pipeline.make_pipeline(
    preprocessing.StandardScaler(),
    linear_model.LogisticRegression(
      C=inverse_strength, max_iter=max_iterations
    ),
  )
  model.fit(*train)
  return float(model.score(*test))


def predict_by_neighbours(
  train_features: jax.typing.ArrayLike,
  train_labels: jax.typing.ArrayLike,
  test_features: jax.typing.ArrayLike,
  *,
  k: int,
  num_classes: int,
) -> np.ndarray:
  """Labels each test sample by a vote of its `k` nearest training samples.

  Euclidean distance, one vote each; the smallest label wins a tie, and the
  first of the training samples where distances tie.

  Args:
    train_features: (n, d), float, not normalised.
    train_labels: (n,), integers in [0, num_classes).
    test_features: (m, d), float.
    k: From 1 to n.
    num_classes: How many labels there are.

  Returns:
    (m,), int32.

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.

  Examples:
    >>> train = np.array([[0.0], [1.0], [5.0]]), np.array([2, 1, 0])
    >>> test = np.array([[0.4], [4.0]])
    >>> predict_by_neighbours(*train, test, k=1, num_classes=3).tolist()
    [2, 0]
    >>> predict_by_neighbours(*train, test[:1], k=2, num_classes=3).tolist()
    [1]
  """
  train, labels = _check(train_features, train_labels, num_classes, 'train')
  test = _check_features(test_features, 'test')
  _check_widths(train, test)
  if not 1 <= k <= train.shape[0]:
    raise ValueError(f'k must lie in [1, {train.shape[0]}], got {k}.')
  # The same shift for both keeps the distances, and their digits.
  center = np.mean(train, axis=0, dtype=np.float64).astype(np.float32)
  arrays = (train - center[None, :], labels, test - center[None, :])
  block = min(test.shape[0], max(1, _MAX_DISTANCES // train.shape[0]))
  votes = _vote(*jax.device_put(arrays), k, num_classes, block)
  return jax.device_get(votes)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _vote(train, labels, test, k, num_classes, block):
  square = jnp.sum(train * train, axis=1)

  def vote(row):
    # The row's own square is the same for all, so it orders nothing.
    product = jnp.dot(train, row, precision=jax.lax.Precision.HIGHEST)
    _, nearest = jax.lax.top_k(2 * product - square, k)
    counts = jnp.zeros((num_classes,), jnp.int32).at[labels[nearest]].add(1)
    return jnp.argmax(counts).astype(jnp.int32)

  return jax.lax.map(vote, test, batch_size=block)


def evaluate(
  key: jax.Array,
  train_features: jax.typing.ArrayLike,
  train_labels: jax.typing.ArrayLike,
  test_features: jax.typing.ArrayLike,
  test_labels: jax.typing.ArrayLike,
  *,
  num_classes: int,
  probe: str = 'sgd',
  neighbours: Sequence[int] = (1, 10),
  **settings: Any,
) -> dict[str, float]:
  """Probes features in every way that the paper reports.

  Args:
    key: PRNG key, of the probe's initial weights.
    train_features: (n, d), float.
    train_labels: (n,), integers in [0, num_classes).
    test_features: (m, d), float.
    test_labels: (m,), integers in [0, num_classes).
    num_classes: How many labels there are.
    probe: 'sgd', :func:`linear_probe`, or 'sklearn', :func:`logistic_probe`.
    neighbours: The `k` of :func:`predict_by_neighbours`.
    **settings: Of the probe.

  Returns:
    `probe_accuracy`, and `knnK_accuracy` for each K, in [0, 1].

  Raises:
    ValueError: If an argument is out of its range, or shapes do not fit.
  """
  if probe not in PROBES:
    raise ValueError(f'probe must be one of {PROBES}, got {probe!r}.')
  arrays = (train_features, train_labels, test_features, test_labels)
  if probe == 'sgd':
    accuracy = linear_probe(key, *arrays, num_classes=num_classes, **settings)
  else:
    accuracy = logistic_probe(*arrays, num_classes=num_classes, **settings)
  result = {'probe_accuracy': accuracy}
  for k in neighbours:
    predicted = predict_by_neighbours(*arrays[:3], k=k, num_classes=num_classes)
    right = predicted == np.asarray(test_labels)
    result[f'knn{k}_accuracy'] = float(np.mean(right))
  return result


def _check_features(features, name):
  features = np.asarray(features, np.float32)
  if features.ndim != 2 or features.shape[0] < 1:
    raise ValueError(
      f'{name}_features must be (samples, width), at least one sample, got '
      f'shape {features.shape}.'
    )
  if not np.all(np.isfinite(features)):
    raise ValueError(f'{name}_features must be finite, got nan or inf.')
  return features


def _check(features, labels, num_classes, name):
  features = _check_features(features, name)
  labels = np.asarray(labels)
  if labels.shape != features.shape[:1] or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'{name}_labels must be {features.shape[:1]} integers, got shape '
      f'{labels.shape} and dtype {labels.dtype}.'
    )
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
      f'{name}_labels must lie in [0, {num_classes}), got '
      f'{labels.min()} to {labels.max()}.'
    )
  return features, labels.astype(np.int32)


def _check_widths(train, test):
  if train.shape[1] != test.shape[1]:
    raise ValueError(
      'train_features and test_features must have one width, got '
      f'{train.shape[1]} and {test.shape[1]}.'
    )
