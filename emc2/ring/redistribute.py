"""Rows that move to random places over a mesh axis, by one message."""

import jax
import jax.numpy as jnp


def draw_order(key: jax.Array, num_rows: int, num_blocks: int) -> jax.Array:
  r"""Draws where each row goes; every device draws the same.

  Slots :math:`0, \dots, K - 1` lie in :math:`W` blocks of :math:`K_b = K / W`.
  Each block :math:`i` shuffles its own rows; its :math:`j`-th row then goes to
  block :math:`(i + \pi(j \bmod W)) \bmod W`, with one permutation :math:`\pi`
  of the blocks for all of them. So every block receives :math:`K_b` rows, and
  at most :math:`\lceil K_b / W \rceil` of them from the same block. They come
  to lie in the order of the blocks that they come from.

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
  height = _height(num_rows, num_blocks)
  # Sorts of one draw: `jax.random.permutation` sorts more than once, and each
  # generator takes a while to compile.
  bits = jax.random.bits(key, (num_rows + num_blocks,))
  shuffles = _argsort(bits[:num_rows].reshape(num_blocks, height))
  turns = _argsort(bits[num_rows:])
  blocks = jnp.arange(num_blocks, dtype=jnp.int32)[:, None]
  turn = turns[jnp.arange(height, dtype=jnp.int32) % num_blocks]
  target = (blocks + turn[None, :]) % num_blocks
  slots = blocks * height + shuffles
  return slots.reshape(num_rows)[_argsort(target.reshape(num_rows))]


def redistribute(
  rows: jax.Array,
  order: jax.Array,
  *,
  num_blocks: int,
  axis_name: str | None = None,
) -> jax.Array:
  """Moves rows to the places of :func:`draw_order`: gives `rows[order]`.

  What is replicated follows without a message: `ids[order]`.

  .. note::
    A device sends, in one all-to-all, a buffer with room for `ceil(Kb / W)`
    rows from each of its blocks to each of the W: as many as it holds where W
    divides Kb, and at most twice as many where Kb is above W. Where Kb is
    below W it is W rows for each block, W / Kb times what it holds.

  Args:
    rows: (K, F), or under `jax.shard_map` this device's (K / devices, F), whole
      blocks.
    order: (K,), of :func:`draw_order` for K and W, the same on all devices. No
      other permutation will do: the room would not suffice.
    num_blocks: W, a multiple of the number of devices. Static.
    axis_name: The mesh axis that splits the rows, or None for all on a device.

  Returns:
    Of the shape of `rows`: what lies there afterwards.

  Raises:
    ValueError: If `rows` has no two axes, if `order` is not as long as all rows
      together, if `num_blocks` does not divide them, or if the number of
      devices does not divide `num_blocks`.
  """
  if rows.ndim != 2:
    raise ValueError(f'rows must have shape (K, F), got {rows.shape}.')
  devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  num_rows = rows.shape[0] * devices
  height = _height(num_rows, num_blocks)
  if order.shape != (num_rows,):
    raise ValueError(f'order must have shape ({num_rows},), got {order.shape}.')
  if num_blocks % devices:
    raise ValueError(
      f'num_blocks must be a multiple of the {devices} devices, got '
      f'{num_blocks}.'
    )
  if axis_name is None:
    return rows[order]
  local, room = num_blocks // devices, -(-height // num_blocks)
  first = jax.lax.axis_index(axis_name) * local
  own = lambda x: jax.lax.dynamic_slice_in_dim(x, first, local)

  # Of each slot: the block that its row comes from, and the row's number among
  # those that come from there, which lie side by side.
  order = order.reshape(num_blocks, height)
  source = order // height
  slot = jnp.broadcast_to(jnp.arange(height, dtype=jnp.int32), source.shape)
  begins = jnp.pad(source[:, 1:] != source[:, :-1], ((0, 0), (1, 0)))
  begin = jax.lax.cummax(jnp.where(begins, slot, 0), axis=1)
  number = slot - begin

  # What each block has for block t in its place t * room + number; a place that
  # no row needs gets the block's first.
  place = room * jnp.arange(num_blocks, dtype=jnp.int32)[:, None] + number
  sent = jnp.zeros((num_blocks, num_blocks * room), jnp.int32)
  sent = own(sent.at[source, place].set(order % height))
  sent += height * jnp.arange(local, dtype=jnp.int32)[:, None]
  buffer = rows[sent].reshape(local, devices, local, room, rows.shape[1])
  received = jax.lax.all_to_all(buffer, axis_name, 1, 0, tiled=True)
  received = received.reshape(num_blocks, local, room, rows.shape[1])
  received = jnp.swapaxes(received, 0, 1).reshape(local, -1, rows.shape[1])
  place = own(source * room + number)
  moved = jnp.take_along_axis(received, place[..., None], axis=1)
  return moved.reshape(rows.shape)


def _height(num_rows, num_blocks):
  """How many rows a block has."""
  if num_blocks < 1:
    raise ValueError(f'num_blocks must be at least 1, got {num_blocks}.')
  if num_rows % num_blocks:
    raise ValueError(
      f'num_blocks must divide the {num_rows} rows, got {num_blocks}.'
    )
  return num_rows // num_blocks


def _argsort(x):
  return jnp.argsort(x, axis=-1).astype(jnp.int32)
