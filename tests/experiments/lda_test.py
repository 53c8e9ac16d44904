"""The topic-model experiment: every algorithm, setting and file."""

import json
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.experiments import lda, lda_figure, runner
from emc2.experiments.data import document_batches
from emc2.topics import lda as methods_lib

SMALL = dict(
  topics=3, passes=3, online_passes=2, blocks=2, tile=8, batch_size=20,
  evaluations=4, eta=0.1,
)  # fmt: skip


def _counts(num_documents=60, num_words=30, num_topics=3):
  rng = np.random.default_rng(0)
  topics = rng.dirichlet(np.full(num_words, 0.1), num_topics)
  shares = rng.dirichlet(np.full(num_topics, 0.2), num_documents)
  return np.stack([rng.multinomial(40, p) for p in shares @ topics])


def _write(counts, path):
  """Writes lda-c."""
  lines = []
  for row in counts:
    pairs = [f'{i}:{row[i]}' for i in np.flatnonzero(row)]
    lines.append(' '.join([str(len(pairs)), *pairs]))
  path.write_text('\n'.join([*lines, '']))


class LdaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    # Optax's and TensorBoard's helpers count on promotion.
    self.enter_context(jax.numpy_dtype_promotion('standard'))
    one = mock.patch.object(jax, 'device_count', return_value=1)
    self.enter_context(one)

  def _file(self):
    path = self.folder / 'few.dat'
    _write(_counts(), path)
    words = [f'w{i}' for i in range(30)]
    (self.folder / 'few_vocab.txt').write_text('\n'.join([*words, '']))
    return str(path)

  def _run(self, folder='run', **settings):
    settings = SMALL | dict(corpus=self._file()) | settings
    return runner.start(lda.Config(**settings), lda.run, self.folder / folder)

  @pytest.mark.slow
  def test_every_algorithm(self):
    self._check_run('all', lda.ALGORITHMS)

  @pytest.mark.slow
  def test_two_algorithms(self):
    self._check_run('cvb0,svi', ('cvb0', 'svi'))

  def _check_run(self, algorithm, names):
    results = self._run(
      algorithm=algorithm, passes=20, online_passes=5, evaluations=3
    )
    folder = self.folder / 'run'
    self.assertEqual(results, json.loads((folder / 'result.json').read_text()))
    keys = ('perplexity', 'elbo', 'coherence', 'seconds')
    want = {f'{name}.{key}' for name in names for key in keys}
    self.assertEqual(set(results), want | {'documents', 'words', 'tokens'})
    self.assertEqual(results['documents'], 60)
    self.assertEqual(results['words'], 30)
    self.assertEqual(results['tokens'], 2400)
    for name in names:
      series = runner.read_metrics(folder / name)
      steps, found = series['perplexity']
      self.assertLessEqual(len(steps), 3)
      self.assertEqual(found[-1], results[f'{name}.perplexity'])
      self.assertEqual(series['elbo'][1][-1], results[f'{name}.elbo'])
      self.assertLess(found[-1], found[0])
      self.assertBetween(found[-1], 5, 30)
      self.assertGreater(series['elbo'][1][-1], series['elbo'][1][0])
    self.assertGreater((folder / 'figure.png').stat().st_size, 30_000)
    text = (folder / 'topics.txt').read_text().splitlines()
    self.assertLen(text, len(names) * 5 - 1)
    self.assertRegex(text[1], r'^ *\d+\.\d%  ?-?\d\.\d+  w\d+ w\d+ ')

  @pytest.mark.slow
  def test_bound_of_topics_by_hand(self):
    """Of one pass of VI from known sums, against `elbo` on the whole corpus."""
    config = lda.Config(**(SMALL | dict(corpus=self._file())))
    data = lda.read(config)
    method = lda.make_methods(config, ['vi'], data)['vi']
    state = method.init(jax.random.key(0))
    found = lda.make_evaluate(config, method, data)(state)
    documents = methods_lib.from_csr(data.training.counts)
    words, sums = method.word_sums(state), method.document_sums(state)
    by_word = np.bincount(documents.word_ids, documents.counts, 30)
    np.testing.assert_allclose(words.sum(1), by_word, rtol=1e-5)
    lengths = np.bincount(documents.document_ids, documents.counts)
    np.testing.assert_allclose(sums.sum(1), lengths, rtol=1e-5)
    want = methods_lib.inference.perplexity(
      words, data.observed, data.evaluated, alpha=config.alpha, eta=config.eta
    )
    self.assertEqual(found['perplexity'], want)
    self.assertBetween(found['elbo'] / documents.num_tokens, -6, -2)

  @pytest.mark.slow
  def test_stream(self):
    path = self._file()
    results = self._run(
      algorithm='svi',
      stream=True,
      vocabulary=str(self.folder / 'few_vocab.txt'),
    )
    keys = ('perplexity', 'coherence', 'seconds')
    want = {f'{name}.{key}' for name in ['svi'] for key in keys}
    self.assertEqual(set(results), want | {'documents', 'words', 'tokens'})
    self.assertIn('w', (self.folder / 'run/topics.txt').read_text())
    self.assertGreater((self.folder / 'run/figure.png').stat().st_size, 10_000)
    self.assertEqual(
      lda.check(lda.Config(corpus=path, stream=True)), ['svi', 'scvb0']
    )
    config = lda.Config(**(SMALL | dict(corpus=path, stream=True)))
    data = lda.read(config)
    np.testing.assert_array_equal(data.held_out, np.arange(6) * 10)
    held = data.observed.num_tokens + data.evaluated.num_tokens
    self.assertEqual(held, _counts()[::10].sum())

  def test_stream_leaves_out_what_is_held_out(self):
    stream = document_batches.stream(self._file(), batch_size=25, max_words=30)
    held_out = np.array([0, 10, 59])
    batches = lda.WithoutHeldOut(iter(stream), held_out, 60)
    lengths, state = [], None
    for number in range(4):
      if number == 2:
        state = batches.get_state()
      lengths.append(next(batches).counts.sum(1))
    want = np.where(np.isin(np.arange(100) % 60, held_out), 0, 40)
    np.testing.assert_array_equal(np.concatenate(lengths), want)
    again = lda.WithoutHeldOut(iter(stream), held_out, 60)
    again.set_state(state)
    np.testing.assert_array_equal(next(again).counts.sum(1), want[50:75])

  @parameterized.parameters(
    ('esvi', dict(alpha=0.5), dict(alpha=0.5)),
    ('esvi', dict(eta=0.5), dict(eta=0.5)),
    ('esvi', dict(concentration=1.0), dict(concentration=1.0)),
    ('esvi', dict(storage='phi'), dict(storage='phi', top_c=None)),
    ('esvi', dict(pi_sync='epoch'), dict(pi_sync='epoch')),
    ('esvi_topk', dict(top_c=2), dict(storage='topk', top_c=2)),
    ('vi', dict(document_steps=2), dict(document_steps=2)),
    ('vi', dict(concentration=1.0), dict(concentration=1.0)),
    ('cvb0', dict(alpha=0.5), dict(alpha=0.5)),
    ('svi', dict(max_steps=7), dict(max_steps=7)),
    ('scvb0', dict(eta=0.5), dict(eta=0.5)),
  )
  def test_settings_reach_the_method(self, name, given, want):
    module = getattr(methods_lib, name.removesuffix('_topk'))
    config = lda.Config(**(SMALL | dict(corpus=self._file()) | given))
    make = name.removesuffix('_topk')
    with mock.patch.object(module, make, wraps=getattr(module, make)) as spy:
      lda.make_methods(config, [name], lda.read(config))
    self.assertEqual(spy.call_args.args, (3, 30))
    self.assertEqual(spy.call_args.kwargs, spy.call_args.kwargs | want)

  def test_settings_count(self):
    def make(name, **given):
      config = lda.Config(**(SMALL | dict(corpus=self._file()) | given))
      data = lda.read(config)
      return lda.make_methods(config, [name], data)[name], data

    cells = make('esvi', blocks=5, tile=4, held_out=0.2)[0].constants
    self.assertEqual(cells.counts.shape[:2], (1, 5))
    self.assertEqual(cells.counts.shape[3], 4)
    self.assertEqual(make('esvi', held_out=0.2)[1].training.num_documents, 48)
    method, data = make('svi', batch_size=9, online_passes=4)
    self.assertEqual((method.steps_per_pass, method.num_steps), (6, 24))
    self.assertEqual(next(method.batches()).counts.shape[0], 9)
    other = make('svi', seed=1)[1].training.counts
    self.assertNotEqual((other != data.training.counts).nnz, 0)
    with mock.patch.object(methods_lib.svi, 'svi') as spy:
      make('svi', delay=2.0)
    schedule = spy.call_args.kwargs['step_size']
    self.assertAlmostEqual(schedule(1.0), 3**-0.7)

  def test_words_that_are_kept_dense(self):
    config = lda.Config(**(SMALL | dict(corpus=self._file(), dense_share=0.5)))
    made = lda.make_methods(config, ['vi', 'cvb0'], lda.read(config))
    self.assertGreater(made['vi'].constants.dense.shape[-1], 0)
    self.assertEqual(made['cvb0'].constants.dense.shape[-1], 0)

  @parameterized.parameters(
    (dict(algorithm='gibbs'), "algorithm must be 'all' or some of .*'gibbs'"),
    (dict(algorithm='vi,vi'), "algorithm must not repeat, got 'vi,vi'"),
    (dict(algorithm='vi', stream=True), "some of .* with stream, got 'vi'"),
    (dict(corpus='docstrings', stream=True), 'corpus must be a file with str'),
    (dict(topics=1), 'topics must be at least 2, got 1'),
    (dict(alpha=0.0), 'alpha must be finite and above 0, got 0'),
    (dict(eta=float('nan')), 'eta must be finite and above 0, got nan'),
    (dict(passes=0), 'passes must be at least 1, got 0'),
    (dict(blocks=0), 'blocks must be at least 1, got 0'),
    (dict(blocks=31), 'num_blocks must be at most the number of words, 30'),
    (dict(held_out=1.0), r'held_out must lie in \(0, 1\), got 1'),
    (dict(held_out=0.001), 'held_out must leave a document in each part'),
    (dict(top_c=4), r'top_c must lie in \[1, 3\], the number of topics'),
    (dict(storage='disk'), "storage must be one of .*got 'disk'"),
    (dict(pi_sync='never'), "pi_sync must be one of .*got 'never'"),
    (dict(concentration=-1.0), 'concentration must be at least 0, got -1'),
    (dict(dense_share=2.0), r'dense_share must lie in \[0, 1\], got 2'),
    (dict(batch_size=55), 'batch_size must be at most the 54 documents'),
    (dict(delay=0.0), 'delay must be finite and at least 1, got 0'),
    (dict(seed=-1), 'seed must be at least 0, got -1'),
    (dict(corpus='/nowhere.dat'), '/nowhere.dat: expected .docstrings. or'),
  )
  def test_bad_settings_end_before_the_first_step(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self._run(**given)
    self.assertEqual(
      [path.name for path in (self.folder / 'run').iterdir()], ['config.json']
    )

  def test_a_broken_file_is_named_with_its_line(self):
    path = self.folder / 'broken.dat'
    path.write_text('1 0:2\n2 0:1\n')
    for stream in (False, True):
      config = lda.Config(**(SMALL | dict(corpus=str(path), stream=stream)))
      with self.assertRaisesRegex(ValueError, 'broken.dat:2: expected 2 pairs'):
        lda.read(config)

  @parameterized.parameters(('esvi', False), ('svi', True))
  @pytest.mark.slow
  def test_goes_on_after_a_cut(self, name, stream):
    config = lda.Config(**(SMALL | dict(corpus=self._file(), stream=stream)))
    data = lda.read(config)
    method = lda.make_methods(config, [name], data)[name]
    fit = lambda folder: lda.train(
      config, name, method, data, self.folder / folder
    )
    whole, train = fit('whole'), runner.train

    def cut(*args, num_steps, **kwargs):
      train(*args, num_steps=2, **kwargs)
      raise KeyboardInterrupt

    with (
      mock.patch.object(runner, 'train', cut),
      self.assertRaises(KeyboardInterrupt),
    ):
      fit('cut')
    np.testing.assert_array_equal(whole, fit('cut'))
    last = lambda folder: runner.read_metrics(self.folder / folder)
    self.assertEqual(
      last('whole')['perplexity'][1][-1], last('cut')['perplexity'][1][-1]
    )


class DevicesTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_2_devices(self):
    self.enter_context(jax.numpy_dtype_promotion('standard'))
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'few.dat'
    _write(_counts(), path)
    config = lda.Config(**(SMALL | dict(corpus=str(path), passes=15)))
    devices = jax.devices()[:2]
    with (
      mock.patch.object(jax, 'device_count', return_value=2),
      mock.patch.object(jax, 'devices', return_value=devices),
    ):
      data = lda.read(config)
      method = lda.make_methods(config, ['esvi'], data)['esvi']
      self.assertLen(method.constants.counts.devices(), 2)
      words = lda.train(config, 'esvi', method, data, folder / 'run')
    by_word = np.asarray(data.training.counts.sum(axis=0)).ravel()
    np.testing.assert_allclose(words.sum(1), by_word, rtol=1e-4, atol=1e-4)
    bounds = runner.read_metrics(folder / 'run')['elbo'][1]
    self.assertGreater(np.diff(bounds).min(), -1e-2)
    self.assertGreater(bounds[-1], bounds[0] + 100)

  def test_blocks_that_devices_do_not_divide(self):
    with self.assertRaisesRegex(ValueError, 'multiple of the 8 devices, got 2'):
      lda.check(lda.Config(blocks=2))


class FigureTest(parameterized.TestCase):
  def test_shows_curves_and_topics(self):
    numbers = np.array([0.0, 1.0, 2.0])
    curve = lda_figure.Curve(numbers, 2 * numbers, -numbers, 9 - numbers)
    topics = [lda_figure.Topic(0.5, 0.1, ['tree', 'leaf'])] * 50
    drawn = lda_figure.draw({'vi': curve}, topics, title='Topics.')
    self.assertLen(drawn.axes, 5)
    np.testing.assert_array_equal(drawn.axes[1].lines[0].get_xdata(), [2, 4])
    np.testing.assert_array_equal(drawn.axes[2].lines[0].get_ydata(), [8, 7])
    texts = [text.get_text() for text in drawn.axes[4].texts]
    self.assertEqual(texts[:2], ['50.0%', 'tree, leaf'])
    self.assertLen(texts, 2 * lda_figure.MOST_TOPICS)

  def test_without_bounds(self):
    numbers = np.array([0.0, 1.0, 2.0])
    curve = lda_figure.Curve(numbers, numbers, None, 9 - numbers)
    drawn = lda_figure.draw({'svi': curve}, [], title='')
    self.assertLen(drawn.axes, 3)
