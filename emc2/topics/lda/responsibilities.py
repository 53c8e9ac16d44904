"""Responsibilities of a device's pairs: drawn, remembered, added up."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2.topics.lda import cells as cells_lib
from emc2.topics.lda import sweep


class Local(NamedTuple):
  """What one device has of a corpus."""

  key: jax.Array  # Of this device alone.
  cells: cells_lib.Cells  # Leaves without the axis of shards.
  num_topics: int
  block_words: int  # V / B.

  @classmethod
  def of(
    cls,
    key: jax.Array,
    cells: cells_lib.Cells,
    num_topics: int,
    num_words: int,
    axis_name: str | None,
  ) -> 'Local':
    """Takes the shard that lies on this device."""
    if axis_name is not None:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    num_blocks = cells.counts.shape[1]
    cells = jax.tree.map(lambda x: jnp.asarray(x)[0], cells)
    return cls(key, cells, num_topics, -(-num_words // num_blocks))

  @property
  def num_blocks(self) -> int:
    """B."""
    return self.cells.counts.shape[0]

  @property
  def num_documents(self) -> int:
    """D / W, with the padding."""
    return self.cells.dense.shape[1]

  @property
  def tiles_per_block(self) -> int:
    """L."""
    return self.cells.counts.shape[1]

  def cell(self, number: jax.Array) -> cells_lib.Cells:
    """The cell of one block."""
    read = jax.lax.dynamic_index_in_dim
    return jax.tree.map(lambda x: read(x, number, keepdims=False), self.cells)

  def tiles(self, number: jax.Array) -> tuple[jax.Array, ...]:
    """Documents, words and counts of one block's pairs, (L, T) each."""
    cell = self.cell(number)
    return cell.documents, cell.words, cell.counts

  def all_tiles(self) -> tuple[jax.Array, ...]:
    """Those of all blocks, (B * L, T); words are numbered through all blocks.

    That is place `v` of block `b` is `b * block_words + v`.
    """
    first = self.block_words * jnp.arange(self.num_blocks, dtype=jnp.int32)
    words = self.cells.words + first[:, None, None]
    tiles = self.cells.documents, words, self.cells.counts
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tiles)


def draw(
  key: jax.Array, shape: tuple[int, ...], concentration: float, dtype: Any
) -> jax.Array:
  """Rows of a symmetric Dirichlet distribution.

  Args:
    key: Of the draw.
    shape: (..., K).
    concentration: Its parameter; 0 gives unit vectors.
    dtype: Of the rows.

  Returns:
    Of that shape.
  """
  if concentration == 0:
    topics = jax.random.randint(key, shape[:-1], 0, shape[-1], jnp.int32)
    return jax.nn.one_hot(topics, shape[-1], dtype=dtype)
  if concentration == 1:
    draws = jax.random.exponential(key, shape, dtype)
    return draws / jnp.sum(draws, -1, keepdims=True)
  parameters = jnp.full(shape[-1:], concentration, dtype)
  return jax.random.dirichlet(key, parameters, shape[:-1])


def draw_tile(
  local: Local, number: jax.Array, concentration: float
) -> jax.Array:
  """Those of tile `number` of `Local.all_tiles`, (T, K)."""
  shape = local.cells.counts.shape[-1], local.num_topics
  key = jax.random.fold_in(local.key, number)
  return draw(key, shape, concentration, local.cells.counts.dtype)


def remember(local: Local, make: Callable[[jax.Array], Any]) -> Any:
  """`make(number)` of all tiles, on a leading axis of B * L."""
  num_tiles = local.num_blocks * local.tiles_per_block
  return jax.lax.map(make, jnp.arange(num_tiles, dtype=jnp.int32))


def add_up(
  local: Local, memory: Any, unpack: Callable[[Any], jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Expected tokens by topic under the responsibilities remembered.

  Args:
    local: This device's part.
    memory: Pytree with a leading axis of B * L tiles.
    unpack: Makes the responsibilities (T, K) of one tile of it.

  Returns:
    Those of the documents, (D / W, K), and of all words, (B, V / B, K).
  """

  def visit(sums, tile):
    by_document, by_word = sums
    own, (ids, word_ids, counts) = tile
    tokens = counts[:, None] * unpack(own)
    by_document = sweep.scatter_add(by_document, ids, tokens)
    by_word = sweep.scatter_add(by_word, word_ids, tokens)
    return (by_document, by_word), None

  num_words = local.num_blocks * local.block_words
  make = lambda rows: jnp.zeros_like(
    local.cells.counts, shape=(rows, local.num_topics)
  )
  sums = make(local.num_documents), make(num_words)
  sums = jax.lax.scan(visit, sums, (memory, local.all_tiles()))[0]
  by_word = sums[1].reshape(local.num_blocks, local.block_words, -1)
  return sums[0], by_word


def draw_sums(
  local: Local, concentration: float
) -> tuple[jax.Array, jax.Array]:
  """Expected tokens of each cell under responsibilities drawn and forgotten.

  Args:
    local: This device's part.
    concentration: As in `draw`.

  Returns:
    Those of the documents, (B, D / W, K), and of the words, (B, V / B, K).
  """
  zeros = lambda rows: jnp.zeros_like(
    local.cells.counts, shape=(rows, local.num_topics)
  )

  def of_block(number):
    def add_tile(sums, tile):
      place, ids, word_ids, counts = tile
      tokens = counts[:, None] * draw_tile(local, place, concentration)
      by_document = sweep.scatter_add(sums[0], ids, tokens)
      return (by_document, sweep.scatter_add(sums[1], word_ids, tokens)), None

    def add_word(by_document, word):
      counts = jax.lax.dynamic_index_in_dim(dense, word, 1)
      key = jax.random.fold_in(dense_key, number * num_dense + word)
      shape = by_document.shape
      tokens = counts * draw(key, shape, concentration, counts.dtype)
      return by_document + tokens, jnp.sum(tokens, 0)

    first = number * local.tiles_per_block
    places = first + jnp.arange(local.tiles_per_block, dtype=jnp.int32)
    sums = zeros(local.num_documents), zeros(local.block_words)
    tiles = places, *local.tiles(number)
    (by_document, by_word), _ = jax.lax.scan(add_tile, sums, tiles)
    if num_dense:
      dense = local.cell(number).dense
      words = jnp.arange(num_dense, dtype=jnp.int32)
      by_document, head = jax.lax.scan(add_word, by_document, words)
      by_word = by_word.at[:num_dense].add(head)
    return by_document, by_word

  num_dense = local.cells.dense.shape[-1]
  # No tile has this number.
  dense_key = jax.random.fold_in(local.key, 2**31 - 1)
  return jax.lax.map(of_block, jnp.arange(local.num_blocks, dtype=jnp.int32))


def share_words(by_word: jax.Array, axis_name: str | None) -> jax.Array:
  """Adds up what all devices have of the words; each keeps its own blocks.

  Args:
    by_word: (B, V / B, K), of this device's documents.
    axis_name: The mesh axis, or None.

  Returns:
    (B / W, V / B, K), of all documents.
  """
  if axis_name is None:
    return by_word
  return jax.lax.psum_scatter(
    by_word, axis_name, scatter_dimension=0, tiled=True
  )


def total(words: jax.Array, axis_name: str | None) -> jax.Array:
  """The sum (K,) over the words of all devices."""
  totals = jnp.sum(words, (0, 1))
  return totals if axis_name is None else jax.lax.psum(totals, axis_name)
