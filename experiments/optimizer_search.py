"""Which optimiser forgives a bad start: MADA, and those that it blends.

  python -m emc2.experiments.optimizer_search --workdir=runs/optimizer_search

trains a convolutional net on scikit-learn's digits in 24 runs from 12 starts, a
small decoder on docstrings from 6, and Reddi's problem, each by eight
optimisers: some ten minutes on two busy CPU cores, no download. That command,
with JAX 0.10.2, came to these training losses at the end:

              digits             text
              median    max      median   max
  adam        0.0132    lost     3.04     lost
  hyper_adam  0.0121    0.0975   2.94     3.54
  mada        0.0071    0.0235   2.87     2.96
  avgrad      0.0041    0.0107   3.04     3.33
  amsgrad     0.0232    0.0493   2.87     3.17
  yogi        0.0197    0.0432   2.78     3.20
  adan        0.0180    lost     3.00     lost
  lion        0.1111    0.2093   2.61     2.98

where 'lost' is above the first loss: 6 of Adam's 24 runs on digits and 2 of 6
on text were, of MADA's none. mada_vs_adam.p_value was 7e-4 on digits (22 pairs)
and 0.125 on text (5). Reddi's x was 0.994 of Adam, 0.328 of MADA and -0.204 of
AVGrad, with average regrets 0.223, 0.156 and 0.134. So MADA repairs the starts
that break Adam; it is not the best of all, and AMSGrad, AVGrad, Yogi and Lion
forgive these starts too.

On a smaller net from the same starts (64-32-10, tanh; 1,000 steps, one seed):

  learning rate   Adam           HyperAdam      MADA, median / max
  0.01            0.0137 / 0.585 0.0124 / 0.028 0.0030 / 0.012
  0.03            0.0211 / 2.320 0.0136 / 0.049 0.0019 / 0.015
  0.001           0.126 / 0.140  0.120 / 0.140  0.118 / 0.136

`figure.png` shows where each optimiser ended from each start, how it came
there, and the paths of MADA's coefficients. With PROBLEM of 'digits' (a small
net) and 'text' (a decoder of characters), `result.json` holds

  PROBLEM.METHOD.median        of the final training loss over starts and seeds
  PROBLEM.METHOD.mean          likewise
  PROBLEM.METHOD.max           likewise
  PROBLEM.METHOD.validation_median, .validation_mean, .validation_max
                               of the final validation loss
  PROBLEM.METHOD.num_diverged  runs that ended above a loss they began with,
                               which counts as if it had stayed
  PROBLEM.METHOD.seconds       of the steps of all runs, without compiling
  PROBLEM.mada_vs_adam.p_value            of a Wilcoxon signed-rank test of the
                               final training losses, two-sided, paired by
                               start and seed, from bad starts
  PROBLEM.mada_vs_adam.median_difference  of MADA's minus Adam's, of the same
  PROBLEM.mada_vs_adam.num_pairs          how many they are

and for 'reddi', on which Adam goes to the worst point of [-1, 1],

  reddi.METHOD.x               at the end; the best point is -1
  reddi.METHOD.average_regret  (1 / t) sum of l_t(x_t) - l_t(-1), at the end
  reddi.METHOD.seconds         as above

A start is a pair (b1, b2); it is good where 0.8 <= b1 <= 0.95 and b2 >= 0.9.
All runs of one seed have the same first parameters and batches. The pairs of
one seed are no independent samples of tasks: the test speaks of these starts.
Other text: `--config.text=FILE`. The second table, at the rate 0.01:
`--config.problem=digits --config.digits_model=mlp --config.num_steps=1000`.
A decoder of GPT-2's 124M: `--config.problem=text --config.preset=gpt2_small`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from etils import epath
from flax import nnx

from emc2 import transforms
from emc2.experiments import data as data_lib
from emc2.experiments import optimizer_search_figure, runner
from emc2.experiments.models import decoder, digits
from emc2.transforms import masks

PROBLEMS = ('digits', 'text', 'reddi')
DIGITS_MODELS = digits.KINDS
TEXT_PRESETS = ('small', 'gpt2_small')

PERIOD = 101
"""Of Reddi's problem: one step in so many has a large gradient."""


