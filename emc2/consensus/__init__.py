"""Agents that hold models of their own, and how they come to agree."""

from emc2.consensus import qsparse, schedules
from emc2.consensus.qsparse import qsparse_local

__all__ = ['qsparse', 'qsparse_local', 'schedules']
