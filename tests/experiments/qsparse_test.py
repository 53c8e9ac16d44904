"""Local steps and coded uploads on digits, counted in bits."""

import json
import math

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import qsparse, qsparse_figure, runner

from tests.experiments import case

TINY = dict(
  even='vanilla,signed_4',
  sorted='none',
  num_seeds=2,
  num_workers=3,
  batch_size=2,
  num_steps=8,
  check_every=4,
  target=2.3,
)


class QsparseTest(case.ExperimentTestCase):
  def _run(self, **settings):
    config = qsparse.Config(**(TINY | settings))
    return runner.start(config, qsparse.run, self.folder / 'run')

  def test_results_and_figure(self):
    results = self._run()
    # Uploads of 3 workers, 2 times or 8, of 472 or 32 * 650 bits.
    self.assertEqual(results['even.signed_4.bits'], 3 * 2 * 472)
    self.assertEqual(results['even.vanilla.bits'], 3 * 8 * 20_800)
    self.assertEqual(results['even.vanilla.saving'], 1.0)
    names = [
      'loss',
      'accuracy',
      'bits',
      'num_hits',
      'hit_step',
      'hit_bits',
      'saving',
    ]
    self.assertEqual(
      set(results),
      {f'even.{m}.{name}' for m in ('vanilla', 'signed_4') for name in names},
    )
    self.assertTrue(all(map(math.isfinite, results.values())))
    stored = json.loads((self.folder / 'run/result.json').read_text())
    self.assertEqual(results, stored)
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 50_000)

  @pytest.mark.slow
  def test_master_is_the_mean_of_gradients(self):
    """One step of vanilla, from the rows that its key draws."""
    self._run(even='vanilla', num_steps=1, check_every=1, num_seeds=1)
    data = qsparse.read(3, 'even')
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    _, rows_key = jax.random.split(key)
    places = jax.random.randint(rows_key, (3, 2), 0, 500)
    rows = np.take_along_axis(np.asarray(data['held']), np.asarray(places), 1)
    images, labels = (np.asarray(x)[rows.ravel()] for x in data['train'])
    images = np.concatenate([images, np.ones((6, 1))], axis=1)
    weights = 0.5 * images.T @ (np.eye(10)[labels] - 0.1) / 6
    images, labels = map(np.asarray, data['train'])
    logits = images @ weights[:-1] + weights[-1]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[range(1500), labels]
    want = losses.mean() + 0.5 / 1500 * np.sum(weights**2)
    log = runner.read_metrics(self.folder / 'run/even/vanilla')
    np.testing.assert_allclose(log['train_loss'][1][-1], want, rtol=1e-4)

  @parameterized.parameters('mlp', 'cnn')
  @pytest.mark.slow
  def test_nets(self, problem):
    results = self._run(
      problem=problem,
      even='vanilla,quantized_8',
      num_workers=5,
      batch_size=8,
      num_steps=200,
      check_every=50,
      target=1.0,
      momentum_policy='average',
    )
    self.assertLess(results['even.quantized_8.loss'], 0.7)
    self.assertGreater(results['even.quantized_8.saving'], 8)

  def test_split(self):
    even, by_class = (qsparse.read(15, name) for name in ('even', 'sorted'))
    for data in (even, by_class):
      held = np.sort(np.asarray(data['held']).ravel())
      np.testing.assert_array_equal(held, np.arange(1500))
      self.assertEqual(data['test'][1].shape, (297,))
    labels = np.asarray(by_class['train'][1])
    for rows in np.asarray(by_class['held']):
      self.assertLessEqual(np.unique(labels[rows]).size, 2)
    for rows in np.asarray(even['held']):
      self.assertEqual(np.unique(labels[rows]).size, 10)

  @parameterized.parameters(
    (dict(problem='lda'), 'problem must be one of'),
    (dict(even='sgd'), 'even must be'),
    (dict(sorted='vanilla,vanilla'), 'sorted must be'),
    (dict(even='none'), "must not both be 'none'"),
    (dict(num_workers=2000), 'num_workers must be at most 1500, got 2000'),
    (dict(batch_size=0), 'batch_size must be at least 1, got 0'),
    (dict(k=0), 'k must be at least 1, got 0'),
    (dict(momentum=1.0), r'momentum must be in \[0, 1\), got 1.0'),
    (dict(learning_rate=0.0), 'learning_rate must be finite and above 0'),
    (dict(momentum_policy='drop'), 'momentum_policy must be one of'),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      qsparse.check(qsparse.Config(**(TINY | settings)))

  @pytest.mark.slow
  def test_table(self):
    """What the specification requires, with its numbers."""
    results = self._run(
      even='all',
      sorted='some',
      num_seeds=1,
      num_workers=15,
      batch_size=8,
      num_steps=2000,
      check_every=20,
      target=0.25,
    )
    get = lambda name, metric='loss', split='even': results[
      f'{split}.{name}.{metric}'
    ]
    with_memory = [name for name, m in qsparse.METHODS.items() if m.memory]
    for name in with_memory:
      np.testing.assert_allclose(get(name), get('vanilla'), rtol=0.01)
    savings = {
      'local_8': 8.3,
      'top_k_1': 12.9,
      'top_k_8': 111,
      'quantized_1': 32,
      'quantized_8': 293,
      'signed_1': 46,
      'signed_4': 190,
      'signed_8': 396,
      'sign_1': 30,
      'qsgd_1': 5.5,
      'async_quantized_8': 151,
      'async_signed_8': 206,
    }
    for name, want in savings.items():
      np.testing.assert_allclose(get(name, 'saving'), want, rtol=0.12)
    for period in (1, 8):
      at = [
        get(f'{code}_{period}', 'saving')
        for code in ('top_k', 'quantized', 'signed')
      ]
      self.assertEqual(at, sorted(at))
      self.assertGreater(at[0], get('local_8', 'saving'))
    # 2 H / (H + 1) times as many uploads.
    ratio = get('async_signed_8', 'bits') / get('signed_8', 'bits')
    np.testing.assert_allclose(ratio, 16 / 9, rtol=0.02)
    self.assertGreater(get('top_k_1_no_memory'), 0.7)
    self.assertGreater(get('signed_8_no_memory'), 0.25)
    unlike = {
      'vanilla': 0.2211,
      'signed_1': 0.2212,
      'sign_1': 0.2233,
      'local_8': 0.271,
      'signed_8': 0.271,
      'signed_1_no_memory': 2.155,
      'sign_1_no_memory': 24.6,
    }
    for name, want in unlike.items():
      np.testing.assert_allclose(get(name, split='sorted'), want, rtol=0.05)


class FigureTest(parameterized.TestCase):
  def test_hits_of_seeds(self):
    loss = np.array([[3.0, 3.0, 0.5], [0.5, 3.0, 2.0]])
    bits = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    curve = qsparse_figure.Curve(np.array([0, 20]), bits, loss, loss)
    found = qsparse_figure.hit(curve, 1.0)
    self.assertEqual(found.steps.tolist(), [20, np.inf, 0])
    self.assertEqual(found.bits.tolist(), [4, np.inf, 3])
    summary = qsparse.summarize({'vanilla': curve}, 1.0)
    self.assertEqual(summary['vanilla.num_hits'], 2)
    self.assertEqual(summary['vanilla.hit_bits'], 4)
    # No seed of this one comes to the target.
    summary = qsparse.summarize({'vanilla': curve}, 0.1)
    self.assertNotIn('vanilla.hit_bits', summary)
    self.assertEqual(summary['vanilla.loss'], 2.0)
