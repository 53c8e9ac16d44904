"""Workers that wait for no one, each a process: blocks go point to point."""

import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from emc2.ring import worker as worker_lib
from emc2.ring.rotate import Rotation

try:
  from jax._src import distributed  # The store has no public name.
  from jax.experimental import transfer
except (ImportError, AttributeError):  # A JAX that was built without them.
  distributed = transfer = None

_INSTEAD = (
  'take emc2.ring.on_mesh, which does the same visits by collectives, in step'
)
_runs = itertools.count()


def run(
  rotations: Sequence[Rotation],
  resident: Any,
  kept: Any,
  blocks: Any,
  *,
  num_passes: int = 1,
  delay: Callable[[int, int], float] | None = None,
  ahead: int = 2,
  timeout: float = 60.0,
  device: jax.Device | None = None,
  host: str = '127.0.0.1',
) -> tuple[Any, Any, Any]:
  """Passes of asynchronous workers, each a process of a `jax.distributed` run.

  Every process calls this, worker p is process p, and each gives and gets what
  is its own, as each device does with `rotate`. A collective would put all in
  step; here a block goes to worker p - 1 by `jax.experimental.transfer`, which
  fetches it from memory to memory. As the order of the blocks is known, each
  is asked for before it is sent. Pass boundaries are local, and the results
  are those of `threads.run`: bit by bit the same in each run, at all speeds.

  .. note::
    An error in one worker ends all, and all tell of the same worker: the one
    that failed says so in the key-value store of `jax.distributed`; one that
    died is told of by worker p - 1, whose connection breaks. The store lives in
    process 0. When that dies, JAX itself ends the others at once, with a
    message that names the coordination service. An interpreter that ends by
    the error then waits, as any does under `jax.distributed`, until its
    heartbeats tell that the dead one will not come to the shutdown
    (`heartbeat_timeout_seconds`, 100 by default); the error is written before.

  Args:
    rotations: What a pass consists of; the same in all processes.
    resident: Leaves (...), this worker's.
    kept: Leaves (Q, ...), what it keeps of each block.
    blocks: Leaves (m, ...), the blocks p m, ..., p m + m - 1 of Q = P m.
    num_passes: At least 0; the same in all processes.
    delay: Of the worker and the count of its visit, from 0 on through all
      rotations and passes: how many seconds it does nothing before the visit.
    ahead: How many visits may be dispatched and not yet done, at least 1.
    timeout: How many seconds to wait for a block before its sender counts as
      hung; more than a visit takes, the compilation of the first included.
    device: Where this worker works; the first of the process by default.
    host: The numerical address at which the other processes reach this one;
      the default serves processes of one machine.

  Returns:
    `resident`, `kept` and `blocks` afterwards, on the device.

  Raises:
    ValueError: If the axes do not fit one another or those of other processes,
      a number is out of range, or a function changes a shape or type.
    NotImplementedError: If this JAX or backend cannot send arrays from process
      to process, or a block holds typed keys.
    RuntimeError: If a worker fails, dies or hangs; the message names it.

  Examples:
    >>> import jax.numpy as jnp
    >>> from emc2 import ring
    >>> def visit(total, own, block, number):
    ...   return total + block, block, 2 * block
    >>> rotation = ring.Rotation(visit, lambda total: total)
    >>> total, kept, blocks = run(
    ...     [rotation], jnp.float32(0), jnp.zeros(2), jnp.array([1.0, 10.0]))
    >>> total, blocks
    (Array(11., dtype=float32), Array([ 2., 20.], dtype=float32))

  References:
    Yun et al., NOMAD: Non-locking, stOchastic Multi-machine algorithm for
    Asynchronous and Decentralized matrix completion, 2014,
    https://arxiv.org/abs/1312.0193
  """
  prefix = f'emc2/ring/{next(_runs)}'  # Of its own for each run.
  width, worker = jax.process_count(), jax.process_index()
  device = jax.local_devices()[0] if device is None else device
  here = _check_axes(kept, blocks, width)
  if timeout <= 0:
    raise ValueError(f'timeout must be positive, got {timeout}.')
  one = lambda tree: jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], tree))
  block = one(blocks)
  worker_lib.check(
    rotations, resident, one(kept), block, num_passes=num_passes, ahead=ahead
  )
  total = width * here
  resident = worker_lib.entry(resident, device)
  own = [worker_lib.entry(kept, device, q) for q in range(total)]
  arriving = collections.deque(
    worker_lib.entry(blocks, device, slot) for slot in range(here)
  )
  links = None

  def pause(count):
    if delay is not None:
      time.sleep(delay(worker, count))

  def take(count):
    block = arriving.popleft()
    if links is not None:
      links.await_block(block)
    return (worker * here + count) % total, block

  def send(count, number, block):
    del number
    if links is None:
      arriving.append(block)
    else:
      links.offer(count, block)
      arriving.append(links.ask(count))

  try:
    if width > 1:
      terms = f'{here} blocks, {len(rotations)} rotations, {num_passes} passes'
      links = _Links(prefix, block, device, host, timeout, terms)
    resident, own = worker_lib.work(
      rotations,
      resident,
      own,
      worker=worker,
      here=here,
      num_passes=num_passes,
      ahead=ahead,
      device=device,
      pause=pause,
      take=take,
      send=send,
    )
    if links is not None:
      for block in arriving:
        links.await_block(block)
      links.close()
  except worker_lib.Stopped as stopped:
    raise RuntimeError(str(stopped)) from stopped.__cause__
  except worker_lib.Failure as failure:
    message = (
      f'process {worker} failed at its visit {failure.count}, of block '
      f'{failure.number}: {failure.error}'
    )
    if links is not None:
      message = links.tell(message)
    raise RuntimeError(message) from failure.error
  except BaseException as error:
    if links is not None:
      links.tell(f'process {worker} was ended: {error!r}')
    raise
  return resident, worker_lib.stack(own), worker_lib.stack(list(arriving))


