"""Rotations in which order matters, and the same visit by visit in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import ring


def gather(resident, own, block, number):
  """Order matters to all, and to the last bit."""
  x, seen = resident
  score = jnp.sum(jnp.exp(jnp.tanh(x + block)))
  weight = 1 / (3 + number.astype(score.dtype))
  return (x, seen + weight * score), own / 3 + score, block * 0.9 + score / 7


def scatter(resident, own, block, number):
  x, seen = resident
  x = x * 0.7 + jnp.sin(block + own)
  return (
    (x, seen),
    own * seen,
    block - jnp.sum(x) / (2 + number.astype(x.dtype)),
  )


ROTATIONS = (
  ring.Rotation(gather, lambda resident: (resident[0], resident[1] / 3)),
  ring.Rotation(scatter, lambda resident: (resident[0], resident[1] * 0 + 1)),
)


def loops(width, here, rotations, start, num_passes):
  """The same visits one by one, in NumPy."""
  (x, seen), kept, blocks = jax.tree.map(np.array, start)
  total = width * here
  for _ in range(num_passes):
    for rotation in rotations:
      for t in range(total):
        for p in range(width):
          q = (here * p + t) % total
          if rotation.visit is gather:
            score = np.exp(np.tanh(x[p] + blocks[q])).sum()
            seen[p] += score / (3 + q)
            kept[p, q] = kept[p, q] / 3 + score
            blocks[q] = blocks[q] * 0.9 + score / 7
          else:
            x[p] = x[p] * 0.7 + np.sin(blocks[q] + kept[p, q])
            kept[p, q] *= seen[p]
            blocks[q] -= x[p].sum() / (2 + q)
      seen = seen / 3 if rotation.visit is gather else np.ones_like(seen)
  return (x, seen), kept, blocks


def draw(width, here, seed=0):
  rng = np.random.default_rng(seed)
  x, seen = rng.normal(size=(width, 5)), rng.normal(size=width)
  kept = rng.normal(size=(width, width * here))
  return (x, seen), kept, rng.normal(size=(width * here, 5))
