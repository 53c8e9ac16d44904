"""Expectations against SciPy's digamma."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from scipy import special

from emc2.topics.lda import expectations


class ExpDigammaTest(parameterized.TestCase):
  def test_float32(self):
    x = np.concatenate(
      [10 ** np.linspace(-1.9, 9, 20_001), np.linspace(0.02, 50, 20_001)]
    ).astype(np.float32)
    psi = special.digamma(x.astype(np.float64))
    got = np.asarray(expectations.exp_digamma(jnp.asarray(x)), np.float64)
    seen = psi > np.log(1e-36)
    error = np.abs(got / np.exp(psi) - 1)[seen]
    self.assertLess(np.max(error / (1 + np.abs(psi[seen]))), 6 * 2**-23)
    np.testing.assert_allclose(got[~seen], 0, atol=1e-36)

  def test_sinks_to_zero(self):
    x = jnp.asarray([0.01, 1e-3, 1e-20], jnp.float32)
    np.testing.assert_array_equal(expectations.exp_digamma(x), 0)

  def test_float64(self):
    with jax.enable_x64(True):
      x = np.geomspace(1e-2, 1e9, 999)
      got = expectations.exp_digamma(jnp.asarray(x))
      np.testing.assert_allclose(got, np.exp(special.digamma(x)), rtol=1e-13)


class WeightsTest(parameterized.TestCase):
  def test_documents(self):
    sums = np.random.default_rng(0).gamma(0.3, 5, (7, 4))
    with jax.enable_x64(True):
      got = expectations.document_weights(jnp.asarray(sums), 0.1)
    gamma = sums + 0.1
    want = special.digamma(gamma) - special.digamma(gamma.sum(1))[:, None]
    np.testing.assert_allclose(got, np.exp(want), rtol=1e-10)

  def test_words(self):
    sums = np.random.default_rng(0).gamma(0.3, 5, (2, 5, 4))
    totals = sums.sum((0, 1))
    with jax.enable_x64(True):
      got = expectations.word_weights(
        jnp.asarray(sums), jnp.asarray(totals), 0.05, 10
      )
    want = special.digamma(sums + 0.05) - special.digamma(totals + 0.5)
    got = np.asarray(got.scaled) * np.exp(np.asarray(got.logs))[..., None]
    np.testing.assert_allclose(got, np.exp(want), rtol=1e-10)
