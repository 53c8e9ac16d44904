"""Characters for language models: any UTF-8 file, or built-in docstrings."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from emc2.experiments.data import docstrings

REPLACEMENT = '\N{REPLACEMENT CHARACTER}'
"""Stands for every character that has no token of its own."""

PACKAGES = ('flax', 'numpy', 'optax')
"""Whose docstrings make the built-in text: some 2.5 million characters."""

_SHORTEST = 2  # A token and its successor.


@dataclasses.dataclass(frozen=True)
class Text:
  """A text as tokens, one per character.

  Attributes:
    train: (n,) int32 in [0, number of tokens).
    validation: (m,) int32: the end of the text.
    vocabulary: The character of each token, sorted.
  """

  train: np.ndarray
  validation: np.ndarray
  vocabulary: tuple[str, ...]

  def encode(self, text: str) -> np.ndarray:
    """Maps a text to tokens.

    Args:
      text: Of n characters.

    Returns:
      (n,) int32.

    Raises:
      ValueError: If a character has no token, and the vocabulary no
        replacement.
    """
    tokens = {character: i for i, character in enumerate(self.vocabulary)}
    default = tokens.get(REPLACEMENT)
    encoded = [tokens.get(character, default) for character in text]
    if None in encoded:
      raise ValueError(
        'text must consist of characters of the vocabulary, got '
        f'{text[encoded.index(None)]!r}.'
      )
    return np.array(encoded, np.int32)

  def decode(self, tokens: jax.typing.ArrayLike) -> str:
    """Maps tokens to the text that they stand for.

    Args:
      tokens: (n,) integers in [0, number of tokens).

    Returns:
      Of n characters.

    Examples:
      >>> text = make('abracadabra', validation=0.2)
      >>> text.decode(text.train[:4])
      'abra'
    """
    return ''.join(self.vocabulary[token] for token in np.asarray(tokens))


def make(
  text: str,
  *,
  validation: float = 0.1,
  max_vocabulary: int | None = None,
  source: str = 'text',
) -> Text:
  """Splits a text and numbers its characters.

  Args:
    text: At least 2 characters for each part.
    validation: The part at the end that is held out, in (0, 1).
    max_vocabulary: Most tokens; if the text has more characters, the rarest
      become one, `REPLACEMENT`. At least 2; None keeps all.
    source: What an error calls the text, e.g. its file.

  Returns:
    The tokens.

  Raises:
    ValueError: If a setting is out of range or the text is too short.

  Examples:
    >>> text = make('abracadabra', validation=0.2)
    >>> text.vocabulary, text.train.tolist(), text.validation.tolist()
    (('a', 'b', 'c', 'd', 'r'), [0, 1, 4, 0, 2, 0, 3, 0, 1], [4, 0])
  """
  if not 0 < validation < 1:
    raise ValueError(f'validation must lie in (0, 1), got {validation}.')
  if max_vocabulary is not None and max_vocabulary < 2:
    raise ValueError(
      f'max_vocabulary must be None or at least 2, got {max_vocabulary}.'
    )
  num_held_out = round(validation * len(text))
  if min(num_held_out, len(text) - num_held_out) < _SHORTEST:
    raise ValueError(
      f'{source}: expected {_SHORTEST} or more characters in each part, got '
      f'{len(text)} characters in all, of which {num_held_out} held out.'
    )
  points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
  characters, tokens, counts = np.unique(
    points, return_inverse=True, return_counts=True
  )
  if max_vocabulary is not None and characters.size > max_vocabulary:
    order = np.lexsort((characters, -counts.astype(np.int64)))
    characters[order[max_vocabulary - 1 :]] = ord(REPLACEMENT)
    characters, merged = np.unique(characters, return_inverse=True)
    tokens = merged[tokens]
  tokens = tokens.astype(np.int32)
  return Text(
    train=tokens[: tokens.size - num_held_out],
    validation=tokens[tokens.size - num_held_out :],
    vocabulary=tuple(map(chr, characters.tolist())),
  )


def read(
  path: str | pathlib.Path,
  *,
  validation: float = 0.1,
  max_vocabulary: int | None = None,
) -> Text:
  """Reads a file of UTF-8.

  Args:
    path: The file.
    validation: As in `make`.
    max_vocabulary: As in `make`.

  Returns:
    The tokens.

  Raises:
    ValueError: If the file is missing, not UTF-8, empty or too short; it names
      the file and the place.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f'{path}: expected a text file, got none.')
  content = path.read_bytes()
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    line = content.count(b'\n', 0, error.start) + 1
    raise ValueError(
      f'{path}: expected UTF-8, got byte {content[error.start]:#04x} at offset '
      f'{error.start}, line {line}.'
    ) from error
  return make(
    text,
    validation=validation,
    max_vocabulary=max_vocabulary,
    source=str(path),
  )


