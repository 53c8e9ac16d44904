"""Families against the paper's formulas, and against exact Bayes."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

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


class FamilyTest(parameterized.TestCase):
  @parameterized.product(
    name=list(SCORES), dtype=('float32', 'float64'), center=(0.0, 1.3)
  )
  def test_scores(self, name, dtype, center):
    x, z = _data(name, 30, 4), oracle.starts(1, 30, 3)
    given = {} if name == 'multinomial' else {'center': center}
    model = mixture.make(_make(name, 4, **given), 3, concentration=oracle.ALPHA)
    with jax.enable_x64(dtype == 'float64'):
      data = jnp.asarray(x, dtype)
      statistics = model_lib.summarize(model, data, jnp.asarray(z, dtype))
      features = model.family.features(data)
      self.assertEqual(features.shape, (30, model.family.num_features))
      found = model_lib.weigh(model_lib.expect(model, statistics), features)
    self.assertEqual(found.dtype, dtype)
    tolerance = 1e-10 if dtype == 'float64' else 2e-4
    np.testing.assert_allclose(
      found.T, SCORES[name](x, z), rtol=tolerance, atol=tolerance
    )

  @parameterized.parameters(*EVIDENCE)
  def test_one_component_is_exact_bayes(self, name):
    x = _data(name, 25, 3)
    with jax.enable_x64(True):
      model = mixture.make(_make(name, 3), 1)
      data = jnp.asarray(x)
      bound = mixture.elbo_at(model, data, jnp.ones((25, 1)))
      statistics = model_lib.summarize(model, data, jnp.ones((25, 1)))
      best = mixture.elbo(model, statistics, data)
    np.testing.assert_allclose(bound, EVIDENCE[name](x), rtol=1e-11)
    np.testing.assert_allclose(best, EVIDENCE[name](x), rtol=1e-11)

  def test_closed_form_of_the_diagonal_evidence(self):
    gammaln = lambda x: float(jax.scipy.special.gammaln(x))
    x = _data('diagonal', 20, 2)
    n, a0, b0 = len(x), oracle.DEGREES / 2, 1 / (2 * oracle.SCALE)
    beta, a = oracle.BETA + n, a0 + n / 2
    with jax.enable_x64(True):
      want = 0.0
      for column in x.T:
        m = (oracle.BETA * oracle.MEAN + column.sum()) / beta
        b = column @ column + oracle.BETA * oracle.MEAN**2 - beta * m * m
        b = b0 + b / 2
        want += gammaln(a) - gammaln(a0) + a0 * np.log(b0) - a * np.log(b)
        want += np.log(oracle.BETA / beta) / 2 - n / 2 * np.log(2 * np.pi)
      model = mixture.make(_make('diagonal', 2), 1)
      found = mixture.elbo_at(model, jnp.asarray(x), jnp.ones((n, 1)))
    np.testing.assert_allclose(found, want, rtol=1e-12)

  @parameterized.parameters(*SCORES)
  def test_bound_does_not_depend_on_the_centre_but_on_every_prior(self, name):
    x, z = _data(name, 20, 2), oracle.starts(1, 20, 3)
    with jax.enable_x64(True):
      bound = lambda family, **settings: float(
        mixture.elbo_at(
          mixture.make(family, 3, **settings), jnp.asarray(x), jnp.asarray(z)
        )
      )
      first = bound(_make(name, 2))
      self.assertNotAlmostEqual(first, bound(_make(name, 2), concentration=1.0))
      if name == 'multinomial':
        self.assertNotAlmostEqual(first, bound(mixture.multinomial(2)))
        return
      centred = bound(_make(name, 2, center=np.array([0.4, -2.0])))
      self.assertAlmostEqual(first, centred, delta=1e-9)
      make = getattr(mixture, f'gaussian_{name}')
      for prior, value in PRIORS.items():
        other = bound(make(2, **(PRIORS | {prior: value + 0.5})))
        self.assertGreater(abs(first - other), 1e-3, msg=prior)

  def test_centre_saves_digits_in_float32(self):
    x, z = _data('diagonal', 200, 3) + 300.0, oracle.starts(1, 200, 3)
    want = oracle.diagonal_scores(x, z)
    errors = []
    for center in (0.0, x.mean(0)):
      model = mixture.make(
        _make('diagonal', 3, center=center), 3, concentration=oracle.ALPHA
      )
      data = jnp.float32(x)
      statistics = model_lib.summarize(model, data, jnp.float32(z))
      features = model.family.features(data)
      found = model_lib.weigh(model_lib.expect(model, statistics), features)
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
