"""Logistic regression: how soon the gradient is small.

Cases, for `--only`:

- `product`: one Hessian product against SciPy's compressed rows;
- `solve`: from weights of 0.5 until the norm of the gradient is 1e-6 and 1e-8,
  without a ridge and with one of 1e-5, on one core and on all, against
  L-BFGS-B, trust-ncg, trust-krylov and Newton-CG of SciPy (`peers_krylov.py`)
  and `optax.lbfgs` on the same objective;
- `kernel`: the product in one pass where there is an accelerator.

The rows are a file of svmlight, `EMC2_BENCH_SVMLIGHT`; by default w8a if it
lies in `../shared/data`, else as many rows of as many words, drawn by seed 0.
Seconds hold neither compilation nor cutting the data, which have rows of their
own. What ours comes to is judged in float64 by the peers' objective.
"""

import functools
import os
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import newton
from emc2.experiments.benchmarks import harness, peers_krylov
from emc2.experiments.data import svmlight
from emc2.kernels import glm_hvp
from emc2.kernels.glm_hvp import specs

PACKAGES = ('jax', 'jaxlib', 'numpy', 'optax', 'scipy')
W8A = '../shared/data/w8a.svm.gz'
RIDGES = (1e-5, 0.0)
TOLERANCES = (1e-6, 1e-8)
LOOPS = 20

METHODS = {
  'Krylov, m=10, float32': dict(subspace_dim=10, dtype='float32'),
  'Krylov, m=10': dict(subspace_dim=10, dtype='float64'),
  'Krylov, m=20': dict(subspace_dim=20, dtype='float64'),
  'Krylov, m=10, b=0.2, float32': dict(
    subspace_dim=10, dtype='float32', shrink=0.2
  ),
  'cubic Newton': dict(subspace_dim=None, dtype='float64'),
}
PEERS = (*peers_krylov.METHODS, 'optax.lbfgs')
_RACES = {peer: tuple(METHODS)[:2] for peer in PEERS}
_RACES['L-BFGS-B'] = tuple(METHODS)
_TARGETS = {'L-BFGS-B': 0.3, 'trust-ncg': 0.25}

_OURS = 'emc2.experiments.benchmarks.krylov'
_PEERS = str(pathlib.Path(__file__).parent / 'peers_krylov.py')


def prepare(path: str, smoke: bool) -> str:
  """Writes the problem; gives where it comes from."""
  source = os.environ.get('EMC2_BENCH_SVMLIGHT') or W8A
  if smoke or not pathlib.Path(source).is_file():
    num_rows, num_words, source = (400, 40, '') if smoke else (49_749, 300, '')
    rng = np.random.default_rng(0)
    chances = np.minimum(0.35, 2 / np.arange(1, num_words + 1) ** 0.9)
    dense = rng.random((num_rows, num_words)) < chances
    scores = dense @ rng.normal(size=num_words) - 2
    labels = rng.random(num_rows) < 1 / (1 + np.exp(-scores))
    starts = np.concatenate([[0], np.cumsum(dense.sum(axis=1))])
    ids = np.nonzero(dense)[1]
    values, shape = np.ones(len(ids), np.float32), dense.shape
  else:
    (found,) = svmlight.read(source)
    rows, labels = found.rows, found.labels
    starts, ids, values, shape = rows.starts, rows.ids, rows.values, rows.shape
  np.savez(
    path,
    indptr=starts,
    indices=ids,
    data=values,
    shape=shape,
    labels=labels.astype(np.int32),
  )
  return pathlib.Path(source).name or 'drawn rows'


def _read(path):
  """Rows as SciPy has them, and labels."""
  features, labels = peers_krylov.read(path)
  return features, labels.astype(np.float32)


class _Timer:
  """Seconds of the CPU by all threads and of the wall."""

  def __init__(self):
    self._start = time.process_time(), time.perf_counter()

  def read(self):
    """Since it was made."""
    cpu, wall = self._start
    return dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)


