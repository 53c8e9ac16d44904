"""Layer-wise adaptive rate scaling, with the learning rate after momentum."""

from typing import Any

import jax
import optax

from emc2.transforms import masks


def lars(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: jax.typing.ArrayLike = 0.0,
  weight_decay_mask: Any = None,
  trust_coefficient: jax.typing.ArrayLike = 0.001,
  trust_ratio_mask: Any = None,
  momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
  r"""LARS as contrastive learning uses it: momentum first, then the rate.

  For a weight :math:`w` with gradient :math:`g_t`, learning rate
  :math:`\gamma_t`, weight decay :math:`\lambda`, trust coefficient :math:`\eta`
  and momentum :math:`\mu`,

  .. math::
    u_t = g_t + \lambda w_t, \quad
    m_{t+1} = \mu m_t + \eta \frac{\|w_t\|_2}{\|u_t\|_2} u_t, \quad
    w_{t+1} = w_t - \gamma_t m_{t+1}.

  The ratio counts as :math:`1 / \eta` where a norm is 0. A tensor outside the
  masks keeps :math:`\lambda = 0`, or the factor 1 before :math:`u_t`.

  .. note::
    :func:`optax.lars` takes :math:`\gamma_t` into the momentum, as the paper
    does: :math:`m_{t+1} = \mu m_t + \gamma_t \eta \dots`. The two agree for a
    constant rate only; under a schedule, steps taken at an old rate go on at
    that rate there and at the present one here. The paper also divides by
    :math:`\|g_t\|_2 + \lambda \|w_t\|_2`, both codes by :math:`\|u_t\|_2`.

  Args:
    learning_rate: :math:`\gamma_t`, a positive number or a schedule of them.
    weight_decay: :math:`\lambda`, at least 0.
    weight_decay_mask: Which leaves decay: a pytree of bools that is a prefix of
      the params, or a function from params to one. None means the leaves of
      more than one axis.
    trust_coefficient: :math:`\eta`, positive.
    trust_ratio_mask: Which leaves are rescaled, given like the other mask.
    momentum: :math:`\mu`, in [0, 1).

  Returns:
    The transform. Its state holds :math:`m` with the shapes, dtypes and
    shardings of the params. In :func:`optax.inject_hyperparams` a mask that is
    a function must be named in `static_args`.

  Examples:
    >>> tx = lars(learning_rate=1.0, trust_coefficient=0.5)
    >>> params = {'w': jnp.array([[3.0, 4.0]]), 'b': jnp.array([1.0])}
    >>> grads = {'w': jnp.array([[0.0, 2.0]]), 'b': jnp.array([1.0])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> updates['w'], updates['b']
    (Array([[-0. , -2.5]], dtype=float32), Array([-1.], dtype=float32))

  References:
    You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, 2017, Algorithm 1.
  """
  if weight_decay_mask is None:
    weight_decay_mask = masks.has_many_axes
  if trust_ratio_mask is None:
    trust_ratio_mask = masks.has_many_axes
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=weight_decay_mask),
    optax.masked(
      optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient),
      mask=trust_ratio_mask,
    ),
    optax.trace(decay=momentum),
    optax.scale_by_learning_rate(learning_rate),
  )
