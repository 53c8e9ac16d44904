"""Topics of documents by every algorithm for LDA, side by side.

  python -m emc2.experiments.lda --workdir=runs/lda

finds 40 topics of 6,291 docstrings of installed packages, without a download,
by every algorithm of :mod:`emc2.topics.lda`. `--config.corpus=PATH` takes a
file of lda-c or of UCI's bags of words, and `--config.algorithm=` some of

  esvi       `blocks` of words, one after another or round a ring of devices
  esvi_topk  the same, with the `top_c` largest responsibilities of each pair
  vi         all documents, then all topics
  cvb0       the collapsed method of zeroth order
  svi        a batch of documents a step: online LDA
  scvb0      likewise, of CVB0

That command took a minute and a half on two CPU cores, most of it to read and
to compile, and came, with JAX 0.10.2, to

             perplexity   ELBO / 1e6   NPMI    seconds
  cvb0       544          -2.096       0.238    1.8
  scvb0      607          -2.344       0.150    7.4
  svi        659          -2.104       0.140    6.1
  esvi       892          -2.280       0.161    2.3
  vi         928          -2.275       0.188    1.5
  esvi_topk  932          -2.307       0.133    9.6

So CVB0 finds the best topics by far, and sooner. ESVI is ahead of VI after
equal passes, as its paper says, but both let short documents choose their
topics before there are any, and end in poor optima: `concentration=100`, nearly
equal responsibilities at first, is the best start we know; 1, the usual one,
gave perplexities of 919 and 975, and `document_steps=5`, which repeats the
E-steps of VI, made 881 of its 975. Online LDA, whose E-steps start anew and
converge, has no such trouble. With C = K / 4, esvi_topk is near esvi.

Perplexity is of document completion: of the documents held out half of the
tokens is seen, 200 E-steps find their topics, which foretell the other half.
The ELBO is that of the documents to train on, in float64, with the best
responsibilities: at the sums by document that an algorithm keeps or, of svi and
scvb0, which keep none, after E-steps. CVB0 does not ascend it. Coherence (NPMI)
is that of ten words in the documents to train on.

With several devices all of them form a ring, whose number must divide
`blocks`; svi and scvb0 use one. `--config.stream=true` lets these two read a
file batch by batch, which is all that is then in memory but for up to 1,000
documents, evenly spaced, that are held out: of them come perplexity and
coherence, and there is no ELBO. Name `--config.vocabulary=` then to see words.

`figure.png` shows bounds and perplexities against passes and seconds, and the
topics of the least perplexity; `topics.txt` has those of all. `result.json`
holds

  documents, words, tokens   of the corpus
  ALGORITHM.perplexity       of what is held out, at the end
  ALGORITHM.elbo             in nats, of all documents to train on
  ALGORITHM.coherence        mean over topics
  ALGORITHM.seconds          of its steps, without compiling and evaluating
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from emc2 import mesh as mesh_lib
from emc2.experiments import lda_figure, metrics, runner
from emc2.experiments.data import bag_of_words, document_batches, scanning
from emc2.topics import lda

ON_RING = ('esvi', 'esvi_topk', 'vi', 'cvb0')
"""Pass over all documents, which they hold, on one device or a ring of all."""

ONLINE = ('svi', 'scvb0')
"""Take a batch of documents at a time, on one device."""

ALGORITHMS = (*ON_RING, *ONLINE)

MOST_EVALUATED = 1_000
"""Documents of a stream that are held out at most: they stay in memory."""


@dataclasses.dataclass
class Config:
  """Settings."""

  corpus: str = 'docstrings'  # Or a file of lda-c or of UCI's bags of words.
  vocabulary: str = ''  # A file of a word per line; '' looks beside the corpus.
  algorithm: str = 'all'  # Or names of `ALGORITHMS`, with commas between.
  topics: int = 40  # K.
  alpha: float = 0.1
  eta: float = 0.01
  passes: int = 50
  blocks: int = 16  # Of words; a multiple of the number of devices.
  held_out: float = 0.1  # Share of the documents.
  concentration: float = 100.0  # Of the first responsibilities of esvi and vi.
  document_steps: int = 1  # E-steps of a pass of vi.
  storage: str = 'cell'  # Of esvi: or 'phi', 'topk'.
  top_c: int = 0  # C of 'topk' and esvi_topk; 0 for a quarter of the topics.
  pi_sync: str = 'rotation'  # Of esvi, esvi_topk: or 'epoch'.
  tile: int = 256  # Pairs that are worked on at once.
  dense_share: float = (
    0.0  # Words as frequent are kept dense, for accelerators.
  )
  online_passes: int = 10  # Of svi, scvb0, whose passes are many steps.
  batch_size: int = 256  # Documents of a step of svi, scvb0.
  max_steps: int = 50  # E-steps of a document in svi, at most.
  delay: float = 10.0  # tau_0 of svi, whose step sizes are (tau_0 + t)^-0.7.
  stream: bool = False  # Whether svi, scvb0 read the file batch by batch.
  evaluations: int = 10  # Of each algorithm, ever further apart.
  seed: int = 0


class Data(NamedTuple):
  """What is trained on, and what is foretold."""

  size: document_batches.Size  # Of the whole corpus.
  words: tuple[str, ...]
  training: bag_of_words.Corpus | None  # None of a stream.
  observed: lda.Documents  # Half of the tokens of those held out.
  evaluated: lda.Documents  # The other half.
  held_out: np.ndarray  # (n,): where in a stream they stand.


class Method(NamedTuple):
  """An algorithm as :func:`runner.train` runs it."""

  init: Callable[[jax.Array], Any]
  step: Callable[[jax.Array, Any, Any], tuple[Any, Any]]
  constants: Any  # What each step reads, or None.
  batches: Callable[[], Iterator[Any]] | None  # From the host, if any.
  word_sums: Callable[[Any], np.ndarray]  # Of a state, (V, K).
  document_sums: Callable[[Any], np.ndarray] | None  # (D, K), if it has them.
  steps_per_pass: int
  num_steps: int


def check(config: Config) -> list[str]:
  """Refuses bad settings that show without the corpus.

  Args:
    config: The settings.

  Returns:
    The names of the algorithms.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  possible = ONLINE if config.stream else ALGORITHMS
  if config.algorithm == 'all':
    names = list(possible)
  else:
    names = config.algorithm.split(',')
  for name in names:
    if name not in ALGORITHMS:
      raise ValueError(
        f"algorithm must be 'all' or some of {ALGORITHMS}, with commas "
        f'between, got {name!r}.'
      )
    if name not in possible:
      raise ValueError(
        f'algorithm must be some of {ONLINE} with stream, got {name!r}.'
      )
  if len(set(names)) < len(names):
    raise ValueError(f'algorithm must not repeat, got {config.algorithm!r}.')
  if jax.process_count() > 1 and not set(names) <= set(ON_RING):
    raise ValueError(
      f'algorithm must be some of {ON_RING} with several processes, got '
      f'{config.algorithm!r}.'
    )
  if config.stream and config.corpus == 'docstrings':
    raise ValueError("corpus must be a file with stream, got 'docstrings'.")
  lowest = dict(topics=2, passes=1, online_passes=1, blocks=1, tile=1)
  lowest |= dict(batch_size=1, document_steps=1, max_steps=1, top_c=0)
  for name, least in (lowest | dict(evaluations=2, seed=0)).items():
    value = getattr(config, name)
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  for name in ('alpha', 'eta'):
    value = getattr(config, name)
    if not 0 < value < math.inf:
      raise ValueError(f'{name} must be finite and above 0, got {value}.')
  if not 0 < config.held_out < 1:
    raise ValueError(f'held_out must lie in (0, 1), got {config.held_out}.')
  if not 0 <= config.dense_share <= 1:
    raise ValueError(
      f'dense_share must lie in [0, 1], got {config.dense_share}.'
    )
  if config.top_c > config.topics:
    raise ValueError(
      f'top_c must lie in [1, {config.topics}], the number of topics, or be 0 '
      f'for a quarter of them, got {config.top_c}.'
    )
  if config.blocks % jax.device_count() and set(names) & set(ON_RING):
    raise ValueError(
      f'blocks must be a multiple of the {jax.device_count()} devices, got '
      f'{config.blocks}.'
    )
  return names


