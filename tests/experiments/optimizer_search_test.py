"""Optimisers from good and bad starts, side by side."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms
from emc2.experiments import optimizer_search, optimizer_search_figure, runner
from emc2.experiments.models import decoder

from tests.experiments import case

TINY = dict(
  b1='0.9,0.99',
  b2='0.501,0.95',
  num_seeds=1,
  num_steps=4,
  batch_size=4,
  num_evaluations=2,
  eval_windows=2,
  length=8,
  digits_model='mlp',
  optimizers='adam,mada',
  reddi_steps=50,
)
STATISTICS = {
  f'{prefix}{name}'
  for prefix in ('', 'validation_')
  for name in ('median', 'mean', 'max')
}


def _adam_by_hand(grads, b1, b2, eps):
  m = v = 0.0
  for t, g in enumerate(grads, 1):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


class OptimizerSearchTest(case.ExperimentTestCase):
  def setUp(self):
    super().setUp()
    # Optax's bias correction counts on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))

  def _run(self, folder='run', **settings):
    config = optimizer_search.Config(**(TINY | settings))
    return runner.start(config, optimizer_search.run, self.folder / folder)

  def _write_text(self):
    path = self.folder / 'text.txt'
    path.write_text('To be, or not to be: that is the question. ' * 10)
    return str(path)

  def _wanted(self, problem):
    own = STATISTICS | {'num_diverged', 'seconds'}
    if problem == 'reddi':
      own = {'x', 'average_regret', 'seconds'}
    names = {
      f'{problem}.{n}.{metric}' for n in ('adam', 'mada') for metric in own
    }
    compared = {'p_value', 'median_difference', 'num_pairs'}
    if problem == 'reddi':
      return names
    return names | {f'{problem}.mada_vs_adam.{metric}' for metric in compared}

  @pytest.mark.slow
  def test_the_worst_start_is_repaired(self):
    results = self._run(
      problem='digits', batch_size=32, num_steps=400, learning_rate=0.03
    )
    self.assertEqual(set(results), self._wanted('digits'))
    self.assertTrue(all(map(math.isfinite, results.values())))
    self.assertLess(
      results['digits.mada.max'], 0.3 * results['digits.adam.max']
    )
    # Of the four starts (0.9, 0.95) is good.
    self.assertEqual(results['digits.mada_vs_adam.num_pairs'], 3)
    stored = json.loads((self.folder / 'run/result.json').read_text())
    self.assertEqual(results, stored)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 50_000)

  @pytest.mark.slow
  def test_all_problems_come_to_a_result_and_a_figure(self):
    results = self._run(problem='digits,text,reddi', text=self._write_text())
    want = set.union(*map(self._wanted, ('digits', 'text', 'reddi')))
    self.assertEqual(set(results), want)
    self.assertTrue(all(map(math.isfinite, results.values())))
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 50_000)

  @parameterized.parameters(*optimizer_search.METHODS)
  @pytest.mark.slow
  def test_every_method_goes_down_on_digits(self, name):
    settings = dict(num_steps=40, b1='0.9', b2='0.95', batch_size=32)
    if name == 'lion':
      settings['learning_rate'] = 0.05
    results = self._run(problem='digits', optimizers=name, **settings)
    self.assertLess(results[f'digits.{name}.max'], 1.6)
    self.assertEqual(results[f'digits.{name}.num_diverged'], 0)

  @pytest.mark.slow
  def test_cnn(self):
    results = self._run(
      problem='digits', optimizers='adam', digits_model='cnn', num_steps=20
    )
    # ln 10 is the loss of a guess.
    self.assertBetween(results['digits.adam.median'], 0.1, 2.3)
    steps, losses = runner.read_metrics(self.folder / 'run/digits/adam/0')[
      'train_loss'
    ]
    np.testing.assert_array_equal(steps, [0, 10, 20])
    self.assertEqual(losses.shape, (3, 4))

  def _train(self, folder, name='mada', **settings):
    config = optimizer_search.Config(**(TINY | settings))
    plan = optimizer_search.make_plan(config, 'digits')
    problem = optimizer_search.make_digits(config, plan)
    return optimizer_search.train(
      config, plan, problem, name, self.folder / folder
    )

  @pytest.mark.slow
  def test_groups_train_as_all_at_once(self):
    whole = self._train('whole', num_seeds=2)
    parts = self._train('parts', num_seeds=2, side_by_side=3)
    self.assertLen(list((self.folder / 'parts').iterdir()), 3)
    for name in ('train_loss', 'validation_loss', 'coefficients/b1'):
      self.assertEqual(parts[name][1].shape[1], 8)
      np.testing.assert_allclose(parts[name][1], whole[name][1], rtol=1e-5)

  @pytest.mark.slow
  def test_starts_and_seeds_are_what_they_say(self):
    log = self._train('run', num_seeds=2, num_steps=1)
    first = log['train_loss'][1][0]
    # All starts of a seed begin at one point.
    np.testing.assert_array_equal(first[:4], first[0])
    self.assertNotAlmostEqual(first[0], first[4], places=4)
    b1, b2 = (log[f'coefficients/{name}'][1][0] for name in ('b1', 'b2'))
    np.testing.assert_allclose(b1, [0.9, 0.9, 0.99, 0.99] * 2, rtol=1e-6)
    np.testing.assert_allclose(b2, [0.501, 0.95] * 4, rtol=1e-6)
    other = self._train('other', seed=1, num_steps=1)['train_loss'][1][0]
    self.assertNotAlmostEqual(other[0], first[0], places=4)

  @pytest.mark.slow
  def test_runs_diverge(self):
    log = self._train('run', 'adam', learning_rate=1e8, num_steps=6)
    self.assertTrue(log['diverged'].any())

  @pytest.mark.slow
  def test_what_mada_learns_hangs_on_its_settings(self):
    def learned(folder, **settings):
      log = self._train(folder, learning_rate=0.03, num_steps=8, **settings)
      # Counted from after the first step, which learns nothing.
      paths = [log[f'coefficients/{n}'][1] for n in transforms.COEFFICIENTS]
      return np.ptp(paths, axis=1).max(), log['train_loss'][1][-1]

    still, losses = learned('still', hyper_learning_rate=0.0)
    self.assertEqual(still, 0)
    adam = self._train('adam', 'adam', learning_rate=0.03, num_steps=8)
    np.testing.assert_allclose(losses, adam['train_loss'][1][-1], rtol=1e-3)
    slow, _ = learned('slow', hyper_learning_rate=0.01, hyper_momentum=0.0)
    fast, _ = learned('fast', hyper_learning_rate=0.01, hyper_momentum=0.9)
    self.assertGreater(slow, 1e-5)
    self.assertGreater(fast, 1.5 * slow)

  def test_a_run_that_diverges_counts_as_its_beginning(self):
    config = optimizer_search.Config(**TINY)
    plan = optimizer_search.make_plan(config, 'digits')
    losses = np.array([[2.0] * 4, [1.0, 3.0, np.nan, 0.5]])
    log = {name: ([0, 4], losses) for name in ('train_loss', 'validation_loss')}
    log |= {'diverged': np.array([False, True, True, False]), 'seconds': 1.0}
    summary = optimizer_search.summarize(plan, {'lion': log})
    self.assertEqual(summary['lion.num_diverged'], 2)
    self.assertEqual(summary['lion.max'], 2.0)
    self.assertEqual(summary['lion.mean'], (1 + 2 + 2 + 0.5) / 4)
    self.assertEqual(summary['lion.validation_median'], 1.5)
    self.assertNotIn('mada_vs_adam.p_value', summary)

  def test_signed_ranks(self):
    ours = np.zeros(6)
    # The negative ranks are 1 and 2: of 64 signs 5 have so small a sum, W <= 3.
    theirs = np.array([-0.1, -0.2, 0.3, 0.4, 0.5, 0.6])
    found = optimizer_search.compare(ours, theirs)
    self.assertAlmostEqual(found['p_value'], 2 * 5 / 64)
    self.assertAlmostEqual(found['median_difference'], -0.35)
    self.assertEqual(found['num_pairs'], 6)
    self.assertEqual(optimizer_search.compare(ours, ours)['p_value'], 1.0)

  def _updates(self, name, grads, b1=0.8, b2=0.7, **plan):
    config = optimizer_search.Config()
    plan = optimizer_search.make_plan(config, 'digits')._replace(**plan)

    @jax.jit
    def update(grads, state, params, b1, b2):
      tx = optimizer_search.make_transform(config, plan, name, b1, b2)
      return tx.update(grads, state, params, hyper_grads=grads)

    params = {'matrix': jnp.ones((2, 2)), 'vector': jnp.ones(3)}
    state = optimizer_search.make_transform(config, plan, name, b1, b2).init(
      params
    )
    for g in grads:
      g = jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params)
      updates, state = update(g, state, params, b1, b2)
      yield jax.tree.map(lambda x: float(np.unique(x).item()), updates)

  def test_adam_and_lion_by_hand(self):
    grads = [1.0, -3.0, 0.5]
    want = _adam_by_hand(grads, 0.8, 0.7, 1e-8)
    found = self._updates('adam', grads, learning_rate=0.1)
    by_optax = optax.adam(0.1, 0.8, 0.7)
    x = jnp.zeros(1)
    state = by_optax.init(x)
    for g, u, got in zip(grads, want, found, strict=True):
      self.assertAlmostEqual(got['vector'], -0.1 * u, places=6)
      plain, state = by_optax.update(jnp.full(1, g), state)
      self.assertAlmostEqual(got['vector'], plain[0].item(), places=6)
    found = self._updates('lion', grads, learning_rate=0.1)
    momentum = 0.0
    for g, got in zip(grads, found, strict=True):
      sign = np.sign(0.8 * momentum + 0.2 * g)
      self.assertAlmostEqual(got['vector'], -0.01 * sign, places=6)
      momentum = 0.7 * momentum + 0.3 * g

  def test_adan_keeps_its_decay_of_differences(self):
    grads = [1.0, -3.0, 0.5]
    m = v = n = last = 0.0
    for t, (g, got) in enumerate(
      zip(grads, self._updates('adan', grads, learning_rate=0.1), strict=True),
      1,
    ):
      d = g - last if t > 1 else 0.0
      m = 0.8 * m + 0.2 * g
      v = 0.92 * v + 0.08 * d
      n = 0.7 * n + 0.3 * (g + 0.08 * d) ** 2
      mean, slope = m / (1 - 0.8**t), v / (1 - 0.92**t)
      u = (mean + 0.08 * slope) / np.sqrt(n / (1 - 0.7**t))
      self.assertAlmostEqual(got['matrix'], -0.1 * u, places=6)
      last = g

  def test_warm_up_decay_and_clipping(self):
    plan = dict(learning_rate=0.1, num_steps=10, warmup=2)
    rates = [-u['vector'] for u in self._updates('adam', [1.0] * 11, **plan)]
    np.testing.assert_allclose(rates[:3], [0, 0.05, 0.1], atol=1e-6)
    self.assertAlmostEqual(rates[10], 0.01, places=6)
    plan = dict(learning_rate=0.1, weight_decay=0.5)
    (decayed,) = self._updates('adam', [1.0], **plan)
    self.assertAlmostEqual(decayed['vector'], -0.1, places=6)
    self.assertAlmostEqual(decayed['matrix'], -0.15, places=6)
    # Adam's second step tells how large the first gradient was.
    norm = 10 * math.sqrt(7)
    grads = [10.0, 0.1]
    clipped = list(self._updates('adam', grads, learning_rate=0.1, clip=1.0))
    want = list(_adam_by_hand([10 / norm, 0.1], 0.8, 0.7, 1e-8))
    self.assertAlmostEqual(clipped[1]['vector'], -0.1 * want[1], places=6)

  def test_presets_of_text(self):
    config = optimizer_search.Config(preset='gpt2_small', num_steps=7)
    plan = optimizer_search.make_plan(config, 'text')
    self.assertEqual((plan.length, plan.num_steps, plan.clip), (1024, 7, 1.0))
    self.assertEqual(plan.side_by_side, 1)
    params = jax.eval_shape(
      lambda key: decoder.draw_params(decoder.PRESETS['gpt2_small'], key),
      jax.random.key(0),
    )
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    self.assertAlmostEqual(sum(sizes) / 124e6, 1, delta=0.01)

  @pytest.mark.slow
  def test_text_of_a_file_is_what_is_learnt(self):
    results = self._run(
      problem='text',
      text=self._write_text(),
      optimizers='adam',
      num_steps=60,
      b1='0.9',
      b2='0.95',
      length=16,
    )
    # The sentence says itself again; docstrings would stay above 2.5.
    self.assertLess(results['text.adam.validation_max'], 1.5)

  def test_reddi_by_hand(self):
    results = self._run(problem='reddi', optimizers='adam', reddi_steps=1_000)
    x, total, m, v = 0.0, 0.0, 0.0, 0.0
    for t in range(1, 1_001):
      x = min(max(x, -1.0), 1.0)
      slope = 1010.0 if t % 101 == 1 else -10.0
      total += slope * (x + 1)
      seen = x
      m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
      step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6)
      x -= 1e-3 * step
    self.assertAlmostEqual(results['reddi.adam.x'], seen, delta=1e-4)
    self.assertAlmostEqual(
      results['reddi.adam.average_regret'], total / 1_000, delta=1e-3
    )

  @pytest.mark.slow
  def test_reddi_is_as_the_specification_says(self):
    results = self._run(
      problem='reddi', optimizers='adam,mada,avgrad', reddi_steps=200_000
    )
    for name, x, regret in (
      ('adam', 0.994, 0.223),
      ('mada', 0.328, 0.156),
      ('avgrad', -0.204, 0.134),
    ):
      self.assertAlmostEqual(results[f'reddi.{name}.x'], x, delta=2e-3)
      self.assertAlmostEqual(
        results[f'reddi.{name}.average_regret'], regret, delta=1e-3
      )
    rho = runner.read_metrics(self.folder / 'run/reddi/mada')[
      'coefficients/rho'
    ][1]
    self.assertLess(rho[-1], 0.05)

  @pytest.mark.slow
  def test_table_of_the_specification(self):
    settings = dict(
      problem='digits',
      optimizers='adam,hyper_adam,mada',
      num_seeds=3,  # Medians of one seed hang on the order of its sums.
      side_by_side=36,
      num_steps=1_000,
      b1=None,
      b2=None,
      batch_size=32,
    )
    for rate in (1e-2, 3e-2):
      found = self._run(f'{rate}', learning_rate=rate, **settings)
      worst = {n: found[f'digits.{n}.max'] for n in ('adam', 'mada')}
      self.assertLessEqual(worst['mada'], 0.1 * worst['adam'])
      medians = [
        found[f'digits.{name}.median']
        for name in ('mada', 'hyper_adam', 'adam')
      ]
      self.assertEqual(medians, sorted(medians))
    # The hyper-gradient is in proportion to the learning rate.
    found = self._run('slow', learning_rate=1e-3, **settings)
    for statistic in ('median', 'max'):
      of = lambda name, s=statistic: found[f'digits.{name}.{s}']
      self.assertAlmostEqual(of('mada') / of('adam'), 1, delta=0.1)

  @parameterized.parameters(
    ({'problem': 'imagenet'}, "problem must be some of .*'reddi'.*'imagenet'"),
    ({'problem': 'text,text'}, "problem must differ, got 'text,text'"),
    ({'optimizers': 'sgd'}, "optimizers must be some of .*'mada'.* got 'sgd'"),
    ({'optimizers': ''}, "optimizers must be some of .* got ''"),
    ({'optimizers': 'adam,adam'}, "optimizers must differ, got 'adam,adam'"),
    (
      {'optimizers': 'hyper_adam', 'problem': 'reddi'},
      'optimizers must name another than hyper_adam',
    ),
    ({'b1': '0.9,x'}, r"b1 must be numbers in \(0, 1\), .* got '0.9,x'"),
    ({'b2': '1.0'}, r"b2 must be numbers in \(0, 1\), .* got '1.0'"),
    ({'b2': 'nan'}, r"b2 must be numbers in \(0, 1\), .* got 'nan'"),
    ({'b1': '0.9,0.9'}, "b1 must differ, got '0.9,0.9'"),
    ({'b2': '0.3'}, r'b2 must be in its bounds \[0.501, 0.99\], got 0.3'),
    ({'b1': '0.999'}, r'b1 must be in its bounds \[0.01, 0.99\], got 0.999'),
    ({'seed': -1}, 'seed must be at least 0, got -1'),
    ({'num_seeds': 0}, 'num_seeds must be at least 1, got 0'),
    ({'num_steps': 0}, 'num_steps must be at least 1, got 0'),
    ({'batch_size': 0}, 'batch_size must be at least 1, got 0'),
    ({'side_by_side': 0}, 'side_by_side must be at least 1, got 0'),
    ({'length': 0}, 'length must be at least 1, got 0'),
    ({'num_evaluations': 0}, 'num_evaluations must be at least 1, got 0'),
    ({'eval_windows': 0}, 'eval_windows must be at least 1, got 0'),
    ({'reddi_steps': 0}, 'reddi_steps must be at least 1, got 0'),
    ({'learning_rate': 0.0}, 'learning_rate must be .* positive, got 0'),
    ({'learning_rate': math.inf}, 'learning_rate must be finite .* got inf'),
    ({'eps': 0.0}, 'eps must be finite and positive, got 0'),
    ({'hyper_learning_rate': -1.0}, 'hyper_learning_rate must be .* got -1'),
    ({'hyper_momentum': 1.0}, r'hyper_momentum must be in \[0, 1\), got 1'),
    ({'digits_model': 'vit'}, "digits_model must be one of .* got 'vit'"),
    ({'preset': 'llama_7b'}, "preset must be one of .* got 'llama_7b'"),
    ({'text': '/no/such.txt'}, '/no/such.txt: expected a text file, got none'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  def test_where_mada_is_not_asked_its_bounds_are_not_either(self):
    config = optimizer_search.Config(optimizers='adam', b2='0.3,0.999')
    _, _, plans = optimizer_search.check(config)
    self.assertEqual(plans['digits'].b2, [0.3, 0.999])

  @parameterized.parameters(
    ((0.9, 0.99), True),
    ((0.9, 0.9), True),
    ((0.99, 0.99), False),
    ((0.9, 0.8), False),
    ((0.5, 0.99), False),
  )
  def test_which_starts_are_good(self, start, good):
    self.assertEqual(optimizer_search.is_good(start), good)


class FigureTest(parameterized.TestCase):
  def test_a_run_that_diverged_is_marked_where_it_began(self):
    steps = np.array([0, 10])
    losses = steps, np.array([[2.0, 2.0, 2.0], [0.5, np.nan, 0.25]])
    log = {'train_loss': losses, 'validation_loss': losses}
    log['diverged'] = np.array([False, True, False])
    panel = optimizer_search_figure.Trained(
      'three', {'lion': log}, np.array([True, False, False])
    )
    drawn = optimizer_search_figure.draw([panel])
    ends, way, _ = drawn.axes
    bad, good, diverged, _ = ends.collections
    self.assertEqual(bad.get_offsets()[:, 1].tolist(), [0.25])
    self.assertEqual(good.get_offsets()[:, 1].tolist(), [0.5])
    self.assertEqual(diverged.get_offsets()[:, 1].tolist(), [2.0])
    self.assertEqual(way.lines[0].get_ydata().tolist(), [2.0, 0.5])
