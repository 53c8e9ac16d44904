"""Keeps the moments of any optimiser in blocks of 8-bit codes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emc2.compression import blockwise
from emc2.transforms import blocks

UNSIGNED_FIELDS = (
  'nu',
  'nu_bar',
  'nu_max',
  'nu_mean',
  'sum_of_squares',
)
"""Fields of states that are never negative."""


class QuantizeStateState(NamedTuple):
  """State of :func:`quantize_state`."""

  inner_state: optax.OptState  # Of the inner one; large arrays in codes.
  key: jax.Array | None  # Of the next draws; None where nothing is drawn.


def quantize_state(
  inner: optax.GradientTransformation,
  *,
  block_size: int = blockwise.BLOCK_SIZE,
  min_8bit_size: int = 4096,
  map: str = 'dynamic',
  symmetric: bool = False,
  unsigned_fields: Sequence[str] = UNSIGNED_FIELDS,
  keep32_mask: Any | Callable[[optax.Params], Any] | None = None,
  rounding: str = 'nearest',
  key: jax.Array | None = None,
  keep_sign: bool = True,
  floor: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Decodes the state of a transform, lets it update, and codes it again.

  Arrays of real floats with at least `min_8bit_size` entries are coded, and
  nothing else: no counter, and no number. Updates come from the inner state
  before it is coded. For Adam, :func:`scale_by_adam_8bit` does the same in one
  pass, where this holds one float for each code while it updates.

  Args:
    inner: The transform, with any state.
    block_size: Static, in [1, 4096]; see :func:`scale_by_adam_8bit`.
    min_8bit_size: Static; arrays with fewer entries stay as they are.
    map: Static; 'dynamic' or 'linear', the numbers that codes stand for.
    symmetric: Static; as :class:`emc2.compression.blockwise.Codebook` has it.
    unsigned_fields: Static; the fields of states with no negative entry, whose
      codes then need no sign. All others are signed.
    keep32_mask: A tree of booleans that is a prefix of the params, or a
      function from params to one; True leaves what belongs to them as it is:
      what stands in the state under the path of such a param.
    rounding: Static; 'nearest', or 'stochastic', without bias.
    key: Of the draws, for 'stochastic' alone.
    keep_sign: Static; no entry below 0 becomes 0, in signed fields.
    floor: Static; no entry above 0 becomes 0, in unsigned fields.

  Returns:
    The transform.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> tx = quantize_state(optax.trace(0.9), min_8bit_size=0)
    >>> g = jnp.array([1.0, -0.5])
    >>> state = tx.init(g)
    >>> for _ in range(2):
    ...   updates, state = tx.update(g, state)
    >>> updates.round(3)
    Array([ 1.9000001 , -0.95100003], dtype=float32)

  References:
    Dettmers, Lewis, Shleifer and Zettlemoyer, `8-bit Optimizers via Block-wise
    Quantization <https://arxiv.org/abs/2110.02861>`_, 2022.
  """
  inner = optax.with_extra_args_support(inner)
  settings = blocks.Settings(
    block_size=block_size,
    min_8bit_size=min_8bit_size,
    map=map,
    symmetric=symmetric,
    rounding=rounding,
    key=key,
  )
  is_coded = blockwise.is_coded

  def codebook(path):
    fields = {
      key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)
    }
    nonnegative = not fields.isdisjoint(unsigned_fields)
    return settings.unsigned if nonnegative else settings.signed

  def init_fn(params):
    kept = blocks.kept_in_32(keep32_mask, params)
    paths, _ = jax.tree_util.tree_flatten_with_path(kept)
    kept = [_names(path) for path, keep in paths if keep]

    def leaf(path, x):
      names = _names(path)
      large = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 0
      large = large and x.size >= min_8bit_size
      if not large or any(names[len(names) - len(p) :] == p for p in kept):
        return x
      # The first state may hold more than zeros.
      return blockwise.quantize(
        x, codebook(path), block_size=block_size, keep_sign=False
      )

    state = jax.tree_util.tree_map_with_path(leaf, inner.init(params))
    return QuantizeStateState(state, None if key is None else jnp.copy(key))

  def update_fn(updates, state, params=None, **extra_args):
    like = jax.eval_shape(inner.init, updates if params is None else params)
    restore = lambda node: blockwise.as_coded(
      node, settings.signed, settings.unsigned
    )
    decode = lambda node, like: (
      blockwise.dequantize(restore(node), like) if is_coded(node) else node
    )
    before = jax.tree.map(decode, state.inner_state, like, is_leaf=is_coded)
    updates, after = inner.update(updates, before, params, **extra_args)
    old, treedef = jax.tree.flatten(state.inner_state, is_leaf=is_coded)
    old = [restore(node) for node in old]
    keys, next_key = [None] * len(old), None
    if state.key is not None:
      next_key, *keys = jax.random.split(state.key, len(old) + 1)

    def code(old, new, own):
      if not is_coded(old):
        return new
      return blockwise.quantize(
        new,
        old.codebook,
        block_size=block_size,
        keep_sign=keep_sign if old.codebook.signed else floor,
        rounding=rounding,
        key=own,
      )

    after = treedef.flatten_up_to(after)
    coded = [code(*one) for one in zip(old, after, keys, strict=True)]
    return updates, QuantizeStateState(treedef.unflatten(coded), next_key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _names(path: Any) -> tuple[str, ...]:
  """A path as names that may be compared."""
  return tuple(str(key) for key in path)
