"""Bits to a loss: coded uploads, local steps, and both at once.

  python -m emc2.experiments.qsparse --workdir=runs/qsparse

trains softmax regression on scikit-learn's digits by 15 workers, three seeds
side by side: some four minutes on two CPU cores, no download. A worker takes 8
of its 100 digits a step, and uploads after each step or, in the rows with a 4
or an 8, after so many; in async rows each at times of its own, 1 to 8 steps
apart. What travels is all of the 650 numbers, or a code of them: QSGD with 16
levels, signs with a mean magnitude, the 40 largest (top_k), these at 16 levels
(quantized), or their signs (signed); the rest is remembered for the next
upload. That command, with JAX 0.10.2, came to these medians over seeds, where
a hit is a training loss of the master's model below 0.25:

                        loss  accuracy  hit: step  bits    vanilla's over these
  vanilla              .2217      .976        540  1.68e8    1
  local_8              .2220      .983        520  2.03e7    8.3
  qsgd_1               .2215      .980        520  3.07e7    5.5
  sign_1               .2214      .980        540  5.52e6   30
  top_k_1              .2217      .980        520  1.31e7   13
  top_k_8              .2220      .980        500  1.56e6  108
  quantized_1          .2217      .980        520  5.24e6   32
  quantized_8          .2219      .980        480  6.05e5  279
  signed_1             .2216      .980        520  3.68e6   46
  signed_4             .2217      .983        500  8.85e5  190
  signed_8             .2219      .980        500  4.39e5  384
  async_quantized_8    .2219      .983        500  1.11e6  152
  async_signed_8       .2219      .983        520  8.23e5  205
  top_k_1_no_memory    .8055      .960      never
  sign_1_no_memory     .9859      .936      never
  signed_1_no_memory   .6875      .953      never
  signed_8_no_memory   .2745      .973      never

With memory every method ends within 1 % of vanilla, and local steps, choice,
levels and signs each save their factor. Where digits are sorted, so that a
worker holds one class or two, memory is what keeps signs from diverging, and
local steps drift apart, coded or not:

                        loss  accuracy  hit: step  bits    vanilla's over these
  vanilla              .2215      .983        520  1.62e8    1
  sign_1               .2234      .980        540  5.52e6   29
  signed_1             .2215      .983        520  3.68e6   44
  local_8              .2713      .963      never
  signed_8             .2711      .963      never
  signed_1_no_memory   2.139      .939      never
  sign_1_no_memory     24.25      .616      never

`figure.png` shows losses against bits and against steps, medians with the range
of the seeds, and the bits to a hit. With SPLIT of 'even' (digits are dealt at
random) and 'sorted', and METHOD of `METHODS`, `result.json` holds medians over
seeds

  SPLIT.METHOD.loss      of the master's model on all training rows, with the
                         quadratic term, at the end
  SPLIT.METHOD.accuracy  of the same on test rows
  SPLIT.METHOD.bits      that all workers have uploaded, as the paper counts
  SPLIT.METHOD.num_hits  how many seeds came below the target
  SPLIT.METHOD.hit_step  where they first were seen to be, looking every 20
                         steps; absent if half of the seeds or more never were,
                         like the next two
  SPLIT.METHOD.hit_bits  uploaded until then
  SPLIT.METHOD.saving    vanilla's hit_bits over these; absent without vanilla

A net in place of the regression: `--config.problem=mlp` (64-32-10, tanh) or
`--config.problem=cnn`, with Nesterov's momentum in the local steps, which
`--config.momentum_policy` keeps, zeroes or averages at an upload.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from sklearn import datasets

from emc2 import arguments, compression, consensus
from emc2.compression import compose, identity, quantize, sign, sparse
from emc2.consensus import qsparse, schedules
from emc2.experiments import qsparse_figure, runner
from emc2.experiments.models import digits

PROBLEMS = ('softmax', 'mlp', 'cnn')
NUM_TRAIN = 1_500
NUM_CLASSES = 10


@dataclasses.dataclass
class Config:
  """Settings; what is None is as `PRESETS` says for the problem."""

  problem: str = 'softmax'  # One of `PROBLEMS`.
  even: str = 'all'  # Or names of `METHODS`, with commas between, or 'none'.
  sorted: str = 'some'  # Likewise; 'some' are those of `SORTED`.
  seed: int = 0
  num_seeds: int = 3  # Which train side by side.

  num_workers: int = 15
  batch_size: int = 8  # Of each worker.
  num_steps: int | None = None
  check_every: int = 20  # Steps between looks at the master's loss.
  target: float | None = None  # The training loss that counts as a hit.

  k: int | None = None  # Entries that are kept of an array, or all if fewer.
  levels: int = 16  # To which these are rounded.
  learning_rate: float | None = None
  momentum: float | None = None  # Nesterov's, of the local steps.
  momentum_policy: str = 'keep'  # At an upload: one of `qsparse.MOMENTUM`.
  weight_decay: float | None = None  # Half of it times |x|^2 is in the loss.


PRESETS = {
  'softmax': dict(
    num_steps=2_000,
    target=0.25,
    k=40,
    learning_rate=0.5,
    momentum=0.0,
    weight_decay=1 / NUM_TRAIN,
  ),
  'mlp': dict(
    num_steps=2_000,
    target=0.1,
    k=100,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.0,
  ),
  'cnn': dict(
    num_steps=1_000,
    target=0.1,
    k=100,
    learning_rate=0.05,
    momentum=0.9,
    weight_decay=0.0,
  ),
}


class Method(NamedTuple):
  """What workers send, and when."""

  code: str  # One of `CODES`.
  period: int  # The most steps between two uploads of a worker.
  asynchronous: bool = False  # Whether gaps are random, else all the period.
  memory: bool = True


METHODS = {
  'vanilla': Method('identity', 1),
  'local_8': Method('identity', 8),
  'qsgd_1': Method('qsgd', 1),
  'sign_1': Method('sign', 1),
  'top_k_1': Method('top_k', 1),
  'top_k_8': Method('top_k', 8),
  'quantized_1': Method('quantized', 1),
  'quantized_8': Method('quantized', 8),
  'signed_1': Method('signed', 1),
  'signed_4': Method('signed', 4),
  'signed_8': Method('signed', 8),
  'async_quantized_8': Method('quantized', 8, asynchronous=True),
  'async_signed_8': Method('signed', 8, asynchronous=True),
  'top_k_1_no_memory': Method('top_k', 1, memory=False),
  'sign_1_no_memory': Method('sign', 1, memory=False),
  'signed_1_no_memory': Method('signed', 1, memory=False),
  'signed_8_no_memory': Method('signed', 8, memory=False),
}

SORTED = (
  'vanilla',
  'local_8',
  'sign_1',
  'sign_1_no_memory',
  'signed_1',
  'signed_1_no_memory',
  'signed_8',
)
"""What runs by default where each worker holds few classes."""

CODES: dict[str, Callable[['Plan'], compression.Compressor]] = {
  'identity': lambda plan: identity.identity(),
  'qsgd': lambda plan: quantize.qsgd(plan.levels, scaled=True),
  'sign': lambda plan: sign.scaled_sign(),
  'top_k': lambda plan: sparse.top_k(plan.k, at_most=True),
  'quantized': lambda plan: compose.quantized(
    sparse.top_k(plan.k, at_most=True), plan.levels
  ),
  'signed': lambda plan: compose.signed(sparse.top_k(plan.k, at_most=True)),
}
"""Of the levels, 'qsgd' and 'quantized' are divided by 1 + beta."""


class Plan(NamedTuple):
  """What `PRESETS` and the config say."""

  num_steps: int
  target: float
  k: int
  learning_rate: float
  momentum: float
  weight_decay: float
  levels: int


class Problem(NamedTuple):
  """What is minimised."""

  params: Any  # Every leaf starts with an axis of the seeds.
  loss_fn: Callable[[Any, Any], jax.Array]  # (params, batch) -> ().
  evaluate: Callable[[Any, Any], dict[str, jax.Array]]
  """(params of seeds, data) -> train_loss and test_accuracy, (seeds,)."""


class State(NamedTuple):
  """Seeds side by side: an axis before every leaf but the count."""

  master: qsparse.State
  uploads: jax.Array  # (seeds,), int32: of all workers so far.


AXES = qsparse.State(0, 0, 0, 0, 0, 0, None)
"""Of the seeds. That they share a count leaves steps without an upload free of
the work of one."""


def check(config: Config) -> tuple[dict[str, list[str]], Plan]:
  """Refuses bad settings.

  Args:
    config: The settings.

  Returns:
    The names of the methods by the split of the data, and the plan.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  arguments.check_one_of('problem', config.problem, PROBLEMS)
  arguments.check_one_of(
    'momentum_policy', config.momentum_policy, qsparse.MOMENTUM
  )
  for name in ('num_seeds', 'num_workers', 'batch_size', 'check_every'):
    arguments.check_at_least(name, getattr(config, name), 1)
  arguments.check_at_least('seed', config.seed, 0)
  if config.num_workers > NUM_TRAIN:
    raise ValueError(
      f'num_workers must be at most {NUM_TRAIN}, got {config.num_workers}.'
    )
  preset = PRESETS[config.problem]
  given = {name: getattr(config, name) for name in preset}
  given = {name: x for name, x in given.items() if x is not None}
  plan = Plan(**(preset | given), levels=config.levels)
  for name in ('num_steps', 'k', 'levels'):
    arguments.check_at_least(name, getattr(plan, name), 1)
  for name in ('target', 'learning_rate'):
    arguments.check_positive(name, getattr(plan, name))
  arguments.check_at_least('weight_decay', plan.weight_decay, 0)
  if not 0 <= plan.momentum < 1:
    raise ValueError(f'momentum must be in [0, 1), got {plan.momentum}.')
  chosen = {
    'even': _names('even', config.even),
    'sorted': _names('sorted', config.sorted),
  }
  if not any(chosen.values()):
    raise ValueError("even and sorted must not both be 'none'.")
  return chosen, plan


