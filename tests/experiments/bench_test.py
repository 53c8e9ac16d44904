"""The harness with sides of known cost; the benchmarks at sizes of nothing."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import contrastive
from emc2.contrastive import objective
from emc2.experiments import bench
from emc2.experiments.benchmarks import contrastive as contrastive_bench
from emc2.experiments.benchmarks import contrastive_toys as toys
from emc2.experiments.benchmarks import ds_mlr as mlr_bench
from emc2.experiments.benchmarks import (
  harness,
  peers_ds_mlr,
  peers_lda,
  peers_thomson,
  worker,
)
from emc2.experiments.benchmarks import lda as lda_bench
from emc2.experiments.benchmarks import mada as mada_bench
from emc2.experiments.benchmarks import thomson as thomson_bench

# A module that a worker can serve, in any Python.
_SERVED = """
import os, time

PACKAGES = ('pip', 'no-such-package')


def burn(seconds, log=None, name=''):
  print('a library says something')

  def call():
    if log:
      with open(log, 'a') as file:
        file.write(name)
    end = time.process_time() + seconds
    while time.process_time() < end:
      pass

  return call


def rest(seconds):
  return lambda: time.sleep(seconds)


def absent():
  import no_such_package


def unsupported():
  raise NotImplementedError('not for this shape')


def broken():
  raise KeyError('lost')


