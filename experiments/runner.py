"""What every experiment gets: flags, one training loop, and files that last.

An experiment is a file with a typed config and one function::

  @dataclasses.dataclass
  class Config:
    seed: int = 0
    num_steps: int = 2_000

  def run(config: Config, workdir: epath.Path) -> dict[str, float]:
    key = jax.random.key(config.seed)
    state = runner.train(
        init(key), step, key=key, num_steps=config.num_steps,
        workdir=workdir / 'sgd', name='sgd', steps_per_call=50,
        evaluate=lambda state: {'error': error(state)}, evaluate_every=500)
    runner.save_figure(draw(runner.read_metrics(workdir / 'sgd')),
                       workdir / 'figure.png')
    return {'sgd.error': float(error(state))}

  if __name__ == '__main__':
    runner.launch(Config(), run)

where `step(key, state, batch) -> (state, info)` is the `step` of an
`emc2.algorithm.Algorithm` and `info` holds a `loss`. Several methods and seeds
are several calls of `train`, each with a folder of its own; on a second start
those that have ended are read back, not run. A notebook calls
`start(Config(...), run, workdir)`, which is `launch` without flags.

The folder then holds `config.json`, `result.json` (what `run` returned) and,
where `train` was told to work, `metrics.jsonl`, TensorBoard events,
`timing.json` and `checkpoints/`. The same command continues a run that was
killed, bit for bit. With `batches=None` the batch is the number of steps done
before, from which a step can draw its samples on the device. A call from Python
takes some 20 us, and more for a big state or batches from the host, so
`steps_per_call` in the tens is what makes tiny models fast.
"""

import collections
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags, logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import config_flags

from emc2 import algorithm, mesh
from emc2.experiments import checkpoint, feed, metrics

Run = Callable[[Any, epath.Path], dict[str, float]]

read_metrics = metrics.read


class NonFiniteLossError(FloatingPointError):
  """The loss of a step was infinite or not a number.

  Attributes:
    step: The first such step; the first step of a run is 1.
    last_good_checkpoint: The newest checkpoint before it whose arrays are all
      finite, or None.
  """

  def __init__(self, step: int, last_good_checkpoint: epath.Path | None):
    self.step = step
    self.last_good_checkpoint = last_good_checkpoint
    super().__init__(
      f'the loss of step {step} is not finite; the last good checkpoint is '
      f'{last_good_checkpoint}.'
    )


def launch(config: Any, run: Run) -> NoReturn:
  """Runs an experiment from the command line and ends the process.

  `--workdir=DIR --config.FIELD=VALUE`; `--coordinator`, `--num_processes` and
  `--process_id` join several processes. Wrong input ends with one line and exit
  status 2, SIGTERM with 143 after a checkpoint. `--debug` shows tracebacks.

  Args:
    config: Dataclass of settings with their defaults.
    run: `(config, workdir) -> results`.
  """
  _refuse_unknown_fields(config, sys.argv)
  try:
    chosen = config_flags.DEFINE_config_dataclass('config', config)
  except flags.Error as error:
    _fail(error)
  workdir = flags.DEFINE_string('workdir', None, 'Outputs.', required=True)
  coordinator = flags.DEFINE_string('coordinator', None, 'host:port.')
  num_processes = flags.DEFINE_integer('num_processes', None, 'Of the run.')
  process_id = flags.DEFINE_integer('process_id', None, 'Of this process.')
  debug = flags.DEFINE_bool('debug', False, 'Show the traceback of an error.')

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      _fail(error)

  def main(argv):
    if len(argv) > 1:
      _fail(f'unexpected arguments: {argv[1:]}.')
    try:
      mesh.start(coordinator.value, num_processes.value, process_id.value)
      results = start(chosen.value, run, workdir.value)
      for name, x in results.items() if jax.process_index() == 0 else ():
        print(f'{name} = {x:.6g}')
    except KeyboardInterrupt:
      sys.exit(128 + signal.SIGINT)
    except (
      ValueError,
      NotImplementedError,
      FileNotFoundError,
      NonFiniteLossError,
    ) as error:
      if debug.value:
        raise
      _fail(error)

  logging.set_verbosity(logging.WARNING)  # Orbax has much to say below it.
  app.run(main, flags_parser=parse)


