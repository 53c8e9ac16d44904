"""Batches of documents for online methods: from memory, or from a file."""

import pathlib
from typing import Any, NamedTuple

import grain
import numpy as np
import scipy.sparse

from emc2.experiments.data import bag_of_words, order, scanning
from emc2.experiments.data import corpus as corpus_lib
from emc2.topics.lda import documents


class Size(NamedTuple):
  """What a run must know of a corpus before it streams."""

  num_documents: int
  num_words: int
  num_pairs: int
  num_tokens: int
  max_words: int  # Different words of the document that has most.


def pad(
  counts: scipy.sparse.csr_array, max_words: int | None = None
) -> documents.Batch:
  """Lays documents side by side.

  Args:
    counts: (documents, words), as `Corpus.counts`.
    max_words: The width. None takes the different words of the document that
      has most, up to the next power of two: few widths, so few compilations.

  Returns:
    The documents in their order; the words of each first, then the padding.

  Raises:
    ValueError: If a document has more than `max_words` different words.

  Examples:
    >>> corpus = corpus_lib.make(np.array([[0, 2, 1], [0, 0, 5]]))
    >>> word_ids, counts = pad(corpus.counts, 3)
    >>> word_ids.tolist(), counts.tolist()
    ([[1, 2, 0], [2, 0, 0]], [[2.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
  """
  return _pad(np.diff(counts.indptr), counts.indices, counts.data, max_words)


def _pad(sizes, word_ids, counts, max_words: int | None) -> documents.Batch:
  longest = int(sizes.max(initial=0))
  if max_words is None:
    max_words = 1 << max(longest - 1, 0).bit_length()
  elif longest > max_words:
    raise ValueError(
      'max_words must be at least the different words of each document, got '
      f'{max_words} and a document of {longest}.'
    )
  starts = np.concatenate([[0], np.cumsum(sizes)])
  num_words = int(word_ids.max(initial=-1)) + 1
  rows = documents.Documents(starts, word_ids, counts, num_words)
  return documents.pad(rows, np.arange(sizes.size), max_words)


class _Take(grain.transforms.Map):
  """Maps the number of a step to its batch."""

  def __init__(self, counts, max_words, **settings):
    self._counts = counts
    self._max_words = max_words
    self._settings = settings

  def map(self, step: int) -> documents.Batch:
    index = order.batch_indices(step=step, **self._settings)
    return pad(self._counts[index], self._max_words)


