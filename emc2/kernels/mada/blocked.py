"""The first pass over a large leaf on a CPU, one block of the cache at a time.

XLA makes a loop of its own for each output and each sum, on a CPU: over a whole
leaf each reads everything from main memory again, and a sum is not vectorised.
Here the loops run over blocks that stay in the second-level cache, and sums are
kept for each place of the block. A slice that a vectorised loop reads must be
an array of its own, so the loop carries the slices of the next block.
"""

import functools

import jax
import jax.numpy as jnp

from emc2.kernels.mada import reference

# Entries of a block: fewer cost calls, more leave the cache.
LEAST, MOST = 2048, 12_288


def choose_block(size: int) -> int | None:
  """The largest block that divides a leaf, which must have several, or None."""
  most = min(MOST, size // 4)
  sizes = range(most, LEAST - 1, -1)
  return next((block for block in sizes if size % block == 0), None)


def unsupported(grad: jax.Array) -> str | None:
  """Why the loop does not take a leaf, or None."""
  if choose_block(grad.size) is None:
    return f'want a size with a divisor in [{LEAST}, {MOST}], got {grad.size}.'
  return None


def exchange(
  moments: reference.Moments,
  grad: jax.Array,
  new_grad: jax.Array,
  hyper_grad: jax.Array | None,
  k: reference.Scalars,
  settings: reference.Settings,
) -> tuple[reference.Moments, jax.Array, jax.Array]:
  """As the reference does, for a leaf that :func:`choose_block` divides.

  Where the caller donates `moments` and `grad`, all is written in place: each
  output comes from the loop, and none is a copy that XLA would make before it.

  Args:
    moments: Before `grad`.
    grad: Of the last update.
    new_grad: What takes the place of `grad`.
    hyper_grad: The gradient after the last update; None for `new_grad`.
    k: Of the last update, in the dtype of the leaf.
    settings: As they are.

  Returns:
    As :func:`reference.exchange`.
  """
  run = functools.partial(_run, k=k, settings=settings)
  shape, block = grad.shape, choose_block(grad.size)
  flat = functools.partial(jax.tree.map, jnp.ravel)
  kept, read = flat((moments, grad)), flat((new_grad, hyper_grad))

  def cut(x, start):
    return jax.lax.dynamic_slice(
      x, (start,), (block,), allow_negative_indices=False
    )

  def put(x, part, start):
    return jax.lax.dynamic_update_slice(
      x, part, (start,), allow_negative_indices=False
    )

  def body(_, carry):
    start, ahead, kept, sums, now = carry
    fresh, terms = run(*now)
    sums = jax.tree.map(jnp.add, sums, terms)
    kept = jax.tree.map(lambda x, part: put(x, part, start), kept, fresh)
    # The slices come from what was written, so that it is written in place.
    now = jax.tree.map(lambda x: cut(x, ahead), (kept, read))
    last = jnp.asarray(grad.size - block, ahead.dtype)
    return ahead, jnp.minimum(ahead + block, last), kept, sums, now

  zero = jnp.zeros([], jnp.uint32)
  now = jax.tree.map(lambda x: cut(x, zero), (kept, read))
  sums = tuple(jnp.zeros_like(now[1][0]) for _ in range(6))
  carry = zero, zero + block, kept, sums, now
  _, _, kept, sums, _ = jax.lax.fori_loop(0, grad.size // block, body, carry)
  after, grad = jax.tree.map(lambda x: x.reshape(shape), kept)
  return after, grad, jnp.stack([jnp.sum(x) for x in sums])


def _run(kept, read, k, settings):
  """One block: what is kept, and what the products are the sums of."""
  (moments, grad), (new_grad, hyper_grad) = kept, read
  along = new_grad if hyper_grad is None else hyper_grad
  after, terms = reference.advance_along(moments, grad, along, k, settings)
  return (after, new_grad), terms
