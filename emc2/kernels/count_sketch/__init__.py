"""Tables that hold signed sums of the entries hashed to each bucket."""

from emc2.kernels.count_sketch.api import insert, query

__all__ = ['insert', 'query']
