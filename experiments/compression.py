"""What training costs when gradients travel coded, and what memory repairs.

  python -m emc2.experiments.compression --workdir=runs/compression

trains a small convolutional net on scikit-learn's digits with 16 codes and 7
memories, and a decoder of characters with some, by 8 workers: some six minutes
on two idle CPU cores, no download. That command, with JAX 0.10.2, came to these
losses at the end (means of two seeds):

                             loss                 kbit     kB of
  digits                     training validation  a step   memory
  none            none          0.033      0.139   316.3      0.0
  bfloat16        none          0.033      0.139   158.3      0.0
  blocks_8bit     none          0.033      0.139    80.6      0.0
  qsgd            none          0.109      0.181    40.0      0.0
  k_level         none          0.108      0.188    30.2      0.0
  rotated         none          0.106      0.185    50.5      0.0
  random_k        full          0.202      0.324    31.9     39.5
  random_k_scaled none          0.288      0.344    31.9      0.0
  block_k         none          0.315      0.370    31.9      0.0
  block_k         full          0.216      0.320    31.9     39.5
  block_k         coded         0.176      0.281    31.9     10.0
  block_k         sketched      0.281      0.365    31.9      8.0
  top_k           none          0.045      0.151    45.1      0.0
  top_k           full          0.032      0.141    45.1     39.5
  top_k_qsgd      full          0.076      0.158    17.7     39.5
  top_k_sign      full          0.034      0.140    14.6     39.5
  sign            none          0.108      0.194    10.3      0.0
  sign            full          0.040      0.124    10.3     39.5
  majority        none          0.170      0.484    79.3      0.0
  power_sgd       none          0.209      0.301    23.5      0.0
  power_sgd       full          0.034      0.136    23.5     39.5
  power_sgd       hybrid        0.052      0.147    23.5     11.1
  power_sgd       coded         0.037      0.134    23.5     10.0
  power_sgd       partial       0.083      0.182    23.5     39.5
  power_sgd       sketched      0.165      0.259    23.5      8.0
  power_sgd       two_level     0.054      0.144    23.5     11.2
  unbiased_rank   none          0.433      0.478    21.6      0.0
  text
  none            none          2.715      3.092  3631.1      0.0
  sign            full          3.225      3.486   123.6    452.6
  power_sgd       full          3.193      3.551    64.3    452.6
  power_sgd       sketched      3.226      3.534    64.3     91.6

Biased codes are repaired by a memory of what they lose, in 8-bit blocks as well
as in 32 bits: PowerSGD of rank 1 comes to the loss without a code with a 13th
of the bits. Sketched to a fifth, the memory repairs a part. Unbiased codes need
smaller learning rates, by which they lose here; a random or a cyclic tenth of
the entries is too little for so few steps. On text, where Adam comes after the
code, all codes are still behind after 150 steps.

`figure.png` shows how good each run got against the bits that it sent and
against the bytes of its memory, and how it came there; bands are the range of
seeds. With PROBLEM of 'digits' (a convolutional net) and 'text' (a decoder of
characters), CODE of `CODES` and MEMORY of `MEMORIES`, `result.json` holds

  PROBLEM.CODE.MEMORY.train_loss           at the end, the mean over seeds
  PROBLEM.CODE.MEMORY.validation_loss      likewise, of what is held out
  PROBLEM.CODE.MEMORY.validation_accuracy  likewise, in [0, 1]
  PROBLEM.CODE.MEMORY.num_diverged         seeds that ended above the loss they
                                           began with, or without a number
  PROBLEM.CODE.MEMORY.bits                 that a worker sends in a step
  PROBLEM.CODE.MEMORY.memory_bytes         that a worker's memory takes
  PROBLEM.CODE.MEMORY.seconds              of the steps of one seed

where a run that diverged counts with the loss that it began with. Each worker
draws batches of its own from all of the data. Matrices are coded, all else
travels as it is; convolutions and stacked layers count as the matrix that is
nearest to a square.

All pairs of codes and memories: `--config.cells=every`. Other text:
`--config.text=FILE`. A decoder of GPT-2's 124M, on accelerators:
`--config.problem=text --config.preset=gpt2_small`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx

from emc2 import arguments, transforms
from emc2 import mesh as mesh_lib
from emc2.compression import (
  compose,
  compressor,
  identity,
  low_rank,
  memories,
  quantize,
  sign,
  sparse,
)
from emc2.experiments import compression_figure, runner
from emc2.experiments import data as data_lib
from emc2.experiments.models import decoder, digits

PROBLEMS = ('digits', 'text')
TEXT_PRESETS = ('small', 'gpt2_small')


@dataclasses.dataclass
class Config:
  """Settings; what is None is as `PRESETS` says for the problem."""

  problem: str = 'digits,text'  # Some of `PROBLEMS`.
  cells: str | None = (
    None  # CODE:MEMORY with commas between, 'all', or 'every'.
  )
  seed: int = 0
  num_seeds: int | None = None
  num_workers: int = 8  # Devices; on a CPU they share its cores.

  num_steps: int | None = None
  batch_size: int | None = None  # Of one worker.
  learning_rate: float | None = None  # Of codes of large variance a part of it.
  clip: float = 5.0  # The norm of the mean that an optimiser gets at most.
  num_evaluations: int = 10  # Beside the one before the first step.

  fraction: float = 0.1  # Of the entries that sparse codes keep.
  rank: int = 1  # Of low-rank codes.
  levels: int = 4  # Of QSGD and its like.
  sketch_size: float = 0.2
  retention: float = 0.9
  hybrid_fraction: float = 0.2  # Of the residual's entries that hEFSGD keeps.

  text: str = 'docstrings'  # Or a file of UTF-8.
  preset: str = 'small'  # The decoder: one of `TEXT_PRESETS`.
  length: int | None = None  # Characters of a row.
  eval_windows: int = 32  # Rows that training and validation loss are of.


PRESETS = {
  'digits': dict(
    cells='all',
    num_seeds=2,
    num_steps=300,
    batch_size=16,
    learning_rate=0.05,
  ),
  'small': dict(
    cells='none:none,sign:full,power_sgd:full,power_sgd:sketched',
    num_seeds=2,
    num_steps=150,
    batch_size=2,
    learning_rate=1e-2,
    length=64,
  ),
  'gpt2_small': dict(
    cells='none:none,power_sgd:full,power_sgd:coded,power_sgd:sketched',
    num_seeds=1,
    num_steps=100_000,
    batch_size=12,
    learning_rate=6e-4,
    length=1024,
  ),
}
"""'small' and 'gpt2_small' are of text."""


class Plan(NamedTuple):
  """What `PRESETS` and the config say of one problem."""

  cells: Sequence[tuple[str, str]]  # Names of code and memory.
  num_seeds: int
  num_steps: int
  batch_size: int
  learning_rate: float
  length: int = 0


class Code(NamedTuple):
  """A code of the table."""

  make: Callable[[Config], compressor.Compressor]
  rate: float = 1.0  # Part of the learning rate that its variance allows.


def _sparse(make, **options):
  return lambda config: make(fraction=config.fraction, **options)


CODES = {
  'none': Code(lambda config: identity.identity()),
  'bfloat16': Code(lambda config: quantize.cast(jnp.bfloat16)),
  'blocks_8bit': Code(lambda config: quantize.blocks_8bit()),
  'qsgd': Code(lambda config: quantize.qsgd(config.levels), rate=0.3),
  'k_level': Code(lambda config: quantize.k_level(config.levels), rate=0.3),
  'rotated': Code(lambda config: quantize.rotated(config.levels), rate=0.3),
  'random_k': Code(_sparse(sparse.random_k)),
  'random_k_scaled': Code(_sparse(sparse.random_k, scaled=True), rate=0.1),
  'block_k': Code(_sparse(sparse.block_k)),
  'top_k': Code(_sparse(sparse.top_k)),
  'top_k_qsgd': Code(
    lambda config: compose.quantized(
      sparse.top_k(fraction=config.fraction), config.levels
    )
  ),
  'top_k_sign': Code(
    lambda config: compose.signed(sparse.top_k(fraction=config.fraction))
  ),
  'sign': Code(lambda config: sign.scaled_sign()),
  'majority': Code(
    lambda config: sign.majority_vote(config.num_workers), rate=0.3
  ),
  'power_sgd': Code(lambda config: low_rank.power_sgd(config.rank)),
  'unbiased_rank': Code(
    lambda config: low_rank.unbiased(config.rank), rate=0.1
  ),
}
"""Each is of `emc2.compression`."""

MEMORIES = {
  'none': lambda config: memories.none(),
  'full': lambda config: memories.full(),
  'hybrid': lambda config: memories.coded(
    sparse.top_k(fraction=config.hybrid_fraction)
  ),
  'coded': lambda config: memories.coded(quantize.blocks_8bit()),
  'partial': lambda config: memories.partial(config.retention),
  'sketched': lambda config: memories.sketched(
    config.sketch_size, config.retention
  ),
  'two_level': lambda config: memories.two_level(
    sparse.top_k(fraction=config.hybrid_fraction / 2),
    sparse.top_k(fraction=config.hybrid_fraction / 2),
  ),
}
"""EFSGD is 'full', hEFSGD 'hybrid', ConEF 'coded' (in 8-bit blocks), iConEF-v1
'partial' without and 'sketched' with its sketch, and iConEF-v2 'two_level'."""

TABLE = {
  'none': ('none',),
  'bfloat16': ('none',),
  'blocks_8bit': ('none',),
  'qsgd': ('none',),
  'k_level': ('none',),
  'rotated': ('none',),
  'random_k': ('full',),
  'random_k_scaled': ('none',),
  'block_k': ('none', 'full', 'coded', 'sketched'),
  'top_k': ('none', 'full'),
  'top_k_qsgd': ('full',),
  'top_k_sign': ('full',),
  'sign': ('none', 'full'),
  'majority': ('none',),
  'power_sgd': tuple(MEMORIES),
  'unbiased_rank': ('none',),
}
"""The pairs that 'all' means; 'every' means all that there are."""


class Problem(NamedTuple):
  """What is minimised."""

  draw_params: Callable[[jax.Array], Any]
  draw_batch: Callable[[jax.Array, Any], Any]  # (key, constants) -> batch.
  loss_fn: Callable[[Any, Any], jax.Array]  # (params, batch) -> ().
  evaluate: Callable[[Any, Any], dict[str, jax.Array]]  # (params, constants).
  optimizer: optax.GradientTransformation  # For rate 1; what comes out is < 0.
  constants: Any  # Arrays.


class State(NamedTuple):
  """One run."""

  params: Any
  coded: Any  # State of the exchange.
  inner: Any  # State of the optimiser.


def check(config: Config) -> tuple[list[str], dict[str, Plan]]:
  """Refuses bad settings.

  Args:
    config: The settings.

  Returns:
    The names of the problems, and the plan of each.

  Raises:
    ValueError: If a setting breaks its rule, or there are too few devices.
  """
  problems = config.problem.split(',')
  for name in problems:
    arguments.check_one_of('problem', name, PROBLEMS)
  if len(set(problems)) < len(problems):
    raise ValueError(f'problem must differ, got {config.problem!r}.')
  least = dict(seed=0, num_seeds=1, num_steps=1, batch_size=1, length=1)
  least |= dict(num_evaluations=1, eval_windows=1, num_workers=1, rank=1)
  for name, low in least.items():
    arguments.check_at_least(name, getattr(config, name), low)
  for name in ('learning_rate', 'clip'):
    if getattr(config, name) is not None:
      arguments.check_positive(name, getattr(config, name))
  arguments.check_one_of('preset', config.preset, TEXT_PRESETS)
  if config.num_workers > len(jax.devices()):
    raise ValueError(
      f'num_workers must be at most the {len(jax.devices())} devices, got '
      f'{config.num_workers}.'
    )
  plans = {name: make_plan(config, name) for name in problems}
  for plan in plans.values():
    for code, memory in plan.cells:
      CODES[code].make(config)
      MEMORIES[memory](config)
  return problems, plans


def make_plan(config: Config, problem: str) -> Plan:
  """Fills in what the config leaves to the preset."""
  preset = PRESETS[config.preset if problem == 'text' else problem]
  given = {name: getattr(config, name, None) for name in preset}
  plan = Plan(**(preset | {k: x for k, x in given.items() if x is not None}))
  return plan._replace(cells=parse_cells(plan.cells))


def parse_cells(text: str) -> list[tuple[str, str]]:
  """Reads pairs of names.

  Args:
    text: CODE:MEMORY with commas between, or 'all', or 'every'.

  Returns:
    The pairs.

  Raises:
    ValueError: If a name is not known, or a pair comes twice.

  Examples:
    >>> parse_cells('sign:none,sign:full')
    [('sign', 'none'), ('sign', 'full')]
  """
  if text == 'all':
    return [(code, memory) for code in TABLE for memory in TABLE[code]]
  if text == 'every':
    return [(code, memory) for code in CODES for memory in MEMORIES]
  cells = []
  for part in text.split(','):
    code, _, memory = part.partition(':')
    if code not in CODES or memory not in MEMORIES:
      raise ValueError(
        f'cells must be CODE:MEMORY of {list(CODES)} and {list(MEMORIES)}, '
        f'with commas between, got {part!r}.'
      )
    cells.append((code, memory))
  if len(set(cells)) < len(cells):
    raise ValueError(f'cells must differ, got {text!r}.')
  return cells


def as_matrices(params: Any) -> Any:
  """Views each array of two or more axes as the matrix nearest to a square.

  Norms and biases, also those stacked over layers, become vectors: a matrix
  with an axis of less than 8 is not worth a code.

  Args:
    params: A tree of arrays.

  Returns:
    The same arrays with one axis or two.

  Examples:
    >>> as_matrices(jnp.zeros((3, 3, 16, 32))).shape
    (144, 32)
    >>> as_matrices(jnp.zeros((2, 64))).shape
    (128,)
  """

  def view(leaf):
    shape = leaf.shape
    splits = [
      (math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))
    ]
    splits = [split for split in splits if min(split) >= 8]
    if not splits:
      return leaf.reshape(-1)
    return leaf.reshape(max(splits, key=min))

  return jax.tree.map(view, params)


def make_digits(config: Config, plan: Plan) -> Problem:
  """Classification of digits by Nesterov's momentum; a fifth is held out."""

  def read(split):
    dataset = data_lib.digits.read(split)
    images = np.float32(dataset.images) / 255
    return images, dataset.labels

  build = lambda key: digits.Classifier(
    'cnn', widths=(16, 32), rngs=nnx.Rngs(key)
  )
  draw = lambda key: nnx.to_pure_dict(nnx.state(build(key)))
  graphdef = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))
  shapes = jax.eval_shape(draw, jax.random.key(0))

  def logits_of(params, images):
    return nnx.merge(graphdef, _like(params, shapes))(images)

  def loss_fn(params, batch):
    images, labels = batch
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        logits_of(params, images), labels
      )
    )

  def draw_batch(key, constants):
    images, labels = constants['train']
    rows = jax.random.randint(key, (plan.batch_size,), 0, labels.shape[0])
    return images[rows], labels[rows]

  def evaluate(params, constants):
    images, labels = constants['validation']
    hits = jnp.argmax(logits_of(params, images), axis=-1) == labels
    return {
      'train_loss': loss_fn(params, constants['train']),
      'validation_loss': loss_fn(params, constants['validation']),
      'validation_accuracy': jnp.mean(hits),
    }

  drops = {int(part * plan.num_steps): 0.1 for part in (0.6, 0.85)}
  return Problem(
    draw_params=jax.jit(lambda key: as_matrices(draw(key))),
    draw_batch=draw_batch,
    loss_fn=loss_fn,
    evaluate=jax.jit(evaluate),
    optimizer=optax.chain(
      optax.trace(0.9, nesterov=True),
      optax.scale_by_schedule(optax.piecewise_constant_schedule(-1.0, drops)),
    ),
    constants={'train': read('train'), 'validation': read('test')},
  )


