"""Krylov cubic Newton on logistic regression, beside its baselines and SciPy.

  python -m emc2.experiments.krylov_newton --workdir=runs/krylov_newton

fits 1,000 generated rows of 300 features, from 0.5 in each entry, until the
gradient has a norm of 1e-8: by cubic Newton steps in Krylov spaces of m
dimensions (krylov_m), in the whole space (cubic_newton) and in m random
coordinates (sscn_m), by `optax.lbfgs` and by SciPy's trust-krylov, Newton-CG
and L-BFGS-B, all on the same objective in float64. It takes a minute on two CPU
cores, most of it to compile. That command, with JAX 0.10.2, came to

                iterations to a gap of       iterations  products  gradients
                1e-2  1e-3  1e-4  1e-6       to the end  by the Hessian
  krylov_1       780  1134  1868  3557             3668      3668       3668
  krylov_5        25    45    66   121              136       680        136
  krylov_10       15    19    23    32               36       360         36
  krylov_20       15    19    23    30               30       600         30
  cubic_newton    15    19    23    30               30      9000         30
  sscn_100        62   113   164   266              302
  sscn_50        186   367   556   905             1052
  sscn_10       1186  2462  3783  6285             7222
  optax_lbfgs     20    23    27    33               38                   41
  l_bfgs_b        19    22    26    33               37                   39
  trust_krylov    10    12            stalls at a gradient norm of 6e-6
  newton_cg        7     9            likewise

Ten products a step are as good as the whole Hessian, and random coordinates
need many times more steps. L-BFGS needs the fewest products of all and is first
here. The rows are separable, so the least objective is 0 and lies at infinity.
`--config.data=` takes others:

  FILE      of svmlight, gzip or not, with two classes. On w8a, with
            `--config.ridge=1e-5`, krylov_10 takes 26 iterations of 10 products
            and L-BFGS-B 109 and 117 gradients; SciPy's others stall at 5e-7
  encoder   the last layer of a frozen encoder, for ten digits: a convolutional
            net that SimCLR has trained on scikit-learn's digits without their
            labels (20 epochs, seconds), then a soft-max over its 44 features,
            by `transforms.krylov_cubic_newton` and the others, scikit-learn's
            LogisticRegression too: krylov_20 in 19 iterations, L-BFGS in 166.
            All of them have a test accuracy of 0.953

Points are looked at exactly, in float64 on the host, while clocks stand: so all
methods end by one rule, which costs none of them anything. Compiling is told
apart. SciPy has products by compressed rows, or by BLAS where rows are dense.
A method that has ended is read back on a second start, and one that was stopped
begins again.

`figure.png` shows the gap to the least objective against iterations, products
and gradients, and seconds. `result.json` holds `optimum`, the least objective,
which cubic Newton or Krylov steps of 20 dimensions find in float64 (but for
what another method found below it), and for each METHOD

  METHOD.iterations
  METHOD.hvps             Hessian-vector products; all d of an iteration where
                          the Hessian is formed; none of coordinates
  METHOD.gradients        none of coordinates
  METHOD.evaluations      of the objective; of Newton methods the trials of M,
                          which read no data but on an encoder
  METHOD.seconds          of the iterations
  METHOD.compile_seconds  of what runs on the device
  METHOD.gradient_norm    at the end, as the next
  METHOD.objective
  METHOD.result           1 if it came to the tolerance, 0 if iterations or
                          seconds were over, 2 if it found no lower point, 3 if
                          it met what is not finite
  METHOD.iterations_to_G  for G of 1e-2, 1e-3, 1e-4, 1e-6: until the gap was at
                          most that; absent if it never was
  METHOD.accuracy         on test images (encoder)

Of scikit-learn's methods only iterations, seconds and the end are known.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from emc2 import arguments
from emc2.experiments import krylov_newton_figure as figure_lib
from emc2.experiments import krylov_newton_head as head_lib
from emc2.experiments import krylov_newton_methods as methods_lib
from emc2.experiments import krylov_newton_peers as peers
from emc2.experiments import krylov_newton_trace as trace_lib
from emc2.experiments import runner
from emc2.experiments.data import examples, generated, svmlight
from emc2.newton import coordinates, full, krylov
from emc2.newton import problem as problem_lib

LOGISTIC = (
  'krylov_1',
  'krylov_5',
  'krylov_10',
  'krylov_20',
  'cubic_newton',
  'sscn_10',
  'sscn_50',
  'sscn_100',
  'optax_lbfgs',
  *peers.SCIPY,
)
HEAD = (
  'krylov_1',
  'krylov_5',
  'krylov_10',
  'krylov_20',
  'optax_lbfgs',
  *peers.SCIPY,
  *peers.SKLEARN,
)
"""What runs by default, of two classes and on the features of an encoder."""

GAPS = {'1e-2': 1e-2, '1e-3': 1e-3, '1e-4': 1e-4, '1e-6': 1e-6}
"""Above the least objective, to which iterations are counted."""

HEAD_RIDGE = 1e-4

DENSE_SHARE = 0.25
"""Share of entries that are not 0 from which features are kept dense."""

THREADED = 10**7
"""Entries of dense rows from which BLAS takes more than one thread."""

REFERENCE_DIM = 20
"""Of the Krylov space that finds the least objective of many features."""


@dataclasses.dataclass
class Config:
  """Settings; what is None hangs on the data."""

  data: str = 'generated'  # Or 'encoder', or a file of svmlight.
  methods: str = (
    'all'  # Or names with commas between; any m in krylov_m, sscn_m.
  )
  seed: int = 0

  num_rows: int = 1_000  # Of the generated problem, like the next.
  num_features: int = 300
  num_epochs: int = 20  # In which the encoder is trained.
  ridge: float | None = None  # mu; None: 0, or 1e-4 on an encoder.
  start: float | None = (
    None  # Each entry of x_0; None: 0.5, or 0 on an encoder.
  )

  gradient_tol: float = 1e-8  # Norm at which a method has come to the end.
  max_iterations: int = 20_000
  max_seconds: float = 5.0  # Of each method, without compiling.
  dtype: str = 'float64'  # On the device; SciPy's is always float64.
  regularization: float = 2e-3  # M of the first step, in M/6.
  memory: int = 20  # Pairs of differences that L-BFGS keeps.


class Data(NamedTuple):
  """What is minimised."""

  title: str
  objective: peers.Logistic | peers.Softmax
  start: float
  test: head_lib.Features | None  # To count hits on.


class Device(NamedTuple):
  """What methods on the device share."""

  place: Callable[[str], Any]  # Gives what steps read, of a dtype.
  make: Callable[[str], methods_lib.Method]  # Gives a method by its name.


def check(config: Config) -> list[str]:
  """Refuses bad settings that show without the data.

  Args:
    config: The settings.

  Returns:
    The names of the methods.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  for name in ('num_rows', 'num_features', 'num_epochs', 'max_iterations'):
    arguments.check_at_least(name, getattr(config, name), 1)
  for name in ('seed', 'ridge', 'gradient_tol'):
    arguments.check_at_least(name, getattr(config, name), 0)
  arguments.check_at_least('memory', config.memory, 1)
  for name in ('max_seconds', 'regularization'):
    arguments.check_positive(name, getattr(config, name))
  if config.start is not None and not math.isfinite(config.start):
    raise ValueError(f'start must be finite, got {config.start}.')
  arguments.check_one_of('dtype', config.dtype, ('float32', 'float64'))
  known = HEAD if config.data == 'encoder' else LOGISTIC
  if config.methods == 'all':
    return list(known)
  names = config.methods.split(',')
  fixed = [name for name in known if not re.search(r'_\d+$', name)]
  sized = ['krylov'] if config.data == 'encoder' else ['krylov', 'sscn']
  pattern = rf'(?:{"|".join(sized)})_[1-9]\d*'
  for name in names:
    if name not in fixed and not re.fullmatch(pattern, name):
      given = fixed + [f'{kind}_M' for kind in sized]
      raise ValueError(
        f"methods must be 'all' or some of {given}, with commas between, got "
        f'{name!r}.'
      )
  if len(set(names)) < len(names):
    raise ValueError(f'methods must differ, got {config.methods!r}.')
  if config.start and not set(names).isdisjoint(peers.SKLEARN):
    raise ValueError(f'start must be 0 for scikit-learn, got {config.start}.')
  return names


