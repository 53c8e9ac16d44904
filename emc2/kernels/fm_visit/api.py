"""Both halves of a visit: checks, then an implementation."""

import jax
import jax.numpy as jnp

from emc2.kernels.fm_visit import reference


def gradient(cell, multipliers, sums, factors, *, implementation='auto'):
  return reference.gradient(cell, multipliers, sums, factors)


def accumulate(
  cell, linear, squares, factors, num_rows, *, implementation='auto'
):
  return reference.accumulate(cell, linear, squares, factors, num_rows)
