"""Topics of documents as a scikit-learn estimator.

  from emc2.experiments.latent_dirichlet_allocation import (
    LatentDirichletAllocation,
  )

  counts = CountVectorizer().fit_transform(texts)
  model = LatentDirichletAllocation(n_components=20, random_state=0)
  shares = model.fit_transform(counts)

It takes the place of :class:`sklearn.decomposition.LatentDirichletAllocation`,
in a pipeline too.
"""

import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import sklearn.base
from sklearn.utils import check_random_state, validation

from emc2 import arguments
from emc2.topics import lda

LEARNING_METHODS = ('cvb0', 'esvi', 'vi', 'svi')


class LatentDirichletAllocation(
  sklearn.base.ClassNamePrefixFeaturesOutMixin,
  sklearn.base.TransformerMixin,
  sklearn.base.BaseEstimator,
):
  r"""Latent Dirichlet allocation with CVB0, ESVI, VI or SVI in JAX.

  Parameters, attributes and methods are those of scikit-learn's class where
  their names are; what is said of them here is where it differs or needs to be
  known. It finds topics in float32.

  Args:
    n_components: Topics, K, at least 1.
    doc_topic_prior: :math:`\alpha`, above 0; None for 1 / K.
    topic_word_prior: :math:`\eta`, above 0; None for 1 / K.
    learning_method: 'cvb0', of which a pass costs least and whose topics are
      mostly the best; 'esvi'; 'vi', which is scikit-learn's 'batch' with one
      E-step for each M-step; or 'svi', which is its 'online'. See
      :mod:`emc2.topics.lda`.
    learning_decay: :math:`\kappa` of the step sizes of 'svi',
      :math:`(\tau_0 + t)^{-\kappa}`, in (0.5, 1].
    learning_offset: :math:`\tau_0`, at least 1.
    max_iter: Passes over the documents, at least 1. None ends before.
    batch_size: Documents of a step of 'svi'; each pass has an order of its own.
    total_samples: Documents that `partial_fit` will have seen in the end.
    n_blocks: Blocks of words of 'esvi': each sees what the one before it
      changed. At most as many as words are taken.
    mean_change_tol: What the mean change of a document's :math:`\gamma` ends
      its E-steps at, in `transform` and 'svi', at least 0.
    max_doc_update_iter: E-steps of a document at most, at least 1.
    random_state: None, an int or a `numpy.random.RandomState`.

  Attributes:
    components_: (n_components, n_features) :math:`\lambda`: the pseudocounts of
      words in topics.
    n_iter_: Passes that were made.
    n_batch_iter_: Steps of 'svi' and `partial_fit`.
    bound_: Perplexity of the documents that were fitted, as `perplexity` gives.
    doc_topic_prior_: :math:`\alpha`.
    topic_word_prior_: :math:`\eta`.
    n_features_in_: Words.
    feature_names_in_: Their names, where X was a data frame.

  Examples:
    >>> counts = np.kron(np.eye(2), np.full((20, 5), 3))
    >>> model = LatentDirichletAllocation(2, random_state=0)
    >>> shares = model.fit_transform(counts)
    >>> bool((shares.max(1) > 0.9).all())
    True
    >>> model.get_feature_names_out().tolist()
    ['latentdirichletallocation0', 'latentdirichletallocation1']
  """

  def __init__(
    self,
    n_components: numbers.Integral = 10,
    *,
    doc_topic_prior: numbers.Real | None = None,
    topic_word_prior: numbers.Real | None = None,
    learning_method: str = 'cvb0',
    learning_decay: numbers.Real = 0.7,
    learning_offset: numbers.Real = 10.0,
    max_iter: numbers.Integral = 50,
    batch_size: numbers.Integral = 128,
    total_samples: numbers.Real = 1e6,
    n_blocks: numbers.Integral = 8,
    mean_change_tol: numbers.Real = 1e-3,
    max_doc_update_iter: numbers.Integral = 100,
    random_state: Any = None,
  ):
    self.n_components = n_components
    self.doc_topic_prior = doc_topic_prior
    self.topic_word_prior = topic_word_prior
    self.learning_method = learning_method
    self.learning_decay = learning_decay
    self.learning_offset = learning_offset
    self.max_iter = max_iter
    self.batch_size = batch_size
    self.total_samples = total_samples
    self.n_blocks = n_blocks
    self.mean_change_tol = mean_change_tol
    self.max_doc_update_iter = max_doc_update_iter
    self.random_state = random_state

  def fit(self, X: Any, y: Any = None) -> 'LatentDirichletAllocation':
    """Finds topics.

    Args:
      X: (n_samples, n_features) counts of words, dense or sparse, at least 0;
        whole numbers or not.
      y: Is ignored.

    Returns:
      This estimator.

    Raises:
      ValueError: If a parameter breaks its rule, or X is no such matrix.
    """
    self._check_parameters()
    X = self._check(X, reset=True)
    documents = lda.from_csr(X)
    random = check_random_state(self.random_state)
    self._set_priors()
    self.n_batch_iter_ = 0
    if self.learning_method == 'svi':
      self._start(random, X)
      for _ in range(self.max_iter):
        order = random.permutation(X.shape[0])
        self._learn(X, order, X.shape[0])
    else:
      self._set_components(self._fit_whole(documents, random), X.dtype)
    self.n_iter_ = self.max_iter
    self.bound_ = self.perplexity(X)
    return self

  def partial_fit(self, X: Any, y: Any = None) -> 'LatentDirichletAllocation':
    """Learns from some documents, by steps of 'svi', whatever found the topics.

    Args:
      X: As in `fit`, with the same words at every call.
      y: Is ignored.

    Returns:
      This estimator.

    Raises:
      ValueError: As of `fit`.
    """
    self._check_parameters()
    first = not hasattr(self, 'components_')
    X = self._check(X, reset=first)
    if first:
      self._set_priors()
      self.n_batch_iter_ = self.n_iter_ = 0
      self._start(check_random_state(self.random_state), X)
    self._learn(X, np.arange(X.shape[0]), int(self.total_samples))
    self.n_iter_ += 1
    return self

  def transform(self, X: Any, *, normalize: bool = True) -> np.ndarray:
    r"""Finds the topics of documents.

    Args:
      X: As in `fit`.
      normalize: Whether rows add up to 1; else they are :math:`\gamma`.

    Returns:
      (n_samples, n_components).
    """
    validation.check_is_fitted(self)
    X = self._check(X, reset=False)
    documents = lda.from_csr(X, allow_no_tokens=True)
    shares = lda.inference.transform(
      self._word_sums(),
      documents,
      alpha=self.doc_topic_prior_,
      eta=self.topic_word_prior_,
      max_steps=self.max_doc_update_iter,
      tolerance=self.mean_change_tol,
    ).astype(X.dtype)
    if normalize:
      return shares
    total = np.asarray(X.sum(axis=1)).reshape(-1, 1)
    total += self.n_components * self.doc_topic_prior_
    return shares * total.astype(X.dtype)

  def fit_transform(
    self, X: Any, y: Any = None, *, normalize: bool = True
  ) -> np.ndarray:
    """What `fit` and then `transform` give."""
    return self.fit(X, y).transform(X, normalize=normalize)

  def score(self, X: Any, y: Any = None) -> float:
    """The evidence lower bound of documents, in nats, as scikit-learn has it.

    That of the topics is part of it: scores compare models on equal documents.

    Args:
      X: As in `fit`, with at least one token.
      y: Is ignored.

    Returns:
      The bound.
    """
    gamma = self.transform(X, normalize=False)
    X = self._check(X, reset=False)
    cells, layout = lda.cut(lda.from_csr(X), tile=4096, seed=None)
    sums = np.maximum(gamma - self.doc_topic_prior_, 0)
    with jax.enable_x64(True):
      cells = cells._replace(
        counts=cells.counts.astype(np.float64),
        dense=cells.dense.astype(np.float64),
      )
      bound = _elbo(
        jnp.asarray(sums[layout.document_ids[0]], jnp.float64),
        jnp.asarray(layout.place_words(self._word_sums()), jnp.float64),
        cells,
        self.n_features_in_,
        self.doc_topic_prior_,
        self.topic_word_prior_,
      )
      return float(bound)

  def perplexity(self, X: Any, sub_sampling: bool = False) -> float:
    r"""The exponential of minus the bound per token, as scikit-learn has it.

    It is not the held-out perplexity of :func:`emc2.topics.lda.inference`,
    which tells half of a document's tokens from the other and is lower.

    Args:
      X: As in `score`.
      sub_sampling: Must be False.

    Returns:
      At least 1.
    """
    if sub_sampling:
      raise NotImplementedError('sub_sampling must be False, got True.')
    bound = self.score(X)
    return float(np.exp(-bound / np.sum(self._check(X, reset=False))))

  @property
  def _n_features_out(self):
    return self.components_.shape[0]

  def __sklearn_tags__(self):
    tags = super().__sklearn_tags__()
    tags.input_tags.positive_only = True
    tags.input_tags.sparse = True
    tags.transformer_tags.preserves_dtype = ['float32', 'float64']
    return tags

  def _check_parameters(self):
    lowest = dict(n_components=1, max_iter=1, batch_size=1)
    lowest |= dict(n_blocks=1, max_doc_update_iter=1)
    for name, least in lowest.items():
      value = getattr(self, name)
      if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(
          f'{name} must be an integer, at least {least}, got {value!r}.'
        )
    for name in ('doc_topic_prior', 'topic_word_prior'):
      if getattr(self, name) is not None:
        arguments.check_positive(name, getattr(self, name))
    arguments.check_at_least('total_samples', self.total_samples, 1)
    arguments.check_at_least('mean_change_tol', self.mean_change_tol, 0)
    arguments.check_at_least('learning_offset', self.learning_offset, 1)
    arguments.check_one_of(
      'learning_method', self.learning_method, LEARNING_METHODS
    )
    if not 0.5 < self.learning_decay <= 1:
      raise ValueError(
        f'learning_decay must lie in (0.5, 1], got {self.learning_decay}.'
      )

  def _check(self, X, *, reset):
    X = validation.validate_data(
      self,
      X,
      reset=reset,
      accept_sparse='csr',
      dtype=[np.float64, np.float32],
    )
    validation.check_non_negative(X, type(self).__name__)
    return scipy.sparse.csr_array(X)

  def _set_priors(self):
    default = 1 / self.n_components
    of = lambda prior: default if prior is None else float(prior)
    self.doc_topic_prior_ = of(self.doc_topic_prior)
    self.topic_word_prior_ = of(self.topic_word_prior)

  def _word_sums(self):
    """(V, K), lambda - eta, float32."""
    sums = self.components_.T.astype(np.float64) - self.topic_word_prior_
    return sums.astype(np.float32)

  def _set_components(self, word_sums, dtype):
    components = word_sums.T.astype(np.float64) + self.topic_word_prior_
    self.components_ = np.ascontiguousarray(components.astype(dtype))

  def _fit_whole(self, documents, random):
    """The sums of words by passes over all documents."""
    num_words, pairs = documents.num_words, documents.counts
    if self.n_components == 1:  # It has all tokens.
      return np.bincount(documents.word_ids, pairs, num_words)[:, None]
    blocks = 1
    if self.learning_method == 'esvi':
      blocks = min(self.n_blocks, num_words)
    cells, layout = lda.cut(
      documents,
      num_blocks=blocks,
      tile=min(256, _power_of_two(len(pairs))),
      seed=random.randint(2**31 - 1),
    )
    key = jax.random.key(random.randint(2**31 - 1))
    init, step = _method(
      self.learning_method,
      int(self.n_components),
      num_words,
      self.doc_topic_prior_,
      self.topic_word_prior_,
    )
    cells = jax.device_put(cells)
    state = init(key, cells)
    for _ in range(self.max_iter):
      state, _ = step(key, state, cells)
    return layout.sort_words(state.words)

  def _start(self, random, X):
    state = lda.svi.init(
      jax.random.key(random.randint(2**31 - 1)),
      num_topics=int(self.n_components),
      num_words=X.shape[1],
      eta=self.topic_word_prior_,
    )
    self._set_components(np.asarray(lda.svi.word_sums(state)), X.dtype)

  def _learn(self, X, order, total):
    """Steps of 'svi' on the rows of X in an order."""
    model = int(self.n_components), X.shape[1]
    init, step = _online(
      *model,
      total,
      self.doc_topic_prior_,
      self.topic_word_prior_,
      float(self.learning_decay),
      float(self.learning_offset),
      int(self.max_doc_update_iter),
      float(self.mean_change_tol),
    )
    key = jax.random.key(0)  # No step draws.
    state = init(key, self._word_sums())
    state = state._replace(count=jnp.int32(self.n_batch_iter_))
    documents = lda.from_csr(X, allow_no_tokens=True)
    width = _power_of_two(int(np.diff(documents.starts).max(initial=1)))
    for first in range(0, len(order), self.batch_size):
      rows = order[first : first + self.batch_size]
      state, _ = step(key, state, lda.documents.pad(documents, rows, width))
      self.n_batch_iter_ += 1
    self._set_components(np.asarray(lda.svi.word_sums(state)), X.dtype)


