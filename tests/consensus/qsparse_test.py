"""Qsparse-local-SGD: the paper's loop, its identities, and every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import algorithm
from emc2.compression import compose, identity, sign, sparse
from emc2.consensus import qsparse, qsparse_local, schedules

from tests.consensus import oracle

KEY = jax.random.key(0)
CURVATURE = np.linspace(1, 4, 20)


def _loss(params, target):
  curvature = jnp.asarray(CURVATURE[: params.size], params.dtype)
  return 0.5 * jnp.sum(curvature * (params - target) ** 2)


def _gradient(params, target):
  return CURVATURE[: params.size] * (params - target)


def _targets(num_steps, num_workers, size=20, seed=0):
  """Around 1, and around another point for each worker."""
  rng = np.random.default_rng(seed)
  shape = num_steps, num_workers, size
  return 1 + rng.normal(size=shape) + rng.normal(size=shape[1:])


def _run(method, params, batches, key=KEY):
  """States and infos after each step, stacked."""

  def step(key, state, batch):
    state, info = method.step(key, state, batch)
    return state, (state, qsparse.local_params(state), info)

  state = method.init(KEY, params)
  _, found = jax.jit(
    lambda key, state, batches: algorithm.scan(key, state, batches, step)
  )(key, state, batches)
  return found


TABLES = {
  'each': schedules.every(9, 1),
  'every': schedules.every(9, 4),
  'offset': schedules.every(9, 4, first=1),
  'gaps': np.array(
    [[i % 3 == 2, i % 2 == 1, i in (0, 4)] for i in range(9)], bool
  )
  | (np.arange(9) == 8)[:, None],
}


class OracleTest(parameterized.TestCase):
  """In float64, to 1e-12."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def _compare(self, code, by_hand, table, rate=0.1, beta=0.0, **settings):
    batches = _targets(len(table), 3)
    want = oracle.qsparse(
      np.zeros(20),
      _gradient,
      batches,
      table,
      lambda t: rate,
      by_hand,
      memory=settings.get('error_feedback', True),
      beta=beta,
    )
    inner = oracle.sgd(rate, beta or None)
    method = qsparse_local(_loss, inner, code, table, num_workers=3, **settings)
    states, local, info = _run(method, jnp.zeros(20), jnp.asarray(batches))
    close = functools.partial(np.testing.assert_allclose, atol=1e-12, rtol=0)
    close(states.params, want['master'])
    close(local, want['local'])
    if settings.get('error_feedback', True):
      close(states.memory, want['memory'])
    before = np.concatenate([np.zeros((1, 3, 20)), want['local'][:-1]])
    losses = 0.5 * np.sum(CURVATURE * (before - batches) ** 2, axis=-1)
    np.testing.assert_allclose(info.loss, losses, rtol=1e-12)
    due = np.broadcast_to(table.reshape(len(table), -1), info.uploads.shape)
    np.testing.assert_array_equal(info.uploads, due)
    np.testing.assert_array_equal(info.bits, due * code.bits((20,)))
    self.assertFalse(np.any(info.skipped))
    return states, want

  @parameterized.parameters(*TABLES)
  def test_largest(self, table):
    states, want = self._compare(
      oracle.largest(4),
      lambda x: oracle.keep_largest(x, 4),
      TABLES[table],
    )
    # Identities 2 and 3: what has not arrived is on its way or remembered.
    on_its_way = np.mean(states.progress + states.memory, axis=1)
    np.testing.assert_allclose(
      states.params - on_its_way, want['virtual'], atol=1e-12
    )

  @parameterized.parameters('every', 'gaps')
  def test_momentum_and_no_memory(self, table):
    by_hand = lambda x: oracle.keep_largest(x, 4)
    self._compare(
      oracle.largest(4), by_hand, TABLES[table], 0.02, 0.9, error_feedback=False
    )

  def test_signs_of_the_largest(self):
    self._compare(
      compose.signed(sparse.top_k(4)),
      lambda x: oracle.keep_signs(x, 4),
      TABLES['gaps'],
    )

  def test_local_sgd(self):
    """Workers average their models every 4 steps."""
    table, batches = TABLES['every'], _targets(9, 3)
    local = np.zeros((3, 20))
    for t in range(9):
      local = local - 0.1 * CURVATURE * (local - batches[t])
      if table[t]:
        local[:] = local.mean(axis=0)
    states, _ = self._compare(identity.identity(), lambda x: x, table)
    np.testing.assert_allclose(states.params[-1], local[0], atol=1e-12)
    np.testing.assert_allclose(states.memory, 0)

  def test_sgd(self):
    x, batches = np.zeros(20), _targets(9, 3)
    for row in batches:
      x = x - 0.1 * np.mean(CURVATURE * (x - row), axis=0)
    states, _ = self._compare(oracle.everything(), lambda x: x, TABLES['each'])
    np.testing.assert_allclose(states.params[-1], x, atol=1e-12)

  @parameterized.parameters(
    (1, sparse.top_k(4), lambda x: oracle.keep_largest(x, 4)),
    (3, sign.scaled_sign(), lambda x: oracle.keep_signs(x, 20)),
  )
  def test_sgd_with_memory(self, num_workers, code, by_hand):
    """One upload a step: what is sent is a code of memory plus step."""
    batches = _targets(9, num_workers)
    x, memory = np.zeros(20), np.zeros((num_workers, 20))
    for row in batches:
      carried = memory + 0.1 * CURVATURE * (x - row)
      sent = np.stack([by_hand(each) for each in carried])
      memory, x = carried - sent, x - sent.mean(axis=0)
    method = qsparse_local(
      _loss, oracle.sgd(0.1), code, TABLES['each'], num_workers=num_workers
    )
    states, _, _ = _run(method, jnp.zeros(20), jnp.asarray(batches))
    np.testing.assert_allclose(states.params[-1], x, atol=1e-12)
    np.testing.assert_allclose(states.memory[-1], memory, atol=1e-12)

  def test_memory_is_zero_where_entries_were_kept(self):
    table = np.array([False, True])
    states, _ = self._compare(
      oracle.largest(4), lambda x: oracle.keep_largest(x, 4), table
    )
    self.assertEqual(np.sum(states.memory[-1] == 0, axis=-1).tolist(), [4] * 3)


