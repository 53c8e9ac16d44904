"""What :mod:`emc2.experiments.optimizer_search` draws."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLORS = {
  'adam': '#D55E00',
  'hyper_adam': '#56B4E9',
  'mada': '#0072B2',
  'avgrad': '#009E73',
  'amsgrad': '#000000',
  'yogi': '#E69F00',
  'adan': '#CC79A7',
  'lion': '#8C8C8C',
}
"""Of Okabe and Ito, which differ for the colour-blind too."""

COEFFICIENTS = {
  'b1': (r'$\beta_1$', '#0072B2'),
  'b2': (r'$\beta_2$', '#D55E00'),
  'b3': (r'$\beta_3$', '#009E73'),
  'rho': (r'$\rho$', '#CC79A7'),
  'c': (r'$c$', '#E69F00'),
  'gamma': (r'$\gamma$', '#000000'),
}

Log = Mapping[str, Any]
"""Steps (m,) and values (m, runs), or (m,) of one run, by name; of many runs
also which have diverged, (runs,)."""


class Trained(NamedTuple):
  """A problem on which there are many starts."""

  title: str
  logs: Mapping[str, Log]  # By optimiser.
  good: np.ndarray  # (runs,), bool: whether a run's start is.


class Reddi(NamedTuple):
  """Reddi's problem."""

  logs: Mapping[str, Log]  # By optimiser.


def cap(losses: np.ndarray) -> np.ndarray:
  """Losses (m, runs), those above the first of their run, or NaN, as that.

  Above its first loss a run is lost, wherever it goes.
  """
  return np.where(losses <= losses[0], losses, losses[0])


def draw(panels: Sequence[Trained | Reddi]) -> Any:
  """Draws a column for each problem: the ends, the way, the coefficients.

  Args:
    panels: At least one.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure, lines  # A second to import.

  columns = len(panels)
  drawn = figure.Figure(
    figsize=(1.6 + 4.9 * columns, 10.5), layout='constrained'
  )
  axes = drawn.subplots(3, columns, squeeze=False, height_ratios=(1.25, 1, 1))
  names = {}
  for column, panel in zip(axes.T, panels, strict=True):
    names |= dict.fromkeys(panel.logs)
    if isinstance(panel, Reddi):
      draw_reddi(column, panel)
    else:
      draw_ends(column[0], panel)
      draw_way(column[1], panel)
    draw_coefficients(column[2], panel.logs.get('mada'))
  curves = [
    lines.Line2D([], [], color=COLORS[name], lw=2, label=name) for name in names
  ]
  axes[1, -1].legend(handles=curves, **_OUTSIDE)
  dots = dict(ls='', marker='o', ms=6, color='#606060')
  kinds = [
    lines.Line2D([], [], label='bad start', **dots),
    lines.Line2D([], [], label='good start', mfc='w', **dots),
    lines.Line2D([], [], label='diverged', **(dots | {'marker': 'x'})),
    lines.Line2D([], [], color='k', lw=2, label='median'),
  ]
  if any(isinstance(panel, Trained) for panel in panels):
    axes[0, -1].legend(handles=kinds, **_OUTSIDE)
  paths = [
    lines.Line2D([], [], color=color, lw=2, label=label)
    for label, color in COEFFICIENTS.values()
  ]
  axes[2, -1].legend(handles=paths, **_OUTSIDE)
  return drawn


_OUTSIDE = dict(
  loc='center left', bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10
)


def draw_ends(axis: Any, panel: Trained) -> None:
  """Draws the final validation loss of each run, and the median of each."""
  rng = np.random.default_rng(0)
  shift = rng.uniform(-0.27, 0.27, panel.good.size)
  for i, (name, log) in enumerate(panel.logs.items()):
    color, diverged = COLORS[name], log['diverged']
    losses = cap(log['validation_loss'][1])[-1]
    for chosen, face in ((~panel.good, color), (panel.good, 'w')):
      dots = chosen & ~diverged
      axis.scatter(
        i + shift[dots], losses[dots], s=26, c=face, ec=color, lw=1.2, zorder=3
      )
    axis.scatter(
      i + shift[diverged], losses[diverged], s=40, marker='x', c=color, zorder=3
    )
    axis.hlines(np.median(losses), i - 0.4, i + 0.4, color='k', lw=2, zorder=4)
  axis.set_xticks(
    range(len(panel.logs)), list(panel.logs), rotation=40, ha='right'
  )
  axis.set(yscale='log', ylabel='validation loss at the end')
  axis.set_title(panel.title, fontsize=11)
  _finish(axis, axis.yaxis)


def draw_way(axis: Any, panel: Trained) -> None:
  """Draws the median of the training loss, and of two the whole range."""
  for name, log in panel.logs.items():
    steps, losses = log['train_loss']
    losses, color = cap(losses), COLORS[name]
    middle, low, high = (f(losses, axis=1) for f in (np.median, np.min, np.max))
    axis.plot(steps, middle, color=color, lw=2.0)
    if name in ('adam', 'mada'):
      axis.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
      axis.plot(steps, high, color=color, lw=1.0, ls='--')
  axis.set(yscale='log', xlabel='step', ylabel='training loss')
  axis.set_title(
    'Medians over starts; range and worst of Adam and MADA', fontsize=10
  )
  _finish(axis, axis.yaxis)


def draw_coefficients(axis: Any, log: Log | None) -> None:
  """Draws the paths of MADA's coefficients."""
  if log is None:
    axis.set_axis_off()
    return
  for name, (_, color) in COEFFICIENTS.items():
    steps, values = log[f'coefficients/{name}']
    values = values.reshape(len(steps), -1)
    several = values.shape[1] > 1
    axis.plot(steps, values, color=color, lw=0.8 if several else 2.0, alpha=0.5)
    # Of b1 and b2, which start apart, a median would be of no run.
    if name not in ('b1', 'b2') or not several:
      axis.plot(steps, np.nanmedian(values, axis=1), color=color, lw=2.2)
  axis.set(xlabel='step', ylabel="MADA's coefficients", ylim=(-0.04, 1.04))
  axis.locator_params(axis='x', nbins=5)
  axis.set_title('A line for each run; thick: the median', fontsize=10)
  _finish(axis)


def draw_reddi(column: np.ndarray, panel: Reddi) -> None:
  """Draws points and average regrets on the first two axes of a column."""
  above, below = column[:2]
  for name, log in panel.logs.items():
    # Adam and its like end on one line.
    style = dict(color=COLORS[name], lw=2.0, alpha=0.85)
    for axis, key in ((above, 'x'), (below, 'loss')):
      steps, values = log[key]
      # The end may be at another place of the period than the rest.
      whole = steps % steps[0] == 0
      axis.plot(steps[whole], values[whole], **style)
  above.set(
    ylabel=r'$x_t$; the best is $-1$', xlabel='step', ylim=(-1.06, 1.06)
  )
  above.set_title("Reddi's problem", fontsize=11)
  below.set(ylabel=r'average regret $R_t / t$', xlabel='step')
  below.set_ylim(bottom=0.0)
  for axis in (above, below):
    axis.locator_params(axis='x', nbins=5)
    _finish(axis)


def _finish(axis, log_side=None):
  from matplotlib import ticker

  axis.grid(alpha=0.3)
  axis.spines[['top', 'right']].set_visible(False)
  if log_side is None:
    return
  low, high = log_side.get_view_interval()
  if high < 30 * low:  # Then decades alone would say too little.
    log_side.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    log_side.set_major_formatter(ticker.FormatStrFormatter('%g'))
  log_side.set_minor_formatter(ticker.NullFormatter())
