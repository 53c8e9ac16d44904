"""Contrastive encoders by EMC², SogCLR, SimCLR and their peers, side by side.

  python -m emc2.experiments.contrastive --workdir=runs/contrastive

trains a small convolutional encoder on scikit-learn's digits at batch size 4,
four methods with three seeds each: minutes on two CPU cores, no download.
`figure.png` shows how far each method's mean gradient is from the exact one,
the global loss, and the accuracy of a linear probe; `result.json` holds, for
each METHOD,

  METHOD.gradient_error     |mean estimate - exact gradient| at the end, the
                            mean over passes through the data at frozen
                            parameters
  METHOD.global_loss        the objective, exactly
  METHOD.probe_accuracy     of a linear classifier of the features, test split
  METHOD.knn1_accuracy      of the nearest neighbour; knn10_accuracy of ten
  METHOD.seconds_per_step   of training alone

as means over the seeds. The first two need a data set small enough to compare
all pairs (`--config.exact`). Other data: `--config.data=` a folder
`split/class/file` or STL-10's binaries; the papers' recipes:
`--config.preset=stl10_resnet18` or `imagenet100_resnet50`.
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

from emc2 import contrastive, transforms
from emc2 import mesh as mesh_lib
from emc2.contrastive import objective
from emc2.experiments import augment, evaluate, models, runner, schedules
from emc2.experiments import data as data_lib


@dataclasses.dataclass
class Config:
  """Settings; what is None is as the preset says."""

  preset: str = 'digits'
  method: str | None = None  # Names of `METHODS`, with commas between.
  seed: int = 0
  num_seeds: int | None = None
  devices: int = 1  # That split the batch; -1 takes all.

  # Data.
  data: str | None = None  # 'digits' or a folder.
  image_size: int | None = None  # To which the images of a folder are resized.
  split: str | None = None  # That the encoder is trained on.
  recipe: str | None = None  # Augmentation: a name of `augment.RECIPES`.
  num_views: int | None = None  # Fixed views of a sample; 0: ever fresh ones.
  memory_limit: int = data_lib.dataset.MEMORY_LIMIT  # Bytes of images kept.

  # Encoder.
  encoder: str | None = None  # A name of `models.NAMES`.
  embedding: int | None = None
  hidden: int | None = None
  projector_layers: int | None = None
  norm: str | None = None
  dtype: str = 'float32'  # Of the encoder's computation.

  # Training.
  batch_size: int | None = None
  num_epochs: int | None = None
  optimizer: str | None = None  # A name of `OPTIMIZERS`.
  learning_rate: float | None = None
  weight_decay: float | None = None
  warmup_epochs: int | None = None
  steps_per_call: int | None = None
  log_every: int | None = None
  checkpoint_every: int | None = None
  num_evaluations: int | None = None  # Over the run, beside the first.

  # Methods.
  inverse_temperature: float | None = None
  burn_in: float | None = None  # EMC².
  out_of_batch: str = 'reencode'  # EMC²: or 'cached', 'drop'.
  capacity: int | None = None  # EMC²: states embedded at most; 0 means all.
  released: bool = False  # EMC²: as the authors' code.
  gamma: float | None = None  # SogCLR, iSogCLR.
  rho: float = 0.3  # iSogCLR.
  refresh: float | None = None  # Negative cache: part refreshed in a step.
  num_keys: int = 1024  # MoCo.

  # Evaluation.
  probe: str | None = None  # 'sgd' is the paper's, 'sklearn' converges.
  exact: int = 6_000  # Most views for which the exact gradient is computed.
  exact_epochs: int = 8  # Over which an estimate is averaged to compare it.


PRESETS = {
  'digits': dict(
    method='emc2,sogclr,simclr,negative_cache',
    num_seeds=3,
    data='digits',
    split='train',
    recipe='digits',
    num_views=2,
    encoder='convnet',
    embedding=32,
    hidden=64,
    projector_layers=0,
    norm='none',
    batch_size=4,
    num_epochs=20,
    optimizer='adam',
    learning_rate=1e-3,
    weight_decay=0.0,
    warmup_epochs=1,
    steps_per_call=100,
    log_every=100,
    checkpoint_every=2_000,
    num_evaluations=8,
    inverse_temperature=5.0,
    burn_in=0.5,
    capacity=0,
    gamma=0.9,
    refresh=0.01,
    probe='sklearn',
  ),
  'cifar10': dict(
    method='emc2,simclr',
    num_seeds=1,
    data='cifar10',
    split='train',
    recipe='cifar10_sogclr',
    num_views=0,
    encoder='resnet_small',
    embedding=128,
    hidden=128,
    projector_layers=0,
    norm='none',
    batch_size=32,
    num_epochs=10,
    optimizer='adam',
    learning_rate=1e-3,
    weight_decay=1e-4,
    warmup_epochs=1,
    steps_per_call=10,
    log_every=10,
    checkpoint_every=500,
    num_evaluations=4,
    inverse_temperature=1 / 0.2,
    burn_in=0.5,
    capacity=0,
    gamma=0.9,
    refresh=0.01,
    probe='sklearn',
  ),
  'stl10_resnet18': dict(
    method='emc2',
    num_seeds=1,
    data='stl10_binary',
    split='unlabeled',
    recipe='stl10',
    num_views=0,
    encoder='resnet18',
    embedding=512,
    hidden=512,
    projector_layers=0,
    norm='none',
    batch_size=32,
    num_epochs=100,
    optimizer='adam',
    learning_rate=1e-4,
    weight_decay=1e-4,
    warmup_epochs=10,
    steps_per_call=25,
    log_every=100,
    checkpoint_every=3_125,
    num_evaluations=20,
    inverse_temperature=14.28,
    burn_in=0.5,
    capacity=4,
    gamma=0.9,
    refresh=0.01024,
    probe='sgd',
  ),
  'imagenet100_resnet50': dict(
    method='emc2',
    num_seeds=1,
    data='imagenet100',
    split='train',
    image_size=256,
    recipe='imagenet100',
    num_views=0,
    encoder='resnet50',
    embedding=128,
    hidden=2048,
    projector_layers=1,
    norm='none',
    batch_size=256,
    num_epochs=800,
    optimizer='lars',
    learning_rate=1.2,
    weight_decay=1e-6,
    warmup_epochs=10,
    steps_per_call=1,
    log_every=50,
    checkpoint_every=500,
    num_evaluations=80,
    inverse_temperature=14.28,
    burn_in=0.5,
    capacity=16,
    gamma=0.9,
    refresh=0.01,
    probe='sgd',
  ),
}
"""The default, a small one for folders, and the recipes of the EMC² paper
(Yau et al., 2024, https://arxiv.org/abs/2404.10575)."""

OPTIMIZERS = {
  'adam': schedules.adam,
  'lars': transforms.lars,
  'sgd': schedules.sgd,
}


def _emc2(config, num_samples, axis_name, **settings):
  chains = dict(
    burn_in=config.burn_in,
    out_of_batch=config.out_of_batch,
    capacity=config.capacity or None,
    released=config.released,
    embedding_size=config.embedding
    if config.out_of_batch == 'cached'
    else None,
  )
  return contrastive.emc2.emc2(
    num_samples,
    inverse_temperature=config.inverse_temperature,
    num_views=config.num_views or None,
    axis_name=axis_name,
    **(chains | settings),
  )


def _negative_cache(config, num_samples, axis_name):
  return contrastive.negative_cache.negative_cache(
    num_samples,
    embedding_size=config.embedding,
    inverse_temperature=config.inverse_temperature,
    num_views=config.num_views or None,
    refresh_fraction=config.refresh,
    num_shards=config.devices if axis_name else 1,
    axis_name=axis_name,
  )


_RESAMPLE = dict(
  proposals='resample',
  burn_in=0.0,
  out_of_batch='reencode',
  capacity=None,
  released=False,
  embedding_size=None,
)
METHODS = {
  'emc2': _emc2,
  'emc2_resample': functools.partial(_emc2, **_RESAMPLE),
  'sogclr': lambda config, num_samples, axis_name: contrastive.sogclr.sogclr(
    num_samples,
    inverse_temperature=config.inverse_temperature,
    gamma=config.gamma,
    axis_name=axis_name,
  ),
  'isogclr': lambda config, num_samples, axis_name: contrastive.isogclr.isogclr(
    num_samples,
    inverse_temperature=config.inverse_temperature,
    gamma=config.gamma,
    rho=config.rho,
    axis_name=axis_name,
  ),
  'simclr': lambda config, num_samples, axis_name: contrastive.simclr.simclr(
    inverse_temperature=config.inverse_temperature, axis_name=axis_name
  ),
  'dcl': lambda config, num_samples, axis_name: contrastive.simclr.simclr(
    inverse_temperature=config.inverse_temperature,
    decoupled=True,
    axis_name=axis_name,
  ),
  'negative_cache': _negative_cache,
  'moco': lambda config, num_samples, axis_name: contrastive.moco.moco(
    config.num_keys,
    embedding_size=config.embedding,
    inverse_temperature=config.inverse_temperature,
    axis_name=axis_name,
  ),
}
"""By name: `(config, num_samples, axis_name) -> Estimator`."""


class Resident(NamedTuple):
  """What every step reads, where the data fit on the device."""

  key: jax.Array  # (), of the augmentations.
  seed: jax.Array  # (), uint32: of the order of the samples.
  images: jax.Array  # (m, h, w, c), uint8; or (m, A + 1, h, w, c), float32.


class Loaded(NamedTuple):
  """What one step reads, where a host loads its images."""

  key: jax.Array  # (), of the augmentations.
  index: jax.Array  # (k,), int32: samples of the batch.
  images: jax.Array  # (k, h, w, c), uint8.
  more_index: jax.Array  # (n,), int32: samples beside the batch.
  more_images: jax.Array  # (n, h, w, c), uint8.


class Task(NamedTuple):
  """All of a run but its method and seed."""

  config: Config
  dataset: data_lib.Dataset
  recipe: augment.Recipe
  encoder: models.PureEncoder
  encoder_shape: tuple[int, int, int]  # Height, width, channels of a view.
  build: Callable[[nnx.Rngs], models.Encoder]
  steps_per_epoch: int
  mesh: jax.sharding.Mesh | None


def resolve(config: Config) -> Config:
  """Fills what is None from the preset, and refuses what cannot be.

  Raises:
    ValueError: If a name is unknown or a number is out of its range.
  """
  _check_name('preset', config.preset, PRESETS)
  given = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if value is not None
  }
  config = Config(**(PRESETS[config.preset] | given))
  for method in config.method.split(','):
    _check_name('method', method, METHODS)
  _check_name('optimizer', config.optimizer, OPTIMIZERS)
  _check_name('recipe', config.recipe, augment.RECIPES)
  _check_name('encoder', config.encoder, models.NAMES)
  _check_name('dtype', config.dtype, ('float32', 'bfloat16'))
  for name, least in (
    ('num_seeds', 1),
    ('batch_size', 2),
    ('num_epochs', 1),
    ('exact_epochs', 1),
    ('num_evaluations', 1),
    ('num_views', 0),
    ('capacity', 0),
  ):
    if getattr(config, name) < least:
      raise ValueError(
        f'{name} must be at least {least}, got {getattr(config, name)}.'
      )
  return config


