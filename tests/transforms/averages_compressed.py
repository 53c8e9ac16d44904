"""Averages gradients through a code over all devices of a run of processes."""

import sys

import jax
import numpy as np

from emc2 import mesh as mesh_lib
from emc2 import transforms
from emc2.compression import memories, sparse


def means(mesh):
  """Of four workers, three steps of a top-k code with a sketch as memory."""
  tx = transforms.compressed_mean(
    sparse.top_k(5), memory=memories.sketched(0.5, 0.5)
  )
  specs = transforms.compressed_mean_specs()
  grads = np.random.default_rng(0).normal(size=(4, 6, 8)).astype('float32')
  grads = mesh_lib.place(grads, mesh, jax.P('data'))
  params = mesh_lib.place(np.zeros((6, 8), 'float32'), mesh)
  init = jax.shard_map(tx.init, mesh=mesh, in_specs=jax.P(), out_specs=specs)
  step = jax.jit(
    jax.shard_map(
      lambda grads, state: tx.update(grads[0], state),
      mesh=mesh,
      in_specs=(jax.P('data'), specs),
      out_specs=(jax.P(), specs),
    )
  )
  state, found = jax.jit(init)(params), []
  for _ in range(3):
    mean, state = step(grads, state)
    found.append(np.asarray(mean.addressable_data(0)))
  return np.stack(found)


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  found = means(mesh_lib.make(data=4))
  if jax.process_index() == 0:
    np.save(path, found)


if __name__ == '__main__':
  main(*sys.argv[1:])