def read(config: Config) -> Data:
  """Reads the corpus, or of a stream what must stay in memory.

  Args:
    config: The settings.

  Returns:
    The data.

  Raises:
    ValueError: If a file is missing or broken; it names the file and the line.
  """
  vocabulary = config.vocabulary or None
  if config.stream:
    return _measure(config, vocabulary)
  corpus = bag_of_words.read(config.corpus, vocabulary)
  training, test = bag_of_words.split_documents(
    corpus, config.held_out, seed=config.seed
  )
  size = document_batches.Size(
    corpus.num_documents,
    corpus.num_words,
    corpus.num_pairs,
    corpus.num_tokens,
    corpus.max_words,
  )
  no_rows = np.zeros(0, np.int64)
  halves = _halves(config, test.counts)
  return Data(size, _names(corpus.words, size), training, *halves, no_rows)


def _measure(config, vocabulary):
  """Reads a file twice, and keeps of it what is evaluated."""
  size = document_batches.measure(config.corpus, vocabulary)
  count = min(MOST_EVALUATED, round(config.held_out * size.num_documents))
  if not 0 < count < size.num_documents:
    raise ValueError(
      f'held_out must leave a document in each part, got {config.held_out} of '
      f'{size.num_documents} documents.'
    )
  rows = np.arange(count) * size.num_documents // count
  form = bag_of_words.file_format(config.corpus)
  kept = []
  for block in form.scan(config.corpus, vocabulary):
    starts = np.concatenate([[0], np.cumsum(block.sizes)])
    inside = rows - block.start.document
    for row in inside[(inside >= 0) & (inside < block.sizes.size)]:
      pairs = slice(starts[row], starts[row + 1])
      kept.append((block.counts[pairs], block.word_ids[pairs]))
  counts, word_ids = map(np.concatenate, zip(*kept, strict=True))
  starts = np.cumsum([0, *(len(pair[0]) for pair in kept)])
  shape = count, size.num_words
  test = scipy.sparse.csr_array((counts, word_ids, starts), shape)
  words = scanning.read_words(vocabulary) if vocabulary else None
  halves = _halves(config, test)
  return Data(size, _names(words, size), None, *halves, rows)


