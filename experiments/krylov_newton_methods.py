"""Methods on the device, and the loop that runs one until it has to end."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emc2 import algorithm, transforms
from emc2.experiments import krylov_newton_trace as trace_lib
from emc2.newton import problem as problem_lib

Work = trace_lib.Work


class Method(NamedTuple):
  """What the loop has to know; data are what every step reads."""

  init: Callable[[jax.Array, Any], Any]  # (key, data) -> state.
  step: Callable[[jax.Array, Any, Any], tuple[Any, Work]]
  point: Callable[[Any, Any], jax.Array]  # (state, data) -> x (d,).
  result: Callable[[Any], jax.Array]  # Of a state, a `trace_lib.End`; 0: go on.


class Head(NamedTuple):
  """The data of a soft-max layer over features that do not change."""

  rows: jax.Array  # (n, d)
  labels: jax.Array  # (n,), int32.
  ridge: jax.Array  # ()


class _Descent(NamedTuple):
  """The state of a transform from optax and of what it acts on."""

  params: Any
  opt_state: Any
  value: jax.Array  # (): the objective at the params.
  grads: Any  # There.
  result: jax.Array  # (), int32.


def newton(method: algorithm.Algorithm, start: float) -> Method:
  """A method of `emc2.newton`; its data are a `Problem`.

  Args:
    method: The method.
    start: Each entry of the point that it starts from.

  Returns:
    The method for the loop.
  """

  def init(key, problem):
    return method.init(key, problem, start * problem.mask)

  def step(key, state, problem):
    state, info = method.step(key, state, problem)
    # A step of coordinates has no product, and then no whole gradient.
    gradients = jnp.int32(info.num_hvps > 0)
    return state, Work(info.num_hvps, gradients, info.num_trials)

  return Method(
    init,
    step,
    point=lambda state, problem: problem_lib.to_user(problem, state.x),
    result=lambda state: state.result,
  )


def logistic_value(problem: problem_lib.Problem, x: jax.Array) -> jax.Array:
  """What `emc2.newton` minimises, for methods of optax."""
  return problem_lib.value_fn(problem, 'logistic')(x)


def logistic_start(start: float, problem: problem_lib.Problem) -> jax.Array:
  """(d,), each entry the same but for padding."""
  return start * problem.mask


def softmax_value(head: Head, params: dict[str, jax.Array]) -> jax.Array:
  """The mean cross-entropy, and half the ridge times all squares."""
  scores = jnp.matmul(head.rows, params['kernel'], precision='highest')
  losses = optax.softmax_cross_entropy_with_integer_labels(
    scores + params['bias'][None], head.labels
  )
  squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
  return jnp.mean(losses) + head.ridge / 2 * squares


def softmax_start(
  start: float, num_classes: int, head: Head
) -> dict[str, jax.Array]:
  """The weights of a layer, each the same."""
  shape, dtype = (head.rows.shape[1], num_classes), head.rows.dtype
  return {
    'kernel': jnp.full(shape, start, dtype),
    'bias': jnp.full(shape[1:], start, dtype),
  }


def flatten(params: Any) -> jax.Array:
  """A point (d,), as the objectives on the host have it."""
  if isinstance(params, dict):
    return jnp.concatenate([params['kernel'], params['bias'][None]]).ravel()
  return params


def krylov_transform(
  value_fn: Callable[[Any, Any], jax.Array],
  make_params: Callable[[Any], Any],
  subspace_dim: int,
  *,
  regularization: float,
) -> Method:
  """`transforms.krylov_cubic_newton` on any objective.

  Args:
    value_fn: `(data, params) -> ()`.
    make_params: `data -> params` to start from.
    subspace_dim: m.
    regularization: M of the first step.

  Returns:
    The method for the loop.
  """
  tx = transforms.krylov_cubic_newton(
    subspace_dim, regularization=regularization
  )

  def update(data, state):
    before = state.opt_state
    updates, after = tx.update(
      state.grads,
      before,
      state.params,
      value=state.value,
      value_fn=functools.partial(value_fn, data),
    )
    params = optax.apply_updates(state.params, updates)
    value, grads = jax.value_and_grad(value_fn, argnums=1)(data, params)
    trials = after.num_trials - before.num_trials
    work = Work(after.num_hvps - before.num_hvps, jnp.int32(1), trials + 1)
    return _Descent(params, after, value, grads, after.result), work

  return _descend(tx, update, value_fn, make_params)


def lbfgs(
  value_fn: Callable[[Any, Any], jax.Array],
  make_params: Callable[[Any], Any],
  *,
  memory: int,
) -> Method:
  """`optax.lbfgs` with its own line search, on any objective.

  Args:
    value_fn: `(data, params) -> ()`.
    make_params: `data -> params` to start from.
    memory: Pairs of differences that are kept.

  Returns:
    The method for the loop.
  """
  tx = optax.lbfgs(memory_size=memory)

  def update(data, state):
    with jax.numpy_dtype_promotion('standard'):  # Optax mixes dtypes.
      updates, opt_state = tx.update(
        state.grads,
        state.opt_state,
        state.params,
        value=state.value,
        grad=state.grads,
        value_fn=functools.partial(value_fn, data),
      )
    params = optax.apply_updates(state.params, updates)
    # Its line search has them, and ended on them.
    value = optax.tree.get(opt_state, 'value')
    grads = optax.tree.get(opt_state, 'grad')
    moved = jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(updates)])
    stuck = jnp.where(jnp.any(moved), trace_lib.End.LIMIT, trace_lib.End.STUCK)
    result = jnp.where(
      jnp.isfinite(value), stuck, trace_lib.End.NON_FINITE
    ).astype(jnp.int32)
    count = optax.tree.get(opt_state, 'info').num_linesearch_steps
    count = jnp.asarray(count, jnp.int32)
    state = _Descent(params, opt_state, value, grads, result)
    return state, Work(jnp.int32(0), count, count)

  return _descend(tx, update, value_fn, make_params)


def _descend(tx, update, value_fn, make_params):
  def init(key, data):
    del key
    params = make_params(data)
    value, grads = jax.value_and_grad(value_fn, argnums=1)(data, params)
    zero = jnp.zeros([], jnp.int32)
    return _Descent(params, tx.init(params), value, grads, zero)

  def step(key, state, data):
    del key
    return update(data, state)

  return Method(
    init,
    step,
    point=lambda state, data: flatten(state.params),
    result=lambda state: state.result,
  )


def drive(
  method: Method,
  data: Any,
  trace: trace_lib.Trace,
  *,
  key: jax.Array,
  max_iterations: int,
) -> tuple[trace_lib.End | None, float]:
  """Runs a method until the trace says that it has to end, or it does itself.

  The first 128 iterations are calls of their own, and later ones an ever larger
  part of them, so that what a call costs does not count where they are many.

  Args:
    method: What is run.
    data: What its steps read.
    trace: Follows it.
    key: PRNG key; iteration t draws from `fold_in(key, t)`.
    max_iterations: No call goes beyond.

  Returns:
    Why it ended, if the trace did not say so, and seconds of compiling.
  """
  advance = make_advance(method)
  begun = time.perf_counter()
  state = jax.jit(method.init)(key, data)
  # A weak type would be compiled again when it comes back strong.
  strengthen = lambda x: jax.lax.convert_element_type(x, x.dtype)
  state = jax.tree.map(strengthen, state)
  number = jnp.zeros([], jnp.int32)
  work = Work(*[number] * len(Work._fields))
  # What the first call sets up, compiling or not, is no part of the method.
  jax.block_until_ready(advance(key, data, state, work, number, number))
  compile_seconds = time.perf_counter() - begun

  done, ended = 0, trace.look(np.asarray(method.point(state, data)), 0, Work())
  while not ended:
    stop = min(done + max(1, done // 64), max_iterations)
    stop = jnp.asarray(stop, jnp.int32)
    trace.run()
    state, work, number = jax.block_until_ready(
      advance(key, data, state, work, number, stop)
    )
    trace.halt()
    before, done = done, int(number)
    if done > before:
      counted = Work(*map(int, work))
      ended = trace.look(np.asarray(method.point(state, data)), done, counted)
    result = int(method.result(state))
    if result and not ended:
      return trace_lib.End(result), compile_seconds
  return None, compile_seconds


@functools.lru_cache(maxsize=32)
def make_advance(method: Method) -> Callable[..., Any]:
  """Compiles many iterations of a method into one call, once for all callers.

  Args:
    method: The method.

  Returns:
    `(key, data, state, work, number, stop) -> (state, work, number)`, from
    iteration `number` to `stop`, or to where the method ends.
  """

  @jax.jit
  def advance(key, data, state, work, number, stop):
    def goes_on(carry):
      state, _, number = carry
      return (number < stop) & (method.result(state) == 0)

    def iterate(carry):
      state, work, number = carry
      now = jax.random.fold_in(key, number)
      state, more = method.step(now, state, data)
      work = jax.tree.map(jnp.add, work, more)
      return state, work, number + jnp.int32(method.result(state) == 0)

    return jax.lax.while_loop(goes_on, iterate, (state, work, number))

  return advance
