"""Means and gathers of many arrays in few collectives."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Arrays of at least so many entries travel alone: a copy costs more than a
# collective's latency, which is what joining saves.
_JOINED_BELOW = 1 << 16


def mean(tree: Any, axis_name: str) -> Any:
  """Averages the arrays of a tree over an axis; small ones travel together."""
  return _together(tree, lambda flat: jax.lax.pmean(flat, axis_name))


def total(tree: Any, axis_name: str) -> Any:
  """Adds the arrays of a tree over an axis; small ones travel together."""
  return _together(tree, lambda flat: jax.lax.psum(flat, axis_name))


def gather(tree: Any, axis_name: str) -> Any:
  """Stacks each array over an axis: (...) to (num_workers, ...)."""
  # An axis of `jax.vmap` knows nothing of what is equal along it.
  mapped = axis_name not in jax.sharding.get_abstract_mesh().manual_axes
  to = 'varying' if mapped else 'invarying'
  return _together(
    tree, lambda flat: jax.lax.all_gather(flat, axis_name, to=to)
  )


def _together(tree: Any, run: Callable[[jax.Array], jax.Array]) -> Any:
  """Runs a collective on the joined arrays of a tree, and parts them again."""
  leaves, structure = jax.tree.flatten(tree)
  groups = {}
  for i, leaf in enumerate(leaves):
    alone = i if leaf.size >= _JOINED_BELOW else None
    varying = jax.typeof(leaf).manual_axis_type.varying
    groups.setdefault((leaf.dtype, varying, alone), []).append(i)
  done = {}
  for members in groups.values():
    flat = [leaves[i].reshape(-1) for i in members]
    joined = run(flat[0] if len(flat) == 1 else jnp.concatenate(flat))
    ends = list(itertools.accumulate(part.size for part in flat))
    for i, end, part in zip(members, ends, flat, strict=True):
      piece = joined[..., end - part.size : end]
      done[i] = piece.reshape(*joined.shape[:-1], *leaves[i].shape)
  return structure.unflatten([done[i] for i in range(len(leaves))])
