"""Langevin dynamics on the sphere, to anneal or to sample."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from emc2 import algorithm
from emc2.sphere import manifold, schedules


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  points: jax.Array  # (n, k), unit rows.
  count: jax.Array  # (), int32: finished steps.


class Info(NamedTuple):
  """What a reader may log of one step; all before the points have moved."""

  energy: jax.Array  # (), in the dtype that `energy_fn` gives.
  gradient_norm: jax.Array  # (), of the tangent gradient, over all points.
  limited: jax.Array  # (): the share of the points whose move was cut short.


def init(key: jax.Array, points: jax.typing.ArrayLike) -> State:
  """Starts at the points (n, k), which :func:`manifold.check_points` checks.

  Args:
    key: Not used.
    points: (n, k), unit rows.

  Returns:
    The state.
  """
  del key
  return State(points=jnp.asarray(points), count=jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  batch: object = None,
  *,
  energy_fn: Callable,
  step_size: jax.typing.ArrayLike | schedules.Schedule,
  temperature: jax.typing.ArrayLike | schedules.Schedule,
  max_step: jax.typing.ArrayLike | None = None,
  has_gradient: bool = False,
) -> tuple[State, Info]:
  """One step of :func:`langevin`."""
  del batch
  points = state.points
  if has_gradient:
    energy, gradient = energy_fn(points)
  else:
    energy, gradient = jax.value_and_grad(energy_fn)(points)
  gradient = manifold.project(points, gradient)
  rate = schedules.evaluate(step_size, state.count, points.dtype)
  heat = schedules.evaluate(temperature, state.count, points.dtype)
  noise = jax.random.normal(key, points.shape, points.dtype)
  noise = manifold.project(points, noise)
  # A schedule that falls to 0 may round to less.
  scale = jnp.sqrt(jnp.maximum(2 * rate * heat, 0))
  vectors = scale * noise - rate * gradient
  moved, limited = manifold.move(points, vectors, max_step)
  info = Info(
    energy=energy, gradient_norm=jnp.linalg.norm(gradient), limited=limited
  )
  return State(points=moved, count=state.count + 1), info


def langevin(
  energy_fn: Callable,
  *,
  step_size: jax.typing.ArrayLike | schedules.Schedule,
  temperature: jax.typing.ArrayLike | schedules.Schedule,
  max_step: jax.typing.ArrayLike | None = None,
  has_gradient: bool = False,
) -> algorithm.Algorithm:
  r"""Riemannian gradient descent with noise of a temperature.

  For an energy with gradient :math:`G`, and Gaussian :math:`\xi`,

  .. math::
    u_i = -\eta_t P_{x_i} G_i + \sqrt{2 \eta_t T_t} P_{x_i} \xi_i, \quad
    x_i \leftarrow R_{x_i}\big(u_i \min(1, c / \|u_i\|)\big).

  At a fixed temperature, and for small :math:`\eta`, the points come to be
  distributed as :math:`e^{-E / T}`; at :math:`T = 0` this is gradient descent.
  A falling temperature anneals: :func:`emc2.sphere.schedules.geometric`, then a
  minimiser. `jax.vmap` runs many chains.

  .. note::
    The bound :math:`c` keeps points apart that the noise has thrown together.
    Where it cuts moves often (`Info.limited`), the law is no longer that of
    :math:`T`: take a smaller :math:`\eta`.

  Args:
    energy_fn: Maps points (n, k) to the energy ().
    step_size: :math:`\eta_t`, positive, or a function of the number of finished
      steps. Descent on the Coulomb energy is stable up to
      :math:`9.2 n^{-3/2}` near a minimum on the ordinary sphere.
    temperature: :math:`T_t`, at least 0, in the unit of the energy, or a
      function of the number of finished steps.
    max_step: :math:`c`, the largest move of a point, in radius; None means
      :math:`0.5 / \sqrt n`, infinity bounds nothing.
    has_gradient: Whether `energy_fn` returns `(energy, gradient (n, k))`
      instead, so that nothing is differentiated. Static.

  Returns:
    `init(key, points) -> State` and `step(key, state, batch) -> (State, Info)`.
    The batch is not read.

  Raises:
    ValueError: If `step_size`, `temperature` or `max_step` is given as a number
      out of its range.

  Examples:
    >>> height = lambda points: jnp.sum(points[:, 2])
    >>> method = langevin(height, step_size=0.75, temperature=0.0, max_step=1.0)
    >>> state = method.init(jax.random.key(0), jnp.array([[1.0, 0.0, 0.0]]))
    >>> state, info = method.step(jax.random.key(0), state, None)
    >>> state.points
    Array([[ 0.8,  0. , -0.6]], dtype=float32)

  References:
    Girolami and Calderhead, `Riemann Manifold Langevin and Hamiltonian Monte
    Carlo Methods <https://doi.org/10.1111/j.1467-9868.2010.00765.x>`_, 2011,
    for the diffusion on a manifold.
  """
  if isinstance(step_size, int | float):
    schedules.check_positive('step_size', step_size)
  if isinstance(temperature, int | float) and not (
    math.isfinite(temperature) and temperature >= 0
  ):
    raise ValueError(
      f'temperature must be finite and at least 0, got {temperature}.'
    )
  manifold.check_max_step(max_step)
  return algorithm.Algorithm(
    init,
    functools.partial(
      step,
      energy_fn=energy_fn,
      step_size=step_size,
      temperature=temperature,
      max_step=max_step,
      has_gradient=has_gradient,
    ),
  )
