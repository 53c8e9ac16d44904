r"""Multinomial logistic regression on a ring: DS-MLR.

Rows stay with their workers, blocks of classes go round. An auxiliary scalar of
each row stands for its normaliser over all classes; with it the loss is a sum
over pairs of a row and a class.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments, ring
from emc2 import mesh as mesh_lib
from emc2.kernels import softmax_block
from emc2.kernels.softmax_block import reference as kernel
from emc2.separable import mlr_cells, sliced

TINY = 1e-30
REFRESHES = ('fused', 'two_pass', 'floor', 'table', 'sgd')


class State(NamedTuple):
  """Weights by blocks of classes, and the normalisers of rows."""

  weights: jax.Array  # (Q, D, K / Q).
  inner: Any  # Leaves (Q, ...): the inner transformation's state of each block.
  normalizers: jax.Array  # (P, m, n): u = -b.
  table: Any  # (P, Q, m, n): of each block, for `refresh='table'`; else ().
  count: jax.Array  # (), int32: finished passes.


class Info(NamedTuple):
  """What a reader may log of one pass.

  The loss is of the weights as the pass added them up: exact after `two_pass`
  and on one worker; else blocks have moved since by up to P - 1 visits.
  """

  loss: jax.Array  # (): objective (1), the ridge included.


class Settings(NamedTuple):
  """What visits need to know; see :func:`ds_mlr`."""

  num_features: int
  num_classes: int
  ridge: jax.typing.ArrayLike
  refresh: str
  step_size: Any
  inner: Any
  shuffle: bool


class Resident(NamedTuple):
  """What stays on a worker; outside, leaves have a leading axis of workers."""

  batch: mlr_cells.Batch  # Without `classes`.
  key: jax.Array  # Of this worker.
  count: jax.Array  # (), int32: finished passes.
  normalizers: jax.Array  # (m, n): u.
  known: jax.Array  # (m, n): what the last pass added up to.
  known_scores: jax.Array  # (m, n): likewise, the scores of labels.
  table: Any  # (Q, m, n): of each block, or ().
  sums: jax.Array  # (m, n): log-sum-exp of the blocks of this pass so far.
  label_scores: jax.Array  # (m, n): scores of labels, of those so far.


def inverse_sqrt(
  step_size: jax.typing.ArrayLike = 1.0, decay: jax.typing.ArrayLike = 0.5
) -> Callable[[jax.Array], jax.Array]:
  r"""The schedule :math:`\eta_t = \eta_0 / (1 + t)^d` of passes t.

  Examples:
    >>> inverse_sqrt(2.0)(jnp.int32(3))
    Array(1., dtype=float32)
  """

  def schedule(count):
    return step_size / (1 + count.astype(float)) ** decay

  return schedule


def ds_mlr(
  num_features: int,
  num_classes: int,
  *,
  ridge: jax.typing.ArrayLike,
  refresh: str = 'fused',
  step_size: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 1.0,
  inner: Any = None,
  shuffle: bool = True,
  mesh: jax.sharding.Mesh | None = None,
  schedule: ring.schedules.Schedule | None = None,
) -> algorithm.Algorithm:
  r"""Softmax regression whose classes travel while rows stay.

  For N rows :math:`x_i` of labels :math:`y_i`, the objective is

  .. math::
    L(W) = \frac\lambda2 \|W\|^2 + \frac1N \sum_i \Big(
      \log \sum_k e^{\langle w_k, x_i \rangle} - \langle w_{y_i}, x_i \rangle
      \Big) = \min_u F(W, u),

  where :math:`F` has :math:`u_i + \sum_k e^{\langle w_k, x_i \rangle - u_i} -
  1` for the logarithm, and is thus a sum over pairs (i, k). A visit of a block
  of classes on a worker takes, for each of its m minibatches B, a step

  .. math::
    w_k \leftarrow w_k - \eta_t \Big( \lambda w_k + \frac1{|B|} \sum_{i \in B}
      \left(e^{\langle w_k, x_i \rangle - u_i} - [y_i = k]\right) x_i \Big),

  and a step of the algorithm is a pass: each block visits each worker once. On
  the way each worker adds up :math:`\log \sum_k e^{\langle w_k, x_i \rangle}`
  of its rows, which becomes :math:`u_i`.

  It takes the :class:`~emc2.separable.mlr_cells.Batch` of
  :func:`~emc2.separable.mlr_cells.split`, which says P, Q and m.

  .. note::
    Steps with a frozen normaliser diverge, within a pass, where
    :math:`\eta m P` is too large: scores rise and the normaliser does not. The
    modes `floor` and `table` cannot. The paper's own step takes one pair of a
    row and a class, K times as far; ours takes a block's, whose mean over
    minibatches is the same gradient. Blocks go to worker p - 1, the
    specification's to p + 1: the same ring in a mirror.

  Args:
    num_features: D.
    num_classes: K.
    ridge: lambda, on the scale of the mean loss, at least 0; 1 / (C N) of
      scikit-learn's C.
    refresh: How :math:`u` follows. `'fused'`: frozen, from the scores that the
      last pass added up on its way. `'two_pass'`: frozen and exact, by a second
      rotation. `'floor'`: as fused, and at least that of the visiting block.
      `'table'`: the last known part of each block is kept, 4 N Q bytes, and the
      visiting block's is always fresh; the only one that is right where blocks
      do not come in the order of a ring. `'sgd'`: by a gradient step, too, as
      the paper's pairs would; slow, and may overflow.
    step_size: eta, or a function of the finished passes; without `inner`.
    inner: An `optax.GradientTransformation` that takes the gradient of a block
      and its weights (D, K / Q) instead of the plain step. Its state travels
      with the block.
    shuffle: Whether minibatches come in random order.
    mesh: Has the axis `ring` of P devices; None for P virtual workers on one.
    schedule: Another order of blocks, where there is one on each worker.

  Returns:
    `init(key, batch)` and `step(key, state, batch)`.

  Raises:
    ValueError: If an argument breaks its rule.

  Examples:
    >>> features, labels = np.eye(6, dtype=np.float32), np.arange(6) % 3
    >>> batch, layout = mlr_cells.split(features, labels, 3, num_workers=2)
    >>> method = ds_mlr(6, 3, ridge=1e-3)
    >>> state = method.init(jax.random.key(0), batch)
    >>> for _ in range(10):
    ...   state, info = method.step(jax.random.key(1), state, batch)
    >>> best = predict(state.weights, batch).classes
    >>> layout.sort_rows(best)[:, 0]
    array([0, 1, 2, 0, 1, 2], dtype=int32)

  References:
    Raman, Srinivasan, Matsushima, Zhang, Yun, Vishwanathan, `Scaling
    Multinomial Logistic Regression via Hybrid Parallelism
    <https://arxiv.org/abs/1604.04706>`_, 2019.
  """
  settings = _check(
    num_features, num_classes, ridge, refresh, step_size, inner, shuffle
  )

  def init_fn(key, batch):
    _check_batch(batch, settings, mesh)
    return init(key, batch, settings=settings)

  def step_fn(key, state, batch):
    _check_batch(batch, settings, mesh)
    return step(
      key, state, batch, settings=settings, mesh=mesh, schedule=schedule
    )

  return algorithm.Algorithm(init_fn, step_fn)


def init(
  key: jax.Array, batch: mlr_cells.Batch, *, settings: Settings
) -> State:
  """Weights 0, with which normalisers log K are exact; see :func:`ds_mlr`."""
  del key
  num_blocks, width = batch.classes.shape
  dtype = batch.weights.dtype
  like = jnp.zeros_like(batch.classes[:, None], dtype)
  weights = jnp.broadcast_to(like, (num_blocks, settings.num_features, width))
  zeros, table = jnp.zeros_like(batch.weights), ()
  if settings.refresh == 'table':
    sizes = jnp.asarray(batch.sizes).astype(dtype)
    table = zeros[:, None] + jnp.log(sizes)[:, :, None, None]
  inner = ()
  if settings.inner is not None:
    inner = jax.vmap(settings.inner.init)(weights)
  return State(
    weights=weights,
    inner=inner,
    normalizers=zeros + math.log(settings.num_classes),
    table=table,
    count=jnp.zeros([], jnp.int32),
  )


def step(
  key: jax.Array,
  state: State,
  batch: mlr_cells.Batch,
  *,
  settings: Settings,
  mesh: jax.sharding.Mesh | None = None,
  schedule: ring.schedules.Schedule | None = None,
) -> tuple[State, Info]:
  """One pass: all blocks go round, once or twice; see :func:`ds_mlr`."""
  given = to_ring(key, state, batch)
  parts = _rotations(settings)
  residents, _, blocks = ring.run(parts, *given, mesh, schedule=schedule)
  # All workers have counted this pass; to ask one would be a message.
  count = state.count + 1
  state = from_ring(residents, blocks)._replace(count=count)
  excess = batch.weights * (residents.known - residents.known_scores)
  loss = jnp.sum(excess) / jnp.sum(batch.weights)
  loss += 0.5 * settings.ridge * jnp.sum(state.weights**2)
  return state, Info(loss=loss)


def shardings() -> State:
  """How a state is split over a ring, as a tree of `PartitionSpec`."""
  spec = jax.sharding.PartitionSpec
  return State(
    weights=spec(mesh_lib.RING),
    inner=spec(mesh_lib.RING),
    normalizers=spec(mesh_lib.RING),
    table=spec(mesh_lib.RING),
    count=spec(),
  )


def rotations(
  num_features: int,
  num_classes: int,
  *,
  ridge: jax.typing.ArrayLike,
  refresh: str = 'fused',
  step_size: jax.typing.ArrayLike | Callable[[jax.Array], Any] = 1.0,
  inner: Any = None,
  shuffle: bool = True,
) -> tuple[ring.Rotation, ...]:
  """A pass of :func:`ds_mlr`, for any executor of :mod:`emc2.ring`.

  :func:`to_ring` makes what executors take, :func:`from_ring` turns it back.

  Args:
    num_features: D, as there, and the others too.
    num_classes: K.
    ridge: lambda.
    refresh: Of the normalisers.
    step_size: eta.
    inner: The inner transformation.
    shuffle: Whether minibatches come in random order.

  Returns:
    One rotation; two for `two_pass`.

  Raises:
    ValueError: If an argument breaks its rule.
  """
  return _rotations(
    _check(num_features, num_classes, ridge, refresh, step_size, inner, shuffle)
  )


def to_ring(
  key: jax.Array, state: State, batch: mlr_cells.Batch
) -> tuple[Resident, tuple[()], tuple[jax.Array, Any]]:
  """The global `residents`, `kept` and `blocks` of a state."""
  workers = jnp.arange(len(batch.labels), dtype=jnp.int32)
  residents = Resident(
    batch=jax.tree.map(jnp.asarray, batch._replace(classes=())),
    key=jax.vmap(lambda worker: jax.random.fold_in(key, worker))(workers),
    count=jnp.broadcast_to(state.count, workers.shape),
    normalizers=state.normalizers,
    known=state.normalizers,
    known_scores=jnp.zeros_like(state.normalizers),
    table=state.table,
    sums=jnp.full_like(state.normalizers, -jnp.inf),
    label_scores=jnp.zeros_like(state.normalizers),
  )
  return residents, (), (state.weights, state.inner)


def from_ring(residents: Resident, blocks: tuple[jax.Array, Any]) -> State:
  """The state after passes by an executor."""
  return State(
    weights=blocks[0],
    inner=blocks[1],
    normalizers=residents.normalizers,
    table=residents.table,
    count=residents.count[0],
  )


def objective(
  weights: jax.Array,
  batch: mlr_cells.Batch,
  *,
  ridge: jax.typing.ArrayLike,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """L of :func:`ds_mlr`, exact, for any solver: blocks go round twice.

  The first time rows learn their normalisers, the second blocks collect their
  gradients from all workers. Where one worker holds all classes in one block,
  both are made in one go. A value without a gradient takes one rotation.

  Args:
    weights: (Q, D, K / Q).
    batch: The rows.
    ridge: lambda.
    mesh: Has the axis `ring` of P devices; None for P virtual workers on one.

  Returns:
    (); differentiable once with respect to the weights.

  Examples:
    >>> batch, _ = mlr_cells.split(np.eye(3, dtype=np.float32), np.arange(3), 3)
    >>> objective(jnp.zeros((1, 3, 3)), batch, ridge=0.1)
    Array(1.0986123, dtype=float32)
  """

  @jax.custom_vjp
  def loss(weights):
    return _evaluate(weights, batch, ridge, mesh, with_gradient=False)[0]

  def forward(weights):
    return _evaluate(weights, batch, ridge, mesh, with_gradient=True)

  loss.defvjp(forward, lambda gradient, slope: (slope * gradient,))
  return loss(weights)


def _evaluate(weights, batch, ridge, mesh, *, with_gradient):
  """The objective, and its gradient or nothing."""
  total = jnp.sum(batch.weights)
  zeros = jnp.zeros_like(batch.weights)
  state = State(weights, (), zeros, (), jnp.zeros([], jnp.int32))
  residents, _, blocks = to_ring(jax.random.key(0), state, batch)
  alone = len(batch.classes) == 1 and with_gradient
  finish = functools.partial(_finish, True)
  gather = ring.Rotation(_gather, finish)
  collect = ring.Rotation(functools.partial(_collect, alone), finish)
  if alone:
    parts = (collect,)
  else:
    parts = (gather, collect) if with_gradient else (gather,)
  gradient = jnp.zeros_like(weights) if with_gradient else ()
  given = residents, (), (blocks[0], gradient)
  residents, _, (_, gradient) = ring.run(parts, *given, mesh)
  excess = batch.weights * (residents.known - residents.known_scores)
  loss = jnp.sum(excess) / total + 0.5 * ridge * jnp.sum(weights**2)
  if with_gradient:
    gradient = gradient / total + ridge * weights
  return loss, gradient


def _collect(alone, resident, own, block, number):
  """Adds the gradient that a worker's rows give to a block."""
  batch, num_valid = resident.batch, resident.batch.sizes[number]
  weights, gradient = block
  first = number * weights.shape[1]

  def visit(gradient, place):
    features, labels, row_weights = _minibatch(batch, place)
    others = resident.normalizers[place]
    gradient, found = _compare(
      gradient,
      features,
      weights,
      jnp.full_like(others, -jnp.inf) if alone else others,
      labels - first,
      row_weights,
      num_valid,
      'joint' if alone else 'frozen',
    )
    return gradient, found

  places = jnp.arange(len(batch.labels), dtype=jnp.int32)
  gradient, found = jax.lax.scan(visit, gradient, places)
  resident = resident._replace(
    sums=jnp.logaddexp(resident.sums, found.logsumexp),
    label_scores=resident.label_scores + found.label_scores,
  )
  return resident, own, (weights, gradient)