def _power_of_two(size):
  """The least that is at least `size`."""
  return 1 << max(size - 1, 0).bit_length()


@functools.lru_cache(maxsize=8)
def _method(name, num_topics, num_words, alpha, eta):
  """The compiled functions of a method, which fits of equal shapes share."""
  make = {'cvb0': lda.cvb0.cvb0, 'esvi': lda.esvi.esvi, 'vi': lda.vi.vi}[name]
  # Nearly equal shares leave less chance in the topics of short documents.
  start = {} if name == 'cvb0' else {'concentration': 100.0}
  made = make(num_topics, num_words, alpha=alpha, eta=eta, **start)
  return jax.jit(made.init), jax.jit(made.step, donate_argnums=1)


@functools.lru_cache(maxsize=8)
def _online(
  num_topics, num_words, total, alpha, eta, decay, offset, max_steps, tolerance
):
  """Likewise of 'svi', for one topic too."""
  settings = dict(eta=eta, num_topics=num_topics, num_words=num_words)
  step = functools.partial(
    lda.svi.step,
    num_documents=total,
    step_size=lda.fading.power(decay, offset),
    alpha=alpha,
    eta=eta,
    max_steps=max_steps,
    tolerance=tolerance,
    random_start=False,
  )
  return functools.partial(lda.svi.init, **settings), jax.jit(step)


@functools.partial(jax.jit, static_argnums=3)
def _elbo(documents, words, cells, num_words, alpha, eta):
  return lda.elbo(
    documents, words, cells, num_words=num_words, alpha=alpha, eta=eta
  )
