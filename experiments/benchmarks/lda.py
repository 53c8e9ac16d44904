"""Topic models: how soon a perplexity is reached, and what a pass costs.

Cases, for `--only`:

- `peers`: CVB0 against scikit-learn's batch variational Bayes, gensim and
  tomotopy (`peers_lda.py`). Each peer runs to the end on a corpus of which a
  tenth is held out; ours must come as low as it ended. All are judged by the
  same document completion, half of the tokens of each document given;
- `algorithms`: where each of ours ends, and when it is as low as scikit-learn;
- `pass`: one pass over all pairs in product form, against plain gathers and
  scatters of all pairs at once, and against dense products;
- `kernel`: the dense tile where there is an accelerator.

The corpus is `EMC2_BENCH_CORPUS`, a path or a name that `bag_of_words.read`
knows; by default that of the Associated Press if it lies in `../shared/data`,
else 'docstrings'. Wall times hold no compilation, which stands in a row of its
own, and every side may use all cores; ours has one device.
"""

import functools
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from emc2.experiments.benchmarks import harness, peers_lda
from emc2.experiments.data import bag_of_words
from emc2.kernels import topic_tile
from emc2.kernels.topic_tile import specs
from emc2.topics import lda
from emc2.topics.lda import (
  cvb0,
  esvi,
  expectations,
  inference,
  scvb0,
  svi,
  sweep,
  vi,
)

PACKAGES = ('jax', 'jaxlib', 'numpy', 'scipy', 'scikit-learn')
ALPHA, ETA = 0.1, 0.01
AP = '../shared/data/ap.dat.gz'
LOOPS = 20

_OURS = 'emc2.experiments.benchmarks.lda'
_PEERS = str(pathlib.Path(__file__).parent / 'peers_lda.py')

PEERS = {
  'scikit-learn, 20 passes': dict(peer='scikit-learn', passes=20),
  'gensim, 5 passes': dict(peer='gensim', passes=5),
  'tomotopy, 100 passes, 2 threads': dict(
    peer='tomotopy', passes=100, workers=2
  ),
  'tomotopy, 300 passes, 2 threads': dict(
    peer='tomotopy', passes=300, workers=2
  ),
}
_TARGETS = {'scikit-learn': 0.1, 'gensim': 0.1, 'tomotopy': 1.0}

ALGORITHMS = {
  'cvb0': dict(passes=60),
  'esvi': dict(passes=60, blocks=8),
  'vi': dict(passes=60),
  'vi, 5 steps a document': dict(passes=30),
  'svi': dict(passes=10),
  'scvb0': dict(passes=10),
}


def corpus_name() -> str:
  """The corpus of this run."""
  default = AP if pathlib.Path(AP).is_file() else 'docstrings'
  return os.environ.get('EMC2_BENCH_CORPUS') or default


def _save(path, counts):
  parts = dict(data=counts.data, indices=counts.indices, indptr=counts.indptr)
  np.savez(path, shape=counts.shape, **parts)


def prepare(folder: str, name: str, smoke: bool) -> None:
  """Writes what is learnt from, what is observed and what is foretold."""
  counts = bag_of_words.read(name)
  train, held_out = bag_of_words.split_documents(counts, 0.1, seed=0)
  observed, evaluated = bag_of_words.split_tokens(held_out.counts, seed=0)
  parts = dict(train=train.counts, observed=observed, evaluated=evaluated)
  for part, matrix in parts.items():
    rows = matrix[:60] if smoke else matrix
    _save(os.path.join(folder, f'{part}.npz'), rows)


def _documents(folder, part):
  matrix = peers_lda.read(os.path.join(folder, f'{part}.npz'))
  return lda.from_csr(matrix)


def _perplexity(folder, word_sums):
  observed, evaluated = (
    _documents(folder, part) for part in ('observed', 'evaluated')
  )
  word_sums = np.asarray(word_sums, np.float32)
  return inference.perplexity(
    word_sums, observed, evaluated, alpha=ALPHA, eta=ETA
  )


