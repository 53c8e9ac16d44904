"""The visit of a block of classes, for softmax regression."""

from emc2.kernels.softmax_block.api import score_block, softmax_block
from emc2.kernels.softmax_block.reference import Scored, Visit

__all__ = ['Scored', 'Visit', 'score_block', 'softmax_block']