def _names(field, value):
  if value in ('all', 'some', 'none'):
    return list({'all': METHODS, 'some': SORTED, 'none': ()}[value])
  names = value.split(',')
  if len(set(names)) < len(names) or not set(names) <= METHODS.keys():
    raise ValueError(
      f"{field} must be 'all', 'some', 'none' or different ones of "
      f'{list(METHODS)} with commas between, got {value!r}.'
    )
  return names


def read(num_workers: int, split: str) -> dict[str, Any]:
  """Deals 1,500 digits to workers, and keeps the 297 others to test on.

  Args:
    num_workers: R; if it does not divide 1,500, the last few digits are in no
      worker's part.
    split: 'even' deals them in a random order, 'sorted' by their classes.

  Returns:
    'train' and 'test', each images (n, 64) in [0, 1] and labels (n,), int32;
    'held', int32 (num_workers, 1500 // num_workers): rows of 'train'.
  """
  images, labels = datasets.load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(labels.size)
  images = jnp.asarray(images[order] / 16, jnp.float32)
  labels = jnp.asarray(labels[order], jnp.int32)
  rows = np.arange(NUM_TRAIN, dtype=np.int32)
  if split == 'sorted':
    rows = rows[np.argsort(labels[:NUM_TRAIN], kind='stable')]
  size = NUM_TRAIN // num_workers
  return {
    'train': (images[:NUM_TRAIN], labels[:NUM_TRAIN]),
    'test': (images[NUM_TRAIN:], labels[NUM_TRAIN:]),
    'held': jnp.asarray(rows[: size * num_workers].reshape(num_workers, -1)),
  }


