"""What transforms share that keep moments in blocks of 8-bit codes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emc2 import arguments
from emc2.compression import blockwise

MAPS = ('dynamic', 'linear')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Checked arguments, and the codebooks that they mean."""

  block_size: int
  min_8bit_size: int
  map: str
  symmetric: bool
  rounding: str
  key: jax.Array | None

  def __post_init__(self):
    blockwise.check_block_size(self.block_size)
    arguments.check_at_least('min_8bit_size', self.min_8bit_size, 0)
    arguments.check_one_of('map', self.map, MAPS)
    blockwise.check_rounding(self.rounding, self.key)

  @property
  def signed(self) -> blockwise.Codebook:
    """Of first moments."""
    return blockwise.Codebook(self.map, symmetric=self.symmetric)

  @property
  def unsigned(self) -> blockwise.Codebook:
    """Of second moments."""
    return blockwise.Codebook(self.map, signed=False)


def check_rate(name: str, value: jax.typing.ArrayLike) -> None:
  """Refuses a decay outside [0, 1); a traced one passes."""
  if isinstance(value, int | float) and not 0 <= value < 1:
    raise ValueError(f'{name} must lie in [0, 1), got {value}.')


def check_leaf(path: Any, leaf: Any) -> None:
  """Refuses what is not of real floats."""
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    name = jax.tree_util.keystr(path)
    raise ValueError(f'params{name} must be of real floats, got {leaf.dtype}.')


def check_shards(path: Any, leaf: Any, block_size: int) -> None:
  """Refuses an array whose blocks cross from one device to the next."""
  sharding = getattr(leaf, 'sharding', None)
  if sharding is None or isinstance(leaf, jax.core.Tracer):
    return
  shard = sharding.shard_shape(leaf.shape)
  if shard == leaf.shape:
    return
  if shard[-1] % block_size or leaf.shape[-1] % block_size:
    name = jax.tree_util.keystr(path)
    raise ValueError(
      f'the last axis of params{name} must be a multiple of {block_size=} on '
      f'each device, got parts of shape {shard}.'
    )


def kept_in_32(mask: Any, params: optax.Params) -> Any:
  """For each leaf of the params, whether its state stays as it is."""
  mask = mask(params) if callable(mask) else mask
  if mask is None:
    mask = False
  spread = lambda keep, part: jax.tree.map(lambda _: bool(keep), part)
  return jax.tree.map(spread, mask, params)
