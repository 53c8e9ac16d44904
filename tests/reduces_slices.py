"""Averages row-sparse gradients over every device of a run of processes."""

import sys

import jax
import numpy as np

from emc2 import densify, indexed_slices
from emc2 import mesh as mesh_lib


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(8 // num_processes)
  if num_processes > 1:
    mesh_lib.start(coordinator, num_processes, int(process_id))
  mesh = mesh_lib.make()
  rng = np.random.default_rng(0)
  slices = indexed_slices.IndexedSlices(
    rng.normal(size=(24, 3)).astype('float32'),
    rng.integers(0, 40, 24).astype('int32'),
    (40, 3),
  )
  slices = mesh_lib.place(slices, mesh, jax.P('data'))

  def means(slices):
    found = {}
    for way in ('gather', 'dense'):
      mean = densify.reduce_slices(slices, 'data', way)
      is_dense = not indexed_slices.is_slices(mean)
      found[way] = mean if is_dense else indexed_slices.to_dense(mean)
    return found

  found = jax.jit(
    jax.shard_map(means, mesh=mesh, in_specs=jax.P('data'), out_specs=jax.P())
  )(slices)
  if jax.process_index() == 0:
    np.savez(path, **{name: np.asarray(x) for name, x in found.items()})


if __name__ == '__main__':
  main(*sys.argv[1:])