def make_problem(config: Config, plan: Plan) -> Problem:
  """Classification of digits: softmax regression from 0, or a net."""
  if config.problem == 'softmax':
    # One array, of which k entries are kept: 64 weights and a bias a class.
    draw = lambda key: jnp.zeros((65 * NUM_CLASSES,))

    def apply_fn(params, images):
      weights = params.reshape(65, NUM_CLASSES)
      return images @ weights[:-1] + weights[None, -1]

  else:
    build = lambda key: digits.Classifier(config.problem, rngs=nnx.Rngs(key))
    draw = lambda key: nnx.to_pure_dict(nnx.state(build(key)))
    graphdef = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))
    apply_fn = lambda params, images: nnx.merge(graphdef, params)(images)

  def loss_fn(params, batch):
    images, labels = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(
      apply_fn(params, images), labels
    )
    squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    return jnp.mean(losses) + 0.5 * plan.weight_decay * squares

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None))
  def evaluate(params, data):
    images, labels = data['test']
    correct = jnp.argmax(apply_fn(params, images), axis=-1) == labels
    return {
      'train_loss': loss_fn(params, data['train']),
      'test_accuracy': jnp.mean(correct, dtype=jnp.float32),
    }

  # No step draws from this key.
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
  draw = jax.jit(draw)
  drawn = [draw(jax.random.fold_in(key, i)) for i in range(config.num_seeds)]
  params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
  return Problem(params, loss_fn, evaluate)


