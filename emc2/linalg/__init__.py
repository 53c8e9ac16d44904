"""Linear algebra of small systems, and of large ones known by products."""
