"""Factorisation machines on rings of workers of several sizes, side by side.

  python -m emc2.experiments.ds_facto --workdir=runs/ds_facto

fits a machine of rank 4 to 8,000 generated rows, in which 32 features act in
pairs, by DS-FACTO on 1, 2, 4 and 8 workers. It takes a minute on two CPU cores,
nearly all of it to compile. That command, with JAX 0.10.2, came to test
logloss = 0.1953, 0.1952, 0.1950 and 0.1949: after equal passes the number of
workers matters little. `--config.data=PATH` takes a file of ratings, a line
`user item rating` for each, or of svmlight; `TRAIN,TEST` takes two. On
MovieLens 100K

  --config.data=u.data --config.rank=8 --config.workers=1,8

came to test rmse = 0.9009 and 0.9008 in 1.0 and 3.5 seconds of passes.

`--config.executor=virtual` has all workers on one device, which works on their
rows at once: what more of them take is no speed-up, nor a slow-down, of a ring.
`mesh` has a device for each. A pass on 1, 2, 4, ... devices, as many as there
are, is timed apart (one core of a CPU is a device), and passes on up to 4,096
workers are simulated: of this run, with the speed of one device here, and of
Criteo-tera at 5 GFLOP/s a worker, over links of 1 and of 25 GB/s.

Every worker takes `steps_per_pass` / P steps with a block that visits it, one
at least. 'none' steps along the gradients, as the paper does; Adam and AdaGrad,
whose moments travel with their blocks, suit features that are rare. `step_size`
is that of either; too large a one ends the run, for the sums of rows lag behind
(see :func:`emc2.separable.ds_facto.ds_facto`).

`figure.png` shows objectives and scores against passes and seconds, the
speed-ups, and the bytes of a worker. `result.json` holds, with `workers_P.`
before them where `workers` are several,

  objective    exactly, on the rows to train on, ridge included
  rmse         on test rows, clipped to the range of labels as libFM does; or
  logloss, accuracy
  passes
  seconds      of the passes, without compiling and evaluating

and `devices_P.seconds_per_pass`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from emc2 import mesh as mesh_lib
from emc2.experiments import ring_costs, ring_figure, runner
from emc2.experiments.data import examples, generated, svmlight, triples
from emc2.ring import simulate
from emc2.separable import ds_facto, fm_cells

MODES = ds_facto.MODES

INNER = ('none', 'adagrad', 'adam')

GENERATED = {'num_rows': 8_000, 'num_test': 2_000}
"""Further arguments of :func:`generated.interactions`."""

CRITEO = simulate.Workload(
  operations=(4 * 128 + 8) * 39 * 4_370_000_000,
  size=4 * (128 + 1) * 10**9,
  units=10**9,
)
"""A pass over Criteo-tera: 39 of 1e9 features in each of 4.37e9 rows, K = 128.

A nonzero costs 4 K + 8 operations, half of them to add up the sums anew.
"""


@dataclasses.dataclass
class Config:
  """Settings."""

  data: str = 'generated'  # Or a file, or two: 'TRAIN,TEST'.
  loss: str = ''  # 'squared' or 'logistic'; '' takes what the labels are like.
  workers: str = '1,2,4,8'  # P, of each of the runs.
  executor: str = 'virtual'  # Or 'mesh': a device for each worker.
  rank: int = 4  # K.
  mode: str = 'fused'  # Or 'two_pass', 'incremental', 'jacobi'.
  passes: int = 100
  slots: int = 1  # Blocks of each worker.
  steps_per_pass: int = 16  # Of each block, by all workers together.
  step_size: float = 0.0  # eta_0; 0 for 1, or of Adam 0.06 / mean |x|_1.
  decay: float = 0.5  # eta_t = eta_0 (1 + t)^-decay in pass t.
  inner: str = ''  # 'none', 'adagrad', 'adam'; '' takes 'none' or 'adam'.
  ridge: float = 1e-4  # Of weights and factors.
  init_std: float = 0.1  # Of the first factors.
  held_out: float = 0.1  # Share of the rows of a single file.
  evaluations: int = 25  # Of each run, ever further apart.
  seed: int = 0


class Data(NamedTuple):
  """What is fitted and what is foretold."""

  title: str
  train: examples.Examples  # Labels are numbers, or -1 and 1.
  test: examples.Examples
  loss: str


class Method(NamedTuple):
  """A ring of some workers, bound to its data."""

  init: Callable[[jax.Array], ds_facto.State]
  step: Callable[[jax.Array, Any, Any], tuple[Any, Any]]
  cells: fm_cells.Cells  # Placed.
  layout: fm_cells.Layout
  to_ring: Callable[..., Any]


def check(config: Config) -> list[int]:
  """Refuses bad settings that show without the data.

  Args:
    config: The settings.

  Returns:
    The numbers of workers.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  workers = ring_costs.parse_workers(config.workers)
  for name, allowed in (
    ('loss', ('', *fm_cells.LOSSES)),
    ('inner', ('', *INNER)),
    ('executor', ring_costs.EXECUTORS),
    ('mode', MODES),
  ):
    value = getattr(config, name)
    if value not in allowed:
      raise ValueError(f'{name} must be one of {allowed}, got {value!r}.')
  lowest = dict(rank=0, passes=1, slots=1, steps_per_pass=1, evaluations=2)
  for name, least in (lowest | dict(seed=0)).items():
    value = getattr(config, name)
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  for name in ('step_size', 'decay', 'ridge'):
    value = getattr(config, name)
    if not 0 <= value < math.inf:
      raise ValueError(f'{name} must be finite and at least 0, got {value}.')
  ring_costs.check_devices(config.executor, workers)
  return workers


