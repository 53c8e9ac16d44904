"""Points on a sphere by every optimiser, side by side: the Thomson problem.

  python -m emc2.experiments.thomson --workdir=runs/thomson

spreads 12 charges on the sphere from 32 starts by every optimiser of
:mod:`emc2.experiments.thomson_methods`, and polishes the best points of all.
It takes about a minute on two CPU cores, most of it to compile; its steps take
four seconds. That command, with JAX 0.10.2, came to energy 49.1652530576288
with gradient_norm 6e-12, a relative_gap of 3e-16 to the icosahedron, and 12
defects; every optimiser came as near but pair_sgd, 6.6e-5 above.
`--config.n=`, `--config.k=` and `--config.s=` choose the points, the dimension
and the exponent of the energy, `--config.optimizers=` some of the optimisers.

`points.csv` holds the best points, a row for each; `figure.png` shows them, by
their number of neighbours where k = 3, and the best energy of each optimiser
against time. `result.json` holds

  energy                   of the best points, polished, each pair once
  best_known               the least energy known, if there is one
  relative_gap             (energy - best_known) / |best_known|, likewise
  seconds                  of all optimisers together
  gradient_norm            of the tangent gradient at the best points
  min_distance             between two of them
  num_defects              points that do not have six neighbours (k = 3)
  total_defect_charge      sum of 6 - neighbours, 12 by Euler's formula (k = 3)
  OPTIMIZER.energy         the least that it met on the sphere, not polished
  OPTIMIZER.relative_gap   of that, if there is a best_known
  OPTIMIZER.seconds        of its steps, all starts side by side, without
                           compiling, evaluating or saving
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.spatial
from etils import epath

from emc2 import mesh as mesh_lib
from emc2 import sphere
from emc2.experiments import metrics, runner, thomson_figure, thomson_methods
from emc2.sphere import minimize


@dataclasses.dataclass
class Config:
  """Settings."""

  n: int = 12  # Points.
  k: int = 3  # They lie on the sphere of R^k.
  s: float = 1.0  # Of the energy: the sum of r^-s; 0 of -log r.
  restarts: int = 32  # Starts of each optimiser, which run at once.
  seed: int = 0
  optimizers: str = 'all'  # Or names of `METHODS`, with commas between.
  num_steps: int = 1_000  # Energies with gradient that each start may take.
  hops: int = 10  # Of basin hopping, each down to a minimum.
  symmetric: bool = True  # Whether its starts are (k = 3).
  tolerance: float = 1e-10  # Of the polished gradient's norm.
  dtype: str = 'float64'  # Of the search; the result is always polished in it.


class State(NamedTuple):
  """Chains side by side; every leaf starts with an axis of them."""

  chain: Any  # Of the method.
  points: jax.Array  # (restarts, n, k): the best of each so far.
  energy: jax.Array  # (restarts,): theirs.


class Info(NamedTuple):
  """What is logged of a step."""

  loss: jax.Array  # (): mean over the chains of the best energy of each.
  energy: jax.Array  # (): the best of all.


def check(config: Config) -> list[str]:
  """Refuses bad settings.

  Args:
    config: The settings.

  Returns:
    The names of the optimisers.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  lowest = dict(n=2, k=2, restarts=1, num_steps=1, hops=0, seed=0)
  for name, least in lowest.items():
    value = getattr(config, name)
    if value < least:
      raise ValueError(f'{name} must be at least {least}, got {value}.')
  if not 0 <= config.s < math.inf:
    raise ValueError(f's must be finite and at least 0, got {config.s}.')
  if not 0 <= config.tolerance < math.inf:
    raise ValueError(
      f'tolerance must be finite and at least 0, got {config.tolerance}.'
    )
  if config.dtype not in ('float32', 'float64'):
    raise ValueError(
      f"dtype must be 'float32' or 'float64', got {config.dtype!r}."
    )
  known = list(thomson_methods.METHODS)
  if config.optimizers == 'all':
    return [name for name in known if _suits(name, config)]
  names = config.optimizers.split(',')
  for name in names:
    if name not in known:
      raise ValueError(
        f"optimizers must be 'all' or some of {known}, with commas between, "
        f'got {name!r}.'
      )
    if not _suits(name, config):
      raise ValueError(f'k must be 3 for {name}, got {config.k}.')
  if len(set(names)) < len(names):
    raise ValueError(f'optimizers must differ, got {config.optimizers!r}.')
  return names


