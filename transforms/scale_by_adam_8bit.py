"""Adam with moments in blocks of 8-bit codes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import arguments
from emc2.compression import blockwise
from emc2.kernels import adam_8bit as kernel
from emc2.transforms import blocks


class ScaleByAdam8bitState(NamedTuple):
  """State of :func:`scale_by_adam_8bit`."""

  count: jax.Array  # (), int32: updates made.
  mu: Any  # Like the params: blocks of codes, or float32 arrays: first moment.
  nu: Any  # The same: second moment.
  key: jax.Array | None  # Of the next draws; None where nothing is drawn.


def scale_by_adam_8bit(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  *,
  block_size: int = blockwise.BLOCK_SIZE,
  min_8bit_size: int = 4096,
  map: str = 'dynamic',
  symmetric: bool = False,
  keep32_mask: Any | Callable[[optax.Params], Any] | None = None,
  rounding: str = 'nearest',
  key: jax.Array | None = None,
  keep_sign: bool = True,
  floor: bool = True,
  strict_shards: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales by Adam, whose moments take a byte and a bit for each parameter.

  With :math:`D` that decodes and :math:`Q` that codes, block by block,

  .. math::
    m_t = \beta_1 D(\tilde m_{t-1}) + (1 - \beta_1) g_t, \quad
    v_t = \beta_2 D(\tilde v_{t-1}) + (1 - \beta_2) g_t^2, \\
    u_t = \frac{m_t / (1 - \beta_1^t)}
      {\sqrt{v_t / (1 - \beta_2^t)} + \varepsilon}, \quad
    \tilde m_t = Q_S(m_t), \quad \tilde v_t = Q_U(v_t).

  The update comes from the moments before they are coded, so that the first is
  that of Adam. The state takes 2 (1 + 4 / B) bytes for each parameter, for 8 of
  :func:`optax.scale_by_adam`; hyperparameters stay as they are.

  .. note::
    Unlike the authors' kernels, a second moment above 0 never becomes 0
    (`floor`): else an entry whose gradients are below 4e-4 of the largest of
    its block is divided by :math:`\varepsilon` alone. A first moment of exactly
    0 stays 0. The table for first moments has no -1, as theirs: a block whose
    largest entry is negative shrinks by 0.993 each time, which `symmetric`
    ends. With `rounding='nearest'` a moment moves only once a step is half the
    distance to the next number.

  Args:
    b1: :math:`\beta_1`, in [0, 1).
    b2: :math:`\beta_2`, in [0, 1).
    eps: :math:`\varepsilon`, positive, outside the root.
    block_size: :math:`B`, static, in [1, 4096]; the paper's is 2048. Where it
      divides the last axis of a leaf, and that of its parts on devices, codes
      lie on a mesh as the params do, and no step communicates. In
      :func:`jax.shard_map` each part is coded by itself, and padded.
    min_8bit_size: Static; moments of leaves with fewer entries are float32.
    map: Static; 'dynamic' or 'linear', the numbers that codes stand for.
    symmetric: Static; as above, for 'dynamic'.
    keep32_mask: A tree of booleans that is a prefix of the params, or a
      function from params to one; True keeps moments in float32. Meant for
      tables of embeddings.
    rounding: Static; 'nearest', or 'stochastic', without bias.
    key: Of the draws, for 'stochastic' alone.
    keep_sign: Static; no first moment below 0 becomes 0.
    floor: Static; as above.
    strict_shards: Static; whether `init` refuses params on devices whose
      blocks would cross from one to the next.

  Returns:
    The transform. An entry whose gradient, or its square, is not finite has
    update 0 and moments 0.

  Raises:
    ValueError: If an argument breaks its rule; on `init`, if a leaf is not of
      real floats, or `strict_shards` refuses it.

  Examples:
    >>> tx = scale_by_adam_8bit(block_size=2, min_8bit_size=0)
    >>> g = jnp.array([1.0, -0.5, 0.25, 0.1])
    >>> updates, state = tx.update(g, tx.init(g))
    >>> updates.round(3)
    Array([ 1., -1.,  1.,  1.], dtype=float32)
    >>> state.mu.codes
    Array([255,  35, 255, 212], dtype=uint8)

  References:
    Dettmers, Lewis, Shleifer and Zettlemoyer, `8-bit Optimizers via Block-wise
    Quantization <https://arxiv.org/abs/2110.02861>`_, 2022.
  """
  settings = blocks.Settings(
    block_size=block_size,
    min_8bit_size=min_8bit_size,
    map=map,
    symmetric=symmetric,
    rounding=rounding,
    key=key,
  )
  blocks.check_rate('b1', b1)
  blocks.check_rate('b2', b2)
  if isinstance(eps, int | float):
    arguments.check_positive('eps', eps)

  def init_fn(params):
    kept = blocks.kept_in_32(keep32_mask, params)

    def start(codebook):
      def leaf(path, p, keep):
        blocks.check_leaf(path, p)
        if keep or p.size < min_8bit_size:
          wide = np.promote_types(p.dtype, np.float32)
          return jnp.zeros_like(p, dtype=wide)
        if strict_shards:
          blocks.check_shards(path, p, block_size)
        return blockwise.zeros_like(p, codebook, block_size=block_size)

      return jax.tree_util.tree_map_with_path(leaf, params, kept)

    return ScaleByAdam8bitState(
      count=jnp.zeros([], jnp.int32),
      mu=start(settings.signed),
      nu=start(settings.unsigned),
      key=None if key is None else jnp.copy(key),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)
    leaves, treedef = jax.tree.flatten(updates)
    mus, nus = (
      [blockwise.as_coded(x, book) for x in treedef.flatten_up_to(moments)]
      for moments, book in (
        (state.mu, settings.signed),
        (state.nu, settings.unsigned),
      )
    )
    keys, next_key = [None] * len(leaves), None
    if state.key is not None:
      next_key, *keys = jax.random.split(state.key, len(leaves) + 1)
    made = []
    for grad, mu, nu, own in zip(leaves, mus, nus, keys, strict=True):
      wide = np.promote_types(grad.dtype, np.float32)
      k = kernel.Scalars.of(b1, b2, eps, count, wide)
      if isinstance(mu, blockwise.Quantized):
        made.append(
          kernel.step(
            grad, mu, nu, k, keep_sign=keep_sign, floor=floor, key=own
          )
        )
      else:
        made.append(kernel.step_32(grad, mu, nu, k))
    scaled, mus, nus = (
      treedef.unflatten([one[i] for one in made]) for i in range(3)
    )
    return scaled, ScaleByAdam8bitState(count, mus, nus, next_key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  weight_decay: jax.typing.ArrayLike = 1e-4,
  mask: Any | Callable[[optax.Params], Any] | None = None,
  *,
  block_size: int = blockwise.BLOCK_SIZE,
  min_8bit_size: int = 4096,
  map: str = 'dynamic',
  symmetric: bool = False,
  keep32_mask: Any | Callable[[optax.Params], Any] | None = None,
  rounding: str = 'nearest',
  key: jax.Array | None = None,
  keep_sign: bool = True,
  floor: bool = True,
  strict_shards: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """AdamW with moments in 8 bits: :func:`scale_by_adam_8bit` in a chain.

  Args:
    learning_rate: A number or a schedule.
    b1: As there.
    b2: As there.
    eps: As there.
    weight_decay: Decoupled, at least 0; taken from the params as they are
      before the step.
    mask: What decays, as in :func:`optax.adamw`; all by default.
    block_size: As there.
    min_8bit_size: As there.
    map: As there.
    symmetric: As there.
    keep32_mask: As there.
    rounding: As there.
    key: As there.
    keep_sign: As there.
    floor: As there.
    strict_shards: As there.

  Returns:
    The optimiser.

  Examples:
    >>> tx = adamw_8bit(0.1, min_8bit_size=0)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates.round(3)
    Array([-0.1,  0.1], dtype=float32)
  """
  return optax.chain(
    scale_by_adam_8bit(
      b1,
      b2,
      eps,
      block_size=block_size,
      min_8bit_size=min_8bit_size,
      map=map,
      symmetric=symmetric,
      keep32_mask=keep32_mask,
      rounding=rounding,
      key=key,
      keep_sign=keep_sign,
      floor=floor,
      strict_shards=strict_shards,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
