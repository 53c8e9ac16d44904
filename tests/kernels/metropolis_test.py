"""Tests of the fused Metropolis-Hastings sampler and of its kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import random as random_internals

from emc2.kernels import lowering
from emc2.kernels.metropolis import (
  metropolis,
  pallas_gpu,
  pallas_tpu,
  reference,
)
from emc2.kernels.metropolis.specs import SPECS, Spec

P = jax.sharding.PartitionSpec
PLAIN = ('sequential', 'associative')


def words(key, position, c):
  """The words (n, c), from JAX's own generator."""
  block, offset = np.divmod(np.arange(c), 128)
  counters = np.broadcast_arrays(
    position[:, None].astype(np.uint32),
    (64 * block + offset % 64).astype(np.uint32),
  )
  count = jnp.asarray(np.concatenate([x.ravel() for x in counters]))
  pairs = random_internals.threefry_2x32(jnp.asarray(key), count)
  first, second = np.asarray(pairs).reshape(2, len(position), c)
  return np.where(offset < 64, first, second)


def oracle(key, rows, columns, position, start, *, beta, discard, own_steps):
  """One Python loop over the steps of each chain."""
  rows, columns = (np.asarray(x, np.float32) for x in (rows, columns))
  position, start = np.asarray(position), np.asarray(start)
  n, c = len(rows), len(columns)
  u = (words(key, position, c) >> np.uint32(8)).astype(np.float64) + 1
  high = -np.log(u / 2**24)
  counts = np.zeros((n, c), np.int64)
  stay, accepted = np.zeros(n, np.int64), np.zeros(n, np.int64)
  last, last_logit = np.full(n, -1), start.copy()
  peak = np.full(n, -np.inf)
  for a in range(n):
    step = 0
    for j in range(c):
      own = j % (c // 2) == position[a] % (c // 2)
      if own and not own_steps:
        continue
      if not own:
        logit = np.float32(beta) * (rows[a] @ columns[j])
        h = logit + high[a, j]
        if step <= discard:
          peak[a] = max(peak[a], h)
        if last_logit[a] < h:
          last[a], last_logit[a] = j, logit
          accepted[a] += step >= discard
      if step >= discard:
        if last[a] < 0:
          stay[a] += 1
        else:
          counts[a, last[a]] += 1
      step += 1
  return reference.Draws(counts, stay, last, last_logit, accepted, peak)


def problem(n, c, d=8, seed=0, dtype='float32'):
  """Key, rows, columns, position and start.

  Entries are small multiples of 1/4, so that all dot products are exact in any
  order and dtype: implementations must then agree to the last count.
  """
  rng = np.random.default_rng(seed)
  columns = jnp.asarray(rng.integers(-2, 3, size=(c, d)) / 4, dtype)
  position = jnp.asarray(rng.permutation(c)[:n], jnp.int32)
  start = rng.choice([-np.inf, -1.0, 0.5, 4.0, 8.0], size=n)
  return (
    jnp.asarray(rng.integers(2**32, size=2, dtype=np.uint32)),
    columns[position],
    columns,
    position,
    jnp.asarray(start, jnp.float32),
  )


def run(args, *, beta=4.0, **settings):
  fn = functools.partial(metropolis, inverse_temperature=beta, **settings)
  return jax.jit(fn)(*args)


def assert_same(got, want):
  """All equal but `peak`, in which logarithms of two libraries may differ."""
  for name in reference.Draws._fields[:-1]:
    g, w = (np.asarray(getattr(x, name)) for x in (got, want))
    np.testing.assert_array_equal(g, w, err_msg=name)
  np.testing.assert_allclose(got.peak, want.peak, rtol=1e-5, atol=1e-6)


class WordsTest(parameterized.TestCase):
  @parameterized.parameters(4, 64, 66, 128, 300)
  @pytest.mark.slow
  def test_are_those_of_jax(self, c):
    key = np.array([3, 2**32 - 5], np.uint32)
    position = np.array([0, 7, 2**20])
    got = reference.random_words(
      jnp.asarray(key),
      jnp.asarray(position, jnp.int32),
      jnp.arange(c, dtype=jnp.int32),
    )
    np.testing.assert_array_equal(got.T, words(key, position, c))

  def test_uniforms_lie_in_half_open_interval(self):
    ends = jnp.array([0, 2**32 - 1], jnp.uint32)
    got = reference.exponential(ends)
    np.testing.assert_allclose(got, [24 * np.log(2), 0], rtol=1e-6)


class PlainTest(parameterized.TestCase):
  @parameterized.product(
    implementation=PLAIN,
    # n, c, discard, own_steps.
    case=((8, 8, 3, False), (5, 128, 0, True)),
  )
  def test_matches_loop(self, implementation, case):
    self._check_loop(implementation, case)

  @parameterized.product(
    implementation=PLAIN,
    case=(
      (4, 4, 0, False),
      (40, 40, 37, False),
      (6, 130, 64, False),
      (7, 256, 100, False),
      (9, 300, 149, True),
    ),
  )
  @pytest.mark.slow
  def test_matches_loop_elsewhere(self, implementation, case):
    self._check_loop(implementation, case)

  def _check_loop(self, implementation, case):
    n, c, discard, own_steps = case
    args = problem(n, c, seed=n + c)
    settings = dict(beta=4.0, discard=discard, own_steps=own_steps)
    got = run(args, implementation=implementation, **settings)
    assert_same(got, oracle(*args, **settings))
    own = np.arange(c) % (c // 2) == np.asarray(args[3])[:, None] % (c // 2)
    np.testing.assert_array_equal(np.asarray(got.counts)[own], 0)
    steps = c if own_steps else c - 2
    np.testing.assert_array_equal(
      np.sum(np.asarray(got.counts, np.int64), axis=1) + np.asarray(got.stay),
      steps - discard,
    )
    np.testing.assert_array_equal(got.stay == 0, args[4] < got.peak)

  def test_types(self):
    draws = run(problem(4, 8), discard=3)
    dtypes = [x.dtype.name for x in draws]
    self.assertEqual(
      dtypes, ['uint16', 'int32', 'int32', 'float32', 'int32', 'float32']
    )

  @parameterized.parameters(False, True)
  @pytest.mark.slow
  def test_both_forms_agree_on_many_keys(self, own_steps):
    _, *args = problem(16, 20, seed=3)
    keys = jax.random.bits(jax.random.key(5), (500, 2), jnp.uint32)

    def draw(implementation):
      fn = functools.partial(
        metropolis,
        inverse_temperature=4.0,
        discard=9,
        own_steps=own_steps,
        implementation=implementation,
      )
      return jax.jit(jax.vmap(fn, (0, *[None] * 4)))(keys, *args)

    sequential, associative = map(draw, PLAIN)
    assert_same(associative, sequential)
    # Not all chains did the same.
    self.assertGreater(len(np.unique(sequential.stay)), 3)
    self.assertGreater(len(np.unique(sequential.accepted)), 3)

  def test_combine_is_associative(self):
    rng = np.random.default_rng(1)
    # Few values, so that many are equal; h >= l as in a chain, or closed.
    l = rng.integers(-3, 4, size=(3, 4000)).astype(np.float32)
    h = l + rng.integers(0, 3, size=l.shape).astype(np.float32)
    h[rng.random(h.shape) < 0.1] = -np.inf
    a, b, c = ((jnp.asarray(h[i]), jnp.asarray(l[i])) for i in range(3))
    combine = jax.jit(reference.combine)
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    # What a stretch does to a state, not how its closed ends are written.
    left, right = jax.device_get((left, right))
    for x in np.arange(-4, 6, dtype=np.float32):
      moved = x < left[0]
      np.testing.assert_array_equal(moved, x < right[0])
      np.testing.assert_array_equal(left[1][moved], right[1][moved])

  @parameterized.parameters(*PLAIN)
  def test_no_inverse_temperature_accepts_all(self, implementation):
    key, rows, columns, position, _ = problem(6, 12)
    start = jnp.zeros(6)
    args = key, rows, columns, position, start
    got = run(args, beta=1e-30, discard=4, implementation=implementation)
    for a, at in enumerate(np.asarray(position)):
      others = [j for j in range(12) if j % 6 != at % 6]
      want = np.zeros(12)
      want[others[4:]] = 1
      np.testing.assert_array_equal(got.counts[a], want)
      self.assertEqual(got.last[a], others[-1])
    np.testing.assert_array_equal(got.stay, 0)
    np.testing.assert_array_equal(got.accepted, 6)

  @parameterized.parameters(*PLAIN)
  @pytest.mark.slow
  def test_high_inverse_temperature_runs_the_maximum(self, implementation):
    c, discard = 40, 10
    rng = np.random.default_rng(0)
    # Similarities at least 1/64 apart: no draw of -log u bridges 1e4 of that.
    columns = jnp.asarray(rng.permutation(c)[:, None] / 64, jnp.float32)
    rows, position = jnp.ones((c, 1)), jnp.arange(c)
    start = jnp.full(c, -jnp.inf)
    key = jnp.array([1, 2], jnp.uint32)
    got = run(
      (key, rows, columns, position, start),
      beta=1e5,
      discard=discard,
      implementation=implementation,
    )
    for a in range(c):
      others = [j for j in range(c) if j % (c // 2) != a % (c // 2)]
      best = [
        max(others[: r + 1], key=lambda j: float(columns[j, 0]))
        for r in range(c - 2)
      ]
      want = np.bincount(best[discard:], minlength=c)
      np.testing.assert_array_equal(got.counts[a], want)
      self.assertEqual(got.last[a], best[-1])

  def test_first_proposal_is_taken_where_there_is_no_state(self):
    key, rows, columns, position, start = problem(30, 30)
    args = key, rows, columns, position, jnp.full_like(start, -jnp.inf)
    got = run(args, beta=50.0, discard=0)
    first = np.where(np.asarray(position) % 15 == 0, 1, 0)
    self.assertTrue(np.all(np.asarray(got.counts)[np.arange(30), first] > 0))
    np.testing.assert_array_equal(got.stay, 0)

  def test_high_state_stays(self):
    key, rows, columns, position, _ = problem(6, 12)
    start = jnp.full(6, 1e4)
    got = run((key, rows, columns, position, start), discard=3)
    np.testing.assert_array_equal(got.counts, 0)
    np.testing.assert_array_equal(got.stay, 7)
    np.testing.assert_array_equal(got.last, -1)
    np.testing.assert_array_equal(got.last_logit, start)
    np.testing.assert_array_equal(got.accepted, 0)

  @pytest.mark.slow
  def test_settings_matter(self):
    args = problem(12, 24, seed=2)
    plain = run(args, discard=5)
    self.assertFalse(np.array_equal(plain.counts, run(args, discard=6).counts))
    own = run(args, discard=5, own_steps=True)
    np.testing.assert_array_equal(own.last, plain.last)
    self.assertFalse(np.array_equal(own.counts, plain.counts))
    warm = run(args, discard=5, beta=1.0)
    self.assertFalse(np.array_equal(warm.counts, plain.counts))
    key, *rest = args
    other = run((key + np.uint32(1), *rest), discard=5)
    self.assertFalse(np.array_equal(other.counts, plain.counts))

  @parameterized.parameters(*PLAIN)
  @pytest.mark.slow
  def test_stationary_law_and_acceptance_rate(self, implementation):
    # Proposals drawn independently of one another, one chain for each trial:
    # specification, identities 1 and 4.
    rng = np.random.default_rng(0)
    size, c, trials, discard, beta = 12, 1024, 64, 128, 3.0
    score = rng.uniform(-1, 1, size)
    index = rng.integers(size, size=(trials, c))
    columns = jnp.asarray(score[index][..., None], jnp.float32)
    keys = jax.random.bits(jax.random.key(0), (trials, 2), jnp.uint32)
    fn = functools.partial(
      metropolis,
      inverse_temperature=beta,
      discard=discard,
      implementation=implementation,
    )
    alone = jnp.ones((1, 1)), jnp.zeros(1, jnp.int32), jnp.full(1, -jnp.inf)
    draws = jax.jit(
      jax.vmap(lambda k, y: fn(k, alone[0], y, alone[1], alone[2]))
    )(keys, columns)
    retained = c - 2 - discard
    p = np.exp(beta * score)
    p /= p.sum()
    rate = np.asarray(draws.accepted)[:, 0] / retained
    want = np.sum((2 * np.arange(size) + 1) * np.sort(p)[::-1]) / size
    error = rate.std(ddof=1) / np.sqrt(trials)
    self.assertLess(abs(rate.mean() - want), 3 * error)
    self.assertLess(error, 0.01)
    counts = np.asarray(draws.counts)[:, 0]
    share = np.stack(
      [
        np.bincount(i, x, minlength=size)
        for i, x in zip(index, counts, strict=True)
      ]
    )
    share /= retained
    errors = share.std(axis=0, ddof=1) / np.sqrt(trials)
    np.testing.assert_array_less(np.abs(share.mean(axis=0) - p), 4 * errors)

  @pytest.mark.slow
  def test_rows_are_independent(self):
    key, *rest = args = problem(10, 20)
    whole = run(args, discard=9)
    for part in (slice(None, 4), slice(4, None), slice(None, None, -1)):
      rows, columns, position, start = rest
      got = run(
        (key, rows[part], columns, position[part], start[part]), discard=9
      )
      assert_same(got, jax.tree.map(lambda x, s=part: x[s], whole))

  @parameterized.parameters('bfloat16', 'float16')
  @pytest.mark.slow
  def test_dtypes(self, dtype):
    want = run(problem(8, 140), discard=9)
    assert_same(run(problem(8, 140, dtype=dtype), discard=9), want)

  @pytest.mark.slow
  def test_float64_is_read_as_float32(self):
    with jax.enable_x64(True):
      got = run(problem(8, 20, dtype='float64'), discard=9)
    assert_same(got, run(problem(8, 20), discard=9))

  @pytest.mark.slow
  def test_no_gradient(self):
    key, rows, columns, position, start = problem(4, 8)

    def total(rows, columns, start, beta):
      draws = metropolis(
        key,
        rows,
        columns,
        position,
        jnp.maximum(start, -9.0),
        inverse_temperature=beta,
        discard=3,
      )
      return jnp.sum(draws.last_logit) + jnp.sum(draws.peak)

    slopes = jax.grad(total, (0, 1, 2, 3))(rows, columns, start, 4.0)
    for slope in slopes:
      np.testing.assert_array_equal(slope, jnp.zeros_like(slope))

  @pytest.mark.slow
  def test_traced_inverse_temperature(self):
    args = problem(4, 8)
    fn = jax.jit(
      lambda beta: metropolis(*args, inverse_temperature=beta, discard=3)
    )
    assert_same(fn(2.0), run(args, beta=2.0, discard=3))
    assert_same(fn(jnp.float32(4)), run(args, beta=4, discard=3))
    self.assertEqual(fn._cache_size(), 2)

  @parameterized.product(check_vma=(False, True), implementation=PLAIN)
  @pytest.mark.slow
  def test_sharded_rows(self, check_vma, implementation):
    key, rows, columns, position, start = args = problem(24, 24)
    mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    order = jnp.argsort(position)
    rows, position, start = rows[order], position[order], start[order]

    def local(key, rows, position, start):
      columns = jax.lax.all_gather(rows, 'data', tiled=True)
      return metropolis(
        key,
        rows,
        columns,
        position,
        start,
        inverse_temperature=4.0,
        discard=11,
        implementation=implementation,
      )

    sharded = jax.jit(
      jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P('data'), P('data'), P('data')),
        out_specs=P('data'),
        check_vma=check_vma,
      )
    )
    got = sharded(key, rows, position, start)
    self.assertEqual(got.counts.sharding.spec, P('data'))
    want = run(args, discard=11, implementation=implementation)
    assert_same(got, jax.tree.map(lambda x: x[order], want))

  @pytest.mark.slow
  def test_runs_on_the_device_that_is_here(self):
    kernel = {'gpu': 'pallas_gpu', 'tpu': 'pallas_tpu'}
    args = problem(70, 140, d=72)
    settings = dict(beta=4.0, discard=60, own_steps=False)
    want = oracle(*args, **settings)
    here = kernel.get(jax.default_backend(), 'sequential')
    for implementation in ('auto', 'xla', here):
      assert_same(run(args, implementation=implementation, **settings), want)


class ErrorsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('key', dict(key=jnp.zeros(2, jnp.int32)), 'key must be'),
    ('typed_key', dict(key=jax.random.key(0)), 'key must be'),
    ('vector', dict(rows=jnp.zeros(4)), 'rows must be a matrix'),
    ('no_rows', dict(rows=jnp.zeros((0, 8))), 'rows must be a matrix'),
    ('integers', dict(columns=jnp.zeros((8, 8), jnp.int32)), 'floating'),
    ('width', dict(columns=jnp.zeros((8, 9))), 'agree in width'),
    ('dtype', dict(columns=jnp.zeros((8, 8), jnp.bfloat16)), 'dtype'),
    ('odd', dict(columns=jnp.zeros((9, 8))), 'even number'),
    ('one_sample', dict(columns=jnp.zeros((2, 8))), 'even number'),
    ('too_many', dict(columns=jnp.zeros((65536, 8))), 'even number'),
    ('few_positions', dict(position=jnp.zeros(3, jnp.int32)), 'position must'),
    ('float_position', dict(position=jnp.zeros(4)), 'position must'),
    ('negative', dict(position=jnp.arange(4) - 1), r'in \[0, 8\)'),
    ('beyond', dict(position=jnp.arange(4) + 5), r'in \[0, 8\)'),
    ('start', dict(start=jnp.zeros(3)), 'start must'),
    ('beta_zero', dict(inverse_temperature=0.0), 'finite and positive'),
    ('beta_nan', dict(inverse_temperature=np.nan), 'finite and positive'),
    ('beta_vector', dict(inverse_temperature=jnp.ones(4)), 'scalar'),
    ('discard_all', dict(discard=6), r'in \[0, 6\)'),
    ('discard_own', dict(discard=8, own_steps=True), r'in \[0, 8\)'),
    ('discard_negative', dict(discard=-1), 'discard must'),
    ('name', dict(implementation='cuda'), 'implementation must'),
  )
  def test_wrong_input(self, wrong, message):
    names = ('key', 'rows', 'columns', 'position', 'start')
    right = dict(zip(names, problem(4, 8), strict=True))
    right |= dict(inverse_temperature=4.0, discard=3)
    with self.assertRaisesRegex(ValueError, message):
      metropolis(**(right | wrong))

  @parameterized.parameters(
    ('pallas_tpu', 'tpu', Spec(4, 4, 6000, 'float32', 3)),
    ('pallas_gpu', 'cuda', Spec(4, 4, 6000, 'float32', 3)),
    # The flags of many columns leave too little room for the rows.
    ('pallas_gpu', 'cuda', Spec(30000, 4, 3072, 'float32', 3)),
  )
  def test_named_kernel_raises_where_auto_works(self, name, platform, spec):
    fn = functools.partial(
      metropolis, inverse_temperature=4.0, discard=spec.discard
    )
    with self.assertRaisesRegex(NotImplementedError, name):
      jax.eval_shape(functools.partial(fn, implementation=name), *spec.args())
    text = lowered(spec, fn, platform).as_text()
    self.assertNotIn('@tpu_custom_call', text)
    self.assertNotIn('@mosaic_gpu', text)


def lowered(spec, fn, platform, kind=None):
  return lowering.lower_for(fn, *spec.args(), platform=platform, kind=kind)


class TpuKernelTest(parameterized.TestCase):
  def test_interpreted_matches_loop(self):
    self._check_interpreted_matches_loop(5, 300, 20, 149, False, 'float32')

  @parameterized.parameters(
    # n, c, d, discard, own_steps, dtype.
    (20, 70, 8, 30, False, 'bfloat16'),
    (130, 130, 8, 129, True, 'float32'),
  )
  @pytest.mark.slow
  def test_interpreted_matches_loop_elsewhere(
    self, n, c, d, discard, own_steps, dtype
  ):
    self._check_interpreted_matches_loop(n, c, d, discard, own_steps, dtype)

  def _check_interpreted_matches_loop(self, n, c, d, discard, own_steps, dtype):
    args = problem(n, c, d=d, seed=n, dtype=dtype)
    settings = dict(discard=discard, own_steps=own_steps)
    got = jax.jit(
      functools.partial(pallas_tpu.metropolis, interpret=True, **settings)
    )(*args, jnp.float32(4))
    assert_same(got, oracle(*args, beta=4.0, **settings))

  def test_lowers(self):
    self._check_lowering('imagenet100_resnet50')

  @parameterized.parameters(*SPECS)
  @pytest.mark.slow
  def test_lowers_at_all_shapes(self, name):
    self._check_lowering(name)

  def _check_lowering(self, name):
    spec = SPECS[name]
    fn = functools.partial(
      metropolis, inverse_temperature=4.0, discard=spec.discard
    )
    text = lowered(spec, fn, 'tpu', 'TPU v6 lite').as_text()
    self.assertEqual(text.count('@tpu_custom_call'), 1)
    self.assertEqual(text.count('kernel_name = "metropolis"'), 1)


def gpu_interpreter():
  """Parameters of Mosaic GPU's interpreter, which JAX 0.10 does not export."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


class GpuKernelTest(parameterized.TestCase):
  @parameterized.parameters(
    # More chunks of features than stages; ragged rows and columns.
    (5, 132, 400, 60, False, 'bfloat16'),
    (9, 12, 8, 4, True, 'float32'),
  )
  @pytest.mark.slow
  def test_interpreted_matches_loop(self, n, c, d, discard, own_steps, dtype):
    args = problem(n, c, d=d, seed=n, dtype=dtype)
    settings = dict(discard=discard, own_steps=own_steps)
    fn = functools.partial(
      pallas_gpu.metropolis, interpret=gpu_interpreter(), **settings
    )
    # Wide rows of entries about 1/2 have logits of tens: beta is small.
    got = jax.jit(fn)(*args, jnp.float32(0.25))
    assert_same(got, oracle(*args, beta=0.25, **settings))

  def test_two_parts_make_up_float32(self):
    x = jax.random.normal(jax.random.key(0), (64, 128))
    x /= jnp.linalg.norm(x, axis=1, keepdims=True)
    high, low = (np.asarray(p, np.float64) for p in pallas_gpu._split(x))
    exact = np.asarray(x, np.float64)
    got = high @ high.T + high @ low.T + low @ high.T
    self.assertLess(np.abs(got - exact @ exact.T).max(), 2**-16)

  def test_few_chains_to_a_block_while_processors_are_idle(self):
    chains = lambda n, d=128: pallas_gpu._chains(n, d, n, jnp.float32)
    self.assertEqual([chains(n) for n in (8, 512, 2048, 8192)], [8, 8, 16, 64])
    # Many features leave room for few chains.
    self.assertEqual(chains(8192, 1024), 16)

  def test_lowers(self):
    self._check_lowering('imagenet100_resnet50', 'NVIDIA H100 80GB HBM3')

  @parameterized.parameters(*SPECS)
  @pytest.mark.slow
  def test_lowers_at_all_shapes(self, name):
    self._check_lowering(name, 'NVIDIA H200')

  def _check_lowering(self, name, kind):
    spec = SPECS[name]
    fn = functools.partial(
      metropolis, inverse_temperature=4.0, discard=spec.discard
    )
    text = lowered(spec, fn, 'cuda', kind).as_text()
    self.assertEqual(text.count('custom_call @mosaic_gpu'), 1)
    self.assertIn('metropolis_mosaic_gpu', text)

  def test_other_gpus_take_plain_jax(self):
    spec = SPECS['stl10_resnet18']
    fn = functools.partial(
      metropolis, inverse_temperature=4.0, discard=spec.discard
    )
    text = lowered(spec, fn, 'cuda', 'NVIDIA A100-SXM4-40GB').as_text()
    self.assertNotIn('@mosaic_gpu', text)


class ShardedKernelTest(parameterized.TestCase):
  @parameterized.product(platform=('tpu', 'cuda'), check_vma=(False, True))
  @pytest.mark.slow
  def test_lowers_inside_shard_map(self, platform, check_vma):
    spec = SPECS['imagenet100_eight_devices']
    chip = jax.sharding.AbstractDevice(lowering.KINDS[platform], 1, platform)
    mesh = jax.sharding.AbstractMesh(
      (8,),
      ('data',),
      axis_types=(jax.sharding.AxisType.Auto,),
      abstract_device=chip,
    )
    fn = functools.partial(
      metropolis, inverse_temperature=4.0, discard=spec.discard
    )
    sharded = jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=(P(), P('data'), P(), P('data'), P('data')),
      out_specs=P('data'),
      check_vma=check_vma,
    )
    key, _, columns, *_ = spec.args()
    n = columns.shape[0]
    args = (
      key,
      columns,
      columns,
      jax.ShapeDtypeStruct((n,), jnp.int32),
      jax.ShapeDtypeStruct((n,), jnp.float32),
    )
    with jax.sharding.use_abstract_mesh(mesh):
      trace = jax.jit(sharded).trace(*args)
      text = trace.lower(lowering_platforms=(platform,)).as_text()
    target = '@tpu_custom_call' if platform == 'tpu' else '@mosaic_gpu'
    self.assertEqual(text.count(target), 1)