def _suits(name, config):
  return config.k == 3 or name != 'spherical_lbfgs'


def draw_starts(config: Config, name: str) -> np.ndarray:
  """Draws the points that the chains of an optimiser start from.

  They are uniform, and the same for all but basin hopping. Its starts are
  symmetric where k = 3: a random point group maps them to themselves, but for
  shifts of a thousandth of the radius, which let them leave a saddle point.

  Args:
    config: The settings.
    name: Of the optimiser.

  Returns:
    (restarts, n, k), of the config's dtype, unit rows.
  """
  rng = np.random.default_rng(config.seed)
  points = rng.normal(size=(config.restarts, config.n, config.k))
  groups = []
  if name == 'basin_hopping' and config.k == 3 and config.symmetric:
    fits = functools.partial(sphere.symmetry.possible, num_points=config.n)
    groups = [group for group in sphere.symmetry.GROUPS if fits(group)]
  for i in range(config.restarts if groups else 0):
    group = groups[rng.integers(len(groups))]
    seed = sphere.symmetric_seed(rng, config.n, group)
    points[i] = seed + 1e-3 * rng.normal(size=seed.shape)
  points /= np.linalg.norm(points, axis=-1, keepdims=True)
  return points.astype(config.dtype)


def make_step(method: thomson_methods.Method, restarts: int) -> Any:
  """Binds a method to a step of all its chains, for `runner.train`."""

  def step(key, state, number):
    keys = jax.random.split(key, restarts)
    chains = jax.vmap(method.step, in_axes=(0, 0, None))
    chain, points, energy = chains(keys, state.chain, number)
    better = energy < state.energy  # Never NaN, which was not measured.
    state = State(
      chain,
      points=jnp.where(better[:, None, None], points, state.points),
      energy=jnp.where(better, energy, state.energy),
    )
    mean = jnp.mean(state.energy, where=jnp.isfinite(state.energy))
    return state, Info(loss=mean, energy=jnp.min(state.energy))

  return step


def place(state: State) -> tuple[State, jax.sharding.NamedSharding | None]:
  """Spreads the chains over all devices, if they divide them.

  Args:
    state: On one device.

  Returns:
    The state, and how what all devices hold is placed; None for one device.
  """
  if jax.device_count() == 1 or len(state.energy) % jax.device_count():
    return state, None
  devices, spec = mesh_lib.make(), jax.sharding.PartitionSpec
  state = mesh_lib.place(state, devices, spec(mesh_lib.DATA))
  return state, jax.sharding.NamedSharding(devices, spec())


