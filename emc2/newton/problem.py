r"""Generalised linear problems: data, weights, and the objective they make.

.. math::
  f(x) = \sum_i w_i\, l(a_i^\top x, y_i) + \frac{\mu}{2} \|x\|^2,
  \qquad \sum_i w_i = 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import arguments
from emc2 import mesh as meshes
from emc2.newton import features as matrices
from emc2.newton import losses


class Problem(NamedTuple):
  """Data of f, made by :func:`make`; rows may stand in another order."""

  features: matrices.Dense | matrices.Sparse  # A, (n, d).
  labels: jax.Array  # (n,): y.
  weights: jax.Array  # (n,): w, which sum to 1; 0 for padding.
  ridge: jax.Array  # (): mu.
  mask: jax.Array  # (d,): 1 for a feature, 0 for padding.


def make(
  features: Any,
  labels: Any,
  *,
  loss: str = 'logistic',
  ridge: float = 0.0,
  sample_weight: Any = None,
  dtype: jax.typing.DTypeLike = np.float32,
  num_row_blocks: int = 1,
  num_column_blocks: int = 1,
  max_width: int = matrices.MAX_WIDTH,
) -> Problem:
  r"""Checks data and lays them out; on the host, once.

  Args:
    features: A: an array (n, d), or a sparse matrix with `indptr`, `indices`,
      `data` and `shape`, as a `scipy.sparse.csr_array` has them.
    labels: (n,): 0 or 1 for 'logistic', counts or rates >= 0 for 'poisson'.
    loss: In :data:`emc2.newton.losses.LOSSES`.
    ridge: :math:`\mu \ge 0`.
    sample_weight: (n,), >= 0 and not all 0; divided by their sum. All alike by
      default.
    dtype: float32 or float64, of all that is computed.
    num_row_blocks: P, devices that the rows will be split over.
    num_column_blocks: Q, devices that the columns will be split over.
    max_width: Of a sparse matrix, as
      :func:`~emc2.newton.features.from_csr` takes it.

  Returns:
    The problem, rows and columns padded to multiples of P and Q.

  Raises:
    ValueError: If an argument is out of its range or they do not fit.

  Examples:
    >>> problem = make(np.eye(2), [0, 1])
    >>> float(objective(problem, jnp.zeros(2), 'logistic'))  # log 2
    0.693147...
  """
  arguments.check_one_of('loss', loss, tuple(losses.LOSSES))
  arguments.check_at_least('ridge', ridge, 0)
  arguments.check_at_least('num_row_blocks', num_row_blocks, 1)
  arguments.check_at_least('num_column_blocks', num_column_blocks, 1)
  arguments.check_at_least('max_width', max_width, 1)
  dtype = np.dtype(dtype)
  if dtype not in (np.float32, np.float64):
    raise ValueError(f'dtype must be float32 or float64, got {dtype}.')
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise ValueError('dtype may be float64 only where jax_enable_x64 is set.')
  is_sparse = hasattr(features, 'indptr')
  if not is_sparse:
    features = np.asarray(features)
  shape = tuple(features.shape)
  if len(shape) != 2 or not min(shape):
    raise ValueError(f'features must have shape (n >= 1, d >= 1), got {shape}.')
  labels = _check_labels(np.asarray(labels), loss, shape[0])
  weights = _check_weights(sample_weight, shape[0])

  if is_sparse:
    matrix, order = matrices.from_csr(
      features,
      dtype=dtype,
      num_row_blocks=num_row_blocks,
      num_column_blocks=num_column_blocks,
      max_width=max_width,
    )
  else:
    matrix, order = matrices.from_dense(
      features,
      dtype=dtype,
      num_row_blocks=num_row_blocks,
      num_column_blocks=num_column_blocks,
    )
  breadth = -(-shape[1] // num_column_blocks) * num_column_blocks
  take = lambda x: jnp.asarray(np.append(x, 0).astype(dtype)[order])
  return Problem(
    features=matrix,
    labels=take(labels),
    weights=take(weights),
    ridge=jnp.asarray(ridge, dtype),
    mask=jnp.asarray((np.arange(breadth) < shape[1]).astype(dtype)),
  )


def _check_labels(labels: np.ndarray, loss: str, num_rows: int) -> np.ndarray:
  """Refuses labels that the loss does not take."""
  if labels.shape != (num_rows,):
    raise ValueError(
      f'labels must have shape ({num_rows},), got {labels.shape}.'
    )
  labels = labels.astype(np.float64)
  is_right = np.isfinite(labels)
  want = 'finite'
  if loss == 'logistic':
    is_right, want = (labels == 0) | (labels == 1), '0 or 1'
    if set(np.unique(labels)) == {-1, 1}:
      want += ', so (labels + 1) / 2 instead of -1 and 1'
  elif loss == 'poisson':
    is_right, want = is_right & (labels >= 0), 'finite and at least 0'
  bad = np.flatnonzero(~is_right)
  if len(bad):
    raise ValueError(
      f'labels must be {want}, got {labels[bad[0]]} in row {bad[0]}.'
    )
  return labels


def _check_weights(weights: Any, num_rows: int) -> np.ndarray:
  """Weights that sum to 1."""
  if weights is None:
    return np.full(num_rows, 1 / num_rows)
  weights = np.asarray(weights, np.float64)
  if weights.shape != (num_rows,):
    raise ValueError(
      f'sample_weight must have shape ({num_rows},), got {weights.shape}.'
    )
  if not (np.all(np.isfinite(weights)) and np.all(weights >= 0)):
    raise ValueError('sample_weight must be finite and at least 0.')
  if not np.any(weights):
    raise ValueError('sample_weight must not be 0 everywhere.')
  return weights / weights.sum()


def objective(problem: Problem, x: jax.Array, loss: str) -> jax.Array:
  """The objective at x.

  Args:
    problem: The data.
    x: (d,), 0 where the mask is.
    loss: Its name.

  Returns:
    ().
  """
  scores = matrices.matvec(problem.features, x)
  values = losses.LOSSES[loss].value(scores, problem.labels)
  return jnp.vdot(problem.weights, values) + 0.5 * problem.ridge * jnp.vdot(
    x, x
  )


def gradient(problem: Problem, x: jax.Array, loss: str) -> jax.Array:
  """The gradient of f at x.

  Args:
    problem: The data.
    x: (d,).
    loss: Its name.

  Returns:
    (d,).
  """
  scores = matrices.matvec(problem.features, x)
  slopes = losses.LOSSES[loss].slope(scores, problem.labels)
  pulled = matrices.rmatvec(problem.features, problem.weights * slopes)
  return pulled + problem.ridge * x


def value_fn(problem: Problem, loss: str) -> Callable[[jax.Array], jax.Array]:
  """The objective as a function of x alone, as optax asks for it.

  Its gradients, and the derivatives of these along a direction, cost one pass
  over the data each, where JAX would turn gathers into scatters.

  Args:
    problem: The data.
    loss: Its name.

  Returns:
    (d,) to (); twice differentiable.

  Examples:
    >>> f = value_fn(make(np.eye(2), [0, 1]), 'logistic')
    >>> jax.grad(f)(jnp.zeros(2))
    Array([ 0.25, -0.25], dtype=float32)
  """

  @jax.custom_jvp
  def slopes(x):
    return gradient(problem, x, loss)

  @slopes.defjvp
  def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    scores = matrices.matvec(problem.features, x)
    curvature = losses.LOSSES[loss].curvature(scores, problem.labels)
    bent, _ = matrices.hvp(problem.features, problem.weights * curvature, dx)
    return slopes(x), bent + problem.ridge * dx

  @jax.custom_jvp
  def value(x):
    return objective(problem, x, loss)

  @value.defjvp
  def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return value(x), jnp.vdot(slopes(x), dx)

  return value


def curvature_bound(
  problem: Problem, loss: str, *, num_steps: int = 50
) -> jax.Array:
  r"""A constant L that the Hessian of f is Lipschitz with.

  .. math:: L = \sup |l'''|\, \lambda_{\max}(A^\top \operatorname{diag}(w) A)
    \max_i \|a_i\|

  The eigenvalue comes from power iterations, so from below.

  Args:
    problem: The data.
    loss: Its name; of a bounded third derivative.
    num_steps: How many iterations, static.

  Returns:
    ().

  Raises:
    ValueError: If the third derivative of the loss has no bound.
  """
  bound = losses.LOSSES[loss].bound
  if not np.isfinite(bound):
    raise ValueError(f'loss {loss!r} has no bound on its third derivative.')
  dtype = problem.mask.dtype
  start = problem.mask * jax.random.normal(
    jax.random.key(0), problem.mask.shape, dtype
  )

  def iterate(_, v):
    v, _ = matrices.hvp(problem.features, problem.weights, v)
    return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(dtype).tiny)

  v = jax.lax.fori_loop(0, num_steps, iterate, start)
  image, _ = matrices.hvp(problem.features, problem.weights, v)
  squares = matrices.matvec(matrices.squared(problem.features), problem.mask)
  longest = jnp.sqrt(jnp.max(jnp.where(problem.weights > 0, squares, 0)))
  return bound * jnp.linalg.norm(image) * longest


def shardings(problem: Problem, mesh: jax.sharding.Mesh) -> Problem:
  """How a problem in blocks lies on a mesh.

  Args:
    problem: Made with as many row blocks as `data` has devices, and as many
      column blocks as `tensor` has.
    mesh: With the axes `data`, `tensor` or both.

  Returns:
    A `PartitionSpec` for each array.

  Raises:
    ValueError: If the blocks do not fit the mesh.
  """
  sizes = {name: size for name, size in mesh.shape.items() if size > 1}
  rows = meshes.DATA if meshes.DATA in mesh.shape else None
  columns = meshes.TENSOR if meshes.TENSOR in mesh.shape else None
  if unknown := set(sizes) - {meshes.DATA, meshes.TENSOR}:
    raise ValueError(
      f'mesh must have axes {meshes.DATA!r} and {meshes.TENSOR!r} only, got '
      f'{sorted(unknown)}.'
    )
  want = mesh.shape.get(meshes.DATA, 1), mesh.shape.get(meshes.TENSOR, 1)
  spec = jax.sharding.PartitionSpec
  blocks = matrices.num_blocks(problem.features)
  if blocks is None:
    n, d = problem.features.array.shape
    fits = n % want[0] == d % want[1] == 0
  else:
    fits = blocks == want
  if not fits:
    raise ValueError(
      f'problem must be made with num_row_blocks={want[0]} and '
      f'num_column_blocks={want[1]} for this mesh.'
    )
  matrix = spec() if blocks == (1, 1) else spec(rows, columns)
  return Problem(
    features=jax.tree.map(lambda _: matrix, problem.features),
    labels=spec(rows),
    weights=spec(rows),
    ridge=spec(),
    mask=spec(columns),
  )


def from_user(problem: Problem, x: jax.typing.ArrayLike) -> jax.Array:
  """Pads a point (number of features,) to (d,)."""
  x = jnp.asarray(x, problem.mask.dtype)
  return jnp.pad(x, (0, problem.mask.size - x.size))


def to_user(problem: Problem, x: jax.Array) -> jax.Array:
  """Drops the padding of a point (d,); not for traced problems."""
  return x[: int(problem.mask.sum())]
