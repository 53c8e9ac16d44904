"""Shapes of leaves whose moments are coded, for tests and benchmarks alike."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2.compression import blockwise


class Spec(NamedTuple):
  """One leaf."""

  shape: tuple[int, ...]
  block_size: int = 256

  def args(self) -> tuple[jax.ShapeDtypeStruct, object, object]:
    """An abstract gradient and both moments in codes."""
    grad = jax.ShapeDtypeStruct(self.shape, jnp.float32)

    def moments(grad):
      start = lambda book: blockwise.zeros_like(
        grad, book, block_size=self.block_size
      )
      return start(blockwise.SIGNED), start(blockwise.UNSIGNED)

    return grad, *jax.eval_shape(moments, grad)


SPECS = {
  'mlp_768': Spec((768, 3072)),
  'attention_4096': Spec((4096, 4096)),
  'mlp_8192': Spec((8192, 28_672)),
  'blocks_of_128': Spec((2048, 2048), 128),
}
