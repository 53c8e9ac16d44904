"""Runs of Newton methods that end on the device when there is no more to do."""

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.newton import problem as problem_lib
from emc2.newton import steps


def run(
  key: jax.Array,
  method: algorithm.Algorithm,
  state: steps.State,
  problem: problem_lib.Problem,
  *,
  num_steps: int,
) -> tuple[steps.State, steps.Info]:
  """Steps until a result other than `OK`, in one loop on the device.

  Step `t` draws from `jax.random.fold_in(key, t)` with `t` as the state counts,
  so a run that is cut and taken up with the same key goes on bit for bit. What
  a run before has ended by does not keep this one from its first step.

  Args:
    key: The root key of the run.
    method: Of :mod:`emc2.newton`; its `gradient_tol` says when to stop.
    state: Where from.
    problem: What to minimise.
    num_steps: At most so many. Static.

  Returns:
    The last state, and infos stacked on an axis of `num_steps`. A run that
    stops early has the info of the step that stopped it, which has moved
    nothing, after those of its steps, with the gradient norm at the last point;
    then zeros.

  Raises:
    ValueError: If `num_steps` is below 1.

  Examples:
    >>> from emc2.newton import krylov
    >>> from emc2.newton import problem as problem_lib
    >>> problem = problem_lib.make(np.eye(3), np.arange(3), loss='squared')
    >>> method = krylov.krylov_cubic_newton(
    ...   2, loss='squared', gradient_tol=1e-5
    ... )
    >>> key = jax.random.key(0)
    >>> state = method.init(key, problem)
    >>> state, infos = run(key, method, state, problem, num_steps=100)
    >>> int(state.result), bool(state.count < 100)
    (1, True)
  """
  arguments.check_at_least('num_steps', num_steps, 1)
  ok = jnp.zeros_like(state.result)
  state = state._replace(result=ok)
  like = jax.eval_shape(method.step, key, state, problem)[1]
  infos = jax.tree.map(
    lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), like
  )

  def proceed(carry):
    state, _, place = carry
    return (place < num_steps) & (state.result == ok)

  def advance(carry):
    state, infos, place = carry
    now = jax.random.fold_in(key, state.count)
    state, info = method.step(now, state, problem)
    put = lambda stack, x: stack.at[place].set(x)
    return state, jax.tree.map(put, infos, info), place + 1

  place = jnp.zeros([], jnp.int32)
  return jax.lax.while_loop(proceed, advance, (state, infos, place))[:2]
