"""Runs the methods on one device, on many, and in several processes."""

import functools
import sys

import jax
import numpy as np
import scipy.sparse

from emc2 import mesh as mesh_lib
from emc2.newton import coordinates, full, krylov, problem, solve, steps

from tests.newton import oracle

METHODS = {
  'krylov': functools.partial(krylov.krylov_cubic_newton, 4),
  'dense': functools.partial(full.cubic_newton, solver='dense'),
  'cg': functools.partial(full.cubic_newton, solver='cg'),
  'coordinates': functools.partial(coordinates.subspace_cubic_newton, 5),
}


def make(objective, sparse=False, dtype=np.float64, **blocks):
  """The problem of an oracle's objective."""
  features = objective.features
  return problem.make(
    scipy.sparse.csr_array(features) if sparse else features,
    objective.labels,
    loss=objective.loss,
    ridge=objective.ridge,
    sample_weight=objective.sample_weight,
    dtype=dtype,
    **blocks,
  )


def run(method, data, x, num_steps, key=None):
  """The last state and the infos of a run from x, as NumPy has them."""
  key = jax.random.key(0) if key is None else key

  def train(data, x):
    state = method.init(key, data, problem.from_user(data, x))
    return solve.run(key, method, state, data, num_steps=num_steps)

  return jax.tree.map(np.asarray, jax.jit(train)(data, x))


def sparse_logistic(num_rows, num_features, seed=0):
  """A problem most of whose entries are 0, with weights and a ridge."""
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(num_rows, num_features))
  features *= rng.random(features.shape) < 0.3
  labels = (rng.random(num_rows) < 0.4).astype(float)
  weights = rng.random(num_rows)
  return oracle.Objective(features, labels, 'logistic', 1e-2, weights)


def train(name, mesh, sparse, num_steps=5):
  """A run on a mesh, or None, in float32; point, values and trials."""
  # Neither number is a multiple of that of devices.
  objective = sparse_logistic(45, 13)
  sizes = {} if mesh is None else mesh.shape
  data = make(
    objective,
    sparse,
    np.float32,
    num_row_blocks=sizes.get('data', 1),
    num_column_blocks=sizes.get('tensor', 1),
  )
  method = METHODS[name](mesh=mesh, refresh_every=2)
  x = problem.from_user(data, np.full(13, 0.5))
  key = jax.random.key(0)
  if mesh is not None:
    data = mesh_lib.place(data, mesh, problem.shardings(data, mesh))
    x = mesh_lib.place(x, mesh, steps.shardings(mesh).x)
    key = mesh_lib.place(key, mesh)

  def run(key, data, x):
    state = method.init(key, data, x)
    return solve.run(key, method, state, data, num_steps=num_steps)

  state, infos = jax.jit(run)(key, data, x)
  return state, infos


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  _, infos = train('krylov', mesh_lib.make(data=2, tensor=2), sparse=True)
  if jax.process_index() == 0:
    np.save(path, infos.objective.addressable_data(0))


if __name__ == '__main__':
  main(*sys.argv[1:])