def read(config: Config) -> Data:
  """Reads or generates the data.

  Args:
    config: The settings.

  Returns:
    The data.

  Raises:
    ValueError: If a file is missing or broken, which it names and the line, or
      labels do not go with the loss.
  """
  if config.data == 'generated':
    tasks = {'squared': 'regression'}
    found = generated.interactions(
      rank=4,
      task=tasks.get(config.loss, 'classification'),
      seed=config.seed,
      **GENERATED,
    )
    loss = config.loss or 'logistic'
    return Data('generated interactions', found.train, found.test, loss)
  paths = examples.paths_of(config.data)
  if svmlight.is_svmlight(paths[0]):
    parts = svmlight.read(*paths, labels='numbers')
    if len(parts) == 1:
      parts = examples.split(parts[0], config.held_out, seed=config.seed)
  else:
    parts = triples.read(*paths)
    if len(parts) == 1:
      parts = triples.split(parts[0], config.held_out, seed=config.seed)
    parts = tuple(map(triples.one_hot, parts))
  values = np.unique(np.concatenate([part.labels for part in parts]))
  loss = config.loss or ('logistic' if values.size == 2 else 'squared')
  if loss == 'logistic':
    if values.size != 2:
      raise ValueError(
        f'{config.data}: expected two different labels for the logistic loss, '
        f'got {values.size}.'
      )
    parts = tuple(
      dataclasses.replace(
        part, labels=np.where(part.labels == values[1], 1, -1).astype('float32')
      )
      for part in parts
    )
  return Data(paths[0].name, *parts, loss)


