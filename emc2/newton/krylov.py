"""Cubic-regularised Newton steps in Krylov spaces."""

import functools

import jax
import jax.numpy as jnp

from emc2 import algorithm, arguments
from emc2.linalg import cubic
from emc2.linalg import lanczos as lanczos_lib
from emc2.newton import problem as problem_lib
from emc2.newton import steps


def krylov_cubic_newton(
  subspace_dim: int = 10,
  *,
  loss: str = 'logistic',
  regularization: jax.typing.ArrayLike | None = 2e-3,
  convention: str = 'sixth',
  adaptive: bool = True,
  shrink: float = 0.5,
  max_trials: int = 64,
  gradient_tol: jax.typing.ArrayLike = 0.0,
  refresh_every: int = 50,
  mesh: jax.sharding.Mesh | None = None,
) -> algorithm.Algorithm:
  r"""Minimises a cubic model in a space of m gradients, m Hessian products.

  For the gradient :math:`g` and the Hessian :math:`H` at :math:`x`, a step is

  .. math::
    s = \arg\min_{s \in \operatorname{span}\{g, H g, \dots, H^{m - 1} g\}}
      g^T s + \tfrac12 s^T H s + \tfrac M6 \|s\|^3, \quad x \leftarrow x + s,

  in the basis that m steps of Lanczos give, where :math:`H` is tridiagonal.
  Each step tries M times `shrink` first, and divides by it until the model
  bounds the objective, which it does once M is a Lipschitz constant of
  :math:`H`. For convex objectives with such a constant :math:`L`, fixed
  :math:`M = L` and points no farther than :math:`D` from the minimum,

  .. math::
    f(x_k) - f^\star \le \frac{9 \rho D^2}{4 (k + 2)}
      + \frac{9 L D^3}{(k + 1)(k + 2)},

  with the largest :math:`\rho = 2 / \sum_j \beta_j^{-1}` of the steps, which is
  at most :math:`\|H\| / m` and 0 where the space holds the full step.

  A step passes over the matrix m times for products by the Hessian and once
  with its transpose for the gradient: the scores :math:`A v_j`, by-products of
  Lanczos, make trials of M and the move of all scores cheap. State and Info are
  :class:`~emc2.newton.steps.State` and :class:`~emc2.newton.steps.Info`.

  .. note::
    A trial compares the excess of the objective over its tangent with that of
    the model, both sums of positive terms, where the paper subtracts values of
    the objective: it is the same test, but float32 can make it near a minimum.
    M starts each step at half of what was accepted before, as in the authors'
    code, which doubles it 20 times, too few after many easy steps, and then
    takes the last trial unseen. Here a step without an accepted M stays where
    it is and says so.

  Args:
    subspace_dim: m, from 1, which is gradient descent, to the number of
      features. Static.
    loss: 'logistic', 'squared' or 'poisson'.
    regularization: M before the first step; None takes the problem's
      :func:`~emc2.newton.problem.curvature_bound`.
    convention: 'sixth' if it is the paper's M, in M/6; 'third' if it is that of
      the authors' code, in M/3.
    adaptive: Whether M is searched; if not, it stays as it is and each finite
      step is taken.
    shrink: In (0, 1).
    max_trials: Of M in a step, before it fails. Static.
    gradient_tol: The run is converged at a gradient norm of at most this.
    refresh_every: After so many steps scores are computed anew, against drift.
      Static.
    mesh: Has axes `data` for rows, `tensor` for columns, or both, and the
      problem as many blocks; None for one device.

  Returns:
    `init(key, problem, x=None)` and `step(key, state, problem)`, of a
    :class:`~emc2.newton.problem.Problem`; keys are not used.

  Raises:
    ValueError: If an argument breaks its rule; by `init`, if the point does not
      fit the problem; by `step`, if there are fewer features than m.

  Examples:
    >>> from emc2.newton import problem as problem_lib
    >>> features = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> problem = problem_lib.make(features, np.array([0, 1, 1]), ridge=0.1)
    >>> method, key = krylov_cubic_newton(2), jax.random.key(0)
    >>> state, step = method.init(key, problem), jax.jit(method.step)
    >>> for _ in range(8):
    ...   state, info = step(key, state, problem)
    >>> bool(info.gradient_norm < 1e-5)
    True

  References:
    Jiang, Raman, Sabach, Mokhtari, Hong and Cevher, `Krylov Cubic Regularized
    Newton: A Subspace Second-Order Method with Dimension-Free Convergence Rate
    <https://arxiv.org/abs/2401.03058>`_, 2024.
  """
  arguments.check_at_least('subspace_dim', subspace_dim, 1)
  settings = steps.check(
    loss=loss,
    regularization=regularization,
    convention=convention,
    adaptive=adaptive,
    shrink=shrink,
    max_trials=max_trials,
    gradient_tol=gradient_tol,
    refresh_every=refresh_every,
    mesh=mesh,
  )
  return algorithm.Algorithm(
    functools.partial(steps.init, settings=settings),
    functools.partial(step, subspace_dim=subspace_dim, settings=settings),
  )


def step(
  key: jax.Array,
  state: steps.State,
  problem: problem_lib.Problem,
  *,
  subspace_dim: int,
  settings: steps.Settings,
) -> tuple[steps.State, steps.Info]:
  """One step of :func:`krylov_cubic_newton`."""
  steps.check_dim(subspace_dim, problem)

  def body(key, state, problem, axes):
    del key
    gradient, norm = steps.differentiate(problem, state, settings, axes)
    move = lambda: _move(
      state, problem, gradient, norm, subspace_dim, settings, axes
    )
    return steps.advance(
      state, problem, norm, move, settings=settings, axes=axes
    )

  return steps.on_mesh(body, key, state, problem, settings.mesh)


def _move(state, problem, gradient, norm, subspace_dim, settings, axes):
  curvature = steps.curvature(problem, state, settings)
  space = lanczos_lib.lanczos(
    lambda v: steps.hvp(problem, curvature, v, axes),
    gradient,
    subspace_dim,
    axis_name=axes.tensor,
    has_aux=True,
  )
  spectrum = cubic.tridiagonal_spectrum(
    space.diagonal, space.off_diagonal, space.norm, convex=True
  )
  found = steps.search_for(
    spectrum,
    state,
    problem,
    lambda step: step @ space.images,
    settings=settings,
    axes=axes,
  )
  # A space that has broken down has a zero among these, and holds all.
  quality = 2 / jnp.sum(1 / space.off_diagonal)
  return steps.Move(
    search=found,
    x=state.x + found.step @ space.basis,
    change=found.step @ space.images,
    gradient_norm=norm,
    num_hvps=jnp.asarray(subspace_dim, jnp.int32),
    quality=quality,
  )
