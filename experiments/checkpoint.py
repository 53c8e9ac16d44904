"""Checkpoints of a run: asynchronous, atomic, checked. Orbax stays in here.

A checkpoint is a folder `DIRECTORY/STEP` with a pytree of arrays, typed PRNG
keys among them, and a JSON page that says what each array is. A run that is
killed while it writes leaves no folder of that name. A folder that was damaged
later is recognised by the digests on its page, and the one before is taken.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

_FIELDS = ('name', 'leaves', 'digests', 'finite', 'extra')
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Restored(NamedTuple):
  """What a checkpoint held."""

  step: int  # Finished steps.
  tree: Any  # As the tree that was asked for; its shardings too.
  extra: Any  # The JSON value that was saved beside the arrays.


class Checkpoints:
  """The checkpoints of one run, newest last; close it or use it by `with`.

  Args:
    directory: Where the folders `STEP` lie; made if it is not there.
    keep: How many of the newest remain, at least 1; an older one serves when
      the newest is damaged.
    name: What is run, e.g. the method; a checkpoint of another name does not
      fit.

  Raises:
    ValueError: If `keep` is less than 1.
  """

  def __init__(
    self, directory: epath.PathLike, *, keep: int = 2, name: str = ''
  ):
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}.')
    self._directory = epath.Path(directory).resolve()
    self._name, self._keep = name, keep
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep),
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *unused_error) -> None:
    self.close()

  def close(self) -> None:
    """Waits for the last save and frees what Orbax holds."""
    self._manager.close()

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, ascending; waits for the last save."""
    self._manager.wait_until_finished()
    return sorted(self._manager.all_steps())

  def path(self, step: int) -> epath.Path:
    """The folder of one checkpoint."""
    return self._directory / str(step)

  def save(self, step: int, tree: Any, extra: Any = None) -> None:
    """Copies the arrays and returns; a thread writes them.

    Args:
      step: Finished steps.
      tree: Pytree of arrays, any sharding; the caller may donate them at once.
      extra: JSON value, the same on every process.
    """
    arrays = _plain(tree)
    digests, finite = jax.device_get(_inspect(arrays))
    page = {
      'name': self._name,
      'leaves': _describe(tree),
      'digests': {path: int(digest) for path, digest in digests.items()},
      'finite': bool(finite),
      'extra': extra,
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardSave(_without_empty(arrays)),
        page=ocp.args.JsonSave(page),
      ),
      force=True,
    )

  def restore(self, like: Any) -> Restored | None:
    """Reads the newest checkpoint that is whole.

    Damaged ones that are newer are moved to `DIRECTORY-damaged`, with a
    warning that says what was wrong.

    Args:
      like: Pytree of arrays; gives structure, shapes, dtypes and shardings.

    Returns:
      What the checkpoint held, or None if there is no checkpoint.

    Raises:
      ValueError: If the checkpoint is of another name, or its leaves differ
        from those of `like`, or if every checkpoint is damaged.
    """
    steps = self.steps()
    damage = {}
    for step in reversed(steps):
      # Orbax and its drivers raise plain Exception for a damaged file.
      try:
        page = self._page(step)
      except Exception as error:
        damage[step] = error
        continue
      self._check_fits(step, page, like)
      try:
        tree = self._arrays(step, page, like)
      except Exception as error:
        damage[step] = error
        continue
      self._set_aside(damage)
      # Saving removes the oldest; a kill may have left half of one behind.
      for old in self.steps()[: -self._keep]:
        self._manager.delete(old)
      return Restored(step, tree, page['extra'])
    if damage:
      raise ValueError(
        f'every checkpoint in {self._directory} is damaged: {steps}. Remove '
        f'the folder to start anew. {_line(damage[steps[-1]])}'
      )
    return None

  def last_finite(self) -> int | None:
    """The newest step whose arrays are all finite; else the newest, or None."""
    steps = self.steps()
    finite = [step for step in steps if self._page(step)['finite']]
    return max(finite or steps, default=None)

  def _page(self, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(page=ocp.args.JsonRestore())
    page = self._manager.restore(step, args=args)['page']
    return {field: page[field] for field in _FIELDS}

  def _arrays(self, step: int, page: Mapping[str, Any], like: Any) -> Any:
    wanted = _plain(like)
    abstract = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for path, x in _without_empty(wanted).items()
    }
    args = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
    arrays = wanted | self._manager.restore(step, args=args)['arrays']
    digests, _ = jax.device_get(_inspect(arrays))
    for path, digest in digests.items():
      if int(digest) != page['digests'][path]:
        raise ValueError(f'the values of {path} are not those that were saved.')
    return _typed(arrays, like)

  def _check_fits(self, step: int, page: Mapping[str, Any], like: Any) -> None:
    there, here = page['leaves'], _describe(like)
    faults = []
    if page['name'] != self._name:
      faults.append(f'it is of {page["name"]!r}, this run is {self._name!r}')
    for path in sorted(there.keys() | here.keys()):
      if path not in here:
        faults.append(f'{path} is {there[path]} there and unknown here')
      elif path not in there:
        faults.append(f'{path} is {here[path]} here and missing there')
      elif there[path] != here[path]:
        faults.append(f'{path} is {there[path]} there and {here[path]} here')
    if faults:
      more = f'; and {len(faults) - 4} more' if len(faults) > 4 else ''
      raise ValueError(
        f'checkpoint {self.path(step)} does not fit this run: '
        f'{"; ".join(faults[:4])}{more}.'
      )

  def _set_aside(self, damage: Mapping[int, Exception]) -> None:
    aside = self._directory.with_name(f'{self._directory.name}-damaged')
    for step, error in damage.items():
      logging.warning(
        'Checkpoint %s is damaged (%s): moved to %s, taking the one before.',
        self.path(step),
        _line(error),
        aside,
      )
      if jax.process_index() == 0:
        aside.mkdir(parents=True, exist_ok=True)
        target = aside / str(step)
        if target.exists():
          target.rmtree()
        self.path(step).rename(target)
    if damage:
      ocp.multihost.sync_global_processes('emc2_checkpoints_set_aside')
      self._manager.reload()


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(tree: Any) -> dict[str, jax.Array]:
  """The leaves by their paths, typed keys as their words."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  plain = lambda x: jax.random.key_data(x) if _is_key(x) else x
  return {jax.tree_util.keystr(path): plain(x) for path, x in leaves}


def _typed(arrays: Mapping[str, jax.Array], like: Any) -> Any:
  """The inverse of `_plain`, for a tree of the same kind as `like`."""

  def typed(path, leaf):
    array = arrays[jax.tree_util.keystr(path)]
    if _is_key(leaf):
      return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return array

  return jax.tree_util.tree_map_with_path(typed, like)


def _describe(tree: Any) -> dict[str, str]:
  """Dtype and shape of each leaf by its path, e.g. `float32[3,4]`."""
  describe = lambda x: f'{x.dtype}[{",".join(map(str, x.shape))}]'
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): describe(x) for path, x in leaves}


def _without_empty(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Orbax refuses arrays without entries; their shape says all of them."""
  return {path: x for path, x in arrays.items() if x.size}


@jax.jit
def _inspect(
  arrays: dict[str, jax.Array],
) -> tuple[dict[str, jax.Array], jax.Array]:
  """The digest of each array, and whether every floating one is finite."""
  floats = [x for x in arrays.values() if jnp.issubdtype(x.dtype, jnp.inexact)]
  finite = jnp.ones([], bool)
  for x in floats:
    finite &= jnp.all(jnp.isfinite(x))
  return {path: _digest(x) for path, x in arrays.items()}, finite


def _digest(x: jax.Array) -> jax.Array:
  """The words of an array weighted by odd numbers and summed modulo 2**32.

  No single changed word goes unseen, and the order of summation, hence the
  sharding, does not matter.
  """
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  elif jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag])
  word = _WORDS[min(x.dtype.itemsize, 4)]
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * size + iota
  return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _line(error: Exception) -> str:
  """An error's message on one line of bounded length."""
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
