"""Stochastic variational inference: natural-gradient steps on minibatches."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.topics.mixture import families, vi
from emc2.topics.mixture import model as model_lib

Schedule = Callable[[jax.Array], jax.Array]


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  statistics: families.Statistics  # Of all components; in the data's dtype.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one step."""

  elbo: jax.Array  # (): before the step, estimated from the minibatch.
  step_size: jax.Array  # (): what was given to the minibatch.


def inverse_time(scale: float = 0.1) -> Schedule:
  r"""The schedule of the paper, :math:`\eta_t = \eta_0 / (1 + t)`.

  .. note::
    Its sum up to t is about :math:`\eta_0 \log t`: it hardly moves.
  """
  if not 0 < scale <= 1:
    raise ValueError(f'scale must lie in (0, 1], got {scale}.')
  return lambda count: scale / (1 + count)


def power(exponent: float = 0.7, delay: float = 1.0) -> Schedule:
  r"""The schedule :math:`\eta_t = (\tau_0 + t)^{-\kappa}` of Hoffman et al.

  Args:
    exponent: :math:`\kappa` in (0.5, 1].
    delay: :math:`\tau_0 \ge 1`.

  Returns:
    A function of the number of finished steps.

  Raises:
    ValueError: If an argument is out of its range.
  """
  if not 0.5 < exponent <= 1:
    raise ValueError(f'exponent must lie in (0.5, 1], got {exponent}.')
  if not 1 <= delay < math.inf:
    raise ValueError(f'delay must be finite and at least 1, got {delay}.')
  return lambda count: (delay + count) ** -exponent


def init(
  key: jax.Array,
  data: jax.Array,
  z0: jax.typing.ArrayLike | None = None,
  *,
  model: model_lib.Model,
) -> State:
  """Starts from responsibilities; see :func:`svi`."""
  z = vi.start(key, data, z0, model)
  statistics = model_lib.summarize(model, data, z)
  return State(statistics, jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  batch: jax.Array,
  *,
  model: model_lib.Model,
  num_rows: int,
  step_size: float | Schedule,
) -> tuple[State, Info]:
  """One step of :func:`svi`."""
  del key
  statistics, dtype = state.statistics, batch.dtype
  rate = step_size
  if callable(step_size):
    rate = step_size(state.count.astype(dtype))
  rate = jnp.asarray(rate, dtype)
  found, evidence = model_lib.sweep(model, statistics, batch)
  share = num_rows / batch.shape[0]
  elbo = share * evidence + model_lib.divergence_terms(model, statistics)
  mix = lambda old, new: (1 - rate) * old + rate * share * new
  statistics = jax.tree.map(mix, statistics, found)
  return State(statistics, state.count + 1), Info(elbo, rate)


def svi(
  model: model_lib.Model,
  *,
  num_rows: int,
  step_size: float | Schedule,
) -> algorithm.Algorithm:
  r"""Follows the natural gradient of the bound, estimated from some rows.

  With the best :math:`\tilde z_i` of a minibatch B,

  .. math::
    (N_k, S_k) \leftarrow (1 - \eta_t) (N_k, S_k) + \eta_t \frac{N}{|B|}
      \sum_{i \in B} \tilde z_{ik} (1, \phi(x_i)),

  which moves the posteriors' parameters likewise, since the prior's part is
  constant. All rows and :math:`\eta = 1` give :func:`vi.vi`.

  Args:
    model: The mixture, of 2 components at least.
    num_rows: N, of the whole data.
    step_size: :math:`\eta_t` in (0, 1], or a function of the number of finished
      steps such as :func:`power` and :func:`inverse_time`.

  Returns:
    `init(key, data, z0=None) -> State`, with data (N, D) and z0 (N, K) as in
    :func:`vi.vi`, though some of the rows will do; and
    `step(key, state, batch) -> (State, Info)`, with rows (B, D) that the caller
    draws.

  Raises:
    ValueError: If an argument is out of its range.

  References:
    Hoffman, Blei, Wang, Paisley, `Stochastic Variational Inference
    <https://arxiv.org/abs/1206.7051>`_, 2013.
  """
  model_lib.check_several(model)
  arguments.check_at_least('num_rows', num_rows, 1)
  if not callable(step_size) and not 0 < step_size <= 1:
    raise ValueError(f'step_size must lie in (0, 1], got {step_size}.')
  return algorithm.Algorithm(
    functools.partial(init, model=model),
    functools.partial(
      step, model=model, num_rows=num_rows, step_size=step_size
    ),
  )


def shardings(mesh: jax.sharding.Mesh) -> State:
  """How the state lies on a mesh: everywhere the same."""
  del mesh
  spec = jax.sharding.PartitionSpec()
  return State(families.Statistics(spec, spec), spec)