@dataclasses.dataclass
class Config:
  """Settings; what is None is as `PRESETS` says for the problem."""

  problem: str = 'digits,text,reddi'  # Some of `PROBLEMS`.
  optimizers: str = 'all'  # Or names of `METHODS`, with commas between.
  seed: int = 0
  num_seeds: int | None = None

  # Of digits and text.
  b1: str | None = None  # Numbers with commas between: a start is one of these
  b2: str | None = None  # and one of those.
  learning_rate: float | None = None  # Of Lion the tenth.
  num_steps: int | None = None
  batch_size: int | None = None
  side_by_side: int | None = None  # Runs that train at once.
  num_evaluations: int = 10  # Beside the one before the first step.
  hyper_learning_rate: float = 2.5e-3  # Of MADA's coefficients.
  hyper_momentum: float = 0.5  # Likewise.
  eps: float = 1e-8  # Below the roots; Yogi keeps its 1e-3.

  digits_model: str = 'cnn'  # Or 'mlp': 64-32-10, tanh.

  text: str = 'docstrings'  # Or a file of UTF-8.
  preset: str = 'small'  # The decoder: one of `TEXT_PRESETS`.
  length: int | None = None  # Characters of a row.
  eval_windows: int = 32  # Rows that training and validation loss are of.

  reddi_steps: int = 200_000


PRESETS = {
  'digits': dict(
    num_seeds=2,
    b1='0.01,0.5,0.9,0.99',
    b2='0.501,0.8,0.99',
    learning_rate=1e-2,
    num_steps=500,
    batch_size=32,
    side_by_side=24,
  ),
  'small': dict(
    num_seeds=1,
    b1='0.01,0.9,0.99',
    b2='0.501,0.99',
    learning_rate=1e-2,
    num_steps=200,
    batch_size=8,
    side_by_side=6,
    length=64,
  ),
  'gpt2_small': dict(
    num_seeds=1,
    b1='0.9,0.7',
    b2='0.95,0.8',
    learning_rate=6e-4,
    num_steps=100_000,
    batch_size=12,
    side_by_side=1,
    length=1024,
    warmup=2_000,
    weight_decay=0.1,
    clip=1.0,
  ),
}
"""'small' and 'gpt2_small' are of text. Where there is a warm-up, the learning
rate then falls along a cosine to a tenth."""


class Plan(NamedTuple):
  """What `PRESETS` and the config say of one problem."""

  num_seeds: int
  b1: Sequence[float]
  b2: Sequence[float]
  learning_rate: float
  num_steps: int
  batch_size: int
  side_by_side: int
  length: int = 0
  warmup: int = 0
  weight_decay: float = 0.0
  clip: float | None = None

  @property
  def starts(self) -> list[tuple[float, float]]:
    """All pairs (b1, b2)."""
    return list(itertools.product(self.b1, self.b2))


class Betas(NamedTuple):
  """What a method is made from; b1 and b2 may be traced."""

  rate: optax.ScalarOrSchedule
  b1: jax.typing.ArrayLike
  b2: jax.typing.ArrayLike
  eps: float
  hyper: dict[str, Any]  # Keyword arguments of MADA's learning.


def _adam(betas):
  return optax.scale_by_adam(betas.b1, betas.b2, betas.eps)


def _amsgrad(betas):
  return optax.scale_by_amsgrad(betas.b1, betas.b2, betas.eps)


def _avgrad(betas):
  return transforms.scale_by_avgrad(betas.b1, betas.b2, betas.eps)


def _yogi(betas):
  return optax.scale_by_yogi(betas.b1, betas.b2)


def _adan(betas):
  # Its second decay is of the differences; the third is what others call b2.
  return optax.scale_by_adan(b1=betas.b1, b3=betas.b2, eps=betas.eps)


