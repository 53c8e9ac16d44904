"""What experiments on a ring of workers draw."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from emc2.experiments import ring_costs

COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
"""Of Okabe and Ito, which differ for the colour-blind too."""

GRAY = '#66707A'


class Curve(NamedTuple):
  """How a run went."""

  passes: np.ndarray  # (n,).
  seconds: np.ndarray  # (n,), of its passes alone.
  objective: np.ndarray  # (n,).
  score: np.ndarray  # (n,), on test rows.


def draw(
  curves: Mapping[int, Curve],
  measured: Mapping[int, float],
  speed_ups: Mapping[str, ring_costs.SpeedUp],
  memory: Mapping[int, ring_costs.Memory],
  *,
  objective: str,
  score: str,
  best: float | None = None,
  title: str,
  shared: bool = True,
) -> Any:
  """Draws how runs went, how they would scale, and what workers hold.

  Args:
    curves: By the number of workers.
    measured: Speed-up of as many devices over one.
    speed_ups: Simulated, by what is named.
    memory: By the number of workers.
    objective: Label of the objective.
    score: Label of the score on test rows.
    best: The least objective, if it is known; gaps to it are drawn.
    title: What was fitted.
    shared: Whether all workers shared one device.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure  # A second to import; most calls end before.

  drawn = figure.Figure(figsize=(15, 8), layout='constrained')
  drawn.suptitle(title, fontsize=12)
  grid = drawn.subplots(2, 3, sharey=False)
  seconds = 'seconds of passes' + ', on one shared device' * shared
  for row, field, label in ((0, 'objective', objective), (1, 'score', score)):
    for column, against in enumerate(('passes', 'seconds')):
      axis = grid[row, column]
      draw_curves(axis, curves, against, field, best)
      axis.set_xlabel(against if column == 0 else seconds)
    grid[row, 0].set_ylabel(label)
  handles, labels = grid[0, 0].get_legend_handles_labels()
  grid[0, 0].legend(
    handles, labels, frameon=False, title='virtual ' * shared + 'workers'
  )
  draw_speed_ups(grid[0, 2], measured, speed_ups)
  draw_memory(grid[1, 2], memory)
  return drawn


def draw_curves(
  axis: Any,
  curves: Mapping[int, Curve],
  against: str,
  field: str,
  best: float | None,
) -> None:
  """Draws one field of the curves against another."""
  is_gap = field == 'objective' and best is not None
  for number, (workers, curve) in enumerate(curves.items()):
    x, y = getattr(curve, against)[1:], getattr(curve, field)[1:]
    axis.plot(
      x,
      y - best if is_gap else y,
      ('-', '--', '-.', ':')[number % 4],
      label=f'P = {workers}',
      color=COLORS[number % len(COLORS)],
      linewidth=1.8,
      marker='.',
      markersize=5,
    )
  axis.set_xscale('log')
  axis.xaxis.set_major_formatter('{x:g}')
  if is_gap:
    axis.set_yscale('log')
  _tidy(axis)


def draw_speed_ups(
  axis: Any,
  measured: Mapping[int, float],
  speed_ups: Mapping[str, ring_costs.SpeedUp],
) -> None:
  """Draws speed-ups against numbers of workers, both logarithmic."""
  most = max([max(x.workers) for x in speed_ups.values()] + list(measured))
  axis.plot([1, most], [1, most], color=GRAY, linewidth=0.8, label='linear')
  for number, (name, found) in enumerate(speed_ups.items()):
    color = COLORS[number % len(COLORS)]
    axis.plot(found.workers, found.ring, '-', color=color, label=name)
    axis.plot(found.workers, found.bulk, ':', color=color)
  axis.plot([], [], ':', color=GRAY, label='the same, bulk-synchronous')
  axis.plot(
    list(measured),
    list(measured.values()),
    'o',
    color='black',
    markersize=5,
    label='measured, devices of this machine',
  )
  axis.set_xscale('log', base=8)
  axis.set_yscale('log', base=8)
  axis.xaxis.set_major_formatter('{x:g}')
  axis.yaxis.set_major_formatter('{x:g}')
  axis.set_ylim(min(0.5, *measured.values()) / 1.5, 1.5 * most)
  axis.set_xlabel('workers (lines are simulated)')
  axis.set_ylabel('speed-up over one worker')
  axis.legend(frameon=False, fontsize=8)
  _tidy(axis)


def draw_memory(axis: Any, memory: Mapping[int, ring_costs.Memory]) -> None:
  """Draws the bytes of a worker against the number of workers."""
  workers = np.array(list(memory))
  for field, color, label in (
    ('rows', COLORS[0], 'rows, which stay'),
    ('blocks', COLORS[1], 'blocks, which travel'),
  ):
    values = np.array([getattr(found, field) for found in memory.values()])
    axis.plot(workers, values / 2**20, 'o-', color=color, label=label)
    axis.plot(
      workers,
      values[0] * workers[0] / workers / 2**20,
      color=GRAY,
      linewidth=0.8,
      linestyle='--',
      zorder=1,
    )
  axis.plot([], [], '--', color=GRAY, linewidth=0.8, label='1 / P exactly')
  axis.set_xscale('log', base=2)
  axis.set_yscale('log')
  axis.xaxis.set_major_formatter('{x:g}')
  axis.yaxis.set_major_formatter('{x:g}')
  axis.set_xlabel('workers')
  axis.set_ylabel('MiB of one worker')
  axis.legend(frameon=False, fontsize=9)
  _tidy(axis)


def _tidy(axis):
  axis.grid(alpha=0.25, which='major', linewidth=0.5)
  axis.spines[['top', 'right']].set_visible(False)
