"""Runs local steps and coded uploads over all devices of a run."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import algorithm
from emc2 import mesh as mesh_lib
from emc2.consensus import qsparse, qsparse_local, schedules

from tests.consensus import oracle


def train(mesh, axis_name, **settings):
  """20 steps of 8 workers; the state, and the bits (20, 8)."""
  table = schedules.random_gaps(jax.random.key(3), 20, 8, 4)
  settings = dict(code=oracle.largest(1), table=table) | settings
  method = qsparse_local(
    lambda params, target: 0.5 * jnp.sum((params - target) ** 2),
    oracle.sgd(0.1, 0.9),
    settings.pop('code'),
    settings.pop('table'),
    num_workers=8,
    axis_name=axis_name,
    momentum='average',
    **settings,
  )
  key = jax.random.key(0)
  params = jnp.zeros(20)
  batches = np.random.default_rng(0).normal(size=(20, 8, 20))
  batches = batches.astype(np.float32)
  run = lambda key, state, batches: algorithm.scan(
    key, state, batches, method.step
  )
  if axis_name is None:
    state, info = jax.jit(run)(key, method.init(key, params), batches)
    return state, info.bits
  replicated = jax.sharding.PartitionSpec()
  spec = jax.sharding.PartitionSpec(None, axis_name)
  specs = qsparse.shardings(axis_name)
  state = mesh_lib.place(method.init(key, params), mesh, specs)
  run = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(replicated, specs, spec),
    out_specs=(specs, spec),
  )
  batches = mesh_lib.place(batches, mesh, spec)
  state, info = jax.jit(run)(mesh_lib.place(key, mesh), state, batches)
  return state, info.bits


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(8 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  state, _ = train(mesh_lib.make(), 'data')
  if jax.process_index() == 0:
    np.save(path, state.params.addressable_data(0))


if __name__ == '__main__':
  main(*sys.argv[1:])
