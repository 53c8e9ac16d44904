"""Streaming log-sum-exp over the negatives of a contrastive batch."""

from emc2.kernels.row_logsumexp.api import row_logsumexp
from emc2.kernels.row_logsumexp.api import RowLogsumexp

__all__ = ['RowLogsumexp', 'row_logsumexp']
