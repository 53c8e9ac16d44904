"""iSogCLR against its algorithm in NumPy, SogCLR and its fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from emc2.contrastive import isogclr, sogclr

from tests.contrastive import common

KEY = jax.random.key(0)


class _Official:
  """The official step in float64, for fixed embeddings (m, 2, d)."""

  def __init__(self, views, tau, **settings):
    num_samples = len(views)
    self.views, self.settings = views, settings
    self.u = np.zeros(num_samples)
    self.tau = np.full(num_samples, tau)
    self.v = np.zeros(num_samples)

  def step(self, index):
    """Moves the memory; returns the official gradient and mean slope."""
    views, size = self.views, len(index)
    low, high = (
      self.settings['temperature_min'],
      self.settings['temperature_max'],
    )
    rows = np.concatenate([views[index, 0], views[index, 1]])
    tau = np.tile(self.tau[index], 2)
    same = np.arange(2 * size) % size
    apart = same[:, None] != same[None, :]
    s = rows @ rows.T
    e = np.where(apart, np.exp(s / tau[:, None]), 0.0)
    g = e.sum(axis=1) / (2 * size - 2)
    before = np.tile(self.u[index], 2)
    gamma = np.where(before == 0, 1.0, self.settings['gamma'])
    now = (1 - gamma) * before + gamma * g
    w = e / now[:, None]
    mean = np.sum(w * s / tau[:, None], axis=1) / (2 * size - 2)
    slope = np.log(now) + self.settings['rho'] - mean
    slope = (slope[:size] + slope[size:]) / 2
    clip = self.settings.get('gradient_clip') or np.inf
    momentum = self.settings['temperature_momentum']
    self.v[index] *= 1 - momentum
    self.v[index] += momentum * np.clip(slope, -clip, clip)
    moved = self.tau[index] - self.settings['temperature_step'] * self.v[index]
    self.tau[index] = np.clip(moved, low, high)
    self.u[index] = (now[:size] + now[size:]) / 2
    pull = w / (2 * size - 2)
    for a in range(2 * size):
      pull[a, (a + size) % (2 * size)] -= 1
    d_rows = (pull + pull.T) @ rows / size
    gradient = np.zeros_like(views)
    gradient[index, 0], gradient[index, 1] = d_rows[:size], d_rows[size:]
    return gradient, slope.mean()


_SETTINGS = dict(
  gamma=0.6,
  rho=0.3,
  temperature_step=0.05,
  temperature_momentum=0.7,
  temperature_min=0.1,
  temperature_max=0.5,
)


class IsogclrTest(parameterized.TestCase):
  @parameterized.parameters(
    {}, dict(rho=2.0), dict(gradient_clip=0.2), dict(gamma=0.1)
  )
  def test_is_the_official_step(self, **changes):
    self._check_is_the_official_step(**changes)

  @parameterized.parameters(
    dict(temperature_step=0.3),
    dict(temperature_momentum=0.2),
    dict(temperature_min=0.19),
    dict(temperature_max=0.21),
  )
  @pytest.mark.slow
  def test_is_the_official_step_elsewhere(self, **changes):
    self._check_is_the_official_step(**changes)

  def _check_is_the_official_step(self, **changes):
    """Each option moves the memory as the algorithm says."""
    views, settings = common.clusters(12), {**_SETTINGS, **changes}
    method = isogclr.isogclr(12, inverse_temperature=5.0, **settings)
    official = _Official(views, 0.2, **settings)
    plain = _Official(views, 0.2, **_SETTINGS)
    memory, rng = method.init(KEY, None), np.random.default_rng(0)
    for _ in range(4):
      index = rng.permutation(12)[:5]
      want, slope = official.step(index)
      plain.step(index)
      (_, (memory, info)), grads = common.gradient(
        method, KEY, memory, common.table(views), common.batch(index)
      )
      # The official loss over 2 tau, as for SogCLR.
      error = common.relative_error(grads['table'], 5.0 / 2 * want)
      self.assertLess(error, 2e-5)
      np.testing.assert_allclose(np.exp(memory.log_u), official.u, rtol=1e-4)
      np.testing.assert_allclose(memory.temperature, official.tau, rtol=1e-5)
      np.testing.assert_allclose(
        memory.velocity, official.v, rtol=1e-4, atol=1e-5
      )
      np.testing.assert_allclose(
        info.temperature, official.tau[index].mean(), rtol=1e-5
      )
      np.testing.assert_allclose(
        info.temperature_gradient, slope, rtol=1e-4, atol=1e-5
      )
    if changes:
      moved = np.abs(official.tau - plain.tau).max()
      self.assertGreater(moved, 1e-4)

  def test_without_a_step_it_is_sogclr(self):
    """Identity 8."""
    views = common.clusters(12)
    methods = [
      sogclr.sogclr(12, inverse_temperature=5.0, gamma=0.6),
      isogclr.isogclr(
        12, inverse_temperature=5.0, gamma=0.6, temperature_step=0.0
      ),
    ]
    memories = [method.init(KEY, None) for method in methods]
    rng = np.random.default_rng(0)
    for _ in range(3):
      index, outs = rng.permutation(12)[:5], []
      for number, method in enumerate(methods):
        (value, (memory, info)), grads = common.gradient(
          method,
          KEY,
          memories[number],
          common.table(views),
          common.batch(index),
        )
        memories[number] = memory
        outs.append((info.loss, info.log_u, memory.log_u))
        outs[-1] = (*outs[-1], grads['table'], value)
      for want, got in zip(
        *[jax.tree.leaves(out[:3]) for out in outs], strict=True
      ):
        # Two programs: the compiler may round each in its own way.
        np.testing.assert_allclose(got, want, rtol=1e-6)
      self.assertLess(common.relative_error(outs[1][3], outs[0][3]), 1e-6)
    np.testing.assert_array_equal(memories[1].temperature, np.float32(0.2))

  def test_slope_is_rho_less_the_divergence(self):
    """Identity 7, on a whole data set of two equal views."""
    views = common.clusters(15, view_noise=0.0)
    method = isogclr.isogclr(
      15,
      inverse_temperature=5.0,
      rho=0.3,
      temperature_momentum=1.0,
    )
    _, (memory, _) = common.forward(
      method,
      KEY,
      method.init(KEY, None),
      common.table(views),
      common.batch(np.arange(15)),
    )
    for i in range(15):
      others = np.delete(views, i, axis=0).reshape(-1, views.shape[-1])
      for shift in (0.0, 1.0):  # A constant for all negatives cancels.
        h = others @ views[i, 0] - shift
        objective = lambda tau, h=h: tau * np.log(np.mean(np.exp(h / tau)))
        numeric = (objective(0.2 + 1e-5) - objective(0.2 - 1e-5)) / 2e-5 + 0.3
        p = np.exp(h / 0.2) / np.exp(h / 0.2).sum()
        divergence = np.sum(p * np.log(p * len(p)))
        np.testing.assert_allclose(numeric, 0.3 - divergence, atol=1e-7)
        np.testing.assert_allclose(
          memory.velocity[i], 0.3 - divergence, atol=1e-5
        )

  def test_large_rho_pins_the_minimum(self):
    """Identity 7 and pitfall 12: rho beyond the log of the negatives."""
    views = common.clusters(15)
    settings = dict(inverse_temperature=5.0, gamma=1.0, temperature_step=0.02)
    one = common.batch(np.arange(15))
    for rho, pinned in ((np.log(28) + 0.1, True), (0.1, False)):
      method = isogclr.isogclr(15, rho=rho, **settings)
      memory = method.init(KEY, None)
      for _ in range(40):
        _, (memory, _) = common.forward(
          method, KEY, memory, common.table(views), one
        )
      at_minimum = np.isclose(memory.temperature, 0.05)
      self.assertEqual(bool(at_minimum.all()), pinned)

  @pytest.mark.slow
  def test_temperatures_order_by_class_size(self):
    """The equilibrium of the specification, section 6 (d)."""
    sizes = [60, 45, 35, 27, 20, 15, 11, 8, 6, 4]
    rng = np.random.default_rng(0)
    centroids = np.linalg.qr(rng.normal(size=(32, 32)))[0][: len(sizes)]
    label = np.repeat(np.arange(len(sizes)), sizes)
    noise = rng.normal(size=(len(label), 32)) / np.sqrt(32)
    x = common.normalize(centroids[label] + 0.5 * noise)
    views = jnp.float32(np.stack([x, x], axis=1))
    want = [0.52, 0.51, 0.49, 0.48, 0.45, 0.41, 0.39, 0.36, 0.33, 0.29]
    method = isogclr.isogclr(
      len(label),
      inverse_temperature=2.0,
      gamma=1.0,
      rho=0.3,
      temperature_step=0.1,
      temperature_momentum=1.0,
      temperature_max=2.0,
    )
    one = common.batch(np.arange(len(label)))

    @jax.jit
    def equilibrium():
      def step(_, memory):
        _, (memory, _) = method.surrogate(
          KEY, memory, {'table': views}, one, common.embed_table
        )
        return memory

      memory = method.init(KEY, None)
      return jax.lax.fori_loop(0, 120, step, memory)

    memory = equilibrium()
    tau = [np.mean(memory.temperature[label == c]) for c in range(len(sizes))]
    self.assertGreaterEqual(stats.spearmanr(sizes, tau).statistic, 0.95)
    np.testing.assert_allclose(tau, want, atol=0.03)
    # Settled, up to the small divergence that the last steps leave.
    self.assertLess(np.abs(memory.velocity).max(), 1e-2)

  def test_memory_is_twelve_bytes_a_sample(self):
    """Identity 16."""
    method = isogclr.isogclr(100_000, inverse_temperature=5.0)
    memory = jax.eval_shape(method.init, KEY, {})
    arrays = (memory.log_u, memory.temperature, memory.velocity)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    self.assertEqual(size, 1_200_000)

  def test_not_a_number_stays_out_of_the_memory(self):
    """Pitfall 15."""
    views = common.clusters(8)
    method = isogclr.isogclr(8, inverse_temperature=5.0)
    params, one = common.table(views), common.batch([0, 1, 2])
    memory = method.init(KEY, None)
    _, (memory, _) = common.forward(method, KEY, memory, params, one)
    broken = {'table': params['table'].at[1, 0].set(jnp.nan)}
    value, (after, info) = common.forward(method, KEY, memory, broken, one)
    self.assertFalse(np.isfinite(value))
    self.assertFalse(np.isfinite(info.loss))
    np.testing.assert_array_equal(after.log_u, memory.log_u)
    np.testing.assert_array_equal(after.temperature, memory.temperature)
    np.testing.assert_array_equal(after.velocity, memory.velocity)

  def test_permuted_batch(self):
    """Identity 15."""
    views = common.clusters(20)
    method = isogclr.isogclr(20, inverse_temperature=5.0)
    index = np.random.default_rng(0).permutation(20)[:8]
    memories = [
      common.forward(
        method,
        KEY,
        method.init(KEY, None),
        common.table(views),
        common.batch(order),
      )[1][0]
      for order in (index, index[::-1])
    ]
    np.testing.assert_allclose(*[m.temperature for m in memories], rtol=1e-6)

  @parameterized.parameters(
    (dict(num_samples=1), 'num_samples'),
    (dict(inverse_temperature=0.0), 'inverse_temperature'),
    (dict(inverse_temperature=np.nan), 'inverse_temperature'),
    (dict(gamma=0.0), 'gamma'),
    (dict(gamma=1.01), 'gamma'),
    (dict(rho=-0.1), 'rho'),
    (dict(rho=np.inf), 'rho'),
    (dict(temperature_step=-1.0), 'temperature_step'),
    (dict(temperature_momentum=0.0), 'temperature_momentum'),
    (dict(temperature_momentum=1.5), 'temperature_momentum'),
    (dict(temperature_min=0.0), 'temperature_min'),
    (dict(temperature_max=np.nan), 'temperature_max'),
    (dict(temperature_min=0.6, temperature_max=0.5), 'temperature_min'),
    (dict(temperature_max=0.1), 'initial temperature'),
    (dict(gradient_clip=0.0), 'gradient_clip'),
  )
  def test_refuses(self, changes, message):
    settings = {'num_samples': 8, 'inverse_temperature': 5.0, **changes}
    with self.assertRaisesRegex(ValueError, message):
      isogclr.isogclr(**settings)

  def test_implementation_is_handed_on(self):
    method = isogclr.isogclr(
      4, inverse_temperature=2.0, implementation='no such'
    )
    with self.assertRaisesRegex(ValueError, 'no such'):
      common.forward(
        method,
        KEY,
        method.init(KEY, None),
        common.table(common.clusters(4)),
        common.batch([0, 1]),
      )


class ShardedIsogclrTest(parameterized.TestCase):
  def test_eight_devices_equal_one(self):
    params, batches = common.linear_problem(40, 16, 4)
    make = lambda axis_name: isogclr.isogclr(
      40, inverse_temperature=5.0, gamma=0.4, axis_name=axis_name
    )
    common.assert_sharded_equals_single(make, params, batches)

  def test_collectives(self):
    """As many messages as SogCLR; the second carries three numbers."""
    params, batches = common.linear_problem(40, 16, 1)
    method = isogclr.isogclr(40, inverse_temperature=5.0, axis_name='data')
    counts = common.count_collectives(method, params, batches[0])
    self.assertEqual(
      counts, {'all_gather': 3, 'reduce_scatter': 1, 'all_reduce': 3}
    )
