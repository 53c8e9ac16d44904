"""Sums the energy over every device of a run of processes."""

import functools
import sys

import jax
import numpy as np

from emc2 import mesh as mesh_lib
from emc2 import sphere


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  jax.config.update('jax_enable_x64', True)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  mesh = mesh_lib.make(data=2, ring=2)
  spec = jax.sharding.PartitionSpec(('data', 'ring'))
  energy = jax.shard_map(
    functools.partial(sphere.energy, data_axis='data', ring_axis='ring'),
    mesh=mesh,
    in_specs=spec,
    out_specs=jax.sharding.PartitionSpec(),
  )
  rows = np.random.default_rng(0).normal(size=(64, 3))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  rows = mesh_lib.place(rows, mesh, spec)

  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  @functools.partial(jax.jit, out_shardings=replicated)
  def norm(rows):
    value, gradient = jax.value_and_grad(energy)(rows)
    return jax.numpy.stack([value, jax.numpy.linalg.norm(gradient)])

  found = norm(rows)
  if jax.process_index() == 0:
    np.save(path, found.addressable_data(0))


if __name__ == '__main__':
  main(*sys.argv[1:])
