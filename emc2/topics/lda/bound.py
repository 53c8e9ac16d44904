"""The evidence lower bound of LDA."""

import jax
import jax.numpy as jnp
from jax.scipy import special

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
    words = jax.lax.all_gather(words, axis_name, tiled=True)
    totals = jax.lax.psum(totals, axis_name)
  weights = expectations.document_weights(documents, alpha)
  others = expectations.word_weights(words, totals, eta, num_words)

  def visit(unused_carry, block):
    del unused_carry
    others, cell = block
    return None, sweep.add_up(weights, others, cell).log_likelihood

  cell = jax.tree.map(lambda x: x[0], cells)
  _, likelihood = jax.lax.scan(visit, None, (others, cell))
  by_document = _dirichlet(documents, jnp.sum(documents, 1), alpha, num_topics)
  bound = jnp.sum(likelihood) + jnp.sum(by_document)
  if axis_name is not None:
    bound = jax.lax.psum(bound, axis_name)
  by_topic = _dirichlet(words.reshape(-1, num_topics).T, totals, eta, num_words)
  return bound + jnp.sum(by_topic)


def _dirichlet(sums, totals, prior, size):
  """Minus the divergence of Dir(prior + sums) from Dir(prior), by row."""
  posterior, total = sums + prior, totals + size * prior
  log_mean = special.digamma(posterior) - special.digamma(total)[:, None]
  by_entry = special.gammaln(posterior) - special.gammaln(prior)
  constant = special.gammaln(size * prior) - special.gammaln(total)
  return jnp.sum(by_entry - sums * log_mean, 1) + constant
