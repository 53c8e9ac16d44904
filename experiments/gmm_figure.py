"""What :mod:`emc2.experiments.gmm` draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np

COLORS = {
  'vi': '#000000',
  'svi': '#E69F00',
  'svi_paper': '#CC79A7',
  'esvi': '#0072B2',
}
"""Of Okabe and Ito, which differ for the colour-blind too."""

MOST_POINTS = 4_000
"""That are drawn; more would hide each other."""


def draw(
  curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
  points: np.ndarray,
  ellipses: np.ndarray,
  *,
  title: str,
  axes: tuple[str, str],
) -> Any:
  """Draws how the bounds rose, and the best mixture.

  Args:
    curves: By algorithm: passes, seconds and bounds per row, (m,) each.
    points: (N, 2), of the data.
    ellipses: (K, 2, 3): the mean of each component, then its covariance.
    title: Of the mixture.
    axes: What the two coordinates of the points are.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure  # A second to import; most calls end before.

  drawn = figure.Figure(figsize=(13, 4.4), layout='constrained')
  left, middle, right = drawn.subplots(1, 3)
  for axis, column, label in ((left, 0, 'passes'), (middle, 1, 'seconds')):
    draw_curves(axis, curves, column)
    axis.set_xlabel(label)
  left.set_ylabel('evidence lower bound, nats per row')
  left.legend(frameon=False)
  draw_mixture(right, points, ellipses)
  right.set_title(title, fontsize=10)
  right.set_xlabel(axes[0])
  right.set_ylabel(axes[1])
  return drawn


def draw_curves(
  axis: Any,
  curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
  column: int,
) -> None:
  """Draws the bounds against passes (column 0) or seconds (1)."""
  for name, curve in curves.items():
    axis.plot(curve[column], curve[2], label=name, color=COLORS[name])
  # A random start is far below all that follows, and would flatten it.
  later = [curve[2][min(2, len(curve[2]) - 1) :] for curve in curves.values()]
  low, high = np.min(np.concatenate(later)), np.max(np.concatenate(later))
  margin = 0.05 * (high - low) or 1.0
  axis.set_ylim(low - margin, high + margin)
  axis.spines[['top', 'right']].set_visible(False)


def draw_mixture(axis: Any, points: np.ndarray, ellipses: np.ndarray) -> None:
  """Draws points, and of each component where two thirds of its points lie."""
  from matplotlib import patches

  step = -(-len(points) // MOST_POINTS)
  axis.plot(*points[::step].T, '.', color='#9AA5B1', markersize=1.5, zorder=1)
  for (mean_x, xx, xy), (mean_y, _, yy) in ellipses:
    values, vectors = np.linalg.eigh([[xx, xy], [xy, yy]])
    # In a plane a radius of 1.5 standard deviations holds 1 - exp(-9 / 8).
    width, height = 2 * 1.5 * np.sqrt(np.maximum(values, 0))
    angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
    axis.add_patch(
      patches.Ellipse(
        (mean_x, mean_y),
        width,
        height,
        angle=angle,
        fill=False,
        color='#D55E00',
        zorder=2,
      )
    )
  axis.spines[['top', 'right']].set_visible(False)