def read(config: Config, workdir: epath.PathLike) -> Data:
  """Reads or generates the data, or trains the encoder that makes them.

  Args:
    config: The settings.
    workdir: Of the run.

  Returns:
    The data.

  Raises:
    ValueError: If a file is missing or broken, which it names and the line, or
      if it has not two classes.
  """
  if config.data == 'encoder':
    train, test = head_lib.extract(
      epath.Path(workdir) / 'encoder',
      num_epochs=config.num_epochs,
      seed=config.seed,
    )
    ridge = HEAD_RIDGE if config.ridge is None else config.ridge
    features = _rounded(train.rows, config.dtype)
    objective = peers.Softmax(
      features, train.labels, head_lib.NUM_CLASSES, ridge
    )
    return Data('on features of digits', objective, config.start or 0.0, test)
  if config.data == 'generated':
    given = generated.logistic(
      config.num_rows, config.num_features, seed=config.seed
    )
    title, rows = 'generated rows', given.rows
  else:
    (given,) = svmlight.read(config.data)
    title = epath.Path(config.data).name
    if given.num_classes != 2:
      raise ValueError(
        f'{config.data}: expected labels of two classes, got '
        f'{given.num_classes}: {_shown(given.class_names)}.'
      )
    rows = examples.to_csr(given.rows)
    if rows.nnz >= DENSE_SHARE * math.prod(rows.shape):
      rows = rows.toarray()
  start = 0.5 if config.start is None else config.start
  objective = peers.Logistic(
    _rounded(rows, config.dtype), given.labels, config.ridge or 0.0
  )
  return Data(title, objective, start, None)


