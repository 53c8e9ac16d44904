"""What contrastive learning runs on today: PyTorch, one thread.

Served by `worker.py` under a Python that has torch, which this project does not
ask for. Every case is given embeddings and makes one forward and backward pass
of its loss, gradients in the embeddings included.

`released_sampler` is a restatement: it was written anew from a reading of the
code that the authors of EMC² released (contrastive_emc2, `sampler.py`, the path
for fresh augmentations on one process), and does the same tensor operations in
the same order, with its bookkeeping of timers and messages left out. So it
stands a little on the fast side of what its users run.
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


def released_sampler(*, batch_size, size, inverse_temperature, num_samples):
  """EMC² by a Python loop over columns; a restatement, see the module.

  The similarities are copied to the host, every row of a view decides on one
  column at a time, the (row, state) pairs after burn-in are collected, and the
  loss gathers them from the similarities. Burn-in is one less than the batch.
  """
  torch = _torch()
  views = _views(torch, batch_size, size)
  batches = _batches(torch, batch_size, num_samples)
  scores = torch.full((num_samples,), torch.finfo(torch.float32).tiny)
  states = torch.full((num_samples,), -1)
  burn_in = batch_size - 1
  steps = 2 * batch_size
  own = torch.eye(batch_size, dtype=torch.bool).repeat(2, 2)

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
      if column > burn_in:
        pairs.append(torch.stack((rows, chain))[:, score != 0])
        moves.append(accepted)
    scores[index] = current
    torch.cat(moves).float().mean()
    return torch.hstack(pairs).T, chain

  def call():
    index = next(batches)
    rows = torch.cat(views)
    similarity = (rows @ rows.T).masked_fill(own, 0.0)
    with torch.no_grad():
      proposed = torch.exp(inverse_temperature * similarity).cpu()
      proposed[own] = 0.0
      chain, pairs = None, []
      for view in range(2):
        first = view * batch_size
        leg = slice(first, first + batch_size)
        found, chain = walk(
          index, proposed[leg], torch.arange(first, leg.stop), chain
        )
        pairs.append(found)
      moved = chain != -1
      states[index[moved]] = index.repeat(2)[chain[moved]]
      pairs = torch.cat(pairs)
      pairs = pairs[pairs[:, 1] != -1]
    negatives = similarity[pairs[:, 0], pairs[:, 1]]
    negatives = negatives.sum() / (steps - 1 - burn_in)
    positives = (views[0] * views[1]).sum() * 2
    loss = inverse_temperature * (negatives - positives) / steps
    loss.backward()
    for view in views:
      view.grad = None

  return call


CASES = {
  'nt_xent': nt_xent,
  'gc_loss': gc_loss,
  'metric_learning': metric_learning,
  'released_sampler': released_sampler,
}
