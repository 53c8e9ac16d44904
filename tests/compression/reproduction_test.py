"""The paper's comparison, on digits: what memories make of PowerSGD's rank 1.

A net of 64-128-10 units learns by 4 workers of 16 images each, for 20 epochs,
by Nesterov's momentum; of each memory the best learning rate counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

from emc2 import transforms
from emc2.compression import identity, low_rank, memories, quantize, sparse
from emc2.experiments import data as data_lib

WORKERS, BATCH, EPOCHS, SEEDS = 4, 16, 20, 3
# At 0.02 and 0.05, the other rates of the comparison, all losses are larger.
RATES = (0.1, 0.2)
SIZES = (64, 128, 10)

POWER_SGD = low_rank.power_sgd(1)
RUNS = {
  'sgd': (identity.identity(), memories.none()),
  'full': (POWER_SGD, memories.full()),
  'sketched': (POWER_SGD, memories.sketched(0.2, 0.9)),
  'hybrid': (POWER_SGD, memories.coded(sparse.top_k(fraction=0.2))),
  '8 bits': (POWER_SGD, memories.coded(quantize.blocks_8bit())),
  'none': (POWER_SGD, memories.none()),
  'unbiased': (low_rank.unbiased(1), memories.none()),
  'sketched 0.1': (POWER_SGD, memories.sketched(0.1, 0.9)),
  'sketched 0.5': (POWER_SGD, memories.sketched(0.5, 0.9)),
  'sketched 0.9': (POWER_SGD, memories.sketched(0.9, 0.9)),
}


@functools.cache
def _data():
  """Images in [0, 1], (n, 64), and labels, of training and of test."""

  def read(split):
    found = data_lib.digits.read(split)
    images = np.float32(found.images).reshape(-1, 64) / 255
    return jnp.asarray(images), jnp.asarray(found.labels)

  return read('train'), read('test')


def _batches():
  """(seeds, steps, workers, images): epochs in random orders, as indices."""
  rng, size = np.random.default_rng(0), _data()[0][1].size
  steps = size // (WORKERS * BATCH)
  shape = (SEEDS, EPOCHS, size)
  orders = rng.permuted(np.broadcast_to(np.arange(size), shape), axis=-1)
  used = orders[..., : steps * WORKERS * BATCH]
  return jnp.asarray(used.reshape(SEEDS, -1, WORKERS, BATCH))


def _draw_params(key):
  shapes = list(zip(SIZES, SIZES[1:], strict=False))
  keys = jax.random.split(key, len(shapes))
  draw = lambda key, shape: (
    jax.random.normal(key, shape) * np.float32((2 / shape[0]) ** 0.5)
  )
  weights = list(map(draw, keys, shapes))
  return {'w': weights, 'b': [jnp.zeros(shape[1]) for shape in shapes]}


def _logits(params, images):
  (w0, w1), (b0, b1) = params['w'], params['b']
  hidden = jax.nn.relu(images @ w0 + b0[None])
  return hidden @ w1 + b1[None]


def _loss(params, images, labels):
  logits = _logits(params, images)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


@functools.cache
def _train(name, rates=RATES):
  """Losses on all of training and accuracies on test, (rates, seeds)."""
  code, memory = RUNS[name]
  train, test = _data()
  batches = _batches()
  num_steps = batches.shape[1]
  done = np.arange(num_steps) / num_steps
  decays = np.select([done < 0.6, done < 0.85], [1, 0.1], 0.01)
  decays = decays.astype(np.float32)

  def run(rate, key, batches):
    of_params, of_mean = jax.random.split(key)
    params = _draw_params(of_params)
    # Workers are an axis of vmap, and so take one device and one program.
    tx = transforms.compressed_mean(code, memory=memory, key=of_mean)
    state = tx.init(params)
    state = jax.tree.map(lambda x: jnp.stack([x] * WORKERS), state)
    momentum = optax.trace(0.9, nesterov=True)

    def step(carry, inputs):
      params, state, velocity = carry
      index, decay = inputs
      images, labels = train[0][index], train[1][index]
      grads = jax.vmap(jax.grad(_loss), (None, 0, 0))(params, images, labels)
      means, state = jax.vmap(tx.update, axis_name='data')(grads, state)
      mean = jax.tree.map(lambda x: x[0], means)
      updates, velocity = momentum.update(mean, velocity)
      move = lambda p, u: p - rate * decay * u
      params = jax.tree.map(move, params, updates)
      return (params, state, velocity), ()

    start = params, state, momentum.init(params)
    inputs = batches, jnp.asarray(decays)
    params = jax.lax.scan(step, start, inputs)[0][0]
    guess = jnp.argmax(_logits(params, test[0]), axis=-1)
    return _loss(params, *train), jnp.mean(guess == test[1])

  over_seeds = jax.vmap(run, in_axes=(None, 0, 0))
  over_rates = jax.vmap(over_seeds, in_axes=(0, None, None))
  keys = jax.random.split(jax.random.key(0), SEEDS)
  found = jax.jit(over_rates)(jnp.asarray(rates), keys, batches)
  return tuple(np.asarray(x) for x in found)


def _best(name, rates=RATES):
  """Mean loss and mean accuracy at the rate of least loss."""
  losses, accuracies = (x.mean(1) for x in _train(name, rates))
  i = np.argmin(np.where(np.isfinite(losses), losses, np.inf))
  return losses[i], accuracies[i]


def _nbytes(name):
  """What the memory of both matrices takes."""
  memory = RUNS[name][1]
  return sum(map(memory.nbytes, zip(SIZES, SIZES[1:], strict=False)))


class PowerSgdTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_order(self):
    """SGD, EF and hEFSGD alike, then iConEF, then none, then unbiased."""
    names = ('sgd', 'full', 'hybrid', 'sketched', 'none')
    loss, accuracy = {}, {}
    for name in names:
      loss[name], accuracy[name] = _best(name)
    for name in names[:3]:
      self.assertBetween(loss[name], 0.004, 0.013)
    self.assertLess(3 * loss['full'], loss['sketched'])
    self.assertLess(1.5 * loss['sketched'], loss['none'])
    # Larger rates do not leave numbers.
    unbiased, guessed = _best('unbiased', (0.005,))
    self.assertFalse(unbiased < 10 * loss['none'])
    self.assertLess(guessed, 0.8)
    self.assertGreater(accuracy['full'], 0.96)
    self.assertGreater(accuracy['sketched'], accuracy['full'] - 0.015)
    self.assertLessEqual(_nbytes('sketched'), 0.2 * _nbytes('full'))

  @pytest.mark.slow
  def test_larger_sketches_are_better(self):
    names = ('sketched 0.1', 'sketched', 'sketched 0.5', 'sketched 0.9')
    losses = [_best(name)[0] for name in names]
    for loss, of_smaller in zip(losses[1:], losses, strict=False):
      self.assertLess(1.2 * loss, of_smaller)

  @pytest.mark.slow
  def test_8_bits_track_the_residual(self):
    want, got = (_train(name, (0.05, 0.1))[0] for name in ('full', '8 bits'))
    np.testing.assert_allclose(got.mean(1), want.mean(1), rtol=0.03)
    self.assertLess(_nbytes('8 bits'), 0.26 * _nbytes('full'))
