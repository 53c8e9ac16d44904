"""Stochastic optimisation research in JAX."""
