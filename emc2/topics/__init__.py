"""Mixtures and topic models, by coordinate ascent at any size.

`topics.mixture` holds conjugate mixtures, `topics.lda` latent Dirichlet
allocation; each has a file per method, whose function bears the file's name.
"""

from emc2.topics import checks, lda, mixture

__all__ = ['checks', 'lda', 'mixture']
