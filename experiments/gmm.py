"""Gaussian mixtures by VI, SVI and ESVI from one start, side by side.

  python -m emc2.experiments.gmm --workdir=runs/gmm

fits 32 Gaussians to 10,000 generated rows of 16 numbers by every algorithm. It
takes half a minute on two CPU cores, most of it to compile; all steps together
take one second. That command, with JAX 0.10.2, came to vi.elbo = -167188,
svi.elbo = -171974, svi_paper.elbo = -241383 and esvi.elbo = -166513.
`--config.data=toy` takes the size of the paper's toy, 30,000 rows of 128
numbers and 256 Gaussians, and `--config.data=PATH` a matrix of one row for each
sample, `.npy` or `.csv` without a header. `--config.algorithm=` chooses some of

  vi         all responsibilities, then all components
  svi        a minibatch a step, step sizes (1 + t)^-0.7
  svi_paper  the same with the paper's 0.1 / (1 + t), which hardly moves
  esvi       `blocks` places, between which the components travel

A pass updates each responsibility once: a step of VI, N / batch_size of SVI,
`blocks` of ESVI. The bounds are those of the components' posteriors with the
best responsibilities, in float64 over all rows, whatever the algorithm keeps.
On several devices ESVI splits rows and components over them if their number
divides `blocks`.

`figure.png` shows the bounds against passes and seconds, and the best mixture
on the first two principal axes. `result.json` holds

  ALGORITHM.elbo            at the end, in nats for all rows
  ALGORITHM.seconds         of its steps, without compiling and evaluating
  ALGORITHM.components      that have the mass of a row at least
  ALGORITHM.adjusted_rand   of the likeliest components, if labels are known
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from emc2 import mesh as mesh_lib
from emc2.experiments import gmm_figure, runner
from emc2.topics import mixture
from emc2.topics.mixture import model as model_lib

ALGORITHMS = ('vi', 'svi', 'svi_paper', 'esvi')
COVARIANCES = {
  'diagonal': mixture.gaussian_diagonal,
  'full': mixture.gaussian_full,
}
GENERATED = {'blobs': (10_000, 16, 32), 'toy': (30_000, 128, 256)}
"""Rows, numbers in each, and clusters."""

_bound = jax.jit(mixture.elbo, static_argnums=0)  # Once for all algorithms.


@dataclasses.dataclass
class Config:
  """Settings."""

  data: str = 'blobs'  # Or 'toy', or a file.
  algorithm: str = 'vi,svi,svi_paper,esvi'
  components: int = 0  # K; 0 for the clusters of generated data, 16 of a file.
  covariance: str = 'diagonal'  # Or 'full'.
  concentration: float = 5.0  # alpha_0
  mean_strength: float = 1.0  # beta_0; m_0 is the mean of the data.
  degrees: float = 0.0  # nu_0; 0 for D + 2.
  scale: float = 0.0  # W_0; 0: the prior's mean precision is that of the data.
  num_passes: int = 40
  batch_size: int = 100  # Of SVI.
  blocks: int = 4  # Of ESVI.
  mixing: str = 'permute'
  inner_batch: int = 0  # 0 for none.
  active_prob: float = 1.0
  seed: int = 0


class Data(NamedTuple):
  """What is fitted."""

  rows: np.ndarray  # (N, D), float32.
  labels: np.ndarray | None  # (N,), the cluster of each.
  num_components: int


class Method(NamedTuple):
  """An algorithm as :func:`runner.train` runs it."""

  init: Callable[[jax.Array, Any, jax.Array], Any]  # (key, constants, z0).
  step: Callable[[jax.Array, Any, Any], tuple[Any, dict[str, jax.Array]]]
  constants: Any  # What each step reads.
  statistics: Callable[[Any], mixture.Statistics]  # Of a state, by components.
  steps_per_pass: int


def check(config: Config) -> list[str]:
  """Refuses bad settings that show without the data.

  Args:
    config: The settings.

  Returns:
    The names of the algorithms.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  names = config.algorithm.split(',')
  for name in names:
    if name not in ALGORITHMS:
      raise ValueError(
        f'algorithm must be some of {ALGORITHMS}, with commas between, got '
        f'{name!r}.'
      )
  if len(set(names)) < len(names):
    raise ValueError(f'algorithm must not repeat, got {config.algorithm!r}.')
  if config.covariance not in COVARIANCES:
    raise ValueError(
      f'covariance must be one of {tuple(COVARIANCES)}, got '
      f'{config.covariance!r}.'
    )
  lowest = dict(num_passes=1, batch_size=1, components=0, inner_batch=0, seed=0)
  for name, least in lowest.items():
    value = getattr(config, name)
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  for name in ('degrees', 'scale'):
    value = getattr(config, name)
    if not 0 <= value < math.inf:
      raise ValueError(
        f'{name} must be finite and positive, or 0 for the default, got '
        f'{value}.'
      )
  return names


