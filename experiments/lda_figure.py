"""What :mod:`emc2.experiments.lda` draws."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

STYLES = {
  'esvi': ('#0072B2', '-'),
  'esvi_topk': ('#56B4E9', '--'),
  'vi': ('#000000', '-'),
  'cvb0': ('#D55E00', '-'),
  'svi': ('#E69F00', '-'),
  'scvb0': ('#CC79A7', '--'),
}
"""Colours of Okabe and Ito, which differ for the colour-blind too."""

MOST_TOPICS = 40
"""That fit on the page."""


class Curve(NamedTuple):
  """How an algorithm went."""

  passes: np.ndarray  # (m,).
  seconds: np.ndarray  # (m,).
  bounds: np.ndarray | None  # (m,), nats per token of the documents.
  perplexity: np.ndarray  # (m,), of documents held out.


class Topic(NamedTuple):
  """A topic for people."""

  share: float  # Of all tokens.
  coherence: float
  words: Sequence[str]  # The likeliest first.


def draw(
  curves: Mapping[str, Curve], topics: Sequence[Topic], *, title: str
) -> Any:
  """Draws how well topics came to tell documents, and the topics.

  Args:
    curves: By algorithm.
    topics: Of one of them.
    title: Of the topics.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure  # A second to import; most calls end before.

  drawn = figure.Figure(figsize=(15, 8), layout='constrained')
  left, right = drawn.subfigures(1, 2, width_ratios=(1.25, 1))
  bounded = any(curve.bounds is not None for curve in curves.values())
  grid = left.subplots(2 if bounded else 1, 2, sharey='row', squeeze=False)
  rows = (['bounds'] if bounded else []) + ['perplexity']
  labels = {
    'bounds': 'evidence lower bound, nats per token (up is better)',
    'perplexity': 'perplexity of held-out halves (down is better)',
  }
  for axes, quantity in zip(grid, rows, strict=True):
    for axis, against in zip(axes, ('passes', 'seconds'), strict=True):
      draw_curves(axis, curves, against, quantity)
    axes[0].set_ylabel(labels[quantity])
  for axis, label in zip(grid[-1], ('passes', 'seconds of steps'), strict=True):
    axis.set_xlabel(label)
  grid[0, 0].legend(frameon=False)
  draw_topics(right.subplots(), topics)
  right.axes[0].set_title(title, fontsize=11)
  return drawn


def draw_curves(
  axis: Any, curves: Mapping[str, Curve], against: str, quantity: str
) -> None:
  """Draws one field of the curves against another, on a logarithmic axis."""
  later = []
  for name, curve in curves.items():
    color, line = STYLES[name]
    x, y = getattr(curve, against), getattr(curve, quantity)
    if y is None:
      continue
    # The start, at 0, is the same for all and has no logarithm.
    axis.plot(
      x[1:], y[1:], line, label=name, color=color, marker='.', markersize=4
    )
    later.append(y[1:])
  axis.set_xscale('log')
  axis.xaxis.set_major_formatter('{x:g}')
  if quantity == 'perplexity':
    axis.set_yscale('log')
    axis.yaxis.set_major_formatter('{x:.0f}')
    axis.yaxis.set_minor_formatter('{x:.0f}')
  axis.grid(alpha=0.25, which='both', linewidth=0.5)
  axis.spines[['top', 'right']].set_visible(False)


def draw_topics(axis: Any, topics: Sequence[Topic]) -> None:
  """Lists topics, a line for each: its share of the tokens and its words."""
  shown = topics[:MOST_TOPICS]
  for row, topic in enumerate(shown):
    axis.text(
      0.075,
      row,
      f'{topic.share:.1%}',
      ha='right',
      va='center',
      fontsize=7.5,
      color='#66707A',
    )
    axis.text(
      0.09,
      row,
      ', '.join(topic.words[:8]),
      va='center',
      fontsize=8.5,
      clip_on=True,
    )
  axis.set_xlim(0, 1)
  axis.set_ylim(max(len(shown), 10) - 0.5, -0.8)
  axis.set_axis_off()
