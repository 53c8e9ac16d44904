"""EMC² as a Markov chain, and how far its gradient is from the truth.

Numbers and tolerances as in §5 and §6.1 of the specification of the method.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy import stats

from emc2.contrastive import emc2
from emc2.experiments.benchmarks import contrastive_toys as toys

from tests.contrastive import common

BETA = 5.0


def _kernel(scores, beta=BETA):
  """The transitions of one step, and the law that they keep."""
  size = scores.size
  ratio = np.exp(beta * (scores[None, :] - scores[:, None]))
  kernel = np.minimum(1.0, ratio) / size
  np.fill_diagonal(kernel, 0.0)
  np.fill_diagonal(kernel, 1.0 - kernel.sum(1))
  law = np.exp(beta * scores)
  return kernel, law / law.sum()


class ChainTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.scores = np.random.default_rng(0).uniform(-1, 1, 12)
    self.kernel, self.law = _kernel(self.scores)

  @pytest.mark.slow
  def test_the_estimator_walks_by_this_kernel(self):
    # Sample 0 sees the 12 views of 6 others; a batch of 2 makes 2 steps.
    views = common.clusters(7, 2)
    scores = (views[1:] @ views[0, 0]).reshape(-1)
    kernel, _ = _kernel(scores)
    method = emc2.emc2(
      7, inverse_temperature=BETA, num_views=2, proposals='uniform'
    )
    params, batch = common.table(views), common.batch([0, 3])

    @functools.partial(jax.vmap, in_axes=(0, None))
    def visit(key, start):
      memory = method.init(key, params)
      index = memory.index.at[0, 0].set(1 + start // 2)
      view = memory.view.at[0, 0].set((start % 2).astype(jnp.uint32))
      memory = memory._replace(index=index, view=view)
      _, (after, _) = method.surrogate(
        key, memory, params, batch, common.embed_table
      )
      return 2 * (after.index[0, 0] - 1) + after.view[0, 0].astype(jnp.int32)

    visit, draws = jax.jit(visit), 20_000
    for start in (0, int(scores.argmin()), int(scores.argmax())):
      keys = jax.random.split(jax.random.key(start), draws)
      ends = np.bincount(visit(keys, jnp.int32(start)), minlength=12)
      want = (kernel @ kernel)[start]
      self.assertGreater(stats.chisquare(ends, draws * want).pvalue, 1e-3)

  def test_01_detailed_balance(self):
    flow = self.law[:, None] * self.kernel
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)

  def test_02_spectrum(self):
    law = np.sort(self.law)[::-1]
    size = law.size
    want = [
      np.sum(1 / size - law[k:] / (size * law[k])) for k in range(size - 1)
    ]
    got = np.sort(np.linalg.eigvals(self.kernel).real)[::-1]
    np.testing.assert_allclose(got[0], 1.0, atol=1e-12)
    np.testing.assert_allclose(got[1:], np.sort(want)[::-1], atol=1e-10)
    np.testing.assert_allclose(want[0], 1 - 1 / (size * law[0]), atol=1e-12)

  def test_03_mixing(self):
    power = np.eye(12)
    for steps in range(1, 200):
      power = power @ self.kernel
      distance = np.abs(power - self.law).sum(1).max() / 2
      rate = 1 - 1 / (12 * self.law.max())
      self.assertLessEqual(distance, rate**steps + 1e-12)
      self.assertLessEqual(rate, 1 - np.exp(-2 * BETA))

  def test_05_lipschitz_in_the_scores(self):
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-1):
      other = self.scores + size * rng.uniform(-1, 1, 12)
      distance = np.abs(_kernel(other)[0] - self.kernel).sum(1).max() / 2
      bound = 2 * BETA * np.abs(other - self.scores).max()
      self.assertLessEqual(distance, bound)


@functools.cache
def _error(method, batch_size, visits=2000):
  make = toys.METHODS[method]
  return toys.gradient_error(make, batch_size=batch_size, visits=visits)


class BiasTest(parameterized.TestCase):
  @parameterized.parameters((4, 0.037), (16, 0.017))
  @pytest.mark.slow
  def test_10_uniform_proposals_are_unbiased(self, batch_size, want):
    short = _error('EMC2, uniform proposals', batch_size, 500)
    long = _error('EMC2, uniform proposals', batch_size)
    self.assertBetween(long, 0.7 * want, 1.3 * want)
    self.assertBetween(short / long, 1.5, 2.7)

  @parameterized.parameters((4, 0.051), (16, 0.018))
  @pytest.mark.slow
  def test_resampling_is_unbiased(self, batch_size, want):
    short = _error('EMC2, resampling', batch_size, 500)
    long = _error('EMC2, resampling', batch_size)
    self.assertBetween(long, 0.7 * want, 1.3 * want)
    self.assertBetween(short / long, 1.5, 2.7)

  @parameterized.parameters((4, 0.35))
  @pytest.mark.slow
  def test_11_a_fraction_of_the_bias_of_simclr(self, batch_size, bound):
    self.check_bias(batch_size, bound)

  @parameterized.parameters((16, 0.3))
  @pytest.mark.slow
  def test_11_a_fraction_of_the_bias_of_simclr_of_others(
    self, batch_size, bound
  ):
    self.check_bias(batch_size, bound)

  def check_bias(self, batch_size, bound):
    """Identity 11."""
    simclr = _error('SimCLR, decoupled', batch_size)
    for method in ('EMC2', 'EMC2, burn-in 0.5'):
      self.assertLess(_error(method, batch_size), bound * simclr)

  @pytest.mark.slow
  def test_11_measured_numbers(self):
    for method, batch_size, want in (
      ('EMC2', 4, 0.174),
      ('EMC2, burn-in 0.5', 4, 0.187),
      ('EMC2', 16, 0.041),
      ('SimCLR, decoupled', 4, 0.794),
      ('SimCLR, decoupled', 16, 0.217),
    ):
      got = _error(method, batch_size)
      self.assertBetween(got, 0.85 * want, 1.15 * want)


class TrainingTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_toy_ends_nearer_to_stationary(self):
    end = lambda name: np.mean(
      toys.training_toy(
        toys.METHODS[name], batch_size=4, seeds=(0,)
      ).squared_gradient
    )
    simclr = end('SimCLR, decoupled')
    self.assertBetween(simclr, 1e-2, 5e-2)
    self.assertLess(5 * end('EMC2, burn-in 0.5'), simclr)

  @pytest.mark.slow
  def test_rate_has_no_floor(self):
    slope, _ = toys.rate_slope(toys.METHODS['EMC2, burn-in 0.5'])
    self.assertLessEqual(slope, -0.2)
    slope, _ = toys.rate_slope(toys.METHODS['SimCLR, decoupled'])
    self.assertLessEqual(abs(slope), 0.1)
