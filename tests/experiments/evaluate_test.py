"""Probes against NumPy loops, neighbours against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from sklearn import datasets, neighbors

from emc2.experiments import evaluate


def _problem(n=50, m=40, width=6, num_classes=4, seed=0):
  """Classes that overlap, so that no accuracy is 1."""
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(num_classes, width))
  labels = rng.integers(0, num_classes, n + m)
  features = centers[labels] + 0.9 * rng.normal(size=(n + m, width))
  features = np.maximum(features, 0).astype(np.float32)
  return features[:n], labels[:n], features[n:], labels[n:]


def _descend(w, b, x, y, *, rate, momentum, decay, batch, epochs, rule):
  """The probe as PyTorch runs it: a loop, in float64."""
  w, b = w.astype(np.float64), b.astype(np.float64)
  mw, mb = np.zeros_like(w), np.zeros_like(b)
  for epoch in range(epochs):
    scale = 1.0
    if rule == 'cosine':
      scale = 0.5 * (1 + np.cos(np.pi * epoch / epochs))
    for start in range(0, len(x), batch):
      rows, targets = x[start : start + batch], y[start : start + batch]
      logits = rows @ w + b
      p = np.exp(logits - logits.max(1, keepdims=True))
      p /= p.sum(1, keepdims=True)
      p[np.arange(len(rows)), targets] -= 1
      p /= len(rows)
      mw = momentum * mw + rows.T @ p + decay * w
      mb = momentum * mb + p.sum(0) + decay * b
      w, b = w - rate * scale * mw, b - rate * scale * mb
  return w, b


def _fit(x, y, *, rate, momentum, decay, batch, epochs, rule, init='uniform'):
  settings = jnp.asarray([rate, momentum, decay], jnp.float32)
  return evaluate.fit_linear(
    jax.random.key(3),
    jnp.asarray(x),
    jnp.asarray(y, jnp.int32),
    settings,
    num_classes=4,
    batch_size=batch,
    num_epochs=epochs,
    schedule=rule,
    init=init,
  )


class LinearProbeTest(parameterized.TestCase):
  base = dict(
    rate=0.1, momentum=0.9, decay=0.0, batch=16, epochs=5, rule='constant'
  )

  @parameterized.parameters(dict(), dict(rate=0.02), dict(momentum=0.5))
  def test_equals_a_loop(self, init='uniform', **change):
    self._check_equals_a_loop(init, **change)

  @parameterized.parameters(
    dict(decay=0.1),
    dict(batch=50),
    dict(epochs=8),
    dict(rule='cosine'),
    dict(init='normal'),
  )
  @pytest.mark.slow
  def test_equals_a_loop_elsewhere(self, init='uniform', **change):
    self._check_equals_a_loop(init, **change)

  def _check_equals_a_loop(self, init='uniform', **change):
    x, y, _, _ = _problem()
    settings = self.base | change
    got = _fit(x, y, init=init, **settings)
    start = _fit(x, y, init=init, **(settings | dict(rate=0.0)))
    args = [np.asarray(start[name]) for name in ('kernel', 'bias')]
    kernel, bias = _descend(*args, x, y, **settings)
    np.testing.assert_allclose(got['kernel'], kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got['bias'], bias, rtol=1e-3, atol=1e-5)
    if change:
      plain = _fit(x, y, **self.base)
      gap = jnp.max(jnp.abs(plain['kernel'] - got['kernel']))
      self.assertGreater(float(gap), 1e-3)

  def test_initial_values(self):
    x = np.zeros((3, 400), np.float32)
    settings = self.base | dict(rate=0.0, batch=3)
    weights = _fit(x, np.zeros(3), **settings)
    for leaf in jax.tree.leaves(weights):
      self.assertLessEqual(float(jnp.max(jnp.abs(leaf))), 0.05)
    self.assertGreater(float(jnp.max(weights['kernel'])), 0.049)
    self.assertGreater(float(jnp.max(jnp.abs(weights['bias']))), 0)
    weights = _fit(x, np.zeros(3), init='normal', **settings)
    self.assertAlmostEqual(float(jnp.std(weights['kernel'])), 0.01, delta=1e-3)
    np.testing.assert_array_equal(weights['bias'], 0)

  def test_accuracy_and_defaults(self):
    x, y, x_test, y_test = _problem()
    key = jax.random.key(3)
    got = evaluate.linear_probe(key, x, y, x_test, y_test, num_classes=4)
    defaults = dict(
      rate=1e-3, momentum=0.9, decay=0.0, batch=50, epochs=100, rule='constant'
    )
    start = _fit(x, y, **(defaults | dict(rate=0.0)))
    args = [np.asarray(start[name]) for name in ('kernel', 'bias')]
    kernel, bias = _descend(*args, x, y, **defaults)
    predicted = np.argmax(x_test @ kernel + bias, axis=1)
    self.assertEqual(got, np.mean(predicted == y_test))

  @parameterized.parameters(
    dict(learning_rate=0.5),
    dict(momentum=0.0),
    dict(weight_decay=5.0),
    dict(batch_size=3),
    dict(num_epochs=1),
    dict(schedule='cosine'),
    dict(init='normal'),
  )
  @pytest.mark.slow
  def test_passes_each_setting_on(self, **change):
    seen = []
    fit = evaluate.fit_linear

    def spy(*args, **kwargs):
      seen.append(fit(*args, **kwargs))
      return seen[-1]

    evaluate.fit_linear = spy
    self.addCleanup(setattr, evaluate, 'fit_linear', fit)
    arrays = _problem(12, 8)
    for kwargs in ({}, change):
      kwargs = dict(learning_rate=0.1, num_epochs=3) | kwargs
      evaluate.linear_probe(jax.random.key(0), *arrays, num_classes=4, **kwargs)
    gap = jnp.max(jnp.abs(seen[0]['kernel'] - seen[1]['kernel']))
    self.assertGreater(float(gap), 1e-5)

  def test_runs_where_transfers_are_forbidden(self):
    key, arrays = jax.random.key(0), _problem(12, 8)
    with jax.transfer_guard('disallow'):
      evaluate.evaluate(key, *arrays, num_classes=4, neighbours=(1,))

  @parameterized.parameters(
    (dict(schedule='linear'), "schedule.*'linear'"),
    (dict(init='zeros'), "init.*'zeros'"),
    (dict(batch_size=0), 'batch_size.*0'),
    (dict(num_epochs=0), 'num_epochs.*0'),
    (dict(num_classes=3), r'labels must lie in \[0, 3\).*3'),
  )
  def test_refuses_settings(self, change, message):
    kwargs = dict(num_classes=4) | change
    with self.assertRaisesRegex(ValueError, message):
      evaluate.linear_probe(jax.random.key(0), *_problem(), **kwargs)


class LogisticProbeTest(parameterized.TestCase):
  def test_digits(self):
    x, y = datasets.load_digits(return_X_y=True)
    args = (x[:1000], y[:1000], x[1000:], y[1000:])
    got = evaluate.logistic_probe(*args, num_classes=10)
    self.assertBetween(got, 0.90, 0.97)

  def test_sees_no_scale(self):
    x, y, x_test, y_test = _problem()
    scale = np.array([1e3, 1e-3, 1, 1, 10, 0.1])
    got, want = (
      evaluate.logistic_probe(x * s, y, x_test * s, y_test, num_classes=4)
      for s in (scale, np.ones(6))
    )
    self.assertEqual(got, want)

  def test_strength(self):
    x, y, x_test, y_test = _problem(60)
    y = np.where(np.arange(60) < 40, 0, y)  # Most are of class 0.
    weak, strong = (
      evaluate.logistic_probe(
        x, y, x_test, y_test, num_classes=4, inverse_strength=c
      )
      for c in (1.0, 1e-8)
    )
    self.assertEqual(strong, np.mean(y_test == 0))
    self.assertNotEqual(weak, strong)


class NeighboursTest(parameterized.TestCase):
  @parameterized.product(k=(1, 2, 10), offset=(0.0, 300.0), limit=(None, 100))
  def test_equals_scikit_learn(self, k, offset, limit):
    x, y, x_test, _ = _problem(60, 33, seed=1)
    x, x_test = x + offset, x_test + offset
    if limit is not None:  # One block, or many.
      full = evaluate._MAX_DISTANCES
      evaluate._MAX_DISTANCES = limit
      self.addCleanup(setattr, evaluate, '_MAX_DISTANCES', full)
    got = evaluate.predict_by_neighbours(x, y, x_test, k=k, num_classes=4)
    # Plain majority; scipy's mode, which it uses, gives the smallest on a tie.
    peer = neighbors.KNeighborsClassifier(k, algorithm='brute')
    want = peer.fit(x.astype(np.float64), y).predict(x_test.astype(np.float64))
    np.testing.assert_array_equal(got, want)
    self.assertEqual(got.dtype, np.int32)

  def test_does_not_normalise(self):
    x, y = np.array([[10.0, 0.0], [1.0, 1.0]]), np.array([0, 1])
    test = np.array([[1.0, 0.0]])
    got = evaluate.predict_by_neighbours(x, y, test, k=1, num_classes=2)
    np.testing.assert_array_equal(got, [1])

  def test_ties(self):
    x, y = np.array([[1.0], [-1.0], [2.0], [-2.0]]), np.array([3, 1, 1, 3])
    test = np.array([[0.0]])
    vote = lambda k: evaluate.predict_by_neighbours(
      x, y, test, k=k, num_classes=4
    )[0]
    self.assertEqual(vote(4), 1)  # Two votes each: the smallest label.
    self.assertEqual(vote(1), 3)  # One distance: the first sample.

  def test_memory_is_bounded(self):
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
    args = (spec(4096, 8), labels, spec(2048, 8))
    sizes = [
      evaluate._vote.lower(*args, 1, 4, block)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
      for block in (16, 2048)
    ]
    self.assertLess(sizes[0], 20 * 16 * 4096)
    self.assertGreater(sizes[1], 4 * 2048 * 4096)

  @parameterized.parameters(0, 51)
  def test_refuses_k(self, k):
    x, y, x_test, _ = _problem()
    with self.assertRaisesRegex(ValueError, rf'k must lie in \[1, 50\].*{k}'):
      evaluate.predict_by_neighbours(x, y, x_test, k=k, num_classes=4)


class EvaluateTest(parameterized.TestCase):
  @parameterized.parameters('sgd', 'sklearn')
  def test_names_and_values(self, probe):
    arrays, key = _problem(), jax.random.key(0)
    settings = dict(sgd=dict(num_epochs=3), sklearn={})[probe]
    got = evaluate.evaluate(
      key, *arrays, num_classes=4, probe=probe, neighbours=(1, 7), **settings
    )
    if probe == 'sgd':
      want = evaluate.linear_probe(key, *arrays, num_classes=4, num_epochs=3)
    else:
      want = evaluate.logistic_probe(*arrays, num_classes=4)
    self.assertEqual(got['probe_accuracy'], want)
    for k in (1, 7):
      peer = neighbors.KNeighborsClassifier(k).fit(*arrays[:2])
      self.assertEqual(got[f'knn{k}_accuracy'], peer.score(*arrays[2:]))
    self.assertLen(got, 3)

  def test_refuses_an_unknown_probe(self):
    with self.assertRaisesRegex(ValueError, "probe.*'svm'"):
      evaluate.evaluate(
        jax.random.key(0), *_problem(), num_classes=4, probe='svm'
      )

  @parameterized.parameters(
    (0, np.zeros((50, 2, 3)), 'train_features.*50, 2, 3'),
    (0, np.zeros((0, 6)), 'train_features.*0, 6'),
    (0, np.full((50, 6), np.nan), 'train_features.*finite'),
    (1, np.zeros(49, np.int32), r'train_labels.*\(49,\)'),
    (1, np.zeros(50), 'train_labels.*float64'),
    (1, np.full(50, -1), 'train_labels.*-1'),
    (2, np.zeros((40, 5)), 'one width.*6 and 5'),
    (3, np.full(40, 4), r'test_labels.*\[0, 4\).*4'),
  )
  def test_refuses_arrays(self, position, wrong, message):
    arrays = list(_problem())
    arrays[position] = wrong
    for probe in evaluate.PROBES:
      with self.assertRaisesRegex(ValueError, message):
        evaluate.evaluate(
          jax.random.key(0), *arrays, num_classes=4, probe=probe
        )


class _OnDisk:
  """Reads like `data.dataset.Source`: by arrays of numbers only."""

  def __init__(self, images):
    self.images, self.shape, self.read = images, images.shape, 0

  def __getitem__(self, index):
    assert isinstance(index, np.ndarray)
    self.read = max(self.read, len(index))
    return self.images[index]


class ExtractFeaturesTest(parameterized.TestCase):
  @parameterized.parameters(1, 3, 7, 10)
  def test_equals_one_batch(self, batch_size):
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 1), np.uint8)
    source, traces = _OnDisk(images), []

    def apply_fn(params, x):
      traces.append(x.shape)
      return x.reshape(x.shape[0], -1) @ params

    for params in (jnp.ones((4, 3)), 2 * jnp.ones((4, 3))):
      got = evaluate.extract_features(
        apply_fn, params, source, batch_size=batch_size
      )
      want = images.reshape(7, 4) / 255.0 @ np.asarray(params)
      np.testing.assert_allclose(got, want, rtol=1e-5)
    fewer = evaluate.extract_features(
      apply_fn, params, images[:2], batch_size=batch_size
    )
    np.testing.assert_allclose(fewer, want[:2], rtol=1e-5)
    self.assertEqual(traces, [(batch_size, 2, 2, 1)])
    self.assertEqual(source.read, batch_size)

  def test_floats_are_not_scaled(self):
    images = np.full((3, 1, 1, 1), 0.5)
    got = evaluate.extract_features(
      lambda _, x: x[:, 0, 0], (), images, batch_size=2
    )
    np.testing.assert_array_equal(got, np.full((3, 1), 0.5, np.float32))

  def test_runs_where_transfers_are_forbidden(self):
    images = np.ones((3, 1, 1, 1), np.uint8)
    with jax.transfer_guard('disallow'):
      evaluate.extract_features(
        lambda _, x: x[:, 0, 0], (), images, batch_size=2
      )

  def test_refuses(self):
    call = lambda n, batch_size: evaluate.extract_features(
      lambda _, x: x, (), np.zeros((n, 1, 1, 1)), batch_size=batch_size
    )
    with self.assertRaisesRegex(ValueError, r'images.*\(0, 1, 1, 1\)'):
      call(0, 2)
    with self.assertRaisesRegex(ValueError, 'batch_size.*0'):
      call(2, 0)
