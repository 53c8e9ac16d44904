"""Adam with one second moment for each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScaleByRowAdamState(NamedTuple):
  """State of :func:`scale_by_row_adam`."""

  count: jax.Array  # (), int32: updates made.
  mu: optax.Updates  # Shape, dtype and sharding of params: the first moment.
  nu: optax.Updates  # The same with a last axis of 1: mean squares of rows.


def scale_by_row_adam(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales each row by Adam, with one second moment for the whole row.

  For the rows :math:`g_i \in \mathbb{R}^k` of a gradient, along the last axis,

  .. math::
    m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \quad
    \nu_i \leftarrow \beta_2 \nu_i + (1 - \beta_2) \frac{\|g_i\|_2^2}{k}, \quad
    u_i = \frac{m_i / (1 - \beta_1^t)}
      {\sqrt{\nu_i / (1 - \beta_2^t) + \bar\varepsilon} + \varepsilon}.

  A row keeps its direction, so that the update turns with the coordinates:
  rotated gradients give rotated updates. :func:`optax.scale_by_adam` divides
  each coordinate by a number of its own, and its path depends on the axes.

  Args:
    b1: :math:`\beta_1`, decay of the first moment, in [0, 1).
    b2: :math:`\beta_2`, decay of the second moment, in [0, 1).
    eps: :math:`\varepsilon`, at least 0, outside the root.
    eps_root: :math:`\bar\varepsilon`, at least 0, inside the root.

  Returns:
    The transform. Leaves have at least one axis.

  Examples:
    >>> tx = scale_by_row_adam()
    >>> g = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> np.asarray(updates).round(3)
    array([[0.849, 1.131],
           [0.849, 1.131]], dtype=float32)

  References:
    Kingma and Ba, `Adam: A Method for Stochastic Optimization
    <https://arxiv.org/abs/1412.6980>`_, 2015, Algorithm 1. Becigneul and
    Ganea, `Riemannian Adaptive Optimization Methods
    <https://arxiv.org/abs/1810.00760>`_, 2019: one second moment for each
    factor of a product of manifolds.
  """

  def init_fn(params):
    mu = optax.tree.zeros_like(params)
    return ScaleByRowAdamState(
      count=jnp.zeros([], jnp.int32),
      mu=mu,
      # As an update makes them: a slice of a sharded axis is refused.
      nu=jax.tree.map(_row_means, mu),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    squares = jax.tree.map(lambda g: _row_means(jnp.square(g)), updates)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment(squares, state.nu, b2, 1)
    count = optax.safe_increment(state.count)
    # A float, for a power of an int would promote it.
    t = count.astype(jnp.float32)
    scaled = jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v + eps_root) + eps),
      optax.tree.bias_correction(mu, b1, t),
      optax.tree.bias_correction(nu, b2, t),
    )
    state = ScaleByRowAdamState(
      count=count,
      mu=optax.tree.cast_like(mu, state.mu),
      nu=optax.tree.cast_like(nu, state.nu),
    )
    return scaled, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _row_means(leaf: jax.Array) -> jax.Array:
  """Means along the last axis, which stays."""
  return jnp.mean(leaf, axis=-1, keepdims=True)
