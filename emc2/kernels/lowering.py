"""Which chip a program is for, there or not, and which kernel it takes."""

from collections.abc import Callable
from typing import NamedTuple

import jax

# How JAX names one chip of each platform; some operations ask while lowering.
KINDS = {'cpu': 'cpu', 'cuda': 'NVIDIA H200', 'tpu': 'TPU v6 lite'}

_HOPPER = ('H100', 'H200', 'H800', 'H20')


def lower_for(
  fn: Callable[..., object],
  *specs: object,
  platform: str,
  kind: str | None = None,
) -> jax.stages.Lowered:
  """Lowers `fn` for one chip of `platform` on a machine without one.

  Args:
    fn: function of arrays, not yet jitted.
    *specs: its arguments, as arrays or :class:`jax.ShapeDtypeStruct`.
    platform: 'cpu', 'cuda' or 'tpu'.
    kind: the chip's name as in `jax.Device.device_kind`; by default a recent
      one of the platform.

  Returns:
    The lowered program; `.as_text()` is what a test counts kernels in.

  Raises:
    ValueError: `platform` is none of the three.

  Examples:
    >>> lowered = lower_for(jnp.sin, jnp.zeros(3), platform='tpu')
    >>> lowered.as_text().count('stablehlo.sine')
    1
  """
  if platform not in KINDS:
    raise ValueError(f'{platform=} is not one of {sorted(KINDS)}.')
  chip = jax.sharding.AbstractDevice(kind or KINDS[platform], 1, platform)
  mesh = jax.sharding.AbstractMesh((1,), ('x',), abstract_device=chip)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(fn).trace(*specs).lower(lowering_platforms=(platform,))


def is_hopper() -> bool:
  """Whether the program is for GPUs with Hopper's matrix instructions.

  `jax.lax.platform_dependent` knows CUDA, but not its generations. The chip is
  the one that the mesh in scope names, else that of the GPUs here.
  """
  chip = jax.sharding.get_abstract_mesh().abstract_device
  if chip is not None:
    named = any(name in chip.device_kind for name in _HOPPER)
    return chip.platform in ('cuda', 'gpu') and named
  try:
    devices = jax.local_devices(backend='cuda')
  except RuntimeError:
    return False
  return all(device.compute_capability == '9.0' for device in devices)


def is_whole() -> bool:
  """Whether an array is one to XLA, with nothing to split over devices.

  So it is where there is one device, and in :func:`jax.shard_map` over all axes
  of a mesh; elsewhere XLA would gather what a loop over parts of it reads.
  """
  if jax.device_count() == 1:
    return True
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


class Kernel(NamedTuple):
  """One implementation by name, for one platform."""

  platform: str  # 'tpu' or 'cuda'.
  run: Callable[..., object]
  unsupported: str | None  # Why it does not take these arguments.


def dispatch(
  implementation: str,
  reference: Callable[..., object],
  kernels: dict[str, Kernel],
  *args: object,
) -> object:
  """Runs what `implementation` says; platforms are told when lowering.

  Args:
    implementation: 'auto', the kernel of the platform where there is one that
      takes these arguments and `reference` elsewhere; 'xla', `reference`; or a
      name in `kernels`, that one and no other.
    reference: plain JAX, for all platforms.
    kernels: by name, with the same arguments and results.
    *args: arrays, or None.

  Raises:
    ValueError: `implementation` is not known.
    NotImplementedError: the named kernel does not take these arguments.
  """
  if implementation == 'xla':
    choices = {}
  elif implementation == 'auto':
    choices = {
      platform: run
      for platform, run, reason in kernels.values()
      if reason is None
    }
    choices |= {'default': reference} if choices else {}
  elif implementation in kernels:
    platform, run, reason = kernels[implementation]
    if reason is not None:
      raise NotImplementedError(f'{implementation}: {reason}')
    choices = {platform: run}
  else:
    known = ', '.join(['auto', 'xla', *kernels])
    raise ValueError(f'{implementation=} is not one of {known}.')
  if not choices:
    return reference(*args)
  return jax.lax.platform_dependent(*args, **choices)