def batches(
  corpus: corpus_lib.Corpus,
  *,
  batch_size: int,
  seed: int = 0,
  max_words: int | None = None,
  shard_index: int = 0,
  num_shards: int = 1,
  prefetch: int = 4,
) -> grain.IterDataset:
  """An endless stream of shuffled batches, epoch after epoch.

  The order is that of `order.batch_indices`. Iterators have Grain's `get_state`
  and `set_state`; the state is the number of batches given out.

  Args:
    corpus: In memory.
    batch_size: Documents of all processes together.
    seed: Of the order, in [0, 2**32).
    max_words: As in `pad`. Batches that are stacked need the same, such as
      `corpus.max_words`.
    shard_index: Which process this is.
    num_shards: How many there are; each takes an equal part of every batch.
    prefetch: Batches made ahead by a thread; 0 makes them when asked.

  Returns:
    Batches (batch_size / num_shards, max_words).

  Raises:
    ValueError: If the sizes do not fit.

  Examples:
    >>> stream = iter(batches(corpus_lib.make(np.eye(8)), batch_size=4))
    >>> next(stream).word_ids.shape, stream.get_state()
    ((4, 1), {'next_index': 1})
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed must lie in [0, 2**32), got {seed}.')
  if max_words is not None and max_words < corpus.max_words:
    raise ValueError(
      'max_words must be None or at least the different words of each document '
      f'of the corpus, {corpus.max_words}, got {max_words}.'
    )
  settings = dict(
    seed=seed,
    num_samples=corpus.num_documents,
    batch_size=batch_size,
    shard_index=shard_index,
    num_shards=num_shards,
  )
  order.batch_indices(step=0, **settings)  # Refuses sizes that do not fit.
  read = grain.ReadOptions(
    num_threads=min(1, prefetch), prefetch_buffer_size=prefetch
  )
  steps = grain.MapDataset.range(np.iinfo(np.int32).max)
  take = _Take(corpus.counts, max_words, **settings)
  return steps.map(take).to_iter_dataset(read)


def measure(
  path: str | pathlib.Path, vocabulary: str | pathlib.Path | None = None
) -> Size:
  """Reads a file once, in bounded memory, and so checks all of it.

  Args:
    path: A file of lda-c or of UCI's bags of words, gzip or not.
    vocabulary: As in `bag_of_words.read`.

  Returns:
    Its size.

  Raises:
    ValueError: As `bag_of_words.read` does.
  """
  form = bag_of_words.file_format(path)
  num_documents = num_pairs = num_tokens = max_words = last_id = 0
  num_words = None
  for block in form.scan(path, vocabulary, shows_progress=True):
    num_documents += block.sizes.size
    num_pairs += block.counts.size
    num_tokens += int(block.counts.sum(dtype=np.int64))
    max_words = max(max_words, int(block.sizes.max(initial=0)))
    last_id = max(last_id, int(block.word_ids.max(initial=0)))
    num_words = block.num_words
  scanning.check_tokens(pathlib.Path(path), num_documents, num_pairs)
  if num_words is None:
    num_words = last_id + 1
  return Size(num_documents, num_words, num_pairs, num_tokens, max_words)


class _Documents(grain.DatasetIterator):
  """Reads a file in its order, again and again."""

  def __init__(self, path, vocabulary, batch_size, max_words, shard):
    super().__init__()
    self._path = path
    self._vocabulary = vocabulary
    self._batch_size = batch_size
    self._max_words = max_words
    self._shard = shard
    self._form = bag_of_words.file_format(path)
    self._go_to(None, 0)

  def _go_to(self, start: scanning.Position | None, row: int) -> None:
    self._blocks = self._form.scan(self._path, self._vocabulary, start)
    self._start = start  # Of the block that `row` counts from.
    self._block = None  # Not read yet.
    self._row = row  # Of the next document; past the end: in a later block.

  def _size(self) -> int:
    return 0 if self._block is None else self._block.sizes.size

  def _next_block(self) -> None:
    row = self._row - self._size()
    block = next(self._blocks, None)
    if block is not None:
      self._check_width(block)
      self._start, self._block, self._row = block.start, block, row
      self._ends = np.cumsum(block.sizes)
      return
    held = 0 if self._block is None else self._start.document + self._size()
    if held < self._batch_size:
      raise ValueError(
        f'{self._path}: expected {self._batch_size} documents or more, one '
        f'batch, got {held}.'
      )
    self._go_to(None, 0)

  def _check_width(self, block: scanning.Block) -> None:
    longest = int(block.sizes.max(initial=0))
    if self._max_words is not None and longest > self._max_words:
      number = block.start.document + int(np.argmax(block.sizes)) + 1
      raise ValueError(
        f'{self._path}: expected documents of at most {self._max_words} '
        f'different words, max_words, got {longest} in document {number}.'
      )

  def __next__(self) -> documents.Batch:
    parts, missing = [], self._batch_size
    while missing:
      if self._row >= self._size():
        self._next_block()
        continue
      block, rows = self._block, slice(self._row, self._row + missing)
      sizes, ends = block.sizes[rows], self._ends[rows]
      pairs = slice(ends[0] - sizes[0], ends[-1])
      parts.append((sizes, block.word_ids[pairs], block.counts[pairs]))
      missing -= sizes.size
      self._row += sizes.size
    sizes, *pairs = map(np.concatenate, zip(*parts, strict=True))
    batch = _pad(sizes, *pairs, self._max_words)
    return documents.Batch(*(values[self._shard] for values in batch))

  def get_state(self) -> dict[str, Any]:
    start = None if self._start is None else list(self._start)
    return {'start': start, 'row': self._row}

  def set_state(self, state: dict[str, Any]) -> None:
    start = state['start']
    start = None if start is None else scanning.Position(*start)
    self._go_to(start, state['row'])


class _Stream(grain.IterDataset):
  """Makes the iterators of :func:`stream`."""

  def __init__(self, *settings):
    super().__init__()
    self._settings = settings

  def __iter__(self) -> grain.DatasetIterator:
    return _Documents(*self._settings)


def stream(
  path: str | pathlib.Path,
  *,
  batch_size: int,
  max_words: int | None = None,
  vocabulary: str | pathlib.Path | None = None,
  shard_index: int = 0,
  num_shards: int = 1,
) -> grain.IterDataset:
  """An endless stream of batches from a file that need not fit in memory.

  Documents come in the order of the file; after the last comes the first again,
  in the same batch, so that all batches are full. `measure` tells the size, and
  finds what is broken before a run starts.

  Iterators have Grain's `get_state` and `set_state`; the state is a place in
  the file, and fits a run with any number of processes. To go back there, a
  gzip file is decompressed from its beginning, another is not read.

  Args:
    path: A file of lda-c or of UCI's bags of words, gzip or not.
    batch_size: Documents of all processes together.
    max_words: As in `pad`. Batches that are stacked need the same, such as the
      `max_words` that `measure` gives.
    vocabulary: As in `bag_of_words.read`.
    shard_index: Which process this is.
    num_shards: How many there are; each reads the file and takes an equal part
      of every batch.

  Returns:
    Batches (batch_size / num_shards, max_words). What is broken in the file,
    fewer documents than a batch, and a document too long raise ValueError where
    the stream comes to them.

  Raises:
    ValueError: If there is no such file, or the sizes do not fit.
  """
  if batch_size < 1 or (max_words is not None and max_words < 1):
    raise ValueError(
      'batch_size and max_words must be at least 1, got '
      f'{batch_size} and {max_words}.'
    )
  if batch_size % num_shards:
    raise ValueError(
      f'batch_size must be a multiple of num_shards, {num_shards}, got '
      f'{batch_size}.'
    )
  if not 0 <= shard_index < num_shards:
    raise ValueError(
      f'shard_index must lie in [0, {num_shards}), got {shard_index}.'
    )
  bag_of_words.file_format(path)  # Refuses what is not there.
  path = pathlib.Path(path).expanduser()
  part = batch_size // num_shards
  shard = slice(part * shard_index, part * (shard_index + 1))
  return _Stream(path, vocabulary, batch_size, max_words, shard)
