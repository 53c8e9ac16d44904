"""No compression: what every other code is measured against."""

import math

from emc2.compression import compressor


def identity() -> compressor.Compressor:
  """Sends an array as it is.

  Returns:
    A code with delta = 1, omega = 0 and 32 d bits.
  """
  return compressor.Compressor(
    name='identity',
    compress=lambda state, x, key: (x, state),
    decompress=lambda state, payload, like: payload,
    bits=lambda shape: 32 * math.prod(shape),
    delta=lambda shape: 1.0,
    omega=lambda shape: 0.0,
    unbiased=True,
    allreducible=True,
  )
