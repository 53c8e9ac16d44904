"""Softmax regression: how soon the objective is near its least.

Cases, for `--only`, each on digits (with their mirror images as ten more
classes, dense) and on generated texts of 100 and of 1,000 classes (sparse,
20,000 rows, 5,001 features; ridge 1 / N everywhere):

- `solvers`: L-BFGS over `ds_mlr.objective` in whitened coordinates, against
  scikit-learn's lbfgs and saga and torch's LBFGS, to relative gaps of 1e-3 and
  1e-5;
- `passes`: the ring's own stochastic passes, to 1e-3;
- `kernel`: the block visit where there is an accelerator.

Seconds hold cutting the data and measuring its moments, but no compilation,
which stands in a row of its own. All sides have one core. Peers' curves come
from one run each, saga's from one run for each number of passes.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2.experiments import quasi_newton
from emc2.experiments.benchmarks import harness, peers_ds_mlr
from emc2.experiments.data import generated
from emc2.kernels import softmax_block
from emc2.kernels.softmax_block import specs
from emc2.separable import ds_mlr, mlr_cells, whitening
from emc2.separable import rows as rows_lib

PACKAGES = ('jax', 'jaxlib', 'numpy', 'optax', 'scipy', 'scikit-learn')
GAPS = (1e-3, 1e-5)
LOOPS = 20

_OURS = 'emc2.experiments.benchmarks.ds_mlr'
_PEERS = str(pathlib.Path(__file__).parent / 'peers_ds_mlr.py')

_ADAM = dict(inner='adam', size=0.5, decay=1.5, minibatches=20)
PROBLEMS = {
  'digits': dict(
    minibatches=1,
    steps_per_call=5,
    passes=dict(inner='none', size=2.0, decay=0.5, minibatches=64),
  ),
  'text100': dict(minibatches=10, steps_per_call=1, passes=_ADAM),
  'text1000': dict(minibatches=10, steps_per_call=1, passes=_ADAM),
}

PEERS = {
  'scikit-learn lbfgs, float64': dict(peer='lbfgs', dtype='float64'),
  'scikit-learn lbfgs, float32': dict(peer='lbfgs', dtype='float32'),
  'scikit-learn saga': dict(peer='saga', dtype='float64'),
  'torch LBFGS, float32': dict(peer='torch', dtype='float32'),
}
_STEPS = {'lbfgs': 200, 'torch': 200}
_LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 80)

TARGETS = {'digits': 0.5, 'text100': 0.35, 'text1000': 0.2}


def prepare(path: str, problem: str, smoke: bool) -> float:
  """Writes a problem; gives its ridge, 1 / N."""
  if problem == 'digits':
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    both = np.concatenate([images, images[:, :, ::-1]]).reshape(-1, 64)
    labels = np.concatenate([labels, labels + 10])
    if smoke:
      both, labels = both[::8], labels[::8]
    both = np.pad(both, ((0, 0), (0, 1)), constant_values=1.0)
    rows = rows_lib.from_dense(both.astype(np.float32))
  else:
    num_classes = int(problem.removeprefix('text'))
    sizes = (400, 301, 10) if smoke else (20_000, 5_001, num_classes)
    train, _ = generated.text(*sizes)
    rows, labels = train.rows, train.labels
  np.savez(
    path,
    indptr=rows.starts,
    indices=rows.ids,
    data=rows.values,
    shape=rows.shape,
    labels=labels.astype(np.int32),
  )
  return 1 / len(labels)


def _read(path):
  """Features as ours take them: dense, or sparse rows."""
  features, labels = peers_ds_mlr.read(path, np.float32)
  if not isinstance(features, np.ndarray):
    features = rows_lib.from_csr(features)
  return features, labels


class _Spent:
  """Seconds that count: of a side's work, not of compiling it."""

  def __init__(self):
    self.cpu = self.wall = 0.0
    self.curve = dict(cpu=[], wall=[], objective=[])

  def __enter__(self):
    self._start = time.process_time(), time.perf_counter()
    return self

  def __exit__(self, *error):
    self.cpu += time.process_time() - self._start[0]
    self.wall += time.perf_counter() - self._start[1]

  def add(self, objective):
    for name in ('cpu', 'wall'):
      self.curve[name].append(getattr(self, name))
    self.curve['objective'].append(float(objective))


