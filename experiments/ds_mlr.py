"""Softmax regression on rings of workers of several sizes, side by side.

  python -m emc2.experiments.ds_mlr --workdir=runs/ds_mlr

fits the handwritten digits by DS-MLR on 1, 2, 4 and 8 workers. It takes under a
minute on two CPU cores, nearly all of it to compile. That command, with JAX
0.10.2, came to objectives 3.4e-4, 4.4e-4, 6.8e-4 and 7.5e-4 above the least,
0.257875, and to test accuracies of 0.961 to 0.964: after equal passes the
number of workers matters little. `--config.data=` takes others:

  docstrings   4,130 docstrings of installed packages, by the 379 modules that
               they come from: with `--config.passes=30 --config.workers=1,8`
               test accuracies of 0.763 and 0.761 in 7 and 15 seconds of passes
  extreme      1,000 classes, 20,000 rows: the optimum is known exactly
  text         1,000 classes, 20,000 rows of Zipf's words
  synthetic    24 classes, 960 rows of 20 numbers
  FILE         of svmlight; or `TRAIN,TEST`

`--config.executor=virtual` has all workers on one device, which works on their
rows at once: what more of them take is no speed-up, nor a slow-down, of a ring.
`mesh` has a device for each. A pass on 1, 2, 4, ... devices, as many as there
are, is timed apart (one core of a CPU is a device), and passes on up to 4,096
workers are simulated: of this run, with the speed of one device here, and of
the two largest text sets of the paper at 5 GFLOP/s and 1 GB/s a worker.

Every worker takes `steps_per_pass` / P steps with a block that visits it, one
at least. 'none' steps along the gradients, as the paper does; Adam, whose
moments travel with their blocks, suits words that are rare. `refresh=table`
bears the longest steps, for 4 bytes a row and block; with 'fused', which the
paper has, `step_size` must be smaller (1 for the digits). Blocks have equally
many classes, some of them padding: 10 classes in 8 blocks take the memory of
16.

`figure.png` shows objectives and F1 against passes and seconds, the speed-ups,
and the bytes of a worker. `result.json` holds, with `workers_P.` before them
where `workers` are several,

  objective    exactly, on the rows to train on, ridge included
  accuracy     on test rows, which is the micro-averaged F1
  macro_f1     the mean over the classes that are among labels or predictions
  passes
  seconds      of the passes, without compiling and evaluating

and `devices_P.seconds_per_pass`, and `optimum`, the least objective, where it
is known: of the extreme problem in closed form, of few dense rows by L-BFGS.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.special
from etils import epath

from emc2 import mesh as mesh_lib
from emc2.experiments import ring_costs, ring_figure, runner
from emc2.experiments.data import (
  digits,
  examples,
  generated,
  packages,
  svmlight,
)
from emc2.ring import simulate
from emc2.separable import ds_mlr, mlr_cells

RIDGES = {
  'digits': 1e-3,
  'docstrings': 1e-5,
  'extreme': 1e-5,
  'synthetic': 1e-3,
  'text': 1e-5,
}
"""Data without a download, and the ridge of each by default."""

INNER = ('none', 'adam')

DENSE_SHARE = 0.25
"""Share of entries that are not 0 from which features are kept dense."""

MOST_SOLVED = 10**8
"""N D K up to which the optimum of dense rows is found beforehand."""

REDDIT = simulate.linear_workload(211_532_359 * 48, 1_348_182, 33_225)
"""A pass over Reddit-Full: 48 of 1.3 million words in each of 2.1e8 rows."""

ODP = simulate.linear_workload(1_084_404 * 225, 422_712, 105_034)
"""A pass over ODP: 225 of 4.2e5 words in each of 1.1 million rows."""


@dataclasses.dataclass
class Config:
  """Settings."""

  data: str = 'digits'  # Or others of `RIDGES`, a file, or 'TRAIN,TEST'.
  workers: str = (
    '1,2,4,8'  # P, of each of the runs; at most as many as classes.
  )
  executor: str = 'virtual'  # Or 'mesh': a device for each worker.
  refresh: str = 'table'  # Or 'fused', 'two_pass', 'floor', 'sgd'.
  ridge: float = 0.0  # lambda; 0 for that of `RIDGES`, or 1 / N of a file.
  passes: int = 100
  slots: int = 1  # Blocks of each worker.
  steps_per_pass: int = 0  # Of each block, by all workers; 0: 40, sparse 8.
  inner: str = ''  # 'none' or 'adam'; '' takes 'adam' for sparse rows.
  step_size: float = 0.0  # eta_0; 0 for 2, or 0.2 of 'adam'.
  decay: float = 0.5  # eta_t = eta_0 (1 + t)^-decay in pass t.
  intercept: bool = True  # Whether a feature of 1 is added to every row.
  held_out: float = 0.2  # Share of the rows of a single file.
  evaluations: int = 25  # Of each run, ever further apart.
  seed: int = 0


class Data(NamedTuple):
  """What is fitted and what is foretold."""

  title: str
  train: examples.Examples
  test: examples.Examples
  ridge: float
  best: float | None  # The least objective, if it is known.


class Method(NamedTuple):
  """A ring of some workers, bound to its data."""

  init: Callable[[jax.Array], ds_mlr.State]
  step: Callable[[jax.Array, Any, Any], tuple[Any, Any]]
  batch: mlr_cells.Batch  # Placed.
  layout: mlr_cells.Layout


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
    ('inner', ('', *INNER)),
    ('executor', ring_costs.EXECUTORS),
    ('refresh', ds_mlr.REFRESHES),
  ):
    value = getattr(config, name)
    if value not in allowed:
      raise ValueError(f'{name} must be one of {allowed}, got {value!r}.')
  lowest = dict(passes=1, slots=1, steps_per_pass=0, evaluations=2, seed=0)
  for name, least in lowest.items():
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
    The data, and the least objective where it is known: of the extreme problem
    in closed form, of dense rows that are few by L-BFGS in float64.

  Raises:
    ValueError: If a file is missing or broken, which it names and the line.
  """
  name, extreme = config.data, None
  if name == 'digits':
    parts = tuple(map(_read_digits, digits.SPLITS))
  elif name == 'docstrings':
    parts = packages.read(held_out=config.held_out, seed=config.seed)
  elif name == 'extreme':
    extreme = generated.extreme(seed=config.seed)
    parts = extreme.train, extreme.test
  elif name == 'synthetic':
    parts = generated.softmax(num_test=240, seed=config.seed)
  elif name == 'text':
    parts = generated.text(num_test=2_000, seed=config.seed)
  else:
    paths = examples.paths_of(name)
    parts, name = svmlight.read(*paths), paths[0].name
    if len(parts) == 1:
      parts = examples.split(parts[0], config.held_out, seed=config.seed)
  # The text has a constant of its own, and the optimum is that without one.
  if config.intercept and config.data not in ('extreme', 'text'):
    parts = tuple(map(examples.with_constant, parts))
  train, test = parts
  if train.num_classes < 2:
    raise ValueError(f'{name}: expected two classes or more, got one.')
  ridge = config.ridge or RIDGES.get(config.data, 1 / train.num_rows)
  best = None
  if extreme is not None:
    best, _ = generated.extreme_optimum(extreme, ridge)
  elif _is_dense(train):
    num_rows, num_features = train.rows.shape
    if num_rows * num_features * train.num_classes <= MOST_SOLVED:
      best = solve(train, ridge)
  return Data(name, train, test, ridge, best)