def _lion(betas):
  # Its steps are of length 1 in each entry: its authors take a third to a tenth
  # of Adam's learning rate.
  return optax.chain(optax.scale_by_lion(betas.b1, betas.b2), optax.scale(0.1))


def _mada(betas, **hyper):
  return transforms.scale_by_mada(
    betas.rate,
    betas.b1,
    betas.b2,
    rho=1.0,
    eps=betas.eps,
    **(betas.hyper | hyper),
  )


METHODS = {
  'adam': _adam,
  'hyper_adam': functools.partial(_mada, learn=('b1', 'b2')),
  'mada': _mada,
  'avgrad': _avgrad,
  'amsgrad': _amsgrad,
  'yogi': _yogi,
  'adan': _adan,
  'lion': _lion,
}
"""Each maps `Betas` to a transform that rescales gradients. MADA and HyperAdam,
which learns b1 and b2 alone, start as Adam."""


class Problem(NamedTuple):
  """What is minimised."""

  params: Any  # Every leaf starts with an axis of the seeds.
  draw_batch: Callable[[jax.Array, Any], Any]  # (key, constants) -> batch.
  loss_fn: Callable[[Any, Any], jax.Array]  # (params, batch) -> ().
  evaluate: Callable[[Any, Any], dict[str, jax.Array]]
  """(params of runs, constants) -> train_loss and validation_loss, (runs,)."""
  constants: Any  # Arrays.


class State(NamedTuple):
  """Runs side by side; every leaf starts with an axis of them."""

  params: Any
  inner: Any  # State of the transform.
  b1: jax.Array  # (runs,): of the start.
  b2: jax.Array  # Likewise.
  seed: jax.Array  # (runs,), int32.


class ReddiState(NamedTuple):
  """One run on Reddi's problem."""

  x: jax.Array  # (), before the projection onto [-1, 1].
  inner: Any  # State of the transform.
  regret: jax.Array  # (): the sum so far.


def check(config: Config) -> tuple[list[str], list[str], dict[str, Plan]]:
  """Refuses bad settings.

  Args:
    config: The settings.

  Returns:
    The names of the problems, those of the optimisers, and what is planned for
    digits and text.

  Raises:
    ValueError: If a setting breaks its rule.
  """
  problems = _names('problem', config.problem, PROBLEMS)
  known = tuple(METHODS)
  everything = ','.join(known)
  chosen = everything if config.optimizers == 'all' else config.optimizers
  methods = _names('optimizers', chosen, known)
  if problems == ['reddi'] and methods == ['hyper_adam']:
    raise ValueError(
      'optimizers must name another than hyper_adam, which is Adam on reddi.'
    )
  least = dict(
    seed=0, num_seeds=1, num_steps=1, batch_size=1, side_by_side=1, length=1
  )
  least |= dict(num_evaluations=1, eval_windows=1, reddi_steps=1)
  for name, low in least.items():
    value = getattr(config, name)
    if value is not None and value < low:
      raise ValueError(f'{name} must be at least {low}, got {value}.')
  for name in ('learning_rate', 'eps'):
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:
      raise ValueError(f'{name} must be finite and positive, got {value}.')
  if not 0 <= config.hyper_learning_rate < math.inf:
    raise ValueError(
      'hyper_learning_rate must be finite and at least 0, got '
      f'{config.hyper_learning_rate}.'
    )
  if not 0 <= config.hyper_momentum < 1:
    raise ValueError(
      f'hyper_momentum must be in [0, 1), got {config.hyper_momentum}.'
    )
  for name, choices in (
    ('digits_model', DIGITS_MODELS),
    ('preset', TEXT_PRESETS),
  ):
    if getattr(config, name) not in choices:
      raise ValueError(
        f'{name} must be one of {choices}, got {getattr(config, name)!r}.'
      )
  plans = {}
  for problem in problems:
    if problem != 'reddi':
      plans[problem] = plan = make_plan(config, problem)
      for (b1, b2), name in itertools.product(plan.starts, methods):
        # Outside of its bounds MADA refuses a start, by name.
        METHODS[name](Betas(1.0, b1, b2, config.eps, _hyper(config)))
  return problems, methods, plans


