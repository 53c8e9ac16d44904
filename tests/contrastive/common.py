"""Data, encoders and oracles that the tests of contrastive methods share.

Every oracle is NumPy in float64, written from the papers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.contrastive import estimator


def clusters(
  num_samples: int,
  num_views: int = 2,
  *,
  size: int = 16,
  num_clusters: int = 10,
  sample_noise: float = 0.5,
  view_noise: float = 0.25,
  seed: int = 0,
) -> np.ndarray:
  """Unit views of points around unit centroids: (m, A, size), float64.

  A sample is its centroid plus `sample_noise` times N(0, I / size), a view is
  its sample plus `view_noise` times N(0, I / size), normalised.
  """
  rng = np.random.default_rng(seed)
  noise = lambda *shape: rng.normal(size=(*shape, size)) / np.sqrt(size)
  centroids = normalize(noise(num_clusters))
  label = rng.integers(num_clusters, size=num_samples)
  samples = centroids[label] + sample_noise * noise(num_samples)
  views = samples[:, None] + view_noise * noise(num_samples, num_views)
  return normalize(views)


def normalize(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embed_table(params, data, index, view):
  """The encoder whose parameters are the embeddings, (m, A, d)."""
  del data
  return params['table'][index, view.astype(jnp.int32)]


def embed_linear(params, data, index, view):
  """A linear encoder of views (m, A, k) with weights (k, d)."""
  rows = data[index, view.astype(jnp.int32)] @ params['weight']
  return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def table(views: np.ndarray) -> dict[str, jax.Array]:
  """The parameters of `embed_table`."""
  return {'table': jnp.asarray(views, jnp.float32)}


def batch(index, num_views: int = 2, data=(), seed: int | None = None):
  """A batch of samples; views 0 and 1, or with a seed two distinct ones."""
  index = jnp.asarray(index, jnp.int32)
  if seed is None:
    view = jnp.tile(jnp.array([[0], [1]], jnp.uint32), (1, index.size))
  else:
    view = estimator.draw_views(jax.random.key(seed), index.size, num_views)
  return estimator.Batch(index=index, view=view, data=data)


def gradient(method, key, memory, params, batch, embed_fn=embed_table):
  """One evaluation: ((value, (memory, info)), gradient in params)."""
  return _grad_fn(method.surrogate)(key, memory, params, batch, embed_fn)


def forward(method, key, memory, params, batch, embed_fn=embed_table):
  """One evaluation without its gradient: (value, (memory, info))."""
  surrogate = _jit(method.surrogate)
  return surrogate(key, memory, params, batch, embed_fn)


def pending(method, key, memory, params, batch, embed_fn=embed_table):
  """The samples beside the batch that the same call will embed."""
  return _jit(method.pending)(key, memory, params, batch, embed_fn)


@functools.cache
def _grad_fn(surrogate):
  return _jit(jax.value_and_grad(surrogate, argnums=2, has_aux=True))


@functools.cache
def _jit(surrogate):
  return jax.jit(surrogate, static_argnums=4)


def relative_error(got, want) -> float:
  """Euclidean distance over the length of what was wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def numpy_global_loss(views: np.ndarray, beta: float) -> float:
  """The global contrastive loss of (m, A, d)."""
  return _global(np.asarray(views, np.float64), beta)[0]


def numpy_global_gradient(views: np.ndarray, beta: float) -> np.ndarray:
  """Its gradient in the embeddings, taken as free vectors: (m, A, d)."""
  return _global(np.asarray(views, np.float64), beta)[1]


def numpy_linear_gradient(
  inputs: np.ndarray, weight: np.ndarray, beta: float
) -> np.ndarray:
  """The gradient of the global loss in the weights of `embed_linear`."""
  inputs = np.asarray(inputs, np.float64)
  rows = inputs @ np.asarray(weight, np.float64)
  length = np.linalg.norm(rows, axis=-1, keepdims=True)
  unit = rows / length
  d_unit = numpy_global_gradient(unit, beta)
  along = np.sum(d_unit * unit, axis=-1, keepdims=True)
  d_rows = (d_unit - along * unit) / length
  return np.einsum('mak,mad->kd', inputs, d_rows)


def _global(views, beta):
  num_samples, num_views, size = views.shape
  everything = views.reshape(-1, size)
  owner = np.repeat(np.arange(num_samples), num_views)
  same = owner[:, None] == owner[None, :]
  similarity = everything @ everything.T
  logits = np.where(same, -np.inf, beta * similarity)
  top = logits.max(axis=1, keepdims=True)
  weights = np.exp(logits - top)
  total = weights.sum(axis=1, keepdims=True)
  positive = same & ~np.eye(same.shape[0], dtype=bool)
  positive = positive / (num_views - 1)
  losses = np.log(total[:, 0]) + top[:, 0]
  losses -= beta * np.sum(positive * similarity, axis=1)
  pull = beta * (weights / total - positive) / same.shape[0]
  d_everything = (pull + pull.T) @ everything
  return losses.mean(), d_everything.reshape(views.shape)


