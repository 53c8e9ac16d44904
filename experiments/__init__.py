"""Programs, one file each: `python -m emc2.experiments.NAME --workdir=DIR`."""

if __name__ != 'emc2.experiments':
  raise ImportError(
    f'This package is emc2.experiments, not {__name__}: under two names its '
    'classes would be two classes each.'
  )

__all__ = []
