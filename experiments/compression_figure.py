"""What :mod:`emc2.experiments.compression` draws."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLORS = (
  '#000000',
  '#8C8C8C',
  '#5B5B5B',
  '#E69F00',
  '#C8A400',
  '#8A6D00',
  '#56B4E9',
  '#9CD3F2',
  '#0072B2',
  '#003C71',
  '#6A5ACD',
  '#A99BEF',
  '#CC79A7',
  '#8E3B6B',
  '#D55E00',
  '#009E73',
)
"""One for each code in turn; kinds of codes are of one hue."""

MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
"""One for each memory in turn."""

Log = Mapping[str, Any]
"""Steps (m,) and values (m, seeds) by name, and numbers by name."""


class Panel(NamedTuple):
  """A problem."""

  title: str
  logs: Mapping[tuple[str, str], Log]  # By code and memory.


def ends(log: Log, name: str) -> np.ndarray:
  """The last values of each seed, (seeds,); the first where it diverged."""
  values = log[name][1]
  return np.where(log['diverged'], values[0], values[-1])


def draw(
  panels: Sequence[Panel], codes: Sequence[str], memories: Sequence[str]
) -> Any:
  """Draws a column for each problem: against bits, memory, and on the way.

  Args:
    panels: At least one.
    codes: All names, in order.
    memories: Likewise.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure, lines  # A second to import.

  color = dict(zip(codes, COLORS, strict=True))
  marker = dict(zip(memories, MARKERS, strict=True))
  columns = len(panels)
  drawn = figure.Figure(figsize=(2.4 + 5.4 * columns, 13), layout='constrained')
  axes = drawn.subplots(3, columns, squeeze=False)
  used = [cell for panel in panels for cell in panel.logs]
  for column, panel in zip(axes.T, panels, strict=True):
    draw_bits(column[0], panel, color, marker)
    draw_memory(column[1], panel, color, marker)
    draw_way(column[2], panel, color)
  drawn_codes = [name for name in codes if name in {code for code, _ in used}]
  drawn_memories = [name for name in memories if name in {m for _, m in used}]
  axes[0, -1].legend(
    handles=[
      lines.Line2D([], [], color=color[name], lw=3, label=name)
      for name in drawn_codes
    ],
    title='code',
    **_OUTSIDE,
  )
  axes[1, -1].legend(
    handles=[
      lines.Line2D(
        [], [], ls='', marker=marker[name], ms=7, color='#606060', label=name
      )
      for name in drawn_memories
    ],
    title='memory',
    **_OUTSIDE,
  )
  return drawn


_OUTSIDE = dict(
  loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10
)


def draw_bits(axis: Any, panel: Panel, color: Any, marker: Any) -> None:
  """Draws the validation loss at the end against bits, with ranges of seeds."""
  for (code, memory), log in panel.logs.items():
    _draw_end(axis, log, log['bits'] / 8e3, color[code], marker[memory])
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='kB that a worker sends in a step',
    ylabel='validation loss at the end',
  )
  axis.set_title(panel.title, fontsize=11)
  _finish(axis)


def draw_memory(axis: Any, panel: Panel, color: Any, marker: Any) -> None:
  """Draws the same against bytes of memory; lines join memories of a code."""
  codes = {code for code, _ in panel.logs}
  for code in sorted(codes):
    logs = {m: log for (c, m), log in panel.logs.items() if c == code}
    if len(logs) < 2:
      continue
    line = sorted(
      (log['memory_bytes'] / 1e3, float(np.mean(ends(log, 'validation_loss'))))
      for log in logs.values()
    )
    axis.plot(*zip(*line, strict=True), color=color[code], lw=1.0, alpha=0.5)
    for memory, log in logs.items():
      kilobytes = log['memory_bytes'] / 1e3
      _draw_end(axis, log, kilobytes, color[code], marker[memory])
  axis.set(
    yscale='log',
    xlabel="kB of a worker's memory",
    ylabel='validation loss at the end',
  )
  axis.set_title('Codes that come with several memories', fontsize=10)
  _finish(axis)


def draw_way(axis: Any, panel: Panel, color: Any) -> None:
  """Draws the validation loss against what was sent; bands hold all seeds."""
  for code in dict.fromkeys(code for code, _ in panel.logs):
    memories = [m for c, m in panel.logs if c == code]
    memory = 'full' if 'full' in memories else memories[0]
    log = panel.logs[code, memory]
    steps, losses = log['validation_loss']
    # Above its first loss a run is lost, wherever it goes.
    losses = np.where(losses <= losses[0], losses, losses[0])
    sent = steps[1:] * log['bits'] / 8e6
    axis.plot(sent, losses[1:].mean(axis=1), color=color[code], lw=1.8)
    axis.fill_between(
      sent,
      losses[1:].min(axis=1),
      losses[1:].max(axis=1),
      color=color[code],
      alpha=0.2,
      lw=0,
    )
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='MB that a worker has sent',
    ylabel='validation loss',
  )
  axis.set_title("With memory 'full' where there is one", fontsize=10)
  _finish(axis)


def _draw_end(axis, log, x, color, marker):
  losses = ends(log, 'validation_loss')
  middle = losses.mean()
  axis.errorbar(
    x,
    middle,
    yerr=[[middle - losses.min()], [losses.max() - middle]],
    color=color,
    marker=marker,
    ms=7,
    lw=1.2,
    capsize=2,
    mec='w',
    mew=0.6,
    zorder=3,
  )


def _finish(axis):
  from matplotlib import ticker

  axis.grid(alpha=0.3)
  axis.spines[['top', 'right']].set_visible(False)
  for side in (axis.xaxis, axis.yaxis):
    if side.get_scale() != 'log':
      continue
    low, high = side.get_view_interval()
    if high < 100 * low:  # Then decades alone would say too little.
      steps = (1.0, 2.0, 5.0) if high > 3 * low else np.arange(1.0, 10.0)
      side.set_major_locator(ticker.LogLocator(subs=steps))
      side.set_major_formatter(ticker.FormatStrFormatter('%g'))
    side.set_minor_formatter(ticker.NullFormatter())
