"""What `python -m emc2.experiments.bench` measures, one file a subject."""

__all__ = []
