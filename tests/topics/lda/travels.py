"""One of several processes: ESVI and CVB0 on a ring over all of them."""

import sys

import jax
import numpy as np

from emc2 import mesh as mesh_lib


def main(coordinator, num_processes, process_id):
  """Compares the ring of all processes with a loop over its cells."""
  mesh_lib.start(coordinator, int(num_processes), int(process_id))
  from emc2.topics import lda
  from emc2.topics.lda import esvi

  from tests.topics.lda import corpora, oracle

  num_topics, num_words, width = 4, 50, jax.device_count()
  documents = corpora.draw(40, num_words, num_topics).documents
  with jax.enable_x64(True):
    cells, _ = lda.cut(
      documents, num_shards=width, num_blocks=2 * width, tile=16
    )
    cells = cells._replace(counts=cells.counts.astype(np.float64))
    mesh = mesh_lib.make(ring=width)
    method = esvi.esvi(
      num_topics, num_words, storage='phi', axis_name=mesh_lib.RING
    )
    method = lda.on_ring(method, mesh, esvi.shardings('phi'))
    batch = mesh_lib.place(cells, mesh, lda.cells.specs())
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    gather = jax.jit(lambda tree: tree, out_shardings=everywhere)
    step = jax.jit(method.step)
    state = jax.jit(method.init)(jax.random.key(0), batch)
    phi = jax.device_get(gather(state.memory.phi))
    phi = phi.reshape(*cells.counts.shape[:2], -1, num_topics)
    want = oracle.Serial(cells, phi, num_words, 0.1, 0.01)
    for t in range(3):
      state, _ = step(jax.random.key(t), state, batch)
      want.esvi_pass()
    words = jax.device_get(gather(state.words))
    np.testing.assert_allclose(words, want.words, atol=1e-11)


if __name__ == '__main__':
  main(*sys.argv[1:])
