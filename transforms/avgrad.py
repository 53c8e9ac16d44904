"""Adam with the mean of its second moments so far: AVGrad."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class ScaleByAvgradState(NamedTuple):
  """State of :func:`scale_by_avgrad`."""

  count: jax.Array  # (), int32: updates made.
  mu: optax.Updates  # Shape and sharding of params: the first moment.
  nu: optax.Updates  # The same, float32 or wider: the second moment.
  nu_mean: optax.Updates  # The same: the mean of all second moments so far.


def scale_by_avgrad(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales by AMSGrad with a running mean in place of the maximum.

  With :math:`m_0 = v_0 = 0`,

  .. math::
    m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
    \bar v_t = \frac{1}{t} \sum_{i=1}^t v_i, \\
    u_t = \frac{m_t / (1 - \beta_1^t)}
      {\sqrt{\bar v_t / (1 - \beta_2^t)} + \varepsilon}.

  The mean forgets no gradient, as the maximum of :func:`optax.scale_by_amsgrad`
  does not, which is what Adam lacks where large gradients are rare. Unlike the
  maximum it is smooth, and it falls again when gradients do.

  Args:
    b1: :math:`\beta_1`, decay of the first moment, in [0, 1).
    b2: :math:`\beta_2`, decay of the second moment, in [0, 1).
    eps: :math:`\varepsilon`, positive, outside the root.
    mu_dtype: Of the first moment; that of the params by default.

  Returns:
    The transform. The second moments are float32 or wider, for the mean moves
    by a :math:`t`-th of a difference, which bfloat16 loses from some
    :math:`t = 256` on.

  Examples:
    >>> tx = scale_by_avgrad(b1=0.0, b2=0.0)
    >>> state = tx.init(jnp.zeros(1))
    >>> _, state = tx.update(jnp.array([1.0]), state)
    >>> _, state = tx.update(jnp.array([3.0]), state)
    >>> state.nu_mean  # (1 + 9) / 2
    Array([5.], dtype=float32)

  References:
    Ozkara et al., `MADA: Meta-Adaptive Optimizers through hyper-gradient
    Descent <https://arxiv.org/abs/2401.08893>`_, 2024, AVGrad.
  """

  def init_fn(params):
    wide = lambda p: jnp.zeros_like(p, dtype=_wide(p))
    return ScaleByAvgradState(
      count=jnp.zeros([], jnp.int32),
      mu=optax.tree.zeros_like(params, dtype=mu_dtype),
      nu=jax.tree.map(wide, params),
      nu_mean=jax.tree.map(wide, params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)

    def leaf(g, m, v, mean):
      dtype = v.dtype
      first, second, small = (jnp.asarray(x, dtype) for x in (b1, b2, eps))
      t, wide = count.astype(dtype), g.astype(dtype)
      mu = first * m.astype(dtype) + (1 - first) * wide
      nu = second * v + (1 - second) * jnp.square(wide)
      mean = mean + (nu - mean) / t
      root = jnp.sqrt(mean / (1 - second**t))
      scaled = mu / (1 - first**t) / (root + small)
      return scaled.astype(g.dtype), mu.astype(m.dtype), nu, mean

    made = jax.tree.map(leaf, updates, state.mu, state.nu, state.nu_mean)
    outer, inner = jax.tree.structure(updates), jax.tree.structure((0,) * 4)
    scaled, mu, nu, nu_mean = jax.tree.transpose(outer, inner, made)
    return scaled, ScaleByAvgradState(count, mu, nu, nu_mean)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def avgrad(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  mu_dtype: jax.typing.DTypeLike | None = None,
  weight_decay: jax.typing.ArrayLike = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Steps of :func:`scale_by_avgrad`, with decoupled weight decay.

  .. math::
    \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1}).

  Args:
    learning_rate: :math:`\alpha_t`, a number or a schedule of them.
    b1: As in :func:`scale_by_avgrad`.
    b2: Likewise.
    eps: Likewise.
    mu_dtype: Likewise.
    weight_decay: :math:`\lambda`, at least 0.
    mask: Which leaves decay: a pytree of bools that is a prefix of the params,
      or a function from params to one; all by default.

  Returns:
    The transform. Its update needs `params`.

  Examples:
    >>> tx = avgrad(0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> np.asarray(updates).round(3)
    array([-0.1,  0.1], dtype=float32)

  References:
    As for :func:`scale_by_avgrad`.
  """
  return optax.chain(
    scale_by_avgrad(b1, b2, eps, mu_dtype),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _wide(leaf: Any) -> Any:
  return np.promote_types(leaf.dtype, np.float32)