def open_task(config: Config) -> Task:
  """Opens the data and builds the encoder of a resolved config."""
  return make_task(config, _open(config, config.split))


def make_task(config: Config, dataset: data_lib.Dataset) -> Task:
  """Builds the encoder of a resolved config for images that are there.

  Raises:
    ValueError: If the data do not fit the settings.
  """
  recipe = augment.RECIPES[config.recipe]
  height, width, channels = dataset.image_shape
  if recipe.size is not None:
    height = width = recipe.size
  shape = (height, width, channels)
  build = functools.partial(_build, config=config, image_shape=shape)
  mesh = None
  if config.devices != 1:
    devices = jax.devices()
    count = len(devices) if config.devices == -1 else config.devices
    if not 1 <= count <= len(devices):
      raise ValueError(
        f'devices must be -1 or from 1 to {len(devices)}, got {count}.'
      )
    config = dataclasses.replace(config, devices=count)
    mesh = mesh_lib.make(devices[:count], data=count)
    if config.batch_size % count:
      raise ValueError(
        f'batch_size must be a multiple of devices, {count}, got '
        f'{config.batch_size}.'
      )
  return Task(
    config=config,
    dataset=dataset,
    recipe=recipe,
    encoder=models.split(build(nnx.Rngs(0))),
    encoder_shape=shape,
    build=build,
    steps_per_epoch=data_lib.steps_per_epoch(
      dataset.num_samples, config.batch_size
    ),
    mesh=mesh,
  )


