"""Factorisation machines: the cost of a pass, and how low an error falls.

Cases, for `--only`:

- `pass`: one pass of DS-FACTO over all ratings against one of libFM's
  stochastic descent (`peers_ds_facto.py`), at ranks 8 and 64;
- `rmse`: the error on a tenth of the ratings after some passes, and the seconds
  until it is as low as the lowest of libFM's descent; myFM for a bar;
- `kernel`: dense cells where there is an accelerator.

The ratings are a file of triples, `EMC2_BENCH_RATINGS`; by default MovieLens
100K if it lies in `../shared/data`, else as many drawn from a machine of rank
4. Nine tenths are for training, drawn by seed 0; the settings of ours were
chosen on a tenth of those. Wall times hold no compilation.
"""

import functools
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import separable
from emc2.experiments.benchmarks import harness, peers_ds_facto
from emc2.experiments.data import triples
from emc2.kernels import fm_visit
from emc2.kernels.fm_visit import specs
from emc2.separable import ds_facto, fm_cells

PACKAGES = ('jax', 'jaxlib', 'numpy', 'optax')
MOVIELENS = '../shared/data/movielens100k.tsv.gz'
LOOPS = 20

# Chosen on a tenth of the training ratings of MovieLens 100K.
RECIPES = {
  8: dict(rate=0.1, ridge_linear=3e-5, ridge_factors=1.5e-4, passes=100),
  64: dict(rate=0.05, ridge_linear=2e-5, ridge_factors=1.5e-4, passes=100),
}
PEERS = {'libFM': dict(passes=30), 'myFM': dict(passes=100)}
_TARGETS = {8: 0.25, 64: 0.1}

_OURS = 'emc2.experiments.benchmarks.ds_facto'
_PEERS = str(pathlib.Path(__file__).parent / 'peers_ds_facto.py')


def read_ratings() -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
  """Users, items, ratings, and where they come from."""
  path = os.environ.get('EMC2_BENCH_RATINGS') or MOVIELENS
  if pathlib.Path(path).is_file():
    (found,) = triples.read(path)
    return found.users, found.items, found.values, pathlib.Path(path).name
  rng = np.random.default_rng(0)
  num_users, num_items, count = 943, 1682, 100_000
  users, items = rng.integers(num_users, size=count), rng.zipf(1.3, count)
  items = items % num_items
  factors = rng.normal(scale=0.5, size=(num_users + num_items, 4))
  scores = 3.5 + np.sum(factors[users] * factors[num_users + items], axis=1)
  ratings = np.clip(np.round(scores + rng.normal(size=count)), 1, 5)
  return users, items, ratings, 'drawn'


def prepare(folder: str, smoke: bool) -> str:
  """Writes both parts of the ratings; gives their name."""
  users, items, ratings, name = read_ratings()
  ids = np.stack([users, users.max() + 1 + items], axis=1).astype(np.int32)
  order = np.random.default_rng(0).permutation(len(ids))
  held_out = len(ids) // 10
  parts = dict(train=order[held_out:], test=order[:held_out])
  for part, rows in parts.items():
    kept = rows[:1000] if smoke else rows
    np.savez(
      os.path.join(folder, f'{part}.npz'),
      ids=ids[kept],
      labels=ratings[kept].astype(np.float32),
      num_features=ids.max() + 1,
    )
  return name


def _problem(folder, rank, seed=0, workers=1):
  """The cells of the training ratings, their layout, a method and a state."""
  ids, labels, num_features = peers_ds_facto.read(f'{folder}/train.npz')
  rows = separable.SparseRows(
    starts=2 * np.arange(len(ids) + 1),
    ids=ids.ravel(),
    values=np.ones(ids.size, np.float32),
    num_features=num_features,
  )
  cells, layout = fm_cells.cut(
    rows, labels, loss='squared', num_workers=workers
  )
  cells = jax.tree.map(jnp.asarray, cells)
  recipe = RECIPES[rank]
  method = ds_facto.ds_facto(
    num_features,
    rank,
    inner=optax.adam(recipe['rate']),
    step_size=0.5,
    ridge_linear=recipe['ridge_linear'],
    ridge_factors=recipe['ridge_factors'],
  )
  state = jax.jit(method.init)(jax.random.key(seed), cells)
  return cells, layout, method, state


def time_pass(*, folder, rank):
  """One pass of ours."""
  cells, _, method, state = _problem(folder, rank)
  key = jax.random.key(0)
  step = jax.jit(method.step, donate_argnums=1)
  step = step.lower(key, state, cells).compile()
  box = [state]

  def go():
    box[0], info = step(key, box[0], cells)
    jax.block_until_ready((box[0], info))

  return go


def fit(*, folder, rank, seed, passes):
  """Seconds after each pass, and the error on the test ratings."""
  cells, layout, method, state = _problem(folder, rank, seed)
  ids, labels, _ = peers_ds_facto.read(f'{folder}/test.npz')
  key = jax.random.key(0)
  step = jax.jit(method.step, donate_argnums=1)
  step = step.lower(key, state, cells).compile()
  seconds, errors, spent = [], [], 0.0
  for _ in range(passes):
    start = time.perf_counter()
    state, info = jax.block_until_ready(step(key, state, cells))
    spent += time.perf_counter() - start
    if info.diverged:
      raise ValueError(f'diverged at a loss of {info.loss}.')
    seconds.append(spent)
    params = ds_facto.collect(state, layout)
    errors.append(peers_ds_facto.error(ids, labels, *params))
  return {'seconds': seconds, 'rmse': errors}


