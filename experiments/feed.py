"""The batches of a run: stacked, placed, and with a position to go on from."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Feed:
  """Takes batches from an iterator and knows where it stands.

  Args:
    batches: Iterator with `get_state` and `set_state` as Grain's have, or None
      for a run that needs none.
    sharding: How one batch lies on the mesh, the same for all its leaves; None
      for a run on one device.

  Raises:
    ValueError: If `batches` cannot tell its position.
  """

  def __init__(
    self,
    batches: Iterator[Any] | None,
    sharding: jax.sharding.NamedSharding | None = None,
  ):
    self._batches = None if batches is None else iter(batches)
    self._sharding = None
    if sharding is not None:
      spec = jax.sharding.PartitionSpec(None, *sharding.spec)
      self._sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    for method in ('get_state', 'set_state'):
      if batches is not None and not hasattr(self._batches, method):
        raise ValueError(
          f'batches must have {method}, as iterators of Grain have, or be '
          f'None; got {type(batches).__name__}.'
        )
    self.position()  # Refuses a position that no checkpoint can hold.

  def check_placed(self, state: Any) -> None:
    """Raises ValueError if the state lies on a mesh that batches would miss."""
    spread = any(x.sharding.num_devices > 1 for x in jax.tree.leaves(state))
    if self._batches is not None and spread and self._sharding is None:
      raise ValueError('batch_sharding must be given: state lies on a mesh.')

  def take(self, done: int, length: int) -> Any:
    """The next batches on the device, stacked on a leading axis, or None."""
    if self._batches is None:
      return None
    with jax.transfer_guard('allow'):
      taken = []
      for _ in range(length):
        try:
          taken.append(next(self._batches))
        except StopIteration:
          end = done + len(taken)
          raise ValueError(f'batches ended after {end} steps.') from None
      stacked = jax.tree.map(lambda *rows: np.stack(rows), *taken)
      if self._sharding is None:
        return jax.device_put(stacked)
      place = jax.make_array_from_process_local_data
      return jax.tree.map(lambda x: place(self._sharding, x), stacked)

  def position(self) -> list[str] | None:
    """Where the iterator of each process stands, for `go_to`."""
    if self._batches is None:
      return None
    return _gather(_encode(self._batches.get_state()))

  def go_to(self, position: list[str] | None) -> None:
    """Puts the iterator where it stood.

    Args:
      position: What `position` gave.

    Raises:
      ValueError: If it is of a run with other processes or other batches.
    """
    ours = 0 if self._batches is None else jax.process_count()
    theirs = 0 if position is None else len(position)
    if ours != theirs:
      raise ValueError(
        f'the checkpoint holds {theirs} positions of batches, this run has '
        f'{ours}.'
      )
    if ours:
      self._batches.set_state(_decode(position[jax.process_index()]))


def _encode(position: Any) -> str:
  if isinstance(position, bytes):
    return json.dumps({'base64': base64.b64encode(position).decode()})
  try:
    text = json.dumps({'json': position})
    faithful = json.loads(text)['json'] == position
  except (TypeError, ValueError):
    faithful = False
  if not faithful:
    raise ValueError(
      'batches.get_state() must give bytes or JSON values, got '
      f'{position!r:.200}.'
    )
  return text


def _decode(text: str) -> Any:
  held = json.loads(text)
  return base64.b64decode(held['base64']) if 'base64' in held else held['json']


def _gather(text: str) -> list[str]:
  """The texts of all processes, in their order."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]