def train(
  config: Config,
  name: str,
  method: thomson_methods.Method,
  workdir: epath.PathLike,
) -> tuple[np.ndarray, float]:
  """Runs all chains of one optimiser.

  Args:
    config: The settings.
    name: Of the optimiser.
    method: Its functions.
    workdir: Its folder.

  Returns:
    The best points (n, k), and their energy.
  """
  key = jax.random.key(config.seed)

  @jax.jit
  def init(key, starts):
    # No step draws from these keys.
    keys = jax.random.split(jax.random.fold_in(key, 2**31 - 1), len(starts))
    chain = jax.vmap(method.init)(keys, starts)
    return State(chain, starts, jnp.full(len(starts), jnp.inf, starts.dtype))

  state, everywhere = place(init(key, draw_starts(config, name)))
  # Several calls, since the first is not timed, and of one length, since each
  # length is compiled.
  most = max(1, min(50, method.num_steps // 8))
  divides = lambda steps: method.num_steps % steps == 0
  steps_per_call = max(filter(divides, range(1, most + 1)))
  state = runner.train(
    state,
    make_step(method, config.restarts),
    key=key,
    num_steps=method.num_steps,
    workdir=workdir,
    name=name,
    steps_per_call=steps_per_call,
    log_every=max(1, method.num_steps // 200),
    checkpoint_every=20 * steps_per_call,
  )

  def best(state):
    first = jnp.argmin(state.energy)
    return state.points[first], state.energy[first]

  points, energy = jax.jit(best, out_shardings=everywhere)(state)
  return np.asarray(points), float(energy)


def polish(
  config: Config, points: np.ndarray
) -> tuple[np.ndarray, float, float]:
  """Goes down by L-BFGS in float64 until the gradient vanishes.

  Args:
    config: The settings.
    points: (n, k) to start from.

  Returns:
    The points, their energy and the norm of the tangent gradient.
  """
  problem = make_problem(config, points)

  @jax.jit
  def descend(points):
    return minimize.minimize(
      points,
      problem.energy,
      thomson_methods.make_lbfgs(problem),
      tolerance=config.tolerance,
      max_evaluations=10_000,
    )

  with jax.enable_x64(True):
    points = points.astype(np.float64)
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    found = jax.device_get(descend(points))
  return found.points, float(found.energy), float(found.gradient_norm)


def make_problem(config: Config, points: np.ndarray) -> thomson_methods.Problem:
  """What the methods must know; points (..., n, k) are what they start from."""
  return thomson_methods.Problem(
    num_points=config.n,
    dim=config.k,
    exponent=float(config.s),
    num_steps=config.num_steps,
    hops=config.hops,
    push=thomson_methods.push_outwards(points, float(config.s)),
  )


def triangulate(points: np.ndarray) -> np.ndarray | None:
  """The facets of the convex hull, (2 n - 4, 3), if it has a volume."""
  if points.shape[1] != 3 or len(points) < 4:
    return None
  try:
    triangles = scipy.spatial.ConvexHull(points).simplices
    sphere.check_triangulation(triangles, len(points))
  except (scipy.spatial.QhullError, ValueError):
    return None  # Points on a circle, which is where few may go.
  return triangles


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Runs every optimiser, polishes the best points of all, and draws them."""
  names = check(config)
  best, energies, seconds, curves = None, {}, {}, {}
  # Between float32 and the default of float64 stand weights of L-BFGS.
  with jax.enable_x64(config.dtype == 'float64'):
    problem = make_problem(config, draw_starts(config, ''))
    for name in names:
      method, folder = thomson_methods.METHODS[name](problem), workdir / name
      points, energies[name] = train(config, name, method, folder)
      if best is None or energies[name] < best[1]:
        best = points, energies[name]
      step = runner.seconds_per_step(folder)
      steps, values = runner.read_metrics(folder)['energy']
      curves[name] = steps * step, values
      seconds[name] = method.num_steps * step
  points, energy, norm = polish(config, best[0])
  known = sphere.best_known(config.n, config.k, float(config.s))
  gap = lambda energy: (energy - known.energy) / abs(known.energy)
  summary = {'energy': energy}
  if known is not None:
    summary |= {'best_known': known.energy, 'relative_gap': gap(energy)}
  summary['seconds'] = sum(seconds.values())
  summary['gradient_norm'] = norm
  with jax.enable_x64(True):
    summary['min_distance'] = float(sphere.min_distance(points))
  degrees = None
  triangles = triangulate(points)
  if triangles is not None:
    degrees = np.asarray(sphere.degrees(triangles, config.n))
    summary['num_defects'] = float(np.sum(degrees != 6))
    summary['total_defect_charge'] = float(np.sum(6 - degrees))
  for name in names:
    summary[f'{name}.energy'] = energies[name]
    if known is not None:
      summary[f'{name}.relative_gap'] = gap(energies[name])
    summary[f'{name}.seconds'] = seconds[name]
  save_points(points, workdir / 'points.csv')
  title = f'n = {config.n}, k = {config.k}, s = {config.s:g}: E = {energy:.9f}'
  if known is not None:
    title += f'\nrelative gap to the best known {gap(energy):.1e}'
  reference = min([energy, *energies.values()])
  figure = thomson_figure.draw(
    points,
    degrees,
    curves,
    title=title,
    reference=reference if known is None else min(reference, known.energy),
    reference_name='the best found' if known is None else 'the best known',
  )
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


def save_points(points: np.ndarray, path: epath.Path) -> None:
  """Writes points (n, k) as text that `np.loadtxt(path, delimiter=',')` reads.

  So many digits that each number comes back as it was.
  """
  if jax.process_index() == 0:
    lines = [','.join(map(repr, row)) for row in points.tolist()]
    metrics.write_atomically(path, '\n'.join([*lines, '']).encode())


if __name__ == '__main__':
  runner.launch(Config(), run)
