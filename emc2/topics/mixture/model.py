r"""A mixture of conjugate families, and its evidence lower bound.

.. math::
  \pi \sim \mathrm{Dir}(\alpha_0), \quad \theta_k \sim p(\theta), \quad
  z_i \sim \pi, \quad x_i \sim p(x \mid \theta_{z_i}).

The posterior is approximated by independent :math:`q(\pi)`,
:math:`q(\theta_k)`, :math:`q(z_i = k) = \tilde z_{ik}`. Given the
responsibilities :math:`\tilde z` the best :math:`q(\pi)` and
:math:`q(\theta_k)` follow from the sums :math:`N_k` and :math:`S_k`, so
these are all that is kept of them. Components come first: arrays of scores are
(K, n).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special

from emc2.topics.mixture import families

# Rows at a time are so many that their scores stay in a cache.
_SCORES_AT_ONCE = 2**18
_TOLERANCE = 1e-6


class Model(NamedTuple):
  """A mixture with its priors; :func:`make` checks them."""

  family: families.Family
  num_components: int  # K
  concentration: float  # alpha_0, of the symmetric Dirichlet prior of pi.


def make(
  family: families.Family, num_components: int, *, concentration: float = 5.0
) -> Model:
  """Makes the mixture of a family.

  Args:
    family: Of the components, with the prior of their parameters.
    num_components: K, at least 1. Static.
    concentration: alpha_0 > 0.

  Returns:
    The model.

  Raises:
    ValueError: If an argument is out of its range.
  """
  if num_components < 1:
    raise ValueError(f'num_components must be at least 1, got {num_components}')
  families.check_positive('concentration', concentration)
  return Model(family, num_components, concentration)


def check_several(model: Model) -> None:
  """Refuses a model in which there is nothing to learn of z."""
  if model.num_components < 2:
    raise ValueError(
      f'num_components must be at least 2, got {model.num_components}.'
    )


def check_responsibilities(z: jax.typing.ArrayLike, model: Model) -> None:
  """Refuses on the host what is no start.

  Args:
    z: (N, K), rows on the simplex to within 1e-6.
    model: The mixture.

  Raises:
    ValueError: If a row is off the simplex, or if all components are the same
      in every row: they would stay so for ever.
  """
  z = np.asarray(z)
  if z.ndim != 2 or z.shape[1] != model.num_components:
    raise ValueError(
      f'z0 must have shape (N, {model.num_components}), got {z.shape}.'
    )
  # Not `any > tolerance`, which NaN would pass.
  sums = np.sum(z, axis=1, dtype=np.float64)
  if not (np.all(z >= -_TOLERANCE) and np.all(np.abs(sums - 1) <= _TOLERANCE)):
    raise ValueError(
      f'the rows of z0 must lie on the simplex to within {_TOLERANCE}.'
    )
  if z.shape[1] > 1 and np.all(np.ptp(z, axis=1) <= _TOLERANCE):
    raise ValueError(
      'z0 must tell the components apart: where all are equal they stay so.'
    )


def draw_responsibilities(
  key: jax.Array, num_rows: int, num_components: int, dtype=jnp.float32
) -> jax.Array:
  """Draws rows from Dirichlet(1), (N, K): uniform on the simplex."""
  shape = num_rows, num_components
  heights = jax.random.exponential(key, shape, dtype)
  return heights / jnp.sum(heights, axis=1, keepdims=True)


def weigh(expectations: families.Expectations, features: jax.Array):
  """The scores (K, n) of features (n, F), by one matrix product.

  A score is the expected log-density, and whatever was taken off the
  log-normaliser. The product is exact to the dtype: no bfloat16, no TF32.
  """
  products = jnp.einsum(
    'kf,nf->kn',
    expectations.natural,
    features,
    precision=jax.lax.Precision.HIGHEST,
  )
  return products - expectations.log_normalizer[:, None]


def accumulate(z: jax.Array, features: jax.Array) -> families.Statistics:
  """The sums N, S of responsibilities (K, n) and features (n, F)."""
  moments = jnp.einsum(
    'kn,nf->kf', z, features, precision=jax.lax.Precision.HIGHEST
  )
  return families.Statistics(jnp.sum(z, axis=1), moments)


def expect(
  model: Model,
  statistics: families.Statistics,
  *,
  normalized: bool = True,
) -> families.Expectations:
  r"""What weighs the rows: E log pi is taken off the log-normalisers.

  Args:
    model: The mixture.
    statistics: Of the components, or of some of them.
    normalized: Whether :math:`\psi(\sum_k \tilde\pi_k)`, which is the same for
      all components, is counted; it needs the statistics of all of them.

  Returns:
    Scores made of them are :math:`u_{ik}` of the paper.
  """
  found = model.family.expectations(statistics)
  log_weight = special.digamma(model.concentration + statistics.count)
  if normalized:
    log_weight -= special.digamma(
      model.num_components * model.concentration + jnp.sum(statistics.count)
    )
  return found._replace(log_normalizer=found.log_normalizer - log_weight)


def ascend(old: jax.Array, scores: jax.Array) -> jax.Array:
  r"""The best responsibilities of some components, given the others'.

  For a subset :math:`\mathcal{K}` of the components that has the mass
  :math:`C_i = \sum_{k \in \mathcal{K}} \tilde z_{ik}` of row i,

  .. math::
    \tilde z_{ik} = C_i \frac{e^{u_{ik}}}
      {\sum_{k' \in \mathcal{K}} e^{u_{ik'}}}, \quad k \in \mathcal{K}.

  Args:
    old: (|K|, n), the responsibilities before.
    scores: (|K|, n).

  Returns:
    (|K|, n). One component alone stays as it is, and so does a row of zeros.

  References:
    Zhang et al., `Extreme Stochastic Variational Inference: Distributed
    Inference for Large Scale Mixture Models
    <https://arxiv.org/abs/1605.09499>`_, 2019, Theorem 1.
  """
  heights = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
  mass = jnp.sum(old, axis=0, keepdims=True)
  # A quotient first, so that one component alone gets exactly 1 of its mass.
  return mass * (heights / jnp.sum(heights, axis=0, keepdims=True))


def responsibilities(
  model: Model, statistics: families.Statistics, data: jax.Array
) -> jax.Array:
  """The best responsibilities of rows (n, D), (n, K)."""
  scores = weigh(expect(model, statistics), model.family.features(data))
  return jax.nn.softmax(scores, axis=0).T


def summarize(
  model: Model,
  data: jax.Array,
  z: jax.Array,
  *,
  row_batch: int | None = None,
) -> families.Statistics:
  """The statistics of responsibilities z (N, K) on data (N, D).

  Args:
    model: The mixture.
    data: (N, D).
    z: (N, K).
    row_batch: Rows at a time, static; None lets their scores fit a cache.

  Returns:
    The statistics.
  """

  def body(total, rows, z):
    found = accumulate(z.T, model.family.features(rows))
    return jax.tree.map(jnp.add, total, found)

  zero = empty_statistics(model, data.dtype)
  return _fold(body, zero, (data, z), model, row_batch)


def empty_statistics(model: Model, dtype) -> families.Statistics:
  """The statistics of no data."""
  shape = model.num_components, model.family.num_features
  return families.Statistics(
    jnp.zeros(shape[:1], dtype), jnp.zeros(shape, dtype)
  )


def sweep(
  model: Model,
  statistics: families.Statistics,
  data: jax.Array,
  *,
  row_batch: int | None = None,
) -> tuple[families.Statistics, jax.Array]:
  r"""Finds the best responsibilities of all rows, and keeps their sums only.

  Args:
    model: The mixture.
    statistics: From which the components' posteriors follow.
    data: (N, D).
    row_batch: Rows at a time, static; None lets their scores fit a cache.

  Returns:
    The new statistics, and () :math:`\sum_i \log \sum_k e^{u_{ik}}`.
  """
  expectations = expect(model, statistics)

  def body(carry, rows):
    total, evidence = carry
    features = model.family.features(rows)
    scores = weigh(expectations, features)
    top = jnp.max(scores, axis=0)
    heights = jnp.exp(scores - top[None, :])
    sums = jnp.sum(heights, axis=0)
    found = accumulate(heights / sums[None, :], features)
    total = jax.tree.map(jnp.add, total, found)
    return total, _add(evidence, jnp.sum(top + jnp.log(sums)))

  zero = jnp.zeros([], data.dtype)
  carry = empty_statistics(model, data.dtype), (zero, zero)
  total, (evidence, rest) = _fold(body, carry, (data,), model, row_batch)
  return total, evidence + rest


def elbo(
  model: Model,
  statistics: families.Statistics,
  data: jax.Array,
  *,
  row_batch: int | None = None,
) -> jax.Array:
  r"""The bound at posteriors of the components, with the best z, exactly.

  It holds for any statistics, also those of a stochastic method, and is at most
  :math:`\log p(x)`, no constant left out. In float32 the sum over chunks of
  rows is compensated, which leaves a relative error of about 1e-6; monotony
  shows in float64.

  Args:
    model: The mixture.
    statistics: From which the posteriors follow.
    data: (N, D).
    row_batch: Rows at a time, static; None lets their scores fit a cache.

  Returns:
    (), in nats, for all rows together.
  """
  _, evidence = sweep(model, statistics, data, row_batch=row_batch)
  return evidence + divergence_terms(model, statistics)


def elbo_at(
  model: Model, data: jax.Array, z: jax.Array, *, row_batch: int | None = None
) -> jax.Array:
  """The bound at responsibilities z (N, K), with the best posteriors, exactly.

  Args:
    model: The mixture.
    data: (N, D).
    z: (N, K), rows on the simplex.
    row_batch: Rows at a time, static; None lets their scores fit a cache.

  Returns:
    (), in nats.
  """
  statistics = summarize(model, data, z, row_batch=row_batch)
  return evidence_terms(model, statistics) + entropy(z)


def entropy(z: jax.Array) -> jax.Array:
  """The entropy of all rows, the sum of -z log z, with 0 log 0 = 0."""
  each = special.entr(z)
  for _ in range(z.ndim):  # One axis after another: less is lost.
    each = jnp.sum(each, axis=-1)
  return each


def evidence_terms(model: Model, statistics: families.Statistics) -> jax.Array:
  """The bound without the entropy of z, if the posteriors are the best."""
  count, alpha = statistics.count, model.concentration
  whole = model.num_components * alpha
  dirichlet = jnp.sum(special.gammaln(alpha + count) - math.lgamma(alpha))
  dirichlet += math.lgamma(whole) - special.gammaln(whole + jnp.sum(count))
  return dirichlet + jnp.sum(model.family.log_evidence(statistics))


def divergence_terms(
  model: Model, statistics: families.Statistics
) -> jax.Array:
  """Minus the divergence of the components' posteriors from their priors."""
  found = expect(model, statistics)
  each = statistics.count * found.log_normalizer
  each -= jnp.sum(statistics.moments * found.natural, axis=1)
  return evidence_terms(model, statistics) + jnp.sum(each)


