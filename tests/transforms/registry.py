"""Every transform, one row each: what a case needs that tries it on something.

A new transform joins with one row, and the battery asks the same of all. The
Adam of optax stands among them: a question that it fails would be a bad one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import transforms
from emc2.compression import sparse

DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)
AXIS_TYPES = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)

_TANGENT_STEP = optax.chain(transforms.project_tangent(), optax.scale(-0.015))


# All of its parts count from the second step on.
_MADA = {'gamma': 0.5, 'hyper_learning_rate': 0.02}
_MADA_CHANGES = {
  'eps': 0.5,
  'hyper_learning_rate': 0.01,
  'hyper_momentum': 0.9,
  'hyper_clip': 0.1,
  'lion_b1': 0.1,
  'lion_b2': 0.1,
}
# Where the coefficients start counts in the first state alone.
_MADA_STATIC = (*transforms.COEFFICIENTS, 'hyper_start', 'hyper_delay')


# Blocks so short that the leaves here have several.
_BLOCKS = {'block_size': 2, 'min_8bit_size': 2}
_BLOCKS_STATIC = (
  'block_size',
  'min_8bit_size',
  'map',
  'symmetric',
  'keep32_mask',
  'rounding',
  'key',
  'keep_sign',
  'floor',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """A transform and how it is used."""

  name: str

  make: Callable[..., optax.GradientTransformation]
  """The transform as users call it."""

  options: Mapping[str, Any]
  """What they call it with."""

  changes: Mapping[str, float]
  """All that `optax.inject_hyperparams` takes into the state, with another
  value for each, one that gives other updates within a few steps."""

  solves: Mapping[str, Any] | None = None
  """What to change in the options so that the four targets are reached; None
  for a piece of an optimiser that has a row too, and for what plain descent
  follows, which does not reach them all at one rate."""

  static: tuple[str, ...] = ()
  """Arguments that `optax.inject_hyperparams` is told to leave alone."""

  needs: tuple[str, ...] = ()
  """Which of `params`, `value`, `grad` and `value_fn` an update must have."""

  before: optax.GradientTransformation = optax.identity()
  """What in use comes before a transform that is no whole optimiser."""

  after: optax.GradientTransformation = optax.identity()
  """What in use comes after it. Both are stateless."""

  takes_scalars: bool = True
  """Whether leaves of its params may have no axis."""

  unit_rows: bool = False
  """Whether all leaves hold unit rows, along a last axis that stays whole."""

  dtypes: tuple[Any, ...] = DTYPES
  """Of the params."""

  axis_types: tuple[jax.sharding.AxisType, ...] = AXIS_TYPES
  """Of the meshes on which params may lie."""

  starts_from_shapes: bool = True
  """Whether `init` takes `jax.ShapeDtypeStruct`s as they are."""

  def transform(self, **changes: Any) -> optax.GradientTransformation:
    """The transform, with some options changed."""
    return self.make(**{**self.options, **changes})

  def params(self, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Params of the shapes that it serves."""
    rng = np.random.default_rng(0)
    shapes = {'matrix': (8, 4), 'scalar': (), 'vector': (4,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    if self.unit_rows or not self.takes_scalars:
      del params['scalar']
    if self.unit_rows:
      params = {
        name: rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        for name, rows in params.items()
      }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)

  def specs(self) -> dict[str, jax.sharding.PartitionSpec]:
    """How the params lie on a mesh with the axes `fsdp` and `tensor`."""
    specs = {
      'matrix': jax.P('fsdp', None if self.unit_rows else 'tensor'),
      'scalar': jax.P(),
      'vector': jax.P() if self.unit_rows else jax.P('tensor'),
    }
    return {name: specs[name] for name in self.params()}


def _mixing_dtypes(
  make: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformationExtraArgs]:
  """Lets a transform of optax promote dtypes, which ours need not."""

  @functools.wraps(make)
  def made(*args, **kwargs):
    tx = make(*args, **kwargs)

    @jax.numpy_dtype_promotion('standard')
    def update_fn(updates, state, params=None, **extra_args):
      return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)

  return made


