"""Four small functions with known minima, in space and on spheres."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.transforms import coulomb


class Target(NamedTuple):
  """A function of one matrix to bring down."""

  fn: Callable[[jax.Array], jax.Array]
  minimum: float


def in_space() -> tuple[jax.Array, list[Target]]:
  """A start of shape (2, 2) and functions of it."""
  start = jnp.array([[-1.2, 1.0], [-1.2, 1.0]])
  goal = jnp.array([1.0, -1.0, 2.0, 0.5])
  square = lambda matrix: (
    lambda x: _form(matrix, (x.reshape(1, 4) - goal[None]))
  )
  samples, least = _logistic()
  return start, [
    Target(square(_positive(4, 2)), 0.0),
    Target(square(_positive(4, 100)), 0.0),
    Target(_rosenbrock, 0.0),
    Target(lambda x: _logistic_loss(samples, x.reshape(4)), least),
  ]


def on_spheres() -> tuple[jax.Array, list[Target]]:
  """A start of 12 points, as unit rows, and functions of them."""
  field = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
  round, long = 5 * _positive(3, 2), 10 * _positive(3, 100)
  # The least eigenvalue, for each point.
  least = lambda matrix: 12 * np.linalg.eigvalsh(matrix)[0] / 2
  return jnp.asarray(coulomb.uniform(0, 12, 3)), [
    Target(lambda x: jnp.sum(x * field), -np.linalg.norm(field, axis=1).sum()),
    Target(lambda x: _form(round, x), least(round)),
    Target(lambda x: _form(long, x), least(long)),
    Target(coulomb.energy, coulomb.MINIMA[12]),
  ]


def _positive(size, condition):
  """A matrix with eigenvalues from 1 / condition to 1, in no simple axes."""
  rng = np.random.default_rng(0)
  turn, _ = np.linalg.qr(rng.normal(size=(size, size)))
  matrix = (turn * np.geomspace(1 / condition, 1, size)) @ turn.T
  return matrix.astype(np.float32)


def _form(matrix, rows):
  return jnp.sum((rows @ matrix) * rows) / 2


def _rosenbrock(rows):
  x, y = rows[:, 0], rows[:, 1]
  return jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)


def _logistic_loss(samples, weights, np=jnp):
  """Of samples that are multiplied by their labels, -1 or 1."""
  losses = np.logaddexp(0.0, -samples @ weights)
  return np.mean(losses) + 0.01 * np.sum(weights**2)


def _logistic():
  """Samples of two classes, and the least loss, by Newton's method."""
  rng = np.random.default_rng(1)
  samples = rng.normal(size=(40, 4))
  scores = samples @ [2.0, -1.0, 0.5, 1.0] + rng.normal(size=40)
  samples *= np.sign(scores)[:, None]
  weights = np.zeros(4)
  for _ in range(20):
    odds = 1 / (1 + np.exp(samples @ weights))
    slope = -samples.T @ odds / 40 + 0.02 * weights
    bend = (samples.T * (odds * (1 - odds))) @ samples / 40 + 0.02 * np.eye(4)
    weights -= np.linalg.solve(bend, slope)
  return samples.astype(np.float32), _logistic_loss(samples, weights, np)
