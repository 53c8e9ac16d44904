"""A block of classes visits some rows: a Pallas kernel for TPU.

The classes of a group, their weights and their gradient, stay in VMEM while the
rows stream past, once: 4 n D K operations, the least there is. A block that
fits as one group, which most do, knows the log-sum-exp of a row before its
errors, in any mode. A larger one knows those of its groups, which are joined
outside; if the errors need the whole, a sweep that makes scores alone goes
before: 6 n D K operations.

Weights and scores are turned, so that classes lie on sublanes and rows on
lanes: what belongs to rows is dense, a reduction over classes is elementwise,
both products take their operands as they lie, and few classes fill a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2.kernels.softmax_block import reference

_LANES = 128
_SUBLANES = 8
_MAX_FEATURES = 8192
_RESIDENT = 2**20  # Weights of a group, and its gradient, twice: 16 MiB.
_SCORES = 2**18  # Of a tile of rows.
_ENTRIES = 2**20  # Of its features.
_MAX_ROWS = 512
# All of it, with what the compiler adds; from the fifth generation on, chips
# have 64 MiB or more.
_VMEM_BYTES = 56 * 2**20
_OLD = ('TPU v2', 'TPU v3', 'TPU v4')
_PARTS = 3  # Numbers of 16 bits to a float.


def unsupported(features, weights):
  """Why the kernel does not take these arguments, or None."""
  if features.shape[1] > _MAX_FEATURES:
    return f'want at most {_MAX_FEATURES} features, got {features.shape[1]}.'
  for x in (features, weights):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      return f'want float32 or bfloat16, got {x.dtype}.'
  if any(kind.startswith(_OLD) for kind in _kinds()):
    return 'want a TPU of the fifth generation or later.'
  return None


def _kinds():
  """Of the chip that the mesh in scope names, else of the TPUs here."""
  chip = jax.sharding.get_abstract_mesh().abstract_device
  if chip is not None:
    return [chip.device_kind]
  try:
    return [chip.device_kind for chip in jax.local_devices(backend='tpu')]
  except RuntimeError:
    return []


def _up(n, multiple):
  return pl.cdiv(n, multiple) * multiple


def _plan(n, d, k):
  """Rows of a tile, classes of a group, groups."""
  d = _up(d, _LANES)
  most = _RESIDENT // d
  groups = pl.cdiv(k, most // _SUBLANES * _SUBLANES)
  width = k if groups == 1 else _up(pl.cdiv(k, groups), _SUBLANES)
  rows = min(_SCORES // width, _ENTRIES // d, _MAX_ROWS) // _LANES * _LANES
  rows = max(rows, _LANES)
  return min(rows, n), width, pl.cdiv(k, width)


def _split(x):
  """Three bfloat16 arrays that add up to x."""
  parts = []
  for _ in range(_PARTS):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def _dot(x, y, contract):
  dot = lambda x, y, precision=None: jax.lax.dot_general(
    x,
    y,
    ((contract[:1], contract[1:]), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  if y.dtype == jnp.float32:
    # One pass of the matrix unit keeps 8 bits of a weight.
    return dot(x, y, jax.lax.Precision.HIGHEST)
  # Of its six passes, features of bfloat16 need three. The least first.
  return sum(dot(part, y) for part in reversed(_split(x)))


def _kernel(
  valid_ref,
  weight_ref,
  feature_ref,
  label_ref,
  *refs,
  num_rows,
  normalizer,
):
  *given, logsumexp_ref, label_score_ref = refs
  group, step = pl.program_id(0), pl.program_id(1)
  width, rows = weight_ref.shape[0], feature_ref.shape[0]
  x = feature_ref[...]
  if num_rows % rows:
    # Beyond its ends, the array holds anything.
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    x = jnp.where(row < num_rows - step * rows, x, jnp.zeros_like(x))
  scores = _dot(weight_ref[...], x, (1, 1))
  classes = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
  classes += group * width
  num_valid = valid_ref[0, 0]
  inside = classes < num_valid
  scores = jnp.where(inside, scores, -jnp.inf)
  largest = jnp.max(scores, axis=0, keepdims=True)
  shift = jnp.where(jnp.abs(largest) < jnp.inf, largest, 0.0)
  total = jnp.sum(jnp.exp(scores - shift), axis=0, keepdims=True)
  logsumexp = shift + jnp.log(total)
  chosen = (classes == label_ref[...]) & inside
  logsumexp_ref[...] = logsumexp
  label_score_ref[...] = jnp.sum(
    jnp.where(chosen, scores, 0.0), axis=0, keepdims=True
  )
  if not given:
    return
  normalizer_ref, row_weight_ref, gradient_ref = given

  @pl.when(step == 0)
  def _():
    gradient_ref[...] = jnp.zeros_like(gradient_ref)

  normalizers = reference.normalize(normalizer_ref[...], logsumexp, normalizer)
  errors = jnp.exp(scores - normalizers) - jnp.where(chosen, 1.0, 0.0)
  errors = row_weight_ref[...] * errors
  # A row beyond the ends has any weight.
  row = jax.lax.broadcasted_iota(jnp.int32, errors.shape, 1)
  inside &= row < num_rows - step * rows
  gradient_ref[...] += _dot(jnp.where(inside, errors, 0.0), x, (1, 0))


def _call(features, weights, labels, num_valid, *given, normalizer, interpret):
  """Gradient (K, D) where there is anything given, and what groups keep.

  Args:
    features: (n, D).
    weights: (K, D), float32.
    labels: (n,).
    num_valid: ().
    *given: normalizers and weights of rows, (n,), or nothing.
    normalizer: static.
    interpret: static.
  """
  (n, d), k = features.shape, weights.shape[0]
  rows, width, groups = _plan(n, d, k)
  shape = functools.partial(
    jax.ShapeDtypeStruct,
    dtype=jnp.float32,
    manual_axis_type=jax.typeof(features).manual_axis_type,
  )
  per_row = pl.BlockSpec((1, rows), lambda g, i: (0, i))
  per_class = pl.BlockSpec((width, d), lambda g, i: (g, 0))
  kept = pl.BlockSpec((None, 1, rows), lambda g, i: (g, 0, i))
  out_specs, out_shape = [kept] * 2, [shape((groups, 1, n))] * 2
  if given:
    out_specs, out_shape = [per_class, *out_specs], [shape((k, d)), *out_shape]
  *gradient, logsumexp, label_scores = pl.pallas_call(
    functools.partial(_kernel, num_rows=n, normalizer=normalizer),
    grid=(groups, pl.cdiv(n, rows)),
    in_specs=[
      pl.BlockSpec((1, 1), lambda g, i: (0, 0), memory_space=pltpu.SMEM),
      per_class,
      pl.BlockSpec((rows, d), lambda g, i: (i, 0)),
      *[per_row] * (1 + len(given)),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=_VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=(4 if given else 2) * n * d * k,
      bytes_accessed=groups * n * d * features.dtype.itemsize
      + 4 * (2 if given else 1) * k * d,
      transcendentals=(2 if given else 1) * n * k,
    ),
    interpret=interpret,
    name='softmax_block' if given else 'softmax_block_scores',
  )(
    num_valid[None, None],
    weights,
    features,
    *(x[None] for x in (labels, *given)),
  )
  scored = reference.Scored(
    jax.nn.logsumexp(logsumexp[:, 0], axis=0)
    if groups > 1
    else logsumexp[0, 0],
    jnp.sum(label_scores[:, 0], axis=0),
  )
  return (*gradient, scored)


def _turn(weights):
  return weights.astype(jnp.float32).T


def score(features, weights, labels, num_valid, *, interpret=False):
  """As `reference.score`."""
  call = functools.partial(_call, normalizer='frozen', interpret=interpret)
  return call(features, _turn(weights), labels, num_valid)[0]


def visit(
  features,
  weights,
  normalizers,
  labels,
  row_weights,
  num_valid,
  *,
  normalizer,
  interpret=False,
):
  """As `reference.visit`."""
  (n, d), k = features.shape, weights.shape[1]
  call = functools.partial(
    _call, features, _turn(weights), labels, num_valid, interpret=interpret
  )
  if normalizer != 'frozen' and _plan(n, d, k)[2] > 1:
    (scored,) = call(normalizer='frozen')
    normalizers = reference.normalize(normalizers, scored.logsumexp, normalizer)
    normalizer = 'frozen'
  gradient, scored = call(normalizers, row_weights, normalizer=normalizer)
  return reference.Visit(gradient.T.astype(weights.dtype), *scored)
