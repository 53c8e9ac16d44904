"""Fits a mixture by ESVI over every device of a run of processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.topics import mixture

from tests.topics.mixture import oracle


def fit(mesh):
  """The state after some rotations, whole on every process."""
  family = mixture.gaussian_diagonal(2, degrees=4.0, scale=1.0)
  method = mixture.esvi.esvi(
    mixture.make(family, 8), num_blocks=4, refresh_every=5, mesh=mesh
  )
  x = np.float32(oracle.points(0, 82, 2)[0])
  rows = mixture.esvi.split_rows(x, 4)
  rows = mesh_lib.place(rows, mesh, mixture.esvi.row_shardings(mesh))
  key = mesh_lib.place(jax.random.key(0), mesh)
  state = jax.jit(method.init)(key, rows)
  step = jax.jit(method.step)
  for number in range(12):
    key = mesh_lib.place(jax.random.key(number), mesh)
    state, _ = step(key, state, rows)
  spec = jax.sharding.PartitionSpec()
  everywhere = jax.sharding.NamedSharding(mesh, spec)
  state = jax.jit(
    lambda state: jax.tree.map(jnp.copy, state), out_shardings=everywhere
  )(state)
  return dict(
    ids=state.ids, z=state.responsibilities, **state.statistics._asdict()
  )


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  found = fit(mesh_lib.make(ring=4))
  if jax.process_index() == 0:
    np.savez(path, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