def read(config: Config) -> Data:
  """Reads or generates the data.

  Args:
    config: The settings.

  Returns:
    The data.

  Raises:
    ValueError: If a file is missing or broken; it names the file.
  """
  if config.data in GENERATED:
    num_rows, dim, num_clusters = GENERATED[config.data]
    rng = np.random.default_rng(config.seed)
    # So far apart that clusters in a plane would overlap much, and these some.
    centers = rng.normal(size=(num_clusters, dim))
    spread = np.exp(0.3 * rng.normal(size=(num_clusters, dim))) / 2
    labels = rng.choice(
      num_clusters, num_rows, p=rng.dirichlet(np.full(num_clusters, 5.0))
    )
    noise = rng.normal(size=(num_rows, dim))
    rows = centers[labels] + spread[labels] * noise
    return Data(
      rows.astype(np.float32), labels, config.components or num_clusters
    )
  path = pathlib.Path(config.data).expanduser()
  if path.suffix not in ('.npy', '.csv'):
    raise ValueError(
      f"data must be one of {tuple(GENERATED)} or a file '.npy' or '.csv', got "
      f'{config.data!r}.'
    )
  if not path.is_file():
    raise ValueError(f'{path}: expected a matrix, got no such file.')
  try:
    if path.suffix == '.npy':
      rows = np.load(path, allow_pickle=False)
    else:
      rows = np.loadtxt(path, delimiter=',', ndmin=2)
  except (ValueError, EOFError) as error:
    raise ValueError(f'{path}: expected a matrix: {error}') from error
  if rows.ndim != 2 or rows.dtype.kind not in 'fiu' or not rows.size:
    raise ValueError(
      f'{path}: expected a matrix of numbers (N, D), got shape {rows.shape} of '
      f'{rows.dtype}.'
    )
  bad = np.argwhere(~np.isfinite(rows))
  if len(bad):
    raise ValueError(
      f'{path}: expected finite numbers, got {rows[tuple(bad[0])]} in row '
      f'{bad[0][0] + 1}, column {bad[0][1] + 1}.'
    )
  return Data(rows.astype(np.float32), None, config.components or 16)


def make_model(config: Config, data: Data) -> mixture.Model:
  """The mixture of a config, its centre and its scale those of the data."""
  rows = data.rows.astype(np.float64)
  dim, mean = rows.shape[1], rows.mean(axis=0)
  degrees = config.degrees or dim + 2.0
  variance = float(rows.var(axis=0).mean()) or 1.0
  family = COVARIANCES[config.covariance](
    dim,
    degrees=degrees,
    scale=config.scale or 1 / (degrees * variance),
    mean=mean,
    mean_strength=config.mean_strength,
    center=mean,
  )
  return mixture.make(
    family, data.num_components, concentration=config.concentration
  )


