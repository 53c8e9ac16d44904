"""Points on a sphere: the known minima, and how fast they are found.

Cases, for `--only`:

- `minima`: the least energies known of 2 to 130 points, and of 192, 272, 372
  and 470, searched by `sphere_search.py` on all cores;
- `solve`: local minima from the same random starts to the same tolerance,
  against L-BFGS-B of SciPy with its energy in NumPy (`peers_thomson.py`), which
  brings the norm of the gradient of 400 points to some 1e-4, where differences
  of energies are lost in rounding; and ours to 1e-10;
- `energy`: one energy and gradient, against NumPy;
- `kernel`: pairs per second, against plain JAX; the Pallas kernels too, where
  there is an accelerator;
- `memory`: what the compiled program asks for beside its arguments.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import queue
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emc2.experiments import sphere_search
from emc2.experiments.benchmarks import harness, peers_thomson
from emc2.kernels import riesz
from emc2.kernels.riesz import specs
from emc2.sphere import minima
from emc2.sphere.energy import energy

PACKAGES = ('jax', 'jaxlib', 'numpy', 'optax', 'scipy')
LOOPS = 20
_TOLERANCE = 2e-4
_FINE_TOLERANCE = 1e-10
_PLAIN_BATCH = 16  # The fastest on a CPU of 1, 16, 64 and 256 rows.
_FLOP_PER_PAIR = 18  # Ordered, in three dimensions, at exponent 1.
_PEAK_FLOPS = {'NVIDIA H200': 67e12, 'NVIDIA H100 80GB HBM3': 67e12}

_OURS = 'emc2.experiments.benchmarks.thomson'
_PEERS = str(pathlib.Path(__file__).parent / 'peers_thomson.py')


def _compile(fn, *args):
  """Compiles for float64 where an argument is; the program needs no flag."""
  with jax.enable_x64(True):
    args = [jnp.asarray(x) for x in args]
    compiled = jax.jit(fn).lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def time_energy(*, num_points: int, count: int = 1):
  """The energy and gradient of one set of points, or of a batch."""
  points = peers_thomson.draw(num_points, count)
  fn = jax.value_and_grad(energy)
  if count == 1:
    return _compile(fn, points[0])
  return _compile(jax.vmap(fn), points)


def _solve(starts, tolerance):
  with jax.enable_x64(True):
    run = sphere_search.program(starts.shape[1], 1.0)
    return jax.block_until_ready(run(starts, tolerance))


def time_solve(*, num_points: int, count: int, tolerance: float):
  """Local minima from a batch of starts."""
  starts = peers_thomson.draw(num_points, count)
  return lambda: _solve(starts, tolerance)


def _plain_row(points, i):
  """What one point gets from all others, as one writes it first."""
  apart = points[i][None] - points
  squares = jnp.sum(apart**2, axis=-1)
  squares = jnp.where(jnp.arange(len(points)) == i, jnp.inf, squares)
  inverse = jax.lax.rsqrt(squares)
  weights = inverse / squares
  return jnp.sum(inverse), -jnp.sum(weights[:, None] * apart, axis=0)


def plain_blocks(points: jax.Array):
  """Potentials and gradients in plain JAX, some rows at a time."""
  fn = functools.partial(_plain_row, points)
  return jax.lax.map(fn, jnp.arange(len(points)), batch_size=_PLAIN_BATCH)


def plain_whole(points: jax.Array):
  """Potentials and gradients in plain JAX, all pairs at once."""
  return jax.vmap(functools.partial(_plain_row, points))(
    jnp.arange(len(points))
  )


def ours(points: jax.Array):
  """Potentials and gradients by this project's kernel."""
  return riesz.riesz(points, exponent=1.0)


FORMS = {'ours': ours, 'blocks': plain_blocks, 'whole': plain_whole}


def time_pairs(*, num_points: int, dtype: str, form: str):
  """Potentials and gradients of many points."""
  points = peers_thomson.draw(num_points, 1)[0].astype(dtype)
  return _compile(FORMS[form], points)


