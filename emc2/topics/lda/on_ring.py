"""Puts a method on a mesh."""

from typing import Any

import jax

from emc2 import algorithm
from emc2.topics.lda import cells as cells_lib


def on_ring(
  method: algorithm.Algorithm, mesh: jax.sharding.Mesh, shardings: Any
) -> algorithm.Algorithm:
  """The same method over all devices of the axis `ring` of a mesh.

  Args:
    method: Made with `axis_name=mesh.RING`.
    mesh: Has that axis; the cells have a shard for each of its devices.
    shardings: Of the method's state, for instance `esvi.shardings()`.

  Returns:
    `init(key, cells)` and `step(key, state, cells)` on global arrays.

  Examples:
    >>> from emc2 import mesh as mesh_lib
    >>> from emc2.topics.lda import cells, documents, esvi
    >>> mesh = mesh_lib.make(jax.devices()[:1], ring=1)
    >>> method = on_ring(
    ...     esvi.esvi(2, 4, axis_name=mesh_lib.RING), mesh, esvi.shardings())
    >>> corpus = documents.Documents(
    ...     starts=np.array([0, 2, 4]), word_ids=np.array([0, 1, 2, 3]),
    ...     counts=np.ones(4, np.float32), num_words=4)
    >>> batch = mesh_lib.place(cells.cut(corpus)[0], mesh, cells.specs())
    >>> state = jax.jit(method.init)(jax.random.key(0), batch)
    >>> state, info = jax.jit(method.step)(jax.random.key(1), state, batch)
    >>> round(float(state.words.sum()), 4)
    4.0
  """
  spec = jax.sharding.PartitionSpec()
  init = jax.shard_map(
    method.init,
    mesh=mesh,
    in_specs=(spec, cells_lib.specs()),
    out_specs=shardings,
  )
  step = jax.shard_map(
    method.step,
    mesh=mesh,
    in_specs=(spec, shardings, cells_lib.specs()),
    out_specs=(shardings, spec),
  )
  return algorithm.Algorithm(init, step)