def read_docstrings(
  packages: Sequence[str] = PACKAGES,
  *,
  max_characters: int = 1_000_000,
  validation: float = 0.1,
  max_vocabulary: int | None = 100,
) -> Text:
  """Joins the docstrings of installed packages to one text.

  They come in a random order, always the same one, so that both parts hold
  documents of all packages.

  Args:
    packages: As in `docstrings.load`.
    max_characters: Where the text is cut.
    validation: As in `make`.
    max_vocabulary: As in `make`.

  Returns:
    The tokens.

  Raises:
    ValueError: If a package is not installed or the text is too short.
  """
  if max_characters < 1:
    raise ValueError(
      f'max_characters must be at least 1, got {max_characters}.'
    )
  texts = docstrings.load(packages).texts
  order = np.random.default_rng(0).permutation(len(texts))
  text = '\n\n\n'.join(texts[i] for i in order)
  return make(
    text[:max_characters],
    validation=validation,
    max_vocabulary=max_vocabulary,
    source='docstrings',
  )


def open(
  name_or_path: str | pathlib.Path,
  *,
  validation: float = 0.1,
  max_vocabulary: int | None = 100,
) -> Text:
  """Opens a text by its name.

  Args:
    name_or_path: 'docstrings' or a file.
    validation: As in `make`.
    max_vocabulary: As in `make`.

  Returns:
    The tokens.

  Raises:
    ValueError: If something is missing or broken.
  """
  settings = dict(validation=validation, max_vocabulary=max_vocabulary)
  if str(name_or_path) == 'docstrings':
    return read_docstrings(**settings)
  return read(name_or_path, **settings)


def sample_batch(
  key: jax.Array, tokens: Int[Array, ' n'], batch_size: int, length: int
) -> Int[Array, 'batch_size window']:
  """Draws windows of a text, each place equally likely.

  Pure and on the device, so that a jitted step draws its own batch.

  Args:
    key: PRNG key.
    tokens: (n,) integers, n above `length`.
    batch_size: Number of windows, static.
    length: Inputs of a window, static; the successor of the last comes on top.

  Returns:
    (batch_size, length + 1), of the type of `tokens`.

  Raises:
    ValueError: If a size is not positive or the text is too short.

  Examples:
    >>> tokens = jnp.arange(10)
    >>> sample_batch(jax.random.key(0), tokens, 2, 3).shape
    (2, 4)
  """
  _check_sizes(tokens.shape[0], length, batch_size=batch_size)
  starts = jax.random.randint(key, (batch_size,), 0, tokens.shape[0] - length)
  offsets = jnp.arange(length + 1, dtype=starts.dtype)
  return tokens[starts[:, None] + offsets[None, :]]


def validation_windows(
  tokens: np.ndarray | jax.Array, length: int, max_windows: int
) -> np.ndarray | jax.Array:
  """Takes fixed windows, evenly spaced; no token is predicted twice.

  Args:
    tokens: (n,) integers, n above `length`.
    length: Inputs of a window; the successor of the last comes on top.
    max_windows: How many there are if the text has room for them.

  Returns:
    (windows, length + 1), of the type of `tokens`.

  Raises:
    ValueError: If a size is not positive or the text is too short.

  Examples:
    >>> validation_windows(np.arange(10), 3, 2).tolist()
    [[0, 1, 2, 3], [6, 7, 8, 9]]
  """
  _check_sizes(tokens.shape[0], length, max_windows=max_windows)
  num_windows = min(max_windows, (tokens.shape[0] - 1) // length)
  last = tokens.shape[0] - length - 1
  starts = np.arange(num_windows) * last // max(1, num_windows - 1)
  return tokens[starts[:, None] + np.arange(length + 1)[None, :]]


def _check_sizes(num_tokens: int, length: int, **sizes: int) -> None:
  for name, size in {'length': length, **sizes}.items():
    if size < 1:
      raise ValueError(f'{name} must be at least 1, got {size}.')
  if num_tokens <= length:
    raise ValueError(
      f'tokens must be more than length, {length}, got {num_tokens}.'
    )