def solve(
  *,
  path,
  ridge,
  tolerances,
  subspace_dim,
  dtype,
  seconds,
  runs,
  shrink=0.5,
):
  """What ours takes until the gradient is small; the loop is on the device.

  Args:
    path: Of the problem.
    ridge: mu.
    tolerances: Of the norm of the gradient.
    subspace_dim: m; None for the full space.
    dtype: Of everything.
    seconds: About how long a run may take.
    runs: How often each is timed.
    shrink: b: what M is multiplied by before each step.

  Returns:
    For each tolerance `runs`, a list of `cpu` and `wall` seconds, `iterations`,
    `products`, and the `norm` of the last gradient in float64, or None if it
    was not reached; `setup` and `compile`, seconds.
  """
  with jax.enable_x64(dtype == 'float64'):
    features, labels = _read(path)
    timer = _Timer()
    problem = newton.problem.make(features, labels, ridge=ridge, dtype=dtype)
    problem = jax.block_until_ready(jax.device_put(problem))
    setup, key = timer.read(), jax.random.key(0)
    reached = []

    def method(tolerance):
      settings = dict(gradient_tol=tolerance, shrink=shrink)
      if subspace_dim is None:
        return newton.cubic_newton(**settings)
      return newton.krylov_cubic_newton(subspace_dim, **settings)

    @functools.partial(jax.jit, static_argnums=2)
    def run(problem, tolerance, num_steps):
      chosen = method(tolerance)
      state = chosen.init(key, problem, jnp.full_like(problem.mask, 0.5))
      return newton.solve.run(key, chosen, state, problem, num_steps=num_steps)

    timer = _Timer()
    num_steps = 1_000 if subspace_dim else 50
    jax.block_until_ready(run(problem, 1.0, num_steps))
    compiled = timer.read()
    for tolerance in tolerances:
      taken = []
      for _ in range(runs):
        timer = _Timer()
        state, infos = jax.block_until_ready(run(problem, tolerance, num_steps))
        taken.append(timer.read())
        if taken[-1]['wall'] > seconds:
          break
      point = np.asarray(state.x, np.float64)
      converged = newton.regularization.Result.CONVERGED
      reached.append(
        dict(
          runs=taken,
          converged=bool(state.result == int(converged)),
          iterations=int(state.count),
          products=int(np.sum(infos.num_hvps)),
          trials=int(np.sum(infos.num_trials)),
          norm=peers_krylov.gradient_norm(path, ridge, point),
        )
      )
    return dict(reached=reached, setup=setup, compile=compiled)


def solve_optax(*, path, ridge, tolerances, seconds):
  """The same of `optax.lbfgs` in float64, as `peers_krylov.solve` gives it."""
  with jax.enable_x64(True):
    features, labels = _read(path)
    problem = newton.problem.make(
      features, labels, ridge=ridge, dtype=np.float64
    )
    value_fn = newton.problem.value_fn(problem, 'logistic')
    tx = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    @jax.jit
    def advance(x, state, tolerance):
      def goes_on(carry):
        _, state, _, count = carry
        grad = optax.tree.get(state, 'grad')
        return (jnp.linalg.norm(grad) > tolerance) & (count < 50)

      def body(carry):
        x, state, _, count = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = tx.update(
          grad, state, x, value=value, grad=grad, value_fn=value_fn
        )
        norm = jnp.linalg.norm(optax.tree.get(state, 'grad'))
        return optax.apply_updates(x, updates), state, norm, count + 1

      value, grad = value_and_grad(x, state=state)
      state = optax.tree.set(state, value=value, grad=grad)
      carry = x, state, jnp.linalg.norm(grad), jnp.int32(0)
      return jax.lax.while_loop(goes_on, body, carry)

    start = jnp.full_like(problem.mask, 0.5)
    state = tx.init(start)
    with jax.numpy_dtype_promotion('standard'):
      # The types that a call of no step gives back are stronger, and compiled
      # anew.
      x, state, *_ = advance(start, state, 1e9)
      jax.block_until_ready(advance(x, state, 1e9))
      timer, reached, count = _Timer(), [], 0
      norm = least = np.inf
      while len(reached) < len(tolerances):
        x, state, norm, steps = advance(x, state, tolerances[len(reached)])
        norm, count = float(norm), count + int(steps)
        least = min(least, norm)
        if norm <= tolerances[len(reached)]:
          reached.append(timer.read() | dict(gradients=count, products=0))
        elif timer.read()['wall'] > seconds or not int(steps):
          break
    reached += [None] * (len(tolerances) - len(reached))
    return dict(reached=reached, norm=least)


