"""How counts lie on the devices: documents by shards, words by blocks."""

from typing import Any, NamedTuple

import jax
import numpy as np

from emc2 import arguments
from emc2 import mesh as mesh_lib
from emc2.topics.lda import documents as documents_lib

TILE = 512
"""Pairs that are worked on at once: their topics stay in the cache."""

DENSE_SHARE = 0.1
"""Share of the documents from which a word's counts are kept as zeros too.

A pair that is looked up costs a CPU core 60 ns at 64 topics, a place in a dense
matrix 6 ns.
"""


class Cells(NamedTuple):
  """The counts, cut into cells of one shard of documents and one word block.

  There are W shards, B blocks and, in each cell, L tiles of T pairs; the last
  pairs may be padding with count 0.
  """

  documents: Any  # (W, B, L, T), int32: places within the shard.
  words: Any  # (W, B, L, T), int32: places within the block.
  counts: Any  # (W, B, L, T), float32.
  dense: Any  # (W, B, D / W, H), float32: counts of each block's first H words.


class Layout(NamedTuple):
  """Which document and which word lies where; on the host."""

  document_ids: np.ndarray  # (W, D / W), int32; -1 for padding.
  word_ids: np.ndarray  # (B, V / B), int32; -1 for padding.
  num_documents: int
  num_words: int
  num_tokens: float

  def sort_documents(self, rows: Any) -> np.ndarray:
    """Rows by document, (W * D / W, ...), in the corpus's order, (D, ...)."""
    return _undo(self.document_ids, rows, self.num_documents)

  def sort_words(self, rows: Any) -> np.ndarray:
    """Rows by word, (B, V / B, ...), in the vocabulary's order, (V, ...)."""
    rows = np.asarray(rows)
    rows = rows.reshape(self.word_ids.size, *rows.shape[2:])
    return _undo(self.word_ids, rows, self.num_words)

  def place_words(self, rows: Any, fill: float = 0.0) -> np.ndarray:
    """Rows in the vocabulary's order, (V, ...), as (B, V / B, ...)."""
    rows = np.asarray(rows)
    placed = rows[self.word_ids]
    placed[self.word_ids < 0] = fill
    return placed


def cut(
  documents: documents_lib.Documents,
  *,
  num_shards: int = 1,
  num_blocks: int = 1,
  tile: int = TILE,
  dense_share: float | None = None,
  seed: int | None = 0,
) -> tuple[Cells, Layout]:
  """Cuts a corpus into cells of about equal size.

  Documents are dealt to shards by their length, words to blocks by the number
  of documents that have them, so that the shapes, which are those of the
  largest cell, hold little padding.

  Args:
    documents: The corpus.
    num_shards: W, the devices that documents stay on.
    num_blocks: B, a multiple of W.
    tile: T, pairs that are worked on at once.
    dense_share: The share of documents from which a word's counts are kept
      dense; None keeps none.
    seed: Pairs lie in a random order, which lets methods that learn from tile
      to tile learn faster; None keeps the order of documents.

  Returns:
    The cells, of NumPy arrays, and the layout.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  _check(documents, num_shards, num_blocks, tile, dense_share)
  counts = documents.counts
  of_pair = documents.document_ids
  frequency = np.bincount(documents.word_ids, minlength=documents.num_words)
  document_ids = _deal(np.diff(documents.starts), num_shards)
  word_ids = _deal(frequency, num_blocks)
  shard, document = _places(document_ids, documents.num_documents)
  block, word = _places(word_ids, documents.num_words)
  shard, document = shard[of_pair], document[of_pair]
  block, word = block[documents.word_ids], word[documents.word_ids]

  num_dense = 0
  if dense_share is not None:
    enough = max(1.0, dense_share * documents.num_documents)
    # Words lie by falling frequency, the same in every block.
    num_dense = int(np.max(np.sum(_take(frequency, word_ids) >= enough, 1)))
  shape = (num_shards, num_blocks, document_ids.shape[1], num_dense)
  dense = np.zeros(shape, np.float32)
  inside = word < num_dense
  place = shard[inside], block[inside], document[inside], word[inside]
  dense[place] = counts[inside]

  outside = np.flatnonzero(~inside)
  if seed is not None:
    outside = np.random.default_rng(seed).permutation(outside)
  cell = shard[outside].astype(np.int64) * num_blocks + block[outside]
  outside = outside[np.argsort(cell, kind='stable')]
  sizes = np.bincount(cell, minlength=num_shards * num_blocks)
  num_tiles = -(-int(sizes.max(initial=0)) // tile)
  row = np.repeat(np.arange(len(sizes)), sizes)
  column = np.arange(len(outside)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

  def spread(values, dtype):
    spread = np.zeros((len(sizes), num_tiles * tile), dtype)
    spread[row, column] = values[outside]
    return spread.reshape(num_shards, num_blocks, num_tiles, tile)

  cells = Cells(
    documents=spread(document, np.int32),
    words=spread(word, np.int32),
    counts=spread(counts, np.float32),
    dense=dense,
  )
  layout = Layout(
    document_ids=document_ids,
    word_ids=word_ids,
    num_documents=documents.num_documents,
    num_words=documents.num_words,
    num_tokens=documents.num_tokens,
  )
  return cells, layout


def specs() -> Cells:
  """How cells are split over a ring: by the shard of documents."""
  return Cells(*[jax.sharding.PartitionSpec(mesh_lib.RING)] * 4)


def _check(documents, num_shards, num_blocks, tile, dense_share):
  arguments.check_at_least('num_shards', num_shards, 1)
  arguments.check_at_least('tile', tile, 1)
  if num_blocks < 1 or num_blocks % num_shards:
    raise ValueError(
      f'num_blocks must be a multiple of num_shards={num_shards}, got '
      f'{num_blocks}.'
    )
  if num_blocks > documents.num_words:
    raise ValueError(
      f'num_blocks must be at most the number of words, '
      f'{documents.num_words}, got {num_blocks}.'
    )
  if dense_share is not None and not 0 < dense_share <= 1:
    raise ValueError(f'dense_share must lie in (0, 1], got {dense_share}.')
  if not documents.num_documents or not documents.num_tokens:
    raise ValueError(
      f'documents must hold at least one token, got '
      f'{documents.num_documents} documents without any.'
    )


def _deal(sizes, num_hands):
  """Deals things by falling size, there and back; -1 fills up."""
  order = np.argsort(-sizes, kind='stable').astype(np.int32)
  order = np.pad(order, (0, -len(order) % num_hands), constant_values=-1)
  rounds = order.reshape(-1, num_hands)
  rounds[1::2] = rounds[1::2, ::-1]
  return np.ascontiguousarray(rounds.T)


def _places(ids, total):
  """Hand and place of each thing."""
  hand, place = np.empty((2, total), np.int32)
  hands, places = np.nonzero(ids >= 0)
  hand[ids[hands, places]], place[ids[hands, places]] = hands, places
  return hand, place


def _take(values, ids):
  return np.where(ids >= 0, values[ids], 0)


def _undo(ids, rows, total):
  rows = np.asarray(rows)
  ids = ids.ravel()
  out = np.empty((total, *rows.shape[1:]), rows.dtype)
  out[ids[ids >= 0]] = rows[ids >= 0]
  return out