def time_kernel(*, spec: str, implementation: str):
  """A kernel at a shape of its `specs.py`, `LOOPS` times in one program."""
  spec = specs.SPECS[spec]
  with jax.enable_x64(spec.dtype == 'float64'):
    rng = np.random.default_rng(0)
    draw = lambda like: jnp.asarray(
      sphere_search.normalize(rng.normal(size=like.shape)), like.dtype
    )
    rows, columns = (like and draw(like) for like in spec.args())

    @jax.jit
    def run(rows, columns):
      def body(_, drift):
        out = riesz.riesz(
          rows + (1e-30 * drift).astype(rows.dtype),
          columns,
          exponent=spec.exponent,
          implementation=implementation,
        )
        return sum(jnp.sum(x.astype(jnp.float32)) for x in out)

      return jax.lax.fori_loop(0, LOOPS, body, jnp.zeros([], jnp.float32))

    compiled = run.lower(rows, columns).compile()
  return lambda: jax.block_until_ready(compiled(rows, columns))


CASES = {
  'energy': time_energy,
  'solve': time_solve,
  'pairs': time_pairs,
  'riesz': time_kernel,
}


def _search(*, num_points, max_seconds, **settings):
  """How near a search comes, and how long it takes."""
  known = minima.best_known(num_points)
  cpu = time.process_time()
  found = sphere_search.search(
    num_points, target=known.energy, max_seconds=max_seconds, **settings
  )
  return {
    'num_points': num_points,
    'gap': (found.energy - known.energy) / known.energy,
    'norm': found.gradient_norm,
    'origin': found.origin,
    'num_starts': found.num_starts,
    'seconds': found.seconds,
    'cpu': time.process_time() - cpu,
  }


def _solved(*, num_points, count, tolerance):
  """Energies, norms and evaluations, each a list over the starts."""
  found = _solve(peers_thomson.draw(num_points, count), tolerance)
  columns = found.energy, found.gradient_norm, found.num_evaluations
  return [np.asarray(x, float).tolist() for x in columns]


def _temporary_bytes(*, num_points, form, dtype='float64'):
  """What the compiled program asks for; nothing runs."""
  with jax.enable_x64(True):
    like = jax.ShapeDtypeStruct((num_points, 3), dtype)
    compiled = jax.jit(FORMS[form]).lower(like).compile()
  return compiled.memory_analysis().temp_size_in_bytes