def make_estimator(task: Task, method: str) -> contrastive.Estimator:
  """The method by its name."""
  axis_name = None if task.mesh is None else mesh_lib.DATA
  make = METHODS[method]
  return make(task.config, task.dataset.num_samples, axis_name)


def make_optimizer(task: Task) -> optax.GradientTransformation:
  """The optimiser on its schedule."""
  config = task.config
  rate = schedules.warmup_cosine(
    config.learning_rate,
    steps_per_epoch=task.steps_per_epoch,
    num_epochs=config.num_epochs,
    warmup_epochs=config.warmup_epochs,
  )
  return OPTIMIZERS[config.optimizer](rate, weight_decay=config.weight_decay)


def draw_batch(
  task: Task, seed: Any, key: jax.Array, step: Any, data: Any = ()
) -> contrastive.Batch:
  """The batch of a step: samples in shuffled epochs, each in two views."""
  config = task.config
  index = data_lib.batch_indices(
    seed,
    step,
    num_samples=task.dataset.num_samples,
    batch_size=config.batch_size,
  )
  view = contrastive.draw_views(
    jax.random.fold_in(key, 1), config.batch_size, config.num_views or None
  )
  return contrastive.Batch(index, view, data)


def make_embed_fn(task: Task) -> contrastive.EmbedFn:
  """Embeds views; `data` is a `Resident` or a `Loaded`."""

  def embed_fn(params, data, index, view):
    if isinstance(data, Loaded):
      here = jnp.concatenate([data.index, data.more_index])
      images = jnp.concatenate([data.images, data.more_images])
      row = jnp.argmax(here[None, :] == index[:, None], axis=1)
      images = _augment(data.key, images[row], index, view, task.recipe)
    elif data.images.ndim == 5:
      plain = jnp.uint32(task.config.num_views)
      slot = jnp.minimum(view, plain).astype(jnp.int32)
      images = data.images[index, slot]
    else:
      images = data.images[index]
      images = _augment(data.key, images, index, view, task.recipe)
    return task.encoder.apply_embeddings(params, images)

  return embed_fn


