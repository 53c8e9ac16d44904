"""Krylov cubic Newton against a loop in NumPy and the claims of its paper."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from flax import nnx

from emc2 import mesh as mesh_lib
from emc2 import transforms
from emc2.newton import regularization as newton

DIM = 8
NUM_STEPS = 8
RIDGE = 1e-3


def _samples(seed=0, size=40, dim=DIM):
  """Of two classes that no plane parts, times their labels, -1 or 1."""
  rng = np.random.default_rng(seed)
  samples = rng.normal(size=(size, dim)) * np.geomspace(2, 0.5, dim)
  scores = samples @ rng.normal(size=dim) + rng.normal(size=size)
  return samples * np.sign(scores)[:, None]


def _loss(samples, x, np=jnp):
  losses = np.logaddexp(0.0, -samples @ x)
  return np.mean(losses) + RIDGE / 2 * np.sum(x**2)


def _derivatives(samples, x):
  """The loss, its gradient and its Hessian."""
  odds = 1 / (1 + np.exp(samples @ x))
  slope = -samples.T @ odds / len(samples) + RIDGE * x
  bend = (samples.T * (odds * (1 - odds))) @ samples / len(samples)
  return _loss(samples, x, np), slope, bend + RIDGE * np.eye(len(x))


def _krylov(hessian, gradient, subspace_dim, breakdown_tol):
  """An orthonormal basis, its vectors in the columns."""
  columns, largest = [gradient / np.linalg.norm(gradient)], 0.0
  last = 0.0
  while len(columns) < subspace_dim:
    image = hessian @ columns[-1]
    largest = max(largest, abs(columns[-1] @ image) + last)
    basis = np.stack(columns, axis=1)
    for _ in range(2):
      image = image - basis @ (basis.T @ image)
    last = np.linalg.norm(image)
    if last <= breakdown_tol * largest:
      break
    columns.append(image / last)
  return np.stack(columns, axis=1)


def _cubic(matrix, gradient, M):
  """The least point of the cubic model, by bisection, and its shift."""
  values, vectors = np.linalg.eigh(matrix)
  coefficients = vectors.T @ gradient
  low = max(0.0, -values[0])
  high = low + np.sqrt(M * np.linalg.norm(gradient) / 2)
  for _ in range(200):
    shift = (low + high) / 2
    norm = np.linalg.norm(coefficients / (values + shift))
    low, high = (shift, high) if M * norm / 2 > shift else (low, shift)
  return -vectors @ (coefficients / (values + high)), high


def _model(hessian, gradient, step, M):
  """What the cubic model adds to the value."""
  cube = M / 6 * np.linalg.norm(step) ** 3
  return gradient @ step + step @ hessian @ step / 2 + cube


class _Step(NamedTuple):
  x: np.ndarray  # After the step.
  regularization: float
  shift: float
  num_trials: int
  result: newton.Result


def _loop(
  derivatives,
  x,
  steps,
  *,
  subspace_dim=4,
  regularization=2e-3,
  convention='sixth',
  adaptive=True,
  shrink=0.5,
  max_trials=64,
  gradient_tol=0.0,
  breakdown_tol=1e-6,
):
  """The iteration as its paper has it, on dense Hessians in float64."""
  M = regularization * {'sixth': 1, 'third': 2}[convention]
  shift, done = 0.0, []
  for _ in range(steps):
    value, gradient, hessian = derivatives(x)
    if np.linalg.norm(gradient) <= gradient_tol:
      done.append(_Step(x, M, shift, 0, newton.Result.CONVERGED))
      continue
    basis = _krylov(hessian, gradient, subspace_dim, breakdown_tol)
    small, slope = basis.T @ hessian @ basis, basis.T @ gradient
    result = newton.Result.SEARCH_FAILED
    floor = 1e-12 * (1 + np.linalg.eigvalsh(small)[-1])
    trial = max(floor, shrink * M) if adaptive else M
    trials = 0
    while trials < max_trials and result != newton.Result.OK:
      trials += 1
      s, root = _cubic(small, slope, trial)
      model = value + _model(small, slope, s, trial)
      if not adaptive or derivatives(x + basis @ s)[0] <= model:
        x, M, shift, result = x + basis @ s, trial, root, newton.Result.OK
      last, trial = trial, trial / shrink
    if result != newton.Result.OK:
      M = last
    done.append(_Step(x, M, shift, trials, result))
  return done


def _run(tx, fn, params, state):
  """Params and states after each step."""

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(fn)(params)
    updates, state = tx.update(grads, state, params, value=value, value_fn=fn)
    carry = optax.apply_updates(params, updates), state
    return carry, carry

  return jax.lax.scan(step, (params, state), length=NUM_STEPS)[1]


@functools.cache
def _compiled(**static):
  """Steps from any state, on any samples."""

  @jax.jit
  def run(samples, x, state, gradient_tol, scale):
    tx = transforms.krylov_cubic_newton(**static, gradient_tol=gradient_tol)
    return _run(tx, lambda x: scale * _loss(samples, x), x, state)

  return run


def _follow(samples, x, *, scale=1.0, repeats=1, **options):
  """Params and states after each step, of a transform with those options."""
  options = {'subspace_dim': 4, **options}
  x = jnp.asarray(x)
  state = transforms.krylov_cubic_newton(**options).init(x)
  gradient_tol = options.pop('gradient_tol', 0.0)
  if options.get('adaptive', True):
    # Then they count in the first state alone, and need no other program.
    options.pop('regularization', None)
    options.pop('convention', None)
  done = []
  for _ in range(repeats):
    history = _compiled(**options)(samples, x, state, gradient_tol, scale)
    x, state = jax.tree.map(lambda leaf: leaf[-1], history)
    done.append(history)
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *done)


@functools.cache
def _update_of_parts():
  """A step from the parts of a model; the value is spoiled at its trials."""

  @jax.jit
  def update(x, state, value, grads, hessian, spoil):
    fn = lambda x: _loss(jnp.asarray(_samples()), x) + spoil

    def hvp_fn(v):
      jax.debug.callback(lambda: CALLS.append(1))
      return hessian @ v

    tx = transforms.krylov_cubic_newton(3, max_trials=5)
    return tx.update(grads, state, x, value=value, value_fn=fn, hvp_fn=hvp_fn)

  return update


CALLS = []

_WITHOUT_SEARCH = {
  'adaptive': False,
  'regularization': 0.1,
  'convention': 'third',
  'breakdown_tol': 0.3,
}
_SHORT_SEARCH = {'shrink': 0.2, 'max_trials': 3}

OPTIONS = {
  'subspace_dim': {'subspace_dim': 1},
  'regularization': {'regularization': 1.0},
  'gradient_tol': {'gradient_tol': 0.02},
  'adaptive': _WITHOUT_SEARCH,
  'convention': _WITHOUT_SEARCH,
  'breakdown_tol': _WITHOUT_SEARCH,
  'shrink': {'regularization': 0.1, **_SHORT_SEARCH},
  'max_trials': _SHORT_SEARCH,
}


class KrylovCubicNewtonTest(parameterized.TestCase):
  """In float64."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    self.samples = _samples()
    self.start = np.full(DIM, 0.5)
    self.derivatives = functools.partial(_derivatives, self.samples)

  @parameterized.parameters(
    {},
    OPTIONS['subspace_dim'],
    OPTIONS['regularization'],
    OPTIONS['gradient_tol'],
    _WITHOUT_SEARCH,
    OPTIONS['shrink'],
    OPTIONS['max_trials'],
    # Too small for one search, not for two.
    {'regularization': 1e-12},
  )
  def test_matches_a_loop(self, **options):
    want = _loop(self.derivatives, self.start, NUM_STEPS, **options)
    params, states = _follow(self.samples, self.start, **options)
    column = lambda field: np.stack([getattr(one, field) for one in want])
    np.testing.assert_allclose(params, column('x'), rtol=0, atol=1e-9)
    for field in ('regularization', 'shift'):
      got = getattr(states, field)
      np.testing.assert_allclose(got, column(field), rtol=1e-6, err_msg=field)
    np.testing.assert_array_equal(states.result, column('result'))
    trials = np.cumsum(column('num_trials'))
    np.testing.assert_array_equal(states.num_trials, trials)
    hvps = options.get('subspace_dim', 4) * np.arange(1, NUM_STEPS + 1)
    np.testing.assert_array_equal(states.num_hvps, hvps)
    steps = np.cumsum(column('result') == newton.Result.OK)
    np.testing.assert_array_equal(states.count, steps)

  @parameterized.parameters(*OPTIONS)
  def test_option_counts(self, name):
    """What the loop does hangs on it."""
    ends = []
    for names in (OPTIONS[name].keys(), OPTIONS[name].keys() - {name}):
      options = {name: OPTIONS[name][name] for name in names}
      path = _loop(self.derivatives, self.start, NUM_STEPS, **options)
      ends.append(np.stack([step.x for step in path]))
    self.assertGreater(np.abs(ends[0] - ends[1]).max(), 1e-2)

  def test_conventions_agree(self):
    """Half of M is as much in M / 3, in the state and in steps without it."""
    make = transforms.krylov_cubic_newton
    state = make(regularization=0.25, convention='third').init(jnp.zeros(10))
    want = make(regularization=0.5).init(jnp.zeros(10))
    jax.tree.map(np.testing.assert_array_equal, state, want)
    got, _ = _follow(self.samples, self.start, **_WITHOUT_SEARCH)
    options = {**_WITHOUT_SEARCH, 'regularization': 0.2, 'convention': 'sixth'}
    path = _loop(self.derivatives, self.start, NUM_STEPS, **options)
    np.testing.assert_allclose(got[-1], path[-1].x, rtol=0, atol=1e-9)

  def _check_model(self, samples, start, params, states):
    """The first step is at the optimum of the model in its space."""
    _, g, H = _derivatives(samples, start)
    step, M, shift = (
      params[0] - start,
      states.regularization[0],
      states.shift[0],
    )
    norm = np.linalg.norm(step)
    np.testing.assert_allclose(shift, M / 2 * norm, rtol=1e-10)
    identity = g @ step / 2 - shift / 2 * norm**2 + M / 6 * norm**3
    np.testing.assert_allclose(identity, _model(H, g, step, M), rtol=1e-10)
    self.assertLess(identity, 0)
    return g, H, step, H @ step + g + shift * step

  def test_one_dimension_is_gradient_descent(self):
    """At a rate known in closed form (T3, T4)."""
    params, states = _follow(self.samples, self.start, subspace_dim=1)
    g, H, step, _ = self._check_model(self.samples, self.start, params, states)
    M, gamma = states.regularization[0], np.linalg.norm(g)
    bend = g @ H @ g / gamma**2
    rate = (np.sqrt(bend**2 + 2 * M * gamma) - bend) / (M * gamma)
    np.testing.assert_allclose(step, -rate * g, rtol=1e-12)

  def test_all_dimensions_are_cubic_newton(self):
    """If only four features are any (T2); in eight, four are not all."""
    _, _, _, residual = self._check_model(
      self.samples, self.start, *_follow(self.samples, self.start)
    )
    self.assertGreater(np.abs(residual).max(), 1e-4)
    few = np.arange(DIM) < 4
    samples, start = self.samples * few, self.start * few
    _, _, _, residual = self._check_model(
      samples, start, *_follow(samples, start)
    )
    np.testing.assert_allclose(residual, 0, atol=1e-10)

  def test_few_eigenvalues_need_few_products(self):
    """Three of them make a space of three dimensions (T5)."""
    left, _, right = np.linalg.svd(self.samples, full_matrices=False)
    samples = (left * np.repeat([20, 10, 5], [3, 3, 2])) @ right
    start = np.zeros(DIM)
    params, states = _follow(samples, start)
    _, _, step, residual = self._check_model(samples, start, params, states)
    self.assertGreater(np.linalg.norm(step), 0.1)
    np.testing.assert_allclose(residual, 0, atol=1e-10)

  def test_descends_by_what_it_predicts(self):
    """At every step (T8)."""
    x = self.start * 4
    params, states = _follow(self.samples, x, repeats=2)
    for after, M in zip(params, states.regularization, strict=True):
      value, g, H = self.derivatives(x)
      predicted = _model(H, g, after - x, M)
      self.assertLess(predicted, 0)
      x = after
      least = value + predicted + 1e-12
      self.assertLessEqual(_loss(self.samples, x, np), least)

  def test_reaches_the_minimum(self):
    params, _ = _follow(self.samples, self.start, repeats=4)
    slopes = [np.linalg.norm(self.derivatives(x)[1]) for x in params]
    self.assertLess(slopes[-1], 1e-12)

  def test_scales_with_the_objective(self):
    """If M does, no step changes; nor do turns of space change any (T11)."""
    want, _ = _follow(self.samples, self.start, regularization=0.01)
    got, _ = _follow(self.samples, self.start, regularization=10.0, scale=1e3)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(DIM, DIM)))
    got, _ = _follow(
      self.samples @ turn, turn.T @ self.start, regularization=0.01
    )
    np.testing.assert_allclose(got @ turn.T, want, rtol=0, atol=1e-9)

  def test_hvp_fn(self):
    """It is asked m times, and what the default does it does too."""
    value, g, H = self.derivatives(self.start)
    x = jnp.asarray(self.start)
    state = transforms.krylov_cubic_newton(3, regularization=1.0).init(x)
    parts = {'value': value, 'grads': g, 'hessian': H, 'spoil': 0.0}
    CALLS.clear()
    step, _ = _update_of_parts()(x, state, **parts)
    jax.effects_barrier()
    self.assertLen(CALLS, 3)
    want = _loop(
      self.derivatives,
      self.start,
      1,
      **{'subspace_dim': 3, 'regularization': 1.0},
    )
    np.testing.assert_allclose(x + step, want[0].x, rtol=0, atol=1e-12)
    half, _ = _update_of_parts()(x, state, **{**parts, 'hessian': H / 2})
    self.assertGreater(np.abs(half - step).max(), 1e-2)

  @parameterized.parameters(
    ({'grads': 0.0}, 'CONVERGED', 0, 1),
    ({'grads': np.nan}, 'NON_FINITE', 0, 1),
    ({'value': np.inf}, 'NON_FINITE', 0, 1),
    ({'hessian': np.nan}, 'NON_FINITE', 0, 1),
    ({'spoil': np.nan}, 'SEARCH_FAILED', 5, 8),
    # The objective is higher wherever one asks.
    ({'spoil': 1.0}, 'SEARCH_FAILED', 5, 8),
    # Steps are too short to be seen in it.
    ({'grads': 1e-17, 'spoil': 1.0}, 'SEARCH_FAILED', 5, 1),
  )
  def test_stays_and_tells_why(self, changes, code, trials, growth):
    value, g, H = self.derivatives(self.start)
    x, update = jnp.asarray(self.start), _update_of_parts()
    state = transforms.krylov_cubic_newton(3, regularization=1.0).init(x)
    parts = {'value': value, 'grads': g, 'hessian': H, 'spoil': 0.0}
    spoiled = {
      name: part * changes[name] if name in changes else part
      for name, part in parts.items()
    }
    spoiled['spoil'] = changes.get('spoil', 0.0)
    for number in (1, 2):
      step, after = update(x, state, **spoiled)
      np.testing.assert_array_equal(step, 0)
      want = state._replace(
        regularization=state.regularization * growth,
        num_trials=state.num_trials + trials,
        num_hvps=3 * number,
        result=newton.Result[code],
      )
      jax.tree.map(np.testing.assert_array_equal, after, want)
      state = after
    # Once all is well it goes on as if nothing had been.
    _, state = update(x, state, **parts)
    self.assertEqual((state.result, state.count), (newton.Result.OK, 1))

  @parameterized.parameters(
    # Narrow, curved, and bent downwards on the way.
    (0, (-1.2, 1.0), 0.0),
    # A saddle nearby.
    (1, (1.0, 1e-3), -1.0),
    # Walls behind which there are no numbers.
    (2, (5.0, 0.1), 2.0),
  )
  def test_descends_where_it_may(self, which, start, least):
    x = jnp.array(start)
    state = transforms.krylov_cubic_newton(2).init(x)
    values = []
    for _ in range(8):
      (x, state), rows = _wild_run()(which, x, state)
      values.append(rows)
    values = np.concatenate(values)
    self.assertLessEqual(np.diff(values).max(), 1e-14)
    np.testing.assert_allclose(values[-1], least, atol=1e-12)
    self.assertGreater(state.num_trials, state.count)

  def test_batches_equal_loops(self):
    """One of them starts at its minimum, one where there are no numbers."""
    samples = np.stack([_samples(seed) for seed in range(4)])
    starts = np.stack([np.full(DIM, scale) for scale in (0.5, 4, 0.5, 0.5)])
    starts[2] = 0
    for _ in range(30):
      _, slope, bend = _derivatives(samples[2], starts[2])
      starts[2] -= np.linalg.solve(bend, slope)
    starts[3, 1] = np.nan
    state = transforms.krylov_cubic_newton(4).init(jnp.zeros(DIM))
    run = _compiled(subspace_dim=4)
    together = jax.jit(jax.vmap(run, in_axes=(0, 0, None, None, None)))
    params, states = together(samples, starts, state, 1e-12, 1.0)
    for i in range(4):
      want = _follow(samples[i], starts[i], gradient_tol=1e-12)
      got = params[i], jax.tree.map(lambda leaf, i=i: leaf[i], states)
      near = lambda a, b: np.testing.assert_allclose(a, b, 1e-8, 1e-10)
      jax.tree.map(near, got, want)
    names = [newton.Result(code).name for code in states.result[:, -1]]
    self.assertEqual(names, ['OK', 'OK', 'CONVERGED', 'NON_FINITE'])

  def test_sharded_trees_equal_vectors(self):
    """Under `jit` alone, in leaves of all kinds."""
    mesh = mesh_lib.make(fsdp=4, tensor=2)
    specs = {'a': jax.P(('fsdp', 'tensor')), 'b': jax.P(None, 'tensor')}
    specs['c'] = jax.P()
    samples = _samples(dim=13)
    tree = {'a': np.full(8, 0.5), 'b': np.full([2, 2], 0.5), 'c': np.array(0.5)}
    flat = lambda tree: jnp.concatenate(
      [jnp.reshape(tree[name], [-1]) for name in 'abc']
    )
    tx = transforms.krylov_cubic_newton(4)
    with jax.set_mesh(mesh):
      placed = mesh_lib.place(tree, mesh, specs)
      params, states = jax.jit(
        lambda tree: _run(
          tx,
          lambda tree: _loss(jnp.asarray(samples), flat(tree)),
          tree,
          tx.init(tree),
        )
      )(placed)
    self.assertEqual(params['a'].sharding.spec, jax.P(None, *specs['a']))
    derivatives = functools.partial(_derivatives, samples)
    want = _loop(derivatives, np.full(13, 0.5), NUM_STEPS)
    got = jax.vmap(flat)(jax.tree.map(np.asarray, params))
    np.testing.assert_allclose(
      got, np.stack([step.x for step in want]), rtol=0, atol=1e-8
    )
    self.assertEqual(states.num_hvps[-1], 4 * NUM_STEPS)


