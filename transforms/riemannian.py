"""Optimisation on products of spheres with any optax optimiser."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emc2.sphere import manifold
from emc2.transforms import rows
from emc2.transforms.scale_by_row_adam import ScaleByRowAdamState

MOMENTUM_BUFFERS: Mapping[type, tuple[str, ...]] = MappingProxyType(
  {
    optax.TraceState: ('trace',),
    optax.EmaState: ('ema',),
    optax.ScaleByAdamState: ('mu',),
    optax.ScaleByAdanState: ('m', 'v', 'g'),
    optax.ScaleByAmsgradState: ('mu',),
    optax.ScaleByBeliefState: ('mu',),
    optax.ScaleByLionState: ('mu',),
    optax.ScaleByNovogradState: ('mu',),
    # Of the two fields of SM3 the one called nu is the momentum.
    optax.ScaleBySM3State: ('nu',),
    optax.contrib.ScaleByAdemamixState: ('m1', 'm2'),
    optax.contrib.ScaleBySimplifiedAdEMAMixState: ('m',),
    ScaleByRowAdamState: ('mu',),
  }
)
"""Types of optimiser states, and their fields that are sums of gradients.

The mean in :class:`optax.ScaleByRStdDevState` is not one of them: its square
is taken from the second moment, which must stay the larger of the two.
"""


def project_tangent() -> optax.GradientTransformationExtraArgs:
  r"""Takes from each row of the updates its part along the point.

  For points :math:`x`, unit rows along the last axis of `params`,

  .. math::
    u \leftarrow P_x u = u - \langle u, x \rangle x.

  Returns:
    The transform. Its update needs `params`.

  Raises:
    ValueError: If `params` is None.

  Examples:
    >>> tx = project_tangent()
    >>> points = jnp.array([[1.0, 0.0]])
    >>> tx.update(jnp.array([[3.0, 4.0]]), tx.init(points), points)[0]
    Array([[0., 4.]], dtype=float32)
  """

  def update_fn(updates, params):
    rows.check_params(params, 'project_tangent')
    return rows.project(params, updates)

  return optax.with_extra_args_support(optax.stateless(update_fn))


def cap_rows(
  max_norm: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  r"""Shortens each row of the updates that is longer than `max_norm`.

  .. math::
    u_i \leftarrow u_i \min(1, c / \|u_i\|_2)

  :func:`optax.clip_by_block_rms` bounds a whole array and
  :func:`optax.adaptive_grad_clip` a column relative to its weights; here each
  point has a bound of its own.

  Args:
    max_norm: :math:`c > 0`, a number or a traced scalar.

  Returns:
    The transform.

  Raises:
    ValueError: If `max_norm` is a number that is not positive.

  Examples:
    >>> tx = cap_rows(0.5)
    >>> u = jnp.array([[3.0, 4.0], [0.0, 0.1]])
    >>> tx.update(u, tx.init(u))[0]
    Array([[0.3, 0.4],
           [0. , 0.1]], dtype=float32)
  """
  rows.check_positive(max_norm, 'max_norm')

  def update_fn(updates, params):
    del params

    def cap(leaf):
      wide = leaf.astype(rows.wide_dtype(leaf))
      return manifold.limit(wide, max_norm).astype(leaf.dtype)

    return jax.tree.map(cap, updates)

  return optax.with_extra_args_support(optax.stateless(update_fn))


def retract(
  map: str = 'retraction',
) -> optax.GradientTransformationExtraArgs:
  r"""Turns updates into the moves that end on the sphere; must be the last.

  With points :math:`x` and updates :math:`v`, :func:`optax.apply_updates` gives

  .. math::
    x + u = \frac{x + v}{\|x + v\|_2}
    \quad \text{or} \quad
    x \cos \|v\|_2 + v \frac{\sin \|v\|_2}{\|v\|_2},

  each coordinate within one rounding unit of 1. Nothing may follow it: what
  scales, clips or adds to its result leaves the sphere.

  Args:
    map: 'retraction' for the first, 'exponential' for the second, which is for
      tangent :math:`v` the geodesic of length :math:`\|v\|_2`. Static.

  Returns:
    The transform. Its update needs `params`.

  Raises:
    ValueError: If `map` has no such name, or `params` is None.

  Examples:
    >>> tx = retract()
    >>> points = jnp.array([[0.0, 0.3]])
    >>> updates, _ = tx.update(jnp.array([[0.4, 0.0]]), tx.init(points), points)
    >>> points + updates
    Array([[0.8, 0.6]], dtype=float32)
  """
  rows.check_map(map)

  def update_fn(updates, params):
    rows.check_params(params, 'retract')
    return rows.subtract(rows.move(map, params, updates), params)

  return optax.with_extra_args_support(optax.stateless(update_fn))


def transport_momentum(
  inner: optax.GradientTransformation,
  buffers: Mapping[type, tuple[str, ...]] = MOMENTUM_BUFFERS,
) -> optax.GradientTransformationExtraArgs:
  r"""Carries the momentum of an optimiser to where the points now are.

  Before each update of `inner` the sums of past gradients in its state, which
  are tangent at earlier points, are projected to the tangent spaces at the
  present ones, :math:`m \leftarrow P_x m`. Nothing else is touched: second
  moments are no vectors, and pairs of L-BFGS stay as they are, since their
  transport changes no result.

  The state is searched at any depth, so through :func:`optax.chain`,
  :func:`optax.inject_hyperparams`, :func:`optax.masked`,
  :func:`optax.partition` and :class:`optax.MultiSteps`. What is a sum of
  gradients is said by `buffers`, never guessed from shapes or names.

  Args:
    inner: Any optax optimiser.
    buffers: Types of states, each a NamedTuple, and which of their fields to
      project; each field has the structure of the params. Add to
      `MOMENTUM_BUFFERS` for states of your own.

  Returns:
    The transform. Its state is that of `inner`; its update needs `params`.

  Raises:
    ValueError: If `params` is None, or a type in `buffers` has no such field.

  Examples:
    >>> tx = transport_momentum(optax.trace(decay=0.5))
    >>> push = jnp.array([[0.0, 4.0]])
    >>> state = tx.init(push)
    >>> _, state = tx.update(push, state, jnp.array([[1.0, 0.0]]))
    >>> rest = jnp.zeros((1, 2))
    >>> updates, _ = tx.update(rest, state, jnp.array([[0.6, 0.8]]))
    >>> np.asarray(updates).round(2)
    array([[-0.96,  0.72]], dtype=float32)
  """
  for kind, names in buffers.items():
    for name in names:
      if name not in getattr(kind, '_fields', ()):
        raise ValueError(
          'buffers must name fields of NamedTuples, but '
          f'{kind.__name__} has no field {name!r}.'
        )
  inner = optax.with_extra_args_support(inner)
  is_buffered = lambda node: type(node) in buffers

  def transport(params, state):
    def visit(node):
      if not is_buffered(node):
        return node
      names = buffers[type(node)]
      fields = {
        name: (rows.project if name in names else transport)(params, field)
        for name, field in node._asdict().items()
      }
      return type(node)(**fields)

    return jax.tree.map(visit, state, is_leaf=is_buffered)

  def update_fn(updates, state, params=None, **extra_args):
    rows.check_params(params, 'transport_momentum')
    return inner.update(updates, transport(params, state), params, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def search_on_sphere(
  line_search: optax.GradientTransformation, map: str = 'retraction'
) -> optax.GradientTransformationExtraArgs:
  r"""Lets a line search of optax try points on the sphere.

  A line search tries :math:`x + t u`. Here it is given
  :math:`F(Y) = E(R_x(Y - x))` for the objective :math:`E`, so that it sees the
  curve along which :func:`retract` then moves. The gradient that it keeps is
  turned from :math:`\nabla F` at the last trial into the Riemannian gradient of
  :math:`E` where the move ends: for rows :math:`y_i = x_i + t u_i` of the
  retraction :math:`\|y_i\| \nabla F_i`. So
  :func:`optax.value_and_grad_from_state` stays right.

  Args:
    line_search: :func:`optax.scale_by_zoom_linesearch`,
      :func:`optax.scale_by_backtracking_linesearch` or alike, whose state holds
      at most one `grad`. Its updates must be tangent: descent directions.
    map: The map of :func:`retract` that follows. Static.

  Returns:
    The transform. Its update needs `params`, `value`, `grad`, the gradient in
    space or its projection, and `value_fn`, defined on points of the sphere.

  Raises:
    ValueError: If `map` has no such name, or `params` is None.

  Examples:
    >>> tx = search_on_sphere(optax.scale_by_backtracking_linesearch(9))
    >>> points, down = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    >>> fn = lambda points: -points[0, 1]
    >>> updates, _ = tx.update(down, tx.init(points), points,
    ...     value=fn(points), grad=-down, value_fn=fn)
    >>> updates
    Array([[0., 1.]], dtype=float32)
  """
  rows.check_map(map)
  line_search = optax.with_extra_args_support(line_search)

  def init_fn(params):
    # The counters of optax are weakly typed here and strongly afterwards, for
    # which a second update would compile anew.
    strong = lambda leaf: leaf.astype(leaf.dtype)
    return jax.tree.map(strong, line_search.init(params))

  def update_fn(updates, state, params=None, *, value_fn, **extra_args):
    rows.check_params(params, 'search_on_sphere')
    # Line searches read from the signature what to hand on to the objective.
    value_fn = _on_sphere(value_fn, map, params)
    moves, state = line_search.update(
      updates, state, params, value_fn=value_fn, **extra_args
    )
    grad = optax.tree.get(state, 'grad')
    if grad is not None:
      pull = functools.partial(_push_gradient, map)
      state = optax.tree.set(
        state, grad=jax.tree.map(pull, params, moves, grad)
      )
    return moves, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def riemannian(
  inner: optax.GradientTransformation,
  *,
  line_search: optax.GradientTransformation | None = None,
  max_step: jax.typing.ArrayLike | None = None,
  transport: bool = True,
  map: str = 'retraction',
) -> optax.GradientTransformationExtraArgs:
  r"""Runs any optax optimiser on a product of spheres.

  Each row :math:`x_i` along the last axis of `params` is a point of a unit
  sphere. An update projects the gradient, asks `inner`, projects again and
  moves along the sphere:

  .. math::
    g = P_x \nabla E, \quad v = P_x\, \mathrm{inner}(g), \quad
    v_i \leftarrow v_i \min(1, c / \|v_i\|_2), \quad
    x_i \leftarrow \frac{x_i + v_i}{\|x_i + v_i\|_2}.

  The second projection matters for all but multiples of the gradient. The
  gradient may be that of :math:`E` in space, projected or not, or that of
  :math:`Y \mapsto E(Y / \|Y\|)`. Optimisers that treat coordinates apart, as
  :func:`optax.scale_by_adam`, depend on the axes of space;
  :func:`scale_by_row_adam` does not.

  Args:
    inner: Any optax optimiser, its learning rate and sign included.
    line_search: What finds the length of the move, as in :func:`optax.lbfgs`;
      None takes the move of `inner`. Its update needs `value`, `grad` and
      `value_fn`. It comes after the cap, which then bounds what it starts from.
    max_step: :math:`c > 0`, the longest move of a row; None for no bound.
    transport: Whether momentum follows the points, as
      :func:`transport_momentum` says. Static.
    map: 'retraction', as above, or 'exponential'. Static.

  Returns:
    The transform, a chain; nothing may follow it. Its update needs `params`.

  Raises:
    ValueError: If `max_step` is a number that is not positive, `map` has no
      such name, or `params` is None.

  Examples:
    >>> tx = riemannian(optax.sgd(0.75))
    >>> points = jnp.array([[1.0, 0.0]])
    >>> grads = jnp.array([[5.0, -1.0]])
    >>> updates, _ = tx.update(grads, tx.init(points), points)
    >>> points + updates
    Array([[0.8, 0.6]], dtype=float32)

    L-BFGS, for `E` a function of the points:

    >>> search = optax.scale_by_zoom_linesearch(20)
    >>> step = optax.chain(optax.scale_by_lbfgs(20), optax.scale(-1))
    >>> tx = riemannian(step, line_search=search)
    >>> E = lambda x: jnp.sum(x[..., 0] + x[..., 1] ** 2)
    >>> state = tx.init(points)
    >>> value, grad = optax.value_and_grad_from_state(E)(points, state=state)
    >>> updates, state = tx.update(
    ...     grad, state, points, value=value, grad=grad, value_fn=E)

  References:
    Absil, Mahony and Sepulchre, `Optimization Algorithms on Matrix Manifolds
    <https://press.princeton.edu/absil>`_, 2008, sections 4.1 (retraction) and
    8.1 (transport).
  """
  transforms = [
    project_tangent(),
    transport_momentum(inner) if transport else inner,
    project_tangent(),
  ]
  if max_step is not None:
    rows.check_positive(max_step, 'max_step')
    transforms.append(cap_rows(max_step))
  if line_search is not None:
    transforms.append(search_on_sphere(line_search, map))
  return optax.chain(*transforms, retract(map))


def _on_sphere(
  value_fn: Callable[..., Any], map: str, params: optax.Params
) -> Callable[..., Any]:
  """The objective along straight lines that leave the points."""

  @functools.wraps(value_fn)
  def value_on_sphere(trial, *args, **kwargs):
    vectors = optax.tree.sub(trial, params)
    if map == 'exponential':
      # Its formula is not meant for others; retractions are for any vector.
      vectors = rows.project(params, vectors)
    return value_fn(rows.move(map, params, vectors), *args, **kwargs)

  return value_on_sphere


def _push_gradient(
  map: str, points: jax.Array, vectors: jax.Array, gradient: jax.Array
) -> jax.Array:
  """Takes the gradient of `_on_sphere` to that of the objective, tangent."""
  square = manifold.inner(vectors, vectors)
  if map == 'retraction':
    return gradient * jnp.sqrt(1 + square)
  # Along a geodesic lengths stay, across it they shrink by sin(r) / r.
  is_zero = square == 0
  safe = jnp.where(is_zero, 1, square)
  sinc = jnp.where(is_zero, 1, jnp.sin(jnp.sqrt(safe)) / jnp.sqrt(safe))
  cosine = jnp.where(is_zero, 1, jnp.cos(jnp.sqrt(safe)))
  along = manifold.inner(gradient, vectors) / safe
  across = (gradient - along * vectors) / sinc
  return across + along * (cosine * vectors - sinc * square * points)