def run(method, params, batches, embed_fn=embed_table, mesh=None):
  """Evaluates a method on batches in turn, at fixed parameters.

  Args:
    method: An estimator.
    params: Of the encoder.
    batches: A list of batches.
    embed_fn: The encoder.
    mesh: Splits every batch over the axis `data`; None means one device.

  Returns:
    The list of gradients, the list of infos, and the last memory.
  """
  memory = jax.jit(method.init)(jax.random.key(1), params)
  surrogate = method.surrogate
  if mesh is not None:
    surrogate = estimator.shard_surrogate(method, mesh)
    memory = mesh_lib.place(memory, mesh, method.shardings(mesh))
  grad_fn = jax.jit(
    jax.grad(surrogate, argnums=2, has_aux=True), static_argnums=4
  )
  gradients, infos = [], []
  for number, one in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(0), number)
    grads, (memory, info) = grad_fn(key, memory, params, one, embed_fn)
    gradients.append(grads)
    infos.append(info)
  return gradients, infos, memory


def linear_problem(num_samples, batch_size, num_batches, seed=0, num_views=2):
  """A linear encoder with batches of distinct samples: (params, batches)."""
  views = clusters(num_samples, num_views, seed=seed)
  rng = np.random.default_rng(seed)
  params = {'weight': jnp.float32(rng.normal(size=(views.shape[-1], 8)))}
  batches = [
    batch(
      rng.choice(num_samples, batch_size, replace=False),
      num_views,
      jnp.float32(views),
      seed=number,
    )
    for number in range(num_batches)
  ]
  return params, batches


def assert_sharded_equals_single(make, params, batches, rtol=1e-5):
  """Eight devices give the gradients, memory and infos of one.

  Args:
    make: `(axis_name) -> Estimator`.
    params: Of `embed_linear`.
    batches: Several, of sizes that are multiples of 8.
    rtol: Of every comparison; gradients are compared as vectors.
  """
  mesh = mesh_lib.make(data=8)
  single = run(make(None), params, batches, embed_linear)
  sharded = run(make(mesh_lib.DATA), params, batches, embed_linear, mesh)
  for want, got in zip(single[0], sharded[0], strict=True):
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
      distance = np.linalg.norm(np.subtract(g, w))
      assert distance <= rtol * np.linalg.norm(w), (g, w)
  for want, got in zip(
    jax.tree.leaves(single[1:]), jax.tree.leaves(sharded[1:]), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-6)


def count_collectives(method, params, one, embed_fn=embed_linear):
  """How many collectives of each kind one gradient lowers to on 8 devices."""
  mesh = mesh_lib.make(data=8)
  memory = method.init(jax.random.key(1), params)
  grad_fn = jax.grad(
    estimator.shard_surrogate(method, mesh), argnums=2, has_aux=True
  )
  step = lambda key, *rest: grad_fn(key, *rest, embed_fn)
  text = jax.jit(step).lower(jax.random.key(0), memory, params, one).as_text()
  kinds = (
    'all_gather',
    'all_reduce',
    'reduce_scatter',
    'all_to_all',
    'collective_permute',
  )
  return {
    kind: count
    for kind in kinds
    if (count := text.count(f'"stablehlo.{kind}"'))
  }


def scan_table(method, views, batch_size, num_steps, collect, seed=0):
  """Runs a method on random batches of fixed embeddings, in one scan.

  Args:
    method: An estimator for the m samples of `views`.
    views: (m, A, d), the embeddings.
    batch_size: B; batches are drawn without replacement, one by one anew.
    num_steps: How many.
    collect: `(gradient (m, A, d), memory, info) -> tree`, of each step.
    seed: Of the draws.

  Returns:
    The mean gradient (m, A, d), and what was collected, stacked.
  """
  params = table(views)
  num_samples, num_views, _ = views.shape
  grad_fn = jax.grad(method.surrogate, argnums=2, has_aux=True)

  def step(carry, number):
    memory, total = carry
    key = jax.random.fold_in(jax.random.key(seed), number)
    index_key, view_key, key = jax.random.split(key, 3)
    index = jax.random.permutation(index_key, num_samples)[:batch_size]
    view = estimator.draw_views(view_key, batch_size, num_views)
    one = estimator.Batch(index.astype(jnp.int32), view)
    grads, (memory, info) = grad_fn(key, memory, params, one, embed_table)
    out = collect(grads['table'], memory, info)
    return (memory, total + grads['table']), out

  @jax.jit
  def scan():
    memory = method.init(jax.random.key(seed), params)
    start = (memory, jnp.zeros_like(params['table']))
    (_, total), out = jax.lax.scan(step, start, jnp.arange(num_steps))
    return total / num_steps, out

  return scan()


def bias(method, views, beta, batch_size, visits, seed=0):
  """Relative error of the mean gradient after `visits` of every sample."""
  num_steps = visits * len(views) // batch_size
  nothing = lambda *_: ()
  mean, _ = scan_table(method, views, batch_size, num_steps, nothing, seed)
  return relative_error(mean, numpy_global_gradient(views, beta))