def make_method(
  config: Config, name: str, model: mixture.Model, data: Data
) -> Method:
  """Binds an algorithm to its data.

  Args:
    config: The settings.
    name: One of `ALGORITHMS`.
    model: The mixture.
    data: The rows.

  Returns:
    The method.

  Raises:
    ValueError: If a setting does not go with the data.
  """
  num_rows = len(data.rows)
  if name == 'esvi':
    return _make_esvi(config, model, data)
  rows = jnp.asarray(data.rows)
  log = lambda info: {'loss': -info.elbo / num_rows}
  if name == 'vi':
    vi = mixture.vi.vi(model)

    def step(key, state, batch):
      state, info = vi.step(key, state, batch[1])
      return state, log(info)

    init, steps_per_pass = vi.init, 1
  else:
    if config.batch_size > num_rows:
      raise ValueError(
        f'batch_size must be at most the {num_rows} rows, got '
        f'{config.batch_size}.'
      )
    schedules = {
      'svi': mixture.svi.power,
      'svi_paper': mixture.svi.inverse_time,
    }
    svi = mixture.svi.svi(model, num_rows=num_rows, step_size=schedules[name]())

    def step(key, state, batch):
      index = jax.random.randint(key, (config.batch_size,), 0, num_rows)
      state, info = svi.step(key, state, batch[1][index])
      return state, log(info)

    init, steps_per_pass = svi.init, max(1, num_rows // config.batch_size)
  return Method(
    init=init,
    step=step,
    constants=rows,
    statistics=lambda state: state.statistics,
    steps_per_pass=steps_per_pass,
  )


def _make_esvi(config, model, data):
  """ESVI, over all devices if their number divides the blocks."""
  num_rows, inner_batch = len(data.rows), config.inner_batch or None
  devices = None
  if jax.device_count() > 1 and config.blocks % jax.device_count() == 0:
    devices = mesh_lib.make(ring=-1)
  esvi = mixture.esvi.esvi(
    model,
    num_blocks=config.blocks,
    mixing=config.mixing,
    inner_batch=inner_batch,
    active_prob=config.active_prob,
    mesh=devices,
  )
  rows = mixture.esvi.split_rows(
    data.rows, config.blocks, inner_batch=inner_batch
  )
  if devices is not None:
    rows = mesh_lib.place(rows, devices, mixture.esvi.row_shardings(devices))

  def step(key, state, batch):
    state, info = esvi.step(key, state, batch[1])
    # The bound but for the entropy of z, which would cost a pass.
    evidence = model_lib.evidence_terms(model, state.statistics)
    moved = jnp.sum(info.moved) / num_rows
    return state, {'loss': -evidence / num_rows, 'moved': moved}

  return Method(esvi.init, step, rows, mixture.esvi.statistics, config.blocks)


def train(
  config: Config,
  name: str,
  model: mixture.Model,
  data: Data,
  workdir: epath.PathLike,
) -> mixture.Statistics:
  """Fits the mixture by one algorithm.

  Args:
    config: The settings.
    name: One of `ALGORITHMS`.
    model: The mixture.
    data: The rows.
    workdir: Its folder.

  Returns:
    The statistics of the components, float64, on the host.
  """
  method = make_method(config, name, model, data)
  z_key, state_key, key = jax.random.split(jax.random.key(config.seed), 3)
  draw = jax.jit(model_lib.draw_responsibilities, static_argnums=(1, 2))
  z0 = draw(z_key, len(data.rows), model.num_components)
  with jax.enable_x64(True):
    rows = jnp.asarray(data.rows, jnp.float64)

  def widen(state):
    found = jax.device_get(method.statistics(state))
    return jax.tree.map(lambda x: x.astype(np.float64), found)

  def evaluate(state):
    with jax.enable_x64(True):
      return {'elbo': _bound(model, widen(state), rows)}

  state = runner.train(
    jax.jit(method.init)(state_key, method.constants, z0),
    method.step,
    constants=method.constants,
    key=key,
    num_steps=config.num_passes * method.steps_per_pass,
    workdir=workdir,
    name=name,
    steps_per_call=method.steps_per_pass,
    log_every=method.steps_per_pass,
    checkpoint_every=10 * method.steps_per_pass,
    keep=1,
    evaluate=evaluate,
    evaluate_every=method.steps_per_pass,
  )
  return widen(state)


def project(
  model: mixture.Model, statistics: mixture.Statistics, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
  """Shows a mixture in a plane: that of the data, or of its principal axes.

  Args:
    model: The mixture.
    statistics: Of its components.
    rows: (N, D).

  Returns:
    Points (N, 2); of the components with the mass of a row the means and
    covariances (K, 2, 3); and the names of the two axes.
  """
  dim, mean = rows.shape[1], rows.mean(axis=0, dtype=np.float64)
  if dim <= 2:
    axes, names = np.eye(2)[:, :dim], ('x', 'y')
  else:
    values, vectors = np.linalg.eigh(np.cov(rows.T.astype(np.float64)))
    axes = vectors[:, ::-1][:, :2].T
    names = tuple(
      f'principal axis {i + 1} ({share:.0%} of the variance)'
      for i, share in enumerate(values[::-1][:2] / values.sum())
    )
  count = statistics.count[:, None]
  kept = statistics.count >= 1
  center = statistics.moments[kept, :dim] / count[kept]
  second = statistics.moments[kept, dim:] / count[kept]
  if second.shape[1] == dim:
    covariance = (second - center**2)[:, :, None] * np.eye(dim)
  else:
    lower, upper = np.tril_indices(dim)
    covariance = np.zeros((len(center), dim, dim))
    covariance[:, lower, upper] = covariance[:, upper, lower] = second
    covariance -= center[:, :, None] * center[:, None, :]
  covariance = axes @ covariance @ axes.T
  offset = mean @ axes.T if dim <= 2 else np.zeros(2)
  center = center @ axes.T + offset
  points = (rows - mean) @ axes.T + offset
  ellipses = np.concatenate([center[:, :, None], covariance], axis=2)
  return points, ellipses, names


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Fits by every algorithm, scores and draws."""
  names = check(config)
  data = read(config)
  model = make_model(config, data)
  for name in names:  # Bad settings end before the first step of any.
    make_method(config, name, model, data)
  summary, curves, fitted = {}, {}, {}
  find = jax.jit(lambda *given: model_lib.responsibilities(model, *given))
  for name in names:
    folder = workdir / name
    fitted[name] = train(config, name, model, data, folder)
    steps, bounds = runner.read_metrics(folder)['elbo']
    seconds = runner.seconds_per_step(folder)
    curves[name] = (
      steps * (config.num_passes / steps[-1]),
      steps * seconds,
      bounds / len(data.rows),
    )
    summary[f'{name}.elbo'] = bounds[-1]
    summary[f'{name}.seconds'] = steps[-1] * seconds
    summary[f'{name}.components'] = float(np.sum(fitted[name].count >= 1))
    if data.labels is not None:
      from sklearn import metrics  # A second to import, for those who need it.

      statistics = jax.tree.map(np.float32, fitted[name])
      z = find(statistics, data.rows)
      found = np.asarray(jnp.argmax(z, axis=1))
      score = metrics.adjusted_rand_score(data.labels, found)
      summary[f'{name}.adjusted_rand'] = score
  best = max(names, key=lambda name: summary[f'{name}.elbo'])
  points, ellipses, axes = project(model, fitted[best], data.rows)
  figure = gmm_figure.draw(
    curves,
    points,
    ellipses,
    title=f'{len(ellipses)} components found by {best}',
    axes=axes,
  )
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


if __name__ == '__main__':
  runner.launch(Config(), run)
