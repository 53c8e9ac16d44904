"""Rows that move to random places over a mesh axis, by one message."""

import jax
import jax.numpy as jnp


def draw_order(key: jax.Array, num_rows: int, num_blocks: int) -> jax.Array:
  r"""Draws where each row goes; every device draws the same.

  Slots :math:`0, \dots, K - 1` lie in :math:`W` blocks of :math:`K_b = K / W`.
  Each block :math:`i` shuffles its own rows; its :math:`j`-th row then goes to
  block :math:`(i + \pi(j \bmod W)) \bmod W`, with one permutation :math:`\pi`
  of the blocks for all of them. So every block receives :math:`K_b` rows, and
  at most :math:`\lceil K_b / W \rceil` of them from the same block.

  Args:
    key: PRNG key, the same on all devices.
    num_rows: K, a multiple of `num_blocks`. Static.
    num_blocks: W, at least 1. Static.

  Returns:
    (K,), int32, a permutation: the slot that each slot's new row comes from.

  Raises:
    ValueError: If `num_blocks` is below 1 or does not divide `num_rows`.

  Examples:
    >>> sorted(draw_order(jax.random.key(0), 6, 2).tolist())
    [0, 1, 2, 3, 4, 5]
  """
  shuffles, source, row, _ = _plan(key, num_rows, num_blocks)
  height = num_rows // num_blocks
  order = source * height + shuffles[source, row]
  return order.reshape(num_rows)


def redistribute(
  key: jax.Array,
  rows: jax.Array,
  *,
  num_blocks: int,
  axis_name: str | None = None,
) -> jax.Array:
  """Moves rows to the random places of :func:`draw_order`.

  Ids that are replicated follow without a message: `ids[draw_order(...)]`.

  .. note::
    A device sends, in one all-to-all, a buffer with room for `ceil(Kb / W)`
    rows from each of its blocks to each of the W: as many as it holds where W
    divides Kb, and at most twice as many where Kb is above W. Where Kb is
    below W it is W rows for each block, W / Kb times what it holds.

  Args:
    key: PRNG key, the same on all devices.
    rows: (K, F), or under `jax.shard_map` this device's (K / devices, F), whole
      blocks.
    num_blocks: W, a multiple of the number of devices. Static.
    axis_name: The mesh axis that splits the rows, or None for all on a device.

  Returns:
    Of the shape of `rows`: what lies there afterwards.

  Raises:
    ValueError: If `num_blocks` does not divide the rows, or if the number of
      devices does not divide `num_blocks`.
  """
  if rows.ndim != 2:
    raise ValueError(f'rows must have shape (K, F), got {rows.shape}.')
  if axis_name is None:
    return rows[draw_order(key, rows.shape[0], num_blocks)]
  devices = jax.lax.axis_size(axis_name)
  if num_blocks % devices:
    raise ValueError(
      f'num_blocks must be a multiple of the {devices} devices, got '
      f'{num_blocks}.'
    )
  num_rows = rows.shape[0] * devices
  shuffles, source, row, position = _plan(key, num_rows, num_blocks)
  del source, row
  height, local = num_rows // num_blocks, num_blocks // devices
  room = -(-height // num_blocks)
  first = jax.lax.axis_index(axis_name) * local
  own = lambda x: jax.lax.dynamic_slice_in_dim(x, first, local)

  # What block i has for block t in place s; a place without a row repeats one.
  blocks = jnp.arange(num_blocks, dtype=jnp.int32)
  row = _between(key, blocks[:, None], blocks[None, :], num_blocks, room)
  row = jnp.minimum(own(row), height - 1).reshape(local, -1)
  slot = jnp.take_along_axis(own(shuffles), row, axis=1)
  slot += height * jnp.arange(local, dtype=jnp.int32)[:, None]
  buffer = rows[slot].reshape(local, devices, local, room, rows.shape[1])
  received = jax.lax.all_to_all(buffer, axis_name, 1, 0, tiled=True)
  received = received.reshape(num_blocks, local, room, rows.shape[1])
  received = jnp.swapaxes(received, 0, 1).reshape(local, -1, rows.shape[1])
  moved = jnp.take_along_axis(received, own(position)[..., None], axis=1)
  return moved.reshape(rows.shape)


def _plan(key, num_rows, num_blocks):
  """Shuffles (W, Kb), and of each row that comes: its block, row and place.

  The places are those of a buffer of W blocks with `room` places each.
  """
  if num_blocks < 1:
    raise ValueError(f'num_blocks must be at least 1, got {num_blocks}.')
  if num_rows % num_blocks:
    raise ValueError(
      f'num_blocks must divide the {num_rows} rows, got {num_blocks}.'
    )
  height = num_rows // num_blocks
  room = -(-height // num_blocks)
  blocks = jnp.arange(num_blocks, dtype=jnp.int32)
  shuffles = jax.vmap(lambda i: _permutation(key, i, height))(blocks)
  row = _between(key, blocks[None, :], blocks[:, None], num_blocks, room)
  row = row.reshape(num_blocks, -1)
  # The places that hold a row, in order; a row beyond the last is none.
  full = row < height
  rank = jnp.where(full, jnp.cumsum(full, axis=1) - 1, height)
  places = jnp.arange(row.shape[1], dtype=jnp.int32)
  fill = lambda rank: (
    jnp.zeros(height, jnp.int32).at[rank].set(places, mode='drop')
  )
  position = jax.vmap(fill)(rank)
  row = jnp.take_along_axis(row, position, axis=1)
  return shuffles, position // room, row, position


def _between(key, source, target, num_blocks, room):
  """The rows that go from block `source` to `target`, (..., room)."""
  inverse = _permutation(key, num_blocks, num_blocks)
  first = inverse[(target - source) % num_blocks]
  return jnp.add.outer(first, num_blocks * jnp.arange(room, dtype=jnp.int32))


def _permutation(key, number, size):
  """One sort, where `jax.random.permutation` sorts more than once."""
  bits = jax.random.bits(jax.random.fold_in(key, number), (size,))
  return jnp.argsort(bits).astype(jnp.int32)
