"""Every test sees eight CPU devices, strict types and no stray warning.

That warnings are errors, and that annotated shapes and types are checked,
stands in setup.cfg.
"""

import os

import jax
from absl import flags

# No process takes a thread for each core of the machine: not this one, not the
# workers of pytest-xdist, and none that a test starts; they share the cores.
for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PJRT_NPROC'):
  os.environ.setdefault(_name, '1')

_platform = os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if _platform == 'cpu':
  # Most programs here run once, and compile in a third less time so.
  os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0']
  )
jax.config.update('jax_platforms', _platform)
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Grain starts its processes, and absl makes its folders, by parsed flags.
flags.FLAGS(['pytest'])