def start(config: Any, run: Run, workdir: epath.PathLike) -> dict[str, float]:
  """Runs an experiment in a folder that belongs to its config.

  Args:
    config: Dataclass of settings.
    run: `(config, workdir) -> results`, results by `thing.metric`.
    workdir: Where everything is written.

  Returns:
    The results, which `workdir/result.json` holds too.

  Raises:
    ValueError: If `workdir` holds a run with another config, or if a result is
      not a finite number.
  """
  workdir = epath.Path(workdir).expanduser().resolve()
  _claim(workdir, config)
  results = {name: float(x) for name, x in run(config, workdir).items()}
  for name, x in results.items():
    if not math.isfinite(x):
      raise ValueError(f'results must be finite numbers, got {name} = {x}.')
  _write_json(workdir / 'result.json', results)
  return results


def largest_divisor(number: int, most: int) -> int:
  """The largest divisor of a number up to a bound, for `steps_per_call`."""
  return max(i for i in range(1, most + 1) if number % i == 0)


def train(
  state: Any,
  step_fn: Callable[[jax.Array, Any, Any], tuple[Any, Any]],
  batches: Iterator[Any] | None = None,
  *,
  constants: Any = None,
  prepare: Callable[[jax.Array, Any, Any], Any] | None = None,
  key: jax.Array,
  num_steps: int,
  workdir: epath.PathLike,
  name: str = 'train',
  steps_per_call: int = 1,
  log_every: int = 100,
  checkpoint_every: int = 1_000,
  keep: int = 2,
  evaluate: Callable[[Any], dict[str, Any]] | None = None,
  evaluate_every: int | None = None,
  batch_sharding: jax.sharding.NamedSharding | None = None,
) -> Any:
  """Trains from the newest checkpoint in `workdir`, or anew, to `num_steps`.

  Step `t = 0, 1, ...` is `step_fn(jax.random.fold_in(key, t), state, batch)`.
  Checkpoints hold the state, the key, `t` and the position of `batches`.

  Args:
    state: Pytree of arrays, placed as the run shall keep them. It is copied.
    step_fn: `(key, state, batch) -> (state, info)`, pure. `info` is a
      NamedTuple or dict of arrays to log, with a `loss` that must stay finite.
    batches: Iterator over pytrees of equal shapes, with `get_state` and
      `set_state` as Grain's have. If None, the batch is `t`, (), int32.
    constants: Arrays that every step reads and no checkpoint holds, such as a
      data set on the device, placed as they shall be; the step then gets the
      pair (batch, constants).
    prepare: `(key, state, batch) -> batch`, on the host before each step, with
      the step's own key, for what must be fetched because the state names it;
      what it returns is placed as it shall be. Without `batches` it is given
      the number of the step, an int. Needs `steps_per_call=1`.
    key: Typed PRNG key, (); the root of all the run's randomness.
    num_steps: Steps of the whole run, at least 1.
    workdir: Folder of this one training: checkpoints and metrics.
    name: What is trained; shown, and a checkpoint of another name is refused.
    steps_per_call: Steps that one compiled call scans, at least 1.
    log_every: `info` is written at its multiples and at the last step.
    checkpoint_every: A multiple of `steps_per_call`; the end is saved too.
    keep: How many checkpoints remain, at least 1.
    evaluate: `state -> ` numbers or arrays by name, not those of `info`; called
      before the first step, at multiples of `evaluate_every`, and at the end.
    evaluate_every: A multiple of `steps_per_call`; None for the two ends only.
    batch_sharding: How one batch lies on the mesh; each process feeds its own
      rows. Needed if `state` lies on a mesh and `batches` is given.

  Returns:
    The state after `num_steps` steps.

  Raises:
    ValueError: If a setting breaks its rule, a checkpoint does not fit this
      run, or `batches` ends too soon.
    NonFiniteLossError: If the loss of a step is not finite.
    SystemExit: After SIGTERM, with a checkpoint saved.
    KeyboardInterrupt: After SIGINT, with a checkpoint saved.
  """
  _check_settings(
    num_steps=num_steps,
    steps_per_call=steps_per_call,
    log_every=log_every,
    checkpoint_every=checkpoint_every,
    evaluate_every=evaluate_every,
  )
  if prepare is not None and steps_per_call != 1:
    raise ValueError(
      f'steps_per_call must be 1 with prepare, got {steps_per_call}.'
    )
  workdir = epath.Path(workdir).expanduser().resolve()
  source = feed.Feed(batches, batch_sharding)
  devices = _mesh_of((state, key))
  state, key = _own((state, key), devices)
  source.check_placed(state)
  done, clock = 0, _Clock()
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(_caught_signals())
    saved = checkpoint.Checkpoints(
      workdir / 'checkpoints', keep=keep, name=name
    )
    stack.enter_context(saved)
    restored = saved.restore({'state': state, 'key': key})
    if restored is not None:
      done = restored.step
      state, key = restored.tree['state'], restored.tree['key']
      source.go_to(restored.extra['position'])
      clock = _Clock(**restored.extra['clock'])
      if done > num_steps:
        raise ValueError(
          f'num_steps is {num_steps}, but {saved.path(done)} has {done}.'
        )
    if done == num_steps:
      return state

    log = _Log(workdir, name, done, num_steps, log_every, saved, restored)
    stack.callback(log.close)
    if evaluate is not None and done == 0:
      log.write(0, evaluate(state))
    # Steps done, and the first that went wrong or -1; the device counts.
    progress = _own((jnp.int32(done), jnp.int32(-1)), devices)
    stack.enter_context(jax.transfer_guard('disallow'))
    call = _compile(step_fn, state, devices)
    ahead = collections.deque()
    lengths = set()

    while done < num_steps:
      length = min(steps_per_call - done % steps_per_call, num_steps - done)
      batch = source.take(done, length)
      if prepare is not None:
        batch = _prepared(prepare, key, state, batch, done)
      if length not in lengths:
        clock.halt(done, state)
      state, progress, infos = call(
        state, progress, key, batch, constants, length
      )
      log.add(done, length, infos, progress[1])
      done += length
      if length not in lengths:
        lengths.add(length)
        clock.go(done, state)
      # Never waits for the device, only keeps batches from piling up before it.
      ahead.append(progress[1])
      if len(ahead) > 8:
        ahead.popleft().block_until_ready()

      ends = done == num_steps
      signum = _agreed(signals, ends or log.is_due(done, length))
      evaluates = ends or (evaluate_every and done % evaluate_every == 0)
      saves = ends or signum or done % checkpoint_every == 0
      if not (evaluates or saves):
        continue
      clock.halt(done, state)
      log.drain()
      with jax.transfer_guard('allow'):
        if evaluate is not None and evaluates:
          log.write(done, evaluate(state))
        if ends:
          _write_json(workdir / 'timing.json', clock.summary())
        if saves:
          log.flush()
          extra = {'position': source.position(), 'clock': clock.saved()}
          saved.save(done, {'state': state, 'key': key}, extra)
      if signum:
        path = saved.path(saved.steps()[-1])
        _stop(signum, f'{name}: stopped after step {done}, saved {path}.')
      clock.go(done, state)
  return state


