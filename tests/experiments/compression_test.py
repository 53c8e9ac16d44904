"""Training through codes: what is sent, what is kept and what comes of it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2.experiments import compression, compression_figure, runner

from tests.experiments import case

TINY = dict(
  problem='digits',
  num_workers=2,
  num_seeds=1,
  num_steps=4,
  batch_size=4,
  num_evaluations=2,
  eval_windows=2,
  length=8,
)
METRICS = {
  'train_loss',
  'validation_loss',
  'validation_accuracy',
  'num_diverged',
  'bits',
  'memory_bytes',
  'seconds',
}


class CompressionTest(case.ExperimentTestCase):
  def setUp(self):
    super().setUp()
    # Optax mixes dtypes.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def _run(self, folder='run', **settings):
    config = compression.Config(**(TINY | settings))
    return runner.start(config, compression.run, self.folder / folder)

  def _final(self, folder, cell='none.none', problem='digits', seed=0):
    """The last training loss of a seed."""
    path = self.folder / folder / problem / cell / str(seed)
    return runner.read_metrics(path)['train_loss'][1][-1]

  def test_a_run_comes_to_a_result_and_a_figure(self):
    results = self._run(cells='sign:full')
    want = {f'digits.sign.full.{name}' for name in METRICS}
    self.assertEqual(set(results), want)
    stored = json.loads((self.folder / 'run/result.json').read_text())
    self.assertEqual(results, stored)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 50_000)
    # Kernels of 3 x 3 from 1 to 16 and on to 32, and a head of 4 * 4 * 32.
    matrices = [9 * 16, 144 * 32, 512 * 10]
    words = [-(-size // 32) + 1 for size in matrices]
    # Beside them the bias of the head, and whether all was finite.
    self.assertEqual(
      results['digits.sign.full.bits'], 32 * (sum(words) + 10 + 1)
    )
    self.assertEqual(
      results['digits.sign.full.memory_bytes'], 4 * sum(matrices)
    )
    self.assertBetween(results['digits.sign.full.train_loss'], 0.5, 3.0)
    self.assertEqual(results['digits.sign.full.num_diverged'], 0)

  @pytest.mark.slow
  def test_workers_without_a_code_are_one_large_batch(self):
    """By hand: the mean of gradients, Nesterov's momentum, a drop at 3 of 4."""
    self._run(cells='none:none', learning_rate=0.1, num_steps=4)
    config = compression.Config(**(TINY | dict(learning_rate=0.1)))
    plan = compression.make_plan(config, 'digits')
    problem = compression.make_digits(config, plan)
    root = jax.random.fold_in(jax.random.key(0), 0)
    of_params, _ = jax.random.split(jax.random.fold_in(root, 2**31 - 1))
    params = problem.draw_params(of_params)
    moment = jax.tree.map(jnp.zeros_like, params)
    grad = jax.jit(jax.grad(problem.loss_fn))
    for t in range(4):
      key = jax.random.fold_in(root, t)
      batches = [
        problem.draw_batch(jax.random.fold_in(key, i), problem.constants)
        for i in range(2)
      ]
      whole = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
      mean = grad(params, whole)
      mean = optax.tree.scale(min(1.0, 5.0 / optax.tree.norm(mean)), mean)
      moment = optax.tree.add_scale(mean, 0.9, moment)
      rate = 0.1 * (1.0 if t < 2 else 0.1 if t < 3 else 0.01)
      ahead = optax.tree.add_scale(mean, 0.9, moment)
      params = optax.tree.add_scale(params, -rate, ahead)
    want = problem.evaluate(params, problem.constants)['train_loss']
    np.testing.assert_allclose(self._final('run'), want, rtol=1e-4)

  @pytest.mark.slow
  def test_text(self):
    path = self.folder / 'text.txt'
    path.write_text('To be, or not to be: that is the question. ' * 20)
    results = self._run(
      problem='text',
      text=str(path),
      cells='none:none,power_sgd:full',
      num_steps=60,
      length=16,
    )
    for cell in ('none.none', 'power_sgd.full'):
      # The sentence says itself again; a guess among 100 is at 4.6.
      self.assertLess(results[f'text.{cell}.validation_loss'], 2.5)
      self.assertGreater(results[f'text.{cell}.validation_accuracy'], 0.3)
    bits = [
      results[f'text.{cell}.bits'] for cell in ('none.none', 'power_sgd.full')
    ]
    self.assertLess(bits[1], 0.1 * bits[0])

  @pytest.mark.slow
  def test_options_of_training_count(self):
    losses = {'as it is': 0.0}
    for name, value in (
      ('as it is', 0),
      ('learning_rate', 0.2),
      ('clip', 0.01),
      ('batch_size', 8),
      ('num_workers', 4),
      ('seed', 1),
    ):
      given = {} if name == 'as it is' else {name: value}
      self._run(name, cells='none:none', **given)
      losses[name] = self._final(name)
    self.assertLen(set(losses.values()), len(losses))

  @pytest.mark.slow
  def test_memory_repairs_power_sgd(self):
    """As the specification orders them: none, then a sketch, then all of it."""
    results = self._run(
      cells=','.join(
        f'power_sgd:{m}' for m in ('none', 'full', 'coded', 'sketched')
      )
      + ',none:none,unbiased_rank:none',
      num_seeds=2,
      num_workers=8,
      num_steps=300,
      batch_size=16,
    )
    loss = lambda cell: results[f'digits.{cell}.train_loss']
    held = lambda cell: results[f'digits.{cell}.memory_bytes']
    full = loss('power_sgd.full')
    self.assertLess(full, 0.7 * loss('power_sgd.none'))
    self.assertAlmostEqual(loss('power_sgd.coded') / full, 1, delta=0.2)
    self.assertLess(loss('power_sgd.none'), loss('unbiased_rank.none'))
    self.assertLess(held('power_sgd.coded'), 0.27 * held('power_sgd.full'))
    self.assertLess(held('power_sgd.sketched'), 0.25 * held('power_sgd.full'))

  @pytest.mark.slow
  def test_a_seed_that_diverges_ends_no_other(self):
    results = self._run(cells='none:none', learning_rate=1e30, num_seeds=2)
    self.assertEqual(results['digits.none.none.num_diverged'], 2)
    self.assertTrue(all(map(math.isfinite, results.values())))

  @parameterized.parameters(
    (dict(problem='reddi'), "problem must be one of .* got 'reddi'"),
    (dict(problem='text,text'), "problem must differ, got 'text,text'"),
    (dict(cells='sign'), "cells must be CODE:MEMORY of .* got 'sign'"),
    (dict(cells='sign:some'), "cells must be .* got 'sign:some'"),
    (dict(cells='sign:full,sign:full'), 'cells must differ'),
    (dict(seed=-1), 'seed must be at least 0, got -1'),
    (dict(num_seeds=0), 'num_seeds must be at least 1, got 0'),
    (dict(num_steps=0), 'num_steps must be at least 1, got 0'),
    (dict(batch_size=0), 'batch_size must be at least 1, got 0'),
    (dict(length=0), 'length must be at least 1, got 0'),
    (dict(num_evaluations=0), 'num_evaluations must be at least 1, got 0'),
    (dict(eval_windows=0), 'eval_windows must be at least 1, got 0'),
    (dict(num_workers=0), 'num_workers must be at least 1, got 0'),
    (dict(num_workers=9), 'num_workers must be at most the 8 devices, got 9'),
    (dict(rank=0), 'rank must be at least 1, got 0'),
    (dict(learning_rate=0.0), 'learning_rate must be finite and above 0'),
    (dict(clip=math.inf), 'clip must be finite and above 0, got inf'),
    (dict(preset='llama'), "preset must be one of .* got 'llama'"),
    (dict(fraction=0.0), r'fraction must be in \(0, 1\], got 0'),
    (dict(hybrid_fraction=2.0), r'fraction must be in \(0, 1\], got 2'),
    (dict(sketch_size=2.0), r'size must be in \(0, 1\], got 2'),
    (dict(retention=1.0), r'retention must be in \[0, 1\), got 1'),
    (dict(levels=0), 'levels must be .* got 0'),
    (dict(problem='text', text='/no/such.txt'), '/no/such.txt: expected'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )


class TableTest(parameterized.TestCase):
  def test_every_code_and_memory_stands_in_the_table(self):
    self.assertEqual(list(compression.TABLE), list(compression.CODES))
    used = {m for names in compression.TABLE.values() for m in names}
    self.assertEqual(used, set(compression.MEMORIES))
    every = compression.parse_cells('every')
    self.assertLen(every, len(compression.CODES) * len(compression.MEMORIES))
    self.assertContainsSubset(compression.parse_cells('all'), every)

  @parameterized.parameters(
    ('fraction', 0.2, 'top_k'),
    ('fraction', 0.2, 'random_k'),
    ('fraction', 0.2, 'block_k'),
    ('fraction', 0.2, 'top_k_qsgd'),
    ('rank', 2, 'power_sgd'),
    ('rank', 2, 'unbiased_rank'),
    ('levels', 200, 'qsgd'),
    ('levels', 200, 'k_level'),
    ('levels', 200, 'rotated'),
  )
  def test_options_of_codes_count(self, name, value, code):
    bits = [
      compression.CODES[code].make(config).bits((50, 40))
      for config in (
        compression.Config(),
        compression.Config(**{name: value}),
      )
    ]
    self.assertGreater(bits[1], bits[0])

  @parameterized.parameters(
    ('hybrid_fraction', 0.4, 'hybrid'),
    ('hybrid_fraction', 0.4, 'two_level'),
    ('sketch_size', 0.4, 'sketched'),
  )
  def test_options_of_memories_count(self, name, value, memory):
    nbytes = [
      compression.MEMORIES[memory](config).nbytes((50, 40))
      for config in (
        compression.Config(),
        compression.Config(**{name: value}),
      )
    ]
    self.assertAlmostEqual(nbytes[1] / nbytes[0], 2, delta=0.1)

  def test_retention_counts(self):
    for memory in ('partial', 'sketched'):
      names = [
        compression.MEMORIES[memory](compression.Config(retention=x)).name
        for x in (0.9, 0.5)
      ]
      self.assertNotEqual(*names)

  def test_all_that_a_preset_names_is_there(self):
    for name in ('digits', 'text'):
      for preset in compression.TEXT_PRESETS:
        config = compression.Config(preset=preset)
        plan = compression.make_plan(config, name)
        for code, memory in plan.cells:
          compression.CODES[code].make(config)
          compression.MEMORIES[memory](config)
    plan = compression.make_plan(
      compression.Config(num_steps=7, cells='sign:none'), 'text'
    )
    self.assertEqual((plan.num_steps, plan.cells), (7, [('sign', 'none')]))

  @parameterized.parameters(
    ((3, 3, 16, 32), (144, 32)),
    ((3, 3, 1, 16), (9, 16)),
    ((2, 64, 3, 2, 32), (128, 192)),
    ((100, 64), (100, 64)),
    ((2, 64), (128,)),
    ((5, 7, 100), (35, 100)),
    ((10,), (10,)),
  )
  def test_as_matrices(self, shape, want):
    x = jnp.arange(math.prod(shape)).reshape(shape)
    (got,) = compression.as_matrices([x])
    self.assertEqual(got.shape, want)
    np.testing.assert_array_equal(got.reshape(shape), x)


class FigureTest(parameterized.TestCase):
  def test_a_seed_that_diverged_counts_as_where_it_began(self):
    steps = np.array([0, 10])
    log = {
      'validation_loss': (steps, np.array([[2.0, 2.0], [0.5, np.nan]])),
      'diverged': np.array([False, True]),
      'bits': 8_000,
      'memory_bytes': 0,
    }
    ends = compression_figure.ends(log, 'validation_loss')
    self.assertEqual(ends.tolist(), [0.5, 2.0])
    panel = compression_figure.Panel(
      'two', {('sign', 'none'): log, ('sign', 'full'): log}
    )
    drawn = compression_figure.draw(
      [panel], list(compression.CODES), list(compression.MEMORIES)
    )
    bits, held, way = drawn.axes
    self.assertEqual(bits.lines[0].get_xdata().tolist(), [1.0])
    self.assertEqual(bits.lines[0].get_ydata().tolist(), [1.25])
    self.assertEqual(held.lines[0].get_ydata().tolist(), [1.25, 1.25])
    self.assertEqual(way.lines[0].get_xdata().tolist(), [0.01])
    self.assertEqual(way.lines[0].get_ydata().tolist(), [1.25])
