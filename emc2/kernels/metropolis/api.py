"""The one entrance: checks its arguments, then chooses an implementation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from emc2.kernels import lowering
from emc2.kernels.metropolis import pallas_gpu, pallas_tpu, reference

IMPLEMENTATIONS = (
    'auto', 'xla', 'sequential', 'associative', 'pallas_tpu', 'pallas_gpu',
)  # fmt: skip


def _is_known(x):
  """Whether the values can be read here and now."""
  return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


def _check(key, rows, columns, position, start, beta, discard, own_steps):
  """Raises ValueError for what no implementation could take."""
  if key.shape != (2,) or key.dtype != jnp.uint32:
    raise ValueError(
      'key must be two uint32 words, as jax.random.key_data gives, got '
      f'{key.dtype} of shape {key.shape}.'
    )
  for name, array in (('rows', rows), ('columns', columns)):
    if array.ndim != 2 or 0 in array.shape:
      raise ValueError(f'{name} must be a matrix, got shape {array.shape}.')
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f'{name} must be floating, got {array.dtype}.')
  (n, d), (c, width) = rows.shape, columns.shape
  if d != width or rows.dtype != columns.dtype:
    raise ValueError(
      'rows and columns must agree in width and dtype, got '
      f'{rows.dtype}{rows.shape} and {columns.dtype}{columns.shape}.'
    )
  if c % 2 or not 4 <= c <= 65534:
    raise ValueError(
      'columns must be two views of at least two samples, an even number '
      f'from 4 to 65534 (counts are uint16), got {c}.'
    )
  if position.shape != (n,) or not jnp.issubdtype(position.dtype, jnp.integer):
    raise ValueError(
      f'position must be {n} integers, got {position.dtype} of shape '
      f'{position.shape}.'
    )
  if _is_known(position):
    values = np.asarray(position)
    if values.min() < 0 or values.max() >= c:
      raise ValueError(
        f'position must be in [0, {c}), the number of columns, got values '
        f'from {values.min()} to {values.max()}.'
      )
  if start.shape != (n,) or not jnp.issubdtype(start.dtype, jnp.floating):
    raise ValueError(
      f'start must be {n} floating logits, got {start.dtype} of shape '
      f'{start.shape}.'
    )
  if beta.shape or not jnp.issubdtype(beta.dtype, jnp.floating):
    raise ValueError(
      'inverse_temperature must be a floating scalar, got '
      f'{beta.dtype} of shape {beta.shape}.'
    )
  if _is_known(beta) and not (math.isfinite(float(beta)) and float(beta) > 0):
    raise ValueError(
      f'inverse_temperature must be finite and positive, got {beta}.'
    )
  steps = c if own_steps else c - 2
  if not isinstance(discard, int) or not 0 <= discard < steps:
    raise ValueError(
      f'discard must be an integer in [0, {steps}), the number of steps, '
      f'got {discard!r}.'
    )


def _as_varying(args):
  """Makes all vary over what any of them does, as the loops want it."""
  kinds = [jax.typeof(x).manual_axis_type.varying for x in args]
  axes = frozenset().union(*kinds)
  return [
    jax.lax.pcast(x, tuple(sorted(axes - kind)), to='varying')
    if axes - kind
    else x
    for x, kind in zip(args, kinds, strict=True)
  ]


def metropolis(
  key: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  position: jax.Array,
  start: jax.Array,
  *,
  inverse_temperature: jax.typing.ArrayLike,
  discard: int,
  own_steps: bool = False,
  implementation: str = 'auto',
) -> reference.Draws:
  r"""Walks one Metropolis-Hastings chain per row over all columns.

  The chain of row :math:`x` visits the columns :math:`y_0, y_1, \dots` in
  order, its own two left out, and moves from a state of logit :math:`\ell` to
  column :math:`j` when

  .. math::
    \ell < h_j = \beta x^\top y_j - \log u_j, \qquad u_j \sim U(0, 1],

  that is with probability :math:`\min(1, e^{\beta x^\top y_j - \ell})`. A
  rejected step repeats the state. The first `discard` steps are dropped and
  the other R retained, so that `counts.sum(1) + stay == R` in each row.

  The draws depend on the key, the number of the row and the column alone: one
  device and eight, the reference and the kernels draw the same words. (Results
  may still part at a tie, where two orders of summation round otherwise.) No
  gradient flows through any argument. The similarities are never whole in
  memory, save in the form `associative`.

  Args:
    key: (2,), uint32: any two words, fresh for each call.
    rows: (n, d), floating: unit rows, one chain each.
    columns: (c, d), of the dtype of `rows`: unit rows to move to, the first
      views of c / 2 samples and then their second views.
    position: (n,), integer in [0, c): which column each row is; columns
      `position % (c / 2)` and `position % (c / 2) + c / 2` are its own.
    start: (n,), floating: logits of the incoming states at the present
      parameters; -inf where there is none, whose first proposal is accepted.
    inverse_temperature: (): positive and finite; it may be traced.
    discard: steps to drop, from 0 to one less than there are; static.
    own_steps: whether the own columns, too, count as (rejected) steps: c then
      and not c - 2, as in the released code; static.
    implementation: 'auto' takes a kernel where one fits the chip and shape
      and plain JAX elsewhere, chosen when lowering; 'xla' is plain JAX:
      'sequential' on a CPU and 'associative' elsewhere, which also stand by
      name; 'pallas_tpu' or 'pallas_gpu' is that kernel. Static.

  Returns:
    :class:`Draws` of the n chains.

  Raises:
    ValueError: an argument breaks a rule above; the values of `position` and
      `inverse_temperature` are seen only outside of a trace.
    NotImplementedError: the named kernel does not fit the shapes.

  Examples:
    >>> key = jax.random.key_data(jax.random.key(0))
    >>> x = jnp.eye(4)
    >>> draws = metropolis(key, x, x, jnp.arange(4), jnp.full(4, -jnp.inf),
    ...                    inverse_temperature=1e-30, discard=1)
    >>> draws.counts
    Array([[0, 0, 0, 1],
           [0, 0, 1, 0],
           [0, 0, 0, 1],
           [0, 0, 1, 0]], dtype=uint16)

  References:
    Yau, Wai, Raman, Sarkar, Hong, EMC^2: Efficient MCMC Negative Sampling for
    Contrastive Learning with Global Convergence, 2024, algorithm 1,
    https://arxiv.org/abs/2404.10575.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation must be one of {IMPLEMENTATIONS}, got '
      f'{implementation!r}.'
    )
  args = [jnp.asarray(x) for x in (key, rows, columns, position, start)]
  beta = jnp.asarray(inverse_temperature)
  if jnp.issubdtype(beta.dtype, jnp.integer):
    beta = beta.astype(jnp.float32)
  _check(*args, beta, discard, own_steps)
  key, rows, columns, position, start = args
  if rows.dtype == jnp.float64:
    rows, columns = rows.astype(jnp.float32), columns.astype(jnp.float32)
  args = _as_varying(
    [
      jax.lax.stop_gradient(x)
      for x in (
        key,
        rows,
        columns,
        position.astype(jnp.int32),
        start.astype(jnp.float32),
        beta.astype(jnp.float32),
      )
    ]
  )
  settings = dict(discard=discard, own_steps=own_steps)
  others = {}
  if implementation == 'auto':
    if pallas_tpu.misfit(rows, columns) is None:
      others['tpu'] = pallas_tpu.metropolis
    if lowering.is_hopper() and pallas_gpu.misfit(rows, columns) is None:
      others['cuda'] = pallas_gpu.metropolis
  if implementation in ('auto', 'xla'):
    return reference.by_platform(*args, others=others, **settings)
  named = {
    'sequential': reference.sequential,
    'associative': reference.associative,
    'pallas_tpu': pallas_tpu.metropolis,
    'pallas_gpu': pallas_gpu.metropolis,
  }
  return named[implementation](*args, **settings)