def resident_data(task: Task, seed: int) -> Resident | None:
  """What every step reads on the device, or None if a host must load it.

  The fixed views of a small data set are made once, the plain ones last.
  """
  config, dataset = task.config, task.dataset
  if not dataset.in_memory:
    return None
  images = jnp.asarray(dataset.images)
  data = Resident(jax.random.key(seed), jnp.uint32(seed), images)
  num_values = dataset.num_samples * (config.num_views + 1)
  num_values *= int(np.prod(task.encoder_shape))
  if not config.num_views or 4 * num_values > config.memory_limit:
    return data
  index = jnp.arange(dataset.num_samples, dtype=jnp.int32)
  make = jax.jit(functools.partial(_augment, recipe=task.recipe))
  stored = [
    make(data.key, images, index, jnp.full(index.shape, view, jnp.uint32))
    for view in [*range(config.num_views), contrastive.PLAIN_VIEW]
  ]
  return data._replace(images=jnp.stack(stored, axis=1))


def make_gradient_error(
  task: Task, estimator: contrastive.Estimator, embed_fn: contrastive.EmbedFn
) -> Callable[..., dict[str, jax.Array]]:
  """Compares the mean estimate of some epochs with the exact gradient.

  Returns:
    `(key, state, data) -> {'gradient_error', 'global_loss'}`, jitted.
  """
  config, num_samples = task.config, task.dataset.num_samples
  views = jnp.arange(config.num_views, dtype=jnp.uint32)
  views = jnp.broadcast_to(views, (num_samples, config.num_views))

  def exact_loss(params, data):
    embeddings = objective.embed_all(
      params, data, embed_fn, num_samples=num_samples, views=views
    )
    return objective.global_loss(
      embeddings, inverse_temperature=config.inverse_temperature
    )

  @jax.jit
  def gradient_error(key, state, data):
    loss, exact = jax.value_and_grad(exact_loss)(state.params, data)

    def visit(carry, step):
      memory, total = carry
      step_key = jax.random.fold_in(key, step)
      # A seed of its own: the order must not repeat that of the training.
      seed = data.seed ^ jnp.uint32(2**31)
      batch = draw_batch(task, seed, step_key, step, data)
      grad_fn = jax.grad(estimator.surrogate, argnums=2, has_aux=True)
      grads, (memory, _) = grad_fn(
        step_key, memory, state.params, batch, embed_fn
      )
      return (memory, jax.tree.map(jnp.add, total, grads)), None

    num_steps = config.exact_epochs * task.steps_per_epoch
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (_, total), _ = jax.lax.scan(visit, (state.memory, zeros), steps)
    apart = jax.tree.map(lambda t, e: t / num_steps - e, total, exact)
    return {
      'gradient_error': optax.tree.norm(apart),
      'exact_gradient_norm': optax.tree.norm(exact),
      'global_loss': loss,
    }

  return gradient_error