def seconds_per_step(workdir: epath.PathLike) -> float:
  """Mean time of a step of an ended training, over all its starts.

  Compiling, evaluating and saving do not count, unless the training was so
  short that nothing else was timed.

  Args:
    workdir: The folder that was given to `train`.

  Returns:
    Seconds.
  """
  timing = json.loads((epath.Path(workdir) / 'timing.json').read_text())
  return timing['seconds_per_step']


def save_figure(figure: Any, path: epath.PathLike, *, dpi: int = 150) -> None:
  """Writes a Matplotlib figure whole or not at all; process 0 does.

  Args:
    figure: A `matplotlib.figure.Figure`, made directly: pyplot, which keeps
      figures and picks a display, is not needed.
    path: Ends in `.png`, `.pdf` or `.svg`.
    dpi: Dots per inch of pixels.
  """
  path = epath.Path(path)
  if jax.process_index() == 0:
    draft = path.with_name(f'.{path.name}.draft')
    figure.savefig(draft, format=path.suffix[1:], dpi=dpi)
    draft.replace(path)


class _Log:
  """Metrics and the bar; fetches what a call logged when the next one logs."""

  def __init__(self, workdir, name, done, num_steps, every, saved, restored):
    self._writer = metrics.Writer(workdir, restored and restored.step)
    self._every, self._num_steps, self._saved = every, num_steps, saved
    self._pending, self._first_bad = None, None
    self._bar = tqdm.tqdm(
      desc=name,
      total=num_steps,
      initial=done,
      unit='step',
      # A log file gets a line now and then, and none from a short run.
      mininterval=0.2 if sys.stderr.isatty() else 10.0,
      delay=0.0 if sys.stderr.isatty() else 4.0,
      disable=jax.process_index() != 0,
      dynamic_ncols=True,
    )

  def is_due(self, done: int, length: int) -> bool:
    """Whether the call that ended at `done` has a step to log."""
    return done // self._every > (done - length) // self._every

  def add(self, start: int, length: int, infos: Any, first_bad: jax.Array):
    """Notes a call; `infos` has a leading axis of its steps."""
    done = start + length
    self._first_bad = first_bad
    if self.is_due(done, length) or done == self._num_steps:
      self._fetch()
      self._pending = start, length, infos, first_bad
    self._bar.update(length)

  def drain(self) -> None:
    """Writes all that is noted and refuses a loss that was not finite."""
    self._fetch()
    if self._first_bad is not None:
      self._refuse(int(jax.device_get(self._first_bad)))

  def write(self, step: int, values: dict[str, Any]) -> None:
    self._writer.write(step, _by_name(jax.device_get(values)))

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
    self._bar.close()

  def _fetch(self) -> None:
    if self._pending is None:
      return
    start, length, infos, first_bad = self._pending
    self._pending = None
    infos, first_bad = jax.device_get((infos, first_bad))
    for row in range(length):
      step = start + row + 1
      if 0 <= first_bad < step:
        break
      if step % self._every == 0 or step == self._num_steps:
        self._writer.write(step, {name: x[row] for name, x in infos.items()})
        self._bar.set_postfix(loss=np.mean(infos['loss'][row]), refresh=False)
    self._refuse(int(first_bad))

  def _refuse(self, first_bad: int) -> None:
    if first_bad >= 0:
      good = self._saved.last_finite()
      path = None if good is None else self._saved.path(good)
      raise NonFiniteLossError(int(first_bad) + 1, path)


