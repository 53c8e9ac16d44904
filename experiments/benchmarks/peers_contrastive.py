"""What contrastive learning runs on today: PyTorch, one thread.

Served by `worker.py` under a Python that has torch, which this project does not
ask for. Every case is given embeddings and makes one forward and backward pass
of its loss, gradients in the embeddings included.

`released_sampler` is a restatement: it was written anew from a reading of the
code that the authors of EMC² released (contrastive_emc2, commit 3641ed9, the
path for fresh augmentations), and makes the same tensor operations and the same
gathers, here in a group of one process. Left out are its timers, the exchange
of states of earlier batches, which a burn-in of one half never uses, and the
anomaly detection in which it trains. So it stands on the fast side of what its
users run.
"""

PACKAGES = ('torch', 'libauc', 'pytorch-metric-learning')


def _torch():
  import torch

  torch.set_num_threads(1)
  torch.manual_seed(0)
  return torch


def _views(torch, batch_size, size):
  """Two views of each sample, close to each other; leaves of the graph."""
  samples = torch.randn(batch_size, size)
  noise = lambda: 0.5 * torch.randn(batch_size, size)
  unit = lambda x: torch.nn.functional.normalize(x, dim=1)
  return [unit(samples + noise()).requires_grad_() for _ in range(2)]


def _batches(torch, batch_size, num_samples, count=16):
  """Some batches of distinct samples, taken in turn, for ever."""
  draw = lambda: torch.randperm(num_samples)[:batch_size]
  drawn = [draw() for _ in range(count)]
  while True:
    yield from drawn


def nt_xent(*, batch_size, size, inverse_temperature, num_samples):
  """SimCLR's loss as people write it: one matmul, a mask, cross entropy."""
  del num_samples
  torch = _torch()
  views = _views(torch, batch_size, size)
  total = 2 * batch_size
  mask = torch.eye(total, dtype=torch.bool)
  target = (torch.arange(total) + batch_size) % total

  def call():
    rows = torch.cat(views)
    logits = inverse_temperature * (rows @ rows.T)
    logits = logits.masked_fill(mask, float('-inf'))
    torch.nn.functional.cross_entropy(logits, target).backward()
    for view in views:
      view.grad = None

  return call


def gc_loss(*, batch_size, size, inverse_temperature, num_samples):
  """LibAUC's GCLoss, i.e. SogCLR at gamma 0.9, as its authors publish it."""
  torch = _torch()
  from libauc import losses

  loss_fn = losses.GCLoss(
    mode='unimodal', N=num_samples, tau=1 / inverse_temperature, gamma=0.9
  )
  views = _views(torch, batch_size, size)
  batches = _batches(torch, batch_size, num_samples)

  def call():
    loss_fn(*views, next(batches)).backward()
    for view in views:
      view.grad = None

  return call


def metric_learning(*, batch_size, size, inverse_temperature, num_samples):
  """NTXentLoss of pytorch-metric-learning; its memory is cubic in the batch."""
  del num_samples
  torch = _torch()
  from pytorch_metric_learning import losses

  loss_fn = losses.NTXentLoss(temperature=1 / inverse_temperature)
  views = _views(torch, batch_size, size)
  labels = torch.arange(batch_size).repeat(2)

  def call():
    loss_fn(torch.cat(views), labels).backward()
    for view in views:
      view.grad = None

  return call


def _group(torch):
  """Joins the group of one process without which the released code fails."""
  from torch import distributed

  if not distributed.is_initialized():
    distributed.init_process_group(
      'gloo', store=distributed.HashStore(), rank=0, world_size=1
    )
  return distributed


def _gather(torch, distributed, rows):
  """Gathers a tensor whose length the other processes do not know."""
  length = torch.tensor(len(rows))
  lengths = [torch.tensor(0)]
  distributed.all_gather(lengths, length)
  longest = torch.max(torch.stack(lengths))
  padded = torch.zeros((longest, *rows.shape[1:]), dtype=rows.dtype)
  padded[:length] = rows
  found = [torch.zeros_like(padded)]
  distributed.all_gather(found, padded)
  return found[0][: lengths[0]]


