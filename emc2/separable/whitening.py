r"""Coordinates in which softmax regression is well conditioned.

Where probabilities are small, the objective's curvature along the weights of
class k is about :math:`\pi_k \Sigma + \lambda`, with the class's share of rows
:math:`\pi_k` and the second moments :math:`\Sigma` of the features. A few
frequent features hold most of it. Along a shift of all classes there is none
but the ridge's, and at the optimum :math:`\sum_k w_k = 0`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments
from emc2.separable import mlr_cells
from emc2.separable import rows as rows_lib


class Whitening(NamedTuple):
  """Scales of weights, after a rotation of the first R features."""

  basis: Any  # (R, R): eigenvectors of the first features' second moments.
  moments: Any  # (D,): eigenvalues of the first R, mean squares of the others.
  shares: Any  # (Q, K / Q): of the rows, of each class; 0 for no class.
  ridge: Any  # ().


def fit(
  features: Any,
  labels: np.ndarray,
  layout: mlr_cells.Layout,
  *,
  ridge: float,
  num_rotated: int = 256,
  curvature: float = 0.5,
) -> Whitening:
  """Measures features and classes.

  Args:
    features: As :func:`~emc2.separable.mlr_cells.split` takes them.
    labels: (N,).
    layout: Of `split`.
    ridge: lambda, above 0.
    num_rotated: R, at most so many of the most frequent features.
    curvature: What the mean of p (1 - p) is, as a share of that of p.

  Returns:
    NumPy arrays.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  arguments.check_positive('ridge', ridge)
  arguments.check_positive('curvature', curvature)
  arguments.check_at_least('num_rotated', num_rotated, 0)
  chosen = layout.feature_ids[:num_rotated]
  if isinstance(features, rows_lib.SparseRows):
    squares = np.bincount(
      features.ids, features.values**2, minlength=features.num_features
    )
    place = np.full(features.num_features, -1)
    place[chosen] = np.arange(len(chosen))
    column = place[features.ids]
    kept = column >= 0
    first = np.zeros((features.num_rows, len(chosen)), np.float32)
    first[features.row_ids[kept], column[kept]] = features.values[kept]
  else:
    features = np.asarray(features)
    squares = np.sum(features.astype(np.float64) ** 2, axis=0)
    first = features[:, chosen]
  num_rows = len(first)
  moments = (squares[layout.feature_ids] / num_rows).astype(np.float32)
  values, basis = np.linalg.eigh((first.T @ first).astype(np.float64))
  moments[: len(chosen)] = np.maximum(values, 0) / num_rows
  # A class without a row has weights, too.
  counts = np.maximum(np.bincount(labels, minlength=layout.num_classes), 1)
  shares = np.where(layout.class_ids >= 0, counts[layout.class_ids], 0)
  return Whitening(
    basis=basis.astype(np.float32),
    moments=moments,
    shares=(curvature * shares / num_rows).astype(np.float32),
    ridge=np.float32(ridge),
  )


def unwhiten(whitening: Whitening, coordinates: jax.Array) -> jax.Array:
  """Weights (Q, D, K / Q) of coordinates of the same shape, linearly.

  Each class is scaled by itself; then the mean over all classes, D numbers, is
  taken from each.
  """
  basis, moments, shares, ridge = whitening
  curvature = moments[None, :, None] * shares[:, None, :] + ridge
  weights = coordinates * jax.lax.rsqrt(curvature.astype(coordinates.dtype))
  present = (shares > 0)[:, None, :]
  weights = jnp.where(present, weights, 0)
  mean = jnp.sum(weights, axis=(0, 2)) / jnp.sum(present, dtype=weights.dtype)
  weights = jnp.where(present, weights - mean[None, :, None], 0)
  rank = basis.shape[0]
  if not rank:
    return weights
  rotated = jnp.einsum('ij,qjk->qik', basis, weights[:, :rank])
  if rank == weights.shape[1]:
    return rotated
  return jnp.concatenate([rotated, weights[:, rank:]], axis=1)
