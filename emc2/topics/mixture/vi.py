"""Variational inference: all responsibilities, then all components."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2 import mesh as mesh_lib
from emc2.topics.mixture import families
from emc2.topics.mixture import model as model_lib


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  statistics: families.Statistics  # Of all components; in the data's dtype.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one step."""

  elbo: jax.Array  # (): before the step; see :func:`model.elbo`.


def init(
  key: jax.Array,
  data: jax.Array,
  z0: jax.typing.ArrayLike | None = None,
  *,
  model: model_lib.Model,
  row_batch: int | None = None,
) -> State:
  """Starts from responsibilities; see :func:`vi`."""
  z = start(key, data, z0, model)
  statistics = model_lib.summarize(model, data, z, row_batch=row_batch)
  return State(statistics, jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  batch: jax.Array,
  *,
  model: model_lib.Model,
  row_batch: int | None = None,
  axis_name: str | None = None,
) -> tuple[State, Info]:
  """One pass over all data; under `shard_map` over this device's."""
  del key
  statistics = state.statistics
  found, evidence = model_lib.sweep(
    model, statistics, batch, row_batch=row_batch
  )
  if axis_name is not None:
    message = [found.moments.reshape(-1), found.count, evidence[None]]
    total = jax.lax.psum(jnp.concatenate(message), axis_name)
    moments, count, evidence = jnp.split(
      total, [found.moments.size, found.moments.size + found.count.size]
    )
    moments = moments.reshape(found.moments.shape)
    found, evidence = families.Statistics(count, moments), evidence[0]
  elbo = evidence + model_lib.divergence_terms(model, statistics)
  return State(found, state.count + 1), Info(elbo)


def vi(
  model: model_lib.Model,
  *,
  row_batch: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> algorithm.Algorithm:
  r"""Coordinate ascent on the evidence lower bound.

  With :math:`u` of the components' posteriors as they were before the step,

  .. math::
    \tilde z_{ik} = \frac{e^{u_{ik}}}{\sum_{k'} e^{u_{ik'}}}, \quad
    N_k = \sum_i \tilde z_{ik}, \quad S_k = \sum_i \tilde z_{ik} \phi(x_i).

  Only the sums are kept, so the memory does not grow with N K.

  Args:
    model: The mixture, of 2 components at least.
    row_batch: Rows at a time, static; None lets their scores fit a cache.
    mesh: Splits the rows over its axis `ring`, whose size must divide them.
      The statistics are replicated, and summed by one all-reduce a step: this
      is the map-reduce form of the method. None means one device.

  Returns:
    `init(key, data, z0=None) -> State` and
    `step(key, state, data) -> (State, Info)`; data (N, D), and z0 (N, K), rows
    on the simplex, drawn from Dirichlet(1) if None.

  Raises:
    ValueError: If an argument is out of its range; from `init`, if `z0` is no
      start, see :func:`model.check_responsibilities`; from `step`, if the
      devices do not divide the rows.

  Examples:
    >>> from emc2.topics.mixture import families
    >>> family = families.gaussian_diagonal(1, degrees=1.0, scale=1.0)
    >>> method = vi(model_lib.make(family, 2))
    >>> data = jnp.array([[-1.0], [-1.1], [2.0]])
    >>> state = method.init(jax.random.key(0), data)
    >>> state, info = method.step(jax.random.key(0), state, data)
    >>> state.statistics.moments.shape
    (2, 2)
  """
  model_lib.check_several(model)
  arguments.check_at_least('row_batch', row_batch, 1)
  init_fn = functools.partial(init, model=model, row_batch=row_batch)
  settings = dict(model=model, row_batch=row_batch)
  if mesh is None:
    return algorithm.Algorithm(init_fn, functools.partial(step, **settings))
  spec = jax.sharding.PartitionSpec
  if mesh_lib.RING not in mesh.shape:
    raise ValueError(
      f'mesh must have an axis {mesh_lib.RING!r}, got {dict(mesh.shape)}.'
    )
  shard_step = jax.shard_map(
    functools.partial(step, **settings, axis_name=mesh_lib.RING),
    mesh=mesh,
    in_specs=(spec(), spec(), spec(mesh_lib.RING)),
    out_specs=spec(),
    # A scan starts from zeros, which are the same everywhere, and ends varying.
    check_vma=False,
  )
  devices = mesh.shape[mesh_lib.RING]

  def step_fn(key, state, batch):
    if batch.shape[0] % devices:
      raise ValueError(
        f'data must have a multiple of {devices} rows, as many devices as the '
        f'axis {mesh_lib.RING!r} has, got {batch.shape[0]}.'
      )
    return shard_step(key, state, batch)

  return algorithm.Algorithm(init_fn, step_fn)


def shardings(mesh: jax.sharding.Mesh) -> State:
  """How the state lies on a mesh: everywhere the same."""
  del mesh
  spec = jax.sharding.PartitionSpec()
  return State(families.Statistics(spec, spec), spec)


def start(
  key: jax.Array,
  data: jax.Array,
  z0: jax.typing.ArrayLike | None,
  model: model_lib.Model,
) -> jax.Array:
  """The responsibilities (N, K) to start from: given and checked, or drawn."""
  if z0 is None:
    return model_lib.draw_responsibilities(
      key, data.shape[0], model.num_components, data.dtype
    )
  if not isinstance(z0, jax.core.Tracer):
    model_lib.check_responsibilities(z0, model)
  if len(z0) != data.shape[0]:
    raise ValueError(
      f'z0 must have a row for each of {data.shape[0]}, got {len(z0)}.'
    )
  return jnp.asarray(z0, data.dtype)
