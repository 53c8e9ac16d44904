"""What :mod:`emc2.experiments.krylov_newton` draws."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from emc2.experiments import krylov_newton_trace as trace_lib

COLORS = {
  'cubic_newton': '#BDBDBD',
  'optax_lbfgs': '#009E73',
  'l_bfgs_b': '#009E73',
  'trust_krylov': '#CC79A7',
  'newton_cg': '#8C6BB1',
  'sklearn_lbfgs': '#D55E00',
  'sklearn_newton_cholesky': '#D55E00',
}
"""Of those that have no number; of Okabe and Ito, mostly."""

LABELS = {
  'cubic_newton': 'cubic Newton',
  'optax_lbfgs': 'optax L-BFGS',
  'l_bfgs_b': 'SciPy L-BFGS-B',
  'trust_krylov': 'SciPy trust-krylov',
  'newton_cg': 'SciPy Newton-CG',
  'sklearn_lbfgs': 'scikit-learn lbfgs',
  'sklearn_newton_cholesky': 'scikit-learn newton-cholesky',
}

SHADES = {'krylov': ('#9ECAE1', '#08306B'), 'sscn': ('#FDBE85', '#A63603')}
"""Of those that have one: of the smallest and of the largest."""

POINTS = {'sklearn_lbfgs': '^', 'sklearn_newton_cholesky': 's'}
"""Of which no more is known than where they ended."""

FLOOR = 1e-12
"""Gaps below it are rounding, and stand at it."""


def draw(
  curves: Mapping[str, trace_lib.Curve],
  ended: Mapping[str, int],
  optimum: float,
  *,
  title: str,
) -> Any:
  """Draws gaps to the least objective against iterations, products and seconds.

  Args:
    curves: By method.
    ended: Why each method ended, a `trace_lib.End`.
    optimum: The least objective.
    title: What was minimised.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import figure, lines  # A second to import.

  drawn = figure.Figure(figsize=(15, 6.2), layout='constrained')
  drawn.suptitle(title, fontsize=12)
  styles = _styles(list(curves))
  axes = drawn.subplots(1, 3, sharey=True)
  panels = {
    'iterations': lambda curve: curve.iterations,
    'Hessian-vector products and gradients': lambda curve: (
      curve.hvps + curve.gradients
    ),
    'seconds, without compiling': lambda curve: curve.seconds,
  }
  for axis, (label, abscissa) in zip(axes, panels.items(), strict=True):
    for name, curve in curves.items():
      # The start has no place on a logarithmic axis, nor has what asks for
      # no product at all.
      x = abscissa(curve)
      kept = x > 0
      x, gap = x[kept], np.maximum(curve.objective - optimum, FLOOR)[kept]
      if not x.size:
        continue
      style = styles[name]
      if name not in POINTS:
        axis.plot(x, gap, **style)
        converged = ended[name] == trace_lib.End.CONVERGED
        style = dict(color=style['color'], marker='o' if converged else 'x')
      axis.plot(x[-1:], gap[-1:], ms=6, mew=1.6, clip_on=False, **style)
    axis.set(xscale='log', yscale='log', xlabel=label)
    axis.grid(alpha=0.25, which='major', linewidth=0.5)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('objective less the least')
  if any(name.startswith('sscn_') for name in curves):
    axes[1].set_xlabel('Hessian-vector products and gradients; SSCN has none')
  handles = [
    lines.Line2D([], [], label=_label(name), **styles[name]) for name in curves
  ]
  handles += [
    lines.Line2D([], [], color='#606060', ls='', marker=mark, label=label)
    for mark, label in (
      ('o', 'came to the tolerance'),
      ('x', 'came not so far'),
    )
  ]
  drawn.legend(
    handles=handles,
    loc='outside lower center',
    ncols=5,
    frameon=False,
    fontsize=10,
  )
  return drawn


def _label(name):
  kind, _, size = name.rpartition('_')
  if kind in SHADES:
    return f'{"SSCN" if kind == "sscn" else "Krylov"}, m = {size}'
  return LABELS[name]


def _styles(names):
  """By method: ours solid, coordinates dash-dotted, others dashed or dotted."""
  from matplotlib import colors

  styles = {}
  for name in names:
    if name in POINTS:
      styles[name] = dict(color=COLORS[name], ls='', marker=POINTS[name])
    elif name in COLORS:
      line = ':' if name == 'optax_lbfgs' else '--'
      styles[name] = dict(color=COLORS[name], ls=line, lw=1.8)
      if name == 'cubic_newton':  # Behind those that come near to it.
        styles[name] |= dict(ls='-', lw=5.0, zorder=1)
  for kind, (light, dark) in SHADES.items():
    own = [name for name in names if name.startswith(f'{kind}_')]
    own.sort(key=lambda name: int(name.rpartition('_')[2]))
    scale = colors.LinearSegmentedColormap.from_list(kind, [light, dark])
    for name, shade in zip(own, np.linspace(0, 1, len(own)), strict=True):
      shade = shade if len(own) > 1 else 1.0
      line = '-' if kind == 'krylov' else '-.'
      styles[name] = dict(color=scale(shade), ls=line, lw=1.8)
  return styles
