"""Optax gradient transformations, one file each."""

from emc2.transforms.lars import lars

if __name__ != 'emc2.transforms':
  raise ImportError(
    f'This package is emc2.transforms, not {__name__}: under two names its '
    'classes would be two classes each.'
  )

__all__ = ['lars']
