"""Blocks that travel over the devices while the data stay."""

from emc2.ring.redistribute import draw_order, redistribute
from emc2.ring.rotate import rotate

__all__ = ['draw_order', 'redistribute', 'rotate']
