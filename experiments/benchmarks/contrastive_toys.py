r"""Problems so small that the gradient of the global loss is known exactly.

Points around centroids, a table of embeddings or a linear encoder. The methods
run as in training, in one compiled loop; what is measured is how far their
gradients are from the truth, and where training ends.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import contrastive
from emc2.contrastive import emc2 as emc2_lib
from emc2.contrastive import objective, simclr, sogclr

BETA = 5.0

Make = Callable[[int], contrastive.Estimator]

METHODS: dict[str, Make] = {
  'EMC2': lambda m: emc2_lib.emc2(m, inverse_temperature=BETA, num_views=2),
  'EMC2, burn-in 0.5': lambda m: emc2_lib.emc2(
    m, inverse_temperature=BETA, num_views=2, burn_in=0.5
  ),
  'EMC2, uniform proposals': lambda m: emc2_lib.emc2(
    m, inverse_temperature=BETA, num_views=2, proposals='uniform'
  ),
  'EMC2, resampling': lambda m: emc2_lib.emc2(
    m, inverse_temperature=BETA, num_views=2, proposals='resample'
  ),
  'SimCLR, decoupled': lambda m: simclr.simclr(
    inverse_temperature=BETA, decoupled=True
  ),
  'SogCLR, gamma 0.9': lambda m: sogclr.sogclr(
    m, inverse_temperature=BETA, gamma=0.9
  ),
  'SogCLR, gamma 0.1': lambda m: sogclr.sogclr(
    m, inverse_temperature=BETA, gamma=0.1
  ),
}
"""Makes each method for a number of samples of two views."""


class Ended(NamedTuple):
  """Where training ended, for each seed."""

  squared_gradient: np.ndarray  # (s,): |grad L|^2 at the last parameters.
  loss: np.ndarray  # (s,): L there.
  path: np.ndarray  # (s, n): |grad L|^2 along the way.


def points(
  num_samples: int,
  *,
  size: int,
  num_clusters: int,
  sample_noise: float,
  view_noise: float,
  seed: int,
  unit: bool,
) -> np.ndarray:
  """Two views of each of some samples around centroids.

  A sample is its centroid plus noise, a view its sample plus noise.

  Args:
    num_samples: m.
    size: Their dimension k.
    num_clusters: How many centroids.
    sample_noise: Of a sample, times N(0, I).
    view_noise: Of a view, times N(0, I).
    seed: Of all of them.
    unit: Whether centroids and views are scaled to length 1; noise then is
      times N(0, I / k).

  Returns:
    (m, 2, k), float32.
  """
  rng = np.random.default_rng(seed)
  scale = 1 / np.sqrt(size) if unit else 1.0
  noise = lambda *shape: scale * rng.normal(size=(*shape, size))
  normalize = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  centroids = noise(num_clusters)
  if unit:
    centroids = normalize(centroids)
  label = rng.integers(num_clusters, size=num_samples)
  samples = centroids[label] + sample_noise * noise(num_samples)
  views = samples[:, None] + view_noise * noise(num_samples, 2)
  return np.float32(normalize(views) if unit else views)


def batches(
  key: jax.Array, num_samples: int, batch_size: int, num_steps: int
) -> contrastive.Batch:
  """The batches of a run: each pass over the samples in a fresh order.

  Args:
    key: PRNG key.
    num_samples: m. What a pass has left over is not used.
    batch_size: B, at most m.
    num_steps: T.

  Returns:
    A batch whose leaves have a leading axis of T.
  """
  order_key, view_key = jax.random.split(key)
  in_a_pass = num_samples // batch_size
  passes = -(-num_steps // in_a_pass)
  words = jax.random.bits(order_key, (passes, num_samples))
  order = jnp.argsort(words, axis=1).astype(jnp.int32)
  index = order[:, : in_a_pass * batch_size].reshape(-1, batch_size)
  view = contrastive.draw_views(view_key, num_steps * batch_size, 2)
  view = view.reshape(2, num_steps, batch_size).swapaxes(0, 1)
  return contrastive.Batch(index=index[:num_steps], view=view)


def embed_table(params, data, index, view):
  """The encoder whose parameters are the embeddings, (m, 2, d)."""
  del data
  return params[index, view.astype(jnp.int32)]


def embed_linear(params, data, index, view):
  """Unit rows of a linear map (d, k) of views (m, 2, k)."""
  rows = data[index, view.astype(jnp.int32)] @ params.T
  return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def gradient_error(
  make: Make,
  *,
  batch_size: int,
  num_samples: int = 100,
  size: int = 16,
  visits: int = 2000,
  seed: int = 0,
) -> float:
  r"""How far the mean gradient is from the truth at fixed embeddings.

  Args:
    make: The method, of `METHODS`.
    batch_size: B.
    num_samples: m.
    size: d.
    visits: How often each sample is in a batch.
    seed: Of the embeddings and of the run.

  Returns:
    :math:`\|\bar g - \nabla L\| / \|\nabla L\|`, with the mean over all steps.
  """
  table = points(
    num_samples,
    size=size,
    num_clusters=10,
    sample_noise=0.5,
    view_noise=0.25,
    seed=seed,
    unit=True,
  )
  num_steps = visits * num_samples // batch_size
  mean, exact = _mean_gradient(
    make(num_samples), jnp.asarray(table), seed, batch_size, num_steps
  )
  return float(jnp.linalg.norm(mean - exact) / jnp.linalg.norm(exact))


def _mean_gradient(method, table, seed, batch_size, num_steps):
  """The mean of the estimates over a run, and the exact gradient."""
  grad_fn = jax.grad(method.surrogate, argnums=2, has_aux=True)

  @jax.jit
  def run(table, key):
    batch_key, init_key, step_key = jax.random.split(key, 3)

    def step(carry, numbered):
      memory, total = carry
      number, batch = numbered
      key = jax.random.fold_in(step_key, number)
      grad, (memory, _) = grad_fn(key, memory, table, batch, embed_table)
      return (memory, total + grad), None

    some = batches(batch_key, table.shape[0], batch_size, num_steps)
    carry = method.init(init_key, table), jnp.zeros_like(table)
    (_, total), _ = jax.lax.scan(step, carry, (jnp.arange(num_steps), some))
    exact = jax.grad(objective.global_loss)
    return total / num_steps, exact(table, inverse_temperature=BETA)

  return run(table, jax.random.key(seed))


def train(
  make: Make,
  *,
  batch_size: int,
  num_steps: int,
  schedule: Callable[[jax.Array], jax.Array],
  seeds: Sequence[int] = (0, 1, 2),
  num_samples: int = 64,
  size: int = 16,
  width: int = 8,
  every: int = 10,
) -> Ended:
  """Trains a linear encoder by plain gradient descent, seeds side by side.

  Args:
    make: The method, of `METHODS`.
    batch_size: B.
    num_steps: T, a multiple of `every`.
    schedule: Step size by the count of finished steps.
    seeds: Of data, start and run.
    num_samples: m.
    size: Of the inputs.
    width: d, of the embeddings.
    every: The exact gradient is looked at before every so many steps.

  Returns:
    Where each seed ended.
  """
  draw = functools.partial(
    points,
    num_samples,
    size=size,
    num_clusters=8,
    sample_noise=0.6,
    view_noise=0.3,
    unit=False,
  )
  data = jnp.asarray(np.stack([draw(seed=seed) for seed in seeds]))
  keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
  train_one = functools.partial(
    _train,
    make(num_samples),
    schedule,
    batch_size,
    num_steps,
    width,
    every,
  )
  return Ended(*map(np.asarray, jax.jit(jax.vmap(train_one))(data, keys)))


def _exact(params, data):
  """The global loss and its squared gradient."""

  def loss_fn(params):
    samples, views, size = data.shape
    rows = data.reshape(-1, size) @ params.T
    rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    rows = rows.reshape(samples, views, -1)
    return objective.global_loss(rows, inverse_temperature=BETA)

  loss, grad = jax.value_and_grad(loss_fn)(params)
  return jnp.sum(jnp.square(grad)), loss


def _train(method, schedule, batch_size, num_steps, width, every, data, key):
  """One seed of `train`."""
  batch_key, init_key, start_key, step_key = jax.random.split(key, 4)
  params = jax.random.normal(start_key, (width, data.shape[2])) / 4
  algorithm = contrastive.algorithm(method, embed_linear, optax.sgd(schedule))

  def step(state, numbered):
    number, batch = numbered
    key = jax.random.fold_in(step_key, number)
    return algorithm.step(key, state, batch._replace(data=data))[0], None

  def stretch(state, numbered):
    squared, _ = _exact(state.params, data)
    return jax.lax.scan(step, state, numbered)[0], squared

  some = batches(batch_key, data.shape[0], batch_size, num_steps)
  numbered = jnp.arange(num_steps), some
  split = lambda x: x.reshape(num_steps // every, every, *x.shape[1:])
  state = algorithm.init(init_key, params)
  state, path = jax.lax.scan(stretch, state, jax.tree.map(split, numbered))
  return *_exact(state.params, data), path


def training_toy(
  make: Make, *, batch_size: int, num_steps: int = 20_000, **sizes
) -> Ended:
  """Where a method ends when its step size goes from 0.05 to 0 by a cosine."""
  angle = lambda count: np.pi / num_steps * count.astype(jnp.float32)
  schedule = lambda count: 0.025 * (1 + jnp.cos(angle(count)))
  return train(
    make,
    batch_size=batch_size,
    num_steps=num_steps,
    schedule=schedule,
    every=num_steps,
    **sizes,
  )


def rate_slope(
  make: Make,
  *,
  batch_size: int = 4,
  lengths: Sequence[int] = (1000, 4000, 16_000),
  seeds: Sequence[int] = (0, 1),
  **sizes,
) -> tuple[float, list[float]]:
  r"""How the mean of :math:`|\nabla L|^2` over a run falls with its length.

  The step size is :math:`1.5 / \sqrt{T}` throughout.

  Args:
    make: The method, of `METHODS`.
    batch_size: B.
    lengths: The T.
    seeds: Of data, start and run.
    **sizes: For :func:`train`.

  Returns:
    The slope of log mean over log T, least squares; and the means.
  """
  means = []
  for length in lengths:
    schedule = optax.constant_schedule(1.5 / length**0.5)
    ended = train(
      make,
      batch_size=batch_size,
      num_steps=length,
      schedule=schedule,
      seeds=seeds,
      **sizes,
    )
    means.append(float(np.mean(ended.path)))
  return float(np.polyfit(np.log(lengths), np.log(means), 1)[0]), means


def full_gradient(
  *,
  num_steps: int = 8000,
  seeds: Sequence[int] = (0, 1, 2),
) -> tuple[float, float]:
  """The toy trained on exact gradients: |grad L|^2 and L, means over seeds."""
  whole = simclr.simclr(inverse_temperature=BETA, decoupled=True)
  ended = training_toy(
    lambda m: whole, batch_size=64, num_steps=num_steps, seeds=seeds
  )
  return float(np.mean(ended.squared_gradient)), float(np.mean(ended.loss))
