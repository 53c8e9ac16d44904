"""Latent Dirichlet allocation: the topics of documents."""

from emc2.topics.lda import cells, documents, esvi, expectations

__all__ = ['cells', 'documents', 'esvi', 'expectations']
