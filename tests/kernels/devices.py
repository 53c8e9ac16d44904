"""Which kernels run here."""

import jax

from emc2.kernels import lowering


def runnable():
  """The implementations that this machine can run, with their platforms."""
  found = [('xla', 'cpu')]
  for name, platform in (('pallas_tpu', 'tpu'), ('pallas_gpu', 'cuda')):
    try:
      jax.devices(platform)
    except RuntimeError:
      continue
    if platform == 'tpu' or lowering.is_hopper():
      found.append((name, platform))
  return found