class IdentityTest(parameterized.TestCase):
  def test_asynchronous_at_the_same_times_is_synchronous(self):
    code, table = oracle.noisy(False), schedules.every(9, 4)
    found = []
    for each in (table, np.tile(table[:, None], (1, 3))):
      method = qsparse_local(_loss, oracle.sgd(0.1), code, each, num_workers=3)
      batches = jnp.asarray(_targets(9, 3), jnp.float32)
      states, local, info = _run(method, jnp.zeros(20), batches)
      found.append((states._replace(anchor=()), local, info))
    jax.tree.map(np.testing.assert_array_equal, *found)

  @parameterized.parameters(True, False)
  def test_workers_draw_as_the_code_asks(self, shared):
    method = qsparse_local(
      _loss, oracle.sgd(0.1), oracle.noisy(shared), [True], num_workers=3
    )
    batches = jnp.ones((1, 3, 20))
    states, _, _ = _run(method, jnp.zeros(20), batches)
    kept = np.asarray(states.memory[0, :, 0])
    self.assertEqual(np.unique(kept).size, 1 if shared else 3)

  def test_memory_is_bounded(self):
    """At a constant rate, and in units of a rate that falls."""
    num_steps, period, rate, gamma = 400, 4, 0.05, 5 / 20
    batches = jnp.asarray(_targets(num_steps, 4), jnp.float32)
    table = schedules.every(num_steps, period)
    falling = lambda count: 8.0 / (128.0 + count.astype(jnp.float32))
    for schedule in (rate, falling):
      method = qsparse_local(
        _loss,
        oracle.sgd(schedule),
        oracle.largest(5),
        table,
        num_workers=4,
      )
      states, local, _ = _run(method, jnp.zeros(20), batches)
      gradients = CURVATURE * (np.asarray(local)[:-1] - np.asarray(batches)[1:])
      most = np.max(np.mean(np.sum(gradients**2, axis=-1), axis=1))
      squares = np.mean(np.sum(states.memory**2, axis=-1), axis=1)
      if schedule is rate:
        bound = 2 * (1 - gamma) * (2 - gamma) / gamma**2
        self.assertLess(squares.max(), bound * (rate * period) ** 2 * most)
        self.assertGreater(squares[-1], 0)
      else:
        ratio = squares / np.asarray(falling(jnp.arange(num_steps))) ** 2
        self.assertLess(ratio[-100:].max(), 1.5 * ratio[100:200].max())

  @parameterized.parameters(
    (0.05, 200, 3e-5, 6e-5), (0.05, 1000, 0, 1e-13), (0.2, 200, 20.0, np.inf)
  )
  def test_one_worker_without_noise(self, rate, num_steps, least, most):
    """Linear at a small rate; memory delays, so 0.2 < 1 / L diverges."""
    with jax.enable_x64(True):
      method = qsparse_local(
        _loss,
        oracle.sgd(rate),
        oracle.largest(4),
        lambda count: jnp.array(True),
        num_workers=1,
      )
      batches = jnp.ones((num_steps, 1, 20))
      states, _, _ = _run(method, jnp.zeros(20), batches)
      error = np.max(np.abs(states.params[-1] - 1))
    self.assertBetween(error, least / 2, most)

  def test_workers_that_pull_apart_need_memory(self):
    """What they agree on is never among the largest entries of either."""
    apart = np.where(np.arange(20) < 4, 10.0, 0.0) / CURVATURE
    batches = np.tile(np.stack([1 + apart, 1 - apart]), (400, 1, 1))
    errors = []
    for memory in (False, True):
      method = qsparse_local(
        _loss,
        oracle.sgd(0.05),
        oracle.largest(4),
        lambda count: jnp.array(True),
        num_workers=2,
        error_feedback=memory,
      )
      batch = jnp.asarray(batches, jnp.float32)
      states, _, _ = _run(method, jnp.zeros(20), batch)
      errors.append(np.max(np.abs(states.params[-50:] - 1)))
    self.assertEqual(errors[0], 1.0)
    self.assertLess(errors[1], 0.5)

  @pytest.mark.slow
  def test_rate_of_strongly_convex(self):
    """1 / T, by the specification's own setting and numbers."""
    seeds, num_steps, a = 8, 10_000, 128
    rate = lambda count: 8 / (a + count.astype(jnp.float32))
    method = qsparse_local(
      _loss,
      oracle.sgd(rate),
      oracle.largest(5),
      lambda count: (count + 1) % 4 == 0,
      num_workers=4,
    )

    def step(key, state, unused):
      noise = jax.random.normal(key, (4, 20))
      local = jnp.mean(qsparse.local_params(state), axis=0)
      curvature = jnp.asarray(CURVATURE, jnp.float32)
      state, _ = method.step(key, state, 1 + noise / curvature[None])
      return state, local

    def train(key):
      state = method.init(KEY, jnp.zeros(20))
      steps = jnp.arange(num_steps, dtype=jnp.int32)
      return algorithm.scan(key, state, steps, step)[1]

    keys = [jax.random.key(i) for i in range(seeds)]
    local = np.stack([jax.jit(train)(key) for key in keys])
    weights = (a + np.arange(num_steps)) ** 2.0
    found = []
    for length in (1_000, 3_000, 10_000):
      mean = np.average(local[:, :length], axis=1, weights=weights[:length])
      found.append(np.mean(0.5 * np.sum(CURVATURE * (mean - 1) ** 2, axis=1)))
    np.testing.assert_allclose(found, [1.5e-3, 5.0e-4, 1.6e-4], rtol=0.4)
    slope = np.polyfit(np.log([1_000, 3_000, 10_000]), np.log(found), 1)[0]
    self.assertBetween(slope, -1.15, -0.8)

  @parameterized.parameters(
    (sparse.top_k(40), 1680),
    (compose.quantized(sparse.top_k(40), 16), 672),
    (compose.signed(sparse.top_k(40)), 472),
    (identity.identity(), 20_800),
  )
  def test_bits(self, code, want):
    self.assertEqual(qsparse.bits_per_upload(code, jnp.zeros(650)), want)


