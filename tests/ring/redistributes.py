"""Redistributes rows over every device of a run of processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2 import ring


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  mesh = mesh_lib.make(ring=4)
  spec = jax.sharding.PartitionSpec

  def move(key, rows):
    order = ring.draw_order(key, 20, 4)
    return ring.redistribute(rows, order, num_blocks=4, axis_name=mesh_lib.RING)

  move = jax.shard_map(
    move,
    mesh=mesh,
    in_specs=(spec(), spec(mesh_lib.RING)),
    out_specs=spec(mesh_lib.RING),
  )
  rows = mesh_lib.place(
    np.arange(40.0, dtype='float32').reshape(20, 2), mesh, spec(mesh_lib.RING)
  )
  key = mesh_lib.place(jax.random.key(3), mesh)
  moved = jax.jit(move)(key, rows)
  everywhere = jax.sharding.NamedSharding(mesh, spec())
  moved = jax.jit(jnp.copy, out_shardings=everywhere)(moved)
  if jax.process_index() == 0:
    np.save(path, moved)


if __name__ == '__main__':
  main(*sys.argv[1:])