def make_table(config: Config, plan: Plan, method: Method) -> np.ndarray:
  """When workers upload: (seeds, steps), or (seeds, steps, workers)."""
  if not method.asynchronous:
    table = schedules.every(plan.num_steps, method.period)
    return np.stack([table] * config.num_seeds)
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2)
  tables = [
    schedules.random_gaps(
      jax.random.fold_in(key, i),
      plan.num_steps,
      config.num_workers,
      method.period,
    )
    for i in range(config.num_seeds)
  ]
  for table in tables:
    schedules.check_schedule(table, method.period)
  return np.stack(tables)


def train(
  config: Config,
  plan: Plan,
  problem: Problem,
  name: str,
  parts: dict[str, dict[str, Any]],
  workdir: epath.Path,
) -> dict[str, qsparse_figure.Curve]:
  """Trains by one method, all seeds side by side, on every split of the data.

  Args:
    config: The settings.
    plan: The plan.
    problem: What is minimised.
    name: Of the method.
    parts: By split, from `read`.
    workdir: Of the run.

  Returns:
    By split: what the master's model has come to, and by how many bits.
  """
  method = METHODS[name]
  code = CODES[method.code](plan)
  inner = optax.sgd(plan.learning_rate, plan.momentum or None, nesterov=True)
  table = jnp.asarray(make_table(config, plan, method))
  # Where all upload together, seeds do too.
  table, table_axis = (table, 0) if method.asynchronous else (table[0], None)

  def make(table):
    return consensus.qsparse_local(
      problem.loss_fn,
      inner,
      code,
      lambda count: table[count],
      num_workers=config.num_workers,
      error_feedback=method.memory,
      momentum=config.momentum_policy,
    )

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, table_axis), out_axes=AXES)
  def init(params, table):
    return make(table).init(jax.random.key(config.seed), params)

  def step(key, state, batch):
    _, constants = batch
    images, labels = constants['train']

    def one(seed, master, table):
      own_key, rows_key = jax.random.split(jax.random.fold_in(key, seed))
      held = constants['held']
      places = jax.random.randint(
        rows_key, (config.num_workers, config.batch_size), 0, held.shape[1]
      )
      rows = jnp.take_along_axis(held, places, axis=1)
      return make(table).step(own_key, master, (images[rows], labels[rows]))

    seeds = jnp.arange(config.num_seeds, dtype=jnp.int32)
    master, info = jax.vmap(one, (0, AXES, table_axis), (AXES, 0))(
      seeds, state.master, constants['table']
    )
    uploads = jnp.sum(info.uploads, axis=1, dtype=jnp.int32)
    state = State(master, state.uploads + uploads)
    return state, {'loss': jnp.mean(info.loss, axis=1)}

  one = jax.tree.map(lambda x: x[0], problem.params)
  averages = config.momentum_policy == 'average'
  moments = jax.eval_shape(inner.init, one) if averages else ()
  bits = qsparse.bits_per_upload(code, one, moments)
  start = State(
    init(problem.params, table), jnp.zeros([config.num_seeds], jnp.int32)
  )
  curves = {}
  # One after the other: the compiled step serves every split.
  for split, data in parts.items():
    folder = workdir / split / name
    runner.train(
      start,
      step,
      constants=data | {'table': table},
      key=jax.random.key(config.seed),
      num_steps=plan.num_steps,
      workdir=folder,
      name=f'{split} {name}',
      steps_per_call=config.check_every,
      log_every=config.check_every,
      checkpoint_every=50 * config.check_every,
      evaluate=lambda state, data=data: (
        problem.evaluate(state.master.params, data) | {'uploads': state.uploads}
      ),
      evaluate_every=config.check_every,
    )
    log = runner.read_metrics(folder)
    steps, losses = log['train_loss']
    curves[split] = qsparse_figure.Curve(
      steps=steps,
      bits=np.float64(bits) * log['uploads'][1],
      loss=losses,
      accuracy=log['test_accuracy'][1],
    )
  return curves