class _Clock:
  """Time of the steps alone."""

  def __init__(self, seconds=0.0, steps=0):
    self._seconds, self._steps = seconds, steps
    self._since, self._born = None, time.perf_counter()

  def go(self, done: int, state: Any) -> None:
    jax.block_until_ready(state)
    self._since = time.perf_counter(), done

  def halt(self, done: int, state: Any) -> None:
    if self._since is None:
      return
    jax.block_until_ready(state)
    self._seconds += time.perf_counter() - self._since[0]
    self._steps += done - self._since[1]
    self._since = None

  def saved(self) -> dict[str, float]:
    return {'seconds': self._seconds, 'steps': self._steps}

  def summary(self) -> dict[str, float]:
    whole = time.perf_counter() - self._born
    mean = self._seconds / self._steps if self._steps else whole
    return {'seconds_per_step': mean, 'timed_steps': self._steps}


def _compile(
  step_fn: Callable, state: Any, devices: jax.sharding.Mesh | None
) -> Callable:
  """The jitted call of many steps; donates the state and keeps its placing.

  Trainings of one `step_fn` share it, so that seeds compile once.
  """
  placing, treedef = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
  return _compile_placed(step_fn, tuple(placing), treedef, devices)


@functools.lru_cache(maxsize=1)
def _compile_placed(step_fn, placing, treedef, devices):
  def one(key, carry, numbered):
    state, first_bad = carry
    number, batch = numbered
    state, info = step_fn(key, state, batch)
    info = _by_name(info)
    if 'loss' not in info:
      raise ValueError(f'info must have a loss, got only {sorted(info)}.')
    bad = ~jnp.all(jnp.isfinite(info['loss']))
    first_bad = jnp.where(bad & (first_bad < 0), number, first_bad)
    return (state, first_bad), info

  def call(state, progress, key, batches, constants, length):
    number, first_bad = progress
    numbers = number + jnp.arange(length, dtype=jnp.int32)
    numbered = numbers, numbers if batches is None else batches

    def with_constants(key, carry, numbered):
      if constants is None:
        return one(key, carry, numbered)
      number, batch = numbered
      return one(key, carry, (number, (batch, constants)))

    (state, first_bad), infos = algorithm.scan(
      key, (state, first_bad), numbered, with_constants, start=number
    )
    return state, (number + length, first_bad), infos

  placing, shared = jax.tree.unflatten(treedef, placing), None
  if devices is not None:  # Then each process can read what is logged.
    shared = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec())
  return jax.jit(
    call,
    static_argnums=5,
    donate_argnums=0,
    out_shardings=(placing, shared, shared),
  )


