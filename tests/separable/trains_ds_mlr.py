"""Trains softmax regression over every device of a run of processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.separable import ds_mlr, mlr_cells

from tests.separable import ds_mlr_oracle as oracle


def weights(mesh):
  """After two passes of four workers, by blocks."""
  x, y = oracle.synthetic(num_rows=98, num_features=6, num_classes=13)
  batch, _ = mlr_cells.split(
    x.astype('float32'),
    y,
    13,
    num_workers=4,
    slots=2,
    num_minibatches=3,
    allow_empty=True,
  )
  method = ds_mlr.ds_mlr(6, 13, ridge=1e-3, mesh=mesh)
  key = jax.random.key(0)
  state = jax.jit(method.init)(key, batch)
  if mesh is not None:
    spec = jax.sharding.PartitionSpec(mesh_lib.RING)
    batch = mesh_lib.place(batch, mesh, spec)
    state = mesh_lib.place(state, mesh, ds_mlr.shardings())
    key = mesh_lib.place(key, mesh)
  step = jax.jit(method.step)
  for _ in range(2):
    state, _ = step(key, state, batch)
  if mesh is None:
    return np.asarray(state.weights)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return np.asarray(jax.jit(jnp.copy, out_shardings=everywhere)(state.weights))


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  found = weights(mesh_lib.make(ring=4))
  if jax.process_index() == 0:
    np.save(path, found)


if __name__ == '__main__':
  main(*sys.argv[1:])