def make_plan(config: Config, problem: str) -> Plan:
  """Fills in what the config leaves to the preset; checks the starts."""
  preset = PRESETS[config.preset if problem == 'text' else problem]
  given = {name: getattr(config, name, None) for name in preset}
  plan = Plan(**(preset | {k: x for k, x in given.items() if x is not None}))
  return plan._replace(b1=_numbers('b1', plan.b1), b2=_numbers('b2', plan.b2))


def _names(field, value, known):
  names = value.split(',')
  for name in names:
    if name not in known:
      raise ValueError(
        f'{field} must be some of {list(known)}, with commas between, got '
        f'{name!r}.'
      )
  if len(set(names)) < len(names):
    raise ValueError(f'{field} must differ, got {value!r}.')
  return names


def _numbers(field, value):
  try:
    numbers = [float(entry) for entry in value.split(',')]
  except ValueError:
    numbers = []
  if not numbers or not all(0 < x < 1 for x in numbers):
    raise ValueError(
      f'{field} must be numbers in (0, 1), with commas between, got {value!r}.'
    )
  if len(set(numbers)) < len(numbers):
    raise ValueError(f'{field} must differ, got {value!r}.')
  return numbers


def _hyper(config):
  return dict(
    hyper_learning_rate=config.hyper_learning_rate,
    hyper_momentum=config.hyper_momentum,
  )


def make_digits(config: Config, plan: Plan) -> Problem:
  """Classification of digits; a fifth of them is held out."""

  def read(split):
    dataset = data_lib.digits.read(split)
    images = jnp.asarray(dataset.images, jnp.float32) / 255
    return images, jnp.asarray(dataset.labels)

  build = lambda key: digits.Classifier(config.digits_model, rngs=nnx.Rngs(key))
  draw = lambda key: nnx.to_pure_dict(nnx.state(build(key)))
  graphdef = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))

  def loss_fn(params, batch):
    images, labels = batch
    logits = nnx.merge(graphdef, params)(images)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    )

  def draw_batch(key, constants):
    images, labels = constants['train']
    rows = jax.random.randint(key, (plan.batch_size,), 0, labels.shape[0])
    return images[rows], labels[rows]

  def evaluate(params, constants):
    return {
      'train_loss': loss_fn(params, constants['train']),
      'validation_loss': loss_fn(params, constants['validation']),
    }

  return Problem(
    params=_draw_params(config, plan, draw),
    draw_batch=draw_batch,
    loss_fn=loss_fn,
    evaluate=jax.jit(jax.vmap(evaluate, in_axes=(0, None))),
    constants={'train': read('train'), 'validation': read('test')},
  )


def make_text(config: Config, plan: Plan) -> Problem:
  """Prediction of the next character; the end of the text is held out."""
  tokens = data_lib.text.open(config.text)
  size = decoder.PRESETS[config.preset]
  model = nnx.eval_shape(lambda: decoder.Decoder(size, rngs=nnx.Rngs(0)))
  apply_fn = decoder.split(model).apply_fn

  def loss_fn(params, batch):
    return decoder.next_token_loss(apply_fn(params, batch[:, :-1]), batch)

  def draw_batch(key, constants):
    return data_lib.text.sample_batch(
      key, constants['train'], plan.batch_size, plan.length
    )

  def evaluate(params, constants):
    one = lambda row: loss_fn(params, row[None])
    mean = lambda rows: jnp.mean(
      jax.lax.map(one, rows, batch_size=plan.batch_size)
    )
    return {
      'train_loss': mean(constants['train_windows']),
      'validation_loss': mean(constants['validation_windows']),
    }

  windows = lambda part: jnp.asarray(
    data_lib.text.validation_windows(part, plan.length, config.eval_windows)
  )
  return Problem(
    params=_draw_params(
      config, plan, functools.partial(decoder.draw_params, size)
    ),
    draw_batch=draw_batch,
    loss_fn=loss_fn,
    evaluate=jax.jit(jax.vmap(evaluate, in_axes=(0, None))),
    constants={
      'train': jnp.asarray(tokens.train),
      'train_windows': windows(tokens.train),
      'validation_windows': windows(tokens.validation),
    },
  )


