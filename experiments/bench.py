"""Measures this project against its peers, on this machine, by one command.

    python -m emc2.experiments.bench contrastive
    python -m emc2.experiments.bench contrastive --only=loss --compare=OLD.json

prints a table and writes it to `--out` (`runs/bench`) as `NAME.md` and
`NAME.json`, where NAME is the benchmark and the machine. `--smoke` runs every
row at a size that takes seconds, whose figures mean nothing.

Peers that need packages which this project does not ask for run under another
Python, `--peers-python` (or the environment variable `EMC2_PEERS_PYTHON`);
`make bench-peers` makes one. Without it their rows say 'not run'.
"""

import importlib
import os
import pathlib
import sys

from absl import app, flags

from emc2.experiments.benchmarks import harness

BENCHMARKS = (
  'compression',
  'contrastive',
  'ds_facto',
  'ds_mlr',
  'krylov',
  'lda',
  'mada',
  'thomson',
)


def run(
  name: str,
  *,
  out: pathlib.Path,
  smoke: bool = False,
  only: str = '',
  compare: pathlib.Path | None = None,
  peers_python: str | None = None,
  command: str = '',
) -> list[harness.Row]:
  """Runs one benchmark, prints its table and writes it.

  Args:
    name: One of `BENCHMARKS`.
    out: Where the table is written.
    smoke: Whether sizes are tiny and every time is taken once.
    only: Runs the cases whose name contains it.
    compare: An earlier `NAME.json` whose figures are set against these.
    peers_python: The interpreter that has the peers' packages.
    command: What stands in the table as its origin.

  Returns:
    The rows.

  Raises:
    ValueError: If the benchmark is unknown, no case has that name, or
      `compare` or `peers_python` is no such file.
  """
  if name not in BENCHMARKS:
    raise ValueError(
      f'the benchmark must be one of {BENCHMARKS}, got {name!r}.'
    )
  for what, path in (('compare', compare), ('peers_python', peers_python)):
    if path is not None and not pathlib.Path(path).is_file():
      raise ValueError(f'{what} must name a file, got {str(path)!r}.')
  earlier = None if compare is None else harness.read_ours(compare)
  module = importlib.import_module(f'emc2.experiments.benchmarks.{name}')
  cases = [c for c in module.cases(smoke) if only in c.name]
  if not cases:
    names = ', '.join(c.name for c in module.cases(smoke))
    raise ValueError(f'only={only!r} is in none of the cases: {names}.')
  about = harness.machine()
  with harness.Context(
    smoke=smoke, peers_python=peers_python, platform=about['platform']
  ) as context:
    rows = harness.run(cases, context)
    for versions in context.versions().values():
      about['versions'] = versions | about['versions']
  place = (about['accelerator'] or 'cpu').lower().replace(' ', '-')
  title = f'{name} on {place}' + (' (smoke: no measurement)' if smoke else '')
  page = harness.markdown(title, command, about, rows, earlier)
  harness.write(out, f'{name}-{place}', page, about, rows)
  print(page)
  return rows


def launch() -> None:
  """Reads the flags and runs."""
  only = flags.DEFINE_string('only', '', 'Cases whose name contains it.')
  out = flags.DEFINE_string('out', 'runs/bench', 'Where the table is written.')
  smoke = flags.DEFINE_bool('smoke', False, 'Tiny sizes: shows that it runs.')
  compare = flags.DEFINE_string('compare', None, 'An earlier NAME.json.')
  peers_python = flags.DEFINE_string(
    'peers_python',
    os.environ.get('EMC2_PEERS_PYTHON') or None,
    'Interpreter that has the packages of the peers.',
  )
  flags.DEFINE_alias('peers-python', 'peers_python')

  def main(argv):
    if len(argv) != 2:
      raise app.UsageError(f'Name one benchmark of {BENCHMARKS}: {argv[1:]}')
    try:
      run(
        argv[1],
        out=pathlib.Path(out.value),
        smoke=smoke.value,
        only=only.value,
        compare=compare.value and pathlib.Path(compare.value),
        peers_python=peers_python.value,
        command='python -m emc2.experiments.bench ' + ' '.join(sys.argv[1:]),
      )
    except ValueError as error:
      raise app.UsageError(str(error)) from error

  app.run(main)


if __name__ == '__main__':
  launch()
