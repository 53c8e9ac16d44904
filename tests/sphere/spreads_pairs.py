"""Spreads points by pairs over every device of a run of processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import algorithm, sphere
from emc2 import mesh as mesh_lib


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  mesh = mesh_lib.make()
  method = sphere.pair_sgd(1.0, step_size=1e-3, axis_name='data')
  spec = jax.sharding.PartitionSpec()
  run = jax.shard_map(
    lambda key, state: algorithm.scan(key, state, jnp.arange(30), method.step),
    mesh=mesh,
    in_specs=(spec, spec),
    out_specs=(spec, spec),
  )
  rows = np.random.default_rng(0).normal(size=(50, 3))
  rows = np.float32(rows / np.linalg.norm(rows, axis=1, keepdims=True))
  key = mesh_lib.place(jax.random.key(1), mesh)
  state = mesh_lib.place(method.init(jax.random.key(0), rows), mesh)
  state, _ = jax.jit(run)(key, state)
  if jax.process_index() == 0:
    np.save(path, state.points.addressable_data(0))


if __name__ == '__main__':
  main(*sys.argv[1:])