def _draw_params(config, plan, draw):
  """One set of parameters for each seed."""
  # No step draws from this key.
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
  draw = jax.jit(draw)
  drawn = [draw(jax.random.fold_in(key, i)) for i in range(plan.num_seeds)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)


MAKE = {'digits': make_digits, 'text': make_text}


def make_transform(
  config: Config,
  plan: Plan,
  name: str,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimiser from a start.

  Args:
    config: The settings.
    plan: Of the problem.
    name: Of the optimiser.
    b1: (), in (0, 1); may be traced.
    b2: Likewise.

  Returns:
    The transform; its update needs `params` and takes `hyper_grads`.
  """
  rate = plan.learning_rate
  if plan.warmup:
    rate = optax.warmup_cosine_decay_schedule(
      0.0,
      plan.learning_rate,
      plan.warmup,
      max(plan.num_steps, plan.warmup + 1),
      plan.learning_rate / 10,
    )
  steps = [METHODS[name](Betas(rate, b1, b2, config.eps, _hyper(config)))]
  if plan.clip is not None:
    steps.insert(0, optax.clip_by_global_norm(plan.clip))
  if plan.weight_decay:
    decay = optax.add_decayed_weights(plan.weight_decay, masks.has_many_axes)
    steps.append(decay)
  steps.append(optax.scale_by_learning_rate(rate))
  return optax.with_extra_args_support(optax.chain(*steps))


def coefficients_of(inner: Any) -> dict[str, Any]:
  """MADA's coefficients by name, under one name; nothing of other states."""
  try:
    return {'coefficients': transforms.mada_coefficients(inner)}
  except KeyError:
    return {}


def train(
  config: Config,
  plan: Plan,
  problem: Problem,
  name: str,
  workdir: epath.PathLike,
) -> dict[str, Any]:
  """Trains by one optimiser from all starts, with all seeds.

  Args:
    config: The settings.
    plan: Of the problem.
    problem: What is minimised.
    name: Of the optimiser.
    workdir: Its folder.

  Returns:
    What the metrics hold, steps (m,) and values (m, runs) by name, the starts
    of one seed after those of another; the seconds of the steps; and which runs
    diverged, (runs,).
  """

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
  def init(params, b1, b2, seed):
    params = jax.tree.map(lambda leaf: leaf[seed], params)
    tx = make_transform(config, plan, name, b1, b2)
    return State(params, tx.init(params), b1, b2, seed)

  def step(key, state, batch):
    _, constants = batch

    def one(state):
      # All starts of a seed see the same batches.
      own = jax.random.fold_in(key, state.seed)
      sample = problem.draw_batch(own, constants)
      loss, grads = jax.value_and_grad(problem.loss_fn)(state.params, sample)
      tx = make_transform(config, plan, name, state.b1, state.b2)
      updates, inner = tx.update(
        grads, state.inner, state.params, hyper_grads=grads
      )
      params = optax.apply_updates(state.params, updates)
      return state._replace(params=params, inner=inner), loss

    state, losses = jax.vmap(one)(state)
    # A run that diverges does not end the others.
    middle = jnp.nanmedian(jnp.where(jnp.isfinite(losses), losses, jnp.nan))
    return state, {'loss': middle} | jax.vmap(coefficients_of)(state.inner)

  evaluate_every = max(1, plan.num_steps // config.num_evaluations)
  logs, seconds = [], 0.0
  for number, (b1, b2, seed) in enumerate(_groups(plan)):
    folder = epath.Path(workdir) / str(number)
    runner.train(
      init(problem.params, b1, b2, seed),
      step,
      constants=problem.constants,
      key=jax.random.key(config.seed),
      num_steps=plan.num_steps,
      workdir=folder,
      name=f'{name} {number}',
      steps_per_call=runner.largest_divisor(evaluate_every, 25),
      log_every=max(1, plan.num_steps // 100),
      checkpoint_every=evaluate_every,
      evaluate=lambda state: problem.evaluate(state.params, problem.constants),
      evaluate_every=evaluate_every,
    )
    logs.append(runner.read_metrics(folder))
    seconds += plan.num_steps * runner.seconds_per_step(folder)
  joined = {}
  for key in logs[0].keys() - {'loss'}:
    values = np.concatenate([log[key][1] for log in logs], axis=1)
    joined[key] = logs[0][key][0], values
  train, validation = joined['train_loss'][1], joined['validation_loss'][1]
  # Comparisons with NaN are false.
  kept = (train[-1] <= train[0]) & (validation[-1] <= validation[0])
  return joined | {'seconds': seconds, 'diverged': ~kept}


def _groups(plan: Plan) -> Iterator[Sequence[np.ndarray]]:
  """Arrays b1, b2 and seed of the runs that train side by side."""
  runs = [
    (*start, seed) for seed in range(plan.num_seeds) for start in plan.starts
  ]
  for first in range(0, len(runs), plan.side_by_side):
    b1, b2, seed = zip(*runs[first : first + plan.side_by_side], strict=True)
    yield np.float32(b1), np.float32(b2), np.int32(seed)


def train_reddi(
  config: Config, name: str, workdir: epath.PathLike
) -> dict[str, Any]:
  r"""Runs one optimiser on the problem on which Adam fails.

  With :math:`x \in [-1, 1]`, :math:`\ell_t(x) = 1010 x` where
  :math:`t \bmod 101 = 1` and :math:`-10 x` else: the mean has its minimum at
  -1. The learning rate is 1e-3, of Lion the tenth, :math:`\beta_1` 0.9 and
  :math:`\beta_2` 0.99. MADA learns :math:`\beta_3, \rho, c`.

  Args:
    config: The settings.
    name: Of the optimiser.
    workdir: Its folder.

  Returns:
    What the metrics hold, steps (m,) and values (m,) by name; and the seconds.

  References:
    Reddi, Kale, Kumar, "On the Convergence of Adam and Beyond", 2018,
    https://arxiv.org/abs/1904.09237, section 5; the settings are MADA's.
  """
  rate = 1e-3
  hyper = dict(hyper_learning_rate=0.1, hyper_momentum=0.9, hyper_clip=None)
  hyper['learn'] = ('b3', 'rho', 'c')
  betas = Betas(rate, 0.9, 0.99, 1e-6, hyper)
  tx = optax.with_extra_args_support(
    optax.chain(METHODS[name](betas), optax.scale_by_learning_rate(rate))
  )

  def step(key, state, number):
    del key
    x = jnp.clip(state.x, -1.0, 1.0)
    slope = jnp.where((number + 1) % PERIOD == 1, 1010.0, -10.0)
    regret = state.regret + slope * (x + 1)
    # Where the projection has moved x, no coefficient has.
    hyper_grads = jnp.where(x == state.x, slope, 0.0)
    updates, inner = tx.update(slope, state.inner, x, hyper_grads=hyper_grads)
    info = {'loss': regret / (number + 1).astype(regret.dtype), 'x': x}
    state = ReddiState(x + updates, inner, regret)
    return state, info | coefficients_of(inner)

  x = jnp.zeros([])
  steps_per_call = runner.largest_divisor(config.reddi_steps, 1_000)
  # At one place of the period, or the regret would be a saw.
  log_every = max(1, config.reddi_steps // 200)
  log_every = log_every // PERIOD * PERIOD or log_every
  runner.train(
    ReddiState(x, tx.init(x), jnp.zeros([])),
    step,
    key=jax.random.key(config.seed),
    num_steps=config.reddi_steps,
    workdir=workdir,
    name=name,
    steps_per_call=steps_per_call,
    log_every=log_every,
    checkpoint_every=100 * steps_per_call,
  )
  seconds = config.reddi_steps * runner.seconds_per_step(workdir)
  return runner.read_metrics(workdir) | {'seconds': seconds}


def is_good(start: tuple[float, float]) -> bool:
  """Whether a start (b1, b2) is near those that people take."""
  return 0.8 <= start[0] <= 0.95 and start[1] >= 0.9


def summarize(plan: Plan, logs: dict[str, dict[str, Any]]) -> dict[str, float]:
  """Statistics of one problem.

  Args:
    plan: Of the problem.
    logs: By optimiser, as `train` returns them.

  Returns:
    Numbers by METHOD.metric.
  """
  summary, finals = {}, {}
  for name, log in logs.items():
    ends = {
      prefix: optimizer_search_figure.cap(log[f'{prefix}_loss'][1])[-1]
      for prefix in ('train', 'validation')
    }
    for prefix, losses in ends.items():
      start = '' if prefix == 'train' else f'{prefix}_'
      for statistic in (np.median, np.mean, np.max):
        key = f'{name}.{start}{statistic.__name__}'
        summary[key] = float(statistic(losses))
    finals[name] = ends['train']
    summary[f'{name}.num_diverged'] = float(np.sum(log['diverged']))
    summary[f'{name}.seconds'] = log['seconds']
  bad = np.array([not is_good(start) for start in plan.starts])
  bad = np.tile(bad, plan.num_seeds)
  if {'adam', 'mada'} <= finals.keys() and bad.any():
    compared = compare(finals['mada'][bad], finals['adam'][bad])
    summary |= {f'mada_vs_adam.{k}': x for k, x in compared.items()}
  return summary


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """Tests whether paired losses differ: Wilcoxon's signed ranks, two-sided.

  Args:
    ours: (n,), finite.
    theirs: (n,), likewise.

  Returns:
    p_value, median_difference of ours minus theirs, and num_pairs.

  Examples:
    >>> ours, theirs = np.arange(1.0, 6), 2 * np.arange(1.0, 6)
    >>> found = compare(ours, theirs)
    >>> found['p_value'], found['median_difference']
    (0.0625, -3.0)
  """
  apart = ours - theirs
  p_value = 1.0
  if np.any(apart != 0):
    p_value = scipy.stats.wilcoxon(apart).pvalue
  return {
    'p_value': float(p_value),
    'median_difference': float(np.median(apart)),
    'num_pairs': float(len(apart)),
  }


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Trains by every optimiser on every problem, compares, and draws."""
  problems, methods, plans = check(config)
  made = {name: MAKE[name](config, plan) for name, plan in plans.items()}
  summary, panels = {}, []
  for problem in problems:
    folder = workdir / problem
    if problem == 'reddi':
      names = [name for name in methods if name != 'hyper_adam']
      logs = {n: train_reddi(config, n, folder / n) for n in names}
      for name, log in logs.items():
        summary[f'reddi.{name}.x'] = log['x'][1][-1]
        summary[f'reddi.{name}.average_regret'] = log['loss'][1][-1]
        summary[f'reddi.{name}.seconds'] = log['seconds']
      panels.append(optimizer_search_figure.Reddi(logs))
      continue
    plan = plans[problem]
    logs = {
      n: train(config, plan, made[problem], n, folder / n) for n in methods
    }
    found = summarize(plan, logs)
    summary |= {f'{problem}.{key}': x for key, x in found.items()}
    good = np.array([is_good(start) for start in plan.starts])
    panels.append(
      optimizer_search_figure.Trained(
        title=_title(config, problem, plan),
        logs=logs,
        good=np.tile(good, plan.num_seeds),
      )
    )
  figure = optimizer_search_figure.draw(panels)
  runner.save_figure(figure, workdir / 'figure.png')
  return summary


def _title(config, problem, plan):
  model = {
    'digits': f'digits, {config.digits_model.upper()}',
    'text': f'text, decoder {config.preset}',
  }[problem]
  seeds = f'{plan.num_seeds} seed{"s" if plan.num_seeds > 1 else ""}'
  return f'{model}, learning rate {plan.learning_rate:g}, {seeds}'


if __name__ == '__main__':
  runner.launch(Config(), run)
