"""Refuses wrong input to a topic model before anything runs."""

from typing import Any

from emc2 import arguments


def check_model(
  num_topics: int,
  num_words: int,
  alpha: float,
  eta: float,
  concentration: float = 1.0,
) -> None:
  """Refuses sizes and priors of which there is no model."""
  arguments.check_at_least('num_topics', num_topics, 2)
  arguments.check_at_least('num_words', num_words, 1)
  arguments.check_positive('alpha', alpha)
  arguments.check_positive('eta', eta)
  arguments.check_at_least('concentration', concentration, 0)


def check_cells(cells: Any, axis_name: str | None, *, dense: bool) -> None:
  """Refuses cells that a method cannot work on."""
  if cells.counts.ndim != 4:
    raise ValueError(
      'cells must come from `cut`, (shards, blocks, tiles, pairs), got counts '
      f'of shape {cells.counts.shape}.'
    )
  if cells.counts.shape[0] != 1:
    where = 'one device' if axis_name is None else f'each of {axis_name!r}'
    raise ValueError(
      f'cells must have one shard on {where}, got {cells.counts.shape[0]}.'
    )
  if not dense and cells.dense.shape[-1]:
    raise ValueError(
      'cells must have no dense words (`cut(..., dense_share=None)`) where '
      f'pairs are remembered, got {cells.dense.shape[-1]} in each block.'
    )


def check_batch(batch: Any) -> None:
  """Refuses what is no batch of documents."""
  shape = batch.word_ids.shape
  if len(shape) != 2 or batch.counts.shape != shape:
    raise ValueError(
      'batch must have word_ids and counts of one shape (batch, width), got '
      f'{shape} and {batch.counts.shape}.'
    )


def check_word_sums(
  word_sums: Any, num_words: int, num_topics: int | None = None
) -> None:
  """Refuses topics that are not over so many words."""
  shape = word_sums.shape
  fits = len(shape) == 2 and shape[0] == num_words
  if not fits or num_topics not in (None, shape[1]):
    raise ValueError(
      f'word_sums must be ({num_words}, {num_topics or "topics"}), a row for '
      f'each word, got {shape}.'
    )
  if word_sums.dtype.kind != 'f':
    raise ValueError(f'word_sums must be floats, got {word_sums.dtype}.')