def released_sampler(*, batch_size, size, inverse_temperature, num_samples):
  """EMC² by a Python loop over columns; a restatement, see the module.

  The similarities are copied to the host, every row of a view decides on one
  column at a time, the (row, state) pairs after burn-in are collected, and the
  loss gathers them from the similarities. Burn-in is one less than the batch.
  """
  torch = _torch()
  distributed = _group(torch)

  class Gather(torch.autograd.Function):
    """Gathers rows; the gradient of what was sent comes back."""

    @staticmethod
    def forward(context, rows):
      context.save_for_backward(rows)
      return _gather(torch, distributed, rows)

    @staticmethod
    def backward(context, gradient):
      (rows,) = context.saved_tensors
      out = torch.zeros_like(rows)
      out[:] = gradient
      return out

  views = _views(torch, batch_size, size)
  batches = _batches(torch, batch_size, num_samples)
  scores = torch.full((num_samples,), torch.finfo(torch.float32).tiny)
  states = torch.full((num_samples,), -1)
  burn_in = batch_size - 1
  steps = 2 * batch_size
  legs = (slice(0, batch_size), slice(batch_size, steps))
  blocks = [(rows, columns) for rows in legs for columns in legs]

  def walk(index, proposed, rows, chain):
    """One view's rows against all columns; moves the scores in place."""
    uniform = torch.empty(batch_size)
    current = scores[index]
    if chain is None:
      chain = torch.full((batch_size,), -1)
    pairs, moves = [], []
    for column in range(steps):
      score = proposed[:, column]
      accepted = uniform.uniform_() < score / current
      current[accepted] = score[accepted]
      chain[accepted] = column
      own = score == 0
      if column > burn_in:
        pairs.append(torch.stack((rows, chain))[:, ~own])
        moves.append(accepted)
    scores[index] = current
    torch.mean(torch.cat(moves).to(torch.float32))
    return torch.hstack(pairs).T, chain

  def call():
    distributed.all_reduce(torch.tensor(batch_size))
    rows = torch.cat([Gather.apply(view) for view in views])
    index = next(batches)
    everyone = [torch.zeros_like(index)]
    distributed.all_gather(everyone, index)
    everyone = torch.hstack((everyone[0], everyone[0]))
    similarity = torch.matmul(rows, rows.T)
    own = torch.eye(batch_size, dtype=torch.bool)
    for block in blocks:
      similarity[block][own] = 0
    with torch.no_grad():
      proposed = torch.exp(inverse_temperature * similarity).cpu()
      for block in blocks:
        proposed[block][own] = 0
      chain, pairs, staying = None, [], []
      for leg in legs:
        numbers = torch.arange(leg.start, leg.stop)
        found, chain = walk(index, proposed[leg], numbers, chain)
        staying.append(found[found[:, 1] == -1][:, 0])
        pairs.append(found)
      torch.bincount(torch.cat(staying))
      torch.cat([states[index], states[index]])
      moved = chain != -1
      states[index[moved]] = everyone[chain[moved]]
      pairs = _gather(torch, distributed, torch.cat(pairs))
      pairs = pairs[pairs[:, 1] != -1]
    negatives = torch.sum(similarity[(pairs[:, 0], pairs[:, 1])])
    retained = steps - 2 - burn_in
    positives = torch.sum(views[0] * views[1])
    torch.autograd.backward(
      [
        inverse_temperature * negatives / retained / steps,
        -inverse_temperature * positives / batch_size,
      ]
    )
    for view in views:
      view.grad = None

  return call


CASES = {
  'nt_xent': nt_xent,
  'gc_loss': gc_loss,
  'metric_learning': metric_learning,
  'released_sampler': released_sampler,
}
