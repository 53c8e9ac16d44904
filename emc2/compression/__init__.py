"""Lossy codes for gradients, and the memories of what they lose."""

from emc2.compression import (
  blockwise,
  compose,
  identity,
  low_rank,
  memories,
  quantize,
  sign,
  sketch,
  sparse,
)
from emc2.compression.compressor import (
  Compressor,
  Reduced,
  reduce,
  wire_bits,
)
from emc2.compression.memories import Memory

__all__ = [
  'Compressor',
  'Memory',
  'Reduced',
  'blockwise',
  'compose',
  'identity',
  'low_rank',
  'memories',
  'quantize',
  'reduce',
  'sign',
  'sketch',
  'sparse',
  'wire_bits',
]
