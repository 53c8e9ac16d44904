r"""The minimiser of a quadratic model that a cube of the step's norm bounds.

In few dimensions, :math:`q(s) = g^\top s + s^\top H s / 2 + (M / 6) \|s\|^3`
has its global minimum where, for a shift :math:`\lambda`,

.. math::
  (H + \lambda I) s = -g, \quad \lambda = \tfrac M2 \|s\|, \quad
  H + \lambda I \succeq 0,

so that with the eigenvalues of H a single equation in :math:`\lambda` is left.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments


class Spectrum(NamedTuple):
  """A symmetric matrix by its eigenvectors, and a gradient in them.

  Attributes:
    values: (m,), rising.
    vectors: (m, m): orthonormal columns.
    coefficients: (m,): products of the columns with the gradient.
  """

  values: jax.Array
  vectors: jax.Array
  coefficients: jax.Array


class CubicStep(NamedTuple):
  """The minimiser of a model, and what the model says of it.

  Attributes:
    step: (m,).
    shift: (): lambda, at least 0.
    norm: (): of the step.
    slope: (): g's, at most 0.
    excess: (): s'Hs / 2 + (M / 6) |s|^3, at least 0 for a semidefinite H.
  """

  step: jax.Array
  shift: jax.Array
  norm: jax.Array
  slope: jax.Array
  excess: jax.Array

  @property
  def decrease(self) -> jax.Array:
    """(): -q(s), a sum of two numbers that are at least 0."""
    return self.shift * jnp.square(self.norm) / 6 - self.slope / 2


def spectrum(
  matrix: jax.Array, gradient: jax.Array, *, convex: bool = False
) -> Spectrum:
  """Finds the eigenvectors of a symmetric matrix.

  Args:
    matrix: (m, m), symmetric, float32 or float64.
    gradient: (m,), of the same dtype.
    convex: Whether the matrix is known to be semidefinite, and each negative
      eigenvalue is rounding and becomes 0; otherwise only those of the size of
      rounding do, below m eps times the greatest. Static.

  Returns:
    The spectrum.

  Raises:
    ValueError: If shapes do not fit.

  Examples:
    >>> found = spectrum(jnp.diag(jnp.array([3.0, 1.0])), jnp.array([5.0, 7.0]))
    >>> found.values, jnp.abs(found.coefficients)
    (Array([1., 3.], dtype=float32), Array([7., 5.], dtype=float32))
  """
  if matrix.ndim != 2 or matrix.shape != 2 * gradient.shape:
    raise ValueError(
      'matrix and gradient must be (m, m) and (m,), got '
      f'{matrix.shape} and {gradient.shape}.'
    )
  vectors, values = jax.lax.linalg.eigh(matrix)
  coefficients = jnp.matmul(gradient, vectors, precision='highest')
  return Spectrum(_without_rounding(values, convex), vectors, coefficients)


def tridiagonal_spectrum(
  diagonal: jax.Array,
  off_diagonal: jax.Array,
  norm: jax.Array,
  *,
  convex: bool = False,
) -> Spectrum:
  """Finds the eigenvectors of what :func:`lanczos` gives.

  Args:
    diagonal: (m,), float32 or float64.
    off_diagonal: (m,); its last entry is not read.
    norm: (): the gradient is that times the first unit vector.
    convex: As in :func:`spectrum`.

  Returns:
    The spectrum.

  Raises:
    ValueError: If shapes do not fit.
  """
  if diagonal.ndim != 1 or diagonal.shape != off_diagonal.shape:
    raise ValueError(
      'diagonal and off_diagonal must both be (m,), got '
      f'{diagonal.shape} and {off_diagonal.shape}.'
    )
  # Only the lower half is read.
  matrix = jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], -1)
  vectors, values = jax.lax.linalg.eigh(matrix, symmetrize_input=False)
  values = _without_rounding(values, convex)
  return Spectrum(values, vectors, norm * vectors[0])


def solve_cubic(
  spectrum: Spectrum,
  regularization: jax.typing.ArrayLike,
  *,
  max_iterations: int = 50,
) -> CubicStep:
  r"""Minimises a cubic-regularised model, whatever the signs of H.

  With the eigenvalues :math:`\theta_i` and the coefficients :math:`c_i` it
  finds the root of :math:`\|s(\lambda)\| = 2 \lambda / M`, where :math:`s_i =
  -c_i / (\theta_i + \lambda)`. A round takes :math:`1 / \|s\|` for linear,

  .. math::
    \frac{1}{\|s(\lambda)\|} \Bigl(1 + \kappa (\lambda^+ - \lambda)\Bigr)
    = \frac{M}{2 \lambda^+}, \quad
    \kappa = \frac{\sum_i s_i^2 / (\theta_i + \lambda)}{\sum_i s_i^2},

  and solves that exactly. For :math:`1 / \|s\|` is concave, each round ends
  left of the root, and the next ones rise to it at least as fast as Newton's.
  The first begins at the greatest of the roots that single coefficients would
  have, so near that no guess would save a round.

  What is small is :math:`\lambda` less its least value, so that the hard case,
  in which no coefficient belongs to the lowest, negative eigenvalue, and all
  near it keep their digits. In the hard case the step takes what its norm lacks
  from the first eigenvector, of either sign.

  Args:
    spectrum: H and g.
    regularization: M, in the convention M / 6, above 0.
    max_iterations: A bound on rounds, at least 1; two or three are common.
      Static.

  Returns:
    The step and its model; 0 for a gradient of 0 and a semidefinite H.

  Raises:
    ValueError: If `max_iterations` is below 1.

  Examples:
    >>> model = Spectrum(jnp.array([2.0]), jnp.eye(1), jnp.array([3.0]))
    >>> found = solve_cubic(model, 2.0)
    >>> found.step, found.shift
    (Array([-1.], dtype=float32), Array(1., dtype=float32))

  References:
    Nesterov and Polyak, `Cubic regularization of Newton method and its global
    performance <https://doi.org/10.1007/s10107-006-0706-8>`_, 2006, Section 5.
    Conn, Gould and Toint, *Trust-Region Methods*, 2000, Section 7.3.
  """
  arguments.check_at_least('max_iterations', max_iterations, 1)
  values, vectors, coefficients = spectrum
  dtype = values.dtype
  eps, tiny = (float(x) for x in (jnp.finfo(dtype).eps, jnp.finfo(dtype).tiny))
  m = values.shape[0]
  half = jnp.asarray(regularization, dtype) / 2
  # Eigenvalues in units of `unit`, and steps of `unit / half`: then M is 2, and
  # neither the least of numbers nor the greatest is squared.
  roots = jnp.sqrt(half) * jnp.sqrt(jnp.abs(coefficients))
  extremes = jnp.maximum(jnp.abs(values[0]), jnp.abs(values[-1]))
  unit = jnp.maximum(extremes, jnp.max(roots))
  unit = jnp.where(unit > 0, unit, 1)
  lowest = jnp.minimum(values[0], 0)
  floor = -lowest / unit
  gaps = (values - lowest) / unit
  pulls = jnp.square(roots / unit)

  # Where (floor + x) (gap + x) = pull, which each coefficient would ask for if
  # it were alone; with the others, the root lies beyond all of these.
  widths = jnp.sqrt(jnp.square(floor - gaps) + 4 * pulls)
  alone = 2 * (pulls - floor * gaps) / (floor + gaps + widths + tiny)
  least = jnp.maximum(jnp.max(alone), tiny)

  def weights(rise):
    """Sizes of the step's entries over the norm that lambda asks for."""
    inverse = 1 / (gaps + rise)
    return inverse, pulls * inverse / (floor + rise)

  def advance(carry):
    rise, _, count = carry
    inverse, sizes = weights(rise)
    squares = jnp.square(sizes)
    square = jnp.sum(squares)
    shift = floor + rise
    bend = shift * jnp.sum(squares * inverse) / jnp.maximum(square, tiny)
    lack = jnp.sqrt(square) - 1
    # The root of bend y^2 + (1 + bend) y = lack, and y = change / shift.
    share = 1 / (1 + bend)
    inside = jnp.maximum(1 + 4 * share * (1 - share) * lack, 0)
    change = 2 * shift * share * lack / (1 + jnp.sqrt(inside))
    new = jnp.maximum(rise + change, least)
    # The next change would be at most 1.5 change^2 / rise.
    wanted = jnp.abs(new - rise) > 0.5 * eps**0.5 * new
    return new, wanted & (jnp.abs(lack) > 4 * eps), count + 1

  def goes_on(carry):
    _, wanted, count = carry
    return wanted & (count < max_iterations)

  begin = least, least > 0, jnp.zeros([], jnp.int32)
  rise, *_ = jax.lax.while_loop(goes_on, advance, begin)
  _, sizes = weights(rise)
  square = jnp.sum(jnp.square(sizes))
  hard = (floor > 0) & (least <= tiny) & (square < 1)
  lacking = jnp.sqrt(jnp.square(sizes[0]) + jnp.maximum(1 - square, 0))
  sizes = jnp.where(hard & (jnp.arange(m) == 0), lacking, sizes)
  square = jnp.where(hard, 1, square)

  shift = jnp.where(square > 0, unit * (floor + rise), 0)
  length = shift / half
  norm = jnp.sqrt(square)
  signed = jnp.where(coefficients > 0, -sizes, sizes)
  step = length * jnp.matmul(vectors, signed, precision='highest')
  slope = -length * jnp.sum(jnp.abs(coefficients) * sizes)
  bend = jnp.sum(values * jnp.square(sizes)) / 2 + shift * norm**3 / 3
  return CubicStep(
    step=step,
    shift=shift,
    norm=length * norm,
    slope=slope,
    excess=length * (length * bend),
  )


def _without_rounding(values: jax.Array, convex: bool) -> jax.Array:
  """Takes negative eigenvalues of the size of rounding for 0."""
  if convex:
    return jnp.maximum(values, 0)
  size = jnp.maximum(-values[0], values[-1])
  rounding = values.shape[0] * jnp.finfo(values.dtype).eps * size
  return jnp.where((values < 0) & (values >= -rounding), 0, values)