class _Links:
  """What joins a worker to the one it gets blocks from and to all others.

  Two kinds of things go over the store of `jax.distributed`, never arrays:
  addresses at the start, and what ends the run.
  """

  def __init__(self, prefix, block, device, host, timeout, terms):
    """Opens them; `block` has the shapes and types of what comes."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    self._block, self._timeout = jax.tree.map(place, block), timeout
    self._width, self._worker = jax.process_count(), jax.process_index()
    self._after = (self._worker + 1) % self._width
    if transfer is None:
      raise NotImplementedError(
        f'This JAX has no jax.experimental.transfer; {_INSTEAD}.'
      )
    if any(
      jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
      for leaf in jax.tree.leaves(block)
    ):
      raise NotImplementedError(
        'blocks must hold no typed keys, which jax.experimental.transfer does '
        'not send; keep them in the resident.'
      )
    try:
      self._server = transfer.start_transfer_server(
        device.client, f'{host}:0', [f'{host}:0']
      )
    except (jax.errors.JaxRuntimeError, TypeError) as error:
      raise NotImplementedError(
        f'{device.client.platform} cannot send arrays from process to process '
        f'({error}); {_INSTEAD}.'
      ) from error
    self._store = distributed.global_state.client
    self._prefix = prefix
    self._looked = time.monotonic()
    self._put(f'address/{self._worker}', f'{self._server.address()} {terms}')
    self._wait(
      lambda: self._get(f'address/{self._after}'),
      f'process {self._after} did not start',
    )
    address, theirs = self._get(f'address/{self._after}').split(' ', 1)
    if theirs != terms:
      message = (
        'all processes must make the same run, got '
        f'{terms} in process {self._worker}, {theirs} in {self._after}.'
      )
      raise ValueError(self.tell(message))
    self._connection = self._server.connect(address)

  def offer(self, count, block):
    """Lets the next worker fetch a block that visit `count` made."""
    self._server.await_pull(count * self._width + self._worker, block)

  def ask(self, count):
    """Fetches, without waiting, what visit `count` makes of a block there."""
    try:
      number = count * self._width + self._after
      return self._connection.pull(number, self._block)
    except jax.errors.JaxRuntimeError as error:
      self._broke(error)

  def await_block(self, block):
    """Waits until it is here."""
    leaves = jax.tree.leaves(block)
    self._wait(
      lambda: all(leaf.is_ready() for leaf in leaves),
      f'process {self._after} hung: it sent no block',
    )
    try:
      jax.block_until_ready(leaves)
    except jax.errors.JaxRuntimeError as error:
      self._broke(error)

  def close(self):
    """Stays until the next worker has fetched all."""
    self._put(f'done/{self._worker}', 'done')
    before = (self._worker - 1) % self._width
    self._wait(
      lambda: self._get(f'done/{before}'),
      f'process {before} hung: it did not end',
    )

  def tell(self, message):
    """Ends the run of all by a message, or by one that came before it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # There is one.
      self._put('failure', message)
    return self._get('failure') or message

  def _broke(self, error):
    # One that failed says so itself; one that died cannot.
    limit = time.monotonic() + 1
    while not self._get('failure') and time.monotonic() < limit:
      time.sleep(0.05)
    message = f'process {self._after} died: {error}'
    raise worker_lib.Stopped(self.tell(message)) from error

  def _wait(self, ready, complaint):
    start = time.monotonic()
    while not ready():
      now = time.monotonic()
      if now - self._looked > 0.3:
        self._looked = now
        message = self._get('failure')
        if message:
          raise worker_lib.Stopped(message)
      if now - start > self._timeout:
        message = f'{complaint} in {self._timeout} seconds'
        raise worker_lib.Stopped(self.tell(message))
      # A tenth of the wait is lost at most.
      time.sleep(min(max((now - start) / 10, 5e-5), 0.05))

  def _put(self, name, value):
    self._store.key_value_set(f'{self._prefix}/{name}/value', value)

  def _get(self, name):
    """The value, or '' if there is none; never waits."""
    found = self._store.key_value_dir_get(f'{self._prefix}/{name}/')
    return found[0][1] if found else ''


def _check_axes(kept, blocks, width):
  """How many blocks are at home here."""
  leading = {x.shape[:1] for x in jax.tree.leaves(blocks)}
  if len(leading) != 1 or leading & {(), (0,)}:
    raise ValueError(
      'blocks must have one leading axis, of at least 1, the same of all '
      f'leaves, got {sorted(leading)}.'
    )
  here = leading.pop()[0]
  for leaf in jax.tree.leaves(kept):
    if leaf.shape[:1] != (width * here,):
      raise ValueError(
        f'kept must have a leading axis of {width * here}, for {here} blocks '
        f'of each of {width} processes, got {leaf.shape}.'
      )
  return here
