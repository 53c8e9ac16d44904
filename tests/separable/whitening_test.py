"""Coordinates of softmax regression against its curvature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from scipy import optimize

from emc2.separable import ds_mlr, mlr_cells, rows, whitening

from tests.separable import ds_mlr_oracle as oracle

RIDGE = 1e-3


def draw(num_rows=300, num_classes=12):
  """Features of which few are frequent, as words are."""
  rng = np.random.default_rng(0)
  often = 1 / (1 + np.arange(20)) ** 0.7
  x = (rng.random((num_rows, 20)) < often) * rng.uniform(0.5, 3, (num_rows, 20))
  x = x[:, rng.permutation(20)].astype('float32')
  scores = x @ rng.normal(size=(20, num_classes))
  y = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
  y[:num_classes] = np.arange(num_classes)
  x[~x.any(1), 0] = 1
  return x, y


class WhiteningTest(parameterized.TestCase):
  @parameterized.parameters((6, True), (256, False), (0, False))
  def test_square_is_the_inverse_of_the_curvature(self, num_rotated, sparse):
    x, y = draw()
    features = rows.from_dense(x) if sparse else x
    _, layout = mlr_cells.split(features, y, 12, slots=5)
    found = whitening.fit(
      features,
      y,
      layout,
      ridge=RIDGE,
      num_rotated=num_rotated,
      curvature=0.7,
    )
    for leaf in jax.tree.leaves(found):
      self.assertEqual(leaf.dtype, np.float32)
    weights = np.random.default_rng(1).normal(size=(20, 12)).astype('float32')
    placed = jnp.asarray(layout.place_weights(weights))
    unwhiten = functools.partial(whitening.unwhiten, found)
    value, pull = jax.vjp(unwhiten, placed)
    self.assertEqual(value.dtype, jnp.float32)
    got = layout.sort_weights(unwhiten(pull(placed)[0]))
    moments = x.T @ x / len(x)
    first = layout.feature_ids[:num_rotated]
    together = np.isin(np.arange(20), first)
    together = together[:, None] & together[None]
    moments = np.where(together | np.eye(20, dtype=bool), moments, 0)
    center = lambda w: w - w.mean(axis=1, keepdims=True)
    want = center(weights)
    for k in range(12):
      curvature = 0.7 * np.mean(y == k) * moments + RIDGE * np.eye(20)
      want[:, k] = np.linalg.solve(curvature, want[:, k])
    np.testing.assert_allclose(got, center(want), rtol=2e-3, atol=2e-2)

  def test_is_linear_and_sums_to_0(self):
    x, y = draw()
    _, layout = mlr_cells.split(x, y, 12, slots=5)
    found = whitening.fit(x, y, layout, ridge=RIDGE, num_rotated=6)
    shape = 5, 20, 3
    one, other = np.random.default_rng(2).normal(size=(2, *shape))
    one, other = (jnp.asarray(x, jnp.float32) for x in (one, other))
    unwhiten = functools.partial(whitening.unwhiten, found)
    sum_ = unwhiten(one) + 2 * unwhiten(other)
    got = unwhiten(one + 2 * other)
    np.testing.assert_allclose(got, sum_, atol=1e-3)
    np.testing.assert_allclose(np.sum(got, axis=(0, 2)), 0, atol=1e-3)
    gone = np.moveaxis(np.asarray(got), 1, 2)[layout.class_ids < 0]
    self.assertEqual(np.abs(gone).max(), 0)

  def test_reaches_classes_without_rows(self):
    x, y = draw()
    y[y == 4] = 5
    _, layout = mlr_cells.split(x, y, 12, allow_empty=True)
    found = whitening.fit(x, y, layout, ridge=RIDGE)
    weights = whitening.unwhiten(found, jnp.ones((1, 20, 12)))
    self.assertGreater(np.abs(layout.sort_weights(weights)[:, 4]).min(), 0)

  def test_curvature_is_one_where_probabilities_are_equal(self):
    x, _ = draw(num_rows=600)
    num_classes = 60
    y = np.arange(600) % num_classes
    _, layout = mlr_cells.split(x, y, num_classes)
    found = whitening.fit(x, y, layout, ridge=RIDGE, curvature=1.0)
    # The Hessian at 0 along any difference of classes.
    hessian = x.T @ x / 600 / num_classes + RIDGE * np.eye(20)
    ones = np.zeros((20, 1, 20, num_classes), 'float32')
    ones[np.arange(20), 0, np.arange(20), 3] = 0.5**0.5
    ones[np.arange(20), 0, np.arange(20), 7] = -(0.5**0.5)
    unwhiten = functools.partial(whitening.unwhiten, found)
    moves = np.asarray(jax.vmap(unwhiten)(ones))[:, 0]
    got = np.einsum('aik,ij,bjk->ab', moves, hessian, moves)
    np.testing.assert_allclose(got, np.eye(20), atol=1e-3)
    spread = np.linalg.eigvalsh(hessian)
    self.assertGreater(spread[-1] / spread[0], 5)

  def test_fewer_evaluations(self):
    x, y = draw()
    x = x * np.geomspace(0.05, 2, 20).astype('float32')
    batch, layout = mlr_cells.split(x, y, 12)
    found = whitening.fit(x, y, layout, ridge=RIDGE)
    _, least = oracle.minimize(x.astype(float), y, 12, RIDGE)
    shape = 1, 20, 12
    value = functools.partial(ds_mlr.objective, ridge=RIDGE)

    @jax.jit
    def ask(coordinates, scaled, batch):
      def loss(coordinates):
        weights = whitening.unwhiten(found, coordinates)
        return value(jnp.where(scaled, weights, coordinates), batch)

      return jax.value_and_grad(loss)(coordinates)

    def count(scaled):
      seen = []

      def fun(c):
        loss, slope = ask(c.astype('float32').reshape(shape), scaled, batch)
        seen.append(float(loss) - least)
        return float(loss), np.asarray(slope, float).ravel()

      optimize.minimize(fun, np.zeros(240), jac=True, method='L-BFGS-B')
      return int(np.argmax(np.array(seen) < 1e-3)) or len(seen)

    scaled, plain = count(True), count(False)
    self.assertLess(scaled, 0.6 * plain)

  @parameterized.parameters(
    (dict(ridge=0.0), 'ridge must be finite and above 0, got 0'),
    (dict(ridge=float('inf')), 'ridge must be finite'),
    (dict(curvature=-1.0), 'curvature must be finite and above 0'),
    (dict(num_rotated=-1), 'num_rotated must be at least 0, got -1'),
  )
  def test_refuses(self, wrong, message):
    x, y = draw()
    _, layout = mlr_cells.split(x, y, 12)
    with self.assertRaisesRegex(ValueError, message):
      whitening.fit(x, y, layout, **(dict(ridge=RIDGE) | wrong))
