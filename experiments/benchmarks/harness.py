"""The one harness of all benchmarks: races, rows, tables.

A benchmark is a module beside this one with a function `cases(smoke)` that
gives a list of :class:`Case`. A case makes rows. A row that is a speed is a
ratio of two sides that run in turn, A B A B, by the same command on the same
machine; each side is served by `worker.py` in a process of its own (or both in
one, if both are ours), on one core. The figure of record is the CPU time of
the process, since another program on the machine lengthens only the wall time.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from emc2.experiments.benchmarks import worker

MISSING = 'not run'


@dataclasses.dataclass(frozen=True)
class Target:
  """What a row is held to.

  Attributes:
    bound: The number.
    of: `'ratio'`, or `'ours'` for a figure that needs no peer.
    at_most: Whether the bound is above; else it is below.
  """

  bound: float
  of: str = 'ratio'
  at_most: bool = True

  def __str__(self):
    sign = '<=' if self.at_most else '>='
    return f'{sign} {self.bound:g}' + ('x' if self.of == 'ratio' else '')


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number with the least and the greatest that were seen."""

  value: float
  low: float
  high: float

  @classmethod
  def of(cls, samples: Sequence[float]) -> 'Figure':
    """The median of what was measured."""
    return cls(statistics.median(samples), min(samples), max(samples))

  @classmethod
  def exact(cls, value: float) -> 'Figure':
    """A number without spread."""
    return cls(value, value, value)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    name: What was done.
    metric: What was measured.
    unit: Of `ours` and `theirs`.
    ours: Our figure, None where nothing ran.
    peer: Whom it is compared with, empty for nobody.
    theirs: The peer's figure.
    ratio: Ours over theirs; of timings, the median over pairs of neighbours.
    target: What is asked, or None.
    wall: Median wall time of ours and of theirs, in `unit`, for timings.
    note: Why a figure is missing, or what to know about it.
  """

  name: str
  metric: str
  unit: str
  ours: Figure | None = None
  peer: str = ''
  theirs: Figure | None = None
  ratio: Figure | None = None
  target: Target | None = None
  wall: tuple[float | None, float | None] = (None, None)
  note: str = ''

  @property
  def met(self) -> bool | None:
    """Whether the target is met; None if there is none, or nothing ran."""
    figure = self.target and getattr(self, self.target.of)
    if figure is None:
      return None
    if self.target.at_most:
      return figure.value <= self.target.bound
    return figure.value >= self.target.bound

  def to_json(self) -> dict[str, Any]:
    """As a JSON object."""
    row = dataclasses.asdict(self)
    for name in ('ours', 'theirs', 'ratio'):
      figure = getattr(self, name)
      # JSON has no NaN and no infinity; a loss may come to either.
      if figure is not None and not math.isfinite(figure.value):
        row[name] = None
    return row | {'target': str(self.target or ''), 'met': self.met}


@dataclasses.dataclass(frozen=True)
class Case:
  """Something to run that makes rows.

  Attributes:
    name: For the progress bar, and for `--only`.
    run: `(context) -> rows`.
  """

  name: str
  run: Callable[['Context'], list[Row]]


@dataclasses.dataclass(frozen=True)
class Side:
  """One side of a race.

  Attributes:
    module: The module that serves it, by name or by the path of its file.
    case: Which of its `CASES`.
    arguments: For that case; JSON values.
    peer: Whether the peers' Python runs it.
    accelerated: Whether it runs on the accelerator and is not pinned; else it
      runs on the CPU.
    pinned: Whether it has one core of the CPU, or all.
  """

  module: str
  case: str
  arguments: dict[str, Any]
  peer: bool = False
  accelerated: bool = False
  pinned: bool = True


class Missing(Exception):
  """A side cannot run here; says why in one line."""


class Process:
  """A `worker.py` that waits for requests.

  Args:
    python: The interpreter.
    module: What it serves.
    core: Where it is pinned, or None.
    accelerated: Whether JAX may use more than the CPU.
  """

  def __init__(
    self, python: str, module: str, core: int | None, accelerated: bool
  ):
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    # It may name an older chip, for which BLAS is up to twice as slow.
    environment.pop('OPENBLAS_CORETYPE', None)
    if not accelerated:
      environment['JAX_PLATFORMS'] = 'cpu'
    command = [python, '-P', worker.__file__, module]
    command.append('-' if core is None else str(core))
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env=environment,
      text=True,
    )

  def ask(self, **request) -> dict[str, Any]:
    """Sends one request and waits for its answer.

    Raises:
      Missing: If a package is not installed there.
      RuntimeError: If the worker failed.
    """
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      code = self._process.wait()
      raise RuntimeError(f'{self._process.args} ended by itself, code {code}.')
    reply = json.loads(line)
    if 'missing' in reply:
      raise Missing(reply['missing'])
    if 'error' in reply:
      raise RuntimeError(f'{request} failed in its worker:\n{reply["error"]}')
    return reply

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()


class Context:
  """What a case may use: races, and the size of the run.

  Args:
    smoke: Whether this run only shows that everything works.
    peers_python: The interpreter that has the peers' packages, or None.
    platform: Of the accelerator, `'cuda'` or `'tpu'`, or None.

  Attributes:
    smoke: As given.
    platform: As given.
  """

  def __init__(
    self,
    *,
    smoke: bool = False,
    peers_python: str | None = None,
    platform: str | None = None,
  ):
    self.smoke = smoke
    self.platform = platform
    self._peers_python = peers_python
    self._processes = {}
    self._core = None
    if hasattr(os, 'sched_getaffinity'):
      self._core = max(os.sched_getaffinity(0))

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for process in self._processes.values():
      process.close()
    self._processes.clear()

  def process(self, side: Side) -> Process:
    """The worker that serves a side; started when it is first asked for."""
    python = self._peers_python if side.peer else sys.executable
    if python is None:
      raise Missing('no --peers-python')
    pinned = side.pinned and not side.accelerated
    key = (python, side.module, side.accelerated, pinned)
    if key not in self._processes:
      core = self._core if pinned else None
      process = Process(python, side.module, core, side.accelerated)
      self._processes[key] = process
    return self._processes[key]

  def value(self, side: Side) -> Any:
    """What a case of `VALUES` gives.

    Raises:
      Missing: If a package is not installed there.
    """
    request = {'case': side.case, 'arguments': side.arguments}
    return self.process(side).ask(do='value', **request)['value']

  def versions(self) -> dict[str, dict[str, str | None]]:
    """The versions that each module asked for, by its name."""
    found = {}
    for (_, module, *_), process in self._processes.items():
      found[pathlib.Path(module).stem] = process.ask(do='versions')
    return found

  def time(
    self, sides: Sequence[Side], *, rounds: int = 9, seconds: float = 0.05
  ) -> tuple[list[dict[str, list[float]] | None], list[str]]:
    """Times several sides in turn.

    Args:
      sides: Whom.
      rounds: How many samples of each; at most 5 if a call takes over half a
        second, 3 if over 2.
      seconds: What one sample takes at least, over many calls.

    Returns:
      For each side lists of seconds per call under `cpu` and `wall`, or None
      where it is not installed; and why not.
    """
    if self.smoke:
      rounds, seconds = 1, 0.0
    asked, why = [], []
    for side in sides:
      request = {'case': side.case, 'arguments': side.arguments}
      try:
        process = self.process(side)
        took = process.ask(do='prepare', **request)
      except Missing as missing:
        asked.append(None)
        why.append(f'{side.case}: {missing}')
        continue
      once = took[_clock(side)]
      # A call that waits more than it works must not be repeated for ever.
      calls = max(1, round(seconds / max(once, took['wall'] / 10, 1e-6)))
      asked.append((process, request | {'calls': calls}))
      rounds = min(rounds, 3 if once > 2 else 5 if once > 0.5 else rounds)
    taken = [{'cpu': [], 'wall': []} if one else None for one in asked]
    for _ in range(rounds):
      for one, samples in zip(asked, taken, strict=True):
        if one is None:
          continue
        process, request = one
        for clock, value in process.ask(do='time', **request).items():
          samples[clock].append(value)
    for one in asked:
      if one is not None:
        one[0].ask(do='drop')
    return taken, why

  def race(
    self,
    name: str,
    metric: str,
    ours: Side,
    theirs: Side,
    *,
    peer: str,
    target: Target | None = None,
    unit: str = 'ms',
  ) -> Row:
    """Times two sides in turn and makes a row of their ratio.

    Args:
      name: Of the row.
      metric: Of the row.
      ours: Our side.
      theirs: The peer.
      peer: Its name in the row.
      target: For the ratio.
      unit: `'s'`, `'ms'` or `'us'`.

    Returns:
      The row; a side that is not installed leaves its figure empty.
    """
    scale = {'s': 1.0, 'ms': 1e3, 'us': 1e6}[unit]
    taken, why = self.time([ours, theirs])
    clock = _clock(ours)
    figures = [t and Figure.of([scale * s for s in t[clock]]) for t in taken]
    wall = [t and scale * statistics.median(t['wall']) for t in taken]
    ratio = None
    if all(taken):
      pairs = zip(taken[0][clock], taken[1][clock], strict=True)
      ratio = Figure.of([a / max(b, 1e-9) for a, b in pairs])
    return Row(
      name=name,
      metric=metric,
      unit=unit,
      ours=figures[0],
      peer=peer,
      theirs=figures[1],
      ratio=ratio,
      target=target,
      wall=tuple(wall),
      note='; '.join(why),
    )

  def race_kernel(
    self, name: str, metric: str, module: str, **arguments: Any
  ) -> Row:
    """Races a kernel with plain JAX, where there is an accelerator.

    Args:
      name: Of the row.
      metric: Of the row.
      module: Has a case `kernel`, which takes an `implementation`.
      **arguments: The others of that case.

    Returns:
      The row; without an accelerator, or at tiny sizes, it says so.
    """
    if self.platform not in ('tpu', 'cuda') or self.smoke:
      return Row(name, metric, 'ms', note='not run: no accelerator')
    kernel = 'pallas_tpu' if self.platform == 'tpu' else 'pallas_gpu'
    side = lambda implementation: Side(
      module,
      'kernel',
      arguments | {'implementation': implementation},
      accelerated=True,
    )
    return self.race(name, metric, side(kernel), side('xla'), peer='plain JAX')


def machine() -> dict[str, Any]:
  """The machine and the programs that a table was made with."""
  model = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text().splitlines()
    names = [x.split(':', 1)[1].strip() for x in lines if 'model name' in x]
    model = names[0] if names else model
  memory = None
  if 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', {}):
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    memory = round(pages / 2**30, 1)
  accelerator, kind = _accelerator()
  now = datetime.datetime.now(datetime.UTC)
  return {
    'cpu': model,
    'cores': os.cpu_count(),
    'memory_gib': memory,
    'accelerator': kind,
    'platform': accelerator,
    'load': round(os.getloadavg()[0], 1),
    'date': now.strftime('%Y-%m-%d'),
    'commit': _commit(),
    'versions': worker.versions(('jax', 'jaxlib', 'numpy', 'optax', 'flax')),
  }


def _commit():
  """The commit that runs, with a mark if files differ from it."""
  done = subprocess.run(
    ['git', 'describe', '--always', '--dirty', '--abbrev=12'],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() or None


def _accelerator():
  """Platform and kind of what JAX would take, or two None.

  Asked in another process: this one must not hold what a worker will use.
  """
  code = 'import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)'
  done = subprocess.run(
    [sys.executable, '-P', '-c', code],
    capture_output=True,
    text=True,
    check=True,
  )
  name, kind = done.stdout.splitlines()[-1].split(' ', 1)
  return (None, None) if name == 'cpu' else (name, kind)


def run(
  cases: Sequence[Case], context: Context, *, progress: bool = True
) -> list[Row]:
  """Runs cases one after another.

  Args:
    cases: What to run.
    context: Shared by all.
    progress: Whether a bar is drawn.

  Returns:
    Their rows, in order.
  """
  import tqdm

  rows = []
  bar = tqdm.tqdm(cases, disable=not progress, unit='case')
  for case in bar:
    bar.set_postfix_str(case.name)
    rows += case.run(context)
  return rows


def markdown(
  title: str,
  command: str,
  about: dict[str, Any],
  rows: Sequence[Row],
  earlier: dict[str, float] | None = None,
) -> str:
  """Writes the table as people read it.

  Args:
    title: Its heading.
    command: What made it.
    about: From :func:`machine`.
    rows: The rows.
    earlier: From :func:`read_ours`, to add a column of ratios to them.

  Returns:
    A Markdown page.
  """
  head = ['row', 'metric', 'ours', 'peer', 'its figure', 'ratio']
  head += ['target', 'met'] + (['to earlier'] if earlier else [])
  lines = []
  notes = []
  for row in rows:
    mark = ''
    if row.note:
      if row.note not in notes:
        notes.append(row.note)
      mark = f' [{notes.index(row.note) + 1}]'
    cells = [
      row.name + mark,
      f'{row.metric}, {row.unit}' if row.unit else row.metric,
      _cell(row.ours, row.wall[0]),
      row.peer or '-',
      _cell(row.theirs, row.wall[1]) if row.peer else '-',
      _cell(row.ratio) if row.peer else '-',
      str(row.target or '-'),
      {True: 'yes', False: '**no**', None: '-'}[row.met],
    ]
    if earlier:
      before = earlier.get(_key(row.name, row.metric, row.peer))
      same = before and row.ours
      cells.append(f'{row.ours.value / before:.2f}' if same else '-')
    cells = [cell.replace('|', r'\|') for cell in cells]
    lines.append('| ' + ' | '.join(cells) + ' |')
  versions = [f'{k} {v}' for k, v in about['versions'].items() if v]
  return '\n'.join(
    [
      f'# {title}',
      '',
      f'`{command}`, {about["date"]}, commit {about["commit"]}',
      '',
      f'{about["cpu"]}, {about["cores"]} cores, {about["memory_gib"]} GiB, '
      f'accelerator: {about["accelerator"] or "none"}; '
      f'load {about["load"]} at the start; {", ".join(versions)}.',
      '',
      'Times are medians of the CPU time of one process on one core (on an '
      'accelerator, of wall time), [lowest .. highest], wall time after the '
      'slash. Ratios of times are medians over neighbouring pairs.',
      '',
      '| ' + ' | '.join(head) + ' |',
      '| ' + ' | '.join(['---'] * len(head)) + ' |',
      *lines,
      *[f'\n[{i + 1}] {note}' for i, note in enumerate(notes)],
      '',
    ]
  )


def write(
  directory: pathlib.Path,
  name: str,
  page: str,
  about: dict[str, Any],
  rows: Sequence[Row],
) -> None:
  """Writes `NAME.md` and `NAME.json` into a directory, made if missing."""
  directory.mkdir(parents=True, exist_ok=True)
  content = {'machine': about, 'rows': [row.to_json() for row in rows]}
  (directory / f'{name}.md').write_text(page)
  text = json.dumps(content, indent=1, allow_nan=False)
  (directory / f'{name}.json').write_text(text + '\n')


def read_ours(path: pathlib.Path) -> dict[str, float]:
  """Our figures in an earlier table, by row.

  Args:
    path: A `NAME.json`.

  Returns:
    The figures by row, metric and peer.

  Raises:
    ValueError: If the file is no such table.
  """
  try:
    rows = json.loads(path.read_text())['rows']
    found = {_key(r['name'], r['metric'], r['peer']): r['ours'] for r in rows}
    return {key: ours['value'] for key, ours in found.items() if ours}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is no table of this bench: {error!r}.') from error


def _clock(side):
  """Which clock counts: an accelerator's work is not on the CPU's."""
  return 'wall' if side.accelerated else 'cpu'


def _key(*fields):
  return ' / '.join(fields)


def _number(value):
  return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'


def _cell(figure, wall=None):
  if figure is None:
    return MISSING
  text = _number(figure.value)
  if figure.low != figure.high:
    text += f' [{_number(figure.low)} .. {_number(figure.high)}]'
  return text if wall is None else f'{text} / {_number(wall)}'
