"""Decodes both moments of a leaf, moves them, and codes them again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2.compression import blockwise


class Scalars(NamedTuple):
  """The numbers of one update, each ()."""

  b1: jax.Array
  b2: jax.Array
  eps: jax.Array
  scale1: jax.Array  # 1 / (1 - b1^t).
  scale2: jax.Array  # 1 / (1 - b2^t).

  @classmethod
  def of(
    cls,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    t: jax.Array,
    dtype: jax.typing.DTypeLike,
  ) -> 'Scalars':
    """For the number of the update, at least 1."""
    b1, b2, eps, t = (jnp.asarray(x, dtype) for x in (b1, b2, eps, t))
    return cls(b1, b2, eps, 1 / (1 - b1**t), 1 / (1 - b2**t))


class Coded(NamedTuple):
  """Both moments in blocks."""

  mu: jax.Array  # (..., B), uint8.
  mu_scale: jax.Array  # (...).
  nu: jax.Array  # (..., B), uint8.
  nu_scale: jax.Array  # (...).


class Settings(NamedTuple):
  """How moments are coded; static."""

  mu: blockwise.Codebook = blockwise.SIGNED
  nu: blockwise.Codebook = blockwise.UNSIGNED
  keep_sign: bool = True  # No first moment below 0 becomes 0.
  floor: bool = True  # No second moment above 0 does.


def advance(
  grad: jax.Array, coded: Coded, k: Scalars, settings: Settings
) -> tuple[jax.Array, jax.Array]:
  """Both moments after a gradient.

  Args:
    grad: (..., B), of the dtype of the scales.
    coded: Before it.
    k: Of this update, in that dtype.
    settings: Static.

  Returns:
    First and second moment, (..., B); 0 where the gradient is not finite, or
    its square is not.
  """
  mu = blockwise.decode_blocks(coded.mu, coded.mu_scale, settings.mu)
  nu = blockwise.decode_blocks(coded.nu, coded.nu_scale, settings.nu)
  return move(grad, mu, nu, k)


def move(
  grad: jax.Array, mu: jax.Array, nu: jax.Array, k: Scalars
) -> tuple[jax.Array, jax.Array]:
  """The same for moments that are decoded."""
  square = grad * grad
  finite = square < jnp.inf
  zero = jnp.zeros_like(grad)
  mu = jnp.where(finite, k.b1 * mu + (1 - k.b1) * grad, zero)
  nu = jnp.where(finite, k.b2 * nu + (1 - k.b2) * square, zero)
  return mu, nu


def direction(mu: jax.Array, nu: jax.Array, k: Scalars) -> jax.Array:
  """The update before the learning rate, from the fresh moments."""
  return k.scale1 * mu / (jnp.sqrt(k.scale2 * nu) + k.eps)


def encode(
  mu: jax.Array,
  nu: jax.Array,
  scales: tuple[jax.Array, jax.Array],
  settings: Settings,
  key: jax.Array | None = None,
) -> Coded:
  """Codes of both moments (..., B) with scales (...)."""
  keys = (None, None) if key is None else jax.random.split(key)
  code = lambda x, scale, book, keep, key: blockwise.encode_blocks(
    x, scale, book, keep_sign=keep, key=key
  )
  return Coded(
    code(mu, scales[0], settings.mu, settings.keep_sign, keys[0]),
    scales[0],
    code(nu, scales[1], settings.nu, settings.floor, keys[1]),
    scales[1],
  )


def step(
  grad: jax.Array,
  coded: Coded,
  k: Scalars,
  settings: Settings,
  key: jax.Array | None = None,
) -> tuple[jax.Array, Coded]:
  """One step on blocks.

  Args:
    grad: (..., B), of the dtype of the scales.
    coded: Before it.
    k: Of this update, in that dtype.
    settings: Static.
    key: Of the draws for stochastic rounding, or None.

  Returns:
    The update (..., B) from the moments as they are before they are coded,
    and these in codes.
  """
  mu, nu = advance(grad, coded, k, settings)
  scales = blockwise.scale_of(mu), blockwise.scale_of(nu)
  return direction(mu, nu, k), encode(mu, nu, scales, settings, key)


def step_32(
  grad: jax.Array, mu: jax.Array, nu: jax.Array, k: Scalars
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One step on moments as they are, of at least float32.

  Args:
    grad: Of any shape, of real floats.
    mu: First moment, of that shape.
    nu: Second moment, the same.
    k: Of this update, in the dtype of the moments.

  Returns:
    The update, in the dtype of `grad`, and both moments.
  """
  mu, nu = move(grad.astype(mu.dtype), mu, nu, k)
  return direction(mu, nu, k).astype(grad.dtype), mu, nu
