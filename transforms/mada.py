"""An Adam that learns its own coefficients: MADA."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2.kernels import mada as kernel
from emc2.transforms import masks

COEFFICIENTS = ('b1', 'b2', 'b3', 'rho', 'c', 'gamma')

BOUNDS = {
  'b1': (0.01, 0.99),
  'b2': (0.501, 0.99),
  'b3': (0.0, 0.99),
  'rho': (0.0, 1.0),
  'c': (0.0, 1.0),
  'gamma': (0.0, 1.0),
}

HYPER_LEARNING_RATES = {
  'b1': 1e-4,
  'b2': 1e-4,
  'b3': 0.02,
  'rho': 0.02,
  'c': 0.02,
  'gamma': 0.02,
}


class ScaleByMadaState(NamedTuple):
  """State of :func:`scale_by_mada`.

  The moments lag by one gradient, from which the next step makes the update
  before it again, to take its derivatives; where nothing is learned they do
  not, and `grads` is None.
  """

  count: jax.Array  # (), int32: updates made.
  coefficients: jax.Array  # (6,), float: of `COEFFICIENTS`, of the next update.
  used: jax.Array  # The same, of the last update.
  trace: jax.Array  # The same: the momentum of the hyper-gradient.
  learning_rate: jax.Array  # (), of that dtype: of the last update, 0 before.
  moments: kernel.Moments  # Trees like the params, or None; see the kernel.
  grads: optax.Updates | None  # Like the params: the last gradients.


def mada_coefficients(state: optax.OptState) -> dict[str, jax.Array]:
  """The coefficients in a state, to log them by name.

  Args:
    state: Of :func:`mada`, or of any chain or wrapper around one.

  Returns:
    Arrays () by the names of `COEFFICIENTS`.

  Raises:
    KeyError: If the state holds no coefficients, or those of several.

  Examples:
    >>> found = mada_coefficients(mada(1e-3).init(jnp.zeros(3)))
    >>> {name: round(float(x), 3) for name, x in found.items()}
    {'b1': 0.9, 'b2': 0.95, 'b3': 0.0, 'rho': 0.0, 'c': 1.0, 'gamma': 1.0}
  """
  found = optax.tree.get(state, 'coefficients')
  if found is None:
    raise KeyError('state must hold a ScaleByMadaState, got none in it.')
  return dict(zip(COEFFICIENTS, found, strict=True))


def scale_by_mada(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.95,
  b3: jax.typing.ArrayLike = 0.0,
  rho: jax.typing.ArrayLike = 0.0,
  c: jax.typing.ArrayLike = 1.0,
  gamma: jax.typing.ArrayLike = 1.0,
  eps: jax.typing.ArrayLike = 1e-6,
  *,
  learn: Sequence[str] = COEFFICIENTS,
  bounds: Mapping[str, tuple[float, float]] | None = None,
  hyper_learning_rate: jax.typing.ArrayLike
  | Mapping[str, jax.typing.ArrayLike]
  | None = None,
  hyper_momentum: jax.typing.ArrayLike
  | Mapping[str, jax.typing.ArrayLike] = 0.0,
  hyper_clip: jax.typing.ArrayLike | None = 10.0,
  hyper_start: int = 0,
  hyper_delay: int = 0,
  hyper_through_mean: bool = False,
  second_moment: str = 'avgrad',
  lion_mode: str = 'lion',
  lion_b1: jax.typing.ArrayLike = 0.95,
  lion_b2: jax.typing.ArrayLike = 0.98,
  init_mode: str = 'zero',
  mu_dtype: jax.typing.DTypeLike | None = None,
  axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales by a blend of optimisers whose coefficients learn as it runs.

  With gradients :math:`g_t`, and :math:`m, v, n, \bar v, l` all 0 at first,

  .. math::
    d_t &= g_t - g_{t-1}, \quad \hat g_t = g_t + \beta_3 d_t, \\
    \tilde g_t^2 &= c\, \hat g_t^2 + (1 - c) \left( v_{t-1}
      + \hat g_t^2 \operatorname{sign}(\hat g_t^2 - v_{t-1}) \right), \\
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
    v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde g_t^2, \\
    n_t &= \beta_3 n_{t-1} + (1 - \beta_3) d_t, \quad
    \bar v_t = \tfrac{1}{t} v_t + \tfrac{t - 1}{t} \bar v_{t-1}, \quad
    l_t = b_2 l_{t-1} + (1 - b_2) g_t, \\
    \hat v_t &= \frac{\rho v_t + (1 - \rho) \bar v_t}{1 - \beta_2^t}, \quad
    s_t = \operatorname{sign}(b_1 l_{t-1} + (1 - b_1) g_t), \\
    u_t &= \gamma \frac{m_t / (1 - \beta_1^t) + \beta_3 n_t}
      {\sqrt{\hat v_t} + \varepsilon} + (1 - \gamma) s_t.

  Adam is :math:`\beta_3 = 0, \rho = c = \gamma = 1`; from there AVGrad is at
  :math:`\rho = 0`, Yogi at :math:`c = 0`, Adan (no bias correction of
  :math:`n`) at :math:`\beta_3 > 0`, and Lion at :math:`\gamma = 0`. Each
  coefficient :math:`q` moves against its hyper-gradient, which the next
  gradient gives without a backward pass of its own,

  .. math::
    h_t = -\alpha_{t-1} \left\langle g_t,
      \frac{\partial u_{t-1}}{\partial q} \right\rangle, \quad
    b_t = \mu_q b_{t-1} + h_t, \quad
    q_t = \Pi \left[ q_{t-1} - \eta_q b_t \right],

  where :math:`\Pi` clips to the bounds. Update :math:`t` uses :math:`q_t`. The
  hyper-gradient is that of one step: what came before it counts as constant,
  and so does :math:`\bar v_t`.

  .. note::
    The authors' code draws the sign of Lion from the momentum after its step
    (`lion_mode='released'`: Lion with :math:`b_1 b_2` for :math:`b_1`), and
    starts with :math:`g_0 = 0` and :math:`n_0 = g_1^2` (`init_mode`); the
    defaults here are Lion's own sign and :math:`d_1 = n_0 = 0`. It clips bad
    first values silently; here they are errors. Where the root of
    :math:`\hat v` is below 1e-12 its derivative counts as 0. A step whose
    hyper-gradient is not finite moves no coefficient and no momentum of one.

  Args:
    learning_rate: :math:`\alpha_t`, a number or a schedule: what the chain
      multiplies the updates by, which only the hyper-gradient reads.
    b1: First :math:`\beta_1`.
    b2: First :math:`\beta_2`.
    b3: First :math:`\beta_3`.
    rho: First :math:`\rho`.
    c: First :math:`c`.
    gamma: First :math:`\gamma`.
    eps: :math:`\varepsilon`, positive, outside the root.
    learn: Static; the coefficients that learn, by the names above. Those of
      Adam at their values, `('b1', 'b2')` learning, is HyperAdam.
    bounds: Static; (least, greatest) of some coefficients, `BOUNDS` of others.
    hyper_learning_rate: :math:`\eta_q`, at least 0: one for all, or by name,
      with `HYPER_LEARNING_RATES` for the others. Multiply it by s if the loss
      is divided by s, since :math:`h` is no ratio.
    hyper_momentum: :math:`\mu_q` in [0, 1): one for all, or by name, else 0.
    hyper_clip: Greatest magnitude of each :math:`h`, or None.
    hyper_start: Static; this many updates are made before any learning.
    hyper_delay: Static; 1 applies :math:`q_t` at update :math:`t + 1`, so that
      no update waits for a number from the whole gradient.
    hyper_through_mean: Static; True also takes the derivative of
      :math:`\bar v_t`.
    second_moment: Static; 'avgrad', or 'amsgrad' for the maximum of all
      :math:`v` so far as :math:`\bar v`.
    lion_mode: Static; 'lion' or 'released'.
    lion_b1: :math:`b_1`, in [0, 1); 0.95 and 0.98 are no optax defaults.
    lion_b2: :math:`b_2`, in [0, 1).
    init_mode: Static; 'zero' or 'released'.
    mu_dtype: Of :math:`m, n, l` and the kept gradients; that of the params by
      default. :math:`v` and :math:`\bar v` are float32 or wider.
    axis_name: In :func:`jax.shard_map`, the mesh axes over which any leaf is
      split; the hyper-gradient is summed over them, by one reduction of six
      numbers. Gradients are averaged over other axes before. Under
      :func:`jax.jit` alone leave it None; XLA then reduces some numbers a leaf
      once for each split axis of the params.

  Returns:
    The transform. It holds seven arrays for each of the params; six where
    :math:`\gamma` is fixed at 1 and two less where :math:`\beta_3` is fixed at
    0. Its update takes `hyper_grads`, the gradients of the loss itself where
    the updates that come in were clipped or changed.

  Raises:
    ValueError: If an argument breaks its rule, or a first value its bounds.
    TypeError: On `init`, if a leaf is not of real floats.

  Examples:
    >>> tx = optax.chain(scale_by_mada(0.1), optax.scale(-0.1))
    >>> params = jnp.array([1.0, -2.0])
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...   updates, state = tx.update(params, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> [name for name, x in mada_coefficients(state).items() if x == 1]
    ['c', 'gamma']

  References:
    Ozkara et al., `MADA: Meta-Adaptive Optimizers through hyper-gradient
    Descent <https://arxiv.org/abs/2401.08893>`_, 2024, and its code.
  """
  first = dict(zip(COEFFICIENTS, (b1, b2, b3, rho, c, gamma), strict=True))
  _check_names('learn', learn)
  box = BOUNDS | dict(_check_names('bounds', bounds or {}))
  _check_bounds(box, first)
  rates = _by_name(
    'hyper_learning_rate', hyper_learning_rate, HYPER_LEARNING_RATES
  )
  momenta = _by_name('hyper_momentum', hyper_momentum, dict.fromkeys(first, 0))
  for name, rate in rates.items():
    _require(rate, 'hyper_learning_rate', name, lambda x: x >= 0, 'at least 0')
  for name, momentum in momenta.items():
    inside = lambda x: (x >= 0) & (x < 1)
    _require(momentum, 'hyper_momentum', name, inside, 'in [0, 1)')
  _require(eps, 'eps', '', lambda x: x > 0, 'positive')
  for name, x in (('lion_b1', lion_b1), ('lion_b2', lion_b2)):
    _require(x, name, '', lambda x: (x >= 0) & (x < 1), 'in [0, 1)')
  if hyper_clip is not None:
    _require(hyper_clip, 'hyper_clip', '', lambda x: x > 0, 'positive')
  if hyper_start < 0:
    raise ValueError(f'hyper_start must be at least 0, got {hyper_start}.')
  choices = (
    ('hyper_delay', hyper_delay, (0, 1)),
    ('second_moment', second_moment, ('avgrad', 'amsgrad')),
    ('lion_mode', lion_mode, ('lion', 'released')),
    ('init_mode', init_mode, ('zero', 'released')),
  )
  for name, value, allowed in choices:
    if value not in allowed:
      raise ValueError(f'{name} must be one of {allowed}, got {value!r}.')
  if hyper_through_mean and second_moment != 'avgrad':
    raise ValueError(
      f"hyper_through_mean needs second_moment='avgrad', got {second_moment!r}."
    )
  settings = kernel.Settings(
    maximum=second_moment == 'amsgrad',
    released_lion=lion_mode == 'released',
    released_init=init_mode == 'released',
    through_mean=hyper_through_mean,
  )
  constants = kernel.Constants(eps, lion_b1, lion_b2)
  learns = np.array([name in learn for name in COEFFICIENTS])
  # Numbers, for a traced one may be anything.
  fixed = lambda name, value: (
    name not in learn
    and isinstance(first[name], int | float)
    and first[name] == value
  )
  keeps_differences = not fixed('b3', 0)
  keeps_lion = not fixed('gamma', 1)

  def init_fn(params):
    for leaf in jax.tree.leaves(params):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f'params must be of real floats, got {leaf.dtype}.')
    narrow = lambda p: jnp.zeros_like(p, dtype=mu_dtype)
    wide = lambda p: jnp.zeros_like(
      p, dtype=np.promote_types(p.dtype, np.float32)
    )
    start = wide
    if init_mode == 'released':
      start = lambda p: wide(p) + 1e-15
    like = lambda make: jax.tree.map(make, params)
    dtype = jnp.zeros([]).dtype
    vector = lambda values: jnp.stack([jnp.asarray(x, dtype) for x in values])
    coefficients = vector(first.values())
    return ScaleByMadaState(
      count=jnp.zeros([], jnp.int32),
      coefficients=coefficients,
      # An array of its own, so that the state can be donated.
      used=jnp.copy(coefficients),
      trace=jnp.zeros_like(coefficients),
      learning_rate=jnp.zeros([], dtype),
      moments=kernel.Moments(
        mu=like(narrow),
        nu=like(start),
        nu_bar=like(start),
        delta=like(narrow) if keeps_differences else None,
        previous=like(narrow) if keeps_differences else None,
        lion=like(narrow) if keeps_lion else None,
      ),
      grads=like(narrow) if len(learn) else None,
    )

  def learned(state, products):
    """The coefficients after a hyper-step, and their momentum."""
    dtype = state.coefficients.dtype
    vector = lambda of: jnp.stack([jnp.asarray(x, dtype) for x in of.values()])
    h = -state.learning_rate * products.astype(dtype)
    h = jnp.where(learns, h, jnp.zeros_like(h))
    if hyper_clip is not None:
      h = h * jnp.minimum(1, hyper_clip / (jnp.abs(h) + 1e-6))
    trace = vector(momenta) * state.trace + h
    low, high = (vector({k: b[i] for k, b in box.items()}) for i in (0, 1))
    moved = jnp.clip(state.coefficients - vector(rates) * trace, low, high)
    # What does not learn stays to the last bit.
    moved = jnp.where(learns, moved, state.coefficients)
    starts = state.count >= jnp.maximum(hyper_start, 1)
    acts = starts & jnp.all(jnp.isfinite(h))
    keep = lambda new, old: jnp.where(acts, new, old)
    return keep(moved, state.coefficients), keep(trace, state.trace)

  def update_fn(updates, state, params=None, *, hyper_grads=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)
    dtype = state.coefficients.dtype
    rate = (
      learning_rate(state.count) if callable(learning_rate) else (learning_rate)
    )
    leaves, treedef = jax.tree.flatten(updates)
    moments = _split(state.moments, treedef)
    coefficients, trace, grads = state.coefficients, state.trace, None

    if learns.any():
      # Before the first update there is no gradient: all stays at 0.
      before = kernel.Scalars.of(
        state.used, jnp.maximum(state.count, 1), constants
      )
      stays = state.count == 0
      before = before._replace(
        memory2=jnp.where(stays, jnp.inf, before.memory2),
        share=jnp.where(stays, jnp.zeros([], dtype), before.share),
      )
      last = treedef.flatten_up_to(state.grads)
      later = [None] * len(leaves)
      if hyper_grads is not None:
        later = treedef.flatten_up_to(hyper_grads)
      made = [
        kernel.exchange(*given, before, settings)
        for given in zip(moments, last, leaves, later, strict=True)
      ]
      moments = [after for after, _, _ in made]
      grads = treedef.unflatten([kept for _, kept, _ in made])
      products = _sum([product for *_, product in made], dtype, axis_name)
      coefficients, trace = learned(state, products)

    used = state.coefficients if hyper_delay else coefficients
    now = kernel.Scalars.of(used, count, constants)
    scaled = [
      kernel.direction(m, g, now, settings)
      for m, g in zip(moments, leaves, strict=True)
    ]
    if not learns.any():
      moments = [
        kernel.advance(m, g, now, settings)
        for m, g in zip(moments, leaves, strict=True)
      ]
    state = ScaleByMadaState(
      count=count,
      coefficients=coefficients,
      used=used,
      trace=trace,
      learning_rate=jnp.asarray(rate, dtype),
      moments=_join(moments, state.moments, treedef),
      grads=grads,
    )
    return treedef.unflatten(scaled), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mada(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.95,
  b3: jax.typing.ArrayLike = 0.0,
  rho: jax.typing.ArrayLike = 0.0,
  c: jax.typing.ArrayLike = 1.0,
  gamma: jax.typing.ArrayLike = 1.0,
  eps: jax.typing.ArrayLike = 1e-6,
  weight_decay: jax.typing.ArrayLike = 0.1,
  mask: Any = masks.has_many_axes,
  *,
  learn: Sequence[str] = COEFFICIENTS,
  bounds: Mapping[str, tuple[float, float]] | None = None,
  hyper_learning_rate: jax.typing.ArrayLike
  | Mapping[str, jax.typing.ArrayLike]
  | None = None,
  hyper_momentum: jax.typing.ArrayLike
  | Mapping[str, jax.typing.ArrayLike] = 0.0,
  hyper_clip: jax.typing.ArrayLike | None = 10.0,
  hyper_start: int = 0,
  hyper_delay: int = 0,
  hyper_through_mean: bool = False,
  second_moment: str = 'avgrad',
  lion_mode: str = 'lion',
  lion_b1: jax.typing.ArrayLike = 0.95,
  lion_b2: jax.typing.ArrayLike = 0.98,
  init_mode: str = 'zero',
  mu_dtype: jax.typing.DTypeLike | None = None,
  axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""An Adam that learns its own coefficients, with decoupled weight decay.

  Steps of :func:`scale_by_mada`, which says what the letters mean:

  .. math::
    \theta_t = \theta_{t-1} - \alpha_t (u_t + \lambda \theta_{t-1}).

  The hyper-gradient is that of the loss alone, without the decay.

  Args:
    learning_rate: :math:`\alpha_t`, a number or a schedule of them.
    b1: As in :func:`scale_by_mada`.
    b2: Likewise.
    b3: Likewise.
    rho: Likewise.
    c: Likewise.
    gamma: Likewise.
    eps: Likewise.
    weight_decay: :math:`\lambda`, at least 0.
    mask: Which leaves decay: a pytree of bools that is a prefix of the params,
      or a function from params to one; the leaves of more than one axis by
      default.
    learn: As in :func:`scale_by_mada`.
    bounds: Likewise.
    hyper_learning_rate: Likewise.
    hyper_momentum: Likewise.
    hyper_clip: Likewise.
    hyper_start: Likewise.
    hyper_delay: Likewise.
    hyper_through_mean: Likewise.
    second_moment: Likewise.
    lion_mode: Likewise.
    lion_b1: Likewise.
    lion_b2: Likewise.
    init_mode: Likewise.
    mu_dtype: Likewise.
    axis_name: Likewise.

  Returns:
    The transform. Its update needs `params`, and takes `hyper_grads`: give it
    the gradients as they were if they are clipped before,
    `optax.chain(optax.clip_by_global_norm(1.0), mada(...))`. In
    :func:`optax.inject_hyperparams` name `hyper_start`, `hyper_delay` and
    `mask` in `static_args`; the coefficients that it holds are the first ones,
    which only `init` reads.

  Raises:
    ValueError: As :func:`scale_by_mada` does.

  Examples:
    >>> tx = mada(0.1, weight_decay=0.0)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> np.asarray(updates).round(3)
    array([-0.1,  0.1], dtype=float32)

  References:
    As for :func:`scale_by_mada`.
  """
  return optax.chain(
    scale_by_mada(
      learning_rate,
      b1,
      b2,
      b3,
      rho,
      c,
      gamma,
      eps,
      learn=learn,
      bounds=bounds,
      hyper_learning_rate=hyper_learning_rate,
      hyper_momentum=hyper_momentum,
      hyper_clip=hyper_clip,
      hyper_start=hyper_start,
      hyper_delay=hyper_delay,
      hyper_through_mean=hyper_through_mean,
      second_moment=second_moment,
      lion_mode=lion_mode,
      lion_b1=lion_b1,
      lion_b2=lion_b2,
      init_mode=init_mode,
      mu_dtype=mu_dtype,
      axis_name=axis_name,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _split(moments, treedef):
  """From moments of trees to a list of those of leaves."""
  columns = [
    [None] * treedef.num_leaves if tree is None else treedef.flatten_up_to(tree)
    for tree in moments
  ]
  return [kernel.Moments(*row) for row in zip(*columns, strict=True)]


def _join(moments, like, treedef):
  """The way back; fields are None where those of `like` are."""
  trees = [
    None if old is None else treedef.unflatten([m[i] for m in moments])
    for i, old in enumerate(like)
  ]
  return kernel.Moments(*trees)


def _sum(products, dtype, axis_name):
  """Adds what the leaves gave, and what their parts elsewhere did: (6,)."""
  if axis_name is None:
    return sum((p.astype(dtype) for p in products), jnp.zeros(6, dtype))
  axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  total = jax.lax.pcast(jnp.zeros(6, dtype), axes, to='varying')
  for product in products:
    # A leaf that all devices of an axis hold whole must count once.
    varying = jax.typeof(product).manual_axis_type.varying
    whole = tuple(axis for axis in axes if axis not in varying)
    if whole:
      copies = jax.lax.axis_size(whole)
      product = jax.lax.pcast(product, whole, to='varying') / copies
    total = total + product.astype(dtype)
  return jax.lax.psum(total, axes)


def _check_names(argument, names):
  for name in names:
    if name not in COEFFICIENTS:
      raise ValueError(
        f'{argument} must name some of {COEFFICIENTS}, got {name!r}.'
      )
  return names


def _by_name(argument, value, defaults):
  """One value for each coefficient, by its name."""
  if value is None:
    return dict(defaults)
  if isinstance(value, Mapping):
    return dict(defaults) | dict(_check_names(argument, value))
  return dict.fromkeys(defaults, value)


def _require(value, argument, name, rule, words):
  """Raises if a value is known and breaks its rule; NaN breaks every rule."""
  if not isinstance(value, jax.core.Tracer) and not np.all(rule(value)):
    entry = f'{argument}[{name!r}]' if name else argument
    raise ValueError(f'{entry} must be {words}, got {value}.')


def _check_bounds(box, first):
  for name, (low, high) in box.items():
    # Powers of a beta of 0 or 1 have no derivative, or no inverse.
    open_ends = name in ('b1', 'b2')
    good = 0 < low <= high < 1 if open_ends else 0 <= low <= high <= 1
    if not good:
      words = '0 < low <= high < 1' if open_ends else '0 <= low <= high <= 1'
      raise ValueError(
        f'bounds[{name!r}] must be (low, high), {words}, got {(low, high)}.'
      )
    inside = lambda x, low=low, high=high: (x >= low) & (x <= high)
    words = f'in its bounds [{low}, {high}]'
    _require(first[name], name, '', inside, words)