def make_loader(task: Task, method: 'Method', seed: int) -> Callable[..., Any]:
  """Loads a step's images on the host: its own, and those its method names.

  Of several processes each reads the rows of its own devices.

  Returns:
    `(key, state, number of the step) -> Batch` with `data` a `Loaded`.
  """

  def load(key, state, number):
    batch = jax.device_get(draw_batch(task, seed, key, number))
    index = batch.index
    contrastive.check_batch(index, task.dataset.num_samples)
    if task.mesh is not None:
      spec = jax.sharding.PartitionSpec
      specs = contrastive.Batch(spec(mesh_lib.DATA), spec(None, mesh_lib.DATA))
      batch = mesh_lib.place(batch, task.mesh, specs)
    else:
      batch = jax.device_put(batch)
    batch = batch._replace(data=load_images(task, seed, index))
    more = np.asarray(method.pending(key, state, batch))
    return batch._replace(data=load_images(task, seed, index, more))

  return load


def load_images(
  task: Task, seed: int, index: np.ndarray, more: np.ndarray | None = None
) -> Loaded:
  """Reads samples index (k,) and more (n,), and puts them on the devices."""

  def read(index):
    mine = np.array_split(index, jax.process_count())[jax.process_index()]
    return mine, task.dataset.fetch(mine)

  key = jax.random.key(seed)
  loaded = *read(index), *read(index[:0] if more is None else more)
  if task.mesh is None:
    return Loaded(key, *jax.device_put(loaded))
  key = mesh_lib.place(key, task.mesh)
  return Loaded(key, *mesh_lib.gather_shards(loaded, task.mesh))


class Method(NamedTuple):
  """The functions of one method, which all its seeds share once compiled."""

  name: str
  init: Callable[..., Any]  # (key, params) -> state.
  step: Callable[..., Any]  # (key, state, batch) -> (state, info).
  pending: Callable[..., Any]  # (key, state, batch) -> samples to load.
  fill: Callable[..., Any] | None  # (memory, params, data, index) -> memory.
  measure: Callable[..., Any] | None  # (key, state, data) -> numbers.


