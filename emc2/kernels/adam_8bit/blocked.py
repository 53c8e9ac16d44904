"""A step over a large leaf on a CPU, one part of the cache at a time.

Each loop that XLA makes for a CPU makes anew what it reads, if that is cheap to
make: over a whole leaf it would decode moments three times, and read them from
main memory each time. Here a part's moments are made at the end of a turn and
coded in the next, so that between the two they lie in the second-level cache.
"""

import jax
import jax.numpy as jnp

from emc2.kernels.adam_8bit import reference

# Entries of a part, about.
_PART = 16_384
_LEAST_PARTS = 4


def unsupported(grad: jax.Array, coded: reference.Coded) -> str | None:
  """Why the loop does not take a leaf, or None."""
  if any(x.dtype != jnp.float32 for x in (grad, coded.mu_scale)):
    return 'want float32 throughout.'
  if grad.size < _LEAST_PARTS * _PART:
    return f'want at least {_LEAST_PARTS * _PART} entries, got {grad.size}.'
  return None


def step(
  grad: jax.Array,
  coded: reference.Coded,
  k: reference.Scalars,
  settings: reference.Settings,
) -> tuple[jax.Array, reference.Coded]:
  """As the reference does, for a leaf that is not :func:`unsupported`.

  The update is written over the gradient, and the codes over the old ones,
  where the caller donates them or needs them no more.

  Args:
    grad: (n,), float32: at most what the blocks hold.
    coded: Blocks (m, B), of which the last may be padded.
    k: Of this update.
    settings: Static.

  Returns:
    As the reference, the update (n,).
  """
  num_blocks, width = coded.mu.shape
  # In rows, for a loop over what is cut otherwise than it is used is slow.
  size = grad.size
  if size < num_blocks * width:
    grad = jnp.pad(grad, (0, num_blocks * width - size))
  grad = grad.reshape(num_blocks, width)
  rows = max(1, _PART // width)
  num_parts = num_blocks // rows

  def cut(x, start):
    starts = (start, jnp.zeros_like(start))[: x.ndim]
    return jax.lax.dynamic_slice(
      x, starts, (rows, *x.shape[1:]), allow_negative_indices=False
    )

  def put(x, part, start):
    starts = (start, jnp.zeros_like(start))[: x.ndim]
    return jax.lax.dynamic_update_slice(
      x, part, starts, allow_negative_indices=False
    )

  def advance(grad, coded, start):
    now = jax.tree.map(lambda x: cut(x, start), coded)
    return reference.advance(cut(grad, start), now, k, settings)

  def body(_, carry):
    start, ahead, flat, coded, mu, nu = carry
    fresh = reference.encode(mu, nu, (_scale_of(mu), _scale_of(nu)), settings)
    coded = jax.tree.map(lambda x, part: put(x, part, start), coded, fresh)
    flat = put(flat, reference.direction(mu, nu, k), start)
    mu, nu = advance(flat, coded, ahead)
    last = jnp.asarray((num_parts - 1) * rows, ahead.dtype)
    return ahead, jnp.minimum(ahead + rows, last), flat, coded, mu, nu

  zero = jnp.zeros([], jnp.uint32)
  mu, nu = advance(grad, coded, zero)
  carry = zero, zero + rows, grad, coded, mu, nu
  _, _, update, after, _, _ = jax.lax.fori_loop(0, num_parts, body, carry)

  done = num_parts * rows
  if done < num_blocks:
    # Less than a part is left, which is no reason to refuse a leaf.
    rest = jax.tree.map(lambda x: x[done:], coded)
    left, kept = reference.step(grad[done:], rest, k, settings)
    start = jnp.asarray(done, jnp.uint32)
    update = put(update, left, start)
    after = jax.tree.map(lambda x, y: put(x, y, start), after, kept)
  return update.reshape(-1)[:size], after


def _scale_of(x):
  """The largest magnitudes of rows, by halves: a loop that is vectorised."""
  x = jnp.abs(x)
  while x.shape[-1] > 16 and x.shape[-1] % 2 == 0:
    half = x.shape[-1] // 2
    x = jnp.maximum(x[:, :half], x[:, half:])
  return jnp.max(x, axis=-1)