def _halves(config, counts):
  halves = bag_of_words.split_tokens(counts, seed=config.seed)
  halves = [lda.from_csr(half, allow_no_tokens=True) for half in halves]
  if not halves[1].num_tokens:
    raise ValueError(
      f'held_out must hold out two tokens or more of a document, got none with '
      f'{config.held_out}.'
    )
  return halves


def _names(words, size):
  return words or tuple(f'word {i}' for i in range(size.num_words))


def make_methods(
  config: Config, names: list[str], data: Data
) -> dict[str, Method]:
  """Binds algorithms to their documents.

  Args:
    config: The settings.
    names: Of the algorithms.
    data: The corpus.

  Returns:
    The methods by name.

  Raises:
    ValueError: If a setting does not go with the corpus.
  """
  made = {}
  cut = functools.cache(lambda dense: _cut(config, data, dense))
  for name in names:
    if name in ONLINE:
      made[name] = _make_online(config, name, data)
    else:
      made[name] = _make_on_ring(config, name, data, cut)
  return made


def _cut(config, data, dense):
  """Documents over all devices: the cells, their layout and the mesh."""
  devices = mesh_lib.make(ring=-1) if jax.device_count() > 1 else None
  cells, layout = lda.cut(
    lda.from_csr(data.training.counts),
    num_shards=jax.device_count(),
    num_blocks=config.blocks,
    tile=config.tile,
    dense_share=config.dense_share if dense else None,
    seed=config.seed,
  )
  if devices is None:
    cells = jax.device_put(cells)
  else:
    cells = mesh_lib.place(cells, devices, lda.cells.specs())
  return cells, layout, devices


def _make_on_ring(config, name, data, cut):
  storage = 'topk' if name == 'esvi_topk' else config.storage
  sums = name == 'vi' or (name == 'esvi' and storage == 'cell')
  cells, layout, devices = cut(sums and config.dense_share > 0)
  settings = dict(
    alpha=config.alpha,
    eta=config.eta,
    axis_name=None if devices is None else mesh_lib.RING,
  )
  model = config.topics, data.size.num_words
  if name == 'vi':
    made = lda.vi.vi(
      *model,
      concentration=config.concentration,
      document_steps=config.document_steps,
      **settings,
    )
    shardings = lda.vi.shardings()
  elif name == 'cvb0':
    made = lda.cvb0.cvb0(*model, **settings)
    shardings = lda.cvb0.shardings()
  else:
    made = lda.esvi.esvi(
      *model,
      concentration=config.concentration,
      storage=storage,
      top_c=(config.top_c or None) if storage == 'topk' else None,
      pi_sync=config.pi_sync,
      **settings,
    )
    shardings = lda.esvi.shardings(storage)
  if devices is not None:
    made = lda.on_ring(made, devices, shardings)

  def step(key, state, batch):
    return made.step(key, state, batch[1])

  return Method(
    init=lambda key: jax.jit(made.init)(key, cells),
    step=step,
    constants=cells,
    batches=None,
    word_sums=lambda state: layout.sort_words(_fetch(state.words)),
    document_sums=lambda state: layout.sort_documents(_fetch(state.documents)),
    steps_per_pass=1,
    num_steps=config.passes,
  )


