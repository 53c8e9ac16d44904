r"""Loops over the pairs of a cell: what a method makes of each tile of them.

Responsibilities of all pairs at once would take 4 K bytes a pair; a tile of
them stays in the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import topic_tile
from emc2.topics.lda import cells as cells_lib
from emc2.topics.lda import expectations


class Sums(NamedTuple):
  """What :func:`add_up` returns."""

  documents: jax.Array  # (n_d, K): expected tokens by document and topic.
  words: jax.Array  # (n_v, K): expected tokens by word and topic.
  log_likelihood: jax.Array  # (): sum of count * log(T B'), in nats.


def add_up(
  document_weights: jax.Array,
  word_weights: expectations.WordWeights,
  cell: cells_lib.Cells,
  *,
  implementation: str = 'auto',
) -> Sums:
  r"""Expected tokens by topic under responsibilities of product form.

  With :math:`\phi_{dwk} \propto T_{dk} B_{wk}` and counts :math:`n_{dw}`,

  .. math::
    R_{dw} = \frac{n_{dw}}{(T B^\top)_{dw}}, \quad
    \sum_w n_{dw} \phi_{dwk} = T_{dk} (R B)_{dk}, \quad
    \sum_d n_{dw} \phi_{dwk} = B_{wk} (R^\top T)_{wk},

  so that no responsibility is ever stored.

  Args:
    document_weights: T, (n_d, K).
    word_weights: B, of n_v words.
    cell: One cell: its leaves lack the axes of shards and blocks.
    implementation: Of :func:`emc2.kernels.topic_tile.topic_tile`, which takes
      the dense words.

  Returns:
    The sums.
  """
  num_dense = cell.dense.shape[-1]
  document_weights, scaled, word_logs, _ = mesh.vary_alike(
    document_weights, *word_weights, cell.counts
  )

  def visit(carry, tile):
    by_document, by_word, log_likelihood = carry
    documents, words, counts = tile
    weights = gather(document_weights, documents)
    others = gather(scaled, words)
    scores = row_sums(weights * others) + expectations.TINY
    ratio = counts[:, None] / scores
    by_document = scatter_add(by_document, documents, ratio * others)
    by_word = scatter_add(by_word, words, ratio * weights)
    logs = jnp.log(scores[:, 0]) + gather(word_logs, words)
    log_likelihood += jnp.sum(counts * logs)
    return (by_document, by_word, log_likelihood), None

  carry = (
    jnp.zeros_like(document_weights),
    jnp.zeros_like(scaled),
    jnp.zeros_like(document_weights, shape=()),
  )
  tiles = cell.documents, cell.words, cell.counts
  by_document, by_word, log_likelihood = jax.lax.scan(visit, carry, tiles)[0]
  by_document *= document_weights
  by_word *= scaled
  if num_dense:
    head = topic_tile.topic_tile(
      document_weights,
      scaled[:num_dense],
      cell.dense,
      implementation=implementation,
    )
    by_document += head.doc_sums
    by_word = by_word.at[:num_dense].add(head.word_sums)
    log_likelihood += jnp.sum(head.log_likelihood)
    log_likelihood += jnp.sum(cell.dense * word_logs[None, :num_dense])
  return Sums(by_document, by_word, log_likelihood)


def visit_tiles(
  update: Callable[[Any, Any, tuple[jax.Array, ...]], tuple[Any, Any]],
  carry: Any,
  memory: Any,
  tiles: tuple[jax.Array, ...],
  start: jax.typing.ArrayLike = 0,
) -> tuple[Any, Any]:
  """Lets tiles follow one another, each with a memory of its own.

  Args:
    update: `(carry, memory, tile) -> (carry, memory)` of one tile.
    carry: Pytree that goes from tile to tile.
    memory: Pytree of the memories of all tiles of all cells, on a leading axis;
      written in place where it is donated.
    tiles: Arrays with a leading axis of the tiles of this cell.
    start: (), int32: where this cell's memories begin.

  Returns:
    The last carry, and the memory.
  """
  num_tiles = tiles[0].shape[0]
  length = jax.tree.leaves(memory)[0].shape[0]
  start = jnp.asarray(start, jnp.int32)
  read = lambda tree, i: jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
  )

  # A memory is read right after its neighbour was written: a read that others
  # still wanted at the next write would make XLA copy the whole.
  def visit(carry, numbered):
    carry, memory, own = carry
    number, tile = numbered
    carry, own = update(carry, own, tile)
    memory = jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, number, 0),
      memory,
      own,
    )
    following = jnp.minimum(number + 1, length - 1)
    return (carry, memory, read(memory, following)), None

  numbers = start + jnp.arange(num_tiles, dtype=jnp.int32)
  carry = carry, memory, read(memory, start)
  (carry, memory, _), _ = jax.lax.scan(visit, carry, (numbers, tiles))
  return carry, memory


def row_sums(rows: jax.Array) -> jax.Array:
  """Sums of rows, (n, K) to (n, 1), at the rate of a matrix product."""
  ones = jnp.ones((rows.shape[1], 1), rows.dtype)
  return jnp.matmul(rows, ones, precision=jax.lax.Precision.HIGHEST)


def gather(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of a table by ids that are known to be in it."""
  return table.at[ids].get(mode='promise_in_bounds')


def scatter_add(table: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
  """Adds rows to a table, at ids that are known to be in it."""
  return table.at[ids].add(rows, mode='promise_in_bounds')
