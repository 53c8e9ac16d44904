"""Memories of what codes lose, to be added to what is coded next.

With the gradient g, what is carried to the code is p = g + (feedback), and
what the code sends of it D = Q(p). A memory of the residuals p - D makes the
sums of what was sent catch up with the sums of gradients.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2.compression import compressor, sketch


class Memory(NamedTuple):
  """A worker's memory for one array, as data: write these functions for one.

  A state is a pytree of arrays, () if there is nothing to keep. Where all of
  its floats are 0 it must feed nothing back.

  Attributes:
    name: What it is called in figures and errors.
    begin: `(shape, dtype, key) -> state`, of which no feedback comes. The key
      is the same on all workers.
    carry: `(state, gradient) -> carried`: the gradient with the feedback.
    write: `(state, carried, sent, gradient, key) -> state`, where `sent` is
      what the code made of `carried`. The key is the worker's own.
    nbytes: `shape -> int`: what it costs a worker for a float32 array.
  """

  name: str
  begin: Callable[[Sequence[int], Any, jax.Array], Any]
  carry: Callable[[Any, jax.Array], jax.Array]
  write: Callable[
    [Any, jax.Array, jax.Array, jax.Array, jax.Array],
    Any,
  ]
  nbytes: Callable[[Sequence[int]], int]


class Coded(NamedTuple):
  """A residual that a code holds.

  Attributes:
    state: The state of the code.
    payload: What it decompresses the residual from.
  """

  state: Any
  payload: Any


class Sketched(NamedTuple):
  """A sum of lost gradients that a count sketch holds.

  Attributes:
    table: (n, W): the sketch; differs between workers.
    hashes: The columns' buckets and signs; the same on all workers for ever.
  """

  table: jax.Array
  hashes: sketch.Hashes


class TwoLevels(NamedTuple):
  """A residual, and what its code loses.

  Attributes:
    first: The residual.
    second: The residual of that, for the next time.
  """

  first: Coded
  second: Coded


def none() -> Memory:
  """Forgets what is lost."""
  return Memory(
    name='none',
    begin=lambda shape, dtype, key: (),
    carry=lambda state, gradient: gradient,
    write=lambda state, carried, sent, gradient, key: (),
    nbytes=lambda shape: 0,
  )


def full() -> Memory:
  """Keeps the residual as it is: error feedback (EFSGD).

  Examples:
    >>> memory = full()
    >>> state = memory.begin((2,), jnp.float32, jax.random.key(0))
    >>> g, key = jnp.array([3.0, 1.0]), jax.random.key(1)
    >>> sent = jnp.array([3.0, 0.0])
    >>> state = memory.write(state, memory.carry(state, g), sent, g, key)
    >>> memory.carry(state, g)
    Array([3., 2.], dtype=float32)

  References:
    Karimireddy, Rebjock, Stich and Jaggi, `Error Feedback Fixes SignSGD and
    other Gradient Compression Schemes <https://arxiv.org/abs/1901.09847>`_,
    2019, Algorithm 2.
  """
  return Memory(
    name='full',
    begin=lambda shape, dtype, key: jnp.zeros(shape, dtype),
    carry=lambda state, gradient: gradient + state,
    write=lambda state, carried, sent, gradient, key: carried - sent,
    nbytes=lambda shape: 4 * math.prod(shape),
  )


def partial(retention: float = 0.9) -> Memory:
  r"""Keeps the sum of what was lost, and feeds a part of it back.

  .. math::
    p = g + (1 - \beta) e, \quad e \leftarrow \beta e + (p - Q(p)) = e + g -
    Q(p).

  Args:
    retention: :math:`\beta`, in [0, 1); at 0 it is :func:`full`.

  Returns:
    The memory.

  Raises:
    ValueError: If `retention` is out of range.

  References:
    Li, Zheng, Raman, Shrivastava and Giannakis, `Contractive Error Feedback for
    Gradient Compression <https://arxiv.org/abs/2312.08538>`_, 2023: iConEF-v1,
    here without the sketch.
  """
  _check_retention(retention)
  return Memory(
    name=f'partial {retention:g}',
    begin=lambda shape, dtype, key: jnp.zeros(shape, dtype),
    carry=lambda state, gradient: gradient + (1 - retention) * state,
    write=lambda state, carried, sent, gradient, key: state + (gradient - sent),
    nbytes=lambda shape: 4 * math.prod(shape),
  )


def coded(code: compressor.Compressor) -> Memory:
  r"""Keeps a code of the residual: contractive error feedback (ConEF).

  .. math:: p = g + e, \quad e \leftarrow C(p - Q(p)).

  With the largest entries as code, `sparse.top_k(fraction=0.2)`, this is
  hEFSGD; 8-bit blocks and bfloat16 track :func:`full` closely.

  .. note::
    An unbiased code of variance :math:`\theta` keeps the residual bounded if
    :math:`(1 + \theta) (1 - \delta) < 1` for the :math:`\delta` of the code on
    the wire. A sketch of many entries per bucket is far from that, and the
    residual grows without bound: for sketches take :func:`sketched`. A code
    with a :math:`\delta` of its own is always bounded, but what it drops is
    lost for good.

  Args:
    code: :math:`C`, any code.

  Returns:
    The memory.

  References:
    Li, Zheng, Raman, Shrivastava and Giannakis, `Contractive Error Feedback for
    Gradient Compression <https://arxiv.org/abs/2312.08538>`_, 2023: ConEF.
  """
  return Memory(
    name=f'coded by {code.name}',
    begin=lambda shape, dtype, key: _begin(code, shape, dtype, key),
    carry=lambda state, gradient: gradient + _decode(code, state, gradient),
    write=lambda state, carried, sent, gradient, key: _encode(
      code, state, carried - sent, key
    ),
    nbytes=lambda shape: _nbytes(code, shape),
  )


def sketched(
  size: float = 0.2,
  retention: float = 0.9,
  *,
  hashing: str = 'uniform',
  dtype: jax.typing.DTypeLike | None = None,
) -> Memory:
  r"""Keeps a count sketch of the sum of what was lost (iConEF).

  For a gradient as matrix (n, m), a sketch :math:`S` of W columns and its
  query :math:`U = S^\top`,

  .. math::
    p = g + (1 - \beta) U(s), \quad s \leftarrow s + S(g - Q(p)).

  The increment is added in the space of the sketch, so that :math:`s` is the
  sketch of the whole sum. Sketching what was queried adds the noise of the
  collisions again at each step, and diverges.

  .. note::
    If Q is an orthogonal projection, the feedback is non-expansive while
    :math:`(1 - \beta) \max_b n_b \leq 2`, for buckets of :math:`n_b` columns;
    beyond, it may diverge. A warning says so where the hashes are known when
    the state is made, which is not so inside `jit` for uniform hashing.

  Args:
    size: W / m, in (0, 1]: W = max(1, int(size m)), static.
    retention: :math:`\beta`, in [0, 1).
    hashing: 'uniform' for independent buckets, or 'balanced' for equal loads.
    dtype: Of the table; that of the gradient by default.

  Returns:
    The memory. Beside the table each worker holds the hashes, 5 m bytes.

  Raises:
    ValueError: If `size` or `retention` is out of range, or `hashing` unknown.

  References:
    Li, Zheng, Raman, Shrivastava and Giannakis, `Contractive Error Feedback for
    Gradient Compression <https://arxiv.org/abs/2312.08538>`_, 2023: iConEF, as
    the authors' code runs it.
  """
  _check_retention(retention)
  code = sketch.count_sketch(size, hashing=hashing)
  itemsize = 4 if dtype is None else jnp.dtype(dtype).itemsize

  def begin(shape, array_dtype, key):
    hashes = code.init(shape, array_dtype, key)
    _warn_if_unstable(shape, size, hashing, retention, hashes)
    rows, width = sketch.table_shape(shape, size)
    return Sketched(jnp.zeros((rows, width), dtype or array_dtype), hashes)

  def carry(state, gradient):
    like = jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
    table = state.table.astype(gradient.dtype)
    return gradient + (1 - retention) * code.decompress(
      state.hashes, table, like
    )

  def write(state, carried, sent, gradient, key):
    del carried
    change, _ = code.compress(state.hashes, gradient - sent, key)
    table = state.table.astype(change.dtype) + change
    return state._replace(table=table.astype(state.table.dtype))

  return Memory(
    name=f'sketched {size:g}, {retention:g}',
    begin=begin,
    carry=carry,
    write=write,
    nbytes=lambda shape: itemsize * math.prod(sketch.table_shape(shape, size)),
  )


def two_level(
  first: compressor.Compressor, second: compressor.Compressor
) -> Memory:
  r"""Keeps a code of the residual, and a code of what that loses.

  .. math::
    p = g + e_1, \quad r = p - Q(p) + e_2, \quad e_1 \leftarrow C_1(r), \quad
    e_2 \leftarrow C_2(r - e_1).

  With :math:`C_2` the identity nothing is lost; with a :math:`C_2` that drops
  all it is :func:`coded`.

  Args:
    first: :math:`C_1`, any code.
    second: :math:`C_2`, any code.

  Returns:
    The memory.

  References:
    Li, Zheng, Raman, Shrivastava and Giannakis, `Contractive Error Feedback for
    Gradient Compression <https://arxiv.org/abs/2312.08538>`_, 2023: iConEF-v2.
  """

  def begin(shape, dtype, key):
    keys = jax.random.split(key)
    return TwoLevels(
      _begin(first, shape, dtype, keys[0]),
      _begin(second, shape, dtype, keys[1]),
    )

  def write(state, carried, sent, gradient, key):
    del gradient
    keys = jax.random.split(key)
    residual = carried - sent + _decode(second, state.second, carried)
    kept = _encode(first, state.first, residual, keys[0])
    lost = residual - _decode(first, kept, residual)
    return TwoLevels(kept, _encode(second, state.second, lost, keys[1]))

  return Memory(
    name=f'coded by {first.name}, then {second.name}',
    begin=begin,
    carry=lambda state, gradient: (
      gradient + _decode(first, state.first, gradient)
    ),
    write=write,
    nbytes=lambda shape: _nbytes(first, shape) + _nbytes(second, shape),
  )


def _begin(code, shape, dtype, key) -> Coded:
  """The code of zeros."""
  state = code.init(shape, dtype, key)
  payload, state = code.compress(state, jnp.zeros(shape, dtype), key)
  return Coded(state, payload)


def _decode(code, memory: Coded, like: jax.Array) -> jax.Array:
  like = jax.ShapeDtypeStruct(like.shape, like.dtype)
  return code.decompress(memory.state, memory.payload, like)


def _encode(code, memory: Coded, residual, key) -> Coded:
  payload, state = code.compress(memory.state, residual, key)
  return Coded(state, payload)


def _nbytes(code, shape) -> int:
  return compressor.wire_bits(code, shape) // 8


def _check_retention(retention: float) -> None:
  if not 0 <= retention < 1:
    raise ValueError(f'retention must be in [0, 1), got {retention}.')


def _warn_if_unstable(shape, size, hashing, retention, hashes) -> None:
  """Says when feedback through the fullest bucket overshoots."""
  columns = sketch.matrix_shape(shape)[1]
  width = sketch.table_shape(shape, size)[1]
  if hashing == 'balanced':
    load = -(-columns // width)
  elif isinstance(hashes.buckets, jax.core.Tracer | jax.ShapeDtypeStruct):
    return
  else:
    load = int(np.bincount(np.asarray(hashes.buckets)).max())
  if (1 - retention) * load > 2:
    warnings.warn(
      f'retention must be at least {1 - 2 / load:.3g} for buckets of up to '
      f'{load} columns in a sketch of shape {tuple(shape)}, or the memory may '
      f'diverge, got {retention}; a larger size or balanced hashing has '
      'smaller buckets.',
      stacklevel=3,
    )