def _counted(rate, beta):
  """SGD with momentum, and numbers in its state that are no moments."""
  base = optax.inject_hyperparams(optax.sgd)(rate, beta)

  def update(gradients, state, params):
    # The count of Optax is added to by a weak 1.
    with jax.numpy_dtype_promotion('standard'):
      return base.update(gradients, state, params)

  return optax.GradientTransformation(base.init, update)


class OptionTest(parameterized.TestCase):
  @parameterized.parameters(*qsparse.MOMENTUM)
  def test_momentum(self, policy):
    table = np.array([[0, 0], [1, 0], [1, 1]], bool)
    batches = _targets(3, 2)
    method = qsparse_local(
      _loss,
      _counted(0.1, 0.5),
      oracle.everything(),
      table,
      num_workers=2,
      momentum=policy,
    )
    states, local, info = _run(
      method, jnp.zeros(20), jnp.asarray(batches, jnp.float32)
    )
    trace, at = np.zeros((2, 20)), np.zeros((2, 20))
    for t in range(3):
      trace = CURVATURE * (at - batches[t]) + 0.5 * trace
      due = table[t]
      if policy == 'zero':
        trace[due] = 0
      if policy == 'average' and due.any():
        trace[due] = trace[due].mean(axis=0)
      found = states.inner.inner_state[0].trace[t]
      np.testing.assert_allclose(found, trace, rtol=2e-5, atol=1e-5)
      at = np.asarray(local[t])
    # Of the inner state only moments are touched.
    rates = states.inner.hyperparams['learning_rate']
    np.testing.assert_allclose(rates, 0.1)
    each = 32 * 20 * (2 if policy == 'average' else 1)
    np.testing.assert_array_equal(info.bits, table * each)

  @parameterized.parameters(
    ('keep', [1.0, 1.0, 1.0]),
    ('zero', [1.0, 0.0, 1.0]),
    ('rescale', [1.0, 0.25, 1.0]),
  )
  def test_on_lr_drop(self, policy, want):
    """The rate is 0.4 in the first two steps, then 0.1, then again 0.4."""
    rate = lambda count: jnp.where(count == 2, 0.1, 0.4)
    settings = dict(on_lr_drop=policy)
    if policy != 'keep':
      settings['learning_rate'] = rate
    method = qsparse_local(
      lambda params, batch: jnp.sum(params * batch),
      oracle.sgd(1.0),
      oracle.largest(1),
      # Later steps have no gradient, so that no upload changes a memory.
      lambda count: count == 0,
      num_workers=1,
      **settings,
    )
    batches = jnp.zeros((4, 1, 2)).at[0, 0].set(jnp.array([3.0, 1.0]))
    states, _, _ = _run(method, jnp.zeros(2), batches)
    # The third changes nothing: a rate that rises rescales no memory.
    scales = np.cumprod(want)
    np.testing.assert_allclose(states.memory[1:, 0, 1], scales)

  def test_who_has_no_number_uploads_nothing(self):
    batches = jnp.asarray(_targets(4, 3), jnp.float32)
    batches = batches.at[3, 1, 0].set(jnp.nan)
    method = qsparse_local(
      _loss,
      oracle.sgd(0.1, 0.9),
      oracle.largest(4),
      schedules.every(4, 2),
      num_workers=3,
    )
    states, local, info = _run(method, jnp.zeros(20), batches)
    skipped = np.zeros((4, 3), bool)
    skipped[3, 1] = True
    np.testing.assert_array_equal(info.skipped, skipped)
    self.assertEqual(info.uploads.sum(axis=1).tolist(), [0, 3, 0, 2])
    self.assertEqual(info.bits[3].tolist(), [256.0, 0.0, 256.0])
    # It keeps its memory, takes the new model and forgets its moments.
    np.testing.assert_array_equal(states.memory[3, 1], states.memory[1, 1])
    self.assertTrue(np.any(states.memory[3, 0] != states.memory[1, 0]))
    np.testing.assert_array_equal(local[3, 1], states.params[3])
    np.testing.assert_array_equal(states.inner[1][3, 1], 0)
    self.assertTrue(np.all(states.inner[1][3, 0] != 0))
    clean = jax.tree.map(lambda x: np.all(np.isfinite(x[3])), states)
    self.assertTrue(all(jax.tree.leaves(clean)))

  def test_bfloat16_progress_loses_no_small_step(self):
    """A step of 2^-10 is lost on a parameter of 1 in bfloat16."""
    method = qsparse_local(
      lambda params, batch: jnp.sum(params * batch),
      oracle.sgd(1.0),
      oracle.everything(),
      schedules.every(64, 64),
      num_workers=2,
    )
    batches = jnp.full((64, 2, 3), -(2.0**-10), jnp.bfloat16)
    states, local, _ = _run(method, jnp.ones(3, jnp.bfloat16), batches)
    self.assertEqual(states.params.dtype, jnp.bfloat16)
    self.assertEqual(local.dtype, jnp.bfloat16)
    self.assertEqual(states.progress.dtype, jnp.float32)
    np.testing.assert_array_equal(np.float32(states.params[-1]), 1 + 2.0**-4)

  def test_leaves_are_coded_apart(self):
    params = {'a': jnp.zeros((2, 3)), 'b': jnp.zeros(2)}
    method = qsparse_local(
      lambda params, batch: sum(
        jnp.sum(batch[name] * leaf) for name, leaf in params.items()
      ),
      oracle.sgd(1.0),
      sparse.top_k(3, at_most=True),
      [True],
      num_workers=1,
    )
    batch = {'a': jnp.arange(6.0).reshape(1, 2, 3), 'b': jnp.ones((1, 2))}
    state, info = method.step(KEY, method.init(KEY, params), batch)
    np.testing.assert_array_equal(state.params['a'], [[0, 0, 0], [-3, -4, -5]])
    np.testing.assert_array_equal(state.params['b'], [-1, -1])
    self.assertEqual(info.bits[0], 3 * (32 + 3) + 2 * (32 + 1))

  def test_a_schedule_ends_as_it_says(self):
    method = qsparse_local(
      _loss,
      oracle.sgd(0.1),
      oracle.everything(),
      schedules.every(3, 3),
      num_workers=2,
    )
    batches = jnp.zeros((5, 2, 20))
    _, _, info = _run(method, jnp.ones(20), batches)
    self.assertEqual(info.uploads[:, 0].tolist(), [False, False] + 3 * [True])

  def test_same_types_before_and_after(self):
    for table in (schedules.every(3, 2), np.ones((3, 2), bool)):
      method = qsparse_local(
        _loss, optax.adam(0.1), oracle.largest(3), table, num_workers=2
      )
      state = method.init(KEY, jnp.ones(20))
      with jax.numpy_dtype_promotion('standard'):  # Of Adam's correction.
        after, _ = jax.eval_shape(method.step, KEY, state, jnp.ones((2, 20)))
      types = lambda tree: jax.tree.map(
        lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree
      )
      self.assertEqual(types(state), types(after))