class Ranked(NamedTuple):
  """The best classes of each row."""

  scores: jax.Array  # (P, m, n, k), falling.
  classes: jax.Array  # (P, m, n, k), int32: classes of the data.


def predict(
  weights: jax.Array,
  batch: mlr_cells.Batch,
  *,
  k: int = 1,
  mesh: jax.sharding.Mesh | None = None,
) -> Ranked:
  """The k classes of highest score, by one rotation.

  Args:
    weights: (Q, D, K / Q).
    batch: Rows, split like those of the training; labels do not matter.
    k: At least 1 and at most K. Static.
    mesh: As in :func:`ds_mlr`.

  Returns:
    Scores and classes, which :meth:`~emc2.separable.mlr_cells.Layout.sort_rows`
    puts in the order of the data.

  Raises:
    ValueError: If k does not fit.
  """
  if not 1 <= k <= batch.classes.size:
    raise ValueError(f'k must lie in [1, {batch.classes.size}], got {k}.')
  shape = *batch.labels.shape, k
  best = Ranked(
    jnp.full_like(batch.weights, -jnp.inf, shape=shape),
    jnp.full_like(batch.labels, -1, shape=shape),
  )
  batch = jax.tree.map(jnp.asarray, batch)
  batch, classes = batch._replace(classes=()), batch.classes
  width = classes.shape[1]

  def visit(resident, own, block, number):
    del number
    batch, best = resident
    weights, classes = block

    def rank(_, now):
      place, best = now
      features, _, _ = _minibatch(batch, place)
      scores = _scores(features, weights, len(best.scores))
      scores = jnp.where((classes >= 0)[None], scores, -jnp.inf)
      scores, chosen = jax.lax.top_k(scores, min(k, width))
      scores = jnp.concatenate([best.scores, scores], axis=1)
      found = jnp.concatenate([best.classes, classes[chosen]], axis=1)
      scores, chosen = jax.lax.top_k(scores, k)
      return None, Ranked(scores, jnp.take_along_axis(found, chosen, axis=1))

    places = jnp.arange(len(batch.labels), dtype=jnp.int32)
    best = jax.lax.scan(rank, None, (places, best))[1]
    return (batch, best), own, block

  parts = (ring.Rotation(visit, lambda resident: resident),)
  given = (batch, best), (), (weights, classes)
  residents, _, _ = ring.run(parts, *given, mesh)
  return residents[1]


