"""The one training loop; real processes are killed in `ProcessTest`."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import runner

from tests.experiments import toy

_ROOT = pathlib.Path(__file__).parents[2]


class Crash(Exception):
  pass


class Breaking(toy.Batches):
  """Calls a function when it is asked for a given batch, the first being 0."""

  def __init__(self, config, at, function):
    super().__init__(config)
    self._break_at, self._function = at, function

  def __next__(self):
    if self._at == self._break_at:
      self._function()
    return super().__next__()


def _crash():
  raise Crash


def _loop(config, num_steps):
  """The oracle: one step after another in Python; the states and losses."""
  key, batches = jax.random.key(config.seed), toy.Batches(config)
  state, step = toy.init(config, 'momentum'), jax.jit(toy.make_step(config))
  losses = []
  for t in range(num_steps):
    state, info = step(jax.random.fold_in(key, t), state, next(batches))
    losses.append(float(info.loss))
  return state, losses


def _lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


class TrainCase(parameterized.TestCase):
  @pytest.fixture(autouse=True)
  def _workdir(self, tmp_path, capfd):
    self.root, self.capfd = tmp_path, capfd
    self.config = toy.Config(wait=0.0)

  def _train(self, workdir='a', batches=None, **settings):
    method = settings.pop('method', 'momentum')
    step = settings.pop('step', toy.make_step(self.config))
    settings = {
      'key': jax.random.key(self.config.seed),
      'num_steps': 30,
      'log_every': 3,
      'checkpoint_every': 10,
      'name': 'toy',
    } | settings
    batches = toy.Batches(self.config) if batches is None else batches
    state = toy.init(self.config, method)
    return runner.train(
      state, step, batches, workdir=self.root / workdir, **settings
    )

  def _steps_saved(self, workdir='a'):
    folder = self.root / workdir / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir())


class TrainTest(TrainCase):
  def test_matches_a_loop(self):
    self._check_matches_a_loop(2)

  @parameterized.parameters(1, 5)
  @pytest.mark.slow
  def test_matches_a_loop_elsewhere(self, steps_per_call):
    self._check_matches_a_loop(steps_per_call)

  def _check_matches_a_loop(self, steps_per_call):
    state = self._train(steps_per_call=steps_per_call)
    want, losses = _loop(self.config, 30)
    np.testing.assert_allclose(state.params, want.params, rtol=1e-5)
    np.testing.assert_array_equal(
      jax.random.key_data(state.key), jax.random.key_data(want.key)
    )
    rows = _lines(self.root / 'a')
    self.assertEqual([row['step'] for row in rows], list(range(3, 31, 3)))
    np.testing.assert_allclose(
      [row['loss'] for row in rows], losses[2::3], rtol=1e-4
    )

  def test_continues_bit_for_bit(self):
    self._check_continues_bit_for_bit(2, 21)

  @parameterized.parameters((1, 4), (2, 10), (1, 29))
  @pytest.mark.slow
  def test_continues_bit_for_bit_elsewhere(self, steps_per_call, at):
    self._check_continues_bit_for_bit(steps_per_call, at)

  def _check_continues_bit_for_bit(self, steps_per_call, at):
    settings = {'steps_per_call': steps_per_call}
    want = self._train('want', **settings)
    batches = Breaking(self.config, at, _crash)
    with self.assertRaises(Crash):
      self._train(batches=batches, **settings)
    got = self._train(**settings)
    np.testing.assert_array_equal(got.params, want.params)
    np.testing.assert_array_equal(
      jax.random.key_data(got.key), jax.random.key_data(want.key)
    )
    self.assertEqual(
      (self.root / 'a' / 'metrics.jsonl').read_bytes(),
      (self.root / 'want' / 'metrics.jsonl').read_bytes(),
    )

  def test_an_ended_run_is_read_back(self):
    want = self._train()
    before = (self.root / 'a' / 'metrics.jsonl').read_bytes()
    got = self._train(batches=Breaking(self.config, 0, _crash))
    np.testing.assert_array_equal(got.params, want.params)
    after = (self.root / 'a' / 'metrics.jsonl').read_bytes()
    self.assertEqual(after, before)

  def test_without_batches_a_step_sees_its_number(self):
    def step(key, state, number):
      del key
      return state + number, {'loss': number.astype(jnp.float32)}

    state = runner.train(
      jnp.int32(0),
      step,
      key=jax.random.key(0),
      num_steps=7,
      workdir=self.root / 'a',
      steps_per_call=3,
      log_every=1,
      checkpoint_every=3,
    )
    self.assertEqual(int(state), sum(range(7)))
    self.assertEqual([row['loss'] for row in _lines(self.root / 'a')],
                     list(range(7)))  # fmt: skip

  @parameterized.parameters(1, 3)
  def test_constants_reach_every_step(self, steps_per_call):
    def step(key, state, batch):
      number, table = batch
      return state + table[number], {'loss': jnp.float32(0)}

    table = jnp.arange(7, dtype=jnp.int32) ** 2
    state = runner.train(
      jnp.int32(0),
      step,
      constants=table,
      key=jax.random.key(0),
      num_steps=7,
      workdir=self.root / 'a',
      steps_per_call=steps_per_call,
      checkpoint_every=3,
    )
    self.assertEqual(int(state), sum(t**2 for t in range(7)))

  def test_prepare_sees_key_state_and_number(self):
    seen = []

    def prepare(key, state, number):
      seen.append((jax.random.key_data(key).tolist(), int(state), number))
      return jax.device_put(np.int32(int(state) + number))

    def step(key, state, batch):
      return state + batch, {'loss': jnp.float32(0)}

    key = jax.random.key(3)
    state = runner.train(
      jnp.int32(1),
      step,
      prepare=prepare,
      key=key,
      num_steps=4,
      workdir=self.root / 'a',
    )
    want, states = 1, []
    for number in range(4):
      states.append(want)
      want += want + number
    self.assertEqual(int(state), want)
    folded = [jax.random.fold_in(key, number) for number in range(4)]
    keys = [jax.random.key_data(k).tolist() for k in folded]
    self.assertEqual(seen, list(zip(keys, states, range(4), strict=True)))

  def test_trainings_of_one_step_compile_once(self):
    traced = []

    def step(key, state, number):
      traced.append(number)
      return state + number, {'loss': jnp.float32(0)}

    for name in ('a', 'b'):
      runner.train(
        jnp.int32(0),
        step,
        key=jax.random.key(0),
        num_steps=4,
        workdir=self.root / name,
      )
    self.assertLen(traced, 1)

  def test_the_given_state_stays(self):
    state = toy.init(self.config, 'momentum')
    for workdir in ('a', 'b'):
      runner.train(
        state,
        toy.make_step(self.config),
        toy.Batches(self.config),
        key=jax.random.key(0),
        num_steps=2,
        workdir=self.root / workdir,
      )
    np.testing.assert_array_equal(state.params, np.zeros(8))

  def test_compiles_once_for_each_length(self):
    traced = []

    def step(*args):
      traced.append(None)
      return toy.make_step(self.config)(*args)

    self._train(step=step, num_steps=10, steps_per_call=2, checkpoint_every=4)
    self.assertLen(traced, 1)

  def test_evaluates_at_both_ends_and_between(self):
    seen = []

    def evaluate(state):
      seen.append(float(state.params[0]))
      return {'first': state.params[0], 'all': state.params}

    self._train(evaluate=evaluate, evaluate_every=20, log_every=100)
    rows = [row for row in _lines(self.root / 'a') if 'first' in row]
    self.assertEqual([row['step'] for row in rows], [0, 20, 30])
    np.testing.assert_allclose([row['first'] for row in rows], seen)
    self.assertLen(rows[0]['all'], 8)

  def test_keeps_as_many_checkpoints_as_asked(self):
    self._train(checkpoint_every=5, keep=3)
    self.assertEqual(self._steps_saved(), [20, 25, 30])

  @parameterized.parameters((1, 0), (1, 8), (4, 6), (4, 27))
  def test_stops_at_the_first_bad_loss(self, steps_per_call, nan_at):
    self.config = dataclasses.replace(self.config, nan_at=nan_at)
    with self.assertRaises(runner.NonFiniteLossError) as caught:
      self._train(
        steps_per_call=steps_per_call, checkpoint_every=8, log_every=1
      )
    self.assertEqual(caught.exception.step, nan_at + 1)
    good = nan_at // 8 * 8
    path = caught.exception.last_good_checkpoint
    if good:
      self.assertEqual(pathlib.Path(path), self.root / f'a/checkpoints/{good}')
      self.assertEqual(self._steps_saved()[-1], good)
    else:
      self.assertIsNone(path)
      self.assertEqual(self._steps_saved(), [])
    self.assertRegex(str(caught.exception), f'step {nan_at + 1} .*{path}')
    rows = _lines(self.root / 'a')
    self.assertEqual([row['step'] for row in rows], list(range(1, nan_at + 1)))

  def test_a_signal_saves_and_stops(self):
    self._check_a_signal_saves_and_stops(signal.SIGTERM, SystemExit)

  @pytest.mark.slow
  def test_an_interrupt_saves_and_stops(self):
    self._check_a_signal_saves_and_stops(signal.SIGINT, KeyboardInterrupt)

  def _check_a_signal_saves_and_stops(self, signum, error):
    want = self._train('want', steps_per_call=2)
    before = signal.getsignal(signum)
    send = lambda: os.kill(os.getpid(), signum)
    with self.assertRaises(error) as caught:
      self._train(batches=Breaking(self.config, 14, send), steps_per_call=2)
    if signum == signal.SIGTERM:
      self.assertEqual(caught.exception.code, 143)
    self.assertIs(signal.getsignal(signum), before)
    self.assertEqual(self._steps_saved()[-1], 16)
    self.assertIn('toy: stopped after step 16', self.capfd.readouterr().err)
    got = self._train(steps_per_call=2)
    np.testing.assert_array_equal(got.params, want.params)

  def test_refuses_a_checkpoint_that_does_not_fit(self):
    self._train()
    before = _lines(self.root / 'a')
    with self.assertRaisesRegex(ValueError, r'momentum.*unknown here'):
      self._train(method='sgd', num_steps=40)
    with self.assertRaisesRegex(ValueError, "of 'toy', this run is 'other'"):
      self._train(name='other', num_steps=40)
    self.config = dataclasses.replace(self.config, size=9)
    with self.assertRaisesRegex(ValueError, r'float32\[8\] there and .*\[9\]'):
      self._train(num_steps=40)
    with self.assertRaisesRegex(ValueError, 'num_steps is 20, but .* has 30'):
      self.config = toy.Config()
      self._train(num_steps=20)
    self.assertEqual(_lines(self.root / 'a'), before)
    self.assertEqual(self._steps_saved(), [20, 30])

  @parameterized.parameters(
    ({'num_steps': 0}, 'num_steps must be at least 1, got 0'),
    ({'steps_per_call': 0}, 'steps_per_call must be at least 1, got 0'),
    ({'log_every': -1}, 'log_every must be at least 1, got -1'),
    ({'keep': 0}, 'keep must be at least 1, got 0'),
    ({'steps_per_call': 3}, 'checkpoint_every must be a multiple of .*=3'),
    (
      {'steps_per_call': 2, 'evaluate_every': 5},
      'evaluate_every must be a multiple of steps_per_call=2, got 5',
    ),
    ({'batches': iter('ab')}, 'batches must have get_state'),
    (
      {'steps_per_call': 2, 'prepare': lambda key, state, batch: batch},
      'steps_per_call must be 1 with prepare, got 2',
    ),
  )
  def test_refuses_wrong_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      self._train(**settings)

  def test_refuses_an_info_without_loss(self):
    step = lambda key, state, batch: (state, {'error': batch['y'].sum()})
    with self.assertRaisesRegex(ValueError, r"a loss, got only \['error'\]"):
      self._train(step=step)

  def test_refuses_batches_that_end_too_soon(self):
    def end():
      raise StopIteration

    with self.assertRaisesRegex(ValueError, 'batches ended after 13 steps'):
      self._train(batches=Breaking(self.config, 13, end), steps_per_call=2)

  def test_no_implicit_transfer_in_the_loop(self):
    def step(key, state, batch):
      with jax.ensure_compile_time_eval():
        jnp.ones(3) + np.ones(3, np.float32)
      return toy.make_step(self.config)(key, state, batch)

    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, 'Disallowed host'):
      self._train(step=step)

  def test_sharded_equals_one_device(self):
    want = self._train('want')
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('data',))
    place = lambda *axes: jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)
    )

    def train(workdir, batches):
      state = toy.init(self.config, 'momentum')
      state = state._replace(params=jax.device_put(state.params, place('data')))
      return runner.train(
        state,
        toy.make_step(self.config),
        batches,
        key=jax.random.key(self.config.seed),
        num_steps=30,
        workdir=self.root / workdir,
        checkpoint_every=10,
        batch_sharding=place('data'),
      )

    whole = train('whole', toy.Batches(self.config))
    np.testing.assert_allclose(whole.params, want.params, rtol=1e-5)
    self.assertEqual(whole.params.sharding, place('data'))
    with self.assertRaises(Crash):
      train('a', Breaking(self.config, 25, _crash))
    again = train('a', toy.Batches(self.config))
    np.testing.assert_array_equal(again.params, whole.params)

  def test_a_mesh_asks_for_the_sharding_of_batches(self):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with self.assertRaisesRegex(ValueError, 'batch_sharding must be given'):
      runner.train(
        jax.device_put(toy.init(self.config, 'sgd'), everywhere),
        toy.make_step(self.config),
        toy.Batches(self.config),
        key=jax.random.key(0),
        num_steps=3,
        workdir=self.root / 'a',
      )

  def test_seconds_per_step(self):
    self.config = dataclasses.replace(self.config, wait=0.004)
    self._train(num_steps=20, evaluate=lambda state: toy.time.sleep(1.0) or {})
    seconds = runner.seconds_per_step(self.root / 'a')
    self.assertBetween(seconds, 0.004, 0.05)


class StartTest(TrainCase):
  def test_writes_config_and_results(self):
    config = toy.Config(seed=3)
    results = runner.start(config, lambda *_: {'a.b': np.float32(2)}, self.root)
    self.assertEqual(results, {'a.b': 2.0})
    written = json.loads((self.root / 'result.json').read_text())
    self.assertEqual(written, results)
    written = json.loads((self.root / 'config.json').read_text())
    self.assertEqual(written['seed'], 3)

  def test_refuses_another_config(self):
    runner.start(toy.Config(), lambda *_: {'a.b': 1.0}, self.root)
    changed = toy.Config(seed=4, methods=('sgd',))
    message = (
      r"methods is \['sgd', 'momentum'\] there and \['sgd'\] here; "
      'seed is 0 there and 4 here'
    )
    with self.assertRaisesRegex(ValueError, message):
      runner.start(changed, lambda *_: self.fail('it ran'), self.root)
    self.assertEqual(
      json.loads((self.root / 'config.json').read_text())['seed'], 0
    )

  def test_refuses_a_result_that_is_no_number(self):
    with self.assertRaisesRegex(ValueError, 'got a.b = nan'):
      runner.start(toy.Config(), lambda *_: {'a.b': np.nan}, self.root)
    self.assertFalse((self.root / 'result.json').exists())

  def test_save_figure(self):
    path = self.root / 'figure.png'
    figure = matplotlib.figure.Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    runner.save_figure(figure, path, dpi=50)
    data = path.read_bytes()
    self.assertStartsWith(data, b'\x89PNG')
    self.assertEqual([p.name for p in self.root.iterdir()], ['figure.png'])
    self.assertLess(len(data), len(self._figure(dpi=150)))

  def _figure(self, **settings):
    figure = matplotlib.figure.Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    runner.save_figure(figure, self.root / 'other.png', **settings)
    return (self.root / 'other.png').read_bytes()

  def assertStartsWith(self, data, start):
    self.assertEqual(data[: len(start)], start)


class ProcessTest(parameterized.TestCase):
  """Starts `python -m tests.experiments.toy`, as a user would."""

  @pytest.fixture(autouse=True)
  def _workdir(self, tmp_path):
    self.root = tmp_path

  def _popen(self, workdir, *fields, at=None):
    environment = {}
    if at is not None:
      environment['TOY_SIGNAL_AT'] = ','.join(str(part) for part in at)
    process = subprocess.Popen(
      [
        *(sys.executable, '-W', 'error', '-m', 'tests.experiments.toy'),
        f'--workdir={self.root / workdir}',
        *fields,
      ],
      cwd=_ROOT,
      env=os.environ | environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.addCleanup(self._end, process)
    self.addCleanup(process.kill)
    return process

  def _end(self, process):
    with process:
      err = process.stderr.read() if not process.stderr.closed else ''
    return process.returncode, err

  def _run(self, *args, **kwargs):
    return self._end(self._popen(*args, **kwargs))

  def _assert_same(self, workdir, want, methods):
    for name in ('result.json', *(f'{m}.npy' for m in methods),
                 *(f'{m}/metrics.jsonl' for m in methods)):  # fmt: skip
      self.assertEqual(
        (self.root / workdir / name).read_bytes(),
        (self.root / want / name).read_bytes(),
        name,
      )

  @pytest.mark.slow
  def test_killed_and_stopped_it_ends_the_same(self):
    field = "--config.methods=('momentum',)"
    undisturbed = self._popen('want', field)
    # The first operation on that path is the one that ends a save.
    at = 1, int(signal.SIGKILL), r'checkpoints/20$'
    code, err = self._run('a', field, at=at)
    self.assertEqual(code, -signal.SIGKILL, err)
    folder = self.root / 'a' / 'momentum' / 'checkpoints'
    names = [path.name for path in folder.iterdir()]
    self.assertCountEqual(names, ['10', '20.orbax-checkpoint-tmp'])
    at = 1, int(signal.SIGTERM), r'checkpoints/40$'
    code, err = self._run('a', field, at=at)
    self.assertEqual(code, 128 + signal.SIGTERM, err)
    said = r'momentum: stopped after step \d\d, saved /\S+\Z'
    self.assertRegex(err.splitlines()[-1], said)
    self.assertNotIn('Traceback', err)
    code, err = self._run('a', field)
    self.assertEqual(code, 0, err)
    code, err = self._end(undisturbed)
    self.assertEqual(code, 0, err)
    self._assert_same('a', 'want', ['momentum'])
    steps = [row['step'] for row in _lines(self.root / 'a' / 'momentum')]
    self.assertEqual(steps, sorted([0, 30, 60, *range(3, 61, 3)]))
    self.assertEmpty(list((self.root / 'a').rglob('*tmp*')))

  @pytest.mark.slow
  def test_killed_anywhere_it_ends_the_same(self):
    methods = toy.Config().methods
    code, err = self._run('want')
    self.assertEqual(code, 0, err)
    kills = 0
    for at in range(5, 400, 31):
      workdir = f'kill_{at}'
      code, err = self._run(workdir, at=(at, int(signal.SIGKILL)))
      if code == 0:
        break
      self.assertEqual(code, -signal.SIGKILL, err)
      kills += 1
      code, err = self._run(workdir)
      self.assertEqual(code, 0, err)
      self._assert_same(workdir, 'want', methods)
    self.assertGreater(kills, 4)

  @pytest.mark.slow
  def test_two_processes(self):
    field = "--config.methods=('momentum',)"

    def run(workdir, at=None):
      with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
      pair = [
        self._popen(
          workdir,
          field,
          f'--coordinator=localhost:{port}',
          '--num_processes=2',
          f'--process_id={number}',
          at=at,
        )
        for number in range(2)
      ]
      return [self._end(process) for process in pair]

    self.assertEqual([code for code, _ in run('want')], [0, 0])
    at = 1, int(signal.SIGKILL), r'checkpoints/40$'
    codes = [code for code, _ in run('a', at)]
    self.assertEqual(codes[0], -signal.SIGKILL)
    at = 1, int(signal.SIGTERM), r'checkpoints/50$'
    codes = [code for code, _ in run('a', at)]
    self.assertEqual(codes, [143, 143])
    self.assertEqual([code for code, _ in run('a')], [0, 0])
    self._assert_same('a', 'want', ['momentum'])
    code, err = self._run('one', field)
    self.assertEqual(code, 0, err)
    np.testing.assert_allclose(
      np.load(self.root / 'a' / 'momentum.npy'),
      np.load(self.root / 'one' / 'momentum.npy'),
      rtol=1e-4,
    )

  def test_wrong_input_ends_with_one_line(self):
    (self.root / 'held').mkdir()
    held = dataclasses.asdict(toy.Config()) | {'seed': 5}
    (self.root / 'held' / 'config.json').write_text(json.dumps(held))
    cases = [
      (('a', '--config.sed=1'), "no field 'sed'; the nearest is 'seed'"),
      (('a', '--sed=1'), "Unknown command line flag 'sed'"),
      (('held',), 'another config: seed is 5 there and 0 here'),
      (('nan', '--config.nan_at=3'), 'loss of step 4 is not finite'),
    ]
    started = [self._popen(*arguments) for arguments, _ in cases]
    debugged = self._popen('a', '--config.log_every=0', '--debug')
    for process, (_, message) in zip(started, cases, strict=True):
      code, err = self._end(process)
      self.assertEqual(code, 2, err)
      self.assertNotIn('Traceback', err)
      # A slow machine shows a progress bar before.
      self.assertRegex(err.splitlines()[-1], rf'\AError: .*{message}')
    code, err = self._end(debugged)
    self.assertEqual(code, 1)
    self.assertRegex(err, r'(?s)Traceback.*log_every must be at least 1, got 0')
    self.assertEqual([p.name for p in (self.root / 'held').iterdir()],
                     ['config.json'])  # fmt: skip