def solve(*, path, ridge, minibatches, steps, steps_per_call=1):
  """The curve of L-BFGS, seconds to compile, and the last objective."""
  features, labels = _read(path)
  num_classes = int(labels.max()) + 1
  spent = _Spent()
  with spent:
    batch, layout = mlr_cells.split(
      features, labels, num_classes, num_minibatches=minibatches
    )
    white = whitening.fit(features, labels, layout, ridge=ridge)
    start = np.zeros((1, features.shape[1], num_classes), np.float32)
    batch, white, start = jax.device_put((batch, white, start))

  def objective(coordinates, batch, white):
    weights = whitening.unwhiten(white, coordinates)
    return ds_mlr.objective(weights, batch, ridge=ridge)

  init, step = quasi_newton.lbfgs(objective, steps_per_call=steps_per_call)
  begin = time.perf_counter()
  state = init(start, batch, white)
  step = step.lower(start, state, batch, white).compile()
  compiled = time.perf_counter() - begin
  with spent:
    state = jax.block_until_ready(init(start, batch, white))
  point = start
  for _ in range(-(-steps // steps_per_call)):
    with spent:
      point, state, values = step(point, state, batch, white)
      values = np.asarray(values)
    for value in values:
      spent.add(value)
  weights = layout.sort_weights(whitening.unwhiten(white, point))
  sparse, labels = peers_ds_mlr.read(path, np.float64)
  last = peers_ds_mlr.objective(sparse, labels, weights, ridge)
  return spent.curve | {'compile': compiled, 'last': last}


def passes(*, path, ridge, minibatches, inner, size, decay, count):
  """The curve of the ring's stochastic passes on one worker."""
  features, labels = _read(path)
  num_classes = int(labels.max()) + 1
  spent = _Spent()
  with spent:
    batch, _ = mlr_cells.split(
      features, labels, num_classes, num_minibatches=minibatches
    )
    batch = jax.device_put(batch)
  schedule = ds_mlr.inverse_sqrt(size, decay)
  if inner == 'adam':
    by_pass = lambda count: schedule(count // minibatches)
    settings = dict(inner=optax.adam(by_pass))
  else:
    settings = dict(step_size=schedule)
  method = ds_mlr.ds_mlr(
    features.shape[1], num_classes, ridge=ridge, refresh='table', **settings
  )
  key = jax.random.key(0)
  state = jax.jit(method.init)(key, batch)
  state = jax.tree.map(jnp.copy, state)
  begin = time.perf_counter()
  step = jax.jit(method.step, donate_argnums=1)
  step = step.lower(key, state, batch).compile()
  compiled = time.perf_counter() - begin
  for _ in range(count):
    with spent:
      state, info = step(key, state, batch)
      loss = float(info.loss)  # Exact: there is one worker.
    spent.add(loss)
  return spent.curve | {'compile': compiled}


def time_kernel(*, spec: str, implementation: str):
  """The visit at a shape of its `specs.py`, `LOOPS` times at once."""
  rng = np.random.default_rng(0)
  n, d, k, dtype = specs.SPECS[spec]
  features = jnp.asarray(rng.normal(size=(n, d)), dtype)
  weights = jnp.asarray(rng.normal(size=(d, k)) / d**0.5, jnp.float32)
  labels = jnp.asarray(rng.integers(0, k, n), jnp.int32)
  ones = jnp.ones(n)

  @jax.jit
  def run(features, weights, labels, ones):
    def body(_, weights):
      visit = softmax_block.softmax_block(
        features,
        weights,
        5 * ones,
        labels,
        ones,
        jnp.int32(k),
        implementation=implementation,
      )
      return weights - 1e-9 * visit.gradient

    return jax.lax.fori_loop(0, LOOPS, body, weights)

  args = features, weights, labels, ones
  compiled = run.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


VALUES = {'prepare': prepare, 'solve': solve, 'passes': passes}
CASES = {'kernel': time_kernel}


def first_below(curve: dict[str, list[float]], level: float) -> int | None:
  """The first point of a curve at or below a level, or None."""
  below = [i for i, x in enumerate(curve['objective']) if x <= level]
  return below[0] if below else None


class _Run:
  """What the cases share: the problems, and what ours came to."""

  def __init__(self, smoke):
    self.smoke = smoke
    self._folder, self._problems, self._solved = None, {}, {}

  def problem(self, name):
    """The path of a problem, and its ridge."""
    if self._folder is None:
      self._folder = tempfile.TemporaryDirectory(prefix='emc2-bench-')
    if name not in self._problems:
      path = os.path.join(self._folder.name, f'{name}.npz')
      self._problems[name] = path, prepare(path, name, self.smoke)
    return self._problems[name]

  def solved(self, context, name):
    """Curves of ours, from three runs, and the least objective that is known.

    The least is that of a long run, judged in float64.
    """
    if name not in self._solved:
      path, ridge = self.problem(name)
      problem = PROBLEMS[name]
      arguments = dict(
        path=path,
        ridge=ridge,
        minibatches=problem['minibatches'],
        steps_per_call=problem['steps_per_call'],
      )
      ask = lambda steps: context.value(
        harness.Side(_OURS, 'solve', arguments | {'steps': steps})
      )
      runs = [ask(5 if self.smoke else 60)]
      least = min(runs[0]['last'], *runs[0]['objective'])
      short = first_below(runs[0], least * (1 + GAPS[-1]))
      for _ in range(0 if self.smoke else 2):
        runs.append(ask(short + 1))
      self._solved[name] = runs, least
    return self._solved[name]


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  run = _Run(smoke)
  found = []
  for problem in PROBLEMS:
    found += [
      harness.Case(
        f'solvers, {problem}, {peer}',
        functools.partial(_race, run, problem, peer),
      )
      for peer in PEERS
    ]
    found.append(
      harness.Case(
        f'passes, {problem}', functools.partial(_follow, run, problem)
      )
    )
  names = list(specs.SPECS)[: 1 if smoke else None]
  found += [
    harness.Case(f'kernel, {name}', functools.partial(_race_kernel, name))
    for name in names
  ]
  return found


def _race_kernel(name, context):
  metric = f'time of {LOOPS}'
  row = context.race_kernel(f'softmax_block, {name}', metric, _OURS, spec=name)
  return [row]


def _race(run, problem, name, context):
  """Rows of both gaps, against one peer."""
  path, ridge = run.problem(problem)
  runs, least = run.solved(context, problem)
  settings = PEERS[name] | dict(path=path, ridge=ridge)
  side = lambda steps: harness.Side(
    _PEERS,
    'fit',
    settings | dict(steps=steps),
    peer=settings['peer'] == 'torch',  # The others stand in our Python.
  )
  try:
    if settings['peer'] == 'saga':
      curve = _climb(context, side, least, run.smoke)
    else:
      steps = 5 if run.smoke else _STEPS[settings['peer']]
      if problem == 'text1000':
        steps = min(steps, 60)
      curve = context.value(side(steps))
  except harness.Missing as missing:
    row = harness.Row(problem, 'CPU seconds to a gap', 's', peer=name)
    return [dataclasses.replace(row, note=str(missing))]
  rows = []
  for gap in GAPS:
    level = least * (1 + gap)
    places = [first_below(each, level) for each in runs]
    ours = theirs = ratio = None
    note = ''
    if None not in places:
      seconds = [x['cpu'][i] for x, i in zip(runs, places, strict=True)]
      ours = harness.Figure.of(seconds)
      note = f'ours {places[0] + 1} steps'
    place = first_below(curve, level)
    if place is None:
      note += f'; the peer ended at {curve["objective"][-1] / least - 1:.1e}'
    else:
      theirs = harness.Figure.exact(curve['cpu'][place])
      count = curve.get('passes', range(1, place + 2))[place]
      note += f'; the peer {count}'
      if ours is not None:
        ratio = harness.Figure.of([x / theirs.value for x in seconds])
    rows.append(
      harness.Row(
        name=problem,
        metric=f'CPU seconds to a gap of {gap:.0e}',
        unit='s',
        ours=ours,
        peer=name,
        theirs=theirs,
        ratio=ratio,
        target=harness.Target(TARGETS[problem]),
        note=note,
      )
    )
  return rows


def _climb(context, side, least, smoke):
  """The curve of saga, a run for each number of passes, until it is near."""
  curve = dict(cpu=[], wall=[], objective=[], passes=[])
  for steps in itertools.islice(_LADDER, 2 if smoke else None):
    found = context.value(side(steps))
    for name, values in found.items():
      curve[name] += values
    curve['passes'].append(steps)
    if found['objective'][0] <= least * (1 + GAPS[-1]):
      break
  return curve


def _follow(run, problem, context):
  """Passes of the ring to the wider gap."""
  path, ridge = run.problem(problem)
  runs, least = run.solved(context, problem)
  settings = dict(PROBLEMS[problem]['passes'])
  count = 2 if run.smoke else 40
  curve = context.value(
    harness.Side(
      _OURS,
      'passes',
      dict(path=path, ridge=ridge, count=count, **settings),
    )
  )
  place = first_below(curve, least * (1 + GAPS[0]))
  compiled = harness.Figure.of([each['compile'] for each in runs])
  rows = [
    harness.Row(problem, 'wall seconds to compile L-BFGS', 's', ours=compiled)
  ]
  row = functools.partial(
    harness.Row, problem, f'passes to a gap of {GAPS[0]:.0e}', ''
  )
  target = harness.Target(10, of='ours')
  if place is None:
    end = curve['objective'][-1] / least - 1
    return [*rows, row(target=target, note=f'{count} passes: {end:.1e}')]
  seconds = f'{curve["cpu"][place]:.2f} s of CPU, table'
  figure = harness.Figure.exact(place + 1)
  return [*rows, row(ours=figure, target=target, note=seconds)]
