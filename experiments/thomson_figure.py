"""What :mod:`emc2.experiments.thomson` draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.spatial

COLORS = {5: '#D55E00', 6: '#E3E8EC', 7: '#0072B2', None: '#F0E442'}
"""By the number of neighbours; None is any other. Of Okabe and Ito, which
differ for the colour-blind too."""

STYLES = [
  (color, line)
  for line in ('-', '--')
  for color in (
    '#000000',
    '#E69F00',
    '#56B4E9',
    '#009E73',
    '#CC79A7',
    '#0072B2',
    '#D55E00',
  )
]

FLOOR = 1e-16
"""Of the gaps that are drawn: rounding."""


def draw(
  points: np.ndarray,
  degrees: np.ndarray | None,
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  title: str,
  reference: float,
  reference_name: str,
) -> Any:
  """Draws the points, and how the energy of each optimiser fell.

  Args:
    points: (n, k), the best that were found.
    degrees: (n,), of the triangulation of points in R^3, or None.
    curves: By optimiser: seconds (m,) and the least energies so far (m,).
    title: Of the points.
    reference: The energy from which gaps are measured.
    reference_name: What it is.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure  # A second to import; most calls end before.

  drawn = figure.Figure(figsize=(11.5, 5.2), layout='constrained')
  left, right = drawn.subplots(1, 2, width_ratios=(1, 1.15))
  if degrees is not None:
    draw_sphere(left, points, degrees)
  elif points.shape[1] == 2:
    draw_circle(left, points)
  else:
    draw_inner_products(left, points)
  left.set_title(title, fontsize=11)
  draw_curves(right, curves, reference, reference_name)
  return drawn


def draw_sphere(axis: Any, points: np.ndarray, degrees: np.ndarray) -> None:
  """Draws the cell of each point from outside, by its number of neighbours.

  Args:
    axis: Of Matplotlib, in two dimensions: far away all rays are parallel.
    points: (n, 3), unit rows, not all in one plane.
    degrees: (n,), int.
  """
  from matplotlib import collections, patches

  points = points @ _camera(points, degrees).T
  diagram = scipy.spatial.SphericalVoronoi(points)
  diagram.sort_vertices_of_regions()
  kind = [d if d in COLORS else None for d in degrees.tolist()]
  outlines, colors = [], []
  # What lies farther back is painted over.
  for i in np.argsort(points[:, 2]):
    outline = _outline(diagram.vertices[diagram.regions[i]])
    if np.any(outline[:, 2] > 0):
      outlines.append(_flatten(outline))
      colors.append(COLORS[kind[i]])
  thin = min(1.0, 12 / np.sqrt(len(points)))
  axis.add_collection(
    collections.PolyCollection(
      outlines, facecolors=colors, edgecolors='#55606A', linewidths=thin
    )
  )
  _shade(axis)
  front = points[points[:, 2] > 0.02]
  # Seen from the side a dot on the sphere is narrow; leave it smaller.
  size = np.minimum(30.0, 1500 / len(points)) * np.sqrt(front[:, 2])
  axis.scatter(front[:, 0], front[:, 1], s=size, c='#202428', lw=0, zorder=4)
  handles = [
    patches.Patch(
      facecolor=color,
      edgecolor='#55606A',
      label=f'{name or "other"}: {kind.count(name)}',
    )
    for name, color in COLORS.items()
    if kind.count(name)
  ]
  axis.legend(
    handles=handles,
    title='points by their neighbours',
    loc='upper center',
    bbox_to_anchor=(0.5, 0.02),
    ncols=len(handles),
    frameon=False,
  )
  _frame(axis)


def draw_circle(axis: Any, points: np.ndarray) -> None:
  """Draws points (n, 2) on the circle, and the polygon that they make."""
  from matplotlib import patches

  axis.add_patch(patches.Circle((0, 0), 1, fill=False, ec='#9AA5AE'))
  order = np.argsort(np.arctan2(points[:, 1], points[:, 0]))
  corners = patches.Polygon(
    points[order], facecolor=COLORS[6], edgecolor='#55606A'
  )
  axis.add_patch(corners)
  size = np.clip(1500 / len(points), 4.0, 40.0)
  axis.scatter(*points.T, s=size, c=COLORS[5], zorder=3)
  _frame(axis)


