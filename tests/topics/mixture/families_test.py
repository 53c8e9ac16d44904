"""Families against the paper's formulas, and against exact Bayes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import special

from emc2.topics import mixture
from emc2.topics.mixture import model as model_lib

from tests.topics.mixture import oracle

PRIORS = dict(
  degrees=oracle.DEGREES,
  scale=oracle.SCALE,
  mean=oracle.MEAN,
  mean_strength=oracle.BETA,
)


def _make(name, dim, **settings):
  if name == 'multinomial':
    return mixture.multinomial(dim, prior=0.2)
  return getattr(mixture, f'gaussian_{name}')(dim, **PRIORS, **settings)


def _data(name, num_rows, dim):
  if name == 'multinomial':
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 4, size=(2, dim))
    return rng.poisson(rates[rng.integers(2, size=num_rows)]).astype('float64')
  return oracle.points(0, num_rows, dim)[0]


SCORES = {
  'diagonal': oracle.diagonal_scores,
  'full': oracle.full_scores,
  'multinomial': lambda x, z: oracle.multinomial_scores(x, z, 0.2),
}
EVIDENCE = {
  'diagonal': oracle.diagonal_evidence,
  'full': oracle.full_evidence,
  'multinomial': lambda x: oracle.multinomial_evidence(x, 0.2),
}


def _scores(model):
  """Of data and responsibilities, (K, N)."""

  def scores(data, z):
    statistics = model_lib.summarize(model, data, z)
    expectations = model_lib.expect(model, statistics)
    return model_lib.weigh(expectations, model.family.features(data))

  return jax.jit(scores)


@functools.cache
def _bounds_of_one(name):
  """Of data (25, 3): at all responsibilities 1, and with the best."""
  model = mixture.make(_make(name, 3), 1)

  @jax.jit
  def bounds(data):
    ones = jnp.ones((25, 1))
    best = mixture.elbo(model, model_lib.summarize(model, data, ones), data)
    return mixture.elbo_at(model, data, ones), best

  return bounds


class FamilyTest(parameterized.TestCase):
  @parameterized.product(name=list(SCORES), dtype=('float32', 'float64'))
  @pytest.mark.slow
  def test_scores(self, name, dtype):
    x, z = _data(name, 30, 4), oracle.starts(1, 30, 3)
    given = {} if name == 'multinomial' else {'center': 1.3}
    model = mixture.make(_make(name, 4, **given), 3, concentration=oracle.ALPHA)
    with jax.enable_x64(dtype == 'float64'):
      data = jnp.asarray(x, dtype)
      features = jax.eval_shape(model.family.features, data)
      self.assertEqual(features.shape, (30, model.family.num_features))
      found = _scores(model)(data, jnp.asarray(z, dtype))
    self.assertEqual(found.dtype, dtype)
    tolerance = 1e-10 if dtype == 'float64' else 2e-4
    np.testing.assert_allclose(
      found.T, SCORES[name](x, z), rtol=tolerance, atol=tolerance
    )

  @parameterized.parameters(*EVIDENCE)
  def test_one_component_is_exact_bayes(self, name):
    x = _data(name, 25, 3)
    with jax.enable_x64(True):
      bound, best = _bounds_of_one(name)(jnp.asarray(x))
    np.testing.assert_allclose(bound, EVIDENCE[name](x), rtol=1e-11)
    np.testing.assert_allclose(best, EVIDENCE[name](x), rtol=1e-11)

  def test_closed_form_of_the_diagonal_evidence(self):
    x, gammaln = _data('diagonal', 25, 3), special.gammaln
    n, a0, b0 = len(x), oracle.DEGREES / 2, 1 / (2 * oracle.SCALE)
    beta, a = oracle.BETA + n, a0 + n / 2
    want = 0.0
    for column in x.T:
      m = (oracle.BETA * oracle.MEAN + column.sum()) / beta
      b = column @ column + oracle.BETA * oracle.MEAN**2 - beta * m * m
      b = b0 + b / 2
      want += gammaln(a) - gammaln(a0) + a0 * np.log(b0) - a * np.log(b)
      want += np.log(oracle.BETA / beta) / 2 - n / 2 * np.log(2 * np.pi)
    with jax.enable_x64(True):
      found, _ = _bounds_of_one('diagonal')(jnp.asarray(x))
    np.testing.assert_allclose(found, want, rtol=1e-12)

  @parameterized.parameters(*SCORES)
  @pytest.mark.slow
  def test_bound_does_not_depend_on_the_centre_but_on_every_prior(self, name):
    models = {'first': mixture.make(_make(name, 2), 3)}
    models['concentration'] = mixture.make(_make(name, 2), 3, concentration=1.0)
    if name == 'multinomial':
      models['prior'] = mixture.make(mixture.multinomial(2), 3)
    else:
      center = np.array([0.4, -2.0])
      models['center'] = mixture.make(_make(name, 2, center=center), 3)
      make = getattr(mixture, f'gaussian_{name}')
      for prior, value in PRIORS.items():
        family = make(2, **(PRIORS | {prior: value + 0.5}))
        models[prior] = mixture.make(family, 3)

    @jax.jit
    def bounds(x, z):
      return {key: mixture.elbo_at(m, x, z) for key, m in models.items()}

    with jax.enable_x64(True):
      x, z = _data(name, 20, 2), oracle.starts(1, 20, 3)
      found = jax.device_get(bounds(jnp.asarray(x), jnp.asarray(z)))
    first = found.pop('first')
    if name != 'multinomial':
      self.assertAlmostEqual(found.pop('center'), first, delta=1e-9)
    for prior, other in found.items():
      self.assertGreater(abs(first - other), 1e-3, msg=prior)

  def test_centre_saves_digits_in_float32(self):
    x, z = _data('diagonal', 200, 3) + 300.0, oracle.starts(1, 200, 3)
    want = oracle.diagonal_scores(x, z)
    errors = []
    for center in (0.0, x.mean(0)):
      model = mixture.make(
        _make('diagonal', 3, center=center), 3, concentration=oracle.ALPHA
      )
      found = _scores(model)(jnp.float32(x), jnp.float32(z))
      errors.append(np.abs(found.T - want).max())
    self.assertLess(errors[1], 2e-2)
    self.assertGreater(errors[0], 5 * errors[1])

  @parameterized.named_parameters(
    ('dim', 'diagonal', dict(dim=0), 'dim'),
    ('degrees', 'diagonal', dict(degrees=0.0), 'degrees'),
    ('wishart', 'full', dict(dim=3, degrees=2.0), 'degrees'),
    ('scale', 'full', dict(scale=-1.0), 'scale'),
    ('strength', 'diagonal', dict(mean_strength=float('nan')), 'mean_strength'),
    ('mean', 'diagonal', dict(mean=np.zeros(3)), 'mean'),
    ('center', 'full', dict(center=np.array([np.nan, 0.0])), 'center'),
  )
  def test_refuses_gaussian(self, name, given, match):
    make = getattr(mixture, f'gaussian_{name}')
    with self.assertRaisesRegex(ValueError, f'^{match} must'):
      make(**(dict(dim=2, degrees=4.0, scale=1.0) | given))

  @parameterized.parameters(
    (dict(dim=1), 'dim'),
    (dict(dim=3, prior=0.0), 'prior'),
    (dict(dim=3, prior=-1.0), 'prior'),
  )
  def test_refuses_multinomial(self, given, match):
    with self.assertRaisesRegex(ValueError, f'^{match} must'):
      mixture.multinomial(**given)

  @parameterized.parameters(
    ('diagonal', np.zeros((0, 2)), 'shape'),
    ('full', np.zeros((4, 3)), 'shape'),
    ('diagonal', np.array([[0.0, np.nan]]), 'finite'),
    ('multinomial', np.array([[1.0, -1.0]]), 'at least 0'),
    ('multinomial', np.zeros((2, 2)), 'above 0'),
    ('multinomial', np.array([[np.nan, 1.0]]), 'finite'),
  )
  def test_refuses_data(self, name, data, match):
    with self.assertRaisesRegex(ValueError, f'^data must .*{match}'):
      _make(name, 2).check(data)
    _make(name, 2).check(np.ones((3, 2)))
