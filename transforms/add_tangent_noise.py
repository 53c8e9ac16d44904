"""Langevin noise in the tangent spaces of products of spheres."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emc2.transforms import rows


class AddTangentNoiseState(NamedTuple):
  """State of :func:`add_tangent_noise`."""

  count: jax.Array  # (), int32: updates made.
  key: jax.Array  # (): the source of the draws to come.


def add_tangent_noise(
  key: jax.Array,
  step_size: optax.ScalarOrSchedule,
  temperature: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the noise that a step of Langevin dynamics takes on spheres.

  For the update :math:`u` of points :math:`x`, each a unit row along the last
  axis, with step size :math:`\eta_t` and temperature :math:`T_t`,

  .. math::
    u \leftarrow u + \sqrt{2 \eta_t T_t}\, P_x \xi, \quad
    \xi \sim \mathcal{N}(0, I), \quad P_x v = v - \langle v, x \rangle x.

  Behind a gradient step of the same :math:`\eta_t` and before the retraction
  this samples :math:`\exp(-E / T)`; a temperature that falls to 0 anneals.

  Args:
    key: A random key; the state keeps it from then on.
    step_size: :math:`\eta_t`, at least 0, a number or a schedule: what the
      optimiser before it multiplies the gradient by.
    temperature: :math:`T_t`, at least 0, a number or a schedule, in units of
      the energy.

  Returns:
    The transform. Its update needs `params`, the points. In
    :func:`optax.inject_hyperparams` name `key` in `static_args`.

  Raises:
    ValueError: If `params` is None.

  Examples:
    Simulated annealing:

    >>> from emc2 import transforms
    >>> cool = optax.exponential_decay(0.1, transition_steps=1, decay_rate=0.9)
    >>> noise = add_tangent_noise(jax.random.key(0), 0.01, cool)
    >>> tx = transforms.riemannian(optax.chain(optax.sgd(0.01), noise))
    >>> points = jnp.eye(3)
    >>> updates, _ = tx.update(jnp.zeros((3, 3)), tx.init(points), points)
    >>> bool(jnp.all(updates != 0))
    True

  References:
    Cheng, Zhang and Sra, `Efficient Sampling on Riemannian Manifolds via
    Langevin MCMC <https://arxiv.org/abs/2402.10357>`_, 2022: the step, along
    geodesics. Bharath, Lewis, Sharma and Tretyakov, `Sampling and Estimation on
    Manifolds Using the Langevin Diffusion <https://arxiv.org/abs/2312.14882>`_,
    2023: along retractions.
  """

  def init_fn(params):
    del params
    # A copy of the key, for the state may be donated.
    return AddTangentNoiseState(
      count=jnp.zeros([], jnp.int32), key=jnp.copy(key)
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    rows.check_params(params, 'add_tangent_noise')
    read = lambda value: value(state.count) if callable(value) else value
    # Schedules that end at 0 may end below it by a rounding unit.
    scale = jnp.sqrt(jnp.maximum(2 * read(step_size) * read(temperature), 0))
    following, draw = jax.random.split(state.key)
    noise = optax.tree.random_like(draw, params)
    noise = rows.project(params, noise)
    add = lambda u, e: u + (scale.astype(e.dtype) * e).astype(u.dtype)
    updates = jax.tree.map(add, updates, noise)
    count = optax.safe_increment(state.count)
    return updates, AddTangentNoiseState(count=count, key=following)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