def _rounded(rows, dtype):
  """Numbers that the dtype has: the problem is the same on the device."""
  return rows.astype(dtype).astype(np.float64)


def _shown(names):
  return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def choose(config: Config, names: list[str], size: int) -> list[str]:
  """Leaves out the methods of a default that have more dimensions than there.

  Args:
    config: The settings.
    names: Of the methods.
    size: Entries of a point.

  Returns:
    The names that are left.

  Raises:
    ValueError: If the config names such a method.
  """
  wide = [name for name in names if _dim(name) > size]
  if wide and config.methods != 'all':
    raise ValueError(
      f'methods must have at most the {size} dimensions of the data, got '
      f'{wide[0]!r}.'
    )
  return [name for name in names if name not in wide]


def _dim(name):
  found = re.search(r'_(\d+)$', name)
  return int(found[1]) if found else 1


def place(data: Data, dtype: str) -> problem_lib.Problem | methods_lib.Head:
  """What the steps of all methods read, on the device."""
  objective = data.objective
  if isinstance(objective, peers.Softmax):
    return methods_lib.Head(
      rows=jnp.asarray(objective.rows[:, :-1], dtype),
      labels=jnp.asarray(objective.labels, jnp.int32),
      ridge=jnp.asarray(objective.ridge, dtype),
    )
  return problem_lib.make(
    objective.rows,
    objective.labels,
    loss='logistic',
    ridge=objective.ridge,
    dtype=np.dtype(dtype),
  )


def make_method(config: Config, data: Data, name: str) -> methods_lib.Method:
  """Binds a method of the device to its settings.

  Args:
    config: The settings.
    data: What is minimised.
    name: Of the method.

  Returns:
    The method.
  """
  if isinstance(data.objective, peers.Softmax):
    value_fn = methods_lib.softmax_value
    make_params = functools.partial(
      methods_lib.softmax_start, data.start, data.objective.shape[1]
    )
  else:
    value_fn = methods_lib.logistic_value
    make_params = functools.partial(methods_lib.logistic_start, data.start)
  if name == 'optax_lbfgs':
    return methods_lib.lbfgs(value_fn, make_params, memory=config.memory)
  first = dict(regularization=config.regularization)
  if isinstance(data.objective, peers.Softmax):
    return methods_lib.krylov_transform(
      value_fn, make_params, _dim(name), **first
    )
  if name == 'cubic_newton':
    method = full.cubic_newton(**first)
  elif name.startswith('sscn'):
    method = coordinates.subspace_cubic_newton(_dim(name), **first)
  else:
    method = krylov.krylov_cubic_newton(_dim(name), **first)
  return methods_lib.newton(method, data.start)


def share(config: Config, data: Data) -> Device:
  """What all methods get; each piece is made when first asked for."""
  return Device(
    place=functools.cache(functools.partial(place, data)),
    make=functools.cache(functools.partial(make_method, config, data)),
  )


