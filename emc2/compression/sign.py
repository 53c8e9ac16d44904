"""Codes of one bit for an entry: the sign, with a scale or with a vote."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import arguments
from emc2.compression import collectives, compressor
from emc2.kernels import bit_planes


class Signs(NamedTuple):
  """A payload of signs.

  Attributes:
    planes: uint32 (1, ceil(d / 32)): bit 1 where an entry is >= 0.
    scale: (), dtype of the array: the magnitude of all entries.
  """

  planes: jax.Array
  scale: jax.Array


def scaled_sign(*, norm: int | float = 1) -> compressor.Compressor:
  """Sends the sign of every entry and one magnitude for all.

  Q(x) = (|x|_m / d) sign(x), with sign(0) = +1. Deterministic; for m = 1 the
  magnitude is the mean one, and |x - Q(x)|^2 = |x|^2 - |x|_1^2 / d exactly.

  Args:
    norm: m, at least 1; the best is 1.

  Returns:
    A code with d + 32 bits and delta = 1 / d for m <= 2, the least value of
    |x|_1^2 / (d |x|_2^2), and d^(2 / m - 2) for m >= 2.

  Raises:
    ValueError: If `norm` is below 1 or not finite.

  References:
    Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes, 2019, https://arxiv.org/abs/1901.09847
  """
  arguments.check_at_least('norm', norm, 1)

  def compress(state, x, key):
    del key
    flat = x.reshape(-1)
    return Signs(_pack(flat), _norm(flat, norm) / flat.size), state

  def decompress(state, payload, like):
    del state
    bits = bit_planes.unpack(payload.planes, math.prod(like.shape))
    flat = jnp.where(bits > 0, payload.scale, -payload.scale)
    return flat.reshape(like.shape)

  return compressor.Compressor(
    name='sign' if norm == 1 else f'sign, {norm}-norm',
    compress=compress,
    decompress=decompress,
    bits=lambda shape: math.prod(shape) + 32,
    delta=lambda shape: math.prod(shape) ** (min(2 / norm, 1) - 2),
  )


def majority_vote(num_workers: int | None = None) -> compressor.Compressor:
  """Sends the sign of every entry and takes the sign that most workers sent.

  The mean that workers get is sign(sum_i sign(x_i)): +1, -1, or 0 where votes
  are equal; the sign of one worker's 0 is +1. It knows no scale, so no memory
  of what it loses is bounded: apply it to a momentum, without error feedback.

  Args:
    num_workers: If given, votes are added as integers of 8 bits or more, which
      costs the same for any number of workers up to this one; by default each
      worker gathers the bits of all, which moves less up to 16 workers.

  Returns:
    A code with no delta, of d bits; d (1 + ceil(log2(num_workers + 1))) when
    votes are added.

  Raises:
    ValueError: If `num_workers` is below 1; by `reduce`, if there are more.

  References:
    Bernstein et al., signSGD with Majority Vote, 2018,
    https://arxiv.org/abs/1810.05291
  """
  arguments.check_at_least('num_workers', num_workers, 1)
  adds = num_workers is not None

  def compress(state, x, key):
    del key
    flat = x.reshape(-1)
    if adds:
      return jnp.where(flat >= 0, 1, -1).astype(integer(num_workers)), state
    return _pack(flat), state

  def decompress(state, payload, like):
    del state
    if not adds:
      bits = bit_planes.unpack(payload, math.prod(like.shape))
      payload = jnp.where(bits > 0, 1, -1)
    return payload.astype(like.dtype).reshape(like.shape)

  def reduce(states, xs, keys, axis_name):
    coded = [compress(*one)[0] for one in zip(states, xs, keys, strict=True)]
    sent = [decompress(*one) for one in zip(states, coded, xs, strict=True)]
    if axis_name is None:
      return compressor.Reduced(sent, sent, list(states))
    workers = jax.lax.axis_size(axis_name)
    if adds:
      check_workers(workers, num_workers)
      totals = collectives.total(coded, axis_name)
    else:
      gathered = collectives.gather(coded, axis_name)
      totals = [
        _balance(planes, x.size) for planes, x in zip(gathered, xs, strict=True)
      ]
    mean = [
      jnp.sign(total).astype(x.dtype).reshape(x.shape)
      for total, x in zip(totals, xs, strict=True)
    ]
    return compressor.Reduced(sent, mean, list(states))

  width = 1 + num_workers.bit_length() if adds else 1
  return compressor.Compressor(
    name='majority vote',
    compress=compress,
    decompress=decompress,
    bits=lambda shape: math.prod(shape) * width,
    allreducible=adds,
    reduce=reduce,
  )


def integer(largest: int) -> jnp.dtype:
  """The narrowest signed type that holds -largest to largest."""
  for dtype in (jnp.int8, jnp.int16, jnp.int32):
    if largest <= jnp.iinfo(dtype).max:
      return jnp.dtype(dtype)
  raise ValueError(f'sums must stay below 2^31, got {largest}.')


def check_workers(workers: int, num_workers: int) -> None:
  """Refuses more workers than the integers that travel have room for."""
  if workers > num_workers:
    raise ValueError(
      f'num_workers must be at least the {workers} of the axis, got '
      f'{num_workers}.'
    )


def _pack(flat: jax.Array) -> jax.Array:
  """One plane of signs, sign(0) = +1."""
  return bit_planes.pack(flat >= 0, 1)


def _norm(flat: jax.Array, order: int | float) -> jax.Array:
  """The norm of any order from 1 on, whose powers may leave the range."""
  sizes = jnp.abs(flat)
  if order == 1:
    return jnp.sum(sizes)
  top = jnp.max(sizes)
  safe = jnp.where(top > 0, top, 1)
  return top * jnp.sum((sizes / safe) ** order) ** (1 / order)


def _balance(planes: jax.Array, size: int) -> jax.Array:
  """Votes for + less votes for -, of planes (workers, 1, words)."""
  votes = lambda i: bit_planes.unpack(planes[i], size).astype(jnp.int32)
  add = lambda i, total: total + votes(i)
  ones = jax.lax.fori_loop(1, planes.shape[0], add, votes(0))
  return 2 * ones - planes.shape[0]