def _prepared(prepare, key, state, batch, done):
  """What `prepare` makes of one batch, with a leading axis of one step."""
  with jax.transfer_guard('allow'):
    if batch is None:
      batch = done
    else:
      batch = jax.tree.map(lambda x: x[0], batch)
    batch = prepare(jax.random.fold_in(key, done), state, batch)
    return jax.tree.map(lambda x: x[None], batch)


def _mesh_of(tree: Any) -> jax.sharding.Mesh | None:
  """The mesh that some leaf is spread over, if one is."""
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.Array) and x.sharding.num_devices > 1:
      return x.sharding.mesh
  return None


def _own(tree: Any, devices: jax.sharding.Mesh | None) -> Any:
  """Copies that may be donated: strong types, committed, on the mesh if any."""

  def own(x):
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.lax.convert_element_type(x, x.dtype)
    if devices is not None and x.sharding.num_devices == 1:
      return mesh.place(x, devices)
    if not x.is_fully_addressable:
      return jnp.copy(x)
    return jax.device_put(x, x.sharding, may_alias=False)

  return jax.tree.map(own, tree)


def _by_name(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by names such as `memory/mean`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): x for path, x in leaves}


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
  """Lists the SIGTERM or SIGINT that came; a second one works as ever."""
  caught, before = [], {}

  def note(signum, unused_frame):
    caught.append(signum)
    signal.signal(signum, before[signum])

  if threading.current_thread() is threading.main_thread():
    for signum in (signal.SIGTERM, signal.SIGINT):
      before[signum] = signal.getsignal(signum) or signal.SIG_DFL
      signal.signal(signum, note)
  try:
    yield caught
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
  signum = _agreed(caught, True)
  if signum:
    _stop(signum, 'Stopped when all was saved.')


def _agreed(signals: Sequence[int], may_ask: bool) -> int:
  """The signal to stop for, or 0; all processes stop after the same step."""
  signum = signals[0] if signals else 0
  if jax.process_count() == 1:
    return signum
  if not may_ask:
    return 0
  with jax.transfer_guard('allow'):
    return int(multihost_utils.process_allgather(np.int32(signum)).max())


def _stop(signum: int, message: str) -> NoReturn:
  print(message, file=sys.stderr, flush=True)
  if signum == signal.SIGINT:
    raise KeyboardInterrupt
  sys.exit(128 + signum)


def _check_settings(*, steps_per_call: int, **settings: int | None) -> None:
  settings = {'steps_per_call': steps_per_call} | settings
  for name, value in settings.items():
    if value is not None and value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}.')
  for name in ('checkpoint_every', 'evaluate_every'):
    if settings[name] is not None and settings[name] % steps_per_call:
      raise ValueError(
        f'{name} must be a multiple of steps_per_call={steps_per_call}, got '
        f'{settings[name]}.'
      )


def _claim(workdir: epath.Path, config: Any) -> None:
  """Writes the config, or compares it with the one that is there."""
  path = workdir / 'config.json'
  ours = json.loads(json.dumps(dataclasses.asdict(config), default=str))
  if not path.exists():
    _write_json(path, ours)
    return
  theirs, ours = _flat(json.loads(path.read_text())), _flat(ours)
  differ = [
    f'{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here'
    for name in sorted(theirs.keys() | ours.keys())
    if theirs.get(name) != ours.get(name)
  ]
  if differ:
    raise ValueError(
      f'workdir {workdir} holds a run with another config: '
      f'{"; ".join(differ)}. Choose another workdir.'
    )


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  """The entries of nested dicts by dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def _write_json(path: epath.Path, value: Any) -> None:
  if jax.process_index() == 0:
    text = json.dumps(value, indent=2) + '\n'
    metrics.write_atomically(path, text.encode())


def _refuse_unknown_fields(config: Any, argv: Sequence[str]) -> None:
  """Ends the process if an argument sets a field that the config lacks."""
  known = _flat(dataclasses.asdict(config))
  for argument in argv[1:]:
    found = re.match(r'--?(no)?config\.([^=]+)', argument)
    name = found and found[2]
    if not name or any(f'{k}.'.startswith(f'{name}.') for k in known):
      continue
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'the nearest is {near[0]!r}' if near else f'it has {sorted(known)}'
    _fail(f'config has no field {name!r}; {hint}.')


def _fail(error: Exception | str) -> NoReturn:
  """One line on stderr, exit status 2."""
  text = ' '.join(str(error).split()) or repr(error)
  print(f'Error: {text}', file=sys.stderr, flush=True)
  sys.exit(2)
