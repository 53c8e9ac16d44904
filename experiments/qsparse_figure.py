"""What :mod:`emc2.experiments.qsparse` draws."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

COLORS = {
  'identity': '#000000',
  'qsgd': '#E69F00',
  'sign': '#CC79A7',
  'top_k': '#009E73',
  'quantized': '#0072B2',
  'signed': '#D55E00',
}
"""By code; of Okabe and Ito, which differ for the colour-blind too."""

LABELS = {
  'identity': 'all, float32',
  'qsgd': 'levels of all',
  'sign': 'signs of all',
  'top_k': 'top k',
  'quantized': 'levels of top k',
  'signed': 'signs of top k',
}

_FREE = dict(frameon=False, fontsize=9)


class Curve(NamedTuple):
  """How a method went, for each seed."""

  steps: np.ndarray  # (m,).
  bits: np.ndarray  # (m, seeds): from all workers up to there.
  loss: np.ndarray  # (m, seeds): of the master's model, on all training rows.
  accuracy: np.ndarray  # (m, seeds): likewise, on test rows.


class Hit(NamedTuple):
  """Where seeds first were below a loss; infinite where they never were."""

  steps: np.ndarray  # (seeds,), float64.
  bits: np.ndarray  # (seeds,), float64.


def hit(curve: Curve, target: float) -> Hit:
  """Finds the first look at which the loss of each seed was below a target.

  Args:
    curve: Of a method.
    target: The loss.

  Returns:
    Steps and bits.

  Examples:
    >>> loss = np.array([[2.0, 2.0], [0.9, 2.0], [0.8, 2.0]])
    >>> bits = np.array([[0.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    >>> found = hit(Curve(np.arange(3), bits, loss, loss), 1.0)
    >>> found.steps.tolist(), found.bits.tolist()
    ([1.0, inf], [5.0, inf])
  """
  below = curve.loss < target
  first = np.argmax(below, axis=0)
  seeds = np.arange(first.size)
  found = below[first, seeds]
  return Hit(
    steps=np.where(found, curve.steps[first], np.inf),
    bits=np.where(found, curve.bits[first, seeds], np.inf),
  )


def draw(
  panels: Mapping[str, Mapping[str, Curve]],
  methods: Mapping[str, Any],
  *,
  target: float,
  title: str,
) -> Any:
  """Draws losses against bits and steps, and the bits to a loss.

  Args:
    panels: Curves by method, by the split of the data; one split or two.
    methods: By name: `code`, `period`, `asynchronous` and `memory`.
    target: The loss to which bits are counted.
    title: What was trained.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure, lines  # A second to import.

  drawn = figure.Figure(figsize=(16, 4.9 * len(panels)), layout='constrained')
  drawn.suptitle(title, fontsize=12)
  grid = drawn.subplots(len(panels), 3, squeeze=False)
  for row, (split, curves) in zip(grid, panels.items(), strict=True):
    draw_losses(row[0], curves, methods, target, 'bits')
    draw_losses(row[1], curves, methods, target, 'steps')
    draw_bits(row[2], curves, methods, target)
    held = {'even': 'all classes', 'sorted': 'one class or two'}[split]
    row[0].set_title(f'each worker holds {held}', fontsize=11)
  used = {methods[name].code for curves in panels.values() for name in curves}
  colors = [
    lines.Line2D([], [], color=COLORS[code], lw=2, label=LABELS[code])
    for code in COLORS
    if code in used
  ]
  kinds = [
    lines.Line2D([], [], color='#606060', lw=2, ls=style, label=label)
    for label, style in (
      ('upload each step', '-'),
      ('each H steps', '--'),
      ('gaps of 1 to H steps', '-.'),
      ('no memory', ':'),
    )
  ]
  drawn.legend(
    handles=colors + kinds, loc='outside lower center', ncols=10, **_FREE
  )
  return drawn


def draw_losses(
  axis: Any,
  curves: Mapping[str, Curve],
  methods: Mapping[str, Any],
  target: float,
  against: str,
) -> None:
  """Draws medians of losses over seeds, and their ranges."""
  from matplotlib import ticker

  for name, curve in curves.items():
    method = methods[name]
    # What came before the first upload has no place on a logarithmic axis.
    sent = np.median(curve.bits, axis=1) > 0
    x = np.median(curve.bits, axis=1) if against == 'bits' else curve.steps
    x, losses = x[sent], curve.loss[sent]
    color, style = COLORS[method.code], _style(method)
    axis.plot(x, np.median(losses, axis=1), style, color=color, lw=1.6)
    axis.fill_between(
      x,
      losses.min(axis=1),
      losses.max(axis=1),
      color=color,
      alpha=0.15,
      lw=0,
    )
  axis.axhline(target, color='#66707A', lw=0.8)
  axis.set(xscale='log', yscale='log', ylabel='training loss of the master')
  axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
  axis.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axis.yaxis.set_minor_formatter(ticker.NullFormatter())
  axis.set_xlabel('bits from all workers' if against == 'bits' else 'steps')
  _finish(axis)


def draw_bits(
  axis: Any,
  curves: Mapping[str, Curve],
  methods: Mapping[str, Any],
  target: float,
) -> None:
  """Draws by how many bits each seed came to the target."""
  axis.margins(x=0.15)  # Words stand beside some marks.
  for place, (name, curve) in enumerate(curves.items()):
    color = COLORS[methods[name].code]
    bits = hit(curve, target).bits
    reached = np.isfinite(bits)
    axis.plot(
      bits[reached],
      np.full(reached.sum(), place),
      'o',
      color=color,
      ms=5,
      mfc='none',
    )
    if reached.all():
      middle = np.median(bits)
      axis.plot([middle], [place], '|', color=color, ms=16, mew=2.5)
    elif not reached.any():
      end = np.median(curve.bits[-1])
      axis.plot([end], [place], 'x', color=color, ms=6)
      axis.annotate(
        'not by',
        (end, place),
        xytext=(-7, 0),
        textcoords='offset points',
        ha='right',
        va='center',
        fontsize=9,
      )
  axis.set_yticks(range(len(curves)), [_label(name) for name in curves])
  axis.set(xscale='log', xlabel=f'bits to a training loss of {target:g}')
  axis.set_ylim(len(curves) - 0.5, -0.5)
  _finish(axis)


def _label(name):
  return name.replace('_no_memory', ', no memory').replace('_', ' ')


def _style(method):
  if not method.memory:
    return ':'
  if method.asynchronous:
    return '-.'
  return '-' if method.period == 1 else '--'


def _finish(axis):
  axis.grid(alpha=0.25, which='major', linewidth=0.5)
  axis.spines[['top', 'right']].set_visible(False)