def _make_online(config, name, data):
  num_documents, num_tokens = data.size.num_documents, data.size.num_tokens
  if data.training is not None:
    num_documents = data.training.num_documents
    num_tokens = data.training.num_tokens
  if config.batch_size > num_documents:
    raise ValueError(
      f'batch_size must be at most the {num_documents} documents, got '
      f'{config.batch_size}.'
    )
  model = config.topics, data.size.num_words
  priors = dict(alpha=config.alpha, eta=config.eta)
  module = {'svi': lda.svi, 'scvb0': lda.scvb0}[name]
  if name == 'svi':
    made = module.svi(
      *model,
      num_documents=num_documents,
      max_steps=config.max_steps,
      step_size=lda.fading.power(delay=config.delay),
      random_start=False,  # Half the time, and topics no worse.
      **priors,
    )
  else:
    made = module.scvb0(*model, num_tokens=float(num_tokens), **priors)

  def batches():
    if data.training is None:
      stream = document_batches.stream(
        config.corpus,
        batch_size=config.batch_size,
        max_words=data.size.max_words,
        vocabulary=config.vocabulary or None,
      )
      return WithoutHeldOut(iter(stream), data.held_out, num_documents)
    corpus = data.training
    return iter(
      document_batches.batches(
        corpus,
        batch_size=config.batch_size,
        seed=config.seed,
        max_words=corpus.max_words,
      )
    )

  steps_per_pass = num_documents // config.batch_size
  return Method(
    init=lambda key: jax.jit(made.init)(key),
    step=made.step,
    constants=None,
    batches=batches,
    word_sums=lambda state: np.asarray(module.word_sums(state)),
    document_sums=None,
    steps_per_pass=steps_per_pass,
    num_steps=config.online_passes * steps_per_pass,
  )


def _fetch(x):
  """An array on the host, from all processes."""
  if not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


