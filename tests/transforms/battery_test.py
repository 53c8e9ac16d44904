"""What every transform is asked, whatever it computes.

Most questions are one: does it do in company what it does alone?
"""

import functools
import inspect
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized
from flax import nnx

from emc2 import mesh as mesh_lib
from emc2 import transforms

from tests.transforms import registry, targets

NUM_STEPS = 4
RTOL = {jnp.bfloat16: 3e-2, jnp.float32: 2e-5, jnp.float64: 1e-12}

# What wrappers, disks and long runs do is nearly the same for all: here stand
# what is elementwise, with params and without, what codes its state, what has
# another inside, and what calls functions back.
_FEW_NAMES = (
  'adam',
  'avgrad',
  'scale_by_adam_8bit',
  'transport_momentum',
  'search_on_sphere',
)
_FEW = tuple(row for row in registry.ROWS if row.name in _FEW_NAMES)
_REST = tuple(row for row in registry.ROWS if row.name not in _FEW_NAMES)


def _rows(rows):
  return parameterized.named_parameters((row.name, row) for row in rows)


def _solving(rows):
  return _rows(row for row in rows if row.solves is not None)


_each = _rows(registry.ROWS)
_few, _rest = _rows(_FEW), _rows(_REST)
_each_narrow_or_wide = parameterized.named_parameters(
  (f'{row.name}_{jnp.dtype(dtype)}', row, dtype)
  for row in registry.ROWS
  for dtype in row.dtypes
  if dtype != jnp.float32
)
_each_axis_type = parameterized.named_parameters(
  (f'{row.name}_{kind.name}', row, kind)
  for row in registry.ROWS
  for kind in row.axis_types
)


def _objective(tree, of_no_use=None):
  """A sum over all entries, so that any part of a tree has one too.

  Line searches hand on to it what they do not know.
  """
  del of_no_use
  wide = lambda leaf: leaf.astype(np.promote_types(leaf.dtype, np.float32))
  each = lambda leaf: jnp.sum(jnp.sin(3 * leaf) + leaf)
  return sum(each(wide(leaf)) for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0)
def _inputs(row, params):
  """What the transform is to transform on the way down, and extra arguments."""
  value, grads = jax.value_and_grad(_objective)(params)
  updates, _ = row.before.update(grads, row.before.init(params), params)
  return updates, {'value': value, 'grad': grads, 'of_no_use': value}


def _update(row, tx, params, state, change=lambda updates: updates, **extra):
  """The updates and the state, of inputs that are changed before."""
  updates, known = _inputs(row, params)
  extra = {**known, 'value_fn': _objective, **extra}
  return tx.update(change(updates), state, params, **extra)


def _step(row, tx, params, state):
  """A step of the whole optimiser: params, state and the updates of `tx`."""
  updates, state = _update(row, tx, params, state)
  moves, _ = row.after.update(updates, row.after.init(params), params)
  return optax.apply_updates(params, moves), state, updates


def _bind(row, tx):
  return functools.partial(_step, row, tx)


def _run(step, params, state):
  """Params, state and updates of each step."""
  history = []
  for _ in range(NUM_STEPS):
    params, state, updates = step(params, state)
    history.append((params, state, updates))
  return history


class _Alone(NamedTuple):
  """What a transform does by itself."""

  step: Callable[..., Any]  # Compiled.
  history: list[Any]
  num_compiled: int


@functools.cache
def _alone(row):
  tx, params = row.transform(), row.params()
  step = jax.jit(_bind(row, tx))
  history = _run(step, params, tx.init(params))
  return _Alone(step, history, step._cache_size())


def _times(factor):
  return lambda tree: jax.tree.map(lambda leaf: factor * leaf, tree)


def _is_matrix(tree):
  return {name: name == 'matrix' for name in tree}


def _matrix(row, dtype=jnp.float32):
  """Fewer params: outside of `jit` each shape is compiled for by itself."""
  return {'matrix': row.params(dtype)['matrix']}


@functools.cache
def _eager(row):
  """What the transform does by itself, not compiled, on the matrix."""
  tx, params = row.transform(), _matrix(row)
  return _run(_bind(row, tx), params, tx.init(params))


def _first(row):
  """Of that: the first updates, and the state after them."""
  _, state, updates = _eager(row)[0]
  return updates, state


def _updates(history):
  return [updates for _, _, updates in history]


def _types(tree):
  """Shapes, dtypes, weak types and, where types hold them, shardings."""
  return jax.tree.map(jax.typeof, tree)