def make_method(task: Task, name: str) -> Method:
  """Binds a method to the encoder, the optimiser and the mesh of a run."""
  config, dataset = task.config, task.dataset
  estimator, embed_fn = make_estimator(task, name), make_embed_fn(task)
  algorithm = contrastive.algorithm(
    estimator,
    embed_fn,
    make_optimizer(task),
    mesh=task.mesh,
    data_specs=None if dataset.in_memory else _loaded_specs(),
  )

  def step(key, state, batch):
    if dataset.in_memory:
      number, data = batch
      batch = draw_batch(task, data.seed, key, number, data)
    return algorithm.step(key, state, batch)

  everywhere = None  # So that each process can read which samples are named.
  if task.mesh is not None:
    spec = jax.sharding.PartitionSpec()
    everywhere = jax.sharding.NamedSharding(task.mesh, spec)

  @functools.partial(jax.jit, out_shardings=everywhere)
  def pending(key, state, batch):
    return estimator.pending(key, state.memory, state.params, batch, embed_fn)

  fill = measure = None
  if name == 'negative_cache' and task.mesh is None:

    @jax.jit
    def fill(memory, params, data, index):
      return contrastive.negative_cache.warm_cache(
        memory,
        params,
        data,
        embed_fn,
        index,
        num_samples=dataset.num_samples,
        num_views=config.num_views or None,
      )

  exact = config.num_views and dataset.in_memory and task.mesh is None
  if exact and dataset.num_samples * config.num_views <= config.exact:
    measure = make_gradient_error(task, estimator, embed_fn)
  init = jax.jit(algorithm.init)
  return Method(name, init, step, pending, fill, measure)


def train(
  task: Task, method: Method, seed: int, workdir: epath.PathLike
) -> Any:
  """Trains one method from one seed; returns its last state."""
  config = task.config
  key, data = jax.random.key(seed), resident_data(task, seed)
  params = models.draw_params(task.build, jax.random.fold_in(key, 2**31 - 1))
  if task.mesh is not None:
    key, params, data = mesh_lib.place((key, params, data), task.mesh)
  state = method.init(key, params)
  if method.fill is not None:
    state = state._replace(memory=warm_cache(task, method, state, seed, data))
  measure = None
  if method.measure is not None:
    measure = lambda state: method.measure(key, state, data)
  prepare = None
  if data is None:
    prepare = make_loader(task, method, seed)
  every = config.steps_per_call
  num_steps = config.num_epochs * task.steps_per_epoch
  whole_calls = lambda steps: math.ceil(steps / every) * every
  return runner.train(
    state,
    method.step,
    constants=data,
    prepare=prepare,
    key=key,
    num_steps=num_steps,
    workdir=workdir,
    name=f'{method.name}/{seed}',
    steps_per_call=every,
    log_every=config.log_every,
    checkpoint_every=whole_calls(config.checkpoint_every),
    evaluate=measure,
    evaluate_every=whole_calls(num_steps / config.num_evaluations),
  )


def warm_cache(
  task: Task, method: Method, state: contrastive.State, seed: int, data: Any
) -> Any:
  """Fills the negative cache with the embeddings of all samples."""
  num_samples, memory = task.dataset.num_samples, state.memory
  size = min(256, num_samples)
  for first in range(0, num_samples, size):
    # The last chunk goes back a little, so that all have one shape.
    first = min(first, num_samples - size)
    index = np.arange(first, first + size, dtype=np.int32)
    chunk = load_images(task, seed, index) if data is None else data
    memory = method.fill(memory, state.params, chunk, index)
  return memory


def probe(task: Task, seed: int, params: Any) -> dict[str, float]:
  """How well the features tell the classes apart."""
  config = task.config
  features, labels = {}, {}
  for split in ('train', 'test'):
    dataset = _open(config, split)
    features[split] = evaluate.extract_features(
      task.encoder.apply_features,
      params,
      dataset.images,
      batch_size=min(256, dataset.num_samples),
    )
    labels[split] = dataset.labels
  return evaluate.evaluate(
    jax.random.key(seed),
    features['train'],
    labels['train'],
    features['test'],
    labels['test'],
    num_classes=len(dataset.class_names),
    probe=config.probe,
  )


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  """Trains every method from every seed, evaluates and draws."""
  config = resolve(config)
  task = open_task(config)
  # All at once: bad settings end the run before its first step.
  methods = [make_method(task, name) for name in config.method.split(',')]
  runs, results = {}, {}
  for method in methods:
    for seed in range(config.seed, config.seed + config.num_seeds):
      folder = workdir / method.name / str(seed)
      state = train(task, method, seed, folder)
      metrics = runner.read_metrics(folder)
      numbers = probe(task, seed, state.params)
      numbers['seconds_per_step'] = runner.seconds_per_step(folder)
      for name in ('gradient_error', 'global_loss'):
        if name in metrics:
          numbers[name] = float(metrics[name][1][-1])
      runs[method.name, seed] = metrics, numbers
    ours = [n for (name, _), (_, n) in runs.items() if name == method.name]
    for metric in ours[0]:
      mean = np.mean([numbers[metric] for numbers in ours])
      results[f'{method.name}.{metric}'] = float(mean)
  runner.save_figure(draw(config, runs), workdir / 'figure.png')
  return results


