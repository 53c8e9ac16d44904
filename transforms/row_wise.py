"""Any optimiser on the rows that a row-sparse gradient names, and no other."""

import dataclasses
from typing import Any

import jax
import optax

from emc2 import indexed_slices


def row_wise(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs an optimiser on the rows of row-sparse gradients alone.

  Where a leaf of the updates is :class:`emc2.indexed_slices.IndexedSlices`,
  rows of one number are added up, those rows of the state and of the params are
  read, `inner` updates them, and they are written back: work and traffic grow
  with the rows of the gradient, not with the table. Arrays pass as ever.

  .. note::
    This is another method than `inner` on dense gradients: moments of a row
    without a gradient do not decay, and the row does not move. For Adam it is
    known as lazy Adam; the bias correction counts steps, not visits of a row.
    For plain SGD the two agree.

  Args:
    inner: The whole optimiser with its learning rate, acting on each row of a
      table alone, as Adam, momentum and AdaGrad do; moments have the rows of
      the params along their first axis. What comes after it would scale
      indices.

  Returns:
    The transform. Its state is that of `inner`; its updates are slices where
    the gradients are, for :func:`apply_updates`, and each row comes once.

  Raises:
    ValueError: In `update`, if a part of the state that belongs to a row-sparse
      leaf has no axis of its rows.

  Examples:
    >>> tx = row_wise(optax.sgd(0.5, momentum=0.9))
    >>> table = jnp.ones((3, 1))
    >>> rows = indexed_slices.make(jnp.ones((1, 1)), jnp.array([2]), (3, 1))
    >>> updates, state = tx.update(rows, tx.init(table), table)
    >>> apply_updates(table, updates)[:, 0]
    Array([1. , 1. , 0.5], dtype=float32)
    >>> state[0].trace[:, 0]
    Array([0., 0., 1.], dtype=float32)

  References:
    Cavdar et al., `Densifying Assumed-sparse Tensors
    <https://arxiv.org/abs/1905.04035>`_, 2019, on what densifying changes.
  """
  inner = optax.with_extra_args_support(inner)

  def update_fn(updates, state, params=None, **extra_args):
    is_slices = indexed_slices.is_slices
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_slices)
    if not any(map(is_slices, leaves)):
      return inner.update(updates, state, params, **extra_args)
    picks = [
      _Pick(indexed_slices.dedup(leaf)) if is_slices(leaf) else _Pick(None)
      for leaf in leaves
    ]
    values = [
      leaf if pick.slices is None else pick.slices.values
      for leaf, pick in zip(leaves, picks, strict=True)
    ]
    picks = structure.unflatten(picks)
    picks_of_state = _picks_of(inner, state, picks)
    rows, state_of_rows = inner.update(
      structure.unflatten(values),
      jax.tree.map(_read, state, picks_of_state),
      None if params is None else jax.tree.map(_read, params, picks),
      **extra_args,
    )
    state = jax.tree.map(_write, state_of_rows, picks_of_state, state)
    wrap = lambda x, pick: (
      x if pick.slices is None else dataclasses.replace(pick.slices, values=x)
    )
    return jax.tree.map(wrap, rows, picks), state

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def apply_updates(params: optax.Params, updates: optax.Updates) -> optax.Params:
  """Adds updates, of which some may be slices, to the params.

  Args:
    params: A tree of arrays.
    updates: The same tree, each leaf an array or slices.

  Returns:
    The new params, of the dtypes of the old.

  Examples:
    >>> rows = indexed_slices.make(jnp.ones((1, 1)), jnp.array([2]), (3, 1))
    >>> apply_updates(jnp.zeros((3, 1)), rows)[:, 0]
    Array([0., 0., 1.], dtype=float32)
  """

  def apply(update, param):
    if indexed_slices.is_slices(update):
      return indexed_slices.add(param, update)
    return optax.apply_updates(param, update)

  return jax.tree.map(apply, updates, params, is_leaf=indexed_slices.is_slices)


class _Pick:
  """Which rows of a leaf are meant, all without slices; no pytree."""

  def __init__(self, slices: indexed_slices.IndexedSlices | None):
    self.slices = slices


def _read(leaf: Any, pick: _Pick) -> Any:
  """The rows of a leaf; those past the end are zeros."""
  if pick.slices is None:
    return leaf
  num_rows = pick.slices.dense_shape[0]
  if leaf.shape[:1] != (num_rows,):
    raise ValueError(
      f'inner must keep state with the {num_rows} rows of its params along the '
      f'first axis, got shape {leaf.shape}.'
    )
  return leaf.at[pick.slices.indices].get(
    mode='fill', fill_value=0, indices_are_sorted=True
  )


def _write(rows: Any, pick: _Pick, leaf: Any) -> Any:
  """The leaf with its rows replaced; those past the end are dropped."""
  if pick.slices is None:
    return rows
  return leaf.at[pick.slices.indices].set(
    rows, mode='drop', indices_are_sorted=True
  )


def _picks_of(inner: Any, state: Any, picks: Any) -> Any:
  """A tree like the state, which says which rows of each leaf are meant."""
  is_masked = lambda node: isinstance(node, optax.MaskedNode)
  return optax.tree.map_params(
    inner,
    lambda leaf, pick: leaf if is_masked(leaf) else pick,
    state,
    picks,
    transform_non_params=lambda leaf: _Pick(None),
    is_leaf=is_masked,
  )
