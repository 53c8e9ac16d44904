"""MADA where it is another optimiser, and what its learning has to be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms

from tests.transforms import mada_oracle

NAMES = transforms.COEFFICIENTS
INSIDE = dict(zip(NAMES, (0.8, 0.9, 0.3, 0.6, 0.7, 0.6), strict=True))
ADAM = {'b3': 0.0, 'rho': 1.0, 'c': 1.0, 'gamma': 1.0}


def _noise(num_steps=50, seed=3):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=(num_steps, *shape))
  return {'matrix': draw(4, 3), 'vector': draw(5)}


def _updates(tx, noise):
  """Of each step, for gradients that do not ask where they are."""
  params = jax.tree.map(lambda e: jnp.ones_like(e[0]), noise)
  step = lambda state, g: tx.update(g, state, params)[::-1]
  run = jax.jit(lambda noise: jax.lax.scan(step, tx.init(params), noise)[1])
  return run(noise)


def _gap(a, b):
  """The greatest between two runs."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in pairs)


class CornersTest(parameterized.TestCase):
  """What the family holds."""

  def _check(self, tx, other, atol=1e-12):
    with (
      jax.enable_x64(True),
      # Optax adds floats to counters.
      jax.numpy_dtype_promotion('standard'),
    ):
      noise = jax.tree.map(jnp.asarray, _noise())
      self.assertLess(_gap(_updates(tx, noise), _updates(other, noise)), atol)

  def _make(self, **options):
    base = {**ADAM, 'eps': 1e-3, 'weight_decay': 0.0, 'learn': ()}
    return transforms.mada(0.1, **{**base, **options})

  def test_adam(self):
    self._check(self._make(b2=0.9), optax.adam(0.1, b2=0.9, eps=1e-3))

  @pytest.mark.slow
  def test_adam_decays_as_adamw(self):
    """Where the mask is left alone: matrices, not vectors."""
    tx = self._make(weight_decay=0.2)
    mask = {'matrix': True, 'vector': False}
    other = optax.adamw(0.1, b2=0.95, eps=1e-3, weight_decay=0.2, mask=mask)
    self._check(tx, other)

  @pytest.mark.slow
  def test_adam_in_float32(self):
    noise = jax.tree.map(np.float32, _noise())
    with jax.numpy_dtype_promotion('standard'):
      want = _updates(optax.adam(0.1, b2=0.95, eps=1e-3), noise)
    got = _updates(self._make(), noise)
    self.assertLess(_gap(got, want), 1e-6)

  @pytest.mark.slow
  def test_yogi(self):
    other = optax.chain(
      optax.scale_by_yogi(0.9, 0.95, 1e-3, initial_accumulator_value=0.0),
      optax.scale(-0.1),
    )
    self._check(self._make(c=0.0), other)

  def test_lion(self):
    self._check_lion('lion', 0.5, 0.7, 0.5)

  @parameterized.parameters(
    ('lion', 0.95, 0.98, 0.95),
    # The sign is drawn from what the momentum already holds.
    ('released', 0.95, 0.98, 0.931),
    ('released', 0.5, 0.7, 0.35),
  )
  @pytest.mark.slow
  def test_lion_elsewhere(self, mode, b1, b2, want):
    self._check_lion(mode, b1, b2, want)

  def _check_lion(self, mode, b1, b2, want):
    tx = self._make(gamma=0.0, lion_mode=mode, lion_b1=b1, lion_b2=b2)
    self._check(tx, optax.lion(0.1, b1=want, b2=b2, weight_decay=0.0))

  @pytest.mark.slow
  def test_released_lion_is_another(self):
    noise = {
      'vector': np.float32(np.random.default_rng(0).normal(size=(20, 500)))
    }
    signs = [
      _updates(self._make(gamma=0.0, lion_mode=mode), noise)['vector'] > 0
      for mode in ('lion', 'released')
    ]
    share = np.mean(signs[0][10:] != signs[1][10:])
    np.testing.assert_allclose(share, 0.04, atol=0.03)

  @pytest.mark.slow
  def test_avgrad(self):
    self._check(self._make(rho=0.0), transforms.avgrad(0.1, b2=0.95, eps=1e-3))

  @pytest.mark.slow
  def test_amsgrad_where_nothing_is_corrected(self):
    """Optax keeps the maximum after the correction, which b2 near 0 drops."""
    tx = self._make(
      b2=1e-13, rho=0.0, second_moment='amsgrad', bounds={'b2': (1e-13, 0.9)}
    )
    self._check(tx, optax.amsgrad(0.1, b2=1e-13, eps=1e-3), atol=1e-11)

  def test_adan(self):
    """A mean of differences, uncorrected; the first difference is 0."""
    b, noise, want = 0.7, _noise(), {}
    for name, grads in noise.items():
      m = v = n = 0.0
      last, rows = grads[0], []
      for t, g in enumerate(grads, start=1):
        d, last = g - last, g
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * (g + b * d) ** 2
        n = b * n + (1 - b) * d
        root = np.sqrt(v / (1 - 0.95**t))
        rows.append(-0.1 * (m / (1 - 0.9**t) + b * n) / (root + 1e-3))
      want[name] = np.array(rows)
    with jax.enable_x64(True):
      got = _updates(self._make(b3=b), jax.tree.map(jnp.asarray, noise))
    self.assertLess(_gap(got, want), 1e-12)

  def test_mean_of_second_moments(self):
    """The mean of all so far; for a constant gradient in closed form."""
    tx = transforms.scale_by_mada(0.1, **ADAM, learn=())
    with jax.enable_x64(True):
      g = jnp.array([3.0])
      state, step, seen = tx.init(g), jax.jit(tx.update), []
      for t in range(1, 31):
        _, state = step(g, state)
        seen.append(state.moments.nu)
        np.testing.assert_allclose(
          state.moments.nu_bar, np.mean(seen, axis=0), rtol=1e-12
        )
        want = 9 * (1 - 0.95 * (1 - 0.95**t) / (t * 0.05))
        np.testing.assert_allclose(state.moments.nu_bar, want, rtol=1e-12)


class LearningTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_goes_down(self):
    """A step against h lowers the next loss by delta times |h|^2."""
    with jax.enable_x64(True):
      a = jnp.linspace(0.5, 3.0, 6)
      loss = lambda p: 0.5 * jnp.sum(a * jnp.square(p))
      start = jnp.linspace(-1.0, 2.0, 6)

      @jax.jit
      def run(change):
        """The hyper-gradient, and the loss after a fifth, changed update."""
        tx = transforms.scale_by_mada(
          0.1,
          **INSIDE,
          hyper_clip=None,
          hyper_delay=1,
          # Else a part of the derivative is left out.
          hyper_through_mean=True,
        )
        params, state = start, tx.init(start)
        for _ in range(5):
          last = params, state
          updates, state = tx.update(jax.grad(loss)(params), state)
          params = params - 0.1 * updates
        _, after = tx.update(jax.grad(loss)(params), state)
        # The last update once more, with other coefficients: with the delay
        # it uses those that the state before holds.
        params, state = last
        state = state._replace(coefficients=state.coefficients + change)
        updates, _ = tx.update(jax.grad(loss)(params), state)
        return after.trace, loss(params - 0.1 * updates)

      h, before = run(jnp.zeros(6))
      square = jnp.sum(jnp.square(h))
      delta = 1e-6 / jnp.sqrt(square)
      _, after = run(-delta * h)
      np.testing.assert_allclose((before - after) / (delta * square), 1, 1e-3)

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  @pytest.mark.slow
  def test_what_is_no_number_teaches_nothing(self, bad):
    """All of it or one entry, in the gradients or in `hyper_grads`."""
    tx = transforms.scale_by_mada(
      0.1, **INSIDE, hyper_learning_rate=0.1, hyper_momentum=0.9
    )
    noise = jax.tree.map(jnp.float32, _noise(4))
    good = [jax.tree.map(lambda e, t=t: e[t], noise) for t in range(4)]
    step = jax.jit(lambda g, state, h: tx.update(g, state, hyper_grads=h))
    state = tx.init(good[0])
    for g in good[:3]:
      _, state = step(g, state, g)
    spoilt = (
      jax.tree.map(lambda g: jnp.full_like(g, bad), good[3]),
      {**good[3], 'vector': good[3]['vector'].at[1].set(bad)},
    )
    self.assertGreater(np.abs(state.trace).min(), 0)
    for g in spoilt:
      for grads in (g, good[3]):
        _, after = step(grads, state, g)
        np.testing.assert_array_equal(after.coefficients, state.coefficients)
        np.testing.assert_array_equal(after.trace, state.trace)
    # `hyper_grads` leave no mark: the next step learns again.
    _, after = step(good[3], after, good[3])
    self.assertTrue(np.all(np.isfinite(after.coefficients)))
    self.assertGreater(_gap(after.trace, state.trace), 0)

  def test_stays_in_its_box(self):
    self._check_stays_in_its_box(1e9)

  @pytest.mark.slow
  def test_stays_in_its_box_elsewhere(self):
    self._check_stays_in_its_box(-1e9)

  def _check_stays_in_its_box(self, size):
    tx = transforms.scale_by_mada(
      0.1, **INSIDE, hyper_clip=None, hyper_learning_rate=1.0
    )
    # The first update teaches nothing, whatever its coefficients.
    first, g = jnp.float32(_noise(2)['vector'])
    step = jax.jit(tx.update)
    _, state = step(first, tx.init(g), hyper_grads=first)
    _, state = step(g, state, hyper_grads=0 * g)
    _, state = step(g, state, hyper_grads=size * g)
    low, high = np.float32(mada_oracle.LOW), np.float32(mada_oracle.HIGH)
    coefficients = np.asarray(state.coefficients)
    self.assertTrue(np.all((coefficients >= low) & (coefficients <= high)))
    on_a_bound = (coefficients == low) | (coefficients == high)
    self.assertTrue(np.all(on_a_bound), msg=coefficients)

  def test_leaves_a_bound_at_once(self):
    """The projection clips the value and not the gradient."""
    tx = transforms.scale_by_mada(0.1, **ADAM, hyper_learning_rate=0.1)
    g = jnp.float32(_noise(4)['vector'])
    step, state, seen = jax.jit(tx.update), tx.init(g[0]), []
    for t in range(4):
      for sign in (1, -1):
        _, after = step(g[t], state, hyper_grads=sign * g[t])
        seen.append(float(after.coefficients[3]) < 1)
      state = after if seen[-1] else state
      _, state = step(g[t], state, hyper_grads=0 * g[t])
    self.assertIn(True, seen)
