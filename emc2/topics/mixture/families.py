r"""Conjugate exponential families, each a handful of functions.

A family has sufficient statistics :math:`\phi(x)`, a natural parameter
:math:`\theta` and its log-normaliser :math:`g(\theta)`,

.. math:: \log p(x \mid \theta) = \langle \phi(x), \theta \rangle - g(\theta),

with a conjugate prior. The posterior of a component depends on the data by
:math:`N = \sum_i z_i` and :math:`S = \sum_i z_i \phi(x_i)` alone: these are
what is stored, and what travels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special


class Statistics(NamedTuple):
  """Raw sums over the data, without the prior."""

  count: jax.Array  # (K,): N_k, the sum of z_ik over i.
  moments: jax.Array  # (K, F): S_k, the sum of z_ik phi(x_i).


class Expectations(NamedTuple):
  """What a posterior says of the parameters of each component."""

  natural: jax.Array  # (K, F): E[theta_k].
  log_normalizer: jax.Array  # (K,): E[g(theta_k)].


class Family(NamedTuple):
  """A family with its prior."""

  dim: int  # D, of a row of the data.
  num_features: int  # F
  features: Callable[[jax.Array], jax.Array]  # Rows (n, D) to phi (n, F).
  expectations: Callable[[Statistics], Expectations]
  log_evidence: Callable[[Statistics], jax.Array]  # (K,), see each family.
  check: Callable[[jax.typing.ArrayLike], None]  # Raises on bad data (n, D).


def gaussian_diagonal(
  dim: int,
  *,
  degrees: float,
  scale: float,
  mean: jax.typing.ArrayLike = 0.0,
  mean_strength: float = 1.0,
  center: jax.typing.ArrayLike = 0.0,
) -> Family:
  r"""Gaussians with diagonal covariance, each entry Normal-Gamma.

  .. math::
    \tau_j \sim \mathrm{Gamma}(\nu_0 / 2, 1 / (2 W_0)), \quad
    \mu_j \mid \tau_j \sim N(m_{0j}, (\beta_0 \tau_j)^{-1}),

  with statistics :math:`(x - c, (x - c)^2)`, the square entry by entry.
  `log_evidence` is :math:`\log p(X)` of the weighted rows.

  .. note::
    Scores are matrix products of these statistics, which lose digits as
    :math:`\tau (x - c)^2` grows; the centre :math:`c` should be the mean of the
    data. The model is the same for every centre.

  Args:
    dim: D, at least 1. Static.
    degrees: :math:`\nu_0 > 0`.
    scale: :math:`W_0 > 0`; the prior mean of a precision is
      :math:`\nu_0 W_0`.
    mean: :math:`m_0`, () or (D,).
    mean_strength: :math:`\beta_0 > 0`.
    center: :math:`c`, () or (D,).

  Returns:
    The family, F = 2 D.

  Raises:
    ValueError: If an argument is out of its range.
  """
  _check_gaussian(dim, scale, mean_strength)
  check_positive('degrees', degrees)
  mean, center = _center(dim, mean, center)
  shape, rate, beta = degrees / 2, 1 / (2 * scale), mean_strength

  def features(rows):
    rows = rows - jnp.asarray(center, rows.dtype)
    return jnp.concatenate([rows, rows * rows], axis=1)

  def posterior(statistics):
    count, moments = statistics
    prior = jnp.asarray(mean, moments.dtype)[None, :]
    strength = beta + count
    location = (beta * prior + moments[:, :dim]) / strength[:, None]
    spread = moments[:, dim:] + beta * prior * prior
    spread -= strength[:, None] * location * location
    # The spread is a sum of squares; rounding may say otherwise.
    rates = rate + jnp.maximum(spread, 0) / 2
    return shape + count / 2, rates, location, strength

  def expectations(statistics):
    shapes, rates, location, strength = posterior(statistics)
    precision = shapes[:, None] / rates
    log_precision = special.digamma(shapes)[:, None] - jnp.log(rates)
    natural = jnp.concatenate([precision * location, -precision / 2], axis=1)
    log_normalizer = dim * (math.log(2 * math.pi) + 1 / strength) - jnp.sum(
      log_precision - precision * location * location, axis=1
    )
    return Expectations(natural, log_normalizer / 2)

  def log_evidence(statistics):
    shapes, rates, _, strength = posterior(statistics)
    each = special.gammaln(shapes) - math.lgamma(shape)
    each += (jnp.log(beta / strength) - statistics.count * _LOG_2PI) / 2
    # Written so that large terms cancel before they are summed.
    tails = shape * jnp.log(rates / rate)
    tails += (statistics.count / 2)[:, None] * jnp.log(rates)
    return dim * each - jnp.sum(tails, axis=1)

  return Family(
    dim, 2 * dim, features, expectations, log_evidence, _checker(dim)
  )


def gaussian_full(
  dim: int,
  *,
  degrees: float,
  scale: float,
  mean: jax.typing.ArrayLike = 0.0,
  mean_strength: float = 1.0,
  center: jax.typing.ArrayLike = 0.0,
) -> Family:
  r"""Gaussians with any covariance, a Normal-Wishart prior.

  .. math::
    \Lambda \sim \mathcal{W}(W_0 I, \nu_0), \quad
    \mu \mid \Lambda \sim N(m_0, (\beta_0 \Lambda)^{-1}),

  with statistics :math:`x - c` and the lower triangle of
  :math:`(x - c)(x - c)^\top`, row by row.

  Args:
    dim: D, at least 1. Static.
    degrees: :math:`\nu_0 > D - 1`.
    scale: :math:`W_0 > 0`, times the identity.
    mean: :math:`m_0`, () or (D,).
    mean_strength: :math:`\beta_0 > 0`.
    center: :math:`c`, () or (D,); see :func:`gaussian_diagonal`.

  Returns:
    The family, F = D + D (D + 1) / 2.

  Raises:
    ValueError: If an argument is out of its range.
  """
  _check_gaussian(dim, scale, mean_strength)
  if not dim - 1 < degrees < math.inf:
    raise ValueError(
      f'degrees must be finite and above dim - 1 = {dim - 1}, got {degrees}.'
    )
  mean, center = _center(dim, mean, center)
  beta = mean_strength
  lower, upper = np.tril_indices(dim)
  lower, upper = lower.astype(np.int32), upper.astype(np.int32)
  squares = beta * mean[lower] * mean[upper]
  twice = np.where(lower == upper, 1.0, 2.0)

  def features(rows):
    rows = rows - jnp.asarray(center, rows.dtype)
    return jnp.concatenate([rows, rows[:, lower] * rows[:, upper]], axis=1)

  def posterior(statistics):
    """Degrees, Cholesky factor of the inverse of W, location, strength."""
    count, moments = statistics
    prior = jnp.asarray(mean, moments.dtype)
    strength = beta + count
    location = (beta * prior[None, :] + moments[:, :dim]) / strength[:, None]
    packed = moments[:, dim:] + jnp.asarray(squares, moments.dtype)[None, :]
    products = location[:, lower] * location[:, upper]
    packed -= strength[:, None] * products
    inverse = jnp.zeros((*count.shape, dim, dim), moments.dtype)
    inverse = inverse.at[:, lower, upper].set(packed)
    inverse = inverse.at[:, upper, lower].set(packed)
    inverse += (jnp.eye(dim, dtype=moments.dtype) / scale)[None]
    return degrees + count, jnp.linalg.cholesky(inverse), location, strength

  def half_log_det(factor):
    diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
    return jnp.sum(jnp.log(diagonal), axis=1)

  def expectations(statistics):
    freedom, factor, location, strength = posterior(statistics)
    eye = jnp.broadcast_to(jnp.eye(dim, dtype=factor.dtype), factor.shape)
    root = jax.lax.linalg.triangular_solve(
      factor, eye, left_side=True, lower=True
    )
    precision = freedom[:, None, None] * jnp.einsum(
      'kji,kjl->kil', root, root, precision=jax.lax.Precision.HIGHEST
    )
    pulled = jnp.einsum(
      'kij,kj->ki', precision, location, precision=jax.lax.Precision.HIGHEST
    )
    packed = precision[:, lower, upper]
    packed *= jnp.asarray(-twice / 2, packed.dtype)[None, :]
    below = jnp.arange(dim, dtype=freedom.dtype)
    log_det = jnp.sum(
      special.digamma((freedom[:, None] - below[None, :]) / 2), axis=1
    )
    log_det += dim * math.log(2) - 2 * half_log_det(factor)
    log_normalizer = dim * (_LOG_2PI + 1 / strength) - log_det
    log_normalizer += jnp.sum(pulled * location, axis=1)
    return Expectations(
      jnp.concatenate([pulled, packed], axis=1), log_normalizer / 2
    )

  def log_evidence(statistics):
    freedom, factor, _, strength = posterior(statistics)
    count = statistics.count
    below = jnp.arange(dim, dtype=freedom.dtype)[None, :] / 2
    gammas = special.gammaln(freedom[:, None] / 2 - below)
    gammas -= special.gammaln(degrees / 2 - below)
    total = jnp.sum(gammas, axis=1) - freedom * half_log_det(factor)
    total -= degrees * dim * math.log(scale) / 2
    total -= count * dim * math.log(math.pi) / 2
    return total + dim * jnp.log(beta / strength) / 2

  return Family(
    dim, dim + lower.size, features, expectations, log_evidence, _checker(dim)
  )


def multinomial(dim: int, *, prior: float = 0.01) -> Family:
  r"""Counts of `dim` symbols, their probabilities symmetric Dirichlet.

  .. math::
    \beta \sim \mathrm{Dir}(\eta), \quad
    \log p(x \mid \beta) = \sum_v x_v \log \beta_v.

  This is the probability of the symbols in their order; that of the counts
  alone is greater by :math:`\log (\sum_v x_v)! - \sum_v \log x_v!` for each
  row, whatever the mixture.

  Args:
    dim: V, at least 2. Static.
    prior: :math:`\eta > 0`.

  Returns:
    The family, F = V.

  Raises:
    ValueError: If an argument is out of its range.
  """
  if dim < 2:
    raise ValueError(f'dim must be at least 2, got {dim}.')
  check_positive('prior', prior)

  def expectations(statistics):
    # A sum of counts is not below 0; rounding may say otherwise.
    alpha = prior + jnp.maximum(statistics.moments, 0)
    total = special.digamma(jnp.sum(alpha, axis=1, keepdims=True))
    zeros = jnp.zeros_like(statistics.count)
    return Expectations(special.digamma(alpha) - total, zeros)

  def log_evidence(statistics):
    alpha = prior + jnp.maximum(statistics.moments, 0)
    each = special.gammaln(alpha) - math.lgamma(prior)
    total = special.gammaln(jnp.sum(alpha, axis=1))
    return jnp.sum(each, axis=1) - total + math.lgamma(dim * prior)

  def check(data):
    data = _check_shape(data, dim)
    if np.any(data < 0):
      raise ValueError(f'data must be at least 0, got {data.min()}.')
    if not np.any(data > 0):
      raise ValueError('data must have an entry above 0, got zeros only.')

  return Family(dim, dim, lambda rows: rows, expectations, log_evidence, check)


_LOG_2PI = math.log(2 * math.pi)


def _center(dim, mean, center):
  """The prior's mean from the centre, and the centre, float64 on the host."""
  found = []
  for name, value in (('mean', mean), ('center', center)):
    value = np.asarray(value, np.float64)
    if value.shape not in [(), (dim,)] or not np.all(np.isfinite(value)):
      raise ValueError(
        f'{name} must be finite, of shape () or ({dim},), got shape '
        f'{value.shape}.'
      )
    found.append(np.broadcast_to(value, (dim,)))
  return found[0] - found[1], found[1][None, :]


def _check_gaussian(dim, scale, mean_strength):
  if dim < 1:
    raise ValueError(f'dim must be at least 1, got {dim}.')
  check_positive('scale', scale)
  check_positive('mean_strength', mean_strength)


def check_positive(name: str, value: float) -> None:
  """Refuses a number that is not finite and above 0."""
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f'{name} must be finite and positive, got {value}.')


def _check_shape(data, dim):
  data = np.asarray(data)
  if data.ndim != 2 or data.shape[1] != dim or not len(data):
    raise ValueError(
      f'data must have shape (N, {dim}) with N > 0, got {data.shape}.'
    )
  if not np.all(np.isfinite(data)):
    raise ValueError('data must be finite, got NaN or infinity.')
  return data


def _checker(dim):
  def check(data):
    _check_shape(data, dim)

  return check
