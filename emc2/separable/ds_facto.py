r"""Factorisation machines on a ring: DS-FACTO.

Rows stay with their workers, blocks of features go round. What binds features
to each other, the sums of each row over all of them, is added up anew while
they do.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import algorithm, arguments, ring
from emc2 import mesh as mesh_lib
from emc2.kernels import fm_visit
from emc2.separable import fm_cells
from emc2.separable import rows as rows_lib

MODES = ('fused', 'two_pass', 'incremental', 'jacobi')
RIDGES = ('all', 'active')

EXPLODED = 10.0
"""Growth of the loss over its lowest from which a run counts as diverged."""

_SHORT = 16


class Block(NamedTuple):
  """The parameters of features, by blocks; they travel."""

  linear: jax.Array  # (Q, D_q): w.
  factors: jax.Array  # (Q, D_q, K): v.
  inner: Any  # (Q, ...): state of the inner transformation, or ().


class State(NamedTuple):
  """Parameters, and the sums of each row over all features."""

  blocks: Block
  bias: jax.Array  # (): w_0.
  sums: jax.Array  # (P, S, B, K): a = sum_d v_d x_d of each row.
  rest: jax.Array  # (P, S, B): r, the score less w_0 and |a|^2 / 2.
  lowest: jax.Array  # (): the lowest loss so far.
  count: jax.Array  # (), int32: finished passes.


class Info(NamedTuple):
  """What a reader may log of one pass.

  The loss is what the workers know from their sums: exact but for the lag of
  the modes 'fused' and 'incremental'.
  """

  loss: jax.Array  # (): mean over rows when the pass began, without the ridge.
  diverged: jax.Array  # (), bool: not finite, or `EXPLODED` times the lowest.


class Params(NamedTuple):
  """A factorisation machine; features are in the order of the data."""

  bias: jax.Array  # (): w_0.
  linear: jax.Array  # (D,): w.
  factors: jax.Array  # (D, K): v.


class Resident(NamedTuple):
  """What stays on a worker; outside, leaves have a leading axis of workers."""

  cells: fm_cells.Cells  # Without `feature_ids`.
  home: jax.Array  # (Q,), bool: the blocks that start here.
  bias: jax.Array  # ().
  multipliers: jax.Array  # (S, B): G, the slope of the loss in the score.
  sums: jax.Array  # (S, B, K).
  rest: jax.Array  # (S, B).
  next_sums: jax.Array  # (S, B, K): what the blocks of this pass add up to.
  next_rest: jax.Array  # (S, B): likewise.
  count: jax.Array  # (), int32: finished passes.


class Settings(NamedTuple):
  """What visits need to know; see :func:`ds_facto`."""

  loss: str
  mode: str
  ridge_linear: jax.typing.ArrayLike
  ridge_factors: jax.typing.ArrayLike
  ridge: str
  step_size: Any
  inner: Any
  implementation: str


def init(
  key: jax.Array,
  cells: fm_cells.Cells,
  *,
  rank: int,
  settings: Settings,
  init_std: float = 0.1,
  bias: float | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> State:
  """Draws factors and adds up the sums of rows; see :func:`ds_facto`."""
  dtype = cells.labels.dtype

  # By the feature, so that it matters to nothing how features are dealt.
  def draw(number):
    own = jax.random.fold_in(key, number)
    return jnp.asarray(init_std, dtype) * jax.random.normal(own, (rank,), dtype)

  ids = jnp.asarray(cells.feature_ids)
  factors = jax.vmap(jax.vmap(draw))(jnp.maximum(ids, 0))
  factors = jnp.where(ids[..., None] < 0, 0, factors)
  linear = jnp.zeros_like(factors, shape=ids.shape)
  inner = ()
  if settings.inner is not None:
    inner = jax.vmap(settings.inner.init)((linear, factors))
  if bias is None:
    bias = jnp.sum(jnp.sum(cells.labels, (1, 2))) / cells.num_rows[0]
    if settings.loss == 'logistic':
      share = (1 + bias) / 2
      least = 0.5 / cells.num_rows[0]
      share = jnp.clip(share, least, 1 - least)
      bias = jnp.log(share) - jnp.log1p(-share)
  sums = jnp.zeros((*cells.labels.shape, rank), dtype)
  state = State(
    blocks=Block(linear, factors, inner),
    bias=jnp.asarray(bias, dtype),
    sums=sums,
    rest=jnp.zeros(cells.labels.shape, dtype),
    lowest=jnp.asarray(jnp.inf, dtype),
    count=jnp.zeros([], jnp.int32),
  )
  visit = _accumulate_only(settings)
  parts = (ring.Rotation(visit, _swap),)
  found = ring.run(parts, *to_ring(state, cells, settings), mesh)
  return from_ring(state, found[0], found[2])._replace(count=state.count)


def step(
  key: jax.Array,
  state: State,
  cells: fm_cells.Cells,
  *,
  settings: Settings,
  fit_bias: bool = True,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[State, Info]:
  """One pass: all blocks go round, once or twice; see :func:`ds_facto`."""
  del key
  scores = _scores(state.sums, state.rest)
  losses, slopes = _losses(settings.loss, scores + state.bias, cells.labels)
  add = lambda x: jnp.sum(cells.present * x, axis=(1, 2))
  totals = jnp.stack([add(losses), add(slopes)], axis=1)
  loss, slope = _add_workers(totals / cells.num_rows[:, None], mesh)
  bias = state.bias
  if fit_bias:
    bias -= jnp.asarray(_step_size(settings, state.count), bias.dtype) * slope
  parts = _parts(settings, _swap)
  given = to_ring(state._replace(bias=bias), cells, settings)
  residents, _, blocks = ring.run(parts, *given, mesh)
  new = from_ring(state, residents, blocks)
  new = new._replace(
    bias=bias,
    lowest=jnp.minimum(state.lowest, loss),
    # Not a worker's count, which would have to be sent to the others.
    count=state.count + 1,
  )
  diverged = ~jnp.isfinite(loss) | (loss > EXPLODED * state.lowest)
  return new, Info(loss=loss, diverged=diverged)


def shardings() -> State:
  """How a state is split over a ring, as a tree of `PartitionSpec`."""
  spec = jax.sharding.PartitionSpec
  return State(
    blocks=spec(mesh_lib.RING),
    bias=spec(),
    sums=spec(mesh_lib.RING),
    rest=spec(mesh_lib.RING),
    lowest=spec(),
    count=spec(),
  )


def ds_facto(
  num_features: int,
  rank: int,
  *,
  loss: str = 'squared',
  mode: str = 'fused',
  ridge_linear: jax.typing.ArrayLike = 1e-4,
  ridge_factors: jax.typing.ArrayLike = 1e-4,
  ridge: str = 'all',
  step_size: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 0.1,
  inner: Any = None,
  init_std: float = 0.1,
  bias: float | None = None,
  fit_bias: bool = True,
  mesh: jax.sharding.Mesh | None = None,
  implementation: str = 'auto',
) -> algorithm.Algorithm:
  r"""A factorisation machine whose rows and features are both split.

  The score of a row :math:`x` and what is minimised are

  .. math::
    f(x) &= w_0 + \sum_d w_d x_d + \sum_{d < d'} \langle v_d, v_{d'} \rangle
      x_d x_{d'} = w_0 + r + \tfrac12 \|a\|^2, \\
    a &= \sum_d v_d x_d, \quad
    r = \sum_d w_d x_d - \tfrac12 x_d^2 \|v_d\|^2, \\
    J &= \frac1N \sum_i \ell(f(x_i), y_i) + \frac{\lambda_w}2 \|w\|^2
      + \frac{\lambda_v}2 \|V\|_F^2.

  Given :math:`a_i` and the slope :math:`G_i = \ell'(f(x_i), y_i)` of each row,
  the gradient of a block of features needs the rows' entries of that block
  alone. So rows, with :math:`a` and :math:`G`, stay with P workers, and Q
  blocks of features go round. On a batch of b rows a visit moves its block by

  .. math::
    w &\leftarrow w - \eta \bigl(x^\top G / b + \lambda_w w\bigr), \\
    V &\leftarrow V - \eta \bigl([x^\top (G \circ A)
      - V \circ (x \circ x)^\top G] / b + \lambda_v V\bigr),

  once for each of the S batches of a worker's rows, and the sums of the next
  pass are added up on the way, with what the blocks have become. Nothing is
  reduced over the workers but, as a pass begins, the loss and its slope in the
  bias, two numbers, by which the bias moves. A step takes the
  :class:`~emc2.separable.fm_cells.Cells` of the data, which say P, Q and S.

  The sums lag behind the features. Modes differ in how:

  ============== ================================================ ========
  mode           sums                                             rotations
  ============== ================================================ ========
  `fused`        frozen in a pass, then up to P - 1 visits old           1
  `two_pass`     frozen in a pass, then exact                            2
  `incremental`  as `fused`, but own steps are followed at once          1
  `jacobi`       exact; one step a pass, on the gradient of all          2
  ============== ================================================ ========

  .. note::
    Frozen sums make a big step of many small ones: the P S = M steps of a block
    in a pass move it about as far as one of size :math:`\eta M`. For the
    squared loss, `fused` and `two_pass` need :math:`\eta M \kappa < 2`, where
    :math:`\kappa` is the largest curvature of the mean loss along a block, or
    they diverge within a few passes; :func:`largest_step` estimates that bound.
    `jacobi` needs :math:`\eta \kappa < 2`. `incremental` bears more, for it
    sees its own steps; so does the logistic loss, whose slopes are bounded. An
    `inner` transformation has bounds of its own. `Info.diverged` tells of a
    pass that began with a loss that is not finite, or ten times the lowest:
    such a run is over.

  .. note::
    The specification's blocks go to worker p + 1 and ours to p - 1, which is
    the same ring in a mirror; it moves the bias as a pass ends, and we as the
    next one begins, where the scores are known anyway. `jacobi` is not in the
    paper: it is full-batch descent on the objective, the same for every P, and
    exchanges the parameters and their gradients.

  Args:
    num_features: D.
    rank: K, at least 0. Static.
    loss: `'squared'`, half the squared error, or `'logistic'`,
      :math:`\log(1 + e^{-y f})` of labels -1 and 1. Static.
    mode: Of the table. Static.
    ridge_linear: :math:`\lambda_w`, at least 0.
    ridge_factors: :math:`\lambda_v`, at least 0.
    ridge: `'all'`: as above. `'active'`: a feature's is weighted by the share
      of the batch's rows that have it, as libFM's descent does. Static.
    step_size: :math:`\eta`, above 0, or a function of the number of finished
      passes, (), int32.
    inner: An optax transformation, or any with its `init` and `update`, which
      moves blocks in place of a plain step; its updates are added as they come,
      so it holds its own learning rate, and `step_size` moves the bias alone.
      Its state, whose leaves belong to one block, travels with it.
    init_std: Standard deviation of the first factors; above 0 where K is, since
      factors that are 0 stay so.
    bias: The first :math:`w_0`; by default the mean label, or the log-odds for
      the logistic loss.
    fit_bias: Whether the bias is moved at the end of each pass. Static.
    mesh: One worker for each device of its axis `ring`; by default P virtual
      workers on one device. Static.
    implementation: Of :func:`emc2.kernels.fm_visit.gradient`. Static.

  Returns:
    `init(key, cells)` and `step(key, state, cells)`; only the first draws.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> cells, _ = fm_cells.cut(
    ...     np.eye(6, dtype=np.float32), np.arange(6.0), loss='squared')
    >>> method = ds_facto(6, 2)
    >>> state = method.init(jax.random.key(0), cells)
    >>> state, info = method.step(jax.random.key(1), state, cells)
    >>> float(info.loss), bool(info.diverged)
    (1.45..., False)

  References:
    Raman, Vishwanathan, `DS-FACTO: Doubly Separable Factorization Machines
    <https://arxiv.org/abs/2004.13940>`_, 2020; Rendle, Factorization Machines,
    2010, for the model.
  """
  settings = _check(
    loss,
    mode,
    ridge_linear,
    ridge_factors,
    ridge,
    step_size,
    inner,
    implementation,
  )
  arguments.check_at_least('num_features', num_features, 1)
  arguments.check_at_least('rank', rank, 0)
  if not (math.isfinite(init_std) and init_std >= 0) or (rank and not init_std):
    raise ValueError(
      'init_std must be finite and above 0, since factors that are 0 stay so, '
      f'got {init_std}.'
    )
  if bias is not None and not math.isfinite(bias):
    raise ValueError(f'bias must be finite, got {bias}.')

  def check(cells):
    _check_cells(cells, num_features, loss, mesh)

  def init_fn(key, cells):
    check(cells)
    return init(
      key,
      cells,
      rank=rank,
      settings=settings,
      init_std=init_std,
      bias=bias,
      mesh=mesh,
    )

  def step_fn(key, state, cells):
    check(cells)
    return step(
      key, state, cells, settings=settings, fit_bias=fit_bias, mesh=mesh
    )

  return algorithm.Algorithm(init_fn, step_fn)


def rotations(
  *,
  loss: str = 'squared',
  mode: str = 'fused',
  ridge_linear: jax.typing.ArrayLike = 1e-4,
  ridge_factors: jax.typing.ArrayLike = 1e-4,
  ridge: str = 'all',
  step_size: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 0.1,
  inner: Any = None,
  implementation: str = 'auto',
) -> tuple[tuple[ring.Rotation, ...], Callable[..., Any]]:
  """A pass of :func:`ds_facto` for any executor, with a bias that is fixed.

  Args:
    loss: Here and below, as there.
    mode: As there.
    ridge_linear: As there.
    ridge_factors: As there.
    ridge: As there.
    step_size: As there.
    inner: As there.
    implementation: As there.

  Returns:
    The rotations of a pass, and what turns a state and its cells into global
    `residents`, `kept` and `blocks`. :func:`from_ring` turns them back.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  settings = _check(
    loss,
    mode,
    ridge_linear,
    ridge_factors,
    ridge,
    step_size,
    inner,
    implementation,
  )

  def finish(resident):
    resident = _swap(resident)
    return resident._replace(multipliers=_multipliers(settings, resident))

  to_global = lambda state, cells: to_ring(state, cells, settings)
  return _parts(settings, finish), to_global


def to_ring(
  state: State, cells: fm_cells.Cells, settings: Settings
) -> tuple[Any, Any, Any]:
  """The global `residents`, `kept` and `blocks` of a state."""
  width, total = len(cells.labels), len(cells.feature_ids)
  spread = lambda x: jnp.broadcast_to(x, (width,))
  owners = jnp.arange(total, dtype=jnp.int32) // (total // width)
  workers = jnp.arange(width, dtype=jnp.int32)
  residents = Resident(
    cells=cells._replace(feature_ids=()),
    home=workers[:, None] == owners[None],
    bias=spread(state.bias),
    multipliers=jnp.zeros_like(state.rest),
    sums=state.sums,
    rest=state.rest,
    next_sums=jnp.zeros_like(state.sums),
    next_rest=jnp.zeros_like(state.rest),
    count=spread(state.count),
  )
  multipliers = jax.vmap(functools.partial(_multipliers, settings))(residents)
  residents = residents._replace(multipliers=multipliers)
  blocks = state.blocks
  if settings.mode == 'jacobi':
    blocks = blocks, jax.tree.map(jnp.zeros_like, blocks[:2])
  return residents, (), blocks


def from_ring(state: State, residents: Resident, blocks: Any) -> State:
  """The state after some passes that began with `state`."""
  return State(
    blocks=blocks if isinstance(blocks, Block) else blocks[0],
    bias=state.bias,
    sums=residents.sums,
    rest=residents.rest,
    lowest=state.lowest,
    count=residents.count[0],
  )


def collect(state: State, layout: fm_cells.Layout) -> Params:
  """The machine that a state holds, on the host."""
  return Params(
    bias=np.asarray(state.bias),
    linear=layout.sort_features(state.blocks.linear),
    factors=layout.sort_features(state.blocks.factors),
  )


def predict(
  params: Params, features: rows_lib.SparseRows | np.ndarray
) -> jax.Array:
  """Scores of rows.

  Args:
    params: Of D features.
    features: (n, any); what lies beyond the first D is ignored, with a warning.

  Returns:
    (n,): predictions for the squared loss, log-odds for the logistic one.
  """
  return _predict(params, *_entries(params, features))


def objective(
  params: Params,
  features: rows_lib.SparseRows | np.ndarray,
  labels: jax.typing.ArrayLike,
  *,
  loss: str = 'squared',
  ridge_linear: jax.typing.ArrayLike = 1e-4,
  ridge_factors: jax.typing.ArrayLike = 1e-4,
) -> jax.Array:
  """What :func:`ds_facto` minimises, exactly; ()."""
  scores = predict(params, features)
  fm_cells.check_labels(np.asarray(labels), loss)
  losses, _ = _losses(loss, scores, jnp.asarray(labels, scores.dtype))
  total = lambda x: jnp.sum(jnp.square(jnp.asarray(x)))
  ridge = ridge_linear * total(params.linear)
  return jnp.mean(losses) + 0.5 * (
    ridge + ridge_factors * total(params.factors)
  )


def largest_step(
  params: Params,
  features: rows_lib.SparseRows | np.ndarray,
  *,
  loss: str = 'squared',
  steps_per_pass: int = 1,
  num_iterations: int = 30,
) -> float:
  r"""The step below which frozen sums are stable, at given parameters.

  That is :math:`2 / (M \kappa)`, with :math:`\kappa` the largest eigenvalue of
  the Gauss-Newton matrix :math:`\frac1N \sum_i \ell''_i \nabla f_i
  \nabla f_i^\top`, from a power iteration. It is that of all features together,
  which no block's exceeds. Factors grow while they learn, and it with them: ask
  again at the end, or stay well below.

  Args:
    params: The parameters.
    features: (N, D).
    loss: 'squared', of curvature 1, or 'logistic', of at most 1/4.
    steps_per_pass: M, batches of all workers together, P S; 1 for `jacobi`.
    num_iterations: Of the power iteration.

  Returns:
    The step size.
  """
  entries = _entries(params, features)
  params = jax.tree.map(jnp.asarray, params)
  own = lambda p: _predict(params._replace(linear=p[0], factors=p[1]), *entries)
  curvature = 1.0 if loss == 'squared' else 0.25

  @jax.jit
  def largest(p):
    _, forward = jax.linearize(own, p)
    _, backward = jax.vjp(own, p)

    def body(_, carry):
      direction, _ = carry
      (image,) = backward(curvature / entries[-1] * forward(direction))
      norm = jnp.sqrt(sum(jnp.sum(x * x) for x in image))
      # Where nothing is curved, any step is stable.
      scale = 1 / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
      return jax.tree.map(lambda x: x * scale, image), norm

    start = jax.tree.map(jnp.ones_like, p)
    return jax.lax.fori_loop(
      0, num_iterations, body, (start, jnp.zeros_like(params.bias))
    )[1]

  found = float(largest((params.linear, params.factors)))
  return 2 / (steps_per_pass * found) if found else math.inf


def _check(
  loss,
  mode,
  ridge_linear,
  ridge_factors,
  ridge,
  step_size,
  inner,
  implementation,
):
  arguments.check_one_of('loss', loss, fm_cells.LOSSES)
  arguments.check_one_of('mode', mode, MODES)
  arguments.check_one_of('ridge', ridge, RIDGES)
  for name, value in (
    ('ridge_linear', ridge_linear),
    ('ridge_factors', ridge_factors),
  ):
    if isinstance(value, (int, float)) and not 0 <= value < math.inf:
      raise ValueError(f'{name} must be finite and at least 0, got {value}.')
  if isinstance(step_size, (int, float)):
    arguments.check_positive('step_size', step_size)
  return Settings(
    loss,
    mode,
    ridge_linear,
    ridge_factors,
    ridge,
    step_size,
    inner,
    implementation,
  )


def _check_cells(cells, num_features, loss, mesh):
  """Refuses cells that the method cannot work on."""
  labels, ids = cells.labels, cells.feature_ids
  if labels.ndim != 3 or ids.ndim != 2 or ids.shape[0] % labels.shape[0]:
    raise ValueError(
      'cells must come from `cut`, with labels (P, S, B) and feature_ids '
      f'(P slots, D_q), got {labels.shape} and {ids.shape}.'
    )
  if not num_features <= ids.size < num_features + ids.shape[0]:
    raise ValueError(
      f'cells must hold {num_features} features, got {ids.shape[0]} blocks of '
      f'{ids.shape[1]}.'
    )
  width = mesh.shape[mesh_lib.RING] if mesh is not None else len(labels)
  if width != len(labels):
    raise ValueError(
      f'cells must be of {width} workers, one for each device of the ring, got '
      f'{len(labels)}.'
    )
  if isinstance(labels, np.ndarray):
    fm_cells.check_labels(labels[np.asarray(cells.present) > 0], loss)


def _add_workers(values, mesh):
  """Sums of what each worker has, (P, n) to (n,), by one collective."""
  if mesh is None:
    return jnp.sum(values, axis=0)
  spec = jax.sharding.PartitionSpec
  add = lambda own: jax.lax.psum(own[0], mesh_lib.RING)
  return jax.shard_map(
    add, mesh=mesh, in_specs=spec(mesh_lib.RING), out_specs=spec()
  )(values)


def _losses(loss, scores, labels):
  """Loss of each row, and its slope in the score."""
  if loss == 'squared':
    error = scores - labels
    return 0.5 * error * error, error
  margins = -labels * scores
  return jax.nn.softplus(margins), -labels * jax.nn.sigmoid(margins)


def _scores(sums, rest):
  """Scores without the bias."""
  return rest + 0.5 * _square(sums)


def _multipliers(settings, resident):
  """The slopes of the rows of a worker; 0 in the padding."""
  cells = resident.cells
  scores = _scores(resident.sums, resident.rest) + resident.bias
  return cells.present * _losses(settings.loss, scores, cells.labels)[1]


def _step_size(settings, count):
  """Of a pass."""
  size = settings.step_size
  return size(count) if callable(size) else size


def _read(tree, place):
  read = jax.lax.dynamic_index_in_dim
  return jax.tree.map(lambda x: read(x, place, keepdims=False), tree)


def _fold(body, carry, batches):
  """One turn for each batch; a single one is no loop."""
  if jax.tree.leaves(batches)[0].shape[0] == 1:
    return body(carry, jax.tree.map(lambda x: x[0], batches))
  scanned = lambda carry, batch: (body(carry, batch), None)
  return jax.lax.scan(scanned, carry, batches)[0]


def _gradients(settings, block, cell, multipliers, sums, size):
  """Mean gradient of a batch of `size` rows, with the ridge."""
  linear, factors = fm_visit.gradient(
    cell,
    multipliers / size,
    sums,
    block.factors,
    implementation=settings.implementation,
  )
  shares = 1.0
  if settings.ridge == 'active':
    shares = fm_visit.count(cell, block.linear.shape[0]) / size
  linear += settings.ridge_linear * (shares * block.linear)
  if settings.ridge == 'active':
    shares = shares[:, None]
  return linear, factors + settings.ridge_factors * (shares * block.factors)


def _move(settings, block, gradients, count):
  """A step of a block."""
  params = block.linear, block.factors
  if settings.inner is None:
    size = jnp.asarray(_step_size(settings, count), block.linear.dtype)
    linear, factors = jax.tree.map(lambda x, g: x - size * g, params, gradients)
    return Block(linear, factors, block.inner)
  updates, inner = settings.inner.update(gradients, block.inner, params)
  add = lambda x, u: x + u.astype(x.dtype)
  linear, factors = jax.tree.map(add, params, updates)
  # A block's types stay, whatever the transformation makes of them.
  inner = jax.tree.map(lambda x, y: x.astype(y.dtype), inner, block.inner)
  return Block(linear, factors, inner)


def _added(settings, resident, linear, squares, factors, number):
  """What parameters of a block add to the sums of all rows of a worker."""
  cells = resident.cells
  shape = cells.labels.shape
  if cells.by_row == ():
    cell = _read(cells.by_feature, number)
    cell = cell.reshape(-1, cell.shape[-1])
  else:
    cell = _read(cells.by_row, number)
  sums, rest = fm_visit.accumulate(
    cell,
    linear,
    squares,
    factors,
    math.prod(shape),
    implementation=settings.implementation,
  )
  return sums.reshape(resident.sums.shape), rest.reshape(shape)


def _square(x):
  """Squared lengths of rows, (..., K) to (...)."""
  if x.shape[-1] > _SHORT:
    return jnp.sum(x * x, axis=-1)
  # Short rows are faster added up by columns.
  squares = [jnp.square(x[..., k]) for k in range(x.shape[-1])]
  return sum(squares, jnp.zeros_like(x, shape=x.shape[:-1]))


def _update(settings, resident, block, number):
  """The steps of a visit with sums as they were when the pass began."""
  cells = resident.cells

  def body(block, batch):
    cell, multipliers, sums, present = batch
    size = jnp.maximum(jnp.sum(present), 1)
    gradients = _gradients(settings, block, cell, multipliers, sums, size)
    return _move(settings, block, gradients, resident.count)

  cell = _read(cells.by_feature, number)
  batches = cell, resident.multipliers, resident.sums, cells.present
  return _fold(body, block, batches)


def _update_and_follow(settings, resident, block, number):
  """The steps of a visit; the sums of the worker's rows follow each of them."""
  cells = resident.cells

  def body(carry, batch):
    block, sums, rest = carry
    cell, labels, present, index = batch
    own_sums, own_rest = _read((sums, rest), index)
    scores = _scores(own_sums, own_rest) + resident.bias
    slopes = _losses(settings.loss, scores, labels)[1]
    size = jnp.maximum(jnp.sum(present), 1)
    gradients = _gradients(
      settings, block, cell, present * slopes, own_sums, size
    )
    new = _move(settings, block, gradients, resident.count)
    sums_change, rest_change = _added(
      settings,
      resident,
      new.linear - block.linear,
      _square(new.factors) - _square(block.factors),
      new.factors - block.factors,
      number,
    )
    return new, sums + sums_change, rest + rest_change

  index = jnp.arange(cells.labels.shape[0], dtype=jnp.int32)
  batches = _read(cells.by_feature, number), cells.labels, cells.present, index
  carry = block, resident.sums, resident.rest
  block, sums, rest = _fold(body, carry, batches)
  return resident._replace(sums=sums, rest=rest), block


def _pull(settings, resident, block, gradients, number):
  """Adds a worker's share of the mean gradient of all rows."""
  cells = resident.cells

  def body(gradients, batch):
    cell, multipliers, sums, present = batch
    size = jnp.maximum(jnp.sum(present), 1)
    own = _gradients(settings, block, cell, multipliers, sums, size)
    share = size / cells.num_rows
    return jax.tree.map(lambda x, y: x + share * y, gradients, own)

  cell = _read(cells.by_feature, number)
  batches = cell, resident.multipliers, resident.sums, cells.present
  return _fold(body, gradients, batches)


def _accumulate(settings, resident, block, number):
  """Adds a block to the sums that hold from the next pass on."""
  squares = _square(block.factors)
  sums, rest = _added(
    settings, resident, block.linear, squares, block.factors, number
  )
  return resident._replace(
    next_sums=resident.next_sums + sums, next_rest=resident.next_rest + rest
  )


def _accumulate_only(settings):
  def visit(resident, own, blocks, number):
    block = blocks if isinstance(blocks, Block) else blocks[0]
    return _accumulate(settings, resident, block, number), own, blocks

  return visit


def _swap(resident):
  """The sums that were added up take the place of the old."""
  return resident._replace(
    sums=resident.next_sums,
    rest=resident.next_rest,
    next_sums=jnp.zeros_like(resident.sums),
    next_rest=jnp.zeros_like(resident.rest),
    count=resident.count + 1,
  )


def _parts(settings, finish):
  """The rotations of a pass, the last of which ends with `finish`."""
  stay = lambda resident: resident

  def update(resident, own, block, number):
    return resident, own, _update(settings, resident, block, number)

  def update_and_add(resident, own, block, number):
    block = _update(settings, resident, block, number)
    return _accumulate(settings, resident, block, number), own, block

  def follow_and_add(resident, own, block, number):
    resident, block = _update_and_follow(settings, resident, block, number)
    return _accumulate(settings, resident, block, number), own, block

  def pull(resident, own, blocks, number):
    block, gradients = blocks
    gradients = _pull(settings, resident, block, gradients, number)
    return resident, own, (block, gradients)

  # At home, where it comes first, a block that all have pulled at moves.
  def move_and_add(resident, own, blocks, number):
    block, gradients = blocks
    home = resident.home[number]
    moved = _move(settings, block, gradients, resident.count)
    block = jax.tree.map(lambda x, y: jnp.where(home, x, y), moved, block)
    gradients = jax.tree.map(lambda g: jnp.where(home, 0, g), gradients)
    resident = _accumulate(settings, resident, block, number)
    return resident, own, (block, gradients)

  visits = {
    'fused': (ring.Rotation(update_and_add, finish),),
    'two_pass': (
      ring.Rotation(update, stay),
      ring.Rotation(_accumulate_only(settings), finish),
    ),
    'incremental': (ring.Rotation(follow_and_add, finish),),
    'jacobi': (ring.Rotation(pull, stay), ring.Rotation(move_and_add, finish)),
  }
  return visits[settings.mode]


def _entries(params, features):
  """Row, feature and value of each entry that params know, and rows."""
  num_features = len(params.linear)
  rows = fm_cells.as_rows(features)
  rows_lib.check_finite('features', rows.values, rows.row_ids)
  known = rows.ids < num_features
  if not known.all():
    warnings.warn(
      f'features beyond the first {num_features} are ignored: '
      f'{np.count_nonzero(~known)} entries.',
      stacklevel=3,
    )
  entries = rows.row_ids[known], rows.ids[known], rows.values[known]
  return *entries, rows.num_rows


def _predict(params, rows, ids, values, num_rows):
  params = jax.tree.map(jnp.asarray, params)
  values = jnp.asarray(values, params.linear.dtype)
  own = values[:, None] * params.factors[ids]
  rest = values * params.linear[ids] - 0.5 * jnp.sum(own * own, axis=1)
  add = lambda x: (
    jnp.zeros_like(x, shape=(num_rows, *x.shape[1:])).at[rows].add(x)
  )
  sums = add(own)
  return params.bias + add(rest) + 0.5 * jnp.sum(sums * sums, axis=1)
