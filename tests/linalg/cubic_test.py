"""Minimisers of cubic models: against bisection, and the paper's identities."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2.linalg import cubic, lanczos


def _bisect(values, coefficients, regularization):
  """The step in eigenvectors and lambda, in extended precision.

  The unknown is lambda less its least value, on a grid of factors of 2.
  """
  theta, c = (np.asarray(x, np.longdouble) for x in (values, coefficients))
  half = np.longdouble(regularization) / 2
  floor = max(-theta.min(), 0)
  gaps = theta + floor
  norm = lambda rise: np.sqrt(np.sum((c / (gaps + rise)) ** 2))
  low, high = np.longdouble(1e-300), np.longdouble(1e300)
  for _ in range(300):
    middle = np.sqrt(low) * np.sqrt(high)
    if half * norm(middle) > floor + middle:
      low = middle
    else:
      high = middle
  step = -c / (gaps + high)
  if floor > 0 and high < 1e-290:  # The hard case.
    step[gaps == 0] = 0
    rest = (floor / half) ** 2 - np.sum(step**2)
    step[np.argmin(gaps)] = np.sqrt(rest)
  return np.float64(step), np.float64(floor + high)


def _value(values, coefficients, regularization, step):
  """The model at a step in eigenvectors, in extended precision."""
  theta, c, s = (
    np.asarray(x, np.longdouble) for x in (values, coefficients, step)
  )
  cube = np.sum(s**2) ** 1.5
  return np.sum(c * s + theta * s**2 / 2) + regularization / 6 * cube


@jax.jit
@jax.vmap
def _solve(values, coefficients, regularization):
  unit = jnp.eye(len(values), dtype=values.dtype)
  model = cubic.Spectrum(values, unit, coefficients)
  found = cubic.solve_cubic(model, regularization)
  return found, found.decrease


@jax.jit
def _krylov(matrix, gradient, regularization, spaces):
  """Steps of as many dimensions as `spaces` has rows."""
  matvec = lambda v: jnp.matmul(matrix, v, precision='highest')
  found = lanczos.lanczos(matvec, gradient, len(spaces))
  model = cubic.tridiagonal_spectrum(
    found.diagonal, found.off_diagonal, found.norm
  )
  solved = cubic.solve_cubic(model, regularization)
  return solved.step @ found.basis, solved, found.off_diagonal


@jax.jit
def _full(matrix, gradient, regularization):
  model = cubic.spectrum(matrix, gradient)
  return cubic.solve_cubic(model, regularization)


def _draw(d, seed=0, values=None):
  """A matrix (d, d) with eigenvalues u^2, and a gradient (d,), float64."""
  rng = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
  values = rng.uniform(size=d) ** 2 if values is None else np.asarray(values)
  return basis * values @ basis.T, rng.normal(size=d)


def _spread(kind, num_cases, m, seed):
  """Models whose numbers spread over many orders of magnitude."""
  rng = np.random.default_rng(seed)
  orders = lambda low, high, *shape: 10 ** rng.uniform(low, high, size=shape)
  theta = orders(-6, 0, num_cases, m)
  c = rng.normal(size=(num_cases, m)) * orders(-6, 0, num_cases, m)
  if kind != 'semidefinite':
    theta *= rng.choice([-1, 1], size=theta.shape)
  theta = np.sort(theta, axis=1)
  if kind in ('hard', 'nearly hard'):
    theta[:, 0] = -1
    c[:, 0] *= 0 if kind == 'hard' else orders(-12, 0, num_cases)
  return theta, c, orders(-6, 3, num_cases)


class BisectionTest(parameterized.TestCase):
  @parameterized.product(
    kind=('semidefinite', 'indefinite', 'nearly hard', 'hard'),
    dtype=('float64', 'float32'),
    m=(1, 10),
  )
  def test_equals(self, kind, dtype, m):
    eps = np.finfo(dtype).eps
    cases = [x.astype(dtype) for x in _spread(kind, 40, m, seed=5)]
    with jax.enable_x64(dtype == 'float64'):
      found, decrease = jax.tree.map(np.asarray, _solve(*cases))
    self.assertEqual(found.step.dtype, dtype)
    for i, case in enumerate(zip(*cases, strict=True)):
      want, shift = _bisect(*case)
      best = -_value(*case, want)
      np.testing.assert_allclose(found.shift[i], shift, rtol=20 * eps)
      np.testing.assert_allclose(decrease[i], best, rtol=20 * eps)
      # The model knows no better, since it is flat at its minimum.
      got = -_value(*case, found.step[i])
      size = np.abs(found.slope[i])
      np.testing.assert_allclose(got, best, rtol=20 * eps, atol=4 * eps * size)
      if kind == 'semidefinite':
        np.testing.assert_allclose(found.step[i], want, rtol=40 * eps)
        norm = np.linalg.norm(want)
        np.testing.assert_allclose(found.norm[i], norm, rtol=20 * eps)
        np.testing.assert_allclose(
          found.excess[i], best * -1 - case[1] @ want, rtol=60 * eps
        )

  @parameterized.parameters('float32', 'float64')
  def test_scales(self, dtype):
    """(c H, c g, c M) has the same step; (t g, t M) is as (g, t^2 M)."""
    theta = np.array([0.0, 0.01, 0.3, 1.0])
    gradient = np.array([1e-3, -0.5, 0.2, 0.1])
    scale = 10.0 ** np.arange(-12, 13, 4)
    model = np.stack(np.meshgrid(scale, scale, indexing='ij')).reshape(2, -1, 1)
    cases = model[0] * theta, model[0] * gradient, (model * 0.02).prod(0)[:, 0]
    cases = [x.astype(dtype) for x in cases]
    with jax.enable_x64(dtype == 'float64'):
      found, decrease = jax.tree.map(np.asarray, _solve(*cases))
    for i, case in enumerate(zip(*cases, strict=True)):
      want, shift = _bisect(*case)
      rtol = 40 * np.finfo(dtype).eps
      np.testing.assert_allclose(found.step[i], want, rtol=rtol)
      np.testing.assert_allclose(found.shift[i], shift, rtol=rtol)
      value = -_value(*case, want)
      np.testing.assert_allclose(decrease[i], value, rtol=rtol)

  def test_matrix_that_is_indefinite(self):
    """What is needed and enough: stationary, and H + lambda is semidefinite."""
    matrix, gradient = _draw(12, values=np.linspace(-1, 3, 12))
    with jax.enable_x64(True):
      found = jax.tree.map(np.asarray, _full(matrix, gradient, 0.7))
    norm = np.linalg.norm(found.step)
    rest = matrix @ found.step + gradient + 0.35 * norm * found.step
    self.assertLess(np.abs(rest).max(), 1e-12)
    np.testing.assert_allclose(found.shift, 0.35 * norm, rtol=1e-12)
    self.assertGreater(found.shift, 1)
    np.testing.assert_allclose(found.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(found.slope, gradient @ found.step, rtol=1e-12)

  @parameterized.parameters(0.0, 1e-3)
  def test_hard_case_of_a_matrix(self, size):
    """The gradient has no part along two eigenvectors of the lowest value."""
    values = np.append([-1.0, -1.0], np.linspace(0.5, 2.0, 10))
    matrix, gradient = _draw(12, values=values)
    vectors = np.linalg.eigh(matrix)[1][:, 2:]
    gradient = size * vectors @ (vectors.T @ gradient)
    with jax.enable_x64(True):
      found = jax.tree.map(np.asarray, _full(matrix, gradient, 0.5))
    np.testing.assert_allclose(found.shift, 1, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(found.step), 4, rtol=1e-9)
    rest = matrix @ found.step + gradient + found.step
    self.assertLess(np.abs(rest).max(), 1e-9)
    np.testing.assert_allclose(found.excess, -8 + 64 / 12, atol=1e-3)

  def test_no_gradient(self):
    found, decrease = _solve(
      np.array([[0.0, 1.0, 2.0], [0, 0, 0]], 'f'),
      np.zeros((2, 3), 'f'),
      np.ones(2, 'f'),
    )
    for leaf in (*found, decrease):
      np.testing.assert_array_equal(leaf, 0)

  def test_ends_on_what_is_not_finite(self):
    found, _ = _solve(
      np.ones((3, 2), 'f') * [[1], [np.nan], [1]],
      np.ones((3, 2), 'f') * [[np.nan], [1], [np.inf]],
      np.ones(3, 'f'),
    )
    self.assertFalse(np.isfinite(found.step).any())

  def test_vmap_equals_a_loop(self):
    """Cases that end after different rounds, or at once."""
    cases = [_spread(k, 4, 6, seed=6) for k in ('semidefinite', 'hard')]
    cases = [np.concatenate(x).astype('f') for x in zip(*cases, strict=True)]
    cases[1][2] = 0
    found = _solve(*cases)
    for i in range(8):
      alone = _solve(*[x[i : i + 1] for x in cases])
      for x, y in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(x[i], y[0], rtol=1e-6)

  def test_bound_on_rounds(self):
    """One round is not enough here, and ends left of the root."""
    values = jnp.array([0.0, 0.1, 1.0])
    model = cubic.Spectrum(values, jnp.eye(3), jnp.array([0.1, 0.3, 1.0]))
    one, every = jax.jit(
      lambda model: [
        cubic.solve_cubic(model, 1.0, max_iterations=most).shift
        for most in (1, 50)
      ]
    )(model)
    self.assertLess(one, 0.999 * every)
    np.testing.assert_allclose(one, every, rtol=0.01)
    with self.assertRaisesRegex(ValueError, 'max_iterations'):
      cubic.solve_cubic(model, 1.0, max_iterations=0)


class SpectrumTest(parameterized.TestCase):
  def test_dense_and_tridiagonal_agree(self):
    rng = np.random.default_rng(8)
    diagonal, beside = rng.normal(size=5), rng.uniform(size=5)
    off = beside[:-1]
    matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    beside[-1] = np.nan  # It is not read.
    with jax.enable_x64(True):
      found = cubic.tridiagonal_spectrum(
        jnp.asarray(diagonal), jnp.asarray(beside), jnp.asarray(3.0)
      )
      dense = cubic.spectrum(jnp.asarray(matrix), 3.0 * jnp.eye(5)[0])
      found, dense = jax.tree.map(np.asarray, (found, dense))
    for got in (found, dense):
      vectors = got.vectors
      again = vectors * got.values @ vectors.T
      np.testing.assert_allclose(again, matrix, atol=1e-14)
      np.testing.assert_allclose(got.coefficients, 3 * vectors[0], atol=1e-14)
      np.testing.assert_array_equal(np.sort(got.values), got.values)

  @parameterized.parameters(
    (-1e-8, False, 0.0),
    (-1e-3, False, -1e-3),
    (-1e-3, True, 0.0),
    (0.5, True, 0.5),
  )
  def test_negative_values_that_are_rounding(self, lowest, convex, want):
    diagonal = jnp.array([lowest, 1.0, 2.0])
    found = cubic.spectrum(jnp.diag(diagonal), diagonal, convex=convex)
    np.testing.assert_allclose(found.values, [want, 1, 2], rtol=1e-5)
    off = jnp.zeros(3)
    found = cubic.tridiagonal_spectrum(
      diagonal, off, jnp.float32(1), convex=convex
    )
    np.testing.assert_allclose(found.values, [want, 1, 2], rtol=1e-5)

  def test_refuses_shapes(self):
    with self.assertRaisesRegex(ValueError, r'\(m, m\) and \(m,\)'):
      cubic.spectrum(jnp.ones((3, 3)), jnp.ones(2))
    with self.assertRaisesRegex(ValueError, r'must both be \(m,\)'):
      cubic.tridiagonal_spectrum(jnp.ones(3), jnp.ones(2), jnp.float32(1))


class PaperTest(parameterized.TestCase):
  @parameterized.parameters(1e-3, 1.0, 1e3)
  def test_one_dimension_is_gradient_descent(self, regularization):
    """T3: the closed form of the step's length."""
    matrix, gradient = _draw(12)
    with jax.enable_x64(True):
      step, *_ = _krylov(matrix, gradient, regularization, np.ones(1))
    gamma = np.linalg.norm(gradient)
    a = gradient @ matrix @ gradient / gamma**2
    pull = regularization * gamma
    eta = 2 / (a + np.sqrt(a**2 + 2 * pull))
    np.testing.assert_allclose(step, -eta * gradient, rtol=1e-12)

  @parameterized.parameters(1e-3, 1.0, 1e3)
  def test_all_dimensions_are_the_whole_model(self, regularization):
    """T2, and T4 of its value."""
    matrix, gradient = _draw(12)
    with jax.enable_x64(True):
      step, solved, _ = _krylov(matrix, gradient, regularization, np.ones(12))
      dense = _full(matrix, gradient, regularization)
      decreases = np.stack([solved.decrease, dense.decrease])
      step, solved, dense = jax.tree.map(np.asarray, (step, solved, dense))
    norm, slope = np.linalg.norm(step), gradient @ step
    pull = regularization / 2 * norm * step
    self.assertLess(np.abs(matrix @ step + gradient + pull).max(), 1e-10)
    np.testing.assert_allclose(step, dense.step, rtol=1e-8)
    bend = step @ matrix @ step / 2 + regularization / 6 * norm**3
    np.testing.assert_allclose(solved.excess, bend, rtol=1e-12)
    np.testing.assert_allclose(decreases, -(slope + bend), rtol=1e-12)
    shift = solved.shift
    identity = slope / 2 - shift / 2 * norm**2 + regularization / 6 * norm**3
    np.testing.assert_allclose(decreases, -identity, rtol=1e-12)

  @parameterized.parameters(3, 12)
  def test_few_eigenvalues_need_few_dimensions(self, m):
    """T5: the space of dimension 3 holds the step, and 0 beside is harmless."""
    values = np.resize([1.0, 0.3, 0.05], 12)
    matrix, gradient = _draw(12, values=values)
    with jax.enable_x64(True):
      step, *_ = _krylov(matrix, gradient, 0.1, np.ones(m))
      want = _full(matrix, gradient, 0.1).step
    np.testing.assert_allclose(step, want, rtol=1e-9)

  def test_gap_to_the_whole_model(self):
    """T6: less than that of a ridge rho of the quality of the space."""
    problems = [_draw(10, seed=i) for i in range(100)]
    matrices, gradients = map(np.stack, zip(*problems, strict=True))
    with jax.enable_x64(True):
      over = lambda fn, *axes: jax.jit(jax.vmap(fn, axes))
      spaces = np.ones(4)
      _, found, betas = over(_krylov, 0, 0, None, None)(
        matrices, gradients, 0.3, spaces
      )
      rho = 2 / np.sum(1 / np.asarray(betas), axis=1)
      ridge = rho[:, None, None] * np.eye(10)
      bound = over(_full, 0, 0, None)(matrices + ridge, gradients, 0.3)
      found, bound = np.asarray(found.decrease), np.asarray(bound.decrease)
    self.assertGreaterEqual(np.min(found - bound), -1e-10)
    self.assertGreater(np.min(rho), 0)
