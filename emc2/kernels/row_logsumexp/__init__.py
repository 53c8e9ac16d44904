"""Streaming log-sum-exp over the negatives of a contrastive batch."""

from emc2.kernels.row_logsumexp.api import RowLogsumexp, row_logsumexp

__all__ = ['RowLogsumexp', 'row_logsumexp']
