"""Lossy codes for gradients, and the memories of what they lose."""

from emc2.compression.compressor import (
  Compressor,
  Reduced,
  reduce,
  wire_bits,
)

__all__ = ['Compressor', 'Reduced', 'reduce', 'wire_bits']