def fit(
  config: Config,
  data: Data,
  name: str,
  device: Device,
  workdir: epath.PathLike,
) -> tuple[trace_lib.Curve, dict[str, float]]:
  """Runs one method, or reads it back if it has ended before.

  Args:
    config: The settings.
    data: What is minimised.
    name: Of the method.
    device: Shared by the methods.
    workdir: Its folder.

  Returns:
    What it came to, and the numbers that were kept.

  Raises:
    ValueError: If the objective is not finite where it starts.
  """
  ended = trace_lib.read_ended(workdir)
  if ended is not None:
    return ended
  objective, numbers = data.objective, {}
  limits = trace_lib.Limits(
    config.gradient_tol, config.max_iterations, config.max_seconds
  )
  with (
    _few_threads(objective),
    trace_lib.Trace(
      epath.Path(workdir).name, objective.value_and_gradient, limits, workdir
    ) as trace,
  ):
    if name in peers.SCIPY:
      start = np.full(objective.size, data.start)
      reason = peers.minimize(
        name, objective, start, trace, memory=config.memory
      )
    elif name in peers.SKLEARN:
      reason = peers.fit_sklearn(name, objective, trace, limits)
    else:
      with jax.enable_x64(config.dtype == 'float64'):
        reason, numbers['compile_seconds'] = methods_lib.drive(
          device.make(name),
          device.place(config.dtype),
          trace,
          key=jax.random.key(config.seed),
          max_iterations=config.max_iterations,
        )
    if trace.point is None:
      raise ValueError(
        f'start must have a finite objective, got {data.start} for each entry.'
      )
    if data.test is not None:
      scores = data.test.rows @ trace.point.reshape(objective.shape)
      hits = np.argmax(scores, axis=1) == data.test.labels
      numbers['accuracy'] = float(np.mean(hits))
    trace.end(reason, **numbers)
  return trace_lib.read_ended(workdir)


def _few_threads(objective):
  """One thread of BLAS for what is small: more would wait for each other.

  Where others use the cores too, that takes fifty times as long.
  """
  import threadpoolctl  # Of scikit-learn.

  dense = isinstance(objective.rows, np.ndarray)
  if dense and objective.rows.size >= THREADED:
    return contextlib.nullcontext()
  return threadpoolctl.threadpool_limits(1)


def find_optimum(
  config: Config,
  data: Data,
  device: Device,
  workdir: epath.PathLike,
) -> float:
  """The least objective that a Newton method of many dimensions comes to.

  It works in float64, to a thousandth of the tolerance.

  Args:
    config: The settings.
    data: What is minimised.
    device: Shared by the methods.
    workdir: A folder of its own.

  Returns:
    The objective, exactly.
  """
  config = dataclasses.replace(
    config, dtype='float64', gradient_tol=config.gradient_tol / 1_000
  )
  size, name = data.objective.size, 'cubic_newton'
  if size >= full.DENSE_BELOW or isinstance(data.objective, peers.Softmax):
    name = f'krylov_{min(REFERENCE_DIM, size)}'
  curve, _ = fit(config, data, name, device, workdir)
  return float(curve.objective.min())


def summarize(
  name: str,
  curve: trace_lib.Curve,
  numbers: dict[str, float],
  optimum: float,
) -> dict[str, float]:
  """What `result.json` tells of one method."""
  summary = {'iterations': curve.iterations[-1]}
  if name not in peers.SKLEARN:  # Which does not tell what it has called.
    for work in trace_lib.Work._fields:
      summary[work] = getattr(curve, work)[-1]
  for metric in ('seconds', 'gradient_norm', 'objective'):
    summary[metric] = getattr(curve, metric)[-1]
  summary |= numbers
  for text, gap in GAPS.items() if name not in peers.SKLEARN else ():
    reached = curve.objective - optimum <= gap
    if reached.any():
      first = curve.iterations[np.argmax(reached)]
      summary[f'iterations_to_{text}'] = first
  return {f'{name}.{key}': float(x) for key, x in summary.items()}


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Runs every method, finds the least objective, and draws."""
  names = check(config)
  data = read(config, workdir)
  objective = data.objective
  names = choose(config, names, objective.size)
  device = share(config, data)
  found = {
    name: fit(config, data, name, device, workdir / name) for name in names
  }
  curves = {name: curve for name, (curve, _) in found.items()}
  optimum = find_optimum(config, data, device, workdir / 'reference')
  optimum = min(
    [optimum, *(curve.objective.min() for curve in curves.values())]
  )
  summary = {'optimum': float(optimum)}
  for name, (curve, numbers) in found.items():
    summary |= summarize(name, curve, numbers, optimum)
  num_rows, num_features = objective.rows.shape
  layer = '' if data.test is None else ', 10 classes'
  figure = figure_lib.draw(
    curves,
    {name: int(numbers['result']) for name, (_, numbers) in found.items()},
    optimum,
    title=f'Logistic regression, {data.title}: {num_rows:,} x {num_features:,}'
    f'{layer}, ridge {objective.ridge:g}, {config.dtype}, to a gradient norm '
    f'of {config.gradient_tol:g}',
  )
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


if __name__ == '__main__':
  runner.launch(Config(), run)