def make_text(config: Config, plan: Plan) -> Problem:
  """The next character of a text by Adam; the end of it is held out."""
  tokens = data_lib.text.open(config.text)
  size = decoder.PRESETS[config.preset]
  model = nnx.eval_shape(lambda: decoder.Decoder(size, rngs=nnx.Rngs(0)))
  shapes, apply_fn = decoder.split(model)

  def logits_of(params, batch):
    return apply_fn(_like(params, shapes), batch[:, :-1])

  def loss_fn(params, batch):
    return decoder.next_token_loss(logits_of(params, batch), batch)

  def draw_batch(key, constants):
    return data_lib.text.sample_batch(
      key, constants['train'], plan.batch_size, plan.length
    )

  def mean(fn, rows):
    one = lambda row: fn(row[None])
    return jnp.mean(jax.lax.map(one, rows, batch_size=8))

  def evaluate(params, constants):
    def accuracy(rows):
      guess = jnp.argmax(logits_of(params, rows), axis=-1)
      return jnp.mean(guess == rows[:, 1:])

    loss = functools.partial(loss_fn, params)
    held_out = constants['validation_windows']
    return {
      'train_loss': mean(loss, constants['train_windows']),
      'validation_loss': mean(loss, held_out),
      'validation_accuracy': mean(accuracy, held_out),
    }

  windows = lambda part: data_lib.text.validation_windows(
    part, plan.length, config.eval_windows
  )
  falling = optax.cosine_decay_schedule(-1.0, plan.num_steps, alpha=0.1)
  return Problem(
    draw_params=jax.jit(
      lambda key: as_matrices(decoder.draw_params(size, key))
    ),
    draw_batch=draw_batch,
    loss_fn=loss_fn,
    evaluate=jax.jit(evaluate),
    optimizer=optax.chain(
      optax.scale_by_adam(b2=0.99), optax.scale_by_schedule(falling)
    ),
    constants={
      'train': tokens.train,
      'train_windows': windows(tokens.train),
      'validation_windows': windows(tokens.validation),
    },
  )