def _make(algorithm, documents, topics, blocks):
  """Batches of a pass, `init`, `step` and what makes the sums by word."""
  sizes = topics, documents.num_words
  priors = dict(alpha=ALPHA, eta=ETA)
  if algorithm in ('svi', 'scvb0'):
    width = int(np.diff(documents.starts).max())
    rng = np.random.default_rng(0)
    rows = rng.permutation(documents.num_documents)
    size = min(100, len(rows))
    batches = [
      lda.documents.pad(documents, rows[i : i + size], width)
      for i in range(0, len(rows) - size + 1, size)
    ]
    if algorithm == 'svi':
      size = documents.num_documents
      method = svi.svi(*sizes, num_documents=size, **priors)
      return batches, method.init, method.step, svi.word_sums
    size = documents.num_tokens
    method = scvb0.scvb0(*sizes, num_tokens=size, **priors)
    return batches, method.init, method.step, scvb0.word_sums
  dense = lda.cells.DENSE_SHARE if algorithm in ('esvi', 'vi') else None
  cells, layout = lda.cut(
    documents, num_blocks=blocks, dense_share=dense, seed=0
  )
  cells = jax.tree.map(jnp.asarray, cells)
  if algorithm == 'cvb0':
    method = cvb0.cvb0(*sizes, **priors)
  elif algorithm == 'esvi':
    method = esvi.esvi(*sizes, **priors)
  else:
    steps = 5 if '5 steps' in algorithm else 1
    method = vi.vi(*sizes, document_steps=steps, **priors)
  init = lambda key: method.init(key, cells)
  word_sums = lambda state: layout.sort_words(state.words)
  return [cells], init, method.step, word_sums


def learn(
  *, folder, algorithm, topics, passes, blocks=1, seed=0, until=None, every=1
):
  """Seconds and perplexity after each of some passes of ours.

  Args:
    folder: From `prepare`.
    algorithm: One of `ALGORITHMS`.
    topics: K.
    passes: At most.
    blocks: Of words.
    seed: Of the start.
    until: A perplexity at which to stop, or None.
    every: Passes between two that are judged.

  Returns:
    `compile`, in seconds, and lists of `cpu`, `wall` and `perplexity`; the
    first two hold cutting the corpus and the draw of the start too.
  """
  documents = _documents(folder, 'train')
  clock = peers_lda.Clock()
  batches, init, step, word_sums = _make(algorithm, documents, topics, blocks)
  spent = clock.read()
  key = jax.random.key(seed)
  clock = peers_lda.Clock()
  init = jax.jit(init).lower(key).compile()
  state = jax.block_until_ready(init(key))
  step = jax.jit(step, donate_argnums=1).lower(key, state, batches[0]).compile()
  compiled = clock.read()['wall']
  del state
  found = {'compile': compiled, 'cpu': [], 'wall': [], 'perplexity': []}
  clock = peers_lda.Clock()
  state = jax.block_until_ready(init(key))
  _add(spent, clock)
  for number in range(1, passes + 1):
    clock = peers_lda.Clock()
    for i, batch in enumerate(batches):
      own = jax.random.fold_in(key, number * len(batches) + i)
      state, _ = step(own, state, batch)
    jax.block_until_ready(state)
    _add(spent, clock)
    if number % every and number != passes:
      continue
    found['cpu'].append(spent['cpu'])
    found['wall'].append(spent['wall'])
    perplexity = _perplexity(folder, word_sums(state))
    found['perplexity'].append(perplexity)
    if until is not None and perplexity <= until:
      break
  return found


def _add(spent, clock):
  for name, seconds in clock.read().items():
    spent[name] += seconds


def _judge(*, folder, topics_path):
  with np.load(topics_path) as found:
    return _perplexity(folder, found['word_sums'])


def _plain(document_weights, word_weights, ids, word_ids, counts):
  """All pairs at once, as one writes it first."""
  rows, others = document_weights[ids], word_weights[word_ids]
  scores = jnp.sum(rows * others, 1)
  phi = rows * others * (counts / (scores + expectations.TINY))[:, None]
  by_document = jnp.zeros_like(document_weights).at[ids].add(phi)
  return by_document, jnp.zeros_like(word_weights).at[word_ids].add(phi)


def _dense(document_weights, word_weights, counts):
  """All documents by all words."""
  scores = document_weights @ word_weights.T
  ratio = counts / (scores + expectations.TINY)
  by_document = document_weights * (ratio @ word_weights)
  return by_document, word_weights * (ratio.T @ document_weights)