@functools.cache
def _wild_run():
  """On functions of the plane that are not convex, or not everywhere."""
  fns = (
    lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2,
    lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4,
    lambda x: jnp.sum(x - jnp.log(x)),
  )

  @jax.jit
  def run(which, x, state):
    fn = lambda x: jax.lax.switch(which, fns, x)
    tx = transforms.krylov_cubic_newton(2)
    params, states = _run(tx, fn, x, state)
    last = jax.tree.map(lambda leaf: leaf[-1], (params, states))
    return last, jax.lax.map(fn, params)

  return run


class TypesTest(parameterized.TestCase):
  def test_float32_reaches_its_noise(self):
    """And M does not run away."""
    samples = _samples(size=400).astype(np.float32)
    params, states = _follow(samples, np.full(DIM, 0.5, np.float32), repeats=8)
    wide = np.float64
    slopes = [_derivatives(wide(samples), wide(x))[1] for x in params]
    slopes = np.linalg.norm(slopes, axis=1)
    self.assertLess(slopes[-NUM_STEPS:].max(), 1e-6)
    self.assertLess(states.regularization.max(), 1.0)

  def test_bfloat16_params(self):
    """Their step is that of float32, rounded."""
    samples = _samples().astype(np.float32)
    tx = transforms.krylov_cubic_newton(4, regularization=1.0)
    fn = lambda x: _loss(samples, x.astype(jnp.float32))

    @jax.jit
    def step(x):
      value, grads = jax.value_and_grad(fn)(x)
      return tx.update(grads, tx.init(x), x, value=value, value_fn=fn)

    x = jnp.full([DIM], 0.5, jnp.bfloat16)
    got, state = step(x)
    self.assertEqual(got.dtype, jnp.bfloat16)
    self.assertEqual(state.shift.dtype, jnp.float32)
    self.assertEqual(state.result, newton.Result.OK)
    want, _ = _follow(samples, x.astype(jnp.float32), regularization=1.0)
    np.testing.assert_allclose(
      got.astype(jnp.float32), want[0] - 0.5, rtol=0, atol=2e-2
    )

  @pytest.mark.slow
  def test_flax_optimizer(self):
    class Model(nnx.Module):
      def __init__(self):
        self.x = nnx.Param(jnp.full([DIM], 0.5))

    samples = _samples().astype(np.float32)
    tx, model = transforms.krylov_cubic_newton(4), Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
      loss = lambda model: _loss(samples, model.x[...])
      value, grads = nnx.value_and_grad(loss)(model)
      value_fn = lambda params: _loss(samples, params['x'][...])
      optimizer.update(model, grads, value=value, value_fn=value_fn)

    for _ in range(NUM_STEPS):
      step(model, optimizer)
    want, _ = _follow(samples, np.full(DIM, 0.5, np.float32))
    np.testing.assert_allclose(model.x[...], want[-1], rtol=1e-3)


