"""Lossy codes for gradients, and the memories of what they lose."""

from emc2.compression.compressor import (
  Compressor,
  Reduced,
  reduce,
  wire_bits,
)
from emc2.compression.memories import Memory

__all__ = ['Compressor', 'Memory', 'Reduced', 'reduce', 'wire_bits']