def time_pass(*, folder, topics, form):
  """One pass over the whole corpus, given all weights."""
  documents = _documents(folder, 'train')
  rng = np.random.default_rng(0)
  draw = lambda rows: jnp.asarray(rng.random((rows, topics), np.float32))
  if form in ('ours', 'sparse'):
    share = lda.cells.DENSE_SHARE if form == 'ours' else None
    cells, layout = lda.cut(documents, dense_share=share, seed=None)
    args = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), cells)
    rows = layout.document_ids.size, layout.word_ids.size
    no_logs = jnp.zeros(rows[1])

    def fn(weights, others, cell):
      others = expectations.WordWeights(others, no_logs)
      return sweep.add_up(weights, others, cell)[:2]

    args = (args,)
  elif form == 'plain':
    args = documents.document_ids, documents.word_ids, documents.counts
    fn, rows = _plain, (documents.num_documents, documents.num_words)
  else:
    rows = documents.num_documents, documents.num_words
    counts = np.zeros(rows, np.float32)
    counts[documents.document_ids, documents.word_ids] = documents.counts
    fn, args = _dense, (counts,)
  args = draw(rows[0]), draw(rows[1]), *jax.tree.map(jnp.asarray, args)
  compiled = jax.jit(fn).lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def time_kernel(*, spec: str, implementation: str):
  """The dense tile at a shape of its `specs.py`, `LOOPS` times at once."""
  rng = np.random.default_rng(0)
  likes = specs.SPECS[spec].args()
  draw = lambda like: jnp.asarray(rng.random(like.shape) * 3, like.dtype)
  weights, others, counts = map(draw, likes)

  @jax.jit
  def run(weights, others, counts):
    def body(_, drift):
      tile = topic_tile.topic_tile(
        weights + 1e-30 * drift, others, counts, implementation=implementation
      )
      return jnp.sum(tile.doc_sums) + jnp.sum(tile.word_sums)

    return jax.lax.fori_loop(0, LOOPS, body, jnp.zeros([], jnp.float32))

  args = weights, others, counts
  compiled = run.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


CASES = {'pass': time_pass, 'kernel': time_kernel}
VALUES = {'prepare': prepare, 'learn': learn, 'judge': _judge}


class _Run:
  """What the cases of one run share: the corpus in a folder, and the peers."""

  def __init__(self, smoke):
    self.smoke = smoke
    self.topics = 8 if smoke else 64
    self._folder, self._peers = None, {}

  def folder(self):
    """Holds the corpus; made when it is first asked for."""
    if self._folder is None:
      self._folder = tempfile.TemporaryDirectory(prefix='emc2-bench-')
      name = 'docstrings' if self.smoke else corpus_name()
      prepare(self._folder.name, name, self.smoke)
    return self._folder.name

  def ours(self, context, case, **arguments):
    """A value of this module's, from a process that has all cores."""
    arguments = dict(folder=self.folder(), **arguments)
    return context.value(harness.Side(_OURS, case, arguments, pinned=False))

  def peer(self, context, name):
    """Seconds of a peer, and the perplexity at which it ended.

    Raises:
      harness.Missing: If it is not installed.
    """
    if name not in self._peers:
      settings = dict(PEERS[name])
      if self.smoke:
        settings['passes'] = 2
      out = os.path.join(self.folder(), 'topics.npz')
      arguments = dict(
        corpus=os.path.join(self.folder(), 'train.npz'),
        out=out,
        topics=self.topics,
        alpha=ALPHA,
        eta=ETA,
        seed=1,
        **settings,
      )
      # This project's own Python has scikit-learn.
      side = harness.Side(
        _PEERS,
        'fit',
        arguments,
        peer=settings['peer'] != 'scikit-learn',
        pinned=False,
      )
      seconds = context.value(side)
      perplexity = self.ours(context, 'judge', topics_path=out)
      self._peers[name] = seconds | {'perplexity': perplexity}
    return self._peers[name]


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  run = _Run(smoke)
  found = [
    harness.Case(f'peers, {name}', functools.partial(_race_peer, run, name))
    for name in PEERS
  ]
  found += [
    harness.Case(f'algorithms, {name}', functools.partial(_follow, run, name))
    for name in ALGORITHMS
  ]
  for form in ('plain', 'dense', 'sparse'):
    found.append(
      harness.Case(f'pass, {form}', functools.partial(_race_pass, run, form))
    )
  names = list(specs.SPECS)[: 1 if smoke else None]
  found += [
    harness.Case(f'kernel, {name}', functools.partial(_race_kernel, name))
    for name in names
  ]
  return found


