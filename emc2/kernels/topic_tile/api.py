"""The fused tile of a topic model: checks, then an implementation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import lowering
from emc2.kernels.topic_tile import pallas_gpu, pallas_tpu, reference

_KERNELS = {
  'pallas_tpu': ('tpu', pallas_tpu),
  'pallas_gpu': ('cuda', pallas_gpu),
}


class TopicTile(NamedTuple):
  """What :func:`topic_tile` returns; float32."""

  doc_sums: jax.Array  # (n_d, K): expected counts of topics in documents.
  word_sums: jax.Array  # (n_v, K): expected counts of topics in words.
  log_likelihood: jax.Array | None  # (n_d,): of each document, where asked for.


def _check(doc_weights, word_weights, counts):
  """Raises what :func:`topic_tile` promises to raise."""
  given = {'doc_weights': doc_weights, 'word_weights': word_weights}
  for name, array in given.items():
    if array.ndim != 2 or 0 in array.shape or array.dtype != jnp.float32:
      raise ValueError(
        f'{name} must be a float32 matrix, got {array.dtype} of shape'
        f' {array.shape}.'
      )
  (n_d, k), (n_v, topics) = doc_weights.shape, word_weights.shape
  if topics != k:
    raise ValueError(
      f'word_weights must have the {k} topics of doc_weights, got {topics}.'
    )
  numeric = jnp.issubdtype(counts.dtype, jnp.number)
  numeric &= not jnp.issubdtype(counts.dtype, jnp.complexfloating)
  if counts.shape != (n_d, n_v) or not numeric:
    raise ValueError(
      f'counts must be ({n_d}, {n_v}), of documents and words, and real, got'
      f' {counts.dtype} of shape {counts.shape}.'
    )


def topic_tile(
  doc_weights: jax.typing.ArrayLike,
  word_weights: jax.typing.ArrayLike,
  counts: jax.typing.ArrayLike,
  *,
  log_likelihood: bool = True,
  implementation: str = 'auto',
) -> TopicTile:
  r"""Expected topic counts of a tile of documents and words.

  With weights :math:`T` of topics in documents and :math:`B` in words, a token
  of word :math:`w` in document :math:`d` is of topic :math:`k` with probability
  :math:`\phi_{dwk} = T_{dk} B_{wk} / S_{dw}`, :math:`S = T B^\top`. For counts
  :math:`X` and :math:`R_{dw} = X_{dw} / S_{dw}`,

  .. math::
    \sum_w X_{dw} \phi_{dwk} = \bigl(T \circ R B\bigr)_{dk}, \quad
    \sum_d X_{dw} \phi_{dwk} = \bigl(B \circ R^\top T\bigr)_{wk}, \quad
    \ell_d = \sum_w X_{dw} \log S_{dw}.

  These are the updates of variational inference (:math:`T` and :math:`B` the
  exponentials of expected logarithms), of collapsed inference of zeroth order
  and of non-negative matrix factorisation with the divergence of Kullback and
  Leibler. Neither :math:`S` nor :math:`R` ever exists as a whole, and
  :math:`\phi` not at all. No gradient is defined through a kernel.

  .. note::
    A score is too small to divide by, and to tell the topics by, at
    :math:`10^{-30}` and below: such a pair adds nothing to either sum, and
    :math:`X_{dw} \log 10^{-30}` to the log-likelihood. Scale the rows of
    `doc_weights`, which cancels in both sums, so that their largest entries
    are of the order of 1. All results are finite while no column of :math:`X T`
    or :math:`X B` exceeds :math:`3 \cdot 10^8`. Sums are of float32 and as
    exact as its products of matrices; weights are never rounded to bfloat16:
    kernels multiply them in six passes of the matrix unit.

  Args:
    doc_weights: (n_d, K), float32, at least 0.
    word_weights: (n_v, K), float32, at least 0.
    counts: (n_d, n_v), any float or integer dtype, at least 0; 0 where a
      document lacks the word. uint8 is the best where it suffices; bfloat16 is
      widened as a whole on a CPU.
    log_likelihood: static; whether to return it, at the price of n_d n_v
      logarithms.
    implementation: static; 'auto' takes the kernel of the platform that the
      program is lowered for if there is one for these shapes, else 'xla'.
      'xla', 'pallas_tpu' or 'pallas_gpu' take just that one.

  Returns:
    `doc_sums` and `word_sums`, the two sums above, and `log_likelihood`, which
    is None where it was not asked for.

  Raises:
    ValueError: an argument has a wrong shape or dtype, or `implementation` is
      unknown.
    NotImplementedError: the named implementation does not take these shapes.

  Examples:
    >>> same = jnp.full((2, 4), 0.25)
    >>> tile = topic_tile(same, same, jnp.array([[3, 0], [0, 1]]))
    >>> tile.doc_sums
    Array([[0.75, 0.75, 0.75, 0.75],
           [0.25, 0.25, 0.25, 0.25]], dtype=float32)

  References:
    Zhang, Raman, Ji, Yu, Vishwanathan, Dhillon, Extreme Stochastic Variational
    Inference: Distributed Inference for Large Scale Mixture Models, 2019,
    algorithm 5, https://arxiv.org/abs/1605.09499; Lee, Seung, Algorithms for
    Non-negative Matrix Factorization, 2000, equation 5.
  """
  args = [jnp.asarray(x) for x in (doc_weights, word_weights, counts)]
  _check(*args)
  fixed = lambda module: functools.partial(
    module.forward, log_likelihood=log_likelihood
  )
  kernels = {
    name: lowering.Kernel(platform, fixed(module), module.unsupported(*args))
    for name, (platform, module) in _KERNELS.items()
  }
  sums = lowering.dispatch(
    implementation, fixed(reference), kernels, *mesh.vary_alike(*args)
  )
  return TopicTile(*sums)