CASES = {f.__name__: f for f in (burn, rest, absent, unsupported, broken)}
VALUES = {
  'cores': lambda: sorted(os.sched_getaffinity(0)),
  'variable': os.environ.get,
}
"""


def _exact(m):
  """A method that knows the gradient."""

  def surrogate(key, memory, params, batch, embed_fn):
    index = jnp.repeat(jnp.arange(m), 2)
    view = jnp.tile(jnp.arange(2, dtype=jnp.uint32), m)
    rows = embed_fn(params, batch.data, index, view).reshape(m, 2, -1)
    value = objective.global_loss(rows, inverse_temperature=toys.BETA)
    return value, (memory, optax.EmptyState())

  return contrastive.Estimator(
    init=lambda key, params: (),
    surrogate=lambda *args: _with_loss(*surrogate(*args)),
    pending=None,
    shardings=None,
  )


def _with_loss(value, aux):
  return value, (aux[0], contrastive.Info(value, value, ()))


class HarnessTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.served = self.folder / 'served.py'
    self.served.write_text(_SERVED)

  def side(self, case, peer=False, **arguments):
    return harness.Side(str(self.served), case, arguments, peer=peer)

  def context(self, **kwargs):
    context = harness.Context(peers_python=sys.executable, **kwargs)
    self.addCleanup(context.__exit__)
    return context

  @parameterized.parameters(
    (harness.Target(0.5), 0.5, True),
    (harness.Target(0.5), 0.6, False),
    (harness.Target(2.0, at_most=False), 2.5, True),
    (harness.Target(2.0, at_most=False), 1.5, False),
  )
  def test_a_target_is_met_or_not(self, target, ratio, met):
    row = harness.Row('a', 'b', 'ms', ratio=harness.Figure.exact(ratio))
    self.assertIsNone(row.met)
    self.assertIs(harness.dataclasses.replace(row, target=target).met, met)

  def test_a_target_may_be_of_our_own_figure(self):
    target = harness.Target(1.0, of='ours')
    row = harness.Row('a', 'b', '', harness.Figure.exact(2.0), target=target)
    self.assertIs(row.met, False)
    self.assertIsNone(harness.Row('a', 'b', '', target=target).met)

  def test_a_figure_is_the_median_and_the_extremes(self):
    figure = harness.Figure.of([5.0, 1.0, 2.0])
    self.assertEqual(figure, harness.Figure(2.0, 1.0, 5.0))

  def test_a_figure_that_is_no_number_is_left_out_of_json(self):
    lost, kept = (harness.Figure.exact(x) for x in (float('nan'), 2.0))
    row = harness.Row('a', 'b', '', lost, 'peer', kept, ratio=lost).to_json()
    self.assertIsNone(row['ours'])
    self.assertIsNone(row['ratio'])
    self.assertEqual(row['theirs']['value'], 2.0)

  def test_a_race_takes_turns(self):
    log = str(self.folder / 'log')
    sides = [
      self.side('burn', name=name, peer=name == 'b', seconds=0.01, log=log)
      for name in 'ab'
    ]
    taken, why = self.context().time(sides, rounds=3, seconds=0.0)
    self.assertEqual(why, [])
    self.assertEqual([len(t['cpu']) for t in taken], [3, 3])
    order = pathlib.Path(log).read_text()
    self.assertEndsWith(order, 'ababab')
    self.assertGreaterEqual(order[:-6].count('a'), 2)  # The warm-up.

  @pytest.mark.slow
  def test_a_race_gives_the_ratio_of_cpu_times(self):
    row = self.context().race(
      'a row',
      'a metric',
      self.side('burn', seconds=0.002),
      self.side('burn', seconds=0.02, peer=True),
      peer='the peer',
      target=harness.Target(0.3),
    )
    self.assertAlmostEqual(row.ours.value, 2.0, delta=1.0)
    self.assertAlmostEqual(row.theirs.value, 20.0, delta=5.0)
    self.assertLess(row.ratio.value, 0.3)
    self.assertLessEqual(row.ratio.low, row.ratio.value)
    self.assertIs(row.met, True)
    page = harness.markdown('t', 'c', harness.machine(), [row])
    self.assertIn('| a row | a metric, ms | ', page)
    self.assertIn(' | <= 0.3x | yes |', page)

  def test_sleep_is_wall_time_and_no_cpu_time(self):
    sides = [self.side('rest', seconds=0.05)]
    (taken,), _ = self.context().time(sides, rounds=2)
    self.assertLess(max(taken['cpu']), 0.01)
    self.assertGreaterEqual(min(taken['wall']), 0.05)

  @parameterized.parameters(
    ('absent', 'no_such_package'), ('unsupported', 'not for this shape')
  )
  @pytest.mark.slow
  def test_a_peer_that_is_not_there_leaves_its_figure_empty(self, case, why):
    row = self.context(smoke=True).race(
      'a', 'b', self.side('burn', seconds=0.0), self.side(case), peer='c'
    )
    self.assertIsNotNone(row.ours)
    self.assertIsNone(row.theirs)
    self.assertIsNone(row.ratio)
    self.assertIn(why, row.note)
    page = harness.markdown('t', 'c', harness.machine(), [row])
    self.assertIn('| c | not run | not run |', page)

  def test_without_a_python_for_peers_their_rows_are_not_run(self):
    with harness.Context() as context:
      row = context.race(
        'a',
        'b',
        self.side('burn', seconds=0.01),
        self.side('burn', seconds=0.01, peer=True),
        peer='c',
      )
    self.assertIsNone(row.theirs)
    self.assertIn('--peers-python', row.note)

  def test_an_error_in_a_worker_is_told(self):
    with self.assertRaisesRegex(RuntimeError, 'lost'):
      self.context().time([self.side('broken')])

  def test_workers_are_pinned_unless_they_use_an_accelerator(self):
    context = self.context()
    pinned = context.value(self.side('cores'))
    self.assertLen(pinned, 1)
    self.assertEqual(
      context.value(self.side('variable', key='JAX_PLATFORMS')), 'cpu'
    )
    free = harness.Side(str(self.served), 'cores', {}, accelerated=True)
    self.assertEqual(context.value(free), sorted(os.sched_getaffinity(0)))

  def test_versions_are_those_of_the_worker(self):
    context = self.context()
    context.value(self.side('cores'))
    versions = context.versions()['served']
    self.assertEqual(versions['python'], sys.version.split()[0])
    self.assertIsNone(versions['no-such-package'])

  def test_a_worker_warms_up_and_measures_the_mean_of_calls(self):
    seen = []
    worker.warm_up(lambda: seen.append(0))
    self.assertLen(seen, 1 + worker.WARM_UP_CALLS)
    seen.clear()
    found = worker.measure(lambda: seen.append(0), 7)
    self.assertLen(seen, 7)
    self.assertLess(found['wall'], 0.1)

  def test_a_table_is_read_again_and_compared(self):
    row = harness.Row('a', 'b', 'ms', harness.Figure.exact(3.0))
    about = harness.machine()
    harness.write(self.folder, 'table', 'page', about, [row])
    earlier = harness.read_ours(self.folder / 'table.json')
    row = harness.dataclasses.replace(row, ours=harness.Figure.exact(6.0))
    page = harness.markdown('t', 'c', about, [row], earlier)
    self.assertIn('| to earlier |', page)
    self.assertIn('| 2.00 |', page)
    self.assertEqual((self.folder / 'table.md').read_text(), 'page')

  def test_bars_in_a_cell_do_not_end_it(self):
    row = harness.Row('a', '|grad L|', '', harness.Figure.exact(1.0))
    page = harness.markdown('t', 'c', harness.machine(), [row])
    self.assertIn(r'| a | \|grad L\| | 1 |', page)

  def test_the_machine_is_named(self):
    about = harness.machine()
    self.assertEqual(about['cores'], os.cpu_count())
    self.assertEqual(about['versions']['jax'], jax.__version__)
    self.assertTrue(about['cpu'])

  @parameterized.parameters(
    ({'name': 'contrastve'}, "got 'contrastve'"),
    ({'only': 'no such case'}, "only='no such case'"),
    ({'compare': pathlib.Path('nowhere.json')}, 'compare must name a file'),
    ({'peers_python': 'nowhere'}, 'peers_python must name a file'),
  )
  def test_wrong_arguments_are_named(self, arguments, message):
    arguments = {'name': 'contrastive', 'out': self.folder} | arguments
    with self.assertRaisesRegex(ValueError, message):
      bench.run(**arguments)

  def test_a_file_that_is_no_table_is_named(self):
    with self.assertRaisesRegex(ValueError, 'served.py is no table'):
      harness.read_ours(self.served)

  @pytest.mark.slow
  def test_the_command_measures_and_writes(self):
    command = [sys.executable, '-m', 'emc2.experiments.bench', 'contrastive']
    command += ['--smoke', '--only=SimCLR, B=32, nt', f'--out={self.folder}']
    environment = dict(os.environ)
    environment.pop('EMC2_PEERS_PYTHON', None)
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, check=True
    )
    content = json.loads((self.folder / 'contrastive-cpu.json').read_text())
    (row,) = content['rows']
    self.assertEqual(row['name'], 'loss: SimCLR, B=32')
    self.assertGreater(row['ours']['value'], 0)
    self.assertEqual(row['target'], '<= 1x')
    self.assertIsNone(row['met'])
    self.assertEqual(
      done.stdout, (self.folder / 'contrastive-cpu.md').read_text() + '\n'
    )
    self.assertIn('1/1', done.stderr)  # The progress bar.

  @pytest.mark.slow
  def test_a_wrong_flag_stops_the_command(self):
    command = [sys.executable, '-m', 'emc2.experiments.bench', 'contrastve']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertNotEqual(done.returncode, 0)
    self.assertIn('contrastve', done.stdout + done.stderr)


@pytest.mark.slow
class ContrastiveTest(parameterized.TestCase):
  def test_cases_have_names_of_their_own_and_smoke_is_a_part(self):
    for smoke in (False, True):
      names = [case.name for case in contrastive_bench.cases(smoke)]
      self.assertLen(set(names), len(names))
    self.assertLess(len(names), len(contrastive_bench.cases(False)) / 2)

  @parameterized.parameters(
    {'method': 'emc2'},
    {'method': 'emc2', 'num_views': 2},
    {'method': 'simclr'},
    {'method': 'sogclr'},
  )
  def test_losses_run(self, **settings):
    call = contrastive_bench.time_loss(
      batch_size=4, num_samples=50, size=8, **settings
    )
    call()
    call()

  @parameterized.parameters(
    {'method': 'simclr', 'num_views': None},
    {'method': 'emc2', 'num_views': None, 'capacity': 1},
  )
  def test_steps_run(self, **settings):
    sizes = dict(batch_size=2, image_size=4, num_samples=8, size=8)
    with jax.numpy_dtype_promotion('standard'):  # optax.adam asks for it.
      call = contrastive_bench.time_step(after=1, **sizes, **settings)
      call()

  @pytest.mark.slow
  def test_kernels_run(self):
    spec = {'spec': 'toy_500', 'implementation': 'xla'}
    contrastive_bench.time_metropolis(**spec)()
    spec['spec'] = 'digits'
    contrastive_bench.time_row_logsumexp(**spec)()

  def test_kernel_rows_without_an_accelerator_say_so(self):
    cases = contrastive_bench.cases(False)
    (case,) = [c for c in cases if c.name == 'kernel: metropolis, toy_500']
    with harness.Context() as context:
      (row,) = case.run(context)
    self.assertIsNone(row.ours)
    self.assertIn('no accelerator', row.note)

  def test_an_unknown_method_is_named(self):
    with self.assertRaisesRegex(ValueError, "got 'moco'"):
      contrastive_bench.make('moco', 10)

  def test_every_pass_visits_every_sample_once(self):
    batch = toys.batches(jax.random.key(0), 12, 4, 9)
    self.assertEqual(batch.index.shape, (9, 4))
    self.assertEqual(batch.view.shape, (9, 2, 4))
    passes = np.sort(np.asarray(batch.index).reshape(3, 12), axis=1)
    np.testing.assert_array_equal(passes, np.tile(np.arange(12), (3, 1)))
    np.testing.assert_array_equal(np.sum(batch.view, axis=1), np.ones((9, 4)))

  def test_points_are_centroids_and_noise(self):
    settings = dict(size=16, num_clusters=3, seed=0)
    draw = lambda *noise, unit: toys.points(
      300, sample_noise=noise[0], view_noise=noise[1], unit=unit, **settings
    )
    bare = draw(0.0, 0.0, unit=True)
    self.assertEqual(bare.shape, (300, 2, 16))
    self.assertLen(np.unique(bare.reshape(-1, 16), axis=0), 3)
    np.testing.assert_allclose(np.linalg.norm(bare, axis=-1), 1, rtol=1e-5)
    views = draw(0.0, 0.5, unit=False)
    apart = views[:, 0] - views[:, 1]
    self.assertAlmostEqual(np.std(apart), 0.5 * 2**0.5, delta=0.02)
    samples = draw(0.5, 0.0, unit=False)
    np.testing.assert_array_equal(samples[:, 0], samples[:, 1])
    self.assertLen(np.unique(samples[:, 0], axis=0), 300)

  def test_the_exact_gradient_has_no_error(self):
    error = toys.gradient_error(
      _exact, batch_size=4, num_samples=12, size=4, visits=2
    )
    self.assertLess(error, 1e-5)

  def test_training_follows_the_gradient_in_numpy(self):
    schedule = optax.linear_schedule(0.2, 0.0, 4)
    sizes = dict(num_samples=6, size=3, width=2)
    ended = toys.train(
      _exact,
      batch_size=3,
      num_steps=4,
      schedule=schedule,
      seeds=(5, 7),
      every=2,
      **sizes,
    )
    self.assertEqual(ended.path.shape, (2, 2))
    for i, seed in enumerate((5, 7)):
      data = toys.points(
        6,
        size=3,
        num_clusters=8,
        sample_noise=0.6,
        view_noise=0.3,
        seed=seed,
        unit=False,
      )
      start_key = jax.random.split(jax.random.key(seed), 4)[2]
      weight = np.float64(jax.random.normal(start_key, (2, 3)) / 4)
      path = []
      for step in range(4):
        gradient = _numeric_gradient(weight, data)
        path.append(np.sum(gradient**2))
        weight = weight - 0.2 * (1 - step / 4) * gradient
      np.testing.assert_allclose(ended.path[i], path[::2], rtol=1e-2)
      np.testing.assert_allclose(ended.loss[i], _loss(weight, data), rtol=1e-4)
      gradient = _numeric_gradient(weight, data)
      np.testing.assert_allclose(
        ended.squared_gradient[i], np.sum(gradient**2), rtol=1e-2
      )

  def test_a_slope_is_that_of_the_means(self):
    slope, means = toys.rate_slope(
      _exact,
      batch_size=4,
      lengths=(10, 40),
      seeds=(0,),
      num_samples=8,
      size=4,
      width=2,
    )
    want = (np.log(means[1]) - np.log(means[0])) / np.log(4)
    self.assertAlmostEqual(slope, want, places=5)

  def test_methods_run_in_a_toy(self):
    for name in ('EMC2', 'SogCLR, gamma 0.1'):
      ended = toys.training_toy(
        toys.METHODS[name],
        batch_size=4,
        num_steps=2,
        seeds=(0,),
        num_samples=8,
        size=4,
        width=2,
      )
      self.assertTrue(np.isfinite(ended.loss).all())


class ThomsonTest(parameterized.TestCase):
  def test_cases_have_names_of_their_own_and_smoke_is_a_part(self):
    for smoke in (True, False):
      names = [case.name for case in thomson_bench.cases(smoke)]
      self.assertLen(set(names), len(names))

  @parameterized.parameters('in place', 'plain')
  def test_the_peers_energy_is_that_of_a_loop(self, form):
    for n in (7, 600):  # The second takes more than one block.
      points = peers_thomson.draw(n, 1)[0]
      value, potential, gradient = peers_thomson.FORMS[form](n)(points)
      apart = points[:, None] - points
      distance = np.linalg.norm(apart, axis=2) + np.diag(np.full(n, np.inf))
      np.testing.assert_allclose(potential, (1 / distance).sum(1))
      np.testing.assert_allclose(value, (1 / distance).sum() / 2)
      want = -(apart / distance[..., None] ** 3).sum(1)
      # Inner products lose digits of the distances of the nearest points.
      np.testing.assert_allclose(gradient, want, rtol=1e-7)

  def test_both_sides_solve_the_same_starts(self):
    arguments = dict(num_points=6, count=3, tolerance=1e-4)
    theirs = peers_thomson.solved(**arguments)
    ours = thomson_bench.VALUES['solved'](**arguments)
    for energies, norms, _ in (ours, theirs):
      np.testing.assert_allclose(energies, 9.985281374239, rtol=1e-8)
      self.assertLess(max(norms), 1e-4)
    thomson_bench.time_solve(**arguments)()
    peers_thomson.time_solve(**arguments)()

  @parameterized.parameters('ours', 'blocks', 'whole')
  def test_forms_agree_with_numpy_and_keep_float64(self, form):
    arguments = dict(num_points=40, dtype='float64', form=form)
    potential, gradient = thomson_bench.time_pairs(**arguments)()
    points = peers_thomson.draw(40, 1)[0]
    _, want, slope = peers_thomson.Plain(40)(points)
    np.testing.assert_allclose(potential, want, rtol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-9)
    self.assertEqual(potential.dtype, np.float64)

  def test_energies_of_sets_are_those_of_each(self):
    values, _ = thomson_bench.time_energy(num_points=9, count=3)()
    sets = peers_thomson.draw(9, 3)
    want = [peers_thomson.Plain(9)(points)[0] for points in sets]
    np.testing.assert_allclose(values, want, rtol=1e-12)
    peers_thomson.time_energy(num_points=9, count=3)()
    value, gradient = thomson_bench.time_energy(num_points=9)()
    np.testing.assert_allclose(value, want[0], rtol=1e-12)
    self.assertEqual(gradient.dtype, np.float64)

  @pytest.mark.slow
  def test_kernels_run(self):
    for spec in ('thomson_12', 'visiting_block'):
      thomson_bench.time_kernel(spec=spec, implementation='xla')()

  def test_memory_grows_as_the_points(self):
    ask = thomson_bench.VALUES['temporary_bytes']
    ours, whole = (
      [ask(num_points=n, form=form) for n in (2000, 8000)]
      for form in ('ours', 'whole')
    )
    self.assertLess(ours[1], 4 * ours[0])
    self.assertGreater(whole[1], 15 * whole[0])

  @pytest.mark.slow
  def test_minima_are_searched_by_as_many_processes_as_cores(self):
    (case,) = [c for c in thomson_bench.cases(True) if 'minima' in c.name]
    with harness.Context(smoke=True) as context:
      gap, cpu, wall = case.run(context)
    self.assertLess(abs(gap.ours.low), 1e-10)
    self.assertEqual(gap.name, 'minima: n = 4 to 12')
    self.assertIs(gap.met, True)
    self.assertGreater(cpu.ours.value, 0)
    self.assertEqual(cpu.wall[0], wall.ours.value)

  def test_a_lower_energy_than_was_known_is_told(self):
    found = {'num_points': 5, 'gap': 1e-12, 'origin': 'D2', 'seconds': 2.0}
    found['num_starts'] = 8
    row = thomson_bench.gap_row([found], None)
    self.assertEqual(row.note, 'n = 5: from D2, one of 8 starts, 2 s')
    other = found | {'num_points': 7, 'gap': -2e-8}
    row = thomson_bench.gap_row([found, other], 1e-9)
    self.assertEqual(row.ours.value, 1e-12)
    self.assertIn('2 of 2 n are within 1e-9', row.note)
    self.assertIn('lower than was known: n = 7 (-2.0e-08)', row.note)

  @pytest.mark.slow
  def test_rows_name_the_share_that_reaches_the_tolerance(self):
    cases = thomson_bench.cases(True)
    (case,) = [c for c in cases if c.name == 'solve: 64 for 4, n=10']
    with harness.Context(smoke=True) as context:
      (row,) = case.run(context)
    self.assertIn('reached by 4 of 4 starts', row.note)
    self.assertIn('the peer: 2 of 2 starts', row.note)
    self.assertIsNotNone(row.ratio)  # The peer needs no Python of its own.

  def test_kernel_rows_without_an_accelerator_say_so(self):
    cases = thomson_bench.cases(True)
    (case,) = [c for c in cases if c.name == 'kernel: riesz, thomson_12']
    with harness.Context() as context:
      (row,) = case.run(context)
    self.assertIsNone(row.ours)
    self.assertIn('no accelerator', row.note)


def _loss(weight, data):
  """The global loss of unit rows, by loops."""
  rows = np.float64(data) @ weight.T
  rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
  losses = []
  for i, pair in enumerate(rows):
    others = np.delete(rows, i, axis=0).reshape(-1, rows.shape[2])
    for anchor, positive in (pair, pair[::-1]):
      scores = toys.BETA * others @ anchor
      total = np.log(np.sum(np.exp(scores)))
      losses.append(total - toys.BETA * anchor @ positive)
  return np.mean(losses)


def _numeric_gradient(weight, data, step=1e-6):
  """Central differences."""
  gradient = np.zeros_like(weight)
  for at in np.ndindex(*weight.shape):
    change = np.zeros_like(weight)
    change[at] = step
    ahead = _loss(weight + change, data)
    gradient[at] = (ahead - _loss(weight - change, data)) / (2 * step)
  return gradient


class MadaTest(parameterized.TestCase):
  """The cases of MADA's benchmark."""

  def test_cases_have_names_of_their_own_and_smoke_is_a_part(self):
    for smoke in (True, False):
      names = [case.name for case in mada_bench.cases(smoke)]
      self.assertLen(set(names), len(names))
    self.assertLess(len(mada_bench.cases(True)), len(names))

  @parameterized.parameters(
    ('adam', 8), ('avgrad', 12), ('mada', 28), ('mada_bfloat16', 18)
  )
  def test_the_state_is_what_the_specification_counts(self, name, want):
    self.assertEqual(mada_bench.state_bytes(optimizer=name), want)

  @pytest.mark.slow
  def test_a_pass_and_a_step_go_on_from_what_they_left(self):
    for call in (
      mada_bench.time_step(optimizer='mada', side=8),
      mada_bench.time_pass(implementation='xla', side=8),
    ):
      call()
      call()

  @pytest.mark.slow
  def test_every_case_runs_at_a_tiny_size(self):
    with harness.Context(smoke=True) as context:
      for case in mada_bench.cases(True):
        for row in case.run(context):
          self.assertIsNotNone(row.ours, row.name)