def draw(config: Config, runs: dict[tuple[str, int], tuple[dict, dict]]) -> Any:
  """Draws gradient error and loss against steps, and the probes' accuracy.

  Args:
    config: A resolved config.
    runs: By (method, seed): the metrics over the run, and the final numbers.

  Returns:
    A Matplotlib figure.
  """
  from matplotlib import (
    figure,
    ticker,
  )  # A second to import; most runs end here.

  methods = list(dict.fromkeys(method for method, _ in runs))
  curves = [
    ('gradient_error', '|mean estimate - exact gradient|', True),
    ('global_loss', 'Global contrastive loss', False),
  ]
  curves = [c for c in curves if all(c[0] in m for m, _ in runs.values())]
  curves = curves or [('loss', 'Loss of the batch', False)]
  drawn = figure.Figure(figsize=(4.2 * (len(curves) + 1), 3.8), layout='tight')
  axes = drawn.subplots(1, len(curves) + 1)
  for axis, (name, title, logarithmic) in zip(axes, curves, strict=False):
    for number, method in enumerate(methods):
      seeds = [
        m[name] for (other, _), (m, _) in runs.items() if other == method
      ]
      steps, values = seeds[0][0], np.stack([v for _, v in seeds])
      # At the start all embeddings are alike, and so are all gradients: 0.
      steps, values = steps[logarithmic:], values[:, logarithmic:]
      color = f'C{number}'
      axis.plot(steps, values.mean(0), color=color, label=method)
      axis.fill_between(
        steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0
      )
    axis.set(title=title, xlabel='Steps')
    if logarithmic:
      axis.set_yscale('log')
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
  axes[len(curves) - 1].legend(frameon=False)
  for number, method in enumerate(methods):
    accuracy = [
      100 * numbers['probe_accuracy']
      for (other, _), (_, numbers) in runs.items()
      if other == method
    ]
    axes[-1].bar(number, np.mean(accuracy), color=f'C{number}', alpha=0.6)
    axes[-1].plot([number] * len(accuracy), accuracy, 'k.', ms=5)
    axes[-1].annotate(
      f'{np.mean(accuracy):.1f}',
      (number, 0),
      xycoords=('data', 'axes fraction'),
      xytext=(0, 8),
      textcoords='offset points',
      ha='center',
    )
  lowest = min(n['probe_accuracy'] for _, n in runs.values())
  axes[-1].set(
    title='Linear probe, test accuracy (%)',
    xticks=range(len(methods)),
    ylim=(max(0, 100 * lowest - 5), 101),
  )
  axes[-1].set_xticklabels(methods, rotation=15)
  drawn.suptitle(
    f'{config.data}: batch of {config.batch_size}, beta '
    f'{config.inverse_temperature:.3g}, {config.num_seeds} seeds'
  )
  return drawn


def _loaded_specs():
  spec = jax.sharding.PartitionSpec
  rows = spec(mesh_lib.DATA)
  return Loaded(spec(), rows, rows, rows, rows)


def _open(config, split):
  return data_lib.open(
    config.data,
    split,
    config.image_size,
    memory_limit=config.memory_limit,
  )


def _build(rngs, *, config, image_shape):
  return models.build(
    config.encoder,
    image_shape=image_shape,
    embedding=config.embedding,
    hidden=config.hidden,
    projector_layers=config.projector_layers,
    norm=config.norm,
    rngs=rngs,
    dtype=jnp.dtype(config.dtype),
  )


def _augment(key, images, index, view, recipe):
  return augment.augment(key, images, index, view, recipe=recipe)


def _check_name(name, value, known):
  if value not in known:
    raise ValueError(f'{name} must be one of {sorted(known)}, got {value!r}.')


if __name__ == '__main__':
  runner.launch(Config(), run)