ROWS = (
  Row(
    'adam',
    _mixing_dtypes(optax.adam),
    options={'learning_rate': 0.1},
    changes={
      'learning_rate': 0.2,
      'b1': 0.5,
      'b2': 0.5,
      'eps': 0.5,
      'eps_root': 0.5,
    },
    solves={},
  ),
  Row(
    'lars',
    transforms.lars,
    options={'learning_rate': 0.1, 'weight_decay': 0.1},
    changes={
      'learning_rate': 0.2,
      'weight_decay': 1.0,
      'trust_coefficient': 0.01,
      'momentum': 0.5,
    },
    solves={
      'learning_rate': optax.linear_schedule(0.02, 0.0, 1000),
      'weight_decay': 0.0,
      'trust_coefficient': 1.0,
    },
    needs=('params',),
  ),
  Row(
    'scale_by_row_adam',
    transforms.scale_by_row_adam,
    options={},
    changes={'b1': 0.5, 'b2': 0.5, 'eps': 0.5, 'eps_root': 0.5},
    solves={},
    after=optax.scale(-0.1),
    takes_scalars=False,
  ),
  Row(
    'scale_by_avgrad',
    transforms.scale_by_avgrad,
    options={},
    changes={'b1': 0.5, 'b2': 0.5, 'eps': 0.5},
    after=optax.scale(-0.1),
  ),
  Row(
    'avgrad',
    transforms.avgrad,
    options={'learning_rate': 0.1, 'weight_decay': 0.1},
    changes={
      'learning_rate': 0.2,
      'b1': 0.5,
      'b2': 0.5,
      'eps': 0.5,
      'weight_decay': 1.0,
    },
    solves={'weight_decay': 0.0},
    needs=('params',),
  ),
  Row(
    'scale_by_mada',
    transforms.scale_by_mada,
    options={'learning_rate': 0.1, **_MADA},
    changes={'learning_rate': 0.2, **_MADA_CHANGES},
    static=_MADA_STATIC,
    after=optax.scale(-0.1),
  ),
  Row(
    'mada',
    transforms.mada,
    options={'learning_rate': 0.1, **_MADA},
    changes={'learning_rate': 0.2, 'weight_decay': 1.0, **_MADA_CHANGES},
    solves={'gamma': 1.0, 'hyper_learning_rate': None, 'weight_decay': 0.0},
    static=(*_MADA_STATIC, 'mask'),
    needs=('params',),
  ),
  Row(
    'scale_by_adam_8bit',
    transforms.scale_by_adam_8bit,
    options=_BLOCKS,
    changes={'b1': 0.5, 'b2': 0.5, 'eps': 0.5},
    solves={},
    static=(*_BLOCKS_STATIC, 'strict_shards'),
    after=optax.scale_by_learning_rate(0.1),
  ),
  Row(
    'adamw_8bit',
    transforms.adamw_8bit,
    options={'learning_rate': 0.1, 'weight_decay': 0.1, **_BLOCKS},
    changes={
      'learning_rate': 0.2,
      'b1': 0.5,
      'b2': 0.5,
      'eps': 0.5,
      'weight_decay': 1.0,
    },
    static=(*_BLOCKS_STATIC, 'strict_shards', 'mask'),
    needs=('params',),
  ),
  Row(
    'quantize_state',
    transforms.quantize_state,
    options={'inner': optax.trace(0.9), **_BLOCKS},
    changes={},
    static=(*_BLOCKS_STATIC, 'unsigned_fields'),
    after=optax.scale(-0.015),
    # Momentum in bfloat16 is rounded less often where it is compiled, and the
    # next code is no rounding of a code.
    dtypes=(jnp.float32, jnp.float64),
  ),
  Row(
    'add_tangent_noise',
    transforms.add_tangent_noise,
    options={
      'key': jax.random.key(0),
      'step_size': 0.015,
      'temperature': 0.5,
    },
    changes={'step_size': 0.1, 'temperature': 0.1},
    solves={'temperature': optax.linear_schedule(0.1, 0.0, 500)},
    static=('key',),
    needs=('params',),
    before=_TANGENT_STEP,
    after=transforms.retract(),
    unit_rows=True,
  ),
  Row(
    'project_tangent',
    transforms.project_tangent,
    options={},
    changes={},
    needs=('params',),
    after=optax.chain(optax.scale(-0.015), transforms.retract()),
    unit_rows=True,
  ),
  Row(
    'cap_rows',
    transforms.cap_rows,
    options={'max_norm': 0.01},
    changes={'max_norm': 0.005},
    before=_TANGENT_STEP,
    after=transforms.retract(),
    unit_rows=True,
  ),
  Row(
    'retract',
    transforms.retract,
    options={},
    changes={},
    needs=('params',),
    before=_TANGENT_STEP,
    unit_rows=True,
  ),
  Row(
    'transport_momentum',
    transforms.transport_momentum,
    options={'inner': optax.sgd(0.005, momentum=0.9)},
    changes={},
    needs=('params',),
    before=transforms.project_tangent(),
    after=optax.chain(transforms.project_tangent(), transforms.retract()),
    unit_rows=True,
  ),
  Row(
    'riemannian',
    transforms.riemannian,
    options={'inner': optax.sgd(0.005, momentum=0.9), 'max_step': 0.01},
    changes={'max_step': 0.005},
    solves={},
    needs=('params',),
    unit_rows=True,
  ),
  Row(
    'search_on_sphere',
    transforms.search_on_sphere,
    options={'line_search': optax.scale_by_backtracking_linesearch(9)},
    changes={},
    solves={},
    needs=('params', 'value', 'grad', 'value_fn'),
    before=_TANGENT_STEP,
    after=transforms.retract(),
    unit_rows=True,
    # The line searches of optax mix bfloat16 with float32, and multiply by
    # `vdot`, which explicit axes leave without a sharding.
    dtypes=(jnp.float32, jnp.float64),
    axis_types=(jax.sharding.AxisType.Auto,),
  ),
  Row(
    'backtrack',
    transforms.backtrack,
    # Trials go too far and are refused, so that each number counts.
    options={
      'inner': optax.sgd(1.0, momentum=0.5),
      'max_step': 2.0,
      'first_step': 2.0,
      'slope_rtol': 0.45,
      'shrink': 0.8,
      'map': 'exponential',
    },
    changes={
      'max_step': 0.5,
      'first_step': 0.5,
      'slope_rtol': 1e-3,
      'value_rtol': 10.0,
      'shrink': 0.5,
      'max_shrinks': 1,
    },
    solves={},
    needs=('params', 'value'),
    unit_rows=True,
    # The first points are a part of its state.
    starts_from_shapes=False,
  ),
  Row(
    'krylov_cubic_newton',
    transforms.krylov_cubic_newton,
    options={'subspace_dim': 3},
    changes={},
    solves={'subspace_dim': 4},
    # Where M starts counts in the first state alone. Each number more would
    # cost updates that are not compiled, whose loops are, each time anew.
    static=(
      'subspace_dim',
      'regularization',
      'shrink',
      'max_trials',
      'gradient_tol',
      'breakdown_tol',
    ),
    needs=('params', 'value', 'value_fn'),
    # Products of vectors leave explicit axes without a sharding.
    axis_types=(jax.sharding.AxisType.Auto,),
  ),
  Row(
    'compressed_mean',
    transforms.compressed_mean,
    options={'compressor': sparse.block_k(fraction=0.5), 'axis_name': None},
    changes={},
    static=('min_compression_rate', 'start_step'),
    after=optax.scale(-0.1),
    # Codes flatten what they take, which an explicit axis does not let them.
    axis_types=(jax.sharding.AxisType.Auto,),
  ),
  Row(
    'powersgd_momentum',
    transforms.powersgd_momentum,
    options={},
    changes={'decay': 0.5},
    after=optax.scale(-0.1),
  ),
  Row(
    'densify',
    transforms.densify,
    options={},
    changes={},
    static=('keep_rows', 'max_dense_bytes'),
    after=optax.scale(-0.1),
  ),
  Row(
    'row_wise',
    transforms.row_wise,
    options={'inner': optax.sgd(0.05, momentum=0.9)},
    changes={},
    solves={'inner': transforms.avgrad(0.1, weight_decay=0.0)},
  ),
)
