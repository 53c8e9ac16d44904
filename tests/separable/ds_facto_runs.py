"""Trains a factorisation machine over every device of a run of processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.separable import ds_facto, fm_cells

from tests.separable import ds_facto_oracle as oracle


def factors(mesh):
  """After two passes of four workers, by blocks."""
  x, y = oracle.synthetic('logistic', num_rows=60)
  cells, _ = fm_cells.cut(
    x.astype('float32'), y, loss='logistic', num_workers=4, slots=2
  )
  method = ds_facto.ds_facto(32, 4, loss='logistic', step_size=0.3, mesh=mesh)
  key = jax.random.key(0)
  if mesh is not None:
    cells = mesh_lib.place(cells, mesh, fm_cells.specs())
    key = mesh_lib.place(key, mesh)
  state = jax.jit(method.init)(key, cells)
  step = jax.jit(method.step)
  for _ in range(2):
    state, _ = step(key, state, cells)
  if mesh is None:
    return np.asarray(state.blocks.factors)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return np.asarray(
    jax.jit(jnp.copy, out_shardings=everywhere)(state.blocks.factors)
  )


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  found = factors(mesh_lib.make(ring=4))
  if jax.process_index() == 0:
    np.save(path, found)


if __name__ == '__main__':
  main(*sys.argv[1:])