VALUES = {
  'search': _search,
  'solved': _solved,
  'temporary_bytes': _temporary_bytes,
  'device_kind': lambda: jax.devices()[0].device_kind,
}


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, some of each kind at tiny sizes."""
  return [
    *_minima_cases(smoke),
    *_solve_cases(smoke),
    *_energy_cases(smoke),
    *_pairs_cases(smoke),
    *_kernel_cases(smoke),
    *_memory_cases(smoke),
  ]


def _search_all(numbers, arguments):
  """Searches many n on all cores, a process for each; gives the wall time."""
  cores = [None]
  if hasattr(os, 'sched_getaffinity'):
    cores = sorted(os.sched_getaffinity(0))
  idle = queue.SimpleQueue()
  start = time.perf_counter()
  processes = [
    harness.Process(sys.executable, _OURS, core, accelerated=False)
    for core in cores[: len(numbers)]
  ]
  for process in processes:
    idle.put(process)

  def ask(number):
    process = idle.get()
    try:
      request = {'num_points': number} | arguments
      reply = process.ask(do='value', case='search', arguments=request)
      return reply['value']
    finally:
      idle.put(process)

  try:
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
      # The longest first, that no process works alone at the end.
      found = list(pool.map(ask, sorted(numbers, reverse=True)))
  finally:
    for process in processes:
      process.close()
  return sorted(found, key=lambda f: f['num_points']), (
    time.perf_counter() - start
  )


def gap_row(found: list[dict[str, Any]], bound: float | None) -> harness.Row:
  """The largest gap of some n, and which of them beat what was known."""
  gaps = {f['num_points']: f['gap'] for f in found}
  worst = max(gaps, key=gaps.get)
  first, last = min(gaps), max(gaps)
  name = f'minima: n = {first}' + (f' to {last}' if last > first else '')
  notes = []
  if len(found) > 1:
    notes.append(f'the largest is that of n = {worst}')
    notes.append(
      f'{sum(g <= 1e-9 for g in gaps.values())} of {len(gaps)} n '
      'are within 1e-9'
    )
  else:
    one = found[0]
    notes.append(
      f'n = {first}: from {one["origin"]}, one of {one["num_starts"]} starts, '
      f'{one["seconds"]:.0f} s'
    )
  lower = [n for n, gap in gaps.items() if gap < -1e-9]
  if lower:
    figures = ', '.join(f'{n} ({gaps[n]:.1e})' for n in lower)
    notes.append(f'lower than was known: n = {figures}')
  return harness.Row(
    name=name,
    metric='largest relative gap to the best known energy',
    unit='',
    ours=harness.Figure(gaps[worst], min(gaps.values()), gaps[worst]),
    target=bound and harness.Target(bound, of='ours'),
    note='; '.join(notes),
  )


def _minima_cases(smoke):
  groups = {2: 1e-9, 61: 1e-6}
  everything, large = range(2, 131), (192, 272, 372, 470)
  arguments = {'max_seconds': 60}
  if smoke:
    everything, large = (4, 12), ()
    arguments = {'max_seconds': 5, 'num_chains': 2}

  def run(context):
    del context
    found, seconds = _search_all(everything, arguments)
    rows = []
    for first, bound in groups.items():
      beyond = [x for x in groups if x > first]
      some = [
        f
        for f in found
        if first <= f['num_points'] < min(beyond, default=np.inf)
      ]
      if some:
        rows.append(gap_row(some, bound))
    name = f'minima: n = {everything[0]} to {everything[-1]}'
    row = functools.partial(harness.Row, name=name, unit='s')
    return [
      *rows,
      row(
        metric='CPU time of all, compilation included',
        ours=harness.Figure.exact(sum(f['cpu'] for f in found)),
        wall=(seconds, None),
      ),
      row(
        metric='wall time of all, a process on each core',
        ours=harness.Figure.exact(seconds),
        target=harness.Target(600.0, of='ours'),
      ),
    ]

  def run_large(context):
    del context
    found, _ = _search_all(large, {'max_seconds': 240})
    return [gap_row([one], None) for one in found]

  found = [harness.Case('minima, n = 2 to 130', run)]
  return found + [harness.Case('minima, large n', run_large)] * bool(large)


def _per(row, count):
  """A row of some things as that of one."""
  one = lambda f: (
    f and harness.Figure(f.value / count, f.low / count, f.high / count)
  )
  return dataclasses.replace(
    row,
    ours=one(row.ours),
    theirs=one(row.theirs),
    wall=tuple(w and w / count for w in row.wall),
  )


def _map_inverse(fn, figure):
  """A figure of what falls as a time rises."""
  return harness.Figure(fn(figure.value), fn(figure.high), fn(figure.low))


def _race(context, *, count=1, **arguments):
  return [_per(context.race(**arguments), count)]


def _solve_cases(smoke):
  found = []
  peer = 'SciPy L-BFGS-B, NumPy {}'
  count = 2 if smoke else 8
  sizes = (10,) if smoke else (50, 100, 200, 400)
  for num_points in sizes:
    for form in ('in place', 'plain'):
      if form == 'plain' and num_points not in (10, 400):
        continue
      found.append(
        harness.Case(
          f'solve: n={num_points}, {form}',
          functools.partial(
            _run_solve,
            num_points=num_points,
            counts=(count, count),
            form=form,
            peer=peer.format(form),
            bound=0.2 if num_points == 400 else None,
          ),
        )
      )
  for num_points in (10,) if smoke else (50, 200, 400):
    found.append(
      harness.Case(
        f'solve: 64 for 4, n={num_points}',
        functools.partial(
          _run_solve,
          num_points=num_points,
          counts=(4, 2) if smoke else (64, 4),
          form='in place',
          peer=peer.format('in place'),
          bound=1.0,
        ),
      )
    )
  for num_points in sizes:
    found.append(
      harness.Case(
        f'solve: to 1e-10, n={num_points}',
        functools.partial(_run_fine, num_points=num_points, count=count),
      )
    )
  for num_points in (10,) if smoke else (200, 400):
    found.append(
      harness.Case(
        f'solve: gap, n={num_points}',
        functools.partial(
          _run_gap, num_points=num_points, count=4 if smoke else 64
        ),
      )
    )
  return found


def _run_solve(context, *, num_points, counts, form, peer, bound):
  """Solves by both sides, and says how many reach the tolerance."""
  sides, reached = [], []
  for count, module in zip(counts, (_OURS, _PEERS), strict=True):
    arguments = {'num_points': num_points, 'count': count}
    arguments['tolerance'] = _TOLERANCE
    if module == _PEERS:
      arguments['form'] = form
    # Not as a peer: our own Python has what it needs.
    side = harness.Side(module, 'solve', arguments)
    sides.append(side)
    _, norms, calls = context.value(dataclasses.replace(side, case='solved'))
    reached.append(
      f'{sum(x <= _TOLERANCE for x in norms)} of {count} starts in '
      f'{statistics.median(calls):.0f} evaluations'
    )
  same = counts[0] == counts[1]
  row = context.race(
    name=f'solve: n={num_points}'
    + ('' if same else f', {counts[0]} starts against {counts[1]}'),
    metric=f'one start to |g| <= {_TOLERANCE:g}' if same else 'all starts',
    unit='s',
    ours=sides[0],
    theirs=sides[1],
    peer=peer,
    target=bound and harness.Target(bound),
  )
  row = _per(row, counts[0] if same else 1)
  note = f'n={num_points} reached by {reached[0]}, the peer: {reached[1]}'
  return [
    dataclasses.replace(row, note='; '.join(filter(None, [row.note, note])))
  ]


def _run_fine(context, *, num_points, count):
  """Ours to the last digits, which no peer reaches."""
  arguments = {'num_points': num_points, 'count': count}
  side = harness.Side(
    _OURS, 'solve', arguments | {'tolerance': _FINE_TOLERANCE}
  )
  _, norms, calls = context.value(dataclasses.replace(side, case='solved'))
  (taken,), _ = context.time([side])
  share = sum(x <= _FINE_TOLERANCE for x in norms) / count
  row = functools.partial(
    harness.Row, name=f'solve: n={num_points}, to |g| <= {_FINE_TOLERANCE:g}'
  )
  return [
    row(
      metric='share of starts that get there',
      unit='',
      ours=harness.Figure.exact(share),
      target=harness.Target(1.0, of='ours', at_most=False),
    ),
    row(metric='evaluations', unit='', ours=harness.Figure.of(calls)),
    _per(
      row(
        metric='one start',
        unit='s',
        ours=harness.Figure.of(taken['cpu']),
        wall=(statistics.median(taken['wall']), None),
      ),
      count,
    ),
  ]


def _run_gap(context, *, num_points, count):
  """How good the best of some random starts is."""
  arguments = {'num_points': num_points, 'count': count}
  side = harness.Side(_OURS, 'solved', arguments | {'tolerance': 1e-5})
  energies, _, _ = context.value(side)
  known = minima.best_known(num_points).energy
  return [
    harness.Row(
      name=f'solve: n={num_points}, best of {count} random starts',
      metric='relative gap to the best known energy',
      unit='',
      ours=harness.Figure.exact(min(energies) / known - 1),
      target=harness.Target(1e-6, of='ours') if num_points == 200 else None,
    )
  ]


def _energy_cases(smoke):
  found = []
  for num_points in (10,) if smoke else (50, 100, 200, 400, 1000):
    for count, form in ((1, 'in place'), (1, 'plain'), (64, 'in place')):
      count = min(count, 2) if smoke else count
      arguments = {'num_points': num_points, 'count': count}
      name = f'energy: n={num_points}' + (
        f', {count} sets' if count > 1 else ''
      )
      found.append(
        harness.Case(
          f'{name}, {form}',
          functools.partial(
            _race,
            name=name,
            metric='energy and gradient of one set, float64',
            unit='us',
            ours=harness.Side(_OURS, 'energy', arguments),
            theirs=harness.Side(_PEERS, 'energy', arguments | {'form': form}),
            peer=f'NumPy {form}',
            target=harness.Target(0.1) if num_points >= 200 else None,
            count=count,
          ),
        )
      )
  return found


def _pairs_cases(smoke):
  def run(context, num_points, dtype):
    arguments = {'num_points': num_points, 'dtype': dtype}
    side = lambda form: harness.Side(_OURS, 'pairs', arguments | {'form': form})
    name = f'kernel: n={num_points}, {dtype}'
    row = context.race(
      name=name,
      metric='potentials and gradients',
      ours=side('ours'),
      theirs=side('blocks'),
      peer='plain JAX, rows in blocks',
      target=harness.Target(0.25),
    )
    rate = lambda ms: num_points * (num_points - 1) / 2 / (ms / 1e3)
    figure = row.ours
    return [
      row,
      harness.Row(
        name=name,
        metric='unordered pairs per second',
        unit='',
        ours=harness.Figure(
          *map(rate, (figure.value, figure.high, figure.low))
        ),
        target=harness.Target(1e9, of='ours', at_most=False),
      ),
    ]

  return [
    harness.Case(
      f'kernel: n={num_points}, {dtype}',
      functools.partial(run, num_points=num_points, dtype=dtype),
    )
    for num_points in ((100,) if smoke else (4000, 20_000))
    for dtype in ('float64', 'float32')
  ]


def _kernel_cases(smoke):
  del smoke

  def run(context, spec):
    name = f'kernel: riesz, {spec}'
    platform = {'cuda': 'gpu', 'gpu': 'gpu', 'tpu': 'tpu'}.get(context.platform)
    if platform is None:
      return [
        harness.Row(
          name=name,
          metric='one call',
          unit='us',
          peer='plain JAX',
          note='no accelerator that a kernel is for',
        )
      ]
    side = lambda case, **arguments: harness.Side(
      _OURS, case, arguments, accelerated=True
    )
    row = context.race(
      name=name,
      metric='one call',
      unit='us',
      ours=side('riesz', spec=spec, implementation=f'pallas_{platform}'),
      theirs=side('riesz', spec=spec, implementation='xla'),
      peer='plain JAX',
    )
    row = _per(row, LOOPS)
    shape = specs.SPECS[spec]
    peak = _PEAK_FLOPS.get(context.value(side('device_kind')))
    is_counted = (shape.dim, shape.exponent, shape.num_columns) == (3, 1, None)
    if not (peak and row.ours and is_counted and shape.dtype == 'float32'):
      return [row]
    work = _FLOP_PER_PAIR * shape.num_points**2 * (shape.num_chains or 1)
    share = lambda us: work / (us / 1e6) / peak
    return [
      row,
      harness.Row(
        name=name,
        metric='share of the float32 rate, 18 FLOP per ordered pair',
        unit='',
        ours=_map_inverse(share, row.ours),
      ),
    ]

  return [
    harness.Case(f'kernel: riesz, {spec}', functools.partial(run, spec=spec))
    for spec in specs.SPECS
  ]


def _memory_cases(smoke):
  sizes = (100, 200) if smoke else (4000, 20_000, 100_000)

  def run(context):
    def ask(form, num_points):
      arguments = {'num_points': num_points, 'form': form}
      return context.value(harness.Side(_OURS, 'temporary_bytes', arguments))

    rows, mine = [], []
    for num_points in sizes:
      mine.append(ask('ours', num_points) / num_points)
      for form, peer in (('blocks', 'rows in blocks'), ('whole', 'all pairs')):
        theirs = ask(form, num_points) / num_points
        rows.append(
          harness.Row(
            name=f'memory: n={num_points}',
            metric='temporary memory per point, float64',
            unit='B',
            ours=harness.Figure.exact(mine[-1]),
            peer=f'plain JAX, {peer}',
            theirs=harness.Figure.exact(theirs),
            ratio=harness.Figure.exact(mine[-1] / theirs),
          )
        )
    growth = harness.Row(
      name=f'memory: n={sizes[-1]} over n={sizes[0]}',
      metric='temporary memory per point',
      unit='x',
      ours=harness.Figure.exact(mine[-1] / mine[0]),
      # O(n): what grows with n squared would be many times as much.
      target=harness.Target(1.1, of='ours'),
    )
    return [*rows, growth]

  return [harness.Case('memory', run)]