class BadInputTest(parameterized.TestCase):
  def _make(self, **settings):
    settings = dict(schedule=schedules.every(4, 2), num_workers=2) | settings
    return qsparse_local(
      _loss,
      oracle.sgd(0.1),
      settings.pop('compressor', oracle.largest(3)),
      settings.pop('schedule'),
      **settings,
    )

  @parameterized.parameters(
    (dict(num_workers=0), 'num_workers must be at least 1, got 0'),
    (dict(momentum='drop'), 'momentum must be one of'),
    (dict(on_lr_drop='drop'), 'on_lr_drop must be one of'),
    (dict(exchange='mail'), 'exchange must be one of'),
    (dict(on_lr_drop='zero'), 'learning_rate must be given with'),
    (dict(schedule=np.array([True, False])), 'after the last step'),
    (dict(schedule=np.ones((4, 3), bool)), r'rows of shape \(\) or \(2,\)'),
    (dict(schedule=lambda count: jnp.ones(3, bool)), 'schedule must have rows'),
  )
  def test_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      self._make(**settings)

  def test_params(self):
    with self.assertRaisesRegex(
      ValueError, r"must be floating, got int32 at params\['n'\]"
    ):
      self._make().init(KEY, {'n': jnp.zeros(3, jnp.int32)})
    with self.assertRaisesRegex(ValueError, 'k must be at most the 2 entries'):
      self._make(compressor=sparse.top_k(3)).init(KEY, jnp.zeros(2))

  def test_step(self):
    method = self._make()
    state = method.init(KEY, jnp.zeros(20))
    with self.assertRaisesRegex(ValueError, 'leading axis of 2 workers'):
      method.step(KEY, state, jnp.zeros((3, 20)))
    with self.assertRaisesRegex(ValueError, 'must hold 3 workers, got 2'):
      self._make(num_workers=3).step(KEY, state, jnp.zeros((2, 20)))
    with self.assertRaisesRegex(ValueError, "axis_name .* got 'data'"):
      self._make(axis_name='data').step(KEY, state, jnp.zeros((2, 20)))
