"""Row-sparse gradients on their way to an optimiser."""

import jax
import optax

from emc2 import densify as densify_lib
from emc2 import indexed_slices


def densify(
  *,
  axis_name: str | None = None,
  strategy: str = 'auto',
  objective: str = 'bytes',
  keep_rows: bool = False,
  wire_dtype: jax.typing.DTypeLike | None = None,
  max_dense_bytes: int = densify_lib.MAX_DENSE_BYTES,
) -> optax.GradientTransformationExtraArgs:
  """Averages row-sparse gradients over workers and makes them arrays.

  Leaves of the updates are arrays or :class:`emc2.indexed_slices.
  IndexedSlices`. They are averaged over a mesh axis, slices in the cheaper of
  two ways, as :func:`emc2.densify.reduce_slices` says; then slices become
  arrays, which any optimiser takes. With `keep_rows` those stay slices of which
  the model says so: few rows, for :func:`row_wise`.

  It comes first in a chain. Most transforms would take indices for numbers to
  scale, and a norm of values is no norm where rows share an index.

  .. note::
    Slices that are kept are deduplicated, so that each row comes once.

  Args:
    axis_name: The mesh axis of workers, in :func:`jax.shard_map`, to which each
      gives its own gradients; None for a single worker, or for gradients that
      are means.
    strategy: 'auto', 'gather' or 'dense'. Slices on a single worker are an
      exchange of no bytes, where 'auto' asks for memory: n < V.
    objective: Of 'auto': 'bytes' or 'memory'.
    keep_rows: Whether leaves that were gathered stay slices.
    wire_dtype: A float dtype in which values travel; their own by default.
    max_dense_bytes: No array of more bytes is made of slices; a larger table
      wants `keep_rows`.

  Returns:
    The transform, without state.

  Raises:
    ValueError: If a name is not known; in `update`, as
      :func:`emc2.densify.reduce_slices`, with the path of the leaf.

  Examples:
    >>> tx = optax.chain(densify(), optax.sgd(1.0))
    >>> table = jnp.ones((4, 2))
    >>> rows = indexed_slices.make(jnp.ones((2, 2)), jnp.array([3, 3]), (4, 2))
    >>> updates, _ = tx.update(rows, tx.init(table), table)
    >>> updates[:, 0]
    Array([-0., -0., -0., -2.], dtype=float32)

  References:
    Cavdar et al., `Densifying Assumed-sparse Tensors
    <https://arxiv.org/abs/1905.04035>`_, 2019.
  """
  densify_lib.check_exchange(strategy, objective, wire_dtype)

  def init_fn(params):
    del params
    return optax.EmptyState()

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    means = densify_lib.reduce_slices(
      updates,
      axis_name,
      strategy,
      objective=objective,
      wire_dtype=wire_dtype,
      max_dense_bytes=max_dense_bytes,
    )

    def finish(path, leaf):
      if not indexed_slices.is_slices(leaf):
        return leaf
      if keep_rows:
        return indexed_slices.dedup(leaf)
      name = f'updates{jax.tree_util.keystr(path)}'
      return densify_lib.to_dense(leaf, max_dense_bytes, name)

    is_leaf = indexed_slices.is_slices
    return jax.tree_util.tree_map_with_path(
      finish, means, is_leaf=is_leaf
    ), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
