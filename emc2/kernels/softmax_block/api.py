"""A block of classes visits some rows: which kernel runs."""

import functools

import jax

from emc2.kernels.softmax_block import reference


def softmax_block(
  features: jax.Array,
  weights: jax.Array,
  normalizers: jax.Array,
  labels: jax.Array,
  row_weights: jax.Array,
  num_valid: jax.Array,
  *,
  normalizer: str = 'frozen',
  implementation: str = 'auto',
) -> reference.Visit:
  r"""The gradient of softmax regression for a block of classes.

  With scores :math:`z_{ik} = \langle w_k, x_i \rangle`, their
  :math:`\ell_i = \log \sum_k e^{z_{ik}}` over the block and a log-normaliser
  :math:`u_i`,

  .. math::
    \sum_i \omega_i \, x_i \left(e^{z_{ik} - u_i} - [y_i = k]\right).

  Scores never reach main memory.

  Args:
    features: x, (n, D).
    weights: w, (D, K), of the dtype of the features.
    normalizers: (n,), as `normalizer` takes them.
    labels: (n,), int32, within the block; others, also negative, have no label
      here.
    row_weights: omega, (n,).
    num_valid: (), int32: how many of the K classes are no padding.
    normalizer: u: `'frozen'` takes `normalizers`; `'floor'` at least the
      block's own :math:`\ell`; `'joint'` the logarithm of the sum of both
      exponentials, where `normalizers` are those of all other blocks, or -inf
      where there is no other. Static.
    implementation: As in :func:`emc2.kernels.lowering.dispatch`.

  Returns:
    The gradient (D, K), and for each row l and the score of its label.

  Raises:
    ValueError: If a shape does not fit or a name is not known.
  """
  _check(features, weights, labels)
  num_rows = features.shape[0]
  if normalizers.shape != (num_rows,) or row_weights.shape != (num_rows,):
    raise ValueError(
      f'normalizers and row_weights must have shape ({num_rows},), got '
      f'{normalizers.shape} and {row_weights.shape}.'
    )
  if normalizer not in reference.NORMALIZERS:
    raise ValueError(
      f'normalizer must be one of {reference.NORMALIZERS}, got {normalizer!r}.'
    )
  del implementation
  run = functools.partial(reference.reference, normalizer=normalizer)
  return run(features, weights, normalizers, labels, row_weights, num_valid)


def score_block(
  features: jax.Array,
  weights: jax.Array,
  labels: jax.Array,
  num_valid: jax.Array,
) -> reference.Scored:
  """What :func:`softmax_block` tells the rows, without the gradient."""
  _check(features, weights, labels)
  return reference.reference_scores(features, weights, labels, num_valid)


def _check(features, weights, labels):
  fits = features.ndim == weights.ndim == 2
  if not fits or features.shape[1] != weights.shape[0]:
    raise ValueError(
      f'features (n, D) and weights (D, K) must fit, got {features.shape} and '
      f'{weights.shape}.'
    )
  if labels.shape != features.shape[:1]:
    raise ValueError(
      f'labels must have shape ({features.shape[0]},), got {labels.shape}.'
    )
