"""The evidence lower bound of LDA."""

import jax
import jax.numpy as jnp
from jax.scipy import special

from emc2 import ring
from emc2.topics.lda import cells as cells_lib
from emc2.topics.lda import expectations, sweep


def elbo(
  documents: jax.Array,
  words: jax.Array,
  cells: cells_lib.Cells,
  *,
  num_words: int,
  alpha: jax.typing.ArrayLike,
  eta: jax.typing.ArrayLike,
  axis_name: str | None = None,
) -> jax.Array:
  r"""The bound at :math:`\gamma` and :math:`\lambda`, with the best phi.

  .. math::
    \mathcal{L} &= \sum_{dw} n_{dw} \log \sum_k
      e^{E \log \theta_{dk} + E \log \beta_{kw}} \\
    &+ \sum_d \Big[\log \frac{\Gamma(K \alpha)}{\Gamma(\alpha)^K}
      + \sum_k \big((\alpha - \gamma_{dk}) E \log \theta_{dk}
      + \log \Gamma(\gamma_{dk})\big) - \log \Gamma(\gamma_{d \cdot})\Big] \\
    &+ \sum_k \Big[\log \frac{\Gamma(V \eta)}{\Gamma(\eta)^V}
      + \sum_v \big((\eta - \lambda_{vk}) E \log \beta_{kv}
      + \log \Gamma(\lambda_{vk})\big) - \log \Gamma(\pi_k)\Big].

  It is at least what other responsibilities give. Padding adds nothing. In
  float32 the differences between two passes drown in rounding once they are
  below a millionth of the bound: ask in float64, `jax.enable_x64(True)`.

  Args:
    documents: (D, K), :math:`\gamma - \alpha`.
    words: (B, V / B, K), :math:`\lambda - \eta`, of all blocks or, on a ring,
      of those that are here.
    cells: The corpus, or this device's shard of it.
    num_words: V, without padding.
    alpha: Prior of a document's topics.
    eta: Prior of a topic's words.
    axis_name: The mesh axis that splits documents and words, or None.

  Returns:
    (), in nats, of the dtype of `documents`.
  """
  dtype = documents.dtype
  alpha, eta = jnp.asarray(alpha, dtype), jnp.asarray(eta, dtype)
  num_topics = documents.shape[1]
  totals = jnp.sum(words, (0, 1))
  if axis_name is not None:
    totals = jax.lax.psum(totals, axis_name)
  weights = expectations.document_weights(documents, alpha)
  cells = jax.tree.map(lambda x: jnp.asarray(x)[0], cells)
  read = jax.lax.dynamic_index_in_dim

  def visit(likelihood, own, block, number):
    others = expectations.word_weights(block, totals, eta, num_words)
    cell = jax.tree.map(lambda x: read(x, number, keepdims=False), cells)
    new = sweep.add_up(weights, others, cell).log_likelihood
    return likelihood + new, own, block

  bound = jnp.zeros_like(documents, shape=())
  bound, _, _ = ring.rotate(visit, bound, (), words, axis_name=axis_name)
  lengths = jnp.sum(documents, 1, keepdims=True)
  bound += jnp.sum(_by_entry(documents, lengths, alpha, num_topics))
  bound += jnp.sum(_constants(lengths, alpha, num_topics))
  bound += jnp.sum(_by_entry(words, totals[None, None], eta, num_words))
  if axis_name is not None:
    bound = jax.lax.psum(bound, axis_name)
  return bound + jnp.sum(_constants(totals, eta, num_words))


# Minus the divergence of Dir(prior + sums) from Dir(prior), in two parts.
def _by_entry(sums, totals, prior, size):
  log_mean = special.digamma(sums + prior)
  log_mean -= special.digamma(totals + size * prior)
  return (
    special.gammaln(sums + prior) - special.gammaln(prior) - sums * log_mean
  )


def _constants(totals, prior, size):
  return special.gammaln(size * prior) - special.gammaln(totals + size * prior)
