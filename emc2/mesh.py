"""The one place that names mesh axes, builds meshes and places arrays."""

import math
from typing import Any

import jax
import numpy as np

DATA = 'data'
FSDP = 'fsdp'
TENSOR = 'tensor'
STAGE = 'stage'
RING = 'ring'
AGENT = 'agent'
AXES = (DATA, FSDP, TENSOR, STAGE, RING, AGENT)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of one run; does nothing for a run of one process.

  Must come before the first use of a device. On CPU the processes talk by gloo.

  Args:
    coordinator: `host:port` of process 0, or None for a run of one process.
    num_processes: How many processes the run has.
    process_id: The number of this one, from 0.

  Raises:
    ValueError: If only some of the three are given, or they do not fit.
  """
  if coordinator is None:
    if num_processes not in (None, 1) or process_id not in (None, 0):
      raise ValueError(
        'coordinator must name host:port when num_processes or process_id '
        f'is given, got {num_processes=}, {process_id=}.'
      )
    return
  if num_processes is None or process_id is None:
    raise ValueError(
      'num_processes and process_id must be given with coordinator, got '
      f'{num_processes=}, {process_id=}.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'process_id must lie in [0, {num_processes}), got {process_id}.'
    )
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(coordinator, num_processes, process_id)


def use_cpu_devices(count: int) -> None:
  """Splits this process's CPU into `count` devices; before any JAX array."""
  if count < 1:
    raise ValueError(f'count must be at least 1, got {count}.')
  jax.config.update('jax_num_cpu_devices', count)


def make(devices: Any = None, **axes: int) -> jax.sharding.Mesh:
  """Builds a mesh whose axes are named here and nowhere else.

  Args:
    devices: The devices to use, in order; all of the run by default.
    **axes: The size of each axis by its name in `AXES`, in mesh order. One may
      be -1: it takes what the others leave. No axis at all means `data=-1`.

  Returns:
    A mesh with automatic axes, for `jax.jit` and `jax.shard_map` alike.

  Raises:
    ValueError: If an axis has no such name or the sizes do not fit the devices.

  Examples:
    >>> dict(make(jax.devices()[:1], data=1).shape)
    {'data': 1}
  """
  devices = list(jax.devices() if devices is None else devices)
  axes = axes or {DATA: -1}
  for name, size in axes.items():
    if name not in AXES:
      raise ValueError(f'axes must be named in {AXES}, got {name!r}.')
    if size < 1 and size != -1:
      raise ValueError(f'axis {name!r} must be -1 or at least 1, got {size}.')
  sizes = list(axes.values())
  if sizes.count(-1) > 1:
    raise ValueError(f'at most one axis may be -1, got {axes}.')
  if -1 in sizes:
    rest = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = max(1, len(devices) // rest)
  if math.prod(sizes) != len(devices):
    raise ValueError(
      f'axes must multiply to {len(devices)} devices, got {axes}.'
    )
  kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
  grid = np.asarray(devices).reshape(sizes)
  return jax.sharding.Mesh(grid, tuple(axes), axis_types=kinds)


def place(tree: Any, mesh: jax.sharding.Mesh, specs: Any = None) -> Any:
  """Puts the arrays of a tree on a mesh.

  Every process passes the same global values; each keeps its own shards.

  Args:
    tree: Pytree of arrays.
    mesh: Where to.
    specs: A `PartitionSpec` for all leaves, or a tree of them that is a prefix
      of `tree`; replicated by default.

  Returns:
    The same tree of global arrays.
  """
  specs = jax.sharding.PartitionSpec() if specs is None else specs

  def put(spec, subtree):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: _put(leaf, sharding), subtree)

  is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
  return jax.tree.map(put, specs, tree, is_leaf=is_spec)


def gather_shards(tree: Any, mesh: jax.sharding.Mesh, specs: Any = None) -> Any:
  """Joins each process's own rows into global arrays on a mesh.

  Args:
    tree: Pytree of this process's rows, e.g. its part of a batch.
    mesh: Where to.
    specs: As in `place`; by default the leading axis is split over `data`.

  Returns:
    The same tree of global arrays.
  """
  specs = jax.sharding.PartitionSpec(DATA) if specs is None else specs

  def join(spec, subtree):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    make_global = jax.make_array_from_process_local_data
    return jax.tree.map(lambda leaf: make_global(sharding, leaf), subtree)

  is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
  return jax.tree.map(join, specs, tree, is_leaf=is_spec)


def axis_size(axis_name: str) -> int:
  """The length of a mesh axis inside `shard_map`, or of an axis of `vmap`.

  Raises:
    ValueError: If no axis in scope has that name.
  """
  try:
    return jax.lax.axis_size(axis_name)
  except NameError:
    raise ValueError(
      'axis_name must be a mesh axis in scope, inside jax.shard_map, or None '
      f'for a single device, got {axis_name!r}.'
    ) from None


def check_own(x: jax.Array, axis_name: str, name: str) -> None:
  """Refuses a gradient that is the same all along an axis, so reduced already.

  Args:
    x: What each device should have of its own.
    axis_name: The mesh axis, in scope.
    name: What an error calls `x`.

  Raises:
    ValueError: If it is the same; with `check_vma=False` types do not tell.
  """
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  if axis_name not in varying(jax.lax.axis_index(axis_name)):
    return
  if axis_name not in varying(x):
    raise ValueError(
      f"{name} must be each worker's own, but is the same along "
      f'{axis_name!r}, as if reduced already: differentiate with respect to '
      f"jax.lax.pcast(params, {axis_name!r}, to='varying')."
    )


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
  """Inside `shard_map`, lets all vary over the mesh axes that any varies over.

  The transpose of the cast is the sum over the axes that a replicated argument
  owes to its gradient.

  Args:
    *arrays: Arrays, or None, which stays.

  Returns:
    The same values.
  """
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*(varying(x) for x in arrays if x is not None))

  def cast(x):
    if x is None:
      return None
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return [cast(x) for x in arrays]


def _put(leaf: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
  """Places one global value; works when processes see only their devices."""
  if jax.process_count() == 1:
    return jax.device_put(leaf, sharding)
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    words = _put(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
  value = np.asarray(leaf)
  return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])
