"""Objectives of problems against dense NumPy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl.testing import parameterized

from emc2 import mesh as meshes
from emc2.newton import features, problem


def _draw(loss='logistic', n=43, d=11):
  """Features, labels, weights and a point."""
  rng = np.random.default_rng(n)
  dense = rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.4)
  labels = rng.integers(0, 2, n).astype(float)
  if loss == 'squared':
    labels = rng.normal(size=n)
  return dense, labels, rng.random(n), rng.normal(size=d) * 0.5


def _objective(dense, labels, weights, x, ridge, loss):
  """The value, the gradient and the Hessian, in NumPy."""
  z, w = dense @ x, weights / weights.sum()
  if loss == 'logistic':
    p = 1 / (1 + np.exp(-z))
    value, slope, bend = (
      np.log1p(np.exp(z)) - labels * z,
      p - labels,
      p * (1 - p),
    )
  elif loss == 'squared':
    value, slope, bend = (z - labels) ** 2 / 2, z - labels, np.ones_like(z)
  else:
    value, slope, bend = np.exp(z) - labels * z, np.exp(z) - labels, np.exp(z)
  hessian = (dense.T * (w * bend)) @ dense + ridge * np.eye(len(x))
  return (
    w @ value + ridge / 2 * x @ x,
    dense.T @ (w * slope) + ridge * x,
    hessian,
  )


class ObjectiveTest(parameterized.TestCase):
  @parameterized.parameters(
    ('logistic', False, (1, 1)),
    ('logistic', False, (3, 2)),
    ('logistic', True, (1, 1)),
    ('logistic', True, (3, 2)),
    ('squared', True, (1, 1)),
    ('poisson', False, (1, 1)),
  )
  def test_value_gradient_and_hessian(self, loss, sparse, blocks):
    dense, labels, weights, x = _draw(loss)
    made = problem.make(
      scipy.sparse.csr_array(dense) if sparse else dense,
      labels,
      loss=loss,
      ridge=0.3,
      sample_weight=weights,
      num_row_blocks=blocks[0],
      num_column_blocks=blocks[1],
    )
    want = _objective(dense, labels, weights, x, 0.3, loss)
    at = problem.from_user(made, x)
    self.assertEqual(at.shape, made.mask.shape)
    value, gradient = jax.jit(
      lambda made, x: (
        problem.objective(made, x, loss),
        problem.gradient(made, x, loss),
      )
    )(made, at)
    np.testing.assert_allclose(value, want[0], rtol=2e-6)
    self.assertEqual(problem.to_user(made, gradient).shape, (11,))
    np.testing.assert_allclose(
      problem.to_user(made, gradient), want[1], 1e-4, 1e-6
    )
    np.testing.assert_array_equal(gradient[11:], 0)

    f = problem.value_fn(made, loss)
    direction = problem.from_user(made, np.cos(np.arange(11)))

    @jax.jit
    def derivatives(x):
      slope, push = jax.linearize(jax.grad(f), x)
      return f(x), slope, push(direction)

    value, slope, product = derivatives(at)
    np.testing.assert_allclose(value, want[0], rtol=2e-6)
    np.testing.assert_allclose(slope, gradient, 1e-4, 1e-6)
    np.testing.assert_allclose(
      problem.to_user(made, product),
      want[2] @ np.cos(np.arange(11)),
      1e-4,
      1e-6,
    )

  def test_value_fn_has_the_derivatives_of_the_objective(self):
    dense, labels, weights, x = _draw()
    x = jnp.asarray(x, jnp.float32)
    made = problem.make(dense, labels, ridge=0.1, sample_weight=weights)
    f = problem.value_fn(made, 'logistic')
    plain = lambda x: problem.objective(made, x, 'logistic')
    for of in (jax.grad, jax.hessian):
      got, want = jax.jit(lambda x, of=of: (of(f)(x), of(plain)(x)))(x)
      np.testing.assert_allclose(got, want, 1e-5, 1e-7)

  def test_value_fn_scatters_nothing(self):
    dense, labels, _, x = _draw()
    made = problem.make(scipy.sparse.csr_array(dense), labels)

    def twice(x, v):
      f = problem.value_fn(made, 'logistic')
      return jax.jvp(jax.grad(f), (x,), (v,))

    x = jnp.asarray(x, jnp.float32)
    self.assertNotIn('scatter', jax.jit(twice).lower(x, x).as_text())

  def test_many_problems(self):
    dense, labels, weights, x = _draw(n=40)
    whole = [
      problem.make(
        dense[rows], labels[rows], ridge=0.1, sample_weight=weights[rows]
      )
      for rows in (slice(0, 20), slice(20, 40))
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *whole)
    both = jnp.asarray(np.stack([x, 2 * x]), jnp.float32)
    f = lambda made, x: problem.value_fn(made, 'logistic')(x)
    slope = jax.vmap(lambda made, x: jax.grad(lambda x: f(made, x))(x))
    values, slopes = jax.jit(
      lambda made, x: (jax.vmap(f)(made, x), slope(made, x))
    )(stacked, both)
    for i, rows in enumerate((slice(0, 20), slice(20, 40))):
      want = _objective(
        dense[rows], labels[rows], weights[rows], both[i], 0.1, 'logistic'
      )
      np.testing.assert_allclose(values[i], want[0], rtol=1e-5)
      np.testing.assert_allclose(slopes[i], want[1], 1e-4, 1e-6)

  def test_float64(self):
    dense, labels, weights, x = _draw()
    with jax.enable_x64(True):
      for matrix in (dense, scipy.sparse.csr_array(dense)):
        made = problem.make(
          matrix, labels, sample_weight=weights, dtype=np.float64
        )
        got = problem.objective(made, jnp.asarray(x), 'logistic')
        want = _objective(dense, labels, weights, x, 0, 'logistic')[0]
        np.testing.assert_allclose(got, want, rtol=1e-14)

  def test_weights_count_as_repetition(self):
    dense, labels, _, x = _draw()
    counts = np.arange(43) % 3
    repeated = np.repeat(np.arange(43), counts)
    one = problem.make(dense, labels, sample_weight=counts)
    other = problem.make(dense[repeated], labels[repeated])
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(
      problem.objective(one, x, 'logistic'),
      problem.objective(other, x, 'logistic'),
      rtol=1e-6,
    )


class CurvatureBoundTest(parameterized.TestCase):
  @parameterized.parameters((False, 1), (True, 2))
  def test_closed_form(self, sparse, blocks):
    dense, labels, _, _ = _draw()
    made = problem.make(
      scipy.sparse.csr_array(dense) if sparse else dense,
      labels,
      num_row_blocks=blocks,
      num_column_blocks=blocks,
    )
    bound = jax.jit(
      problem.curvature_bound, static_argnames=('loss', 'num_steps')
    )
    got = bound(made, 'logistic', num_steps=300)
    longest = np.linalg.norm(dense, axis=1).max()
    want = np.linalg.norm(dense, 2) ** 2 * longest / (6 * 3**0.5 * 43)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    self.assertLess(bound(made, 'logistic', num_steps=1), got)
    self.assertEqual(bound(made, 'squared'), 0)

  def test_rows_that_do_not_count(self):
    dense = np.diag([1.0, 100.0])
    made = problem.make(dense, [0, 1], sample_weight=[1, 0])
    got = problem.curvature_bound(made, 'logistic')
    np.testing.assert_allclose(got, 1 / (6 * 3**0.5), rtol=1e-5)

  def test_no_bound(self):
    made = problem.make(np.eye(2), [0, 1], loss='poisson')
    with self.assertRaisesRegex(ValueError, "loss 'poisson' has no bound"):
      problem.curvature_bound(made, 'poisson')


class ShardingsTest(parameterized.TestCase):
  @parameterized.product(
    sparse=[False, True],
    axes=[dict(data=2, tensor=2), dict(data=3), dict(tensor=1)],
  )
  def test_shards_of_a_problem_add_up(self, sparse, axes):
    dense, labels, weights, x = _draw()
    shape = axes.get('data', 1), axes.get('tensor', 1)
    made = problem.make(
      scipy.sparse.csr_array(dense) if sparse else dense,
      labels,
      ridge=0.3,
      sample_weight=weights,
      num_row_blocks=shape[0],
      num_column_blocks=shape[1],
    )
    mesh = meshes.make(jax.devices()[: shape[0] * shape[1]], **axes)
    specs = problem.shardings(made, mesh)
    placed = meshes.place(made, mesh, specs)
    rows, columns = specs.labels, specs.mask

    def gradient(made, x):
      own = made._replace(features=features.own_block(made.features))
      scores = features.matvec(own.features, x)
      scores = jax.lax.psum(scores, 'tensor') if 'tensor' in axes else scores
      slopes = own.weights * (jax.nn.sigmoid(scores) - own.labels)
      pulled = features.rmatvec(own.features, slopes)
      pulled = jax.lax.psum(pulled, 'data') if 'data' in axes else pulled
      return pulled + own.ridge * x

    step = jax.shard_map(
      gradient, mesh=mesh, in_specs=(specs, columns), out_specs=columns
    )
    at = problem.from_user(made, x)
    got = problem.to_user(made, jax.jit(step)(placed, at))
    want = _objective(dense, labels, weights, x, 0.3, 'logistic')[1]
    np.testing.assert_allclose(got, want, 1e-4, 1e-6)
    self.assertEqual(rows, jax.P('data' if 'data' in axes else None))

  @parameterized.parameters(False, True)
  def test_blocks_that_do_not_fit(self, sparse):
    dense, labels, _, _ = _draw()
    made = problem.make(
      scipy.sparse.csr_array(dense) if sparse else dense, labels
    )
    mesh = meshes.make(jax.devices()[:2], data=2)
    with self.assertRaisesRegex(ValueError, 'num_row_blocks=2'):
      problem.shardings(made, mesh)

  def test_other_axes(self):
    made = problem.make(np.eye(2), [0, 1])
    mesh = meshes.make(jax.devices()[:2], ring=2)
    with self.assertRaisesRegex(ValueError, "'data' and 'tensor' only"):
      problem.shardings(made, mesh)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(labels=[1, 2, 0]), 'labels must be 0 or 1, got 2.0 in row 1'),
    (dict(labels=[1, -1, 1]), r'\(labels \+ 1\) / 2'),
    (dict(labels=[1, 0]), r'labels must have shape \(3,\)'),
    (dict(labels=[1, 0, np.nan], loss='squared'), 'labels must be finite'),
    (dict(labels=[1, 0, -2], loss='poisson'), 'at least 0, got -2.0 in row 2'),
    (dict(loss='hinge'), "loss must be one of .* 'hinge'"),
    (dict(ridge=-1.0), 'ridge must be at least 0'),
    (dict(ridge=np.nan), 'ridge must be at least 0'),
    (dict(sample_weight=[1, 1]), 'sample_weight must have shape'),
    (dict(sample_weight=[1, -1, 1]), 'sample_weight must be finite and'),
    (dict(sample_weight=[1, np.inf, 1]), 'sample_weight must be finite and'),
    (dict(sample_weight=[0, 0, 0]), 'sample_weight must not be 0'),
    (dict(num_row_blocks=0), 'num_row_blocks must be at least 1'),
    (dict(num_column_blocks=0), 'num_column_blocks must be at least 1'),
    (dict(dtype=np.float16), 'dtype must be float32 or float64'),
    (dict(dtype=np.float64), 'jax_enable_x64'),
    (dict(features=np.ones(3)), 'features must have shape'),
    (dict(features=np.ones((3, 0))), 'features must have shape'),
    (dict(features=np.ones((0, 3)), labels=[]), 'features must have shape'),
    (
      dict(features=scipy.sparse.csr_array(np.ones((0, 3))), labels=[]),
      'features must have',
    ),
    (dict(features=np.diag([1, np.nan, 1])), 'features must be finite'),
    (
      dict(features=scipy.sparse.csr_array(np.diag([1, np.inf, 1]))),
      'features must be finite',
    ),
  )
  def test_at_the_door(self, change, message):
    given = dict(features=np.eye(3), labels=[1, 0, 1]) | change
    with self.assertRaisesRegex(ValueError, message):
      problem.make(given.pop('features'), given.pop('labels'), **given)