class WithoutHeldOut:
  """Batches of a stream, in which documents that are held out are empty.

  Args:
    batches: Of the whole file in its order, again and again.
    held_out: (n,), the places in the file of the documents held out.
    num_documents: Of the file.
  """

  def __init__(
    self, batches: Iterator[Any], held_out: np.ndarray, num_documents: int
  ):
    self._batches = batches
    self._held_out = held_out
    self._num_documents = num_documents
    self._first = 0  # Place of the next batch's first document.

  def __iter__(self):
    return self

  def __next__(self) -> lda.documents.Batch:
    batch = next(self._batches)
    rows = self._first + np.arange(len(batch.counts))
    rows %= self._num_documents
    self._first = int(rows[-1] + 1) % self._num_documents
    kept = ~np.isin(rows, self._held_out)
    return batch._replace(counts=batch.counts * kept[:, None])

  def get_state(self) -> dict[str, Any]:
    """The place in the file."""
    return {'batches': self._batches.get_state(), 'first': self._first}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a place in the file."""
    self._batches.set_state(state['batches'])
    self._first = state['first']


def make_evaluate(
  config: Config, method: Method, data: Data
) -> Callable[[Any], dict[str, float]]:
  """Makes what a training measures at some of its steps.

  Args:
    config: The settings.
    method: Its algorithm.
    data: The corpus.

  Returns:
    Of a state the perplexity, and but for a stream the bound; or nothing,
    where none is due.
  """
  first = max(1, method.steps_per_pass // 4)
  due = np.geomspace(first, method.num_steps, config.evaluations - 1)
  due = {0, *np.round(due).astype(int).tolist()}
  priors = dict(alpha=config.alpha, eta=config.eta)
  if data.training is not None:
    documents = lda.from_csr(data.training.counts)
    cells, layout = lda.cut(documents, tile=4096, seed=None)

  def evaluate(state):
    if int(state.count) not in due:
      return {}
    words = method.word_sums(state)
    found = {
      'perplexity': lda.inference.perplexity(
        words, data.observed, data.evaluated, **priors
      )
    }
    if data.training is None:
      return found
    if method.document_sums is not None:
      sums = method.document_sums(state)
    else:
      shares = lda.inference.transform(words, documents, **priors)
      lengths = np.bincount(
        documents.document_ids, documents.counts, len(shares)
      )
      lengths = lengths[:, None]
      total = lengths + config.topics * config.alpha
      sums = np.maximum(shares * total - config.alpha, 0)
    ids = layout.document_ids[0]
    with jax.enable_x64(True):
      wide = lambda x: jnp.asarray(x, jnp.float64)
      elbo = _bound(
        wide(sums[ids]),
        wide(layout.place_words(words)),
        cells._replace(counts=wide(cells.counts), dense=wide(cells.dense)),
        num_words=data.size.num_words,
        **priors,
      )
      return found | {'elbo': float(elbo)}

  return evaluate


_bound = jax.jit(lda.elbo, static_argnames='num_words')


def train(
  config: Config, name: str, method: Method, data: Data, workdir: epath.PathLike
) -> np.ndarray:
  """Fits topics by one algorithm.

  Args:
    config: The settings.
    name: Of the algorithm.
    method: The same, bound to its documents.
    data: The corpus.
    workdir: Its folder.

  Returns:
    (V, K), lambda - eta.
  """
  init_key, key = jax.random.split(jax.random.key(config.seed))
  state = runner.train(
    method.init(init_key),
    method.step,
    None if method.batches is None else method.batches(),
    constants=method.constants,
    key=key,
    num_steps=method.num_steps,
    workdir=workdir,
    name=name,
    log_every=method.steps_per_pass,
    checkpoint_every=10 * method.steps_per_pass,
    keep=1,
    evaluate=make_evaluate(config, method, data),
    evaluate_every=1,
  )
  return method.word_sums(state)


def describe(data: Data, word_sums: np.ndarray) -> list[lda_figure.Topic]:
  """The words of topics, those of most tokens first."""
  counts = (
    data.observed
    if data.training is None
    else lda.from_csr(data.training.counts)
  )
  ids = lda.topics.top_words(word_sums, min(10, data.size.num_words))
  coherence = lda.topics.coherence(ids, counts)
  shares = word_sums.sum(0) / word_sums.sum()
  return [
    lda_figure.Topic(shares[k], coherence[k], [data.words[i] for i in ids[k]])
    for k in np.argsort(-shares)
  ]


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Fits by every algorithm, scores, and shows the topics."""
  names = check(config)
  data = read(config)
  if config.topics > data.size.num_tokens:
    logging.warning(
      'topics=%d are more than the %d tokens.',
      config.topics,
      data.size.num_tokens,
    )
  methods = make_methods(config, names, data)
  summary = {
    'documents': float(data.size.num_documents),
    'words': float(data.size.num_words),
    'tokens': float(data.size.num_tokens),
  }
  curves, topics = {}, {}
  for name, method in methods.items():
    folder = workdir / name
    word_sums = train(config, name, method, data, folder)
    topics[name] = describe(data, word_sums)
    series = runner.read_metrics(folder)
    seconds = runner.seconds_per_step(folder)
    steps, perplexity = series['perplexity']
    bounds = None
    if data.training is not None:
      bounds = series['elbo'][1]
      summary[f'{name}.elbo'] = bounds[-1]
      bounds = bounds / data.training.num_tokens
    curves[name] = lda_figure.Curve(
      steps / method.steps_per_pass, steps * seconds, bounds, perplexity
    )
    summary[f'{name}.perplexity'] = perplexity[-1]
    summary[f'{name}.coherence'] = np.mean(
      [topic.coherence for topic in topics[name]]
    )
    summary[f'{name}.seconds'] = method.num_steps * seconds
  save_topics(topics, workdir / 'topics.txt')
  best = min(names, key=lambda name: summary[f'{name}.perplexity'])
  figure = lda_figure.draw(
    curves, topics[best], title=f'The topics of {best}, by their tokens'
  )
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


def save_topics(
  topics: dict[str, list[lda_figure.Topic]], path: epath.Path
) -> None:
  """Writes the words of all topics: share of tokens, coherence, words."""
  if jax.process_index() == 0:
    lines = []
    for name, found in topics.items():
      lines.append(f'{name}: share of tokens, NPMI, words')
      lines += [
        f'{topic.share:6.1%} {topic.coherence:6.3f}  {" ".join(topic.words)}'
        for topic in found
      ]
      lines.append('')
    metrics.write_atomically(path, '\n'.join(lines).encode())


if __name__ == '__main__':
  runner.launch(Config(), run)