def f_scores(
  labels: jax.Array, predicted: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
  """Micro- and macro-averaged F1.

  Args:
    labels: (N,), int32.
    predicted: (N,), int32.
    num_classes: K.

  Returns:
    The micro average, which is the accuracy where each row has one label, and
    the mean over the classes that are among labels or predictions.

  Examples:
    >>> f_scores(jnp.array([0, 0, 1]), jnp.array([0, 1, 1]), 3)
    (Array(0.6666667, dtype=float32), Array(0.6666667, dtype=float32))
  """
  count = lambda x, w: jax.ops.segment_sum(w, x, num_classes)
  hits = (labels == predicted).astype(float)
  both = count(labels, jnp.ones_like(hits)) + count(
    predicted, jnp.ones_like(hits)
  )
  scores = 2 * count(labels, hits) / jnp.maximum(both, 1)
  return jnp.mean(hits), jnp.sum(scores) / jnp.sum(both > 0, dtype=float)


def _rotations(settings):
  update = functools.partial(_update, settings)
  finish = functools.partial(_finish, settings.refresh != 'sgd')
  if settings.refresh == 'two_pass':
    frozen = ring.Rotation(update, lambda resident: resident)
    return frozen, ring.Rotation(_gather, finish)

  def visit(resident, own, block, number):
    return _gather(*update(resident, own, block, number), number)

  return (ring.Rotation(visit, finish),)


def _update(settings, resident, own, block, number):
  """The steps of a block on all minibatches of a worker."""
  batch, num_valid = resident.batch, resident.batch.sizes[number]
  first = number * block[0].shape[1]
  normalizer = {'floor': 'floor', 'table': 'joint'}.get(
    settings.refresh, 'frozen'
  )

  def visit(carry, place):
    weights, inner, normalizers, table = carry
    features, labels, row_weights = _minibatch(batch, place)
    given = normalizers[place]
    if settings.refresh == 'table':
      others = table[:, place].at[number].set(-jnp.inf)
      given = jax.nn.logsumexp(others, axis=0)
    gradient, found = _compare(
      jnp.zeros_like(weights),
      features,
      weights,
      given,
      labels - first,
      row_weights,
      num_valid,
      normalizer,
    )
    if settings.refresh == 'floor':
      floor = jnp.maximum(given, found.logsumexp)
      normalizers = normalizers.at[place].set(floor)
    elif settings.refresh == 'table':
      table = table.at[number, place].set(found.logsumexp)
    elif settings.refresh == 'sgd':
      size = jnp.asarray(_step_size(settings, resident.count), given.dtype)
      share = num_valid.astype(given.dtype) / settings.num_classes
      slope = jnp.exp(found.logsumexp - given) - share
      normalizers = normalizers.at[place].set(given + size * slope)
    total = jnp.sum(row_weights)
    mean = gradient / jnp.maximum(total, TINY)
    # A minibatch of padding alone has no say, not even for the ridge.
    gradient = jnp.where(total > 0, mean + settings.ridge * weights, 0)
    if settings.inner is None:
      size = jnp.asarray(_step_size(settings, resident.count), weights.dtype)
      weights -= size * gradient
    else:
      updates, inner = settings.inner.update(gradient, inner, weights)
      weights = jax.tree.map(jnp.add, weights, updates)
    return (weights, inner, normalizers, table), None

  order = _order(settings, resident, number)
  carry = *block, resident.normalizers, resident.table
  (*block, normalizers, table), _ = jax.lax.scan(visit, carry, order)
  resident = resident._replace(normalizers=normalizers, table=table)
  return resident, own, tuple(block)


def _gather(resident, own, block, number):
  """Adds the scores of a block as it is now to what its rows know."""
  batch, num_valid = resident.batch, resident.batch.sizes[number]
  first = number * block[0].shape[1]

  def visit(_, place):
    features, labels, _ = _minibatch(batch, place)
    return None, _score(features, block[0], labels - first, num_valid)

  places = jnp.arange(len(batch.labels), dtype=jnp.int32)
  scored = jax.lax.scan(visit, None, places)[1]
  table = resident.table
  if isinstance(table, jax.Array):
    table = table.at[number].set(scored.logsumexp)
  resident = resident._replace(
    sums=jnp.logaddexp(resident.sums, scored.logsumexp),
    label_scores=resident.label_scores + scored.label_scores,
    table=table,
  )
  return resident, own, block


def _finish(takes_effect, resident):
  """What was added up is known, and the next pass adds up anew."""
  return resident._replace(
    count=resident.count + 1,
    normalizers=resident.sums if takes_effect else resident.normalizers,
    known=resident.sums,
    sums=jnp.full_like(resident.sums, -jnp.inf),
    known_scores=resident.label_scores,
    label_scores=jnp.zeros_like(resident.label_scores),
  )


def _order(settings, resident, number):
  """In which minibatches are visited; each visit has its own."""
  num_minibatches = len(resident.batch.labels)
  if not settings.shuffle or num_minibatches == 1:
    return jnp.arange(num_minibatches, dtype=jnp.int32)
  key = jax.random.fold_in(resident.key, resident.count)
  bits = jax.random.bits(jax.random.fold_in(key, number), (num_minibatches,))
  return jnp.argsort(bits).astype(jnp.int32)


def _minibatch(batch, place):
  return jax.tree.map(
    lambda x: x[place],
    (batch.features, batch.labels, batch.weights),
  )


def _compare(
  total,
  features,
  weights,
  normalizers,
  labels,
  row_weights,
  num_valid,
  normalizer,
):
  """Adds the gradient that some rows give a block; what they are told."""
  given = normalizers, labels, row_weights, num_valid
  if not isinstance(features, mlr_cells.SparseFeatures):
    found = softmax_block.softmax_block(
      features, weights, *given, normalizer=normalizer
    )
    scored = softmax_block.Scored(found.logsumexp, found.label_scores)
    return total + found.gradient, scored
  scores = _scores(features, weights, len(labels))
  errors, scored = kernel.compare(scores, *given, normalizer)
  return sliced.add_matmul(total, features.columns, errors), scored


def _score(features, weights, labels, num_valid):
  if not isinstance(features, mlr_cells.SparseFeatures):
    return softmax_block.score_block(features, weights, labels, num_valid)
  scores = _scores(features, weights, len(labels))
  return kernel.summarize(scores, labels, num_valid)[1]


def _scores(features, weights, num_rows):
  """(n, K / Q)."""
  if not isinstance(features, mlr_cells.SparseFeatures):
    return features @ weights
  zeros = jnp.zeros_like(weights, shape=(num_rows, weights.shape[1]))
  return sliced.add_matmul(zeros, features.rows, weights)


def _step_size(settings, count):
  size = settings.step_size
  return size(count) if callable(size) else size


def _check(
  num_features, num_classes, ridge, refresh, step_size, inner, shuffle
):
  """Settings that make sense."""
  arguments.check_at_least('num_features', num_features, 1)
  arguments.check_at_least('num_classes', num_classes, 1)
  arguments.check_one_of('refresh', refresh, REFRESHES)
  known = lambda x: not isinstance(x, jax.core.Tracer) and not callable(x)
  if known(ridge) and not (math.isfinite(ridge) and ridge >= 0):
    raise ValueError(f'ridge must be finite and at least 0, got {ridge}.')
  if known(step_size):
    arguments.check_positive('step_size', step_size)
  if inner is not None and not hasattr(inner, 'update'):
    raise ValueError(
      f'inner must be a gradient transformation, got {type(inner).__name__}.'
    )
  return Settings(
    num_features, num_classes, ridge, refresh, step_size, inner, shuffle
  )


def _check_batch(batch, settings, mesh):
  """Refuses a batch of other sizes, or one that does not fit a mesh."""
  num_classes = settings.num_classes
  width, num_blocks = len(batch.labels), len(batch.classes)
  if batch.labels.ndim != 3 or num_blocks % width:
    raise ValueError(
      'batch must come from `split`, with labels (workers, minibatches, rows), '
      f'got {batch.labels.shape} and {num_blocks} blocks.'
    )
  if not 0 <= batch.classes.size - num_classes < num_blocks:
    raise ValueError(
      f'batch must be of {num_classes} classes, got blocks of shape '
      f'{batch.classes.shape}.'
    )
  is_sparse = isinstance(batch.features, mlr_cells.SparseFeatures)
  if not is_sparse and batch.features.shape[-1] != settings.num_features:
    raise ValueError(
      f'batch must be of {settings.num_features} features, got '
      f'{batch.features.shape[-1]}.'
    )
  if mesh is not None and mesh.shape.get(mesh_lib.RING) != width:
    raise ValueError(
      f'mesh must have an axis {mesh_lib.RING!r} of {width} devices, one for '
      f'each worker of the batch, got {dict(mesh.shape)}.'
    )
