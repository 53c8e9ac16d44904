"""Steps of AdamW in 8 and in 32 bits, of bitsandbytes and of torch, on a CPU.

Served by `worker.py` under a Python that has both.
"""

PACKAGES = ('torch', 'bitsandbytes')


def time_step(*, optimizer: str, rows: int, columns: int, leaves: int):
  """A step on so many matrices, with the same gradients each time."""
  import torch

  torch.set_num_threads(1)
  torch.manual_seed(0)
  params = [
    torch.nn.Parameter(1e-2 * torch.randn(rows, columns)) for _ in range(leaves)
  ]
  for param in params:
    param.grad = 1e-2 * torch.randn(rows, columns)
  if optimizer == 'adamw_8bit':
    import bitsandbytes

    made = bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
  else:
    made = torch.optim.AdamW(params, lr=1e-3, fused=True)
  return made.step


CASES = {'step': time_step}
