"""The slopes of MADA against complex steps, differences and autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2.kernels import lowering, mada
from emc2.kernels.mada import pallas_tpu, reference

from tests.transforms import mada_oracle

INSIDE = (0.8, 0.9, 0.3, 0.6, 0.7, 0.4)
FIELDS = ('m', 'v', 'v_bar', 'n', 'last', 'lion')  # In the order of Moments.

FAMILIES = {
  'plain': {},
  'maximum': {'maximum': True},
  'released_lion': {'released_lion': True},
  'released_init': {'released_init': True},
  'through_mean': {'through_mean': True},
  'eps': {'eps': 0.5},
  'lion': {'lion_b1': 0.5, 'lion_b2': 0.5},
}

# Compiled: faster than one operation after another.
_only_advance = jax.jit(mada.advance, static_argnames='settings')
_exchange = jax.jit(
  mada.exchange, static_argnames=('settings', 'implementation')
)
_direction = jax.jit(mada.direction, static_argnames='settings')
_derivatives = jax.jit(reference.derivatives, static_argnames='settings')
_families = parameterized.named_parameters(
  (f'{name}_{t}', options, t)
  for name, options in FAMILIES.items()
  for t in (1, 2, 7)
)


def _advance(moments, grad, hyper_grad, k, settings):
  after, _, products = _exchange(
    moments, grad, grad, hyper_grad, k, settings=settings
  )
  return after, products


def _split(options):
  settings = mada.Settings(
    **{k: v for k, v in options.items() if k in mada.Settings._fields}
  )
  constants = mada.Constants(
    **{k: v for k, v in options.items() if k in mada.Constants._fields}
  )
  return mada_oracle.Family(**options), settings, constants


def _tensor(seed=0, shape=(20, 20)):
  """A state such as noise leaves, with v and its mean apart."""
  rng = np.random.default_rng(seed)
  draw = lambda: rng.normal(size=shape)
  squares = lambda: rng.uniform(0.2, 2.0, size=shape)
  return mada_oracle.Tensor(
    m=draw(), v=squares(), n=draw(), v_bar=squares(), last=draw(), lion=draw()
  )


def _state(t, family, shape=(20, 20)):
  """A state before update t, and two gradients, in float64."""
  tensor = (
    mada_oracle.Tensor.zeros(shape, family) if t == 1 else _tensor(0, shape)
  )
  rng = np.random.default_rng(1)
  return tensor, rng.normal(size=shape), rng.normal(size=shape)


def _moments(tensor, dtype=jnp.float64):
  fields = {k: jnp.asarray(getattr(tensor, k), dtype) for k in FIELDS}
  return mada.Moments(*fields.values())


def _scalars(q, t, constants=None):
  constants = mada.Constants() if constants is None else constants
  return mada.Scalars.of(jnp.asarray(q), jnp.asarray(t, jnp.int32), constants)


def _products(hyper_grad, slopes):
  return np.array([np.sum(hyper_grad * slope) for slope in slopes])


class MadaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @_families
  def test_matches_the_loop(self, options, t):
    """The update, the moments after it and the inner products."""
    family, settings, constants = _split(options)
    tensor, g, later = _state(t, family)
    k, moments = _scalars(INSIDE, t, constants), _moments(tensor)
    got = _direction(moments, jnp.asarray(g), k, settings)
    after, products = _advance(
      moments, jnp.asarray(g), jnp.asarray(later), k, settings
    )
    want, end = mada_oracle.advance(tensor, g, INSIDE, t, family)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    for a, b in zip(after, _moments(end), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    slopes = mada_oracle.slopes(tensor, g, INSIDE, t, family)
    want = _products(later, slopes)
    np.testing.assert_allclose(products, want, rtol=1e-10, atol=1e-11)

  def test_each_option_counts(self):
    """The cases above would fail if an option were ignored."""
    for name, options in FAMILIES.items():
      if not options:
        continue
      gap = 0.0
      for t in (1, 7):
        ends = []
        for chosen in ({}, options):
          family = mada_oracle.Family(**chosen)
          tensor, g, later = _state(t, family)
          slopes = mada_oracle.slopes(tensor, g, INSIDE, t, family)
          ends.append(_products(later, slopes))
        gap = max(gap, np.abs(ends[0] - ends[1]).max())
      self.assertGreater(gap, 1e-2, msg=name)

  def test_slopes_are_those_of_autodiff(self):
    self._check_slopes_are_those_of_autodiff(7)

  @parameterized.parameters(1, 2)
  @pytest.mark.slow
  def test_slopes_are_those_of_autodiff_elsewhere(self, t):
    self._check_slopes_are_those_of_autodiff(t)

  def _check_slopes_are_those_of_autodiff(self, t):
    """And of central differences; v-bar counts as constant."""
    family, settings, constants = _split({})
    tensor, g, later = _state(t, family)
    moments, g, later = _moments(tensor), jnp.asarray(g), jnp.asarray(later)
    k = _scalars(INSIDE, t, constants)
    after = reference.advance(moments, g, k, settings)
    slopes = _derivatives(moments, after, g, k, settings)

    @functools.partial(jax.jit, static_argnums=1)
    def loss(q, stops=True):
      of = _scalars(q, t, constants)
      end = reference.advance(moments, g, of, settings)
      if stops:
        # The same mean, whatever the coefficients.
        end = end._replace(nu_bar=after.nu_bar)
      root = jnp.sqrt(
        (of.rho * end.nu + (1 - of.rho) * end.nu_bar) / (1 - of.b2**t)
      )
      top = end.mu / (1 - of.b1**t) + of.b3 * end.delta
      sign = jnp.sign(0.95 * moments.lion + 0.05 * g)
      u = of.gamma * top / (root + 1e-6) + (1 - of.gamma) * sign
      return -0.3 * jnp.sum(later * u)

    h = -0.3 * _products(later, slopes)
    q = jnp.asarray(INSIDE)
    np.testing.assert_allclose(h, jax.grad(loss)(q), rtol=1e-10, atol=1e-11)
    for i in range(6):
      step = jnp.zeros(6).at[i].set(1e-5)
      central = (loss(q + step) - loss(q - step)) / 2e-5
      np.testing.assert_allclose(h[i], central, rtol=1e-5, atol=1e-6)

  def test_first_step_is_neutral(self):
    """From zero, bias correction leaves nothing to learn."""
    tensor = mada_oracle.Tensor.zeros((50,))
    g = jnp.asarray(np.random.default_rng(0).normal(size=50))
    q = (0.9, 0.95, 0.0, 1.0, 1.0, 1.0)
    k, moments, settings = _scalars(q, 1), _moments(tensor), mada.Settings()
    after = reference.advance(moments, g, k, settings)
    slopes = _derivatives(moments, after, g, k, settings)
    for slope in slopes[:5]:
      np.testing.assert_allclose(slope, 0, atol=1e-12)
    # -eps / (|g| + eps), up to its sign.
    np.testing.assert_allclose(
      np.abs(slopes[5]), 1e-6 / (np.abs(g) + 1e-6), rtol=1e-6, atol=1e-14
    )

  @parameterized.parameters(1.0, 0.4)
  def test_scales_with_the_loss(self, gamma):
    """The direction does not change, the slopes' products grow alike."""
    q = (0.8, 0.9, 0.3, 0.6, 0.7, gamma)
    k = _scalars(q, 7, mada.Constants(eps=0.0))
    settings, ends = mada.Settings(), []
    for s in (1.0, 8.5):
      tensor, g, later = _state(7, mada_oracle.Family())
      tensor = mada_oracle.Tensor(
        m=s * tensor.m,
        v=s**2 * tensor.v,
        n=s * tensor.n,
        v_bar=s**2 * tensor.v_bar,
        last=s * tensor.last,
        lion=s * tensor.lion,
      )
      moments, g = _moments(tensor), jnp.asarray(s * g)
      u = _direction(moments, g, k, settings)
      _, products = _advance(moments, g, jnp.asarray(s * later), k, settings)
      ends.append((u, products))
    (u, products), (other, others) = ends
    np.testing.assert_allclose(other, u, rtol=1e-10)
    np.testing.assert_allclose(others, 8.5 * products, rtol=1e-10)

  def test_the_maximum_is_one_sided(self):
    """The mean is not: it tells rho to rise as well as to fall."""
    signs = {}
    for maximum in (True, False):
      settings = mada.Settings(maximum=maximum)
      moments = _moments(mada_oracle.Tensor.zeros((50,)))
      rng = np.random.default_rng(0)
      for t in range(1, 31):
        k = _scalars((0.9, 0.9, 0.0, 0.5, 1.0, 1.0), t)
        g = jnp.asarray(rng.normal(size=50) * rng.exponential())
        before, moments = moments, _only_advance(moments, g, k, settings)
      signs[maximum] = np.asarray(moments.nu - moments.nu_bar)
      if maximum:
        slope = _derivatives(before, moments, g, k, settings)[3]
        # The numerator over what is positive, times what is at most 0.
        self.assertTrue(np.all(np.asarray(slope * moments.mu) >= 0))
    self.assertLessEqual(signs[True].max(), 0)
    self.assertLess(signs[True].min(), 0)
    self.assertLess(signs[False].min(), 0)
    self.assertGreater(signs[False].max(), 0)

  def test_where_nothing_ever_came(self):
    """A root of 0 gives no NaN, nor does one that underflows."""
    for start in (0.0, 1e-30):
      tensor = mada_oracle.Tensor.zeros((4,))
      tensor.v, tensor.v_bar = tensor.v + start, tensor.v_bar + start
      k = _scalars(INSIDE, 9)
      g = jnp.zeros(4)
      u = _direction(_moments(tensor), g, k, mada.Settings())
      _, products = _advance(
        _moments(tensor), g, jnp.ones(4), k, mada.Settings()
      )
      np.testing.assert_array_equal(u, np.zeros(4))
      np.testing.assert_array_equal(products, np.zeros(6))

  def test_small_roots_bend_nothing(self):
    """Below 1e-12 the slope of the root counts as 0, above it does not."""
    for root, guarded in ((0.5e-12, True), (2e-12, False)):
      k = _scalars((0.5, 0.6, 0.0, 0.5, 1.0, 1.0), 200)
      tensor = mada_oracle.Tensor.zeros((1,))
      tensor.v, tensor.v_bar = tensor.v + root**2 / 0.6, tensor.v_bar + root**2
      tensor.m = tensor.m + 1.0
      moments = _moments(tensor)
      _, products = _advance(
        moments, jnp.zeros(1), jnp.ones(1), k, mada.Settings()
      )
      self.assertEqual(float(products[1]) == 0, guarded)
      self.assertTrue(np.all(np.isfinite(products)))

  def test_what_the_moments_fix(self):
    """Without n, or l, it is the update at beta3 = 0, or gamma = 1."""
    full = _moments(_tensor())
    _, g, later = (jnp.asarray(x) for x in (0.0, *_state(7, None)[1:]))
    settings = mada.Settings()
    cases = (
      ({'delta': None, 'previous': None}, 2, (0.8, 0.9, 0.0, 0.6, 0.7, 0.4)),
      ({'lion': None}, 5, (0.8, 0.9, 0.3, 0.6, 0.7, 1.0)),
    )
    for fields, which, q in cases:
      k = _scalars(q, 7)
      less = full._replace(**fields)
      np.testing.assert_allclose(
        _direction(less, g, k, settings),
        _direction(full, g, k, settings),
        rtol=1e-12,
      )
      after, products = _advance(less, g, later, k, settings)
      want_after, want = _advance(full, g, later, k, settings)
      self.assertEqual(float(products[which]), 0)
      self.assertNotEqual(float(want[which]), 0)
      rest = np.arange(6) != which
      np.testing.assert_allclose(products[rest], want[rest], rtol=1e-12)
      for name, a, b in zip(after._fields, after, want_after, strict=True):
        if name in fields:
          self.assertIsNone(a)
        else:
          np.testing.assert_allclose(a, b, rtol=1e-12)

  def test_dtypes(self):
    self._check_dtypes(jnp.float32)

  @parameterized.parameters(jnp.bfloat16, jnp.float64)
  @pytest.mark.slow
  def test_dtypes_elsewhere(self, dtype):
    self._check_dtypes(dtype)

  def _check_dtypes(self, dtype):
    """Moments keep theirs, the update has that of the gradient."""
    tensor, g, later = _state(7, None)
    wide = np.promote_types(dtype, np.float32)
    moments = _moments(tensor, dtype)
    moments = moments._replace(
      nu=moments.nu.astype(wide), nu_bar=moments.nu_bar.astype(wide)
    )
    k, settings = _scalars(INSIDE, 7), mada.Settings()
    g, later = jnp.asarray(g, dtype), jnp.asarray(later, dtype)
    u = _direction(moments, g, k, settings)
    after, products = _advance(moments, g, later, k, settings)
    self.assertEqual(u.dtype, dtype)
    self.assertEqual(products.dtype, wide)
    for old, new in zip(moments, after, strict=True):
      self.assertEqual((new.dtype, new.shape), (old.dtype, old.shape))
    # What they hold is what a computation in float64 is asked about.
    up = lambda x: np.asarray(x.astype(jnp.float64))
    fields = dict(zip(FIELDS, (up(x) for x in moments), strict=True))
    tensor = mada_oracle.Tensor(**fields)
    want, _ = mada_oracle.advance(
      tensor, up(g), INSIDE, 7, mada_oracle.Family()
    )
    slopes = mada_oracle.slopes(tensor, up(g), INSIDE, 7, mada_oracle.Family())
    rtol = {jnp.bfloat16: 1e-2, jnp.float32: 1e-5, jnp.float64: 1e-12}[dtype]
    np.testing.assert_allclose(up(u), want, rtol=rtol, atol=rtol)
    sums = _products(up(later), slopes)
    # Sums are in float32 at least, whatever the leaf.
    rtol = min(rtol, 1e-5)
    np.testing.assert_allclose(products, sums, rtol=10 * rtol, atol=10 * rtol)


