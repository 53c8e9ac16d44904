"""Codes of the entries that a sparse code keeps: levels or signs of them."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from emc2.compression import compressor, quantize, sign, sparse


def quantized(
  sparsifier: compressor.Compressor,
  levels: int,
  *,
  scaled: bool = True,
  beta_rule: str = 'min',
) -> compressor.Compressor:
  """Rounds the k entries that a sparse code keeps to levels of their norm.

  Q_s(y) / (1 + beta) on the support of y = Comp_k(x), with Q_s of
  :func:`quantize.qsgd` and beta its variance on k entries, not on d. Since
  E Q_s(y) = y is orthogonal to x - y,

    E|x - Q(y)|^2 = |x|^2 - 2 |y|^2 + E|Q(y)|^2 <= |x|^2 - (1 - beta) |y|^2,

  and after division by 1 + beta at most |x|^2 - |y|^2 / (1 + beta), which is
  never worse and contracts for every beta.

  Args:
    sparsifier: A code whose payload is :class:`sparse.Entries` and of which
      each worker draws its own: `top_k`, or `random_k(shared=False)`.
    levels: s, static, in [1, 2^23].
    scaled: Whether the result is divided by 1 + beta.
    beta_rule: 'min': beta = min(k / s^2, sqrt(k) / s); 'k_over_s2': k / s^2,
      as the authors' code has it.

  Returns:
    A code with delta = (k / d) / (1 + beta), or (1 - beta) k / d unscaled, and
    k (1 + ceil(log2(s + 1)) + ceil(log2 d)) + 32 bits. Unbiased if the
    sparsifier is and `scaled` is False.

  Raises:
    ValueError: If an argument is out of its range; by `init`, if an unscaled
      code of a biased sparsifier has beta >= 1, which is no contraction.

  References:
    Basu et al., Qsparse-local-SGD, 2019, Section 2,
    https://arxiv.org/abs/1906.02367
  """
  coder = quantize.qsgd(levels, scaled=scaled, beta_rule=beta_rule)
  code = composed(sparsifier, coder)
  if scaled or sparsifier.unbiased:
    return code

  def prepare(shape, dtype, key):
    kept = _kept(sparsifier, tuple(shape))
    beta = quantize.beta(beta_rule, kept, levels)
    if beta >= 1:
      raise ValueError(
        f'levels must make beta < 1 with scaled=False, got {levels} levels for '
        f'{kept} entries: beta = {beta:.3g}.'
      )
    return code.init(shape, dtype, key)

  return code._replace(init=prepare)


def signed(
  sparsifier: compressor.Compressor, *, norm: int | float = 1
) -> compressor.Compressor:
  """Keeps of the k entries that a sparse code keeps their signs and one scale.

  (|y|_m / k) sign(y) on the support of y = Comp_k(x), with sign(0) = +1. From
  |y|_m <= |y|_1,

    |x - C(x)|^2 = |x|^2 - 2 |y|_m |y|_1 / k + |y|_m^2 / k
                <= |x|^2 - |y|_m^2 / k,

  with equality for m = 1.

  Args:
    sparsifier: A code whose payload is :class:`sparse.Entries`, unscaled.
    norm: m, at least 1; the best is 1.

  Returns:
    A code with delta = k^(2 / m - 1) / d, but 1 / d for m <= 2, and
    k (1 + ceil(log2 d)) + 32 bits; k + 32 if all workers draw the same entries.

  Raises:
    ValueError: If `norm` is below 1 or not finite, or the sparsifier scales.

  References:
    Basu et al., Qsparse-local-SGD, 2019, Section 2,
    https://arxiv.org/abs/1906.02367
  """
  if sparsifier.unbiased:
    raise ValueError(
      f'sparsifier must keep entries as they are, got {sparsifier.name!r}.'
    )
  return composed(sparsifier, sign.scaled_sign(norm=norm))


def composed(
  sparsifier: compressor.Compressor, coder: compressor.Compressor
) -> compressor.Compressor:
  """Codes the k entries that a sparse code keeps by a second code.

  Args:
    sparsifier: A code whose payload is :class:`sparse.Entries`.
    coder: The code of the values (k,). It draws for each worker alone, or not
      at all.

  Returns:
    A code with delta the product of both; unbiased if both are, and then
    1 + omega is the product.

  Raises:
    ValueError: If the sparsifier draws for all workers and the coder for each.
  """
  if sparsifier.shared_key and not coder.shared_key:
    raise ValueError(
      'sparsifier must draw for each worker alone, as the coder does, e.g. '
      f'random_k(shared=False); got {sparsifier.name!r} and {coder.name!r}.'
    )
  unbiased = sparsifier.unbiased and coder.unbiased
  count = functools.cache(functools.partial(_kept, sparsifier))
  kept = lambda shape: (count(tuple(shape)),)

  def prepare(shape, dtype, key):
    of_choice, of_values = jax.random.split(key)
    return (
      sparsifier.init(shape, dtype, of_choice),
      coder.init(kept(shape), dtype, of_values),
    )

  def compress(state, x, key):
    of_choice, of_values = jax.random.split(key)
    entries, choice = sparsifier.compress(state[0], x, of_choice)
    values, coded = coder.compress(state[1], entries.values, of_values)
    return entries._replace(values=values), (choice, coded)

  def decoded(state, payload, like):
    like = jax.ShapeDtypeStruct(kept(like.shape), like.dtype)
    values = coder.decompress(state[1], payload.values, like)
    return payload._replace(values=values)

  def decompress(state, payload, like):
    return sparsifier.decompress(state[0], decoded(state, payload, like), like)

  def accumulate(state, payloads, like):
    each = jax.vmap(lambda payload: decoded(state, payload, like))(payloads)
    return sparsifier.accumulate(state[0], each, like)

  def bits(shape):
    of_values = 32 * kept(shape)[0]
    return sparsifier.bits(shape) - of_values + coder.bits(kept(shape))

  def delta(shape):
    if unbiased:
      return 1 - omega(shape) if omega(shape) <= 1 else None
    parts = sparsifier.delta(shape), coder.delta(kept(shape))
    # The product needs values as they are: of scaled ones, the error of the
    # code is no longer orthogonal to what was dropped.
    if sparsifier.unbiased or None in parts:
      return None
    return math.prod(parts)

  def omega(shape):
    if not unbiased:
      return None
    of_values = 1 + coder.omega(kept(shape))
    return (1 + sparsifier.omega(shape)) * of_values - 1

  return compressor.Compressor(
    name=f'{sparsifier.name}, {coder.name}',
    init=prepare,
    compress=compress,
    decompress=decompress,
    bits=bits,
    delta=delta,
    omega=omega,
    unbiased=unbiased,
    shared_key=sparsifier.shared_key,
    accumulate=accumulate if sparsifier.accumulate else None,
  )


def _kept(sparsifier: compressor.Compressor, shape: Sequence[int]) -> int:
  """How many entries of an array of a given shape a sparse code keeps."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def compress(x, key):
    state = sparsifier.init(x.shape, x.dtype, key)
    return sparsifier.compress(state, x, key)[0]

  payload = jax.eval_shape(compress, x, key)
  if not isinstance(payload, sparse.Entries):
    raise ValueError(
      f'sparsifier must send sparse.Entries, got {sparsifier.name!r}.'
    )
  return payload.values.size