def _like(params, shapes):
  """Gives arrays the shapes of a model, which `as_matrices` took."""
  return jax.tree.map(lambda x, like: x.reshape(like.shape), params, shapes)


MAKE = {'digits': make_digits, 'text': make_text}


def make_exchange(
  config: Config, cell: tuple[str, str], key: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
  """The mean of gradients over workers, by a code and with a memory."""
  code, memory = cell
  return transforms.compressed_mean(
    CODES[code].make(config),
    memory=MEMORIES[memory](config),
    axis_name=mesh_lib.DATA,
    key=key,
  )


def train(
  config: Config,
  plan: Plan,
  problem: Problem,
  cell: tuple[str, str],
  workdir: epath.PathLike,
) -> dict[str, Any]:
  """Trains with one code and memory, once with each seed.

  Args:
    config: The settings.
    plan: Of the problem.
    problem: What is minimised.
    cell: Names of the code and the memory.
    workdir: Their folder.

  Returns:
    What evaluations gave, steps (m,) and values (m, seeds) by name; bits that a
    worker sends in a step, bytes of its memory, seconds of the steps of one
    seed, and which seeds diverged, (seeds,).
  """
  mesh = mesh_lib.make(
    jax.devices()[: config.num_workers], data=config.num_workers
  )
  everywhere, specs = jax.P(), transforms.compressed_mean_specs()
  rate = plan.learning_rate * CODES[cell[0]].rate
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.clip),
    problem.optimizer,
    optax.scale(rate),
  )
  exchange = make_exchange(config, cell)

  def begin(params, key):
    return make_exchange(config, cell, key).init(params)

  begin = jax.jit(
    jax.shard_map(begin, mesh=mesh, in_specs=everywhere, out_specs=specs)
  )

  def reduce(key, params, coded, constants):
    """On one worker: the mean of all losses and that of all gradients."""
    worker = jax.lax.axis_index(mesh_lib.DATA)
    batch = problem.draw_batch(jax.random.fold_in(key, worker), constants)
    # Or JAX would add up the gradients of all workers itself, uncoded.
    own = jax.lax.pcast(params, mesh_lib.DATA, to='varying')
    loss, grads = jax.value_and_grad(problem.loss_fn)(own, batch)
    mean, coded = exchange.update(grads, coded)
    return jax.lax.pmean(loss, mesh_lib.DATA), mean, coded

  reduce = jax.shard_map(
    reduce,
    mesh=mesh,
    in_specs=(everywhere, everywhere, specs, everywhere),
    out_specs=(everywhere, everywhere, specs),
  )

  def step(key, state, batch):
    _, constants = batch
    loss, mean, coded = reduce(key, state.params, state.coded, constants)
    updates, inner = optimizer.update(mean, state.inner, state.params)
    params = optax.apply_updates(state.params, updates)
    # A seed that diverges does not end the others.
    loss = jnp.where(jnp.isfinite(loss), loss, 1e9)
    return State(params, coded, inner), {'loss': loss}

  constants = mesh_lib.place(problem.constants, mesh)
  evaluate_every = max(1, plan.num_steps // config.num_evaluations)
  logs, seconds, root = [], 0.0, jax.random.key(config.seed)
  for seed in range(plan.num_seeds):
    folder = epath.Path(workdir) / str(seed)
    key = jax.random.fold_in(root, seed)
    # No step draws from this key.
    keys = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
    of_params, of_exchange = mesh_lib.place(keys, mesh)
    params = problem.draw_params(of_params)
    coded = begin(params, of_exchange)
    state = runner.train(
      State(params, coded, optimizer.init(params)),
      step,
      constants=constants,
      key=key,
      num_steps=plan.num_steps,
      workdir=folder,
      name=f'{cell[0]}:{cell[1]} {seed}',
      steps_per_call=runner.largest_divisor(evaluate_every, 50),
      log_every=max(1, plan.num_steps // 50),
      checkpoint_every=evaluate_every * config.num_evaluations,
      # On one device: all of them would do the same work.
      evaluate=lambda state: problem.evaluate(
        jax.device_get(state.params), problem.constants
      ),
      evaluate_every=evaluate_every,
    )
    logs.append(runner.read_metrics(folder))
    seconds += plan.num_steps * runner.seconds_per_step(folder)
  joined = {}
  for key in logs[0].keys() - {'loss'}:
    values = np.stack([log[key][1] for log in logs], axis=1)
    joined[key] = logs[0][key][0], values
  losses = joined['train_loss'][1]
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.coded.memories))
  return joined | {
    'bits': 32 * int(state.coded.words[1]),
    'memory_bytes': held // config.num_workers,
    'seconds': seconds / plan.num_seeds,
    # Comparisons with NaN are false.
    'diverged': ~(losses[-1] <= losses[0]),
  }