def _arrays(tree):
  """The leaves in NumPy, floats wide, keys as their words."""

  def array(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return np.asarray(leaf, np.float64 if is_float else leaf.dtype)

  return jax.tree.map(array, tree)


def _assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, _arrays(got), _arrays(want))


def _assert_near(got, want, rtol=RTOL[jnp.float32]):
  """Equal up to rounding of numbers of the size of a leaf's largest entry."""

  def near(a, b):
    if b.dtype == np.float64:
      # What is small next to the params is rounded as they are.
      size = max(np.abs(b).max(), 1e-2)
      np.testing.assert_allclose(a, b, rtol=0, atol=rtol * size)
    else:
      np.testing.assert_array_equal(a, b)

  jax.tree.map(near, _arrays(got), _arrays(want))


def _gap(a, b):
  """How far apart two trees are, relative to the largest entry of a leaf."""
  pairs = zip(*(jax.tree.leaves(_arrays(tree)) for tree in (a, b)), strict=True)
  return max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs)


@functools.cache
def _restored(rows):
  """The states of transforms before the last step, from one checkpoint."""
  saved = {row.name: _alone(row).history[-2][1] for row in rows}
  like = {row.name: row.transform().init(row.params()) for row in rows}
  with (
    tempfile.TemporaryDirectory() as folder,
    ocp.StandardCheckpointer() as checkpointer,
  ):
    path = pathlib.Path(folder, 'states')
    checkpointer.save(path, saved)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path, like)


class RegistryTest(parameterized.TestCase):
  def test_every_transform_has_a_row(self):
    made = {row.make for row in registry.ROWS}
    for name in transforms.__all__:
      make = getattr(transforms, name)
      if inspect.isfunction(make):
        kind = inspect.signature(make).return_annotation
        self.assertIsNot(kind, inspect.Signature.empty, msg=name)
        if kind is optax.GradientTransformationExtraArgs:
          self.assertIn(make, made, msg=f'{name} must have a row.')

  def test_names_are_unique(self):
    names = [row.name for row in registry.ROWS]
    self.assertLen(set(names), len(names))


