"""Momentum as the authors of PowerSGD take it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class PowersgdMomentumState(NamedTuple):
  """State of :func:`powersgd_momentum`."""

  momentum: optax.Updates  # Shape, dtype and sharding of params.


def powersgd_momentum(
  decay: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the whole momentum to the gradient.

  For the gradient :math:`g_t`, mean of what workers sent,

  .. math:: m_{t+1} = \lambda m_t + g_t, \quad u_t = g_t + m_{t+1}.

  .. note::
    Nesterov's momentum in :func:`optax.trace` gives :math:`g_t + \lambda
    m_{t+1}`. On a constant gradient this one gives :math:`1 + 1 / (1 -
    \lambda)` times it, that one :math:`1 / (1 - \lambda)`; with :math:`\lambda
    = 0` this one gives twice the gradient, so that the learning rates of the
    paper's language model act as twice as large ones of plain descent.

  Args:
    decay: :math:`\lambda`, in [0, 1).

  Returns:
    The transform.

  Examples:
    >>> tx = powersgd_momentum(decay=0.5)
    >>> g = jnp.array([1.0])
    >>> state = tx.init(g)
    >>> for _ in range(2):
    ...   updates, state = tx.update(g, state)
    ...   print(updates)
    [2.]
    [2.5]

  References:
    Vogels, Karimireddy and Jaggi, `PowerSGD
    <https://arxiv.org/abs/1905.13727>`_, 2019, Algorithm 2.
  """

  def init_fn(params):
    return PowersgdMomentumState(momentum=optax.tree.zeros_like(params))

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    keep = lambda g, m: jnp.asarray(decay, m.dtype) * m + g.astype(m.dtype)
    momentum = jax.tree.map(keep, updates, state.momentum)
    updates = jax.tree.map(
      lambda g, m: g + m.astype(g.dtype), updates, momentum
    )
    return updates, PowersgdMomentumState(momentum=momentum)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
