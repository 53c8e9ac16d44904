"""Trains a linear encoder by EMC² over every device of a run of processes."""

import sys

import jax
import numpy as np
import optax

from emc2 import contrastive
from emc2 import mesh as mesh_lib
from emc2.contrastive import emc2

from tests.contrastive import common


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(8 // num_processes)
  if num_processes > 1:
    mesh_lib.start(coordinator, num_processes, int(process_id))
  mesh = mesh_lib.make()
  num_samples, size = 24, 16
  inputs = np.float32(common.clusters(num_samples, 2))
  method = emc2.emc2(
    num_samples, inverse_temperature=5.0, num_views=2, axis_name='data'
  )
  algorithm = contrastive.algorithm(
    method, common.embed_linear, optax.adam(1e-2), mesh=mesh
  )
  spec = jax.sharding.PartitionSpec
  specs = contrastive.Batch(spec('data'), spec(None, 'data'), spec())
  key = mesh_lib.place(jax.random.key(0), mesh)
  weight = np.random.default_rng(0).normal(size=(16, 8)).astype('float32')
  params = mesh_lib.place({'weight': weight}, mesh)
  state = jax.jit(algorithm.init)(key, params)
  step = jax.jit(algorithm.step)
  rng = np.random.default_rng(1)
  for _ in range(6):
    index = rng.permutation(num_samples)[:size].astype('int32')
    view = np.array([[0], [1]], np.uint32).repeat(size, 1)
    view = np.where(rng.random(size) < 0.5, view, view[::-1])
    batch = contrastive.Batch(index, view, inputs)
    state, _ = step(key, state, mesh_lib.place(batch, mesh, specs))
  if jax.process_index() == 0:
    np.savez(
      path,
      weight=state.params['weight'],
      index=state.memory.index,
      view=state.memory.view,
    )


if __name__ == '__main__':
  main(*sys.argv[1:])
