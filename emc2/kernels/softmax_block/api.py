"""A block of classes visits some rows: checks, then an implementation."""

import functools

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.softmax_block import pallas_gpu, pallas_tpu, reference

_KERNELS = {
  'pallas_tpu': ('tpu', pallas_tpu),
  'pallas_gpu': ('cuda', pallas_gpu),
}


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

  Scores never reach main memory: of a few thousand rows and a hundred classes
  they would be as many bytes as the features. No gradient is defined through a
  kernel.

  .. note::
    Sums are of float32, and scores as exact as its products of matrices,
    whatever the dtype of the features: an error of :math:`2^{-9}`, which one
    product of bfloat16 has, is too much for a logarithm of many exponentials.
    Float64 stays what it is; there is no kernel for it.

  Args:
    features: x, (n, D), any float dtype, read as it is: bfloat16 halves the
      traffic.
    weights: w, (D, K), any float dtype, at least as wide as the features.
    normalizers: (n,), as `normalizer` takes them; of float32, or the dtype of
      the weights if it is wider.
    labels: (n,), int32, within the block; others, also negative, have no label
      here.
    row_weights: omega, (n,), as the normalizers.
    num_valid: (), int32: how many of the K classes are no padding; these come
      first.
    normalizer: u: `'frozen'` takes `normalizers`; `'floor'` at least the
      block's own :math:`\ell`; `'joint'` the logarithm of the sum of both
      exponentials, where `normalizers` are those of all other blocks, or -inf
      where there is no other. Static.
    implementation: static; 'auto' takes the kernel of the platform that the
      program is lowered for if there is one for these arguments, else 'xla'.
      'xla', 'pallas_tpu' or 'pallas_gpu' take just that one.

  Returns:
    The gradient (D, K), of the dtype of the weights; and for each row l, -inf
    where all classes are padding, and the score of its label, or 0.

  Raises:
    ValueError: If a shape or dtype does not fit or a name is not known.
    NotImplementedError: If the named implementation does not take these
      arguments.

  Examples:
    >>> x, w = jnp.eye(2), jnp.zeros((2, 4))
    >>> one, labels = jnp.ones(2), jnp.array([0, 7])
    >>> visit = softmax_block(
    ...     x, w, one, labels, one, jnp.int32(2), normalizer='floor')
    >>> [round(float(x), 3) for x in visit.gradient[1]]
    [0.368, 0.368, 0.0, 0.0]
    >>> visit.logsumexp
    Array([0.6931472, 0.6931472], dtype=float32)

  References:
    Raman, Srinivasan, Matsushima, Zhang, Yun, Vishwanathan, Scaling Multinomial
    Logistic Regression via Hybrid Parallelism, 2019,
    https://arxiv.org/abs/1604.04706
  """
  _check(features, weights, labels, num_valid)
  num_rows, dtype = features.shape[0], reference.wide(weights)
  for name, x in (('normalizers', normalizers), ('row_weights', row_weights)):
    if x.shape != (num_rows,) or x.dtype != dtype:
      raise ValueError(
        f'{name} must be {dtype} of shape ({num_rows},), got {x.dtype} of '
        f'shape {x.shape}.'
      )
  if normalizer not in reference.NORMALIZERS:
    raise ValueError(
      f'normalizer must be one of {reference.NORMALIZERS}, got {normalizer!r}.'
    )
  args = features, weights, normalizers, labels, row_weights, num_valid
  found = _dispatch('visit', implementation, *args, normalizer=normalizer)
  return reference.Visit(*found)


def score_block(
  features: jax.Array,
  weights: jax.Array,
  labels: jax.Array,
  num_valid: jax.Array,
  *,
  implementation: str = 'auto',
) -> reference.Scored:
  """What :func:`softmax_block` tells the rows, without the gradient.

  Args:
    features: As of :func:`softmax_block`, and so all others.
    weights: (D, K).
    labels: (n,).
    num_valid: ().
    implementation: Static.

  Returns:
    The log-sum-exp of each row and the score of its label.

  Raises:
    ValueError: If a shape or dtype does not fit or a name is not known.
    NotImplementedError: If the named implementation does not take these
      arguments.
  """
  _check(features, weights, labels, num_valid)
  args = features, weights, labels, num_valid
  return reference.Scored(*_dispatch('score', implementation, *args))


def _dispatch(name, implementation, *args, **settings):
  args = mesh.vary_alike(*args)
  pick = lambda module: functools.partial(getattr(module, name), **settings)
  kernels = {
    key: lowering.Kernel(platform, pick(module), module.unsupported(*args[:2]))
    for key, (platform, module) in _KERNELS.items()
  }
  return lowering.dispatch(implementation, pick(reference), kernels, *args)


def _check(features, weights, labels, num_valid):
  fits = features.ndim == weights.ndim == 2
  if not fits or features.shape[1] != weights.shape[0] or 0 in weights.shape:
    raise ValueError(
      f'features (n, D) and weights (D, K) must fit, got {features.shape} and '
      f'{weights.shape}.'
    )
  for name, x in (('features', features), ('weights', weights)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f'{name} must be floats, got {x.dtype}.')
  narrower = jnp.finfo(features.dtype).bits < jnp.finfo(weights.dtype).bits
  if features.dtype != weights.dtype and not narrower:
    raise ValueError(
      f'weights must be at least as wide as features, {features.dtype}, got '
      f'{weights.dtype}.'
    )
  if labels.shape != features.shape[:1] or labels.dtype != jnp.int32:
    raise ValueError(
      f'labels must be int32 of shape ({features.shape[0]},), got '
      f'{labels.dtype} of shape {labels.shape}.'
    )
  if jnp.shape(num_valid) != () or jnp.result_type(num_valid) != jnp.int32:
    raise ValueError(
      f'num_valid must be one int32, got {jnp.result_type(num_valid)} of shape '
      f'{jnp.shape(num_valid)}.'
    )