class ShardedTest(parameterized.TestCase):
  def test_split_params_equal_whole(self):
    """Columns over one axis, rows over another, and a leaf that is whole."""
    self.enterContext(jax.enable_x64(True))
    mesh = mesh_lib.make(data=2, tensor=4)
    samples = _samples(dim=DIM + 1)
    params = {'split': np.full(DIM, 0.5), 'whole': np.full(1, 0.5)}
    specs = {'split': jax.P('tensor'), 'whole': jax.P()}
    tx = transforms.krylov_cubic_newton(4, axis_name=('data', 'tensor'))

    def run(split, whole, params):
      def fn(params):
        scores = jax.lax.psum(split @ params['split'], 'tensor')
        scores += whole @ params['whole']
        value = jax.lax.pmean(jnp.mean(jnp.logaddexp(0.0, -scores)), 'data')
        square = jax.lax.psum(jnp.sum(params['split'] ** 2), 'tensor')
        return value + RIDGE / 2 * (square + jnp.sum(params['whole'] ** 2))

      return _run(tx, fn, params, tx.init(params))

    compiled = jax.jit(
      jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(jax.P('data', 'tensor'), jax.P('data'), specs),
        out_specs=(
          {'split': jax.P(None, 'tensor'), 'whole': jax.P()},
          jax.P(),
        ),
      )
    )
    given = samples[:, :DIM], samples[:, DIM:], params
    got, states = compiled(*given)
    derivatives = functools.partial(_derivatives, samples)
    want = _loop(derivatives, np.full(DIM + 1, 0.5), NUM_STEPS)
    x = np.concatenate([got['split'], got['whole']], axis=1)
    np.testing.assert_allclose(
      x, np.stack([step.x for step in want]), rtol=0, atol=1e-8
    )
    np.testing.assert_array_equal(
      states.num_trials, np.cumsum([step.num_trials for step in want])
    )

  @parameterized.parameters('tensor', [('tensor', 'data')])
  def test_costs_two_sums_a_product(self, axis_name):
    """And one for the gradient; what functions sum is theirs."""
    mesh = mesh_lib.make(data=2, tensor=4)
    specs = {'split': jax.P('tensor'), 'whole': jax.P()}
    params = {'split': np.ones(DIM), 'whole': np.ones(2)}
    params = jax.tree.map(np.float32, params)
    tx = transforms.krylov_cubic_newton(3, axis_name=axis_name)

    def value_fn(params):
      total = jax.lax.psum(jnp.sum(params['split'] ** 2), 'tensor')
      return total + jnp.sum(params['whole'] ** 2)

    def update(params, state):
      return tx.update(
        params,
        state,
        params,
        value=value_fn(params),
        value_fn=value_fn,
        hvp_fn=lambda v: v,
      )

    step = jax.shard_map(
      update, mesh=mesh, in_specs=(specs, jax.P()), out_specs=(specs, jax.P())
    )
    text = jax.jit(step).lower(params, tx.init(params)).as_text()
    kinds = 'all_\\w+|reduce_scatter|collective_\\w+'
    found = re.findall(
      rf'stablehlo\.({kinds}).*?-> tensor<(\S*)f32>', text.replace('\n', ' ')
    )
    # Two values and a norm, and in the loop m products, and again with a norm.
    want = [('all_reduce', shape) for shape in ('', '', '', '3x', '4x')]
    self.assertCountEqual(found, want)


class RefusesTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'subspace_dim': 0}, 'subspace_dim must be at least 1, got 0'),
    ({'regularization': 0.0}, 'regularization must be finite and above 0'),
    ({'regularization': np.nan}, 'regularization must be finite and above 0'),
    ({'convention': 'half'}, "convention must be one of .* got 'half'"),
    ({'shrink': 1.0}, r'shrink must lie in \(0, 1\), got 1.0'),
    ({'max_trials': 0}, 'max_trials must be at least 1, got 0'),
    ({'gradient_tol': -1.0}, 'gradient_tol must be at least 0, got -1.0'),
    ({'breakdown_tol': -1.0}, 'breakdown_tol must be at least 0, got -1.0'),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      transforms.krylov_cubic_newton(**options)

  def test_a_space_larger_than_that_of_the_params(self):
    tx = transforms.krylov_cubic_newton(6)
    with self.assertRaisesRegex(ValueError, 'subspace_dim must be at most 5'):
      tx.init({'a': jnp.zeros([2, 2]), 'b': jnp.zeros([])})

  def test_params_without_derivatives(self):
    with self.assertRaisesRegex(TypeError, 'real floats, got int32'):
      transforms.krylov_cubic_newton(2).init(jnp.arange(3))

  @parameterized.parameters('value', 'value_fn', 'params')
  def test_what_lacks(self, name):
    x = jnp.ones(3)
    known = {'params': x, 'value': 1.0, 'value_fn': jnp.sum}
    del known[name]
    tx = transforms.krylov_cubic_newton(2)
    with self.assertRaisesRegex((TypeError, ValueError), rf'\b{name}\b'):
      tx.update(x, tx.init(x), **known)

  @parameterized.parameters(
    lambda params, batch: 0.0,
    lambda params, *, key: 0.0,
    lambda: 0.0,
  )
  def test_objectives_that_change(self, value_fn):
    """What draws a batch of its own spoils the search."""
    tx, x = transforms.krylov_cubic_newton(2), jnp.ones(3)
    with self.assertRaisesRegex(
      ValueError, 'value_fn must take params alone.*full batch.*fixed large'
    ):
      tx.update(x, tx.init(x), x, value=1.0, value_fn=value_fn)
