"""Mixtures of conjugate exponential families."""