def time_kernel(*, spec: str, half: str, implementation: str):
  """Half a visit at a shape of its `specs.py`, `LOOPS` times at once."""
  rng = np.random.default_rng(0)
  sizes = specs.SPECS[spec]
  likes = getattr(sizes, f'{half}_args')()
  cell, *others = (
    jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in likes
  )
  fn = functools.partial(getattr(fm_visit, half), implementation=implementation)
  if half == 'accumulate':
    fn = functools.partial(fn, num_rows=sizes.num_rows)

  @jax.jit
  def run(cell, first, *rest):
    def body(_, drift):
      linear, factors = fn(cell, first + 1e-30 * drift, *rest)
      return jnp.sum(linear) + jnp.sum(factors)

    return jax.lax.fori_loop(0, LOOPS, body, jnp.zeros([], jnp.float32))

  args = cell, *others
  compiled = run.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


CASES = {'pass': time_pass, 'kernel': time_kernel}
VALUES = {'prepare': prepare, 'fit': fit}


class _Run:
  """What the cases of one run share: the ratings, and what peers came to."""

  def __init__(self, smoke):
    self.smoke = smoke
    self._folder, self._libfm = None, {}

  def folder(self):
    """Holds the ratings; made when it is first asked for."""
    if self._folder is None:
      self._folder = tempfile.TemporaryDirectory(prefix='emc2-bench-')
      prepare(self._folder.name, self.smoke)
    return self._folder.name

  def peer(self, context, name, rank):
    """Seconds and errors of a peer.

    Raises:
      harness.Missing: If it cannot run.
    """
    if (name, rank) not in self._libfm:
      passes = 2 if self.smoke else PEERS[name]['passes']
      arguments = dict(rank=rank, passes=passes, seed=1)
      for part in ('train', 'test'):
        arguments[part] = os.path.join(self.folder(), f'{part}.npz')
      side = harness.Side(_PEERS, name, arguments, peer=name == 'myFM')
      self._libfm[name, rank] = context.value(side)
    return self._libfm[name, rank]


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  run = _Run(smoke)
  ranks = (8,) if smoke else tuple(RECIPES)
  found = [
    harness.Case(f'pass, rank {k}', functools.partial(_race_pass, run, k))
    for k in ranks
  ]
  found += [
    harness.Case(f'rmse, rank {k}', functools.partial(_follow, run, k))
    for k in ranks
  ]
  names = list(specs.SPECS)[: 1 if smoke else None]
  found += [
    harness.Case(f'kernel, {name}', functools.partial(_race_kernel, name))
    for name in names
  ]
  return found


def _race_pass(run, rank, context):
  """One pass of ours against one of libFM."""
  folder = run.folder()
  arguments = dict(train=os.path.join(folder, 'train.npz'), rank=rank)
  return [
    context.race(
      f'a pass, rank {rank}',
      'time',
      harness.Side(_OURS, 'pass', dict(folder=folder, rank=rank)),
      harness.Side(_PEERS, 'pass', arguments),
      peer="libFM's descent",
      target=harness.Target(_TARGETS[rank]),
    )
  ]


def _follow(run, rank, context):
  """Where ours ends, and when it passes the best of libFM's descent."""
  row = functools.partial(harness.Row, name=f'ratings, rank {rank}')
  passes = 2 if run.smoke else RECIPES[rank]['passes']
  arguments = dict(folder=run.folder(), rank=rank, passes=passes)
  runs = [
    context.value(harness.Side(_OURS, 'fit', arguments | {'seed': seed}))
    for seed in range(1 if run.smoke else 3)
  ]
  ends = harness.Figure.of([found['rmse'][-1] for found in runs])
  metric, rows = f'test RMSE after {passes} passes', []
  target = harness.Target(0.905, of='ours')
  for name in PEERS:
    try:
      peer = run.peer(context, name, rank)
    except harness.Missing as missing:
      rows.append(
        row(metric=metric, unit='', ours=ends, peer=name, note=str(missing))
      )
      continue
    best = min(peer['rmse'])
    rows.append(
      row(
        metric=metric,
        unit='',
        ours=ends,
        peer=name,
        theirs=harness.Figure.exact(best),
        ratio=harness.Figure.exact(ends.value / best),
        target=None if run.smoke else target,
        note='its lowest of all passes' if len(peer['rmse']) > 1 else '',
      )
    )
    if name == 'libFM':
      rows.append(_until(row, runs, peer, best))
  return rows


def _until(row, runs, peer, best):
  """Seconds until an error is as low as the best of a peer."""
  reach = lambda found: next(
    (
      (seconds, number)
      for number, (seconds, rmse) in enumerate(
        zip(found['seconds'], found['rmse'], strict=True), 1
      )
      if rmse <= best
    ),
    None,
  )
  ours, (theirs, number) = [reach(found) for found in runs], reach(peer)
  row = functools.partial(
    row, metric='wall time to the lowest RMSE of libFM', unit='s', peer='libFM'
  )
  if None in ours:
    return row(theirs=harness.Figure.exact(theirs), note='not reached by ours')
  seconds = [x for x, _ in ours]
  return row(
    ours=harness.Figure.of(seconds),
    theirs=harness.Figure.exact(theirs),
    ratio=harness.Figure.of([x / theirs for x in seconds]),
    note=f'{max(n for _, n in ours)} passes, of the peer {number}',
  )


def _race_kernel(name, context):
  return [
    context.race_kernel(
      f'fm_visit, {name}',
      f'{half}, time of {LOOPS}',
      _OURS,
      spec=name,
      half=half,
    )
    for half in ('gradient', 'accumulate')
  ]
