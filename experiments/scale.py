"""What a run needs on more chips than are here, from compiled programs.

    python -m emc2.experiments.scale esvi

compiles the steps of published sizes for TPU topologies, with abstract shapes
and the compiler of the `libtpu` package alone: no chip, no data. `make scale`
installs it. The table, which `--out` (`runs/scale`) holds as `NAME.md` and
`NAME.json`, says for each size what a chip must hold, what a step needs beside
it, and how often the chips exchange.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import app, flags

from emc2 import mesh as mesh_lib
from emc2.experiments.benchmarks import harness
from emc2.kernels import fm_visit
from emc2.separable import ds_facto, ds_mlr, fm_cells, mlr_cells, sliced
from emc2.topics import lda
from emc2.topics.lda import esvi

COLLECTIVES = (
  'collective_permute',
  'all_reduce',
  'reduce_scatter',
  'all_gather',
  'all_to_all',
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A program and the machine it is for.

  Attributes:
    name: In the table.
    topology: As JAX names it, for instance `'v5p:8x8x8'`.
    build: `(devices) -> (function, abstract arguments)`.
    message: Bytes that a chip passes on in one exchange.
    memory: Bytes of a chip.
  """

  name: str
  topology: str
  build: Callable[[Sequence[Any]], tuple[Callable, tuple]]
  message: float | int
  memory: float | int = 95e9


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The size of a corpus; `num_pairs` is of words in documents."""

  num_documents: int
  num_words: int
  num_pairs: int


# The pairs are not published: 1.4 tokens to a pair, as in Associated Press.
UMBC = Corpus(40_599_164, 3_431_260, 3_013_004_127 * 5 // 7)


def esvi_step(
  devices: Sequence[Any],
  *,
  corpus: Corpus,
  num_topics: int,
  blocks_per_device: int = 1,
  tile: int = 8192,
  **settings: Any,
) -> tuple[Callable, tuple]:
  """A pass of ESVI over a corpus on a ring of devices, without its arrays.

  Args:
    devices: Of the ring.
    corpus: Its size; cells are taken to be of equal size.
    num_topics: K.
    blocks_per_device: Of words.
    tile: Pairs that are worked on at once.
    **settings: Of :func:`emc2.topics.lda.esvi.esvi`.

  Returns:
    The step of one pass, and its abstract arguments.
  """
  width = len(devices)
  mesh = mesh_lib.make(devices, ring=width)
  num_blocks = width * blocks_per_device
  documents = -(-corpus.num_documents // width)
  tiles = max(1, -(-corpus.num_pairs // (width * num_blocks * tile)))

  def place(specs, tree):
    put = lambda x, spec: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    return jax.tree.map(put, tree, specs)

  like = jax.ShapeDtypeStruct
  pairs = width, num_blocks, tiles, tile
  cells = place(
    lda.cells.specs(),
    lda.Cells(
      documents=like(pairs, jnp.int32),
      words=like(pairs, jnp.int32),
      counts=like(pairs, jnp.float32),
      dense=like((width, num_blocks, documents, 0), jnp.float32),
    ),
  )
  method = esvi.esvi(
    num_topics, corpus.num_words, axis_name=mesh_lib.RING, **settings
  )
  shardings = esvi.shardings(settings.get('storage', 'cell'))
  method = lda.on_ring(method, mesh, shardings)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = place(shardings, jax.eval_shape(method.init, key, cells))
  key = place(jax.sharding.PartitionSpec(), key)
  return jax.jit(method.step, donate_argnums=1), (key, state, cells)


def _esvi_plans():
  plans = []
  for topology, width in (('v5p:4x4x8', 128), ('v5p:8x8x8', 512)):
    for num_topics in (128, 1000):
      for storage, top_c in (('phi', None), ('topk', 16)):
        build = functools.partial(
          esvi_step,
          corpus=UMBC,
          num_topics=num_topics,
          storage=storage,
          top_c=top_c,
          refresh_every=0,
        )
        message = 4 * num_topics * -(-UMBC.num_words // width)
        name = f'UMBC-3B, {num_topics} topics, {storage}'
        plans.append(Plan(name, topology, build, message))
  return plans


@dataclasses.dataclass(frozen=True)
class Sparse:
  """The size of sparse features, and of what is foretold of them."""

  num_rows: int
  num_features: int
  num_outputs: int
  per_row: int  # Features of a row.


# Reddit-Full of DS-MLR's paper: 0.0036 % of the entries are not 0.
REDDIT = Sparse(211_532_359, 1_348_182, 33_225, 49)
# 2 GB of weights, to be dealt to small chips.
TEXT = Sparse(20_000, 5_001, 100_000, 38)
# Criteo-tera as DS-FACTO's paper sizes it; 39 features of a row are its own.
CRITEO = Sparse(4_373_472_329, 1_000_000_000, 128, 39)


def ds_mlr_step(
  devices: Sequence[Any],
  *,
  data: Sparse,
  num_minibatches: int = 64,
  **settings: Any,
) -> tuple[Callable, tuple]:
  """A pass of DS-MLR over sparse rows on a ring of devices.

  Args:
    devices: Of the ring, one block of classes on each.
    data: Its size; rows are taken to be of equal length. Of a minibatch, a
      feature that occurs does so twice.
    num_minibatches: m.
    **settings: Of :func:`emc2.separable.ds_mlr.ds_mlr`.

  Returns:
    The step of one pass, and its abstract arguments.
  """
  width = len(devices)
  mesh = mesh_lib.make(devices, ring=width)
  rows = -(-data.num_rows // (width * num_minibatches))
  classes = -(-data.num_outputs // width)
  like = jax.ShapeDtypeStruct

  def cut(counts):
    lead, height = (width, num_minibatches), sliced.HEIGHT
    entries = [
      (*lead, n * w * height)
      for n, w in zip(counts, sliced.WIDTHS, strict=True)
    ]
    return sliced.Sliced(
      ids=tuple(like(shape, jnp.int32) for shape in entries),
      values=tuple(like(shape, jnp.float32) for shape in entries),
      rows=tuple(like((*lead, n * height), jnp.int32) for n in counts),
    )

  groups = -(-rows // sliced.HEIGHT)
  pairs = -(-rows * data.per_row // (2 * sliced.HEIGHT))
  shape = width, num_minibatches, rows
  batch = mlr_cells.Batch(
    features=mlr_cells.SparseFeatures(
      rows=cut((-(-data.per_row // sliced.WIDTHS[0]) * groups, 0, 0, 0)),
      columns=cut((0, 0, pairs, 0)),
    ),
    labels=like(shape, jnp.int32),
    weights=like(shape, jnp.float32),
    classes=like((width, classes), jnp.int32),
    sizes=like((width, width), jnp.int32),
  )
  method = ds_mlr.ds_mlr(
    data.num_features, data.num_outputs, mesh=mesh, ridge=1e-8, **settings
  )
  return _abstract(method, mesh, batch, ds_mlr.shardings())


def ds_facto_step(
  devices: Sequence[Any], *, data: Sparse, **settings: Any
) -> tuple[Callable, tuple]:
  """A pass of DS-FACTO over sparse rows on a ring of devices.

  Args:
    devices: Of the ring, one block of features on each.
    data: Its size; entries are taken to lie evenly, so that in a cell hardly a
      row or feature has two.
    **settings: Of :func:`emc2.separable.ds_facto.ds_facto`.

  Returns:
    The step of one pass, and its abstract arguments.
  """
  width = len(devices)
  mesh = mesh_lib.make(devices, ring=width)
  rows = -(-data.num_rows // width)
  entries = -(-rows * data.per_row // width)
  like = jax.ShapeDtypeStruct

  def bags(*lead):
    return fm_visit.Bags(
      ids=like((*lead, 1, entries), jnp.int32),
      values=like((*lead, 1, entries), jnp.float32),
      owners=like((*lead, entries), jnp.int32),
    )

  cells = fm_cells.Cells(
    labels=like((width, 1, rows), jnp.float32),
    present=like((width, 1, rows), jnp.float32),
    num_rows=like((width,), jnp.float32),
    feature_ids=like((width, -(-data.num_features // width)), jnp.int32),
    by_row=bags(width, width),
    by_feature=bags(width, width, 1),
  )
  method = ds_facto.ds_facto(
    data.num_features,
    data.num_outputs,
    loss='logistic',
    mesh=mesh,
    **settings,
  )
  return _abstract(method, mesh, cells, ds_facto.shardings())


def _abstract(method, mesh, batch, shardings):
  """The jitted step of a method, and arguments that say where they lie."""

  def place(spec, tree):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(put, tree)

  is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)
  ring = jax.sharding.PartitionSpec(mesh_lib.RING)
  batch = place(ring, batch)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(method.init, key, batch)
  state = jax.tree.map(place, shardings, state, is_leaf=is_spec)
  key = place(jax.sharding.PartitionSpec(), key)
  return jax.jit(method.step, donate_argnums=1), (key, state, batch)


def _ds_mlr_plans():
  plans = []
  for topology, width in (('v5p:4x4x8', 128), ('v5p:8x8x8', 512)):
    for refresh in ('fused', 'two_pass', 'table'):
      build = functools.partial(ds_mlr_step, data=REDDIT, refresh=refresh)
      message = 4 * REDDIT.num_features * -(-REDDIT.num_outputs // width)
      name = f'Reddit-Full, {refresh}'
      plans.append(Plan(name, topology, build, message))
  build = functools.partial(ds_mlr_step, data=TEXT, num_minibatches=8)
  message = 4 * TEXT.num_features * TEXT.num_outputs // 8
  name = '20,000 texts, 100,000 classes, 3 GiB a chip'
  plans.append(Plan(name, 'v5e:2x4', build, message, 3 * 2**30))
  return plans


def _ds_facto_plans():
  plans = []
  for topology, width in (('v5p:4x4x8', 128), ('v5p:8x8x8', 512)):
    for mode in ('fused', 'two_pass'):
      build = functools.partial(ds_facto_step, data=CRITEO, mode=mode)
      per_block = -(-CRITEO.num_features // width)
      message = 4 * (CRITEO.num_outputs + 1) * per_block
      plans.append(Plan(f'Criteo-tera, {mode}', topology, build, message))
  return plans


PLANS = {
  'ds_facto': _ds_facto_plans,
  'ds_mlr': _ds_mlr_plans,
  'esvi': _esvi_plans,
}


def measure(plan: Plan, devices: Sequence[Any]) -> dict[str, Any]:
  """Compiles a program and reads what it needs of each device.

  Args:
    plan: What to compile.
    devices: The machine, of which abstract devices will do.

  Returns:
    Bytes by kind, collectives of the lowered program by name, and the seconds
    of compiling. A program that does not fit has its compiler's words as
    `error` instead.
  """
  start = time.perf_counter()
  fn, args = plan.build(devices)
  row = {'name': plan.name, 'topology': plan.topology, 'chips': len(devices)}
  row['message_bytes'] = plan.message
  lowered = fn.lower(*args)
  for collective in COLLECTIVES:
    row[collective] = lowered.as_text().count(f'"stablehlo.{collective}"')
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needs = re.search(r'Used (\S+) of (\S+) hbm', str(error))
    words = needs[0] if needs else str(error).splitlines()[0]
    return row | {'error': words}
  memory = compiled.memory_analysis()
  held, beside = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  return row | {
    'argument_bytes': held,
    'temporary_bytes': beside,
    'fits': held + beside <= plan.memory,
    'seconds': time.perf_counter() - start,
  }


def markdown(name: str, rows: Sequence[dict[str, Any]], about: dict) -> str:
  """The table as people read it."""
  head = ['program', 'chips', 'held, GB', 'beside it, GB', 'fits']
  head += ['message, MB', *COLLECTIVES]
  lines = []
  for row in rows:
    cells = [row['name'], f'{row["topology"]} ({row["chips"]})']
    if 'error' in row:
      cells += [row['error'], '-', '**no**']
    else:
      cells += [
        f'{row["argument_bytes"] / 1e9:.2f}',
        f'{row["temporary_bytes"] / 1e9:.2f}',
        'yes' if row['fits'] else '**no**',
      ]
    cells.append(f'{row["message_bytes"] / 1e6:.1f}')
    cells += [str(row[collective]) for collective in COLLECTIVES]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(
    [
      f'# {name}, compiled for machines that are not here',
      '',
      f'`python -m emc2.experiments.scale {name}`, {about["date"]}, commit '
      f'{about["commit"]}, jax {about["versions"]["jax"]}. By chip: what it '
      'holds, and what the step needs beside it. Collectives are counted in '
      'the text of the program, once where a loop repeats them. Nothing ran.',
      '',
      '| ' + ' | '.join(head) + ' |',
      '| ' + ' | '.join(['---'] * len(head)) + ' |',
      *lines,
      '',
    ]
  )


def run(name: str, out: pathlib.Path) -> list[dict[str, Any]]:
  """Compiles all programs of a name, prints the table and writes it.

  Args:
    name: One of `PLANS`.
    out: Where the table is written.

  Returns:
    The rows.

  Raises:
    ValueError: If there is no such name, or `libtpu` is not installed.
  """
  if name not in PLANS:
    raise ValueError(f'the name must be one of {tuple(PLANS)}, got {name!r}.')
  # It must not ask for the machine that it runs on.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  from jax.experimental import topologies

  rows = []
  bar = tqdm.tqdm(PLANS[name](), unit='program')
  for plan in bar:
    bar.set_postfix_str(f'{plan.name} on {plan.topology}')
    try:
      topology = topologies.get_topology_desc(
        platform='tpu', topology_name=plan.topology
      )
    except (RuntimeError, NotImplementedError) as error:
      raise ValueError(
        f'libtpu must be installed, `make scale` does so: {error}'
      ) from error
    rows.append(measure(plan, topology.devices))
  about = harness.machine()
  page = markdown(name, rows, about)
  out.mkdir(parents=True, exist_ok=True)
  (out / f'{name}.md').write_text(page)
  content = {'machine': about, 'rows': rows}
  (out / f'{name}.json').write_text(json.dumps(content, indent=1) + '\n')
  print(page)
  return rows


def launch() -> None:
  """Reads the flags and runs."""
  out = flags.DEFINE_string('out', 'runs/scale', 'Where the table is written.')

  def main(argv):
    if len(argv) != 2:
      raise app.UsageError(f'Name one of {tuple(PLANS)}: {argv[1:]}')
    try:
      run(argv[1], pathlib.Path(out.value))
    except ValueError as error:
      raise app.UsageError(str(error)) from error

  app.run(main)


if __name__ == '__main__':
  launch()
