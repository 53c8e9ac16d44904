"""Learns coefficients of MADA over every device of a run of processes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2 import transforms

NUM_STEPS = 6
SPECS = {
  'both': jax.P('fsdp', 'tensor'),
  'first': jax.P('fsdp'),
  'second': jax.P(None, 'tensor'),
  'whole': jax.P(),
}


def problem():
  """Params, and gradients of each step."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.float32(rng.normal(size=shape))
  params = {name: draw(8, 4) for name in SPECS}
  noise = {name: draw(NUM_STEPS, 8, 4) for name in SPECS}
  return params, noise


def make(**options):
  """A transform all of whose coefficients move by much."""
  start = (0.8, 0.9, 0.3, 0.6, 0.7, 0.6)
  return transforms.mada(0.05, *start, hyper_learning_rate=0.01, **options)


def train(tx, params, noise):
  """Params, the state and the coefficients after each step."""

  def step(carry, noise):
    params, state = carry
    grads = jax.tree.map(jnp.add, params, noise)
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    found = transforms.mada_coefficients(state)
    return (params, state), jnp.stack(list(found.values()))

  carry, rows = jax.lax.scan(step, (params, tx.init(params)), noise)
  return *carry, rows


def place(mesh):
  """The problem on a mesh."""
  params, noise = problem()
  later = {name: jax.P(None, *spec) for name, spec in SPECS.items()}
  return (
    mesh_lib.place(params, mesh, SPECS),
    mesh_lib.place(noise, mesh, later),
  )


def main(coordinator, num_processes, process_id, path):
  num_processes = int(num_processes)
  mesh_lib.use_cpu_devices(4 // num_processes)
  mesh_lib.start(coordinator, num_processes, int(process_id))
  mesh = mesh_lib.make(fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    params, _, rows = jax.jit(lambda *args: train(make(), *args))(*place(mesh))
    params = jax.jit(lambda tree: tree, out_shardings=jax.P())(params)
  if jax.process_index() == 0:
    here = lambda leaf: np.asarray(leaf.addressable_data(0))
    np.savez(path, rows=here(rows), **jax.tree.map(here, params))


if __name__ == '__main__':
  main(*sys.argv[1:])