def _read_digits(split):
  found = digits.read(split)
  rows = found.images.reshape(len(found.images), -1) / 255
  return examples.Examples(
    examples.rows_lib.from_dense(rows), found.labels, found.class_names
  )


def _is_dense(given):
  num_rows, num_features = given.rows.shape
  return given.rows.ids.size >= DENSE_SHARE * num_rows * num_features


def objective(
  weights: np.ndarray,
  given: examples.Examples,
  ridge: float,
  *,
  with_gradient: bool = False,
) -> Any:
  """The regularised mean cross-entropy, in float64, some rows at a time.

  Args:
    weights: (D, K).
    given: N rows.
    ridge: lambda.
    with_gradient: Whether to give the gradient (D, K) too.

  Returns:
    The objective; with its gradient, a pair.
  """
  weights = weights.astype(np.float64)
  rows = examples.to_csr(given.rows).astype(np.float64)
  loss, gradient = 0.0, ridge * weights
  size = max(1, 2**22 // weights.shape[1])
  for first in range(0, given.num_rows, size):
    part, labels = rows[first : first + size], given.labels[first:][:size]
    scores = part @ weights
    of_label = np.arange(labels.size), labels
    logs = scipy.special.logsumexp(scores, axis=1)
    loss += np.sum(logs - scores[of_label])
    if with_gradient:
      errors = np.exp(scores - logs[:, None])
      errors[of_label] -= 1
      gradient = gradient + part.T @ errors / given.num_rows
  loss = loss / given.num_rows + ridge / 2 * np.sum(weights**2)
  return (loss, gradient) if with_gradient else loss


def solve(given: examples.Examples, ridge: float) -> float:
  """The least objective, by L-BFGS in float64."""
  shape = given.rows.num_features, given.num_classes

  def flat(weights):
    loss, gradient = objective(
      weights.reshape(shape), given, ridge, with_gradient=True
    )
    return loss, gradient.ravel()

  found = scipy.optimize.minimize(
    flat,
    np.zeros(math.prod(shape)),
    jac=True,
    method='L-BFGS-B',
    options=dict(maxiter=5_000, maxfun=10_000, ftol=1e-15, gtol=1e-8),
  )
  return float(found.fun)


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
  train, mesh = data.train, ring_costs.mesh_of(config.executor, num_workers)
  dense = _is_dense(train)
  inner = config.inner or ('none' if dense else 'adam')
  steps_per_pass = config.steps_per_pass or (40 if dense else 8)
  minibatches = max(1, round(steps_per_pass / num_workers))
  steps = num_workers * minibatches  # Of a block in a pass.
  first = config.step_size or (2.0 if inner == 'none' else 0.2)
  step_size = lambda t: first * (1.0 + t) ** -config.decay
  transformation = None
  if inner == 'adam':
    transformation = optax.adam(lambda count: step_size(count // steps))
  batch, layout = mlr_cells.split(
    train.rows.to_dense() if dense else train.rows,
    train.labels,
    train.num_classes,
    num_workers=num_workers,
    slots=config.slots,
    num_minibatches=minibatches,
    allow_empty=True,
    seed=config.seed,
  )
  method = ds_mlr.ds_mlr(
    train.rows.num_features,
    train.num_classes,
    ridge=data.ridge,
    refresh=config.refresh,
    step_size=step_size,
    inner=transformation,
    mesh=mesh,
  )
  if mesh is None:
    batch = jax.device_put(batch)
  else:
    spec = jax.sharding.PartitionSpec(mesh_lib.RING)
    batch = mesh_lib.place(batch, mesh, spec)

  def init(key):
    state = jax.jit(method.init)(key, batch)
    if mesh is not None:
      state = mesh_lib.place(state, mesh, ds_mlr.shardings())
    return state

  def step(key, state, batch):
    state, info = method.step(key, state, batch[1])
    return state, {'loss': info.loss}

  return Method(init, step, batch, layout)


def score(data: Data, weights: np.ndarray) -> dict[str, float]:
  """How well weights (D, K) foretell the classes of test rows.

  Args:
    data: The rows.
    weights: (D, K).

  Returns:
    `accuracy`, which is the micro-averaged F1, and `macro_f1`, the mean over
    the classes that are among labels or predictions.
  """
  found = np.argmax(examples.to_csr(data.test.rows) @ weights, axis=1)
  accuracy, macro_f1 = ds_mlr.f_scores(
    jnp.asarray(data.test.labels),
    jnp.asarray(found, jnp.int32),
    data.train.num_classes,
  )
  return {'accuracy': float(accuracy), 'macro_f1': float(macro_f1)}


def train(
  config: Config, data: Data, method: Method, workdir: epath.PathLike
) -> ds_mlr.State:
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
    weights = method.layout.sort_weights(state.weights)
    found = objective(weights, data.train, data.ridge)
    return {'objective': found} | score(data, weights)

  init_key, key = jax.random.split(jax.random.key(config.seed))
  try:
    return runner.train(
      method.init(init_key),
      method.step,
      constants=method.batch,
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
      "step_size must be smaller, or refresh 'floor' or 'table': the loss of "
      f'pass {error.step} is not finite.'
    ) from error


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Fits on rings of all sizes, scores, measures and draws."""
  counts = check(config)
  data = read(config)
  methods = {}
  for workers in counts:  # Bad settings end before the first pass of any.
    methods[workers] = make_method(config, data, workers)
  summary, curves, memory = {}, {}, {}
  for workers, method in methods.items():
    folder = workdir / f'workers_{workers}'
    state = train(config, data, method, folder)
    series = runner.read_metrics(folder)
    seconds = runner.seconds_per_step(folder)
    passes, objectives = series['objective']
    curves[workers] = ring_figure.Curve(
      passes, passes * seconds, objectives, series['macro_f1'][1]
    )
    memory[workers] = ring_costs.memory(
      ds_mlr.to_ring, jax.random.key(0), state, method.batch
    )
    found = {
      name: series[name][1][-1]
      for name in ('objective', 'accuracy', 'macro_f1')
    }
    found |= {'passes': config.passes, 'seconds': config.passes * seconds}
    prefix = f'workers_{workers}.' if len(counts) > 1 else ''
    summary |= {prefix + name: value for name, value in found.items()}
  if data.best is not None:
    summary['optimum'] = data.best
  measured = measure(config, data)
  for count, seconds in measured.items():
    summary[f'devices_{count}.seconds_per_pass'] = seconds
  rows, num_classes = data.train.rows, data.train.num_classes
  here = simulate.linear_workload(rows.ids.size, rows.num_features, num_classes)
  cases = {
    'this run': (here, simulate.Machine(speed=here.operations / measured[1])),
    'Reddit-Full': (REDDIT, simulate.Machine()),
    'ODP': (ODP, simulate.Machine()),
  }
  gap = '' if data.best is None else ' less the least'
  figure = ring_figure.draw(
    curves,
    {count: measured[1] / seconds for count, seconds in measured.items()},
    ring_costs.simulated(cases, seed=config.seed),
    memory,
    objective=f'objective{gap}, on the rows to train on',
    score='macro F1, on test rows',
    best=data.best,
    title=f'DS-MLR, {data.title}: {rows.num_rows:,} rows, '
    f'{rows.num_features:,} features, {num_classes:,} classes',
    shared=config.executor == 'virtual',
  )
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


def measure(config: Config, data: Data) -> dict[int, float]:
  """Seconds of a pass on 1, 2, 4, ... devices, a worker on each."""

  def make(count):
    executor = 'mesh' if count > 1 else 'virtual'
    changed = dataclasses.replace(config, executor=executor)
    method = make_method(changed, data, count)
    return method.step, method.init(jax.random.key(config.seed)), method.batch

  most = data.train.num_classes // config.slots
  return ring_costs.measured(make, most)


if __name__ == '__main__':
  ring_costs.use_cores()
  runner.launch(Config(), run)
