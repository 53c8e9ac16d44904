"""Linear algebra of small systems, and of large ones known by products."""

from emc2.linalg import cubic, lanczos

__all__ = ['cubic', 'lanczos']
