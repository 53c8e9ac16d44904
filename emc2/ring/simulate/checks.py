"""What simulations refuse."""

import jax
import numpy as np


def num_blocks(num_workers, slots):
  """Q = m P, of P workers with m slots each."""
  counts(num_workers=num_workers, slots=slots)
  return num_workers * slots


def counts(**arguments):
  """Refuses what is not a whole number from 1 up, or an array of such."""
  for name, value in arguments.items():
    array = np.asarray(value)
    if array.dtype.kind not in 'iu' or np.any(array < 1):
      raise ValueError(
        f'{name} must be a whole number of at least 1, got {value}.'
      )


def times(**arguments):
  """Refuses negative times and such as are not finite."""
  for name, value in arguments.items():
    if isinstance(value, jax.core.Tracer):
      continue
    array = np.asarray(value)
    if not np.all((array >= 0) & np.isfinite(array)):
      raise ValueError(f'{name} must be finite and at least 0, got {value}.')


def spread(cv):
  """Refuses a negative ratio of standard deviation and mean."""
  if not 0 <= cv < np.inf:
    raise ValueError(f'cv must be finite and at least 0, got {cv}.')


def compute(mean, num_workers, total):
  """Refuses compute times that are not positive or of a wrong shape."""
  shapes = {(), *((p, q) for p in (1, num_workers) for q in (1, total))}
  if mean.shape not in shapes:
    raise ValueError(
      f'compute must be a number, or broadcast to ({num_workers}, {total}) by '
      f'two axes, got shape {mean.shape}.'
    )
  if not np.all((mean > 0) & np.isfinite(mean)):
    raise ValueError(f'compute must be finite and above 0, got {mean}.')


def sizes(**arguments):
  """Refuses sizes and speeds that are not finite and positive."""
  for name, value in arguments.items():
    if not 0 < value < np.inf:
      raise ValueError(f'{name} must be finite and above 0, got {value}.')