def _add(total, x):
  """Adds with the rounding error kept (Neumaier)."""
  value, error = total
  new = value + x
  lost = jnp.where(
    jnp.abs(value) >= jnp.abs(x), (value - new) + x, (x - new) + value
  )
  return new, error + lost


def _fold(body, carry, arrays, model, row_batch):
  """`carry = body(carry, *rows)` over chunks of rows, the rest at the end."""
  num_rows = arrays[0].shape[0]
  if row_batch is None:
    # Even chunks leave few rows or none, and so often no second loop body.
    most = rows_at_once(model.num_components)
    row_batch = num_rows // -(-num_rows // most)
  row_batch = min(row_batch, num_rows)
  num_chunks = num_rows // row_batch
  whole = num_chunks * row_batch
  chunk = lambda x: x[:whole].reshape(num_chunks, row_batch, *x.shape[1:])
  if num_chunks == 1:
    carry = body(carry, *(x[:whole] for x in arrays))
  else:
    step = lambda carry, rows: (body(carry, *rows), None)
    carry, _ = jax.lax.scan(step, carry, tuple(map(chunk, arrays)))
  if whole < num_rows:
    carry = body(carry, *(x[whole:] for x in arrays))
  return carry


def rows_at_once(num_components: int) -> int:
  """How many rows keep the scores of so many components in a cache."""
  return max(64, _SCORES_AT_ONCE // num_components)
