"""What gradients are compressed with today: torch, on a CPU.

Served by `worker.py` under a Python that has torch. Each case is one step of
one worker: the gradient is added to the memory of what was lost, in place, the
code is made of it, and what the code stands for is written over the gradient.
The sum of the two never changes, so each call does the same work.

`hook` is the PowerSGD hook that torch has for DDP, on a bucket of one matrix
in a group of one process; it starts its iteration at once.
"""

PACKAGES = ('torch',)


def _arrays(side):
  import torch

  torch.set_num_threads(1)
  torch.manual_seed(0)
  return torch.randn(side, side), torch.randn(side, side)


def time_top_k(
  *, side: int, fraction: float, sampled: bool = False, dense: bool = True
):
  """The largest entries: by `torch.topk`, or by a threshold from a sample.

  The threshold does not keep exactly k entries. Unless `dense`, the gradient
  stays, and no array of what was sent is made.
  """
  import torch

  grad, memory = (x.reshape(-1) for x in _arrays(side))
  k = max(1, int(fraction * grad.numel()))
  count = min(grad.numel(), 1 << 16)
  places = torch.randint(grad.numel(), (count,))

  def call():
    memory.add_(grad)
    if sampled:
      size = memory[places].abs()
      least = torch.topk(size, max(1, int(fraction * count))).values[-1]
      indices = (memory.abs() >= least).nonzero().squeeze(1)
    else:
      indices = torch.topk(memory.abs(), k, sorted=False).indices
    values = memory[indices]
    if dense:
      grad.zero_()
      grad[indices] = values
    memory[indices] = 0

  return call


def time_sign(*, side: int):
  """The sign of each entry times the mean magnitude; no bits are packed."""
  import torch

  grad, memory = _arrays(side)

  def call():
    memory.add_(grad)
    scale = memory.abs().mean()
    torch.sign(memory, out=grad)
    grad.mul_(scale)
    memory.sub_(grad)

  return call


def time_block(*, side: int, fraction: float):
  """A block of entries in a row; nothing dense is made of it."""
  grad, memory = (x.reshape(-1) for x in _arrays(side))
  k, start = int(fraction * grad.numel()), grad.numel() // 3

  def call():
    memory.add_(grad)
    block = memory[start : start + k].clone()
    memory[start : start + k] = 0
    return block

  return call


def time_bfloat16(*, side: int):
  """As torch's hook: a cast to send, and a cast back in place."""
  import torch

  grad, _ = _arrays(side)

  def call():
    grad.copy_(grad.to(torch.bfloat16))

  return call


def time_power_sgd(*, side: int, rank: int):
  """One warm-started power iteration, by hand, with QR."""
  import torch

  grad, memory = _arrays(side)
  q = torch.randn(side, rank)

  def call():
    nonlocal q
    memory.add_(grad)
    p = torch.linalg.qr(memory @ q).Q
    q = memory.T @ p
    torch.matmul(p, q.T, out=grad)
    memory.sub_(grad)

  return call


def time_hook(*, side: int, rank: int):
  """The hook of DDP, without DDP."""
  import os
  import tempfile

  import torch.distributed as dist
  from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hook

  if not dist.is_initialized():
    place = os.path.join(tempfile.mkdtemp(), 'group')
    dist.init_process_group(
      'gloo', init_method=f'file://{place}', rank=0, world_size=1
    )
  grad, _ = _arrays(side)
  flat = grad.reshape(-1)

  class Bucket:
    """What the hook asks of a bucket."""

    def buffer(self):
      return flat

    def gradients(self):
      return [grad]

    def index(self):
      return 0

    def is_last(self):
      return True

  state = hook.PowerSGDState(
    None,
    matrix_approximation_rank=rank,
    start_powerSGD_iter=2,
    min_compression_rate=1,
  )
  state.iter = 2

  def call():
    hook.powerSGD_hook(state, Bucket()).wait()

  return call


CASES = {
  'top_k': time_top_k,
  'sign': time_sign,
  'block': time_block,
  'bfloat16': time_bfloat16,
  'power_sgd': time_power_sgd,
  'hook': time_hook,
}
VALUES = {}