class BlockedTest(parameterized.TestCase):
  """The loop over blocks of the cache."""

  def test_equals_the_reference(self):
    self._check_equals_the_reference({}, INSIDE)

  @parameterized.named_parameters(
    ('released_init', {'released_init': True}, INSIDE),
    ('maximum', {'maximum': True}, INSIDE),
  )
  @pytest.mark.slow
  def test_equals_the_reference_elsewhere(self, options, coefficients):
    self._check_equals_the_reference(options, coefficients)

  def _check_equals_the_reference(self, options, coefficients):
    settings = mada.Settings(**options)
    rng = np.random.default_rng(3)
    draw = lambda: jnp.asarray(rng.normal(size=(96, 128)), jnp.float32)
    moments = mada.Moments(
      draw(), jnp.abs(draw()), jnp.abs(draw()), draw(), draw(), draw()
    )
    k = mada.Scalars.of(
      jnp.asarray(coefficients, jnp.float32), jnp.int32(2), mada.Constants()
    )
    grads = draw(), draw(), draw()
    outputs = [
      _exchange(moments, *grads, k, settings=settings, implementation=name)
      for name in ('xla', 'blocked')
    ]
    for want, got in zip(*map(jax.tree.leaves, outputs), strict=True):
      np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)

  def test_without_what_the_moments_fix(self):
    draw = jax.random.normal(jax.random.key(0), (4, 4096))
    moments = mada.Moments(draw, draw**2, draw**2, None, None, None)
    k = mada.Scalars.of(
      jnp.asarray((0.9, 0.95, 0.0, 0.5, 0.5, 1.0), jnp.float32),
      jnp.int32(3),
      mada.Constants(),
    )
    settings = mada.Settings()
    after, kept, products = _exchange(
      moments, draw, -draw, draw, k, settings=settings, implementation='blocked'
    )
    self.assertIsNone(after.delta)
    np.testing.assert_array_equal(kept, -draw)
    np.testing.assert_array_equal(products[jnp.array([2, 5])], 0)

  def test_needs_a_divisor_and_one_dtype(self):
    prime = jnp.ones(65_537)
    moments = mada.Moments(prime, prime, prime, None, None, None)
    k = mada.Scalars.of(
      jnp.asarray(INSIDE, jnp.float32), jnp.int32(2), mada.Constants()
    )
    with self.assertRaisesRegex(NotImplementedError, 'with a divisor'):
      mada.exchange(
        *(moments, prime, prime, prime, k, mada.Settings()),
        implementation='blocked',
      )
    with self.assertRaisesRegex(ValueError, "implementation='rows'"):
      mada.exchange(
        *(moments, prime, prime, prime, k, mada.Settings()),
        implementation='rows',
      )

  def test_auto_takes_it_where_a_leaf_lies_whole(self):
    # Eight devices here, of which `shard_map` gives each its own part.
    leaf = jnp.ones((8, 8192))
    moments = mada.Moments(leaf, leaf, leaf, None, None, None)
    k = mada.Scalars.of(
      jnp.asarray(INSIDE, jnp.float32), jnp.int32(2), mada.Constants()
    )
    run = lambda m, g: mada.exchange(m, g, g, g, k, mada.Settings())[0]
    mesh = jax.make_mesh(
      (8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split = jax.P('fsdp')
    inside = jax.shard_map(
      run, mesh=mesh, in_specs=(split, split), out_specs=split
    )
    self.assertNotIn('while', jax.jit(run).lower(moments, leaf).as_text())
    self.assertIn('while', jax.jit(inside).lower(moments, leaf).as_text())


class PallasTest(parameterized.TestCase):
  """The kernel for TPUs."""

  def _case(self, shape=(64, 256), fields=6):
    rng = np.random.default_rng(5)
    draw = lambda: jnp.asarray(rng.normal(size=shape), jnp.float32)
    moments = [draw(), jnp.abs(draw()), jnp.abs(draw()), draw(), draw(), draw()]
    moments = mada.Moments(*moments[:fields], *[None] * (6 - fields))
    k = mada.Scalars.of(
      jnp.asarray(INSIDE, jnp.float32), jnp.int32(2), mada.Constants()
    )
    return moments, draw(), draw(), draw(), k

  def test_equals_the_reference(self):
    self._check_equals_the_reference((64, 256), 6, True)

  @parameterized.named_parameters(
    ('three_axes', (4, 16, 384), 6, True),
    ('one_gradient', (64, 256), 6, False),
    ('fixed', (16, 2048), 3, False),
  )
  @pytest.mark.slow
  def test_equals_the_reference_elsewhere(self, shape, fields, has_hyper_grad):
    self._check_equals_the_reference(shape, fields, has_hyper_grad)

  def _check_equals_the_reference(self, shape, fields, has_hyper_grad):
    moments, grad, new, later, k = self._case(shape, fields)
    later = later if has_hyper_grad else None
    run = functools.partial(
      pallas_tpu.exchange, settings=mada.Settings(), interpret=True
    )
    got = jax.jit(run)(moments, grad, new, later, k)
    want = _exchange(
      *(moments, grad, new, later, k),
      settings=mada.Settings(),
      implementation='xla',
    )
    self.assertIsNone(got[0].lion if fields == 3 else None)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)

  def test_one_kernel_for_a_tpu_and_none_elsewhere(self):
    moments, grad, new, _, k = self._case()
    run = lambda *args: mada.exchange(
      *args, None, k, mada.Settings(), implementation='pallas_tpu'
    )
    lowered = lowering.lower_for(run, moments, grad, new, platform='tpu')
    self.assertEqual(
      lowered.as_text().count('kernel_name = "mada_exchange"'), 1
    )

  @parameterized.named_parameters(
    ('columns', (64, 250), 'a last axis'),
    ('rows', (4, 256), 'multiple of 8 rows'),
    ('vector', (1024,), 'a last axis'),
  )
  def test_refuses_other_shapes(self, shape, words):
    *args, k = self._case(shape)
    with self.assertRaisesRegex(NotImplementedError, words):
      mada.exchange(*args, k, mada.Settings(), implementation='pallas_tpu')