def time_product(*, path, dtype):
  """One Hessian product, the mean of `LOOPS` that follow each other."""
  with jax.enable_x64(dtype == 'float64'):
    features, labels = _read(path)
    problem = newton.problem.make(features, labels, dtype=dtype)
    problem = jax.device_put(problem)
    curvature = problem.weights / 4
    vector = jnp.ones_like(problem.mask)

    @jax.jit
    def run(features, curvature, vector):
      def body(_, vector):
        product, _ = newton.features.hvp(features, curvature, vector)
        return product / jnp.linalg.norm(product)

      return jax.lax.fori_loop(0, LOOPS, body, vector)

    args = problem.features, curvature, vector
    compiled = run.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def time_products_of_scipy(*, path):
  """As many products by SciPy."""
  call = peers_krylov.time_product(path=path)

  def calls():
    for _ in range(LOOPS):
      call()

  return calls


def time_kernel(*, kernel: str, spec: str, implementation: str):
  """The product at a shape of its `specs.py`, `LOOPS` times at once."""
  rng = np.random.default_rng(0)
  if kernel == 'glm_hvp':
    n, d, dtype = specs.SPECS[spec]
    tables = (jnp.asarray(rng.normal(size=(n, d)) / d**0.5, dtype),)
    multiply = glm_hvp.glm_hvp
  else:
    w, n, d, dtype, weighted = specs.PADDED_SPECS[spec]
    ids = jnp.asarray(rng.integers(0, d + 1, (w, n)), dtype)
    values = jnp.asarray(rng.normal(size=(w, n)), jnp.float32)
    tables = ids, values if weighted else None
    multiply = glm_hvp.glm_hvp_padded

  @jax.jit
  def run(tables, curvature, vector):
    def body(_, vector):
      found = multiply(
        *tables, curvature, vector, implementation=implementation
      )
      return found.image / jnp.linalg.norm(found.image)

    return jax.lax.fori_loop(0, LOOPS, body, vector)

  args = tables, jnp.full(n, 0.25 / n), jnp.ones(d)
  compiled = run.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


CASES = {
  'product': time_product,
  'scipy': time_products_of_scipy,
  'kernel': time_kernel,
}
VALUES = {'prepare': prepare, 'solve': solve, 'optax': solve_optax}


class _Run:
  """What the cases share: the problem, and what each side came to."""

  def __init__(self, smoke):
    self.smoke = smoke
    self._folder, self._source, self._known = None, '', {}

  def path(self):
    """Of the problem."""
    if self._folder is None:
      self._folder = tempfile.TemporaryDirectory(prefix='emc2-bench-')
      self._source = prepare(self._file(), self.smoke)
    return self._file()

  @property
  def source(self):
    """Where the problem comes from."""
    self.path()
    return self._source

  def _file(self):
    return os.path.join(self._folder.name, 'problem.npz')

  def ask(self, context, module, case, pinned, **arguments):
    """What a side came to; asked once."""
    key = module, case, pinned, tuple(arguments.items())
    if key not in self._known:
      arguments |= dict(
        path=self.path(),
        tolerances=TOLERANCES,
        seconds=1 if self.smoke else 10,
      )
      side = harness.Side(module, case, arguments, pinned=pinned)
      self._known[key] = context.value(side)
    return self._known[key]

  def ours(self, context, method, ridge, pinned):
    """Of one of `METHODS`."""
    arguments = METHODS[method] | dict(ridge=ridge, runs=1 if self.smoke else 3)
    return self.ask(context, _OURS, 'solve', pinned, **arguments)

  def theirs(self, context, peer, ridge, pinned):
    """Of one of `PEERS`."""
    if peer == 'optax.lbfgs':
      return self.ask(context, _OURS, 'optax', pinned, ridge=ridge)
    arguments = dict(method=peer, ridge=ridge)
    return self.ask(context, _PEERS, 'solve', pinned, **arguments)


