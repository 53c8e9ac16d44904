"""Takes blocks round the processes of a run; some fail on purpose."""

import json
import os
import pathlib
import sys
import time

import jax
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.ring import processes

from tests.ring import rotations


def own(start, here):
  """What this process has of the global arrays."""
  residents, kept, blocks = start
  p = jax.process_index()
  mine = jax.tree.map(lambda x: x[p], (residents, kept))
  return *mine, blocks[p * here : (p + 1) * here]


def equal(folder):
  """Runs that end; the leaves of the results to a file."""
  results, rng = {}, np.random.default_rng(jax.process_index())
  p, width = jax.process_index(), jax.process_count()
  for here in (1, 3):
    start = own(rotations.draw(width, here), here)
    found = processes.run(rotations.ROTATIONS, *start, num_passes=2)
    delayed = processes.run(
      rotations.ROTATIONS,
      *start,
      num_passes=2,
      delay=lambda worker, count: rng.exponential(0.01),
      ahead=3,
    )
    state = start
    for _ in range(2):
      state = processes.run(rotations.ROTATIONS, *state)
    for name, tree in (('once', found), ('late', delayed), ('twice', state)):
      for i, leaf in enumerate(jax.tree.leaves(tree)):
        results[f'{name}{here}.{i}'] = np.asarray(leaf)
  np.savez(folder / f'equal{p}.npz', **results)


def fail(folder):
  """Runs that end by an error, after which all processes go on."""
  start = own(rotations.draw(jax.process_count(), 2), 2)

  def error_of(delay, **settings):
    begin = time.monotonic()
    try:
      processes.run(
        rotations.ROTATIONS, *start, num_passes=9, delay=delay, **settings
      )
    except (RuntimeError, ValueError) as error:
      return str(error), time.monotonic() - begin
    return 'none', 0.0

  def raises(worker, count):
    if (worker, count) == (1, 5):
      raise OSError('no more')
    return 0.0

  def hangs(worker, count):
    return 2.0 if (worker, count) == (0, 6) else 0.0

  errors = {
    'raises': error_of(raises),
    'hangs': error_of(hangs, timeout=0.7),
  }
  passes = {'num_passes': 2 + jax.process_index()}
  try:
    processes.run(rotations.ROTATIONS, *start, **passes)
  except ValueError as error:
    errors['differs'] = str(error), 0.0
  path = folder / f'fail{jax.process_index()}.json'
  path.write_text(json.dumps(errors))


def die(folder):
  """Process 1 dies; the other writes what it was told, and when."""
  start = own(rotations.draw(jax.process_count(), 2), 2)

  def delay(worker, count):
    if (worker, count) == (1, 5):
      (folder / 'died').write_text(str(time.time()))
      os._exit(0)
    return 0.0

  try:
    processes.run(rotations.ROTATIONS, *start, num_passes=9, delay=delay)
  except RuntimeError as error:
    (folder / 'told').write_text(f'{time.time()} {error}')
  os._exit(0)  # It would wait for the dead one in the end.


def main(coordinator, num_processes, process_id, folder, *names):
  mesh_lib.use_cpu_devices(1)
  mesh_lib.start(coordinator, int(num_processes), int(process_id))
  jax.config.update('jax_enable_x64', True)
  for name in names:
    {'equal': equal, 'fail': fail, 'die': die}[name](pathlib.Path(folder))


if __name__ == '__main__':
  main(*sys.argv[1:])
