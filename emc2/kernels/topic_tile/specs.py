"""Shapes in which the tile is used, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
  """One call: the documents of a device against a block of words."""

  num_docs: int
  num_words: int
  num_topics: int
  dtype: str  # Of the counts.

  def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Abstract weights of documents and of words, and counts."""
    make = jax.ShapeDtypeStruct
    return (
      make((self.num_docs, self.num_topics), jnp.float32),
      make((self.num_words, self.num_topics), jnp.float32),
      make((self.num_docs, self.num_words), self.dtype),
    )


SPECS = {
  'ap_16_topics': Spec(2246, 256, 16, 'float32'),
  'ap_64_topics': Spec(2246, 1024, 64, 'float32'),
  'ap_64_topics_uint8': Spec(2246, 1024, 64, 'uint8'),
  'ap_whole_vocabulary': Spec(2246, 10_473, 64, 'uint8'),
  'enron_128_topics': Spec(4733, 3513, 128, 'uint8'),
  'nytimes_shard': Spec(18_625, 6417, 64, 'bfloat16'),
  'nytimes_shard_256_topics': Spec(18_625, 6417, 256, 'uint8'),
  'umbc_shard': Spec(79_297, 6702, 1000, 'uint8'),
}