def cases(smoke: bool) -> list[harness.Case]:
  """All cases; with `smoke`, at tiny sizes."""
  run = _Run(smoke)
  found = [harness.Case('product', functools.partial(_products, run))]
  for ridge in RIDGES:
    found += [
      harness.Case(
        f'solve, ridge {ridge:g}, {peer}',
        functools.partial(_race, run, ridge, peer, methods=methods),
      )
      for peer, methods in _RACES.items()
    ]
    found.append(
      harness.Case(
        f'solve, ridge {ridge:g}, all cores',
        functools.partial(_race_on_all_cores, run, ridge),
      )
    )
  for kernel, shapes, on_gpu in (
    ('glm_hvp', specs.SPECS, True),
    ('glm_hvp_padded', specs.PADDED_SPECS, False),
  ):
    found += [
      harness.Case(
        f'kernel, {kernel}, {name}',
        functools.partial(_race_kernel, kernel, name, on_gpu),
      )
      for name in list(shapes)[: 1 if smoke else None]
    ]
  return found


def _products(run, context):
  path = run.path()
  race = functools.partial(
    context.race,
    theirs=harness.Side(_OURS, 'scipy', dict(path=path)),
    peer='SciPy, float64',
    metric=f'time of {LOOPS}',
    target=harness.Target(0.25),
  )
  return [
    race(
      f'Hessian product, {run.source}, {dtype}',
      ours=harness.Side(_OURS, 'product', dict(path=path, dtype=dtype)),
    )
    for dtype in ('float32', 'float64')
  ]


def _race_kernel(kernel, name, on_gpu, context):
  metric, row = f'time of {LOOPS}', f'{kernel}, {name}'
  if context.platform == 'cuda' and not on_gpu:
    return [harness.Row(row, metric, 'ms', note='no kernel for GPUs')]
  arguments = dict(kernel=kernel, spec=name)
  return [context.race_kernel(row, metric, _OURS, **arguments)]


def _race(run, ridge, peer, context, *, clock='cpu', methods=tuple(METHODS)):
  """Rows of all of ours at both tolerances, against one peer."""
  pinned = clock == 'cpu'
  theirs = run.theirs(context, peer, ridge, pinned)
  rows = []
  for method in methods:
    ours = run.ours(context, method, ridge, pinned)
    for i, tolerance in enumerate(TOLERANCES):
      one, other = ours['reached'][i], theirs['reached'][i]
      seconds = [taken[clock] for taken in one['runs']]
      figure = harness.Figure.of(seconds) if one['converged'] else None
      note = (
        f'ours {one["iterations"]} iterations, {one["products"]} products, '
        f'{one["trials"]} trials, norm {one["norm"]:.2g} in float64'
      )
      its_figure = ratio = None
      if other is None:
        note += f'; the peer stopped at {theirs["norm"]:.1e}'
      else:
        its_figure = harness.Figure.exact(other[clock])
        note += f'; the peer {other["gradients"]} gradients'
        if other['products']:
          note += f', {other["products"]} products'
        if figure is not None:
          ratio = harness.Figure.of([x / other[clock] for x in seconds])
      target = _TARGETS.get(peer)
      where = 'CPU' if pinned else 'wall'
      rows.append(
        harness.Row(
          name=f'{method}, ridge {ridge:g}',
          metric=f'{where} seconds to a gradient of {tolerance:.0e}',
          unit='s',
          ours=figure,
          peer=peer if pinned else f'{peer}, all cores',
          theirs=its_figure,
          ratio=ratio,
          target=target and harness.Target(target),
          note=note,
        )
      )
  return rows


def _race_on_all_cores(run, ridge, context):
  """Against the one to beat, and what comes before the clock starts."""
  fastest = [name for name in METHODS if 'float32' in name]
  rows = _race(run, ridge, 'L-BFGS-B', context, clock='wall', methods=fastest)
  if ridge == RIDGES[0]:
    for method in METHODS:
      found = run.ours(context, method, ridge, True)
      for what in ('setup', 'compile'):
        figure = harness.Figure.exact(found[what]['wall'])
        name = {'setup': 'to cut the data', 'compile': 'to compile'}[what]
        rows.append(
          harness.Row(method, f'wall seconds {name}', 's', ours=figure)
        )
  return rows
