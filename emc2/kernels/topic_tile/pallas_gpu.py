"""The fused tile of a topic model: kernels for Hopper GPUs.

Blocks run at once and share no sums, so there are two passes: one holds
documents and streams words, the other the reverse, on counts that XLA turns.
Together they make 8 n_d n_v K operations, not 6, and read the counts twice. A
warpgroup holds the weights of 64 rows in shared memory and their sums in
registers, where a tile of scores lives and dies; a further warpgroup streams
the weights of the others, and the counts, through the bulk copy engine. Where
blocks are too few for the chip, parts of the stream go to blocks of their own.

Weights are split into three parts, and six of the nine products are summed: all
that float32 keeps, at the price of three products of the units' own TF32, which
would take the operands of the second product in one order only.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from emc2.kernels import hopper, lowering
from emc2.kernels.topic_tile import reference

_SHARED_BYTES = 219 * 1024  # Of 227 KiB; the rest is for barriers.
_PARTS = 3  # Numbers of 16 bits to a weight.
# A warpgroup accumulates its rows in registers: 128 a thread for 64 x 256.
_MAX_TOPICS = 256


def unsupported(doc_weights, word_weights, counts):
  """Why the kernels do not take these arguments, or None."""
  del word_weights, counts
  if doc_weights.shape[1] > _MAX_TOPICS:
    return f'want at most {_MAX_TOPICS} topics, got {doc_weights.shape[1]}.'
  if not lowering.is_hopper():
    return 'want a Hopper GPU.'
  return None


def _plan(n, m, topics):
  """Warpgroups of a block, tiles in flight, tiles of a part, parts."""
  weights = 2 * _PARTS * topics

  def fits(groups, flight):
    held = groups * hopper.HELD
    tile = hopper.STREAMED * (weights + 4 * held)
    return held * weights + flight * tile <= _SHARED_BYTES

  # Two groups halve the traffic of what is streamed. Above 128 topics there is
  # room for one tile alone, and its copy is waited for.
  plans = ((2, 2), (1, 2)) if n > hopper.HELD else ((1, 2),)
  groups, flight = next((p for p in plans if fits(*p)), (1, 1))
  steps, parts = hopper.shares(pl.cdiv(n, groups * hopper.HELD), m)
  return groups, min(flight, steps), steps, parts


def _pull(x, y, counts, log_likelihood, name, interpret):
  """sum_j R_ij y_j, and sum_j X_ij log S_ij where asked for.

  Args:
    x: (n, K), float32; i runs over its rows.
    y: (m, K), float32; j runs over its rows.
    counts: (n, m).
    log_likelihood: static.
    name: of the kernel.
    interpret: static.

  Returns:
    (n, K), and (n,) if asked for.
  """
  (n, m), k = counts.shape, x.shape[1]
  topics = pl.cdiv(k, 64) * 64
  groups, flight, steps, parts = _plan(n, m, topics)
  held, share = groups * hopper.HELD, steps * hopper.STREAMED
  pad = lambda a, rows, columns: jnp.pad(
    a, ((0, -a.shape[0] % rows), (0, -a.shape[1] % columns))
  )
  xs = hopper.split(pad(x, held, 64), _PARTS)
  ys = hopper.split(pad(y, share * parts, 64), _PARTS)
  counts = pad(counts.astype(jnp.float32), held, share * parts)
  rows = counts.shape[0]
  out = [jax.ShapeDtypeStruct((parts, rows, topics), jnp.float32)]
  if log_likelihood:
    out.append(jax.ShapeDtypeStruct((parts, rows), jnp.float32))

  def entry(*refs):
    refs = list(refs)
    take = lambda count: [refs.pop(0) for _ in range(count)]
    x_refs, y_refs, out_refs = take(_PARTS), take(_PARTS + 1), take(len(out))
    x_smems = take(_PARTS)
    (barriers,) = refs
    group, part = jax.lax.axis_index('wg'), jax.lax.axis_index('part')
    block = jax.lax.axis_index('block')
    own = pl.ds((block * groups + group) * hopper.HELD, hopper.HELD)

    def context(pipeline):
      for ref, smem in zip(x_refs, x_smems, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[own], smem.at[group], barriers.at[group])
      plgpu.barrier_wait(barriers.at[group])
      carry = [jnp.zeros((hopper.HELD, topics), jnp.float32)]
      if log_likelihood:
        carry.append(jnp.zeros((hopper.HELD,), jnp.float32))
      for result, ref in zip(pipeline(tuple(carry)), out_refs, strict=True):
        ref[part, own] = result

    def step(_, *args):
      *y_tile, count_tile, (acc, *logs) = args
      mine = [smem.at[group] for smem in x_smems]
      scores = hopper.inner_products(mine, y_tile, interpret)
      tile = count_tile[pl.ds(group * hopper.HELD, hopper.HELD), :]
      pulls = hopper.split_in_registers(reference.ratio(tile, scores), _PARTS)
      acc = hopper.accumulate(acc, pulls, y_tile, interpret)
      if log_likelihood:
        terms = reference.log_terms(tile, scores)
        logs = [logs[0] + jnp.sum(terms, axis=1)]
      return (acc, *logs)

    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(steps,),
      max_concurrent_steps=flight,
      num_compute_wgs=groups,
      memory_registers=40,
      wg_axis='wg',
      compute_context=context,
      in_specs=[
        plgpu.BlockSpec(
          (hopper.STREAMED, topics), lambda j: (part * steps + j, 0)
        )
      ]
      * _PARTS
      + [
        plgpu.BlockSpec(
          (held, hopper.STREAMED), lambda j: (block, part * steps + j)
        )
      ],
    )(*y_refs)

  outs = plgpu.kernel(
    entry,
    out_type=out,
    scratch_types=[
      *[plgpu.SMEM((groups, hopper.HELD, topics), jnp.bfloat16)] * _PARTS,
      plgpu.Barrier(num_arrivals=_PARTS, num_barriers=groups),
    ],
    grid=(parts, rows // held),
    grid_names=('part', 'block'),
    num_threads=groups + 1,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    interpret=interpret,
  )(*xs, *ys, counts)
  outs = hopper.vary_like(outs, x)
  sums, *logs = (jnp.sum(o, axis=0)[:n] for o in outs)
  return sums[:, :k], *logs


def forward(
  doc_weights, word_weights, counts, *, log_likelihood, interpret=False
):
  """As `reference.forward`."""
  pull = functools.partial(_pull, interpret=interpret)
  doc_sums, *logs = pull(
    doc_weights,
    word_weights,
    counts,
    log_likelihood=log_likelihood,
    name='topic_tile_documents',
  )
  (word_sums,) = pull(
    word_weights,
    doc_weights,
    counts.T,
    log_likelihood=False,
    name='topic_tile_words',
  )
  logs = logs[0] if log_likelihood else None
  return doc_weights * doc_sums, word_weights * word_sums, logs
