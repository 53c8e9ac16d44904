"""One step of 8-bit Adam on a leaf."""

import functools

import jax
import numpy as np

from emc2.compression import blockwise
from emc2.kernels import lowering
from emc2.kernels.adam_8bit import blocked, pallas_tpu, reference


def step(
  grad: jax.Array,
  mu: blockwise.Quantized,
  nu: blockwise.Quantized,
  k: reference.Scalars,
  *,
  keep_sign: bool = True,
  floor: bool = True,
  key: jax.Array | None = None,
  implementation: str = 'auto',
) -> tuple[jax.Array, blockwise.Quantized, blockwise.Quantized]:
  r"""Decodes the moments, moves them, makes the update and codes them again.

  .. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
    v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
    u = \frac{m / (1 - \beta_1^t)}
      {\sqrt{v / (1 - \beta_2^t)} + \varepsilon}

  with :math:`m, v` as they are before they are coded. Where :math:`g` or its
  square is not finite, all three become 0.

  Args:
    grad: Of any shape, of real floats.
    mu: From :func:`emc2.compression.blockwise.quantize` or `zeros_like`, for an
      array like `grad`: :math:`m`.
    nu: The same, in blocks of that size, :math:`v`.
    k: Of this update, in the dtype of the scales.
    keep_sign: Static; no first moment below 0 becomes 0.
    floor: Static; no second moment above 0 becomes 0.
    key: Of the draws for stochastic rounding; None rounds to the nearest.
    implementation: Static; 'auto' takes 'blocked' on a CPU and 'pallas_tpu' on
      a TPU for leaves that they take, where a leaf cannot be split over
      devices: there is one device, or the program is that of one device in
      :func:`jax.shard_map`. Else 'xla', which alone takes a key.

  Returns:
    The update, of the shape and dtype of `grad`, and both moments in codes.

  Raises:
    ValueError: If `implementation` is unknown.
    NotImplementedError: If it does not take this leaf.
  """
  wide = grad.astype(mu.absmax.dtype)
  settings = reference.Settings(mu.codebook, nu.codebook, keep_sign, floor)
  coded = reference.Coded(
    blockwise.codes_in_blocks(mu),
    mu.absmax,
    blockwise.codes_in_blocks(nu),
    nu.absmax,
  )
  reason = 'want no key.' if key is not None else None
  kernels = {
    'blocked': lowering.Kernel(
      'cpu',
      functools.partial(_in_rows, blocked.step, settings),
      reason or blocked.unsupported(wide, coded),
    ),
    'pallas_tpu': lowering.Kernel(
      'tpu',
      functools.partial(pallas_tpu.step, settings=settings),
      reason or pallas_tpu.unsupported(wide, coded, settings),
    ),
  }
  if implementation == 'auto' and (key is not None or not lowering.is_whole()):
    implementation = 'xla'

  def plain(grad, coded, k):
    blocks = blockwise.to_blocks(grad, mu.block_size)
    update, coded = reference.step(blocks, coded, k, settings, key)
    return blockwise.from_blocks(update, grad.shape), coded

  update, coded = lowering.dispatch(
    implementation, plain, kernels, wide, coded, k
  )
  keep = lambda codes, scale, old: blockwise.Quantized(
    codes.reshape(old.codes.shape), scale, old.codebook
  )
  return (
    update.astype(grad.dtype),
    keep(coded.mu, coded.mu_scale, mu),
    keep(coded.nu, coded.nu_scale, nu),
  )


def _in_rows(run, settings, grad, coded, k):
  """Runs what takes flat gradients (n,) and blocks in rows (m, B)."""
  width = coded.mu.shape[-1]
  flat = jax.tree.map(
    lambda x: x.reshape(-1, width) if x.dtype == np.uint8 else x.reshape(-1),
    coded,
  )
  update, after = run(grad.reshape(-1), flat, k, settings)
  after = jax.tree.map(lambda x, y: x.reshape(y.shape), after, coded)
  return update.reshape(grad.shape), after
