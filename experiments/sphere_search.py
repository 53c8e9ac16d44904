"""The least energy of points on a sphere, searched from many starts.

One program minimises a batch of starts, whatever they are; it is compiled once
for each number of points. Random starts hit the least energy of up to some
hundred points. Beyond, their share falls by half for every fourteen points,
and symmetric starts take their place: of 372 points nothing else finds the
minimum in minutes.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax

from emc2 import transforms
from emc2.sphere import basin_hopping, minima, symmetry
from emc2.sphere.energy import energy
from emc2.sphere.minimize import Minimum, minimize

_SCREENING_TOLERANCE = 1e-5
_MAX_EVALUATIONS = 3000
_RTOL = 1e-10  # Of two energies that are the same.
_NEAR = 1e-6  # What is so near to the target is worth the last digits.
_HUGE = 1e100
_PATIENCE = 3  # Rounds without a better minimum before hops begin.
_MAX_REJECTED = 60
_SMALLEST_SYMMETRIC = 12
_MANY = 150  # Points of which random starts hardly ever find the minimum.
_NOISE = 1e-3  # Of the spacing: leaves a saddle, and no basin.


class Found(NamedTuple):
  """What :func:`search` found."""

  points: np.ndarray  # (n, k), float64, unit rows.
  energy: float
  gradient_norm: float  # Of the tangent gradient, over all points.
  origin: str  # 'random', 'net', 'hop' or a point group.
  num_starts: int  # Minimisations, the last ones for the digits not counted.
  seconds: float  # Compilation included.


class Candidate(NamedTuple):
  """A minimum to the tolerance of screening."""

  energy: float
  points: np.ndarray
  origin: str


@functools.cache
def program(
  num_points: int, exponent: float
) -> Callable[[jax.typing.ArrayLike, float], Minimum]:
  """Makes what minimises a batch of starts (c, n, k) to a tolerance.

  Args:
    num_points: n.
    exponent: s >= 0.

  Returns:
    `(starts, tolerance) -> Minimum`, jitted, each field with a leading axis c.
  """
  spacing = 1 / math.sqrt(num_points)
  optimizer = transforms.backtrack(
    optax.chain(optax.scale_by_lbfgs(10), optax.scale(-1.0)),
    max_step=0.9 * spacing,
    first_step=0.1 * spacing,
  )
  energy_fn = functools.partial(energy, exponent=exponent)

  @jax.jit
  def run(starts, tolerance):
    # In float64 the L-BFGS of optax adds integers of 32 and of 64 bits.
    with jax.numpy_dtype_promotion('standard'):
      return minimize(
        starts,
        energy_fn,
        optimizer,
        tolerance=tolerance,
        max_evaluations=_MAX_EVALUATIONS,
      )

  return run


@functools.cache
def _proposals(exponent):
  """Moves a batch of minima (c, n, k) out of their basins."""

  @jax.jit
  def run(key, points):
    propose = functools.partial(basin_hopping.propose, exponent=exponent)
    keys = jax.random.split(key, points.shape[0])
    # Under `jax.vmap` each chain would make all the kinds of moves.
    return jax.lax.map(lambda chain: propose(*chain)[0], (keys, points))

  return run


def normalize(points: np.ndarray) -> np.ndarray:
  """Puts rows (..., k) on the sphere."""
  return points / np.linalg.norm(points, axis=-1, keepdims=True)


class Search:
  """The state of one search, on the host.

  Args:
    num_points: n >= 2.
    dim: k >= 2.
    exponent: s >= 0.
    seed: Of all random numbers.
    num_chains: c, the starts of a round.
    temperature: Of the hops, in units of the energy.

  Attributes:
    num_starts: Minimisations until now, those of `polish` left out.
    num_stale: Rounds since the last that brought a lower energy.
  """

  def __init__(
    self,
    num_points: int,
    dim: int,
    exponent: float,
    *,
    seed: int,
    num_chains: int,
    temperature: float = 0.02,
  ):
    self._shape = (num_chains, num_points, dim)
    self._exponent = float(exponent)
    self._rng = np.random.default_rng(seed)
    self._key = jax.random.key(seed)
    self._temperature = temperature
    self._groups = []
    if dim == 3 and num_points >= _SMALLEST_SYMMETRIC:
      possible = functools.partial(symmetry.possible, num_points=num_points)
      self._groups = [group for group in symmetry.GROUPS if possible(group)]
    self._nets = _nets(num_points) if dim == 3 else []
    self._candidates = []
    self._walkers = None
    self._rejected = np.zeros(num_chains, int)
    self.num_starts = 0
    self.num_stale = 0

  @property
  def best(self) -> Candidate:
    """The lowest minimum until now."""
    return self._candidates[0]

  @property
  def walks(self) -> np.ndarray:
    """The energies where the walks of :meth:`hop` are, (c,)."""
    return np.array([value for value, _ in self._walkers or ()])

  def draw(self) -> tuple[np.ndarray, list[str]]:
    """New starts (c, n, k), half or more symmetric where any can be."""
    starts = normalize(self._rng.normal(size=self._shape))
    origins = ['random'] * len(starts)
    each = 2 if self._shape[1] <= _MANY else 4
    for i in range(len(starts)):
      if i % each == 1:
        continue
      if self._nets:
        starts[i], origins[i] = self._nets.pop(), 'net'
      elif self._groups:
        origins[i] = self._groups[self._rng.integers(len(self._groups))]
        starts[i] = symmetry.symmetric_seed(
          self._rng, self._shape[1], origins[i]
        )
    return starts, origins

  def seed(self) -> None:
    """One round from new starts."""
    self._screen(*self.draw())

  def hop(self) -> None:
    """One round of Metropolis walks over minima."""
    if self._walkers is None:
      best = itertools.islice(itertools.cycle(self._candidates), self._shape[0])
      self._walkers = [(c.energy, c.points) for c in best]
    self._key, key = jax.random.split(self._key)
    points = np.stack([points for _, points in self._walkers])
    with jax.enable_x64(True):
      moved = np.asarray(_proposals(self._exponent)(key, points))
    found = self._screen(moved, ['hop'] * len(moved))
    for i, (value, _) in enumerate(self._walkers):
      threshold = self._temperature * self._rng.exponential()
      self._rejected[i] += 1
      if found.energy[i] - value <= threshold:
        self._walkers[i] = found.energy[i], found.points[i]
        self._rejected[i] = 0
      elif self._rejected[i] >= _MAX_REJECTED:
        other = self._candidates[self._rng.integers(len(self._candidates))]
        self._walkers[i] = other.energy, other.points
        self._rejected[i] = 0

  def polish(self, tolerance: float) -> tuple[Minimum, str]:
    """Takes the lowest minima to all digits; all but one copy are shaken.

    What is a saddle, to which symmetric starts may lead, falls off it.
    """
    chains, n, _ = self._shape
    number = min(len(self._candidates), max(1, chains // 4))
    picked = [self._candidates[i % number] for i in range(chains)]
    starts = np.stack([c.points for c in picked])
    noise = self._rng.normal(size=starts[number:].shape)
    starts[number:] += _NOISE * math.sqrt(4 * math.pi / n) * noise
    found = self._minimize(normalize(starts), tolerance)
    i = np.nanargmin(found.energy)
    return jax.tree.map(lambda x: x[i], found), picked[i].origin

  def _minimize(self, starts, tolerance):
    with jax.enable_x64(True):
      run = program(self._shape[1], self._exponent)
      return jax.tree.map(np.asarray, run(starts, tolerance))

  def _screen(self, starts, origins):
    """Minimises, and keeps the lowest minima of different energies."""
    found = self._minimize(starts, _SCREENING_TOLERANCE)
    before = self._candidates[:1]
    rows = zip(found.energy, found.points, origins, strict=True)
    pool = self._candidates + [Candidate(*row) for row in rows]
    self._candidates = []
    for candidate in sorted(pool, key=lambda c: c.energy):
      last = self._candidates[-1:]
      # The energy of what failed is huge.
      is_number = candidate.energy < _HUGE
      if is_number and (not last or _is_lower(last[0], candidate, 1e-9)):
        self._candidates.append(candidate)
    if not self._candidates:
      raise ValueError('exponent or num_points leads to no finite energy.')
    del self._candidates[len(starts) :]
    self.num_starts += len(starts)
    better = not before or _is_lower(self.best, before[0], _RTOL)
    self.num_stale = 0 if better else self.num_stale + 1
    return found


def _is_lower(a, b, rtol):
  return b.energy - a.energy > rtol * abs(b.energy)


def _nets(num_points):
  """The icosadeltahedral nets of so many points, mirror images left out."""
  size, rest = divmod(num_points - 2, 10)
  if rest or size < 1:
    return []
  sides = range(math.isqrt(size) + 1)
  pairs = [(h, k) for h in sides for k in sides if h >= k]
  return [
    symmetry.icosadeltahedral(h, k)
    for h, k in pairs
    if h * h + h * k + k * k == size
  ]


def search(
  num_points: int,
  *,
  dim: int = 3,
  exponent: float = 1.0,
  seed: int = 0,
  num_chains: int | None = None,
  target: float | None = None,
  max_seconds: float = 60.0,
  max_rounds: int | None = None,
  tolerance: float = 1e-10,
  temperature: float = 0.02,
) -> Found:
  """Searches the least energy, in float64.

  Rounds of `num_chains` minimisations from random starts and, for k = 3, from
  symmetric ones and icosadeltahedral nets. When they bring nothing better, each
  second round hops from the best minima. The best of all is then polished.

  Args:
    num_points: n >= 2.
    dim: k >= 2.
    exponent: s >= 0.
    seed: Of all random numbers. Without a limit on time it settles the result.
    num_chains: Starts of one round, at least 1; None means 16, of more than 150
      points 8.
    target: Ends the search when it is reached, to 1e-10 of it.
    max_seconds: Ends it too, after the round that lasts longer.
    max_rounds: The same for rounds; None sets no limit.
    tolerance: What the norm of the tangent gradient comes down to.
    temperature: Of the hops, in units of the energy.

  Returns:
    The best minimum.

  Raises:
    ValueError: If a number is out of its range, or no energy is finite.

  Examples:
    >>> found = search(4, target=minima.best_known(4).energy)
    >>> round(found.energy, 9), found.gradient_norm < 1e-9
    (3.674234614, True)
  """
  if num_chains is None:
    num_chains = 16 if num_points <= _MANY else 8
  _check(num_points, dim, exponent, num_chains, max_rounds)
  start = time.perf_counter()
  passed = lambda: time.perf_counter() - start
  reached = lambda value, rtol: (
    target is not None and value <= target + rtol * abs(target)
  )
  state = Search(
    num_points,
    dim,
    exponent,
    seed=seed,
    num_chains=num_chains,
    temperature=temperature,
  )
  best, origin = None, ''
  for number in itertools.count(1):
    if state.num_stale >= _PATIENCE and number % 2:
      state.hop()
    else:
      state.seed()
    is_last = passed() > max_seconds or number == max_rounds
    is_new = best is None or _is_lower(state.best, best, _RTOL)
    if is_last or (is_new and reached(state.best.energy, _NEAR)):
      found, its_origin = state.polish(tolerance)
      if best is None or found.energy < best.energy:
        best, origin = found, its_origin
      if is_last or reached(best.energy, _RTOL):
        break
  return Found(
    points=best.points,
    energy=float(best.energy),
    gradient_norm=float(best.gradient_norm),
    origin=origin,
    num_starts=state.num_starts,
    seconds=passed(),
  )


def _check(num_points, dim, exponent, num_chains, max_rounds):
  """Raises what :func:`search` promises to raise."""
  # The look-up checks what says which problem it is.
  minima.best_known(num_points, dim, exponent)
  if num_chains < 1:
    raise ValueError(f'num_chains must be at least 1, got {num_chains}.')
  if max_rounds is not None and max_rounds < 1:
    raise ValueError(f'max_rounds must be at least 1, got {max_rounds}.')
