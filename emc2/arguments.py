"""Refuses a wrong number or name before anything runs."""

import math
from typing import Any


def check_at_least(
  name: str, value: int | float | None, least: int | float
) -> None:
  """Refuses a number below `least`, NaN and infinity; None is no number."""
  if value is not None and not (math.isfinite(value) and value >= least):
    raise ValueError(f'{name} must be at least {least}, got {value}.')


def check_positive(name: str, value: float) -> None:
  """Refuses a number that is not finite and above 0."""
  if not (math.isfinite(value) and value > 0):
    raise ValueError(f'{name} must be finite and above 0, got {value}.')


def check_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
  """Refuses a name that is not allowed."""
  if value not in allowed:
    raise ValueError(f'{name} must be one of {allowed}, got {value!r}.')