def summarize(log: dict[str, Any]) -> dict[str, float]:
  """Numbers by metric, of what `train` returns."""
  summary = {
    name: float(np.mean(compression_figure.ends(log, name)))
    for name in ('train_loss', 'validation_loss', 'validation_accuracy')
  }
  summary['num_diverged'] = float(np.sum(log['diverged']))
  for name in ('bits', 'memory_bytes', 'seconds'):
    summary[name] = float(log[name])
  return summary


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Trains with every code and memory on every problem, and draws."""
  problems, plans = check(config)
  made = {name: MAKE[name](config, plan) for name, plan in plans.items()}
  summary, panels = {}, []
  for name in problems:
    plan, logs = plans[name], {}
    for cell in plan.cells:
      folder = workdir / name / '.'.join(cell)
      logs[cell] = train(config, plan, made[name], cell, folder)
      found = summarize(logs[cell])
      summary |= {f'{name}.{".".join(cell)}.{k}': x for k, x in found.items()}
    panels.append(compression_figure.Panel(_title(config, name, plan), logs))
  figure = compression_figure.draw(panels, list(CODES), list(MEMORIES))
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


def _title(config, problem, plan):
  model = {'digits': 'digits, CNN', 'text': f'text, decoder {config.preset}'}
  seeds = f'{plan.num_seeds} seed{"s" if plan.num_seeds > 1 else ""}'
  steps = f'{plan.num_steps:,} steps of {config.num_workers} workers'
  return f'{model[problem]}, {steps}, {seeds}'


if __name__ == '__main__':
  mesh_lib.use_cpu_devices(8)
  runner.launch(Config(), run)