def _race_peer(run, name, context):
  """Ours to the perplexity at which a peer ended, from three starts."""
  row = functools.partial(harness.Row, name=name, peer=PEERS[name]['peer'])
  try:
    peer = run.peer(context, name)
  except harness.Missing as missing:
    metric = 'wall time to its last perplexity'
    return [row(metric=metric, unit='s', note=str(missing))]
  passes = 2 if run.smoke else ALGORITHMS['cvb0']['passes']
  seconds, counts, ends, missed = [], [], [], 0
  for seed in range(1 if run.smoke else 3):
    found = run.ours(
      context,
      'learn',
      algorithm='cvb0',
      topics=run.topics,
      passes=passes,
      seed=seed,
      until=peer['perplexity'],
    )
    missed += found['perplexity'][-1] > peer['perplexity']
    seconds.append(found['wall'][-1])
    counts.append(len(found['wall']))
    ends.append(found['perplexity'][-1])
  figure = harness.Figure.of(seconds)
  ratio = harness.Figure.of([x / peer['wall'] for x in seconds])
  note = f'cvb0, {min(counts)} to {max(counts)} passes'
  if missed:
    note += f'; {missed} of {len(seconds)} starts did not come so low'
  return [
    row(
      metric='wall time to its last perplexity',
      unit='s',
      ours=figure,
      theirs=harness.Figure.exact(peer['wall']),
      ratio=ratio,
      target=harness.Target(_TARGETS[PEERS[name]['peer']]),
      note=note + f'; the peer took {peer["cpu"]:.1f} s of CPU',
    ),
    row(
      metric='perplexity then',
      unit='',
      ours=harness.Figure.of(ends),
      theirs=harness.Figure.exact(peer['perplexity']),
    ),
  ]


def _follow(run, name, context):
  """Where one of ours ends, and when it passes scikit-learn's end."""
  peer = run.peer(context, 'scikit-learn, 20 passes')
  settings = dict(ALGORITHMS[name])
  if run.smoke:
    settings |= dict(passes=2)
  found = run.ours(
    context, 'learn', algorithm=name, topics=run.topics, **settings
  )
  passes = settings['passes']
  below = [
    seconds
    for seconds, value in zip(found['wall'], found['perplexity'], strict=True)
    if value <= peer['perplexity']
  ]
  figure = harness.Figure.exact
  row = functools.partial(harness.Row, name=name)
  return [
    row(
      metric=f'perplexity after {passes} passes',
      unit='',
      ours=figure(found['perplexity'][-1]),
      peer='scikit-learn',
      theirs=figure(peer['perplexity']),
      ratio=figure(found['perplexity'][-1] / peer['perplexity']),
    ),
    row(
      metric='wall time to the perplexity of scikit-learn',
      unit='s',
      ours=figure(below[0]) if below else None,
      peer='scikit-learn',
      theirs=figure(peer['wall']),
      ratio=figure(below[0] / peer['wall']) if below else None,
      note='' if below else 'does not come so low',
    ),
    row(
      metric='CPU time of a pass; first, of compiling',
      unit='s',
      ours=figure(found['cpu'][-1] / passes),
      note=f'{name}: compiled in {found["compile"]:.1f} s',
    ),
  ]


def _race_pass(run, form, context):
  """One pass of ours in product form, against another form of it."""
  arguments = dict(folder=run.folder(), topics=run.topics)
  names = {
    'plain': 'gathers and scatters of all pairs',
    'dense': 'dense products',
    'sparse': 'ours without dense words',
  }
  return [
    context.race(
      f'a pass, {run.topics} topics',
      'time',
      harness.Side(_OURS, 'pass', arguments | {'form': 'ours'}),
      harness.Side(_OURS, 'pass', arguments | {'form': form}),
      peer=names[form],
      target=harness.Target(0.1) if form == 'plain' else None,
    )
  ]


def _race_kernel(name, context):
  metric = f'time of {LOOPS}'
  return [context.race_kernel(f'topic_tile, {name}', metric, _OURS, spec=name)]