class BatteryTest(parameterized.TestCase):
  @_each
  def test_extra_args(self, row):
    """It takes any, and asks by name for what it needs and nothing else."""
    tx, params = row.transform(), row.params()
    self.assertIsInstance(tx, optax.GradientTransformationExtraArgs)
    updates, extra = _inputs(row, params)
    given = {'params': params, 'value_fn': _objective, **extra}
    state = tx.init(params)
    want = jax.eval_shape(lambda: tx.update(updates, state, **given))
    for name in given:
      rest = {other: given[other] for other in given if other != name}
      lacking = lambda rest=rest: tx.update(updates, state, **rest)
      if name in row.needs:
        with self.assertRaisesRegex((TypeError, ValueError), rf'\b{name}\b'):
          jax.eval_shape(lacking)
      else:
        self.assertEqual(jax.eval_shape(lacking), want, msg=name)

  @_each
  def test_second_call_compiles_nothing(self, row):
    self.assertEqual(_alone(row).num_compiled, 1)

  @_each
  def test_may_be_donated(self, row):
    """Params and states share no memory, not with the transform either."""
    tx, params = row.transform(), row.params()
    give = jax.jit(lambda *trees: trees, donate_argnums=(0, 1))
    for _ in range(2):
      params, _ = give(params, tx.init(params))

  @_each
  def test_types_stay(self, row):
    self._check_types(row, jnp.float32)

  @_each_narrow_or_wide
  @pytest.mark.slow
  def test_types_stay_in(self, row, dtype):
    self._check_types(row, dtype)

  def _check_types(self, row, dtype):
    """Of params, state and updates; shapes alone tell them."""
    with jax.enable_x64(dtype == jnp.float64):
      tx, params = row.transform(), row.params(dtype)
      shapes, state = jax.eval_shape(lambda: (params, tx.init(params)))
      self.assertEqual(jax.eval_shape(tx.init, shapes), state)
      got = jax.eval_shape(_bind(row, tx), shapes, state)
      self.assertEqual(got, (shapes, state, shapes))
      if row.starts_from_shapes:
        self.assertEqual(_types(tx.init(shapes)), _types(tx.init(params)))

  @_each
  def test_compiled_equals_eager(self, row):
    self._check_eager(row, jnp.float32)

  @_each_narrow_or_wide
  @pytest.mark.slow
  def test_compiled_equals_eager_in(self, row, dtype):
    with jax.enable_x64(dtype == jnp.float64):
      self._check_eager(row, dtype)

  def _check_eager(self, row, dtype):
    tx, params = row.transform(), _matrix(row, dtype)
    state, step = tx.init(params), _bind(row, tx)
    compiled = _run(jax.jit(step), params, state)
    eager = _run(step, params, state)
    want = [_types((params, state, params))] * NUM_STEPS
    self.assertEqual(_types(compiled), want)
    self.assertEqual(_types(eager), want)
    _assert_near(compiled, eager, RTOL[dtype])

  @_each_axis_type
  @pytest.mark.slow
  def test_sharded(self, row, kind):
    """The state lies as the params do, and eight devices agree with one."""
    mesh = mesh_lib.make(fsdp=4, tensor=2)
    mesh = jax.sharding.Mesh(
      mesh.devices, mesh.axis_names, axis_types=(kind,) * 2
    )
    want = _alone(row).history
    with jax.set_mesh(mesh):
      tx = row.transform()
      params = mesh_lib.place(row.params(), mesh, row.specs())
      state = tx.init(params)
      got = _run(jax.jit(_bind(row, tx)), params, state)
      self.assertEqual(_types(jax.jit(tx.init)(params)), _types(state))
      self.assertEqual(_types(got[-1][1]), _types(state))
      for leaf in jax.tree.leaves((state, got)):
        for like in params.values():
          if leaf.ndim and leaf.shape == like.shape:
            same = leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
            self.assertTrue(same, msg=f'{leaf.sharding} for {like.sharding}')
    _assert_near(got, want)

  @_few
  def test_inject_hyperparams(self, row):
    self._check_hyperparams(row)

  @_rest
  @pytest.mark.slow
  def test_inject_hyperparams_too(self, row):
    self._check_hyperparams(row)

  def _check_hyperparams(self, row):
    """A number in the state does what it does as an argument."""
    make = optax.inject_hyperparams(row.make, static_args=row.static)
    tx, params = make(**row.options), _matrix(row)
    state, step = tx.init(params), jax.jit(_bind(row, tx))
    self.assertEqual(set(state.hyperparams), set(row.changes))
    alone = _updates(_eager(row))
    _assert_near(_updates(_run(step, params, state)), alone)
    for name, number in row.changes.items():
      other = row.transform(**{name: number})
      want = _updates(_run(_bind(row, other), params, other.init(params)))
      self.assertGreater(_gap(want, alone), 1e-2, msg=f'{name} does nothing.')
      old = state.hyperparams[name]
      numbers = {**state.hyperparams, name: jnp.full_like(old, number)}
      got = _run(step, params, state._replace(hyperparams=numbers))
      _assert_near(_updates(got), want)
    self.assertEqual(step._cache_size(), 1)

  @_few
  def test_masked(self, row):
    self._check_masked(row)

  @_rest
  @pytest.mark.slow
  def test_masked_too(self, row):
    self._check_masked(row)

  def _check_masked(self, row):
    tx = row.transform()
    # Gradients among the extra arguments are masked as the updates are.
    wrapped = optax.masked(tx, _is_matrix, mask_compatible_extra_args=True)
    self._check_part(row, wrapped, optax.identity())

  @_few
  def test_partition(self, row):
    self._check_partition(row)

  @_rest
  @pytest.mark.slow
  def test_partition_too(self, row):
    self._check_partition(row)

  def _check_partition(self, row):
    rest = optax.scale(2.0)
    wrapped = optax.partition(
      {True: row.transform(), False: rest},
      _is_matrix,
      mask_compatible_extra_args=True,
    )
    self._check_part(row, wrapped, rest)

  def _check_part(self, row, wrapped, rest):
    """On a part of the params it does what it does on that part alone."""
    tx, params = row.transform(), row.params()
    rest = optax.with_extra_args_support(rest)
    part = _matrix(row)
    state, part_state = wrapped.init(params), tx.init(part)
    value = _objective(part)
    for _ in range(2):
      got, state = _update(row, wrapped, params, state, value=value)
      want, part_state = _update(row, tx, part, part_state)
      others, _ = _update(row, rest, params, rest.init(params))
      _assert_near(got, {**others, **want})

  @_each
  @pytest.mark.slow
  def test_multi_steps(self, row):
    """The mean of two gradients makes one update."""
    params = _matrix(row)
    wrapped = optax.MultiSteps(row.transform(), 2).gradient_transformation()
    start = wrapped.init(params)
    # It multiplies floats by counters.
    self.enterContext(jax.numpy_dtype_promotion('standard'))
    update = jax.jit(
      lambda factor, state: _update(row, wrapped, params, state, _times(factor))
    )
    updates, state = update(jnp.float32(1.5), start)
    _assert_same(updates, optax.tree.zeros_like(params))
    _assert_same(state.inner_opt_state, start.inner_opt_state)
    updates, state = update(jnp.float32(0.5), state)
    _assert_near((updates, state.inner_opt_state), _first(row))

  @_few
  def test_chain(self, row):
    self._check_chain(row)

  @_rest
  @pytest.mark.slow
  def test_chain_too(self, row):
    self._check_chain(row)

  def _check_chain(self, row):
    """Clipping to half of the norm halves what goes in."""
    tx, params = row.transform(), _matrix(row)
    norm = optax.tree.norm(_inputs(row, params)[0])
    wrapped = optax.chain(optax.clip_by_global_norm(norm / 2), tx)
    got, (_, state) = _update(row, wrapped, params, wrapped.init(params))
    want = _update(row, tx, params, tx.init(params), _times(0.5))
    _assert_near((got, state), want)

  @_each
  @pytest.mark.slow
  def test_apply_if_finite(self, row):
    """What is no number changes nothing, and the next input is the first."""
    params, wrapped = _matrix(row), optax.apply_if_finite(row.transform(), 3)
    start = wrapped.init(params)

    @jax.jit
    def update(factor, state):
      spoil = lambda tree: {'matrix': tree['matrix'].at[0].multiply(factor)}
      return _update(row, wrapped, params, state, spoil)

    updates, state = update(jnp.float32(np.nan), start)
    self.assertEqual(state.total_notfinite, 1)
    _assert_same(updates, optax.tree.zeros_like(params))
    _assert_same(state.inner_state, start.inner_state)
    updates, state = update(jnp.float32(1.0), state)
    _assert_near((updates, state.inner_state), _first(row))

  @_each
  @pytest.mark.slow
  def test_flax_optimizer(self, row):
    class Model(nnx.Module):
      def __init__(self, params):
        for name, value in params.items():
          setattr(self, name, nnx.Param(value))

    model = Model(_matrix(row))
    tx = optax.chain(row.before, row.transform(), row.after)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    objective = lambda model: _objective(nnx.state(model, nnx.Param))
    for params, _, _ in _eager(row):
      value, grads = nnx.value_and_grad(objective)(model)
      optimizer.update(
        model, grads, value=value, grad=grads, value_fn=_objective
      )
      _assert_near(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    got, want = nnx.as_pure(optimizer.opt_state)[1], _eager(row)[-1][1]
    _assert_near(jax.tree.leaves(got), jax.tree.leaves(want))

  @_few
  def test_checkpoint(self, row):
    self._check_checkpoint(row, _FEW)

  @_rest
  @pytest.mark.slow
  def test_checkpoint_too(self, row):
    self._check_checkpoint(row, _REST)

  def _check_checkpoint(self, row, rows):
    """A run goes on from the disk as if it had never stopped."""
    *_, (params, state, _), last = _alone(row).history
    restored = _restored(rows)[row.name]
    self.assertEqual(_types(restored), _types(state))
    _assert_same(restored, state)
    _assert_same(_alone(row).step(params, restored), last)

  @_solving(_FEW)
  def test_converges(self, row):
    self._check_convergence(row)

  @_solving(_REST)
  @pytest.mark.slow
  def test_converges_too(self, row):
    self._check_convergence(row)

  def _check_convergence(self, row):
    """To four minima at once, up to 1e-4 of what it starts with."""
    find = targets.on_spheres if row.unit_rows else targets.in_space
    start, found = find()
    tx = optax.chain(row.before, row.transform(**row.solves), row.after)

    def run(which):
      fns = [target.fn for target in found]
      fn = lambda params: jax.lax.switch(which, fns, params['matrix'])

      def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(fn)(params)
        updates, state = tx.update(
          grads, state, params, value=value, grad=grads, value_fn=fn
        )
        return (optax.apply_updates(params, updates), state), None

      params = {'matrix': start}
      carry = params, tx.init(params)
      (ends, _), _ = jax.lax.scan(step, carry, length=1000)
      return fn(params), fn(ends)

    first, last = jax.jit(jax.vmap(run))(jnp.arange(len(found)))
    least = np.array([target.minimum for target in found])
    excess = (np.asarray(last, np.float64) - least) / (first - least)
    np.testing.assert_allclose(excess, 0, atol=1e-4)
