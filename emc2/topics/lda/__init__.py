"""Latent Dirichlet allocation: the topics of documents.

A method is made by the function that bears its file's name, for instance
`lda.esvi.esvi(num_topics, num_words)`, and works on the `Cells` that `cut`
makes of a corpus.
"""

from emc2.topics.lda import (
  bound,
  cells,
  cvb0,
  documents,
  esvi,
  expectations,
  fading,
  inference,
  scvb0,
  svi,
  topics,
  vi,
)
from emc2.topics.lda.bound import elbo
from emc2.topics.lda.cells import Cells, Layout, cut
from emc2.topics.lda.documents import Documents, from_csr
from emc2.topics.lda.on_ring import on_ring

__all__ = [
  'Cells',
  'Documents',
  'Layout',
  'bound',
  'cells',
  'cut',
  'cvb0',
  'documents',
  'elbo',
  'esvi',
  'expectations',
  'fading',
  'from_csr',
  'inference',
  'on_ring',
  'scvb0',
  'svi',
  'topics',
  'vi',
]
