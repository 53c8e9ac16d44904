"""Blocks that travel over the devices while the data stay."""

from emc2.ring import processes, schedules, simulate, threads
from emc2.ring.executors import on_mesh, replay, run, serial, virtual
from emc2.ring.redistribute import draw_order, redistribute
from emc2.ring.rotate import Rotation, rotate

__all__ = [
  'Rotation',
  'draw_order',
  'on_mesh',
  'processes',
  'redistribute',
  'replay',
  'rotate',
  'run',
  'schedules',
  'serial',
  'simulate',
  'threads',
  'virtual',
]
