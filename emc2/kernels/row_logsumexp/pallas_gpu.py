"""Row log-sum-exp over the negatives of a batch: kernels for Hopper GPUs.

Each compute warpgroup holds 64 rows in shared memory; a further warpgroup
streams tiles of the others past them through the bulk copy engine. A tile of
similarities lives and dies in registers.

The matrix units take 16 bits. A bfloat16 array goes in as it is; any other is
split into the two bfloat16 numbers that add up to it best, and three of the
four products are summed: the relative error of a product is then about 2^-16,
against 2^-9 for one bfloat16 and 2^-11 for the units' own TF32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import lowering
from emc2.kernels.row_logsumexp import reference

_PROCESSORS = 132
_SHARED_BYTES = 227 * 1024
_HELD = 64  # Rows that a warpgroup's matrix instruction takes.
_STREAMED = 64
_STEPS = 2  # Tiles in flight.
# A warpgroup accumulates its rows in registers: 128 a thread for 64 x 256.
_MAX_FEATURES = 256
_LOG2E = math.log2(math.e)


def unsupported(rows, columns):
  """Why the kernels do not take these arguments, or None."""
  del columns
  d = rows.shape[1]
  if d > _MAX_FEATURES:
    return f'want at most {_MAX_FEATURES} features, got {d}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _compute_groups(n, d, parts):
  """How many warpgroups share each streamed tile.

  Two halve the traffic, but hold twice the rows, and leave processors idle
  unless there are blocks for all.
  """
  plenty = n >= 2 * _HELD * _PROCESSORS
  shared = 2 * parts * -(-d // 64) * 64 * (2 * _HELD + _STEPS * _STREAMED)
  return 2 if plenty and shared < _SHARED_BYTES - 8192 else 1


def _parts(x):
  return 1 if x.dtype == jnp.bfloat16 else 2


def _split(x, parts):
  """One or two bfloat16 arrays that add up to x, outside a kernel."""
  if parts == 1:
    return [x]
  x = x.astype(jnp.float32)
  # XLA may drop a cast to bfloat16 and back, and with it the lower part.
  high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return [part.astype(jnp.bfloat16) for part in (high, x - high)]


def _split_in_registers(x, parts):
  high = x.astype(jnp.bfloat16)
  if parts == 1:
    return [high]
  return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def _pad(x, multiple, value=0):
  """Fills up the rows of x to a multiple, and features to that of a swizzle."""
  widths = [(0, -x.shape[0] % multiple)]
  widths += [(0, -k % 64) for k in x.shape[1:]]
  return jnp.pad(x, widths, constant_values=value)


def _pairs(xs, ys):
  """All products of parts but that of two low ones."""
  return [
    (x, y) for i, x in enumerate(xs) for j, y in enumerate(ys) if i + j < 2
  ]


def _similarity(xs, ys, interpret):
  """Inner products of the rows of two tiles, in registers."""
  if interpret:
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return sum(dot(x[...], y[...].T) for x, y in _pairs(xs, ys))

  def compute(acc_ref):
    for x, y in _pairs(xs, ys):
      plgpu.wgmma(acc_ref, x, y.transpose((1, 0)))
    return acc_ref[...]

  shape = (xs[0].shape[0], ys[0].shape[0])
  return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def _accumulate(acc, weights, ys, interpret):
  """Adds weights, in registers, times y, in shared memory."""
  ws = _split_in_registers(weights, len(ys))
  if interpret:
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return acc + sum(dot(w, y[...]) for w, y in _pairs(ws, ys))

  def compute(acc_ref):
    for w, y in _pairs(ws, ys):
      plgpu.wgmma(acc_ref, w, y)

  return pl.run_state(compute)(plgpu.ACC.init(acc))


def _along_rows(x, shape):
  """Broadcasts what belongs to the rows of a tile."""
  return jax.lax.broadcast_in_dim(x, shape, [0])


def _along_columns(x, shape):
  return jax.lax.broadcast_in_dim(x, shape, [1])


def _stream(x, y, x_stats, y_stats, carry, body, finish, out, name, interpret):
  """Runs `body` on all tiles of y for each block of x.

  Args:
    x: parts of (n, d).
    y: parts of (c, d).
    x_stats: arrays (n,).
    y_stats: arrays (c,).
    carry: makes the first carry.
    body: maps parts and stats of a block of x, those of a tile of y, and the
      carry to the next carry.
    finish: maps the last carry to what is written of the block.
    out: shapes and dtypes of the outputs, (n, ...) each.
    name: of the kernel.
    interpret: static.

  Returns:
    The outputs.
  """
  (n, d), parts = x[0].shape, len(x)
  groups = _compute_groups(n, d, parts)

  def entry(*refs):
    refs = list(refs)
    take = lambda k: [refs.pop(0) for _ in range(k)]
    x_refs, y_refs = take(parts + len(x_stats)), take(parts + len(y_stats))
    out_refs = take(len(out))
    x_smems = take(len(x_refs))
    (barriers,) = refs
    group = jax.lax.axis_index('wg')
    base = (jax.lax.axis_index('block') * groups + group) * _HELD
    own = pl.ds(base, _HELD)

    def context(pipeline):
      for ref, smem in zip(x_refs, x_smems, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[own], smem.at[group], barriers.at[group])
      plgpu.barrier_wait(barriers.at[group])
      stats = [smem.at[group][...] for smem in x_smems[parts:]]
      state, *_ = pipeline((carry(), *stats))
      results = finish(state)
      for result, ref in zip(results, out_refs, strict=True):
        ref[own] = result

    def step(_, *args):
      *tile, (state, *stats) = args
      held = [smem.at[group] for smem in x_smems[:parts]]
      state = body(
        held, stats, tile[:parts], [ref[...] for ref in tile[parts:]], state
      )
      return (state, *stats)

    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(y[0].shape[0] // _STREAMED,),
      max_concurrent_steps=min(_STEPS, y[0].shape[0] // _STREAMED),
      num_compute_wgs=groups,
      memory_registers=40,
      wg_axis='wg',
      compute_context=context,
      in_specs=[plgpu.BlockSpec((_STREAMED, d), lambda j: (j, 0))] * parts
      + [plgpu.BlockSpec((_STREAMED,), lambda j: (j,))] * len(y_stats),
    )(*y_refs)

  shared = lambda a: plgpu.SMEM((groups, _HELD, *a.shape[1:]), a.dtype)
  outs = plgpu.kernel(
    entry,
    out_type=out,
    scratch_types=[
      *map(shared, [*x, *x_stats]),
      plgpu.Barrier(num_arrivals=parts + len(x_stats), num_barriers=groups),
    ],
    grid=(n // (groups * _HELD),),
    grid_names=('block',),
    num_threads=groups + 1,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )(*x, *x_stats, *y, *y_stats)
  # The kernel forgets over which mesh axes its arguments vary.
  axes = tuple(sorted(jax.typeof(x[0]).manual_axis_type.varying))
  return jax.lax.pcast(outs, axes, to='varying') if axes else outs


def forward(rows, columns, image, scale, *, interpret=False):
  """As `reference.forward`."""
  columns = rows if columns is None else columns
  (n, d), c, parts = rows.shape, columns.shape[0], _parts(rows)
  held = _HELD * _compute_groups(n, d, parts)

  def carry():
    zeros = jnp.zeros((_HELD,), jnp.float32)
    return jnp.full_like(zeros, -jnp.inf), zeros, zeros

  def body(xs, x_stats, ys, y_stats, state):
    (own_image, slope), (y_image,) = x_stats, y_stats
    old, total, moment = state
    s = _similarity(xs, ys, interpret)
    other = _along_columns(y_image, s.shape)
    out = (_along_rows(own_image, s.shape) == other) | (other < 0)
    logits = jnp.where(out, -jnp.inf, _along_rows(slope, s.shape) * s)
    # Two columns of a tile, an even number of them, show different images: no
    # row meets only its own, and the maximum is finite from the first tile on.
    top = jnp.maximum(old, jnp.max(logits, axis=1))
    p = jnp.exp2(logits - _along_rows(top, s.shape))
    fade = jnp.exp2(old - top)
    total = fade * total + jnp.sum(p, axis=1)
    moment = fade * moment + jnp.sum(p * s, axis=1)
    return top, total, moment

  def finish(state):
    top, total, moment = state
    return top / _LOG2E + jnp.log(total), moment / total

  padded = _pad(scale * _LOG2E, held)
  value, mean = _stream(
    _split(_pad(rows, held), parts),
    _split(_pad(columns, _STREAMED), parts),
    (_pad(image, held), padded),
    (_pad(reference.column_image(c), _STREAMED, -1),),
    carry,
    body,
    finish,
    [jax.ShapeDtypeStruct(padded.shape, jnp.float32)] * 2,
    'row_logsumexp_forward',
    interpret,
  )
  return value[:n], mean[:n]


def _pull(x, y, x_image, y_image, x_stats, y_stats, interpret):
  """sum_j (w_i p_ij + w_j p_ji) y_j, each term where its stats are given.

  Args:
    x: (n, d); i runs over its rows.
    y: (c, d); j runs over its rows.
    x_image: (n,), int32.
    y_image: (c,), int32.
    x_stats: scale, value, weight of (n,) each, or (): the first term.
    y_stats: the same of (c,), or (): the second term.
    interpret: static.

  Returns:
    (n, d), in the dtype of x.
  """
  (n, d), parts = x.shape, _parts(x)
  held = _HELD * _compute_groups(n, d, parts)
  xs = _split(_pad(x, held), parts)
  ys = _split(_pad(y, _STREAMED), parts)
  shape = xs[0].shape

  def carry():
    return jnp.zeros((_HELD, shape[1]), jnp.float32)

  def body(xs, x_stats, ys, y_stats, acc):
    s = _similarity(xs, ys, interpret)
    own_image, *x_stats = x_stats
    other_image, *y_stats = y_stats
    pull = jnp.zeros_like(s)
    for stats, along in ((x_stats, _along_rows), (y_stats, _along_columns)):
      if stats:
        slope, value, weight = (along(stat, s.shape) for stat in stats)
        # A probability is at most 1; a column of padding, which is no
        # negative, must not overflow before its zeros are multiplied in.
        pull += weight * jnp.exp2(jnp.minimum(slope * s - value, 0.0))
    own = _along_rows(own_image, s.shape) == _along_columns(
      other_image, s.shape
    )
    return _accumulate(acc, jnp.where(own, 0.0, pull), ys, interpret)

  def binary(stats, multiple):
    if not stats:
      return ()
    scale, value, weight = stats
    stats = (scale * _LOG2E, value * _LOG2E, weight)
    return tuple(_pad(stat, multiple) for stat in stats)

  (out,) = _stream(
    xs,
    ys,
    (_pad(x_image, held), *binary(x_stats, held)),
    (_pad(y_image, _STREAMED), *binary(y_stats, _STREAMED)),
    carry,
    body,
    lambda acc: (acc,),
    [jax.ShapeDtypeStruct(shape, jnp.float32)],
    'row_logsumexp_pull',
    interpret,
  )
  return out[:n, :d].astype(x.dtype)


def backward(rows, columns, image, scale, value, cotangent, *, interpret=False):
  """As `reference.backward`."""
  stats = (scale, value, cotangent * scale)
  if columns is None:
    return _pull(rows, rows, image, image, stats, stats, interpret), None
  column_image = reference.column_image(columns.shape[0])
  return (
    _pull(rows, columns, image, column_image, stats, (), interpret),
    _pull(columns, rows, column_image, image, (), stats, interpret),
  )