class LdaTest(parameterized.TestCase):
  """The cases of the topic models' benchmark, on a corpus of nothing."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    rng = np.random.default_rng(0)
    topics = rng.dirichlet(np.full(30, 0.1), 4)
    counts = rng.poisson(20 * topics[rng.integers(4, size=60)])
    self.folder = folder.name
    lines = []
    for row in counts:
      pairs = [f'{word}:{count}' for word, count in enumerate(row) if count]
      lines.append(' '.join([str(len(pairs)), *pairs]))
    path = pathlib.Path(self.folder, 'corpus.dat')
    path.write_text('\n'.join([*lines, '']))
    lda_bench.prepare(self.folder, str(path), smoke=False)

  def test_cases_have_names_of_their_own(self):
    for smoke in (True, False):
      names = [case.name for case in lda_bench.cases(smoke)]
      self.assertLen(set(names), len(names))

  @parameterized.parameters('cvb0', 'scvb0')
  @pytest.mark.slow
  def test_learns_and_is_judged(self, algorithm):
    found = lda_bench.learn(
      folder=self.folder, algorithm=algorithm, topics=4, passes=4, every=2
    )
    self.assertLen(found['perplexity'], 2)
    self.assertLess(max(found['perplexity']), 30)
    self.assertLess(found['wall'][0], found['wall'][1])

  def test_stops_where_it_is_told(self):
    found = lda_bench.learn(
      folder=self.folder, algorithm='cvb0', topics=4, passes=5, until=1e9
    )
    self.assertLen(found['perplexity'], 1)

  def test_a_peer_gives_topics_that_are_judged(self):
    out = os.path.join(self.folder, 'topics.npz')
    seconds = peers_lda.fit(
      peer='scikit-learn',
      corpus=os.path.join(self.folder, 'train.npz'),
      out=out,
      topics=4,
      alpha=0.1,
      eta=0.01,
      passes=3,
      seed=0,
    )
    self.assertGreater(seconds['wall'], 0)
    judge = lda_bench.VALUES['judge']
    self.assertLess(judge(folder=self.folder, topics_path=out), 30)

  def test_all_forms_of_a_pass_run(self):
    for form in ('ours', 'sparse', 'plain', 'dense'):
      lda_bench.time_pass(folder=self.folder, topics=4, form=form)()


class DsMlrTest(parameterized.TestCase):
  """The cases of softmax regression, at tiny sizes."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = os.path.join(folder.name, 'problem.npz')

  def test_cases_have_names_of_their_own(self):
    for smoke in (True, False):
      names = [case.name for case in mlr_bench.cases(smoke)]
      self.assertLen(set(names), len(names))

  @pytest.mark.slow
  def test_ours_and_a_peer_come_to_one_optimum(self):
    ridge = mlr_bench.prepare(self.path, 'digits', smoke=True)
    settings = dict(path=self.path, ridge=ridge)
    ours = mlr_bench.solve(
      minibatches=2, steps=60, steps_per_call=20, **settings
    )
    peer = peers_ds_mlr.fit(
      peer='lbfgs', dtype='float64', steps=200, **settings
    )
    np.testing.assert_allclose(ours['last'], peer['objective'][-1], rtol=1e-5)
    np.testing.assert_allclose(ours['last'], ours['objective'][-1], rtol=1e-5)
    self.assertEqual(ours['cpu'], sorted(ours['cpu']))
    level = ours['last'] * 1.01
    place = mlr_bench.first_below(ours, level)
    self.assertLessEqual(ours['objective'][place], level)
    self.assertGreater(ours['objective'][place - 1], level)
    self.assertIsNone(mlr_bench.first_below(ours, 0.0))
