"""The MADA update of one leaf and its derivatives, entry by entry."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Where the root of the second moment is less, its derivative counts as 0.
SMALLEST_ROOT = 1e-12


class Moments(NamedTuple):
  """What one leaf carries, each of its shape; None where never needed."""

  mu: jax.Array  # m: mean of the gradients.
  nu: jax.Array  # v: mean of their squares.
  nu_bar: jax.Array  # v-bar: mean of all v so far, or their maximum.
  delta: jax.Array | None  # n: mean of the differences; None is beta3 = 0.
  previous: jax.Array | None  # The gradient before the last; with `delta`.
  lion: jax.Array | None  # l: the momentum of Lion; None is gamma = 1.


class Settings(NamedTuple):
  """Which member of the family; static."""

  maximum: bool = False  # nu_bar is the maximum, not the mean.
  released_lion: bool = False  # The sign is of the momentum after its step.
  released_init: bool = False  # The first difference is the first gradient.
  through_mean: bool = False  # Derivatives flow through the mean as well.


class Constants(NamedTuple):
  """What no step changes, each () or a number."""

  eps: jax.typing.ArrayLike = 1e-6
  lion_b1: jax.typing.ArrayLike = 0.95
  lion_b2: jax.typing.ArrayLike = 0.98


class Scalars(NamedTuple):
  """The coefficients of update `t` and what follows from them, each ()."""

  eps: jax.Array
  lion_b1: jax.Array
  lion_b2: jax.Array

  b1: jax.Array
  b2: jax.Array
  b3: jax.Array
  rho: jax.Array
  c: jax.Array
  gamma: jax.Array
  first: jax.Array  # 1 at t = 1, else 0.
  share: jax.Array  # 1 / t: of the newest v in its mean.
  memory2: jax.Array  # 1 / (1 - beta2): steps that v remembers.
  scale1: jax.Array  # 1 / (1 - beta1^t).
  scale2: jax.Array  # 1 / (1 - beta2^t).
  slope1: jax.Array  # d scale1 / d beta1.
  slope2: jax.Array  # d log scale2 / d beta2.

  @classmethod
  def of(
    cls, coefficients: jax.Array, t: jax.Array, constants: Constants
  ) -> 'Scalars':
    """For coefficients (6,) and the number of the update, at least 1."""
    dtype = coefficients.dtype
    b1, b2, b3, rho, c, gamma = coefficients
    t = t.astype(dtype)
    left1, left2 = 1 - b1**t, 1 - b2**t
    return cls(
      *(jnp.asarray(x, dtype) for x in constants),
      *(b1, b2, b3, rho, c, gamma),
      first=(t == 1).astype(dtype),
      share=1 / t,
      memory2=1 / (1 - b2),
      scale1=1 / left1,
      scale2=1 / left2,
      slope1=t * b1 ** (t - 1) / left1**2,
      slope2=t * b2 ** (t - 1) / left2,
    )

  def astype(self, dtype: jax.typing.DTypeLike) -> 'Scalars':
    """The same in another dtype."""
    return Scalars(*(x.astype(dtype) for x in self))


class _Target(NamedTuple):
  """What the second moment follows."""

  delta: jax.Array | None  # n before the gradient.
  difference: jax.Array | None  # d: to the gradient before.
  corrected: jax.Array  # The gradient, moved on by its difference.
  side: jax.Array  # Sign of its square less v.
  move: jax.Array  # Of v.


def sign(x: jax.Array) -> jax.Array:
  """-1, 0 or 1, in a form that XLA vectorises on CPUs."""
  return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


def advance(
  moments: Moments, grad: jax.Array, k: Scalars, settings: Settings
) -> Moments:
  """The moments after one more gradient.

  Args:
    moments: Before, of one leaf.
    grad: Of the same shape and dtype.
    k: Of this update, in the dtype of the leaf.
    settings: As they are.

  Returns:
    Moments whose `previous` is `grad`.
  """
  target = _target(moments, grad, k, settings)
  nu = moments.nu + target.move
  if settings.maximum:
    nu_bar = jnp.maximum(moments.nu_bar, nu)
  else:
    nu_bar = moments.nu_bar + k.share * (nu - moments.nu_bar)
  delta, lion = target.delta, moments.lion
  if delta is not None:
    delta = k.b3 * delta + (1 - k.b3) * target.difference
  if lion is not None:
    lion = k.lion_b2 * lion + (1 - k.lion_b2) * grad
  return Moments(
    mu=k.b1 * moments.mu + (1 - k.b1) * grad,
    nu=nu,
    nu_bar=nu_bar,
    delta=delta,
    previous=None if moments.previous is None else grad,
    lion=lion,
  )


def direction(
  moments: Moments, grad: jax.Array, k: Scalars, settings: Settings
) -> jax.Array:
  """The update before the learning rate, u.

  Args:
    moments: Before `grad`.
    grad: Of the same shape and dtype.
    k: Of this update, in the dtype of the leaf.
    settings: As they are.

  Returns:
    Of the shape and dtype of `grad`.
  """
  after = advance(moments, grad, k, settings)
  adaptive = _numerator(after, k) / (_root(after, k) + k.eps)
  if moments.lion is None:
    return adaptive
  side = _lion(moments, after, grad, k, settings)
  return k.gamma * adaptive + (1 - k.gamma) * side


def derivatives(
  moments: Moments,
  after: Moments,
  grad: jax.Array,
  k: Scalars,
  settings: Settings,
  along: jax.typing.ArrayLike = 1.0,
) -> tuple[jax.Array | None, ...]:
  """Of :func:`direction` in each coefficient, entry by entry.

  Args:
    moments: Before `grad`.
    after: What :func:`advance` makes of them.
    grad: Of the same shape and dtype.
    k: Of this update, in the dtype of the leaf.
    settings: As they are.
    along: What the derivatives are multiplied by.

  Returns:
    Six arrays of the shape of `grad`, in the order of the coefficients; None
    for one that the moments fix.
  """
  target = _target(moments, grad, k, settings)
  root, top = _root(after, k), _numerator(after, k)
  bottom = root + k.eps
  # The adaptive part over its numerator, and its derivative in the corrected
  # second moment; a root that has no inverse makes that 0.
  pull = along / bottom
  safe = jnp.where(root < SMALLEST_ROOT, jnp.inf, root)
  bend = pull * top / (bottom * safe)
  bent = -k.gamma * k.scale2 / 2
  rho = k.rho + (1 - k.rho) * k.share if settings.through_mean else k.rho
  inside = bent * rho * (1 - k.b2)
  square = jnp.square(target.corrected)
  b3 = gamma = None
  if moments.delta is not None:
    d = target.difference
    spread = target.corrected * d * (k.c + (1 - k.c) * target.side)
    b3 = k.gamma * pull * (after.delta + k.b3 * (target.delta - d))
    b3 = b3 + 2 * inside * bend * spread
  if moments.lion is not None:
    gamma = pull * top - along * _lion(moments, after, grad, k, settings)
  mean = k.scale1 * (moments.mu - grad) + k.slope1 * after.mu
  # From the root: the second moment that it was taken of, before its scale.
  mixed = jnp.square(root) / k.scale2
  return (
    k.gamma * pull * mean,
    bent * bend * (k.slope2 * mixed - rho * k.memory2 * target.move),
    b3,
    bent * bend * (after.nu - after.nu_bar),
    inside * bend * (square - moments.nu - square * target.side),
    gamma,
  )


def exchange(
  moments: Moments,
  grad: jax.Array,
  new_grad: jax.Array,
  hyper_grad: jax.Array | None,
  k: Scalars,
  settings: Settings,
) -> tuple[Moments, jax.Array, jax.Array]:
  """Takes in a gradient, keeps another, and projects on the derivatives.

  Args:
    moments: Before `grad`.
    grad: Of the last update.
    new_grad: What takes the place of `grad`.
    hyper_grad: The gradient after the last update; None for `new_grad`.
    k: Of the last update, in the dtype of the leaf.
    settings: As they are.

  Returns:
    The moments after `grad`, `new_grad`, and the inner products (6,) of
    `hyper_grad` with :func:`derivatives`; 0 for one that the moments fix.
  """
  along = new_grad if hyper_grad is None else hyper_grad
  after, slopes = advance_along(moments, grad, along, k, settings)
  return after, new_grad, jnp.stack([jnp.sum(slope) for slope in slopes])


def advance_along(
  moments: Moments,
  grad: jax.Array,
  along: jax.Array,
  k: Scalars,
  settings: Settings,
) -> tuple[Moments, tuple[jax.Array, ...]]:
  """The moments after `grad`, and all six slopes times `along`.

  Args:
    moments: Before `grad`.
    grad: Of the last update.
    along: The gradient after it.
    k: Of the last update, in the dtype of the leaf.
    settings: As they are.

  Returns:
    The moments, and the terms of the inner products that :func:`exchange`
    returns; 0 for a coefficient that the moments fix.
  """
  after = advance(moments, grad, k, settings)
  slopes = derivatives(moments, after, grad, k, settings, along)
  zero = jnp.zeros_like(along)
  return after, tuple(zero if slope is None else slope for slope in slopes)


def _target(moments, grad, k, settings):
  delta, difference, corrected = moments.delta, None, grad
  if delta is not None:
    difference = grad - moments.previous
    if settings.released_init:
      delta = delta + k.first * jnp.square(grad)
    else:
      difference = (1 - k.first) * difference
    corrected = grad + k.b3 * difference
  square = jnp.square(corrected)
  side = sign(square - moments.nu)
  value = k.c * square + (1 - k.c) * (moments.nu + square * side)
  # A quotient, for XLA keeps one where a product is made anew by each reader.
  move = (value - moments.nu) / k.memory2
  return _Target(delta, difference, corrected, side, move)


def _numerator(after, k):
  mean = k.scale1 * after.mu
  return mean if after.delta is None else mean + k.b3 * after.delta


def _root(after, k):
  mixed = k.rho * after.nu + (1 - k.rho) * after.nu_bar
  return jnp.sqrt(k.scale2 * mixed)


def _lion(moments, after, grad, k, settings):
  momentum = after.lion if settings.released_lion else moments.lion
  return sign(k.lion_b1 * momentum + (1 - k.lion_b1) * grad)
