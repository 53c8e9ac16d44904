"""LDA by NumPy loops, with responsibilities of all pairs in sight."""

import numpy as np
from scipy import special


class Serial:
  """ESVI and CVB0 on the cells of a corpus, one cell after another.

  Args:
    cells: From `cut`, without dense words.
    phi: (W, B, L * T, K): the first responsibilities of all pairs.
    num_words: V.
    alpha: Prior of a document's topics.
    eta: Prior of a topic's words.
  """

  def __init__(self, cells, phi, num_words, alpha, eta):
    self.ids = np.asarray(cells.documents).reshape(phi.shape[:3])
    self.word_ids = np.asarray(cells.words).reshape(phi.shape[:3])
    self.counts = np.asarray(cells.counts, np.float64).reshape(phi.shape[:3])
    self.phi = np.array(phi, np.float64)
    self.alpha, self.eta, self.num_words = alpha, eta, num_words
    self.num_shards, self.num_blocks = phi.shape[:2]
    shard_size = cells.dense.shape[2]
    block_size = -(-num_words // self.num_blocks)
    num_topics = phi.shape[-1]
    self.documents = np.zeros((self.num_shards, shard_size, num_topics))
    self.words = np.zeros((self.num_blocks, block_size, num_topics))
    for i in range(self.num_shards):
      for b in range(self.num_blocks):
        tokens = self.counts[i, b][:, None] * self.phi[i, b]
        np.add.at(self.documents[i], self.ids[i, b], tokens)
        np.add.at(self.words[b], self.word_ids[i, b], tokens)

  def rounds(self):
    """Lists of the cells that are visited at once, a pass of them."""
    each = self.num_blocks // self.num_shards
    for t in range(self.num_blocks):
      yield [
        (i, (i + t // each) % self.num_shards * each + t % each)
        for i in range(self.num_shards)
      ]

  def esvi_pass(self):
    """One pass with exact sums over all words."""
    for cells in self.rounds():
      totals = self.words.sum((0, 1)) + self.num_words * self.eta
      for i, b in cells:
        gamma = self.alpha + self.documents[i][self.ids[i, b]]
        lambdas = self.eta + self.words[b][self.word_ids[i, b]]
        scores = special.digamma(gamma) + special.digamma(lambdas)
        self._set(i, b, special.softmax(scores - special.digamma(totals), 1))

  def cvb0_pass(self, tile):
    """One pass of one shard, a tile of pairs at a time."""
    totals = self.words.sum((0, 1))
    for ((i, b),) in self.rounds():
      for start in range(0, self.counts.shape[2], tile):
        part = slice(start, start + tile)
        ids, word_ids = self.ids[i, b, part], self.word_ids[i, b, part]
        old = self.phi[i, b, part]
        new = self.documents[i][ids] - old + self.alpha
        new *= self.words[b][word_ids] - old + self.eta
        new /= totals - old + self.num_words * self.eta
        new /= new.sum(1, keepdims=True)
        change = self.counts[i, b, part][:, None] * (new - old)
        np.add.at(self.documents[i], ids, change)
        np.add.at(self.words[b], word_ids, change)
        totals = totals + change.sum(0)
        self.phi[i, b, part] = new

  def elbo(self):
    """The bound at the responsibilities that are remembered."""
    return elbo(
      self.documents.reshape(-1, self.documents.shape[-1]),
      self.words.reshape(-1, self.words.shape[-1]),
      self.pairs(),
      num_words=self.num_words,
      alpha=self.alpha,
      eta=self.eta,
    )

  def pairs(self):
    """Document, word, count and responsibilities of every pair."""
    shards = np.arange(self.num_shards)[:, None, None]
    blocks = np.arange(self.num_blocks)[:, None]
    ids = self.ids + shards * self.documents.shape[1]
    word_ids = self.word_ids + blocks * self.words.shape[1]
    phi = self.phi.reshape(-1, self.phi.shape[-1])
    return ids.ravel(), word_ids.ravel(), self.counts.ravel(), phi

  def _set(self, i, b, phi):
    change = self.counts[i, b][:, None] * (phi - self.phi[i, b])
    np.add.at(self.documents[i], self.ids[i, b], change)
    np.add.at(self.words[b], self.word_ids[i, b], change)
    self.phi[i, b] = phi


def elbo(documents, words, pairs, *, num_words, alpha, eta):
  """The bound of §3.11, term by term.

  Args:
    documents: (D, K), gamma - alpha; rows of padding are zero.
    words: (>= V, K), lambda - eta, likewise.
    pairs: Document, word, count (n,) and responsibilities (n, K).
    num_words: V.
    alpha: Prior of a document's topics.
    eta: Prior of a topic's words.

  Returns:
    Nats.
  """
  ids, word_ids, counts, phi = pairs
  num_topics = documents.shape[1]
  gamma, lambdas = documents + alpha, words + eta
  totals = words.sum(0) + num_words * eta
  log_theta = special.digamma(gamma)
  log_theta -= special.digamma(gamma.sum(1, keepdims=True))
  log_beta = special.digamma(lambdas) - special.digamma(totals)
  scores = log_theta[ids] + log_beta[word_ids] - np.log(np.maximum(phi, 1e-300))
  bound = np.sum(counts * np.sum(phi * scores, 1))
  gammaln = special.gammaln
  bound += len(documents) * gammaln(num_topics * alpha)
  bound -= len(documents) * num_topics * gammaln(alpha)
  bound += np.sum((alpha - gamma) * log_theta) + np.sum(gammaln(gamma))
  bound -= np.sum(gammaln(gamma.sum(1)))
  # Rows of padding have lambda = eta, and no place in the prior.
  bound += num_topics * gammaln(num_words * eta)
  bound -= num_topics * len(words) * gammaln(eta)
  bound += np.sum((eta - lambdas) * log_beta) + np.sum(gammaln(lambdas))
  return bound - np.sum(gammaln(totals))
