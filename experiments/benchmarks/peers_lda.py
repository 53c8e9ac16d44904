"""What topics are found with today: scikit-learn, gensim and tomotopy.

Served by `worker.py`; needs NumPy, SciPy and the package that is asked for. A
corpus comes as a file of `numpy.savez` with `indptr`, `indices`, `data` and
`shape` of its matrix of counts, and topics go back the same way, as `word_sums`
(words, topics): the parameters of the topics' Dirichlet distributions, less
their prior.
"""

import time

import numpy as np

PACKAGES = ('numpy', 'scipy', 'scikit-learn', 'gensim', 'tomotopy')


def read(path):
  """The counts of a corpus, as a matrix in compressed rows."""
  import scipy.sparse

  with np.load(path) as found:
    parts = found['data'], found['indices'], found['indptr']
    return scipy.sparse.csr_array(parts, shape=tuple(found['shape']))


class Clock:
  """Seconds since it was made, of the CPU by all threads and of the wall."""

  def __init__(self):
    self._cpu, self._wall = time.process_time(), time.perf_counter()

  def read(self):
    """Both."""
    cpu, wall = time.process_time(), time.perf_counter()
    return {'cpu': cpu - self._cpu, 'wall': wall - self._wall}


def fit_sklearn(counts, *, topics, alpha, eta, passes, seed):
  """Batch variational Bayes, as it comes but for the priors."""
  from sklearn import decomposition

  model = decomposition.LatentDirichletAllocation(
    topics,
    doc_topic_prior=alpha,
    topic_word_prior=eta,
    max_iter=passes,
    learning_method='batch',
    random_state=seed,
  )
  clock = Clock()
  model.fit(counts)
  return clock.read(), model.components_.T - eta


def fit_gensim(counts, *, topics, alpha, eta, passes, seed):
  """Online variational Bayes, as it comes but for the priors and passes."""
  from gensim import matutils, models

  corpus = list(matutils.Sparse2Corpus(counts.tocsc(), documents_columns=False))
  names = {word: str(word) for word in range(counts.shape[1])}
  clock = Clock()
  model = models.LdaModel(
    corpus,
    num_topics=topics,
    id2word=names,
    alpha=[alpha] * topics,
    eta=eta,
    passes=passes,
    random_state=seed,
    eval_every=None,
  )
  seconds = clock.read()
  return seconds, model.state.get_lambda().T - eta


def fit_tomotopy(counts, *, topics, alpha, eta, passes, seed, workers):
  """Collapsed Gibbs sampling by several threads, with its priors held."""
  import tomotopy

  model = tomotopy.LDAModel(k=topics, alpha=alpha, eta=eta, seed=seed)
  model.optim_interval = 0
  for row in range(counts.shape[0]):
    part = slice(counts.indptr[row], counts.indptr[row + 1])
    words = np.repeat(counts.indices[part], counts.data[part].astype(int))
    if len(words):
      model.add_doc([str(word) for word in words])
  clock = Clock()
  model.train(passes, workers=workers)
  seconds = clock.read()
  # It gives shares, smoothed by the prior: turned back into tokens.
  tokens = np.asarray(model.get_count_by_topics(), float)
  words = np.array([int(word) for word in model.used_vocabs])
  sums = np.zeros((counts.shape[1], topics))
  for topic in range(topics):
    shares = np.asarray(model.get_topic_word_dist(topic, normalize=True))
    total = tokens[topic] + eta * len(words)
    sums[words, topic] = shares * total - eta
  return seconds, np.maximum(sums, 0)


FITS = {
  'scikit-learn': fit_sklearn,
  'gensim': fit_gensim,
  'tomotopy': fit_tomotopy,
}


def fit(*, peer, corpus, out, **settings):
  """Fits a peer, writes its topics to `out` and gives its seconds."""
  seconds, sums = FITS[peer](read(corpus), **settings)
  np.savez(out, word_sums=sums)
  return seconds


VALUES = {'fit': fit}
CASES = {}
