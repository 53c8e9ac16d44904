"""Expectations under Dirichlet distributions, and the bound they give."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy import special

TINY = 1e-30
"""Added where a sum of products may have sunk below the smallest number."""


def exp_digamma(x: jax.Array) -> jax.Array:
  r"""The exponential of the digamma function, :math:`e^{\psi(x)}`.

  In float32 by :math:`\psi(x) = \psi(x + 6) - \sum_{i < 6} (x + i)^{-1}` and
  Stirling's series, without a logarithm: a few nanoseconds less than digamma
  itself, to some five units of the last place times :math:`1 + |\psi(x)|`.

  Args:
    x: Of any shape, above 0.

  Returns:
    Of the same shape and dtype; 0 below about 0.011 in float32.
  """
  if x.dtype != jnp.float32:
    return jnp.exp(special.digamma(x))
  near = x < 32.0
  low = jnp.where(near, x, 1.0)
  # p is the product of the terms so far, q / p the sum of their inverses.
  p, q = low, jnp.ones_like(low)
  for i in range(1, 6):
    q, p = q * (low + i) + p, p * (low + i)
  far = jnp.where(near, x + 6.0, x)
  inverse = 1.0 / far
  square = inverse * inverse
  series = square * (1 / 12 - square * (1 / 120 - square / 252))
  return far * jnp.exp(-(0.5 * inverse + series) - jnp.where(near, q / p, 0.0))


def document_weights(sums: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
  r""":math:`T_{dk} = e^{\psi(\gamma_{dk}) - \psi(\sum_k \gamma_{dk})}`.

  Args:
    sums: (..., K), :math:`\gamma - \alpha`: tokens by topic.
    alpha: The prior.

  Returns:
    (..., K).
  """
  gamma = sums + jnp.asarray(alpha, sums.dtype)
  total = jnp.sum(gamma, -1, keepdims=True)
  return exp_digamma(gamma) / exp_digamma(total)


class WordWeights(NamedTuple):
  """Weights of words, and what was taken from those of each."""

  scaled: jax.Array  # (..., K).
  logs: jax.Array  # (...): of the factor common to a word's topics.


def word_weights(
  sums: jax.Array,
  totals: jax.Array,
  eta: jax.typing.ArrayLike,
  num_words: int,
) -> WordWeights:
  r"""Weights :math:`B_{vk} = e^{\psi(\lambda_{vk}) - \psi(\pi_k)}` of words.

  Those of each word are divided by about the largest. With
  :math:`\psi(x) = \psi(x + 1) - 1 / x` and :math:`\lambda_v^* = \max_k
  \lambda_{vk}`,

  .. math::
    B_{vk} \, e^{1 / \lambda_v^*} = e^{\psi(\lambda_{vk} + 1) - \psi(\pi_k)
      + 1 / \lambda_v^* - 1 / \lambda_{vk}},

  which does not underflow where all topics have some hundredths of a word: one
  that is rare, or was never seen, is still shared among them.

  Args:
    sums: (..., K), :math:`\lambda - \eta`: tokens by topic.
    totals: (K,), their sums over all words.
    eta: The prior.
    num_words: V.

  Returns:
    The weights, and the logarithms of the factors that were left out.
  """
  eta = jnp.asarray(eta, sums.dtype)
  weights = sums + eta
  largest = jnp.max(weights, -1, keepdims=True)
  scale = 1 / exp_digamma(totals + num_words * eta)
  scale = scale.reshape((1,) * (sums.ndim - 1) + (-1,))
  scaled = exp_digamma(weights + 1) * scale
  scaled *= jnp.exp(1 / largest - 1 / weights)
  return WordWeights(scaled, -1 / largest[..., 0])
