"""A regression of seconds, run as an experiment by the tests of the runner.

It draws each batch from an iterator with a position and noise from the key, so
that a run which forgets either ends elsewhere.
"""

import dataclasses
import itertools
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from emc2 import mesh
from emc2.experiments import runner


@dataclasses.dataclass
class Config:
  seed: int = 0
  size: int = 8
  num_steps: int = 60
  steps_per_call: int = 2
  log_every: int = 3
  checkpoint_every: int = 10
  step_size: float = 0.1
  methods: tuple[str, ...] = ('sgd', 'momentum')
  nan_at: int = -1
  # Seconds that each batch takes, so that a signal can come between two.
  wait: float = 0.0


class State(NamedTuple):
  params: jax.Array  # (size,)
  memory: dict[str, jax.Array]
  key: jax.Array  # Of the method, beside that of the runner.


class Info(NamedTuple):
  loss: jax.Array
  residual: jax.Array  # (4,)


class Batches:
  """Rows of a random walk: each batch depends on all the ones before.

  Of several processes each takes its own rows.
  """

  def __init__(self, config: Config):
    self._config, self._at, self._walk = config, 0, 1

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    time.sleep(self._config.wait)
    rng = np.random.default_rng(self._walk)
    self._walk = int(rng.integers(2**31))
    x = rng.normal(size=(4, self._config.size)).astype(np.float32)
    y = x.sum(-1) + (np.nan if self._at == self._config.nan_at else 0)
    self._at += 1
    own = slice(jax.process_index(), None, jax.process_count())
    return {'x': x[own], 'y': y[own].astype(np.float32)}

  def get_state(self) -> dict[str, Any]:
    return {'at': self._at, 'walk': self._walk}

  def set_state(self, state: dict[str, Any]) -> None:
    self._at, self._walk = state['at'], state['walk']


def init(config: Config, method: str) -> State:
  zeros = jnp.zeros(config.size)
  memory = {'momentum': zeros} if method == 'momentum' else {}
  return State(zeros, memory, jax.random.key(config.seed + 1))


def make_step(config: Config):
  def step(key, state, batch):
    def loss_fn(params):
      residual = batch['x'] @ params - batch['y']
      return jnp.mean(residual**2), residual

    (loss, residual), slope = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params
    )
    own, drawn = jax.random.split(state.key)
    noise = jax.random.normal(key, slope.shape)
    noise += jax.random.normal(drawn, slope.shape)
    slope += 0.1 * noise
    memory = {k: 0.9 * m + slope for k, m in state.memory.items()}
    move = memory.get('momentum', slope)
    params = state.params - config.step_size * 0.1 * move
    return State(params, memory, own), Info(loss, residual)

  return step


def run(config: Config, workdir: epath.Path) -> dict[str, float]:
  results, batch_sharding = {}, None
  place = lambda state: state
  if jax.process_count() > 1:
    devices = mesh.make(data=-1)
    spec = jax.sharding.PartitionSpec(mesh.DATA)
    batch_sharding = jax.sharding.NamedSharding(devices, spec)
    place = lambda state: mesh.place(state, devices)
  for method in config.methods:
    state = runner.train(
      place(init(config, method)),
      make_step(config),
      Batches(config),
      key=jax.random.key(config.seed),
      num_steps=config.num_steps,
      workdir=workdir / method,
      name=method,
      steps_per_call=config.steps_per_call,
      log_every=config.log_every,
      checkpoint_every=config.checkpoint_every,
      evaluate=lambda state: {'distance': jnp.sum((state.params - 1) ** 2)},
      evaluate_every=3 * config.checkpoint_every,
      batch_sharding=batch_sharding,
    )
    if jax.process_index() == 0:
      np.save(workdir / f'{method}.npy', state.params)
    results[f'{method}.first'] = float(state.params[0])
  return results


def signal_at(number: int, signum: int, pattern: str = '') -> None:
  """Has the process signal itself before one of its file operations.

  Orbax makes, renames and removes folders in its threads, so that the numbers
  reach every moment of a save.

  Args:
    number: Which operation, from 1, among those whose path has the pattern.
    signum: The signal.
    pattern: Regular expression.
  """
  seen = itertools.count(1)

  def counting(operation):
    def counted(*args, **kwargs):
      meant = any(re.search(pattern, str(arg)) for arg in args)
      if meant and next(seen) == number:
        os.kill(os.getpid(), signum)
      return operation(*args, **kwargs)

    return counted

  for name in ('mkdir', 'rename', 'replace', 'unlink', 'rmdir'):
    setattr(os, name, counting(getattr(os, name)))


if __name__ == '__main__':
  if 'TOY_SIGNAL_AT' in os.environ:
    at = os.environ['TOY_SIGNAL_AT'].split(',')
    signal_at(int(at[0]), int(at[1]), *at[2:])
  runner.launch(Config(), run)
