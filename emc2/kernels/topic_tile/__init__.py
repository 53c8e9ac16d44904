"""One tile of a topic model: scores, ratio and both products at once."""

from emc2.kernels.topic_tile.api import TopicTile, topic_tile

__all__ = ['TopicTile', 'topic_tile']