def summarize(
  curves: dict[str, qsparse_figure.Curve], target: float
) -> dict[str, float]:
  """Medians over seeds, of one split.

  Args:
    curves: By method.
    target: The loss that counts as a hit.

  Returns:
    Numbers by METHOD.metric.
  """
  summary, base = {}, None
  if 'vanilla' in curves:
    base = qsparse_figure.hit(curves['vanilla'], target).bits
  for name, curve in curves.items():
    found = qsparse_figure.hit(curve, target)
    summary[f'{name}.loss'] = float(np.median(curve.loss[-1]))
    summary[f'{name}.accuracy'] = float(np.median(curve.accuracy[-1]))
    summary[f'{name}.bits'] = float(np.median(curve.bits[-1]))
    summary[f'{name}.num_hits'] = float(np.sum(np.isfinite(found.steps)))
    # A median that is infinite was hit by no more than half of the seeds.
    if math.isfinite(np.median(found.steps)):
      summary[f'{name}.hit_step'] = float(np.median(found.steps))
      summary[f'{name}.hit_bits'] = float(np.median(found.bits))
      if base is not None and math.isfinite(np.median(base)):
        ratio = np.median(base) / np.median(found.bits)
        summary[f'{name}.saving'] = float(ratio)
  return summary


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Trains by every method on every split, counts bits, and draws."""
  chosen, plan = check(config)
  problem = make_problem(config, plan)
  parts = {
    split: read(config.num_workers, split)
    for split, names in chosen.items()
    if names
  }
  panels = {split: {} for split in parts}
  for name in METHODS:
    wanted = {split: x for split, x in parts.items() if name in chosen[split]}
    if wanted:
      found = train(config, plan, problem, name, wanted, workdir)
      for split, curve in found.items():
        panels[split][name] = curve
  summary = {
    f'{split}.{key}': x
    for split, curves in panels.items()
    for key, x in summarize(curves, plan.target).items()
  }
  seeds = f'{config.num_seeds} seed{"s" * (config.num_seeds > 1)}'
  figure = qsparse_figure.draw(
    panels,
    {name: METHODS[name] for curves in panels.values() for name in curves},
    target=plan.target,
    title=f'Qsparse-local-SGD, digits, {config.problem}: {config.num_workers} '
    f'workers, k = {plan.k}, {plan.levels} levels, {seeds}',
  )
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


if __name__ == '__main__':
  runner.launch(Config(), run)
