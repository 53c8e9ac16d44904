"""How a method goes down: a clock that stands while points are looked at."""

import enum
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tqdm
from etils import epath

from emc2.experiments import metrics

_ENDED = 'ended.json'


class End(enum.IntEnum):
  """Why a method ended."""

  LIMIT = 0  # Of iterations or seconds.
  CONVERGED = 1  # The gradient is as small as was asked for.
  STUCK = 2  # It found no lower point.
  NON_FINITE = 3  # It met a value that is not finite; its last point stands.


class Limits(NamedTuple):
  """When a method ends."""

  gradient_tol: float  # Norm of the gradient; 0 for never.
  max_iterations: int
  max_seconds: float  # By its own clock.


class Work(NamedTuple):
  """What a method has called."""

  hvps: Any = 0  # Hessian-vector products.
  gradients: Any = 0
  evaluations: Any = 0  # Of the objective.


class Curve(NamedTuple):
  """What a method had come to at some iterations, (n,) each."""

  iterations: np.ndarray
  hvps: np.ndarray
  gradients: np.ndarray
  evaluations: np.ndarray
  seconds: np.ndarray  # Of the method alone; 0 at the start.
  objective: np.ndarray
  gradient_norm: np.ndarray


class Trace:
  """Follows one method, from `start` to `end`.

  The clock runs between `run` and `halt`; looking at a point, which is exact
  and the same for all methods, costs none of them time.

  Args:
    name: Of the method; shown.
    value_and_gradient: Of what it minimises, exactly, on the host: x (d,) to a
      number and (d,), float64.
    limits: When it ends.
    workdir: A folder of its own.

  Attributes:
    point: The last point that was looked at and finite, (d,), float64.
  """

  def __init__(
    self,
    name: str,
    value_and_gradient: Callable[[np.ndarray], tuple[float, np.ndarray]],
    limits: Limits,
    workdir: epath.PathLike,
  ):
    self._value_and_gradient, self._limits = value_and_gradient, limits
    self._workdir = epath.Path(workdir)
    self._writer = metrics.Writer(self._workdir, None)
    self._bar = tqdm.tqdm(
      desc=name,
      unit='iteration',
      # A log file gets a line now and then, and none from a short run.
      mininterval=0.2 if sys.stderr.isatty() else 10.0,
      delay=0.0 if sys.stderr.isatty() else 4.0,
      dynamic_ncols=True,
    )
    self._seconds, self._since = 0.0, None
    self._reason = End.LIMIT
    self.point = None

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *unused_error) -> None:
    self._writer.close()
    self._bar.close()

  def run(self) -> None:
    """Lets the clock run."""
    self._since = time.perf_counter()

  def halt(self) -> None:
    """Stops the clock, if it runs."""
    if self._since is not None:
      self._seconds += time.perf_counter() - self._since
      self._since = None

  def is_overdue(self) -> bool:
    """Whether the time is over, for a method that is inside an iteration."""
    passed = self._seconds
    if self._since is not None:
      passed += time.perf_counter() - self._since
    return passed >= self._limits.max_seconds

  def look(self, x: np.ndarray, iterations: int, work: Work) -> bool:
    """Notes a point, unless it is not finite.

    Args:
      x: (d,).
      iterations: Done so far.
      work: Done so far.

    Returns:
      Whether the method has to end.
    """
    self.halt()
    x = np.array(x, np.float64)  # A copy: SciPy writes over its own.
    with np.errstate(over='ignore', invalid='ignore'):
      value, gradient = self._value_and_gradient(x)
      norm = float(np.linalg.norm(gradient))
    if not (np.isfinite(value) and np.isfinite(norm)):
      self._reason = End.NON_FINITE
      return True
    self.point = x
    row = {name: int(count) for name, count in work._asdict().items()}
    row |= {
      'seconds': self._seconds,
      'objective': float(value),
      'gradient_norm': norm,
    }
    self._writer.write(iterations, row)
    self._bar.set_postfix(gradient_norm=f'{norm:.1e}', refresh=False)
    self._bar.update(iterations - self._bar.n)
    if norm <= self._limits.gradient_tol:
      self._reason = End.CONVERGED
      return True
    at_limit = iterations >= self._limits.max_iterations
    return at_limit or self.is_overdue()

  def end(self, reason: End | None = None, **numbers: float) -> None:
    """Marks the method as ended.

    Args:
      reason: Why; None where `look` said so.
      **numbers: To be kept with it.
    """
    self.halt()
    self._writer.flush()
    reason = self._reason if reason is None else reason
    text = json.dumps(numbers | {'result': int(reason)}, indent=2) + '\n'
    metrics.write_atomically(self._workdir / _ENDED, text.encode())


def read_ended(
  workdir: epath.PathLike,
) -> tuple[Curve, dict[str, float]] | None:
  """Reads a method back.

  Args:
    workdir: Its folder.

  Returns:
    Its curve, and the numbers that were kept, with 'result', a value of `End`;
    None if it has not ended.
  """
  path = epath.Path(workdir) / _ENDED
  if not path.exists():
    return None
  series = metrics.read(workdir)
  iterations, _ = series['objective']
  columns = {name: series[name][1] for name in Curve._fields[1:]}
  numbers = json.loads(path.read_text())
  return Curve(iterations, **columns), {k: float(x) for k, x in numbers.items()}
