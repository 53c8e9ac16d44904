"""Times calls in a process of its own, pinned to one core, on request.

`python -P worker.py MODULE CORE` serves a module, named or by the path of its
file. Its `CASES` maps a name to a function that takes keyword arguments,
prepares a case and returns a function of nothing that makes one blocking call;
its `VALUES` to one that returns numbers. It needs the standard library alone,
so that any Python can run it: a peer may live where this project is not
installed. CORE may be `-`: not pinned.

One JSON object a line goes in and one comes out:

- `{"do": "prepare", "case": NAME, "arguments": {...}}` gives `{"cpu": s,
  "wall": s}`, the seconds of one call after warm-up, or `{"missing": why}` if a
  package is not there or the case is not supported;
- `{"do": "time", "case": NAME, "arguments": {...}, "calls": n}` gives the same,
  the mean over some calls;
- `{"do": "drop"}` forgets what was prepared;
- `{"do": "value", "case": NAME, "arguments": {...}}` gives `{"value": x}`,
  or `missing` as above;
- `{"do": "versions"}` gives the versions of the module's `PACKAGES`.

An error gives `{"error": traceback}`.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import time
import traceback

WARM_UP_CALLS = 20
WARM_UP_SECONDS = 0.5


def pin(core):
  """Keeps this process, and threads it starts from now on, on one core."""
  if core is not None and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {core})


def load(name):
  """Imports a module by its name or by the path of its file."""
  if not name.endswith('.py'):
    return importlib.import_module(name)
  spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, name)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


def measure(call, calls):
  """Seconds per call: of the CPU by all threads of the process, and of wall."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(calls):
    call()
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  return {'cpu': cpu / calls, 'wall': wall / calls}


def warm_up(call):
  """Compiles and fills the caches; gives the seconds of the last call.

  A slow call is made twice: the first holds the compilation.
  """
  call()
  wall, calls = 0.0, 0
  while calls < WARM_UP_CALLS and wall < WARM_UP_SECONDS:
    seconds = measure(call, 1)
    wall, calls = wall + seconds['wall'], calls + 1
  return seconds


class Server:
  """Answers the requests of one parent process."""

  def __init__(self, name):
    self._name = name
    self._module = None
    self._calls = {}

  def _load(self):
    if self._module is None:
      self._module = load(self._name)
    return self._module

  def answer(self, request):
    """Does what a request asks; see the docstring of the module."""
    do = request['do']
    if do == 'drop':
      self._calls.clear()
      return {}
    if do == 'versions':
      return versions(self._load().PACKAGES)
    if do == 'value':
      value = self._load().VALUES[request['case']]
      try:
        return {'value': value(**request['arguments'])}
      except ImportError as error:
        return {'missing': str(error)}
    key = json.dumps([request['case'], request['arguments']], sort_keys=True)
    if do == 'time':
      return measure(self._calls[key], request['calls'])
    try:
      prepare = self._load().CASES[request['case']]
      self._calls[key] = prepare(**request['arguments'])
      return warm_up(self._calls[key])
    except (ImportError, NotImplementedError) as error:
      return {'missing': str(error)}


def versions(packages):
  """The versions of those of the packages that are installed."""
  found = {'python': sys.version.split()[0]}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def main(name, core):
  """Serves until the parent closes the pipe."""
  pin(None if core == '-' else int(core))
  # What a library prints must not land among the answers.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  server = Server(name)
  for line in sys.stdin:
    try:
      reply = server.answer(json.loads(line))
    except Exception:  # The parent reports it, whatever it is.
      reply = {'error': traceback.format_exc()}
    print(json.dumps(reply), file=answers)


if __name__ == '__main__':
  main(*sys.argv[1:])
