"""The doubly separable form of softmax regression: identities of section 5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import special
from sklearn import linear_model

from emc2 import mesh as mesh_lib
from emc2.kernels import softmax_block
from emc2.separable import ds_mlr, mlr_cells

from tests.separable import ds_mlr_oracle as oracle
from tests.separable import ds_mlr_training as training

RIDGE = 1e-2
CLASSES = 5


def draw(seed=1):
  """Toy data, and weights and auxiliary variables at random."""
  x, y = oracle.toy()
  rng = np.random.default_rng(seed)
  return x, y, rng.normal(size=(7, CLASSES)), rng.normal(size=200) - 2


@functools.cache
def compiled_objective(num_devices=0):
  """L with its gradient, over batches of any shape."""
  mesh = None
  if num_devices:
    mesh = mesh_lib.make(jax.devices()[:num_devices], ring=num_devices)
  value = functools.partial(ds_mlr.objective, mesh=mesh)
  ask = lambda w, batch, ridge: jax.value_and_grad(value)(w, batch, ridge=ridge)
  return jax.jit(ask)


def objective(w, x, y, ridge=RIDGE, **cut):
  """L and its gradient at (D, K)."""
  with jax.enable_x64(True):
    batch, layout = mlr_cells.split(x, y, w.shape[1], **cut)
    value, slope = compiled_objective()(
      jnp.asarray(layout.place_weights(w)),
      training.double(batch),
      jnp.float64(ridge),
    )
    return float(value), layout.sort_weights(slope)


def move(w, u, x, y, *, refresh='fused', ridge=RIDGE, **settings):
  """A pass with a step size of 1: what weights and normalisers do."""
  found = training.train(
    x,
    y,
    w.shape[1],
    ridge=ridge,
    eta=1.0,
    decay=0.0,
    num_passes=1,
    start=(w, u),
    refresh=refresh,
    **settings,
  )
  return found.weights - w, found.normalizers - u


class FormTest(parameterized.TestCase):
  def test_sum(self):
    x, y, w, b = draw()
    want = oracle.separated(w, b, x, y, RIDGE)
    total = oracle.pairs(w, b, x, y, RIDGE).sum()
    np.testing.assert_allclose(total, want, rtol=0, atol=1e-12)

  def test_gap(self):
    x, y, w, far = draw()
    exact = -special.logsumexp(x @ w, axis=1)
    value, _ = objective(w, x, y)
    for b in (far, exact, exact + 1e-3):
      error = b - exact
      gap = oracle.separated(w, b, x, y, RIDGE) - value
      want = np.mean(np.exp(error) - error - 1)
      np.testing.assert_allclose(gap, want, rtol=0, atol=1e-12)
      self.assertEqual(gap > 1e-12, np.abs(error).max() > 0)

  def test_envelope(self):
    x, y, w, _ = draw()
    b = -special.logsumexp(x @ w, axis=1)
    want = oracle.gradient(w, x, y, RIDGE)
    by_w, by_b = oracle.separated_gradient(w, b, x, y, RIDGE)
    np.testing.assert_allclose(by_w, want, rtol=0, atol=1e-14)
    np.testing.assert_allclose(by_b, 0, rtol=0, atol=1e-14)
    _, slope = objective(w, x, y)
    np.testing.assert_allclose(slope, want, rtol=0, atol=1e-14)
    # So a pass of one full batch is a step of descent.
    moved, _ = move(w, -b, x, y)
    np.testing.assert_allclose(moved, -want, rtol=0, atol=1e-14)

  def test_steps_are_unbiased(self):
    x, y, w, b = draw()
    by_w, by_b = oracle.separated_gradient(w, b, x, y, RIDGE)
    pairs = oracle.mean_of_pair_steps(w, b, x, y, RIDGE)
    np.testing.assert_allclose(pairs[0], by_w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pairs[1], by_b, rtol=0, atol=1e-12)
    # Ours of all rows and classes, and the mean of ours of minibatches; a row's
    # variable goes N times as far, as it would by pairs when N are drawn.
    moved, lifted = move(w, -b, x, y, refresh='sgd')
    np.testing.assert_allclose(moved, -by_w, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lifted, 200 * by_b, rtol=0, atol=1e-12)
    order = np.random.default_rng(0).permutation(200).reshape(4, 50)
    cut = dict(slots=2, allow_empty=True)
    moved = [move(w, -b[i], x[i], y[i], cut=cut)[0] for i in order]
    np.testing.assert_allclose(np.mean(moved, 0), -by_w, rtol=0, atol=1e-12)
    self.assertGreater(np.abs(moved[0] + by_w).max(), 1e-2)

  def test_convex_in_the_logarithm_only(self):
    x, y, _, _ = draw()
    rng = np.random.default_rng(2)
    value = lambda w, b: oracle.separated(w, b, x, y, RIDGE)
    for _ in range(100):
      (w, b), (v, c) = (
        (rng.normal(size=(7, CLASSES)), rng.normal(size=200)) for _ in range(2)
      )
      t = rng.uniform(0.1, 0.9)
      between = value(t * w + (1 - t) * v, t * b + (1 - t) * c)
      bend = 0.5 * RIDGE * t * (1 - t) * np.sum((w - v) ** 2)
      chord = t * value(w, b) + (1 - t) * value(v, c)
      self.assertLessEqual(between, chord - bend + 1e-12)
    term = lambda z, a: a * np.exp(z) - np.log(a)
    z, a = rng.normal(size=(2, 1000)), rng.uniform(0.01, 3, (2, 1000))
    middle = term(z.mean(0), a.mean(0))
    self.assertGreater(np.max(middle - term(z, a).mean(0)), 0.1)

  def test_floor_is_safe(self):
    x, y, w, b = draw()
    rng = np.random.default_rng(3)
    before = oracle.pairs(w, b, x, y, RIDGE).sum(1)
    visit = functools.partial(softmax_block.softmax_block, normalizer='floor')
    visit = jax.jit(visit)
    for size in (1, 2, 5):
      order = rng.permutation(CLASSES)
      scores = (x @ w)[:, order]
      own = special.logsumexp(scores[:, :size], axis=1)
      after = oracle.pairs(w, -np.maximum(-b, own), x, y, RIDGE).sum(1)
      self.assertLessEqual(np.max(after - before), 1e-15)
      # Scores for weights and rows of the identity: probabilities come out.
      found = visit(
        jnp.eye(200),
        jnp.asarray(scores, jnp.float32),
        jnp.asarray(-b, jnp.float32),
        jnp.full(200, -1, jnp.int32),
        jnp.ones(200),
        jnp.int32(size),
      ).gradient
      sums = np.sum(found, axis=1)
      self.assertEqual(np.max(found[:, size:], initial=0), 0)
      self.assertLessEqual(sums.max(), 1 + 1e-5)
      self.assertGreater(sums.max(), 0.999)
    self.assertGreater(np.exp(x @ w + b[:, None]).max(), 5)

  def test_label_shifted_form(self):
    x, y, w, _ = draw()
    z = x @ w
    labels = z[np.arange(200), y]
    others = z - labels[:, None]
    others[np.arange(200), y] = -np.inf
    exact = special.logsumexp(z, axis=1) - labels
    self.assertGreaterEqual(exact.min(), 0)
    for shifted in (np.random.default_rng(4).uniform(0, 3, 200), exact):
      each = shifted + np.exp(-shifted)
      each += np.exp(others - shifted[:, None]).sum(1) - 1
      total = each.mean() + 0.5 * RIDGE * np.sum(w**2)
      ours = oracle.separated(w, -(shifted + labels), x, y, RIDGE)
      np.testing.assert_allclose(ours, total, rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(total, objective(w, x, y)[0], atol=1e-12)


class JacobiTest(parameterized.TestCase):
  def test_is_descent(self):
    self._descend(4, 2, 3)

  @parameterized.parameters(
    (1, 1, 1), (1, 3, 2), (2, 1, 2), (4, 1, 1), (8, 1, 2)
  )
  @pytest.mark.slow
  def test_is_descent_on_all_rings(self, workers, slots, parts):
    self._descend(workers, slots, parts)

  def _descend(self, workers, slots, parts):
    x, y = oracle.synthetic(num_rows=98, num_features=6, num_classes=9)
    w = np.zeros((6, 9))
    with jax.enable_x64(True):
      batch, layout = mlr_cells.split(
        x,
        y,
        9,
        num_workers=workers,
        slots=slots,
        num_minibatches=parts,
        allow_empty=True,
      )
      batch = training.double(batch)
      weights = jnp.asarray(layout.place_weights(w))
      for _ in range(20):
        value, slope = compiled_objective()(weights, batch, 1e-3)
        weights = weights - 0.5 * slope
        want = oracle.objective(w, x, y, 1e-3)
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-12)
        w -= 0.5 * oracle.gradient(w, x, y, 1e-3)
        found = layout.sort_weights(weights)
        np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.sum(1), 0, rtol=0, atol=1e-12)
    self.assertLess(float(value), np.log(9) - 0.2)

  def test_over_devices_and_weights_of_rows(self):
    x, y = oracle.synthetic(num_rows=98, num_features=6, num_classes=9)
    omega = np.random.default_rng(5).uniform(0, 2, 98).astype('float32')
    w = np.random.default_rng(6).normal(size=(6, 9))
    with jax.enable_x64(True):
      batch, layout = mlr_cells.split(
        x, y, 9, num_workers=8, row_weights=omega, allow_empty=True
      )
      mesh = mesh_lib.make(jax.devices()[:8], ring=8)
      batch, weights = mesh_lib.place(
        (training.double(batch), layout.place_weights(w)), mesh, training.RING
      )
      value, slope = compiled_objective(8)(weights, batch, 1e-3)
      alone = functools.partial(ds_mlr.objective, ridge=1e-3, mesh=mesh)
      alone = jax.jit(alone)(weights, batch)
      np.testing.assert_allclose(alone, value, rtol=0, atol=1e-12)
    omega = omega.astype(float)
    want = oracle.objective(w, x, y, 1e-3, omega)
    np.testing.assert_allclose(value, want, rtol=0, atol=1e-12)
    want = oracle.gradient(w, x, y, 1e-3, omega)
    got = layout.sort_weights(slope)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)

  @pytest.mark.slow
  def test_slope_of_what_follows(self):
    x, y, w, _ = draw()
    batch, layout = mlr_cells.split(x.astype('float32'), y, CLASSES)
    weights = jnp.asarray(layout.place_weights(w), jnp.float32)
    value = functools.partial(ds_mlr.objective, batch=batch, ridge=RIDGE)
    got = jax.grad(lambda w: 3 * value(w) ** 2)(weights)
    loss, slope = (
      ask(w, x, y, RIDGE) for ask in (oracle.objective, oracle.gradient)
    )
    want = layout.place_weights(6 * loss * slope)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


class NormalizerTest(parameterized.TestCase):
  def _error(self, eta, num_passes=1, **settings):
    x, y = oracle.synthetic(num_rows=96, num_features=6, num_classes=9)
    found = training.train(
      x,
      y,
      9,
      ridge=1e-3,
      eta=eta,
      num_passes=num_passes,
      cut=settings.pop('cut', dict(num_workers=4, num_minibatches=2)),
      **settings,
    )
    exact = special.logsumexp(x @ found.weights, axis=1)
    self.assertGreater(np.abs(found.weights).max(), 1e-3)
    return np.abs(found.normalizers - exact).max(), found, (x, y)

  @pytest.mark.slow
  def test_exact_after_two_rotations_or_one_worker(self):
    for num_passes in (1, 3):
      error, found, data = self._error(0.5, num_passes, refresh='two_pass')
      self.assertLessEqual(error, 1e-12)
    want = oracle.objective(found.weights, *data, 1e-3)
    self.assertAlmostEqual(found.losses[-1], want, places=12)
    cut = dict(slots=3, num_minibatches=2)
    error, found, data = self._error(0.5, 3, cut=cut)
    self.assertLessEqual(error, 1e-12)
    want = oracle.objective(found.weights, *data, 1e-3)
    self.assertAlmostEqual(found.losses[-1], want, places=12)

  def test_lag_is_of_the_order_of_the_step(self):
    lags = [self._error(eta)[0] for eta in (0.02, 0.01, 0.005)]
    self.assertGreater(lags[0], 5e-4)
    np.testing.assert_allclose(np.divide(lags[:2], lags[1:]), 2, rtol=0.1)


class PoissonTest(parameterized.TestCase):
  def test_weights_are_poisson_regressions_with_an_offset(self):
    x, y, _, b = draw()
    w = oracle.fit_poisson(b, x, y, CLASSES, RIDGE)
    moved, _ = move(w, -b, x, y)
    np.testing.assert_allclose(moved, 0, rtol=0, atol=1e-12)
    # An offset is a weight of rows, with targets over it.
    weights = np.exp(b)
    model = linear_model.PoissonRegressor(
      alpha=RIDGE * 200 / weights.sum(),
      fit_intercept=False,
      tol=1e-10,
      solver='newton-cholesky',
    )
    model.fit(x, (y == 2) / weights, sample_weight=weights)
    np.testing.assert_allclose(model.coef_, w[:, 2], rtol=0, atol=1e-8)

  @pytest.mark.slow
  def test_blocks_do_not_matter_to_each_other(self):
    x, y, w, b = draw()
    alone, _ = move(w, -b, x, y)
    split, _ = move(w, -b, x, y, cut=dict(slots=5))
    np.testing.assert_allclose(split, alone, rtol=0, atol=1e-14)

  def test_intercepts_are_shares(self):
    _, y = oracle.toy()
    x, shares = np.ones((200, 1)), np.bincount(y) / 200
    for b in (-3.0, 0.0, 1.5):
      w = np.log(shares)[None] - b
      moved, _ = move(w, np.full(200, -b), x, y, ridge=0.0)
      np.testing.assert_allclose(moved, 0, rtol=0, atol=1e-15)
      np.testing.assert_allclose(special.softmax(w[0]), shares, atol=1e-15)
      _, slope = objective(w, x, y, 0.0)
      np.testing.assert_allclose(slope, 0, rtol=0, atol=1e-15)
      found = oracle.fit_poisson(np.full(200, b), x, y, CLASSES, 0.0)
      np.testing.assert_allclose(found, w, rtol=0, atol=1e-12)

  def test_alternation_is_the_log_concavity_method(self):
    x, y = oracle.toy()
    best, least = oracle.minimize(x, y, CLASSES, RIDGE)
    # Lemma 1 of the paper, on the way.
    norm, bound = np.sum(best**2), 2 / RIDGE * np.log(CLASSES)
    self.assertAlmostEqual(norm, 14.9, delta=0.05)
    self.assertAlmostEqual(bound, 321.9, delta=0.05)
    w, gaps, last = np.zeros((7, CLASSES)), [], np.inf
    for _ in range(55):
      b = -special.logsumexp(x @ w, axis=1)
      w = oracle.fit_poisson(b, x, y, CLASSES, RIDGE)
      after = oracle.separated(w, b, x, y, RIDGE)
      value, _ = objective(w, x, y)
      self.assertLessEqual(value, after)
      self.assertLessEqual(after, last)
      last = value
      gaps.append(value - least)
    ratios = np.divide(gaps[1:], gaps[:-1])
    self.assertLess(ratios.max(), 0.915)
    self.assertBetween(ratios[19:].min(), 0.865, 0.915)
    self.assertAlmostEqual(gaps[-1], 9e-6, delta=1e-6)