def draw_inner_products(axis: Any, points: np.ndarray) -> None:
  """Draws how many pairs of points (n, k) have which inner product."""
  products = (points @ points.T)[np.triu_indices(len(points), 1)]
  axis.hist(products, bins=np.linspace(-1.01, 1.01, 102), color=COLORS[7])
  axis.set(xlabel='inner product', ylabel='pairs', xlim=(-1.03, 1.03))
  axis.grid(alpha=0.3)


def draw_curves(
  axis: Any,
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
  reference: float,
  reference_name: str,
) -> None:
  """Draws relative gaps against time, each until its energy last fell."""
  from matplotlib import ticker

  for name, (color, line) in zip(curves, STYLES, strict=False):
    seconds, energies = curves[name]
    gaps = np.maximum((energies - reference) / abs(reference), FLOOR)
    end = np.argmax(gaps <= max(1.001 * gaps[-1], 10 * FLOOR))
    seconds, gaps = seconds[: end + 1], gaps[: end + 1]
    axis.plot(seconds, gaps, line, color=color, lw=1.6, label=name)
    axis.plot(seconds[-1], gaps[-1], 'o', color=color, ms=6, mec='w', zorder=4)
  axis.set(
    xscale='log',
    yscale='log',
    xlabel='seconds of all starts, without compiling',
    ylabel=f'relative gap to {reference_name}',
    title='Best of all starts; a dot where it last fell',
  )
  axis.title.set_fontsize(11)
  for side in (axis.xaxis, axis.yaxis):  # They would overlap.
    side.set_minor_formatter(ticker.NullFormatter())
  axis.grid(alpha=0.3)
  axis.legend(
    loc='center left', bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9
  )


def _camera(points, degrees):
  """A rotation (3, 3) that brings an odd point to the front."""
  z = points[np.argmax(np.abs(6 - degrees))]
  x = np.linalg.svd(z[None])[2][1]
  turn = np.stack([x, np.cross(z, x), z])
  # Not quite to the middle: it shall look round.
  tilt, sweep = np.radians(18), np.radians(12)
  about_x = np.array(
    [
      [1, 0, 0],
      [0, np.cos(tilt), -np.sin(tilt)],
      [0, np.sin(tilt), np.cos(tilt)],
    ]
  )
  about_y = np.array(
    [
      [np.cos(sweep), 0, np.sin(sweep)],
      [0, 1, 0],
      [-np.sin(sweep), 0, np.cos(sweep)],
    ]
  )
  return about_x @ about_y @ turn


def _outline(corners, steps=16):
  """The arcs between corners (m, 3) of a cell, as points."""
  following = np.roll(corners, -1, axis=0)
  t = np.arange(steps)[:, None] / steps
  arcs = corners[:, None] * (1 - t) + following[:, None] * t
  arcs = arcs.reshape(-1, 3)
  return arcs / np.linalg.norm(arcs, axis=1, keepdims=True)


def _flatten(outline):
  """As seen from the front; what is behind goes to the rim."""
  flat = outline[:, :2].copy()
  behind = outline[:, 2] < 0
  flat[behind] /= np.linalg.norm(flat[behind], axis=1, keepdims=True)
  return flat


def _shade(axis):
  """Lays the light of a lamp from the upper left over the unit disc."""
  from matplotlib import patches

  x, y = np.meshgrid(*[np.linspace(-1, 1, 400)] * 2)
  height = np.sqrt(np.maximum(0, 1 - x * x - y * y))
  light = np.clip((-0.35 * x + 0.45 * y + height) / 1.15, 0, 1)
  dark = np.zeros((*x.shape, 4))
  dark[..., 3] = 0.42 * (1 - light) ** 1.3
  image = axis.imshow(
    dark, extent=(-1, 1, -1, 1), origin='lower', zorder=3, aspect='equal'
  )
  image.set_clip_path(patches.Circle((0, 0), 1, transform=axis.transData))


def _frame(axis):
  axis.set(xlim=(-1.04, 1.04), ylim=(-1.04, 1.04), aspect='equal')
  axis.set_axis_off()
