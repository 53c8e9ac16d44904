"""Trains softmax regression for the tests; programs are compiled once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import mesh as mesh_lib
from emc2.separable import ds_mlr, mlr_cells

KEY = jax.random.key(0)
RING = jax.sharding.PartitionSpec(mesh_lib.RING)


class Found(NamedTuple):
  """What a run came to."""

  weights: np.ndarray  # (D, K).
  normalizers: np.ndarray  # (N,).
  losses: np.ndarray  # (passes,): what infos say.
  state: Any
  layout: Any


def double(batch):
  """With the floats of a batch in float64; under `jax.enable_x64`."""
  wide = lambda x: x.astype(np.float64) if x.dtype.kind == 'f' else x
  return jax.tree.map(wide, batch)


@functools.cache
def compiled(sizes, num_devices, schedule, settings):
  """A jitted step whose ridge and step size are arguments."""
  mesh = None
  if num_devices:
    mesh = mesh_lib.make(jax.devices()[:num_devices], ring=num_devices)

  def step(key, ridge, eta, decay, state, batch):
    method = ds_mlr.ds_mlr(
      *sizes,
      ridge=ridge,
      step_size=ds_mlr.inverse_sqrt(eta, decay),
      mesh=mesh,
      schedule=schedule and schedule(),
      **dict(settings),
    )
    return method.step(key, state, batch)

  return jax.jit(step), mesh


def train(
  x,
  y,
  num_classes,
  *,
  ridge,
  eta,
  num_passes,
  decay=0.5,
  start=None,
  cut=None,
  key=KEY,
  num_devices=0,
  schedule=None,
  dtype='float64',
  **settings,
):
  """Some passes; `start` gives weights (D, K) and normalisers (N,)."""
  settings = dict(refresh='fused', shuffle=False) | settings
  with jax.enable_x64(dtype == 'float64'):
    batch, layout = mlr_cells.split(x, y, num_classes, **(cut or {}))
    if dtype == 'float64':
      batch = double(batch)
    sizes = layout.num_features, num_classes
    method = ds_mlr.ds_mlr(*sizes, ridge=0.1, **settings)
    state = method.init(key, batch)
    if start is not None:
      state = state._replace(
        weights=jnp.asarray(layout.place_weights(start[0])),
        normalizers=jnp.asarray(
          np.where(layout.row_ids < 0, 0, start[1][layout.row_ids])
        ),
      )
    step, mesh = compiled(
      sizes, num_devices, schedule, tuple(sorted(settings.items()))
    )
    if mesh is not None:
      batch = mesh_lib.place(batch, mesh, RING)
      state = mesh_lib.place(state, mesh, ds_mlr.shardings())
    losses = []
    for _ in range(num_passes):
      given = (jnp.asarray(value, dtype) for value in (ridge, eta, decay))
      state, info = step(key, *given, state, batch)
      losses.append(info.loss)
    return Found(
      layout.sort_weights(state.weights),
      layout.sort_rows(state.normalizers),
      np.array(losses),
      jax.device_get(state),
      layout,
    )