def make_method(config: Config, data: Data, num_workers: int) -> Method:
  """Binds a ring to its data.

  Args:
    config: The settings.
    data: The rows.
    num_workers: P.

  Returns:
    The method.

  Raises:
    ValueError: If a setting does not go with the data.
  """
  rows, labels = data.train.rows, data.train.labels
  mesh = ring_costs.mesh_of(config.executor, num_workers)
  steps_per_visit = max(1, round(config.steps_per_pass / num_workers))
  cells, layout = fm_cells.cut(
    rows,
    labels,
    loss=data.loss,
    num_workers=num_workers,
    slots=config.slots,
    steps_per_visit=steps_per_visit,
  )
  inner = config.inner
  if not inner:
    # Rare features are seldom pulled, and squared errors pull without bound.
    dense = cells.by_row == ()
    inner = 'none' if dense and data.loss == 'logistic' else 'adam'
  first = config.step_size
  if not first and inner == 'none':
    first = 1.0
  elif not first:  # A step of all weights then moves a score by so much.
    first = 0.06 * rows.num_rows / max(1e-9, float(np.abs(rows.values).sum()))
  step_size = lambda t: first * (1.0 + t) ** -config.decay
  steps = num_workers * steps_per_visit  # Of a block in a pass.
  transformation = None
  if inner != 'none':
    made = {'adagrad': optax.adagrad, 'adam': optax.adam}[inner]
    transformation = made(lambda count: step_size(count // steps))
  settings = dict(
    loss=data.loss,
    mode=config.mode,
    ridge_linear=config.ridge,
    ridge_factors=config.ridge,
    step_size=step_size,
    inner=transformation,
  )
  method = ds_facto.ds_facto(
    rows.num_features,
    config.rank,
    init_std=config.init_std,
    mesh=mesh,
    **settings,
  )
  _, to_ring = ds_facto.rotations(**settings)
  if mesh is None:
    cells = jax.device_put(cells)
  else:
    cells = mesh_lib.place(cells, mesh, fm_cells.specs())

  def step(key, state, batch):
    state, info = method.step(key, state, batch[1])
    return state, {'loss': jnp.where(info.diverged, jnp.nan, info.loss)}

  return Method(
    init=lambda key: jax.jit(method.init)(key, cells),
    step=step,
    cells=cells,
    layout=layout,
    to_ring=to_ring,
  )


def score(data: Data, params: ds_facto.Params) -> dict[str, float]:
  """How well a machine foretells the labels of test rows.

  Args:
    data: The rows.
    params: The machine.

  Returns:
    `rmse`, of predictions clipped to the range of the labels to train on as
    libFM does, or `logloss` and `accuracy`.
  """
  found = np.asarray(ds_facto.predict(params, data.test.rows), np.float64)
  labels = data.test.labels
  if data.loss == 'squared':
    known = data.train.labels
    errors = np.clip(found, known.min(), known.max()) - labels
    return {'rmse': float(np.sqrt(np.mean(errors**2)))}
  return {
    'logloss': float(np.mean(np.logaddexp(0, -labels * found))),
    'accuracy': float(np.mean((found > 0) == (labels > 0))),
  }


def train(
  config: Config, data: Data, method: Method, workdir: epath.PathLike
) -> ds_facto.State:
  """Fits on one ring.

  Args:
    config: The settings.
    data: The rows.
    method: The ring.
    workdir: Its folder.

  Returns:
    The state at the end.

  Raises:
    ValueError: If the objective grew without bound.
  """
  due = ring_costs.due_passes(config.passes, config.evaluations)

  def evaluate(state):
    if int(state.count) not in due:
      return {}
    params = ds_facto.collect(state, method.layout)
    objective = ds_facto.objective(
      params,
      data.train.rows,
      data.train.labels,
      loss=data.loss,
      ridge_linear=config.ridge,
      ridge_factors=config.ridge,
    )
    return {'objective': float(objective)} | score(data, params)

  init_key, key = jax.random.split(jax.random.key(config.seed))
  try:
    return runner.train(
      method.init(init_key),
      method.step,
      constants=method.cells,
      key=key,
      num_steps=config.passes,
      workdir=workdir,
      name=epath.Path(workdir).name,
      log_every=1,
      checkpoint_every=max(1, config.passes // 4),
      keep=1,
      evaluate=evaluate,
      evaluate_every=1,
    )
  except runner.NonFiniteLossError as error:
    raise ValueError(
      f'step_size must be smaller or decay larger: in pass {error.step} the '
      'loss grew tenfold or is not finite.'
    ) from error


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Fits on rings of all sizes, scores, measures and draws."""
  counts = check(config)
  data = read(config)
  methods = {}
  for workers in counts:  # Bad settings end before the first pass of any.
    methods[workers] = make_method(config, data, workers)
  metric = 'rmse' if data.loss == 'squared' else 'logloss'
  summary, curves, memory = {}, {}, {}
  for workers, method in methods.items():
    folder = workdir / f'workers_{workers}'
    state = train(config, data, method, folder)
    params = ds_facto.collect(state, method.layout)
    series = runner.read_metrics(folder)
    seconds = runner.seconds_per_step(folder)
    passes, objective = series['objective']
    curves[workers] = ring_figure.Curve(
      passes, passes * seconds, objective, series[metric][1]
    )
    memory[workers] = ring_costs.memory(method.to_ring, state, method.cells)
    found = {'objective': objective[-1]} | score(data, params)
    found |= {'passes': config.passes, 'seconds': config.passes * seconds}
    prefix = f'workers_{workers}.' if len(counts) > 1 else ''
    summary |= {prefix + name: value for name, value in found.items()}
  measured = measure(config, data)
  nnz, num_features = len(data.train.rows.ids), data.train.rows.num_features
  here = simulate.Workload(
    operations=(4 * config.rank + 8) * nnz,
    size=4 * num_features * (config.rank + 1),
    units=num_features,
  )
  cases = {
    'this run': (here, simulate.Machine(speed=here.operations / measured[1])),
    'Criteo-tera, K = 128, 1 GB/s': (CRITEO, simulate.Machine()),
    'the same, 25 GB/s': (CRITEO, simulate.Machine(bandwidth=25e9)),
  }
  figure = ring_figure.draw(
    curves,
    {count: measured[1] / seconds for count, seconds in measured.items()},
    ring_costs.simulated(cases, seed=config.seed),
    memory,
    objective='objective, on the rows to train on',
    score=f'{metric}, on test rows',
    title=f'DS-FACTO, {data.title}: {data.train.num_rows:,} rows, '
    f'{num_features:,} features, K = {config.rank}',
    shared=config.executor == 'virtual',
  )
  runner.save_figure(figure, workdir / 'figure.png')
  for count, seconds in measured.items():
    summary[f'devices_{count}.seconds_per_pass'] = seconds
  return summary


def measure(config: Config, data: Data) -> dict[int, float]:
  """Seconds of a pass on 1, 2, 4, ... devices, a worker on each."""

  def make(count):
    executor = 'mesh' if count > 1 else 'virtual'
    changed = dataclasses.replace(config, executor=executor)
    method = make_method(changed, data, count)
    return method.step, method.init(jax.random.key(config.seed)), method.cells

  most = data.train.rows.num_features // config.slots
  return ring_costs.measured(make, min(most, data.train.num_rows))


if __name__ == '__main__':
  ring_costs.use_cores()
  runner.launch(Config(), run)
