"""Codes of a few bits, packed into words."""

from emc2.kernels.bit_planes.api import num_words, pack, unpack

__all__ = ['num_words', 'pack', 'unpack']
