"""The fused tile of a topic model: a Pallas kernel for TPU.

One pass makes 6 n_d n_v K operations, the least there is; two passes, one for
each sum, would make the scores twice and read the counts twice. The grid is
(blocks of documents, blocks of words): the sums of a block of documents stay in
VMEM while the words stream past, and those of the words stay there, transposed,
all the time. Words too many for that go in groups, one call after the other,
each of which adds to the sums of documents: 8 K bytes more for a document and a
group, of at least 512 words.

A tile reads its counts, 1 to 4 bytes a pair, and makes of each 6 K operations,
in six passes of the matrix unit: the memory is idle from some tens of topics
on. A tile without any count ends when that is seen, at the price of one
maximum; where words are sorted by frequency, most tiles of rare ones are such.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emc2.kernels.topic_tile import reference

_LANES = 128
_MAX_TOPICS = 1024
_GROUP_ENTRIES = 2**19  # Weights of the words of a group: 2 MiB.
_COUNTS = ('float32', 'bfloat16', 'int32', 'int16', 'int8', 'uint8')


def unsupported(doc_weights, word_weights, counts):
  """Why the kernel does not take these arguments, or None."""
  del word_weights
  if doc_weights.shape[1] > _MAX_TOPICS:
    return f'want at most {_MAX_TOPICS} topics, got {doc_weights.shape[1]}.'
  if counts.dtype.name not in _COUNTS:
    return f'want counts in one of {", ".join(_COUNTS)}, got {counts.dtype}.'
  return None


def _up(n, multiple):
  return pl.cdiv(n, multiple) * multiple


def _plan(n_d, n_v, topics):
  """Documents and words of a tile, tiles of words in a group, groups."""
  docs, words = (256, 512) if topics <= 512 else (128, 256)
  docs, words = min(docs, _up(n_d, _LANES)), min(words, _up(n_v, _LANES))
  tiles = pl.cdiv(n_v, words)
  groups = pl.cdiv(tiles, max(1, _GROUP_ENTRIES // (topics * words)))
  steps = pl.cdiv(tiles, groups)
  return docs, words, steps, pl.cdiv(tiles, steps)


def _dot(x, y, contract):
  return jax.lax.dot_general(
    x,
    y,
    ((contract[:1], contract[1:]), ((), ())),
    # One pass of the matrix unit keeps 8 bits of a weight.
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _kernel(
  group_ref,
  doc_ref,
  word_ref,
  count_ref,
  earlier_ref,
  doc_sum_ref,
  word_sum_ref,
  *refs,
  shape,
  log_likelihood,
):
  (log_ref,) = refs[:-2] if log_likelihood else (None,)
  acc_ref, turned_ref = refs[-2:]
  (docs, words), (n_d, n_v) = count_ref.shape, shape
  block, step = pl.program_id(0), pl.program_id(1)
  steps = pl.num_programs(1)
  own = pl.ds(pl.multiple_of(step * words, words), words)

  @pl.when(step == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)
    turned_ref[...] = doc_ref[...].T
    if log_likelihood:
      log_ref[...] = jnp.zeros_like(log_ref)

  @pl.when(block == 0)
  def _():
    zeros = jnp.zeros((word_sum_ref.shape[0], words), jnp.float32)
    word_sum_ref[:, own] = zeros

  counts = count_ref[...]
  if jnp.issubdtype(counts.dtype, jnp.integer):
    counts = counts.astype(jnp.int32)
  counts = counts.astype(jnp.float32)
  # Beyond its ends, the array holds anything.
  rows, columns = (
    jax.lax.broadcasted_iota(jnp.int32, counts.shape, axis) for axis in (0, 1)
  )
  inside = rows < n_d - block * docs
  inside &= columns < n_v - (group_ref[0] * steps + step) * words
  counts = jnp.where(inside, counts, 0.0)

  @pl.when(jnp.max(counts) > 0)
  def _():
    weights = word_ref[own, :]
    scores = _dot(doc_ref[...], weights, (1, 1))
    pulls = reference.ratio(counts, scores)
    acc_ref[...] += _dot(pulls, weights, (1, 0))
    word_sum_ref[:, own] += _dot(turned_ref[...], pulls, (1, 0))
    if log_likelihood:
      logs = reference.log_terms(counts, scores)
      log_ref[...] += _dot(jnp.ones((1, words), jnp.float32), logs, (1, 1))

  @pl.when(step == steps - 1)
  def _():
    doc_sum_ref[...] = earlier_ref[...] + doc_ref[...] * acc_ref[...]


def forward(
  doc_weights, word_weights, counts, *, log_likelihood, interpret=False
):
  """As `reference.forward`."""
  (n_d, k), n_v = doc_weights.shape, word_weights.shape[0]
  topics = _up(k, _LANES)
  docs, words, steps, groups = _plan(n_d, n_v, topics)
  rows, width = _up(n_d, docs), steps * words
  last = pl.cdiv(n_v, words) - 1
  pad = lambda x, n: jnp.pad(x, ((0, n - x.shape[0]), (0, topics - k)))
  # Zeros, which the counts need not have: they are much more to copy.
  doc_weights, padded = (
    pad(doc_weights, rows),
    pad(word_weights, groups * width),
  )
  shape = functools.partial(
    jax.ShapeDtypeStruct,
    dtype=jnp.float32,
    manual_axis_type=jax.typeof(doc_weights).manual_axis_type,
  )
  per_doc = pl.BlockSpec((docs, topics), lambda i, j, g: (i, 0))
  out_specs = [per_doc, pl.BlockSpec((topics, width), lambda i, j, g: (0, 0))]
  out_shape = [shape((rows, topics)), shape((topics, width))]
  if log_likelihood:
    out_specs.append(pl.BlockSpec((1, docs), lambda i, j, g: (0, i)))
    out_shape.append(shape((1, rows)))
  call = pl.pallas_call(
    functools.partial(_kernel, shape=(n_d, n_v), log_likelihood=log_likelihood),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(rows // docs, steps),
      in_specs=[
        per_doc,
        pl.BlockSpec((width, topics), lambda i, j, g: (g[0], 0)),
        pl.BlockSpec(
          (docs, words),
          lambda i, j, g: (i, jnp.minimum(g[0] * steps + j, last)),
        ),
        per_doc,
      ],
      out_specs=out_specs,
      scratch_shapes=[
        pltpu.VMEM((docs, topics), jnp.float32),
        pltpu.VMEM((topics, docs), jnp.float32),
      ],
    ),
    out_shape=out_shape,
    input_output_aliases={4: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=6 * rows * width * topics,
      bytes_accessed=rows * width * counts.dtype.itemsize
      + 4 * (3 * rows + 2 * width) * topics,
      transcendentals=rows * width * log_likelihood,
    ),
    interpret=interpret,
    name='topic_tile',
  )

  def add(doc_sums, group):
    doc_sums, *rest = call(group, doc_weights, padded, counts, doc_sums)
    return doc_sums, rest

  number = jnp.arange(groups, dtype=jnp.int32)[:, None]
  doc_sums, (word_sums, *logs) = jax.lax.scan(
    add, jnp.zeros_like(doc_weights), number
  )
  word_sums = jnp.swapaxes(word_sums, 1, 2).reshape(-1, topics)[:n_v, :k]
  return (
    doc_sums[:n_d, :k],
    word_weights * word_sums,
    jnp.sum(logs[0], axis=0)[0, :n_d] if log_likelihood else None,
  )
