r"""Extreme stochastic variational inference: components travel, rows stay.

Rows lie in :math:`W` places and so do the components, :math:`K_b = K / W` in
each. A place updates its own rows' responsibilities for the components that it
has, and those components' statistics, exactly; then the components move on.
Nobody ever needs all of them, no statistic is stale and none is sent twice.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emc2 import algorithm, arguments, ring
from emc2 import mesh as mesh_lib
from emc2.topics.mixture import families
from emc2.topics.mixture import model as model_lib

MIXINGS = ('permute', 'ring')


class Rows(NamedTuple):
  """Data in places; n rows each, of which the last may be there to fill."""

  data: jax.Array  # (W, n, D)
  valid: jax.Array  # (W, n), bool: False of rows that were added.


class State(NamedTuple):
  """What the next step needs, and nothing else."""

  responsibilities: jax.Array  # (W, K, n): of each place's rows; 0 if added.
  statistics: families.Statistics  # By slots; place w has w Kb to (w+1) Kb - 1.
  ids: jax.Array  # (K,), int32: the component in each slot.
  count: jax.Array  # (), int32: finished rotations.


class Info(NamedTuple):
  """What a reader may log of one rotation."""

  moved: jax.Array  # (W,): mass that went to other components, in rows.


class Settings(NamedTuple):
  """What a rotation needs to know; :func:`esvi` explains each field."""

  model: model_lib.Model
  num_blocks: int
  mixing: str = 'permute'
  inner_batch: int | None = None
  active_prob: float = 1.0
  refresh_every: int = 50


def split_rows(
  data: jax.typing.ArrayLike, num_blocks: int, *, inner_batch: int | None = None
) -> Rows:
  """Divides rows among the places, in order, and fills up with zeros.

  Args:
    data: (N, D).
    num_blocks: W, static.
    inner_batch: What is given to :func:`esvi`, static.

  Returns:
    The rows; n is the least number that suffices and `inner_batch` divides.
  """
  data = jnp.asarray(data)
  height = _height(data.shape[0], num_blocks, inner_batch)
  valid = jnp.arange(num_blocks * height) < data.shape[0]
  return Rows(
    _split(data, num_blocks, height), valid.reshape(num_blocks, height)
  )


def init(
  key: jax.Array,
  rows: Rows,
  z0: jax.Array | None = None,
  *,
  settings: Settings,
  axis_name: str | None = None,
) -> State:
  """Starts from responsibilities (W, n, K), or draws them; see :func:`esvi`."""
  num_components = settings.model.num_components
  ids_key, z_key = jax.random.split(key)
  ids = jnp.arange(num_components, dtype=jnp.int32)
  ids = jax.random.permutation(ids_key, ids)
  if z0 is None:
    shape = rows.valid.shape[1], num_components

    def draw(place):
      key = jax.random.fold_in(z_key, place)
      return model_lib.draw_responsibilities(key, *shape, rows.data.dtype)

    z0 = jax.vmap(draw)(_places(rows, axis_name))
  z = jnp.where(rows.valid[..., None], z0, jnp.zeros([], z0.dtype))
  z = jnp.swapaxes(z, 1, 2)
  statistics = _collect(z, rows, ids, settings, axis_name)
  return State(z, statistics, ids, jnp.zeros([], jnp.int32))


def step(
  key: jax.Array,
  state: State,
  batch: Rows,
  *,
  settings: Settings,
  axis_name: str | None = None,
) -> tuple[State, Info]:
  """One rotation; under `shard_map` what one device does of it."""
  num_blocks = settings.num_blocks
  active_key, order_key = jax.random.split(key)
  places = _places(batch, axis_name)
  own = state.ids.reshape(num_blocks, -1)[places]
  index = jnp.arange(places.size, dtype=jnp.int32)[:, None], own
  active = jnp.ones(num_blocks, bool)
  if settings.active_prob < 1:
    active = jax.random.bernoulli(
      active_key, settings.active_prob, (num_blocks,)
    )
  by_place = lambda x: x.reshape(places.size, -1, *x.shape[1:])
  update = lambda part: _update(*part, settings=settings)
  changed, statistics, moved = jax.lax.map(
    update,
    (
      state.responsibilities[index],
      jax.tree.map(by_place, state.statistics),
      batch.data,
      active[places],
    ),
  )
  z = state.responsibilities.at[index].set(
    changed, unique_indices=True, mode='promise_in_bounds'
  )
  statistics = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), statistics)
  count = state.count + 1
  statistics = jax.lax.cond(
    count % settings.refresh_every == 0,
    lambda z, _: _collect(z, batch, state.ids, settings, axis_name),
    lambda _, statistics: statistics,
    z,
    statistics,
  )

  message = jnp.concatenate(
    [statistics.count[:, None], statistics.moments], axis=1
  )
  ids = state.ids
  if num_blocks > 1 and settings.mixing == 'permute':
    order = ring.draw_order(order_key, ids.size, num_blocks)
    message = ring.redistribute(
      message, order, num_blocks=num_blocks, axis_name=axis_name
    )
    ids = ids[order]
  elif num_blocks > 1:
    message = _roll(by_place(message), axis_name).reshape(message.shape)
    ids = jnp.roll(ids, -(ids.size // num_blocks))
  statistics = families.Statistics(message[:, 0], message[:, 1:])
  return State(z, statistics, ids, count), Info(moved)


def esvi(
  model: model_lib.Model,
  *,
  num_blocks: int,
  mixing: str = 'permute',
  inner_batch: int | None = None,
  active_prob: float = 1.0,
  refresh_every: int = 50,
  mesh: jax.sharding.Mesh | None = None,
) -> algorithm.Algorithm:
  r"""Coordinate ascent in blocks of rows times components, all places at once.

  A step is one rotation. Place :math:`w`, with the rows :math:`I_w` and the
  components :math:`\mathcal{K}_w`, keeps the mass :math:`C_i = \sum_{k \in
  \mathcal{K}_w} \tilde z_{ik}` of each row and spreads it anew,

  .. math::
    \tilde z_{ik}' = C_i \frac{e^{u_{ik}}}
      {\sum_{k' \in \mathcal{K}_w} e^{u_{ik'}}}, \quad
    (N_k, S_k) \mathrel{+}= \sum_{i \in I_w} (\tilde z_{ik}' - \tilde z_{ik})
      (1, \phi(x_i)),

  for :math:`i \in I_w, k \in \mathcal{K}_w`, and sends its components to other
  places. Rows and components of different places are disjoint, so that this is
  an exact ascent: the bound never falls, whatever the options say. One place is
  :func:`vi.vi`; W rotations cost as much as a step of it.

  .. note::
    The places work at the same time here, where the paper's work at their own;
    its components each go to a place drawn for it, ours by
    :func:`emc2.ring.redistribute`, which gives every place as many
    as it had. As printed, algorithm 4 sends within the loop over a row's
    components; it must be after the loop over the rows.

  Args:
    model: The mixture; K is a multiple of `num_blocks`, 2 times it at least.
    num_blocks: W, the number of places. Static.
    mixing: How the components travel. `'permute'` sends them to random places,
      so that any two meet. `'ring'` hands whole blocks round: then the mass
      of a row in a block never changes, and the ascent **stalls far below**
      the bound that it could reach. It is here to show just that.
    inner_batch: After so many rows a place renews its components' parameters
      from their statistics; None does so once a rotation. 1 is the paper's
      serial loop. Static.
    active_prob: The probability in (0, 1] that a place takes part in a
      rotation, as if the others were late.
    refresh_every: After so many rotations the statistics are summed anew from
      the responsibilities, as rounding adds up; W times the usual messages,
      and half the work of a step of :func:`vi.vi`.
    mesh: Splits rows and components over its axis `ring`, whose size must
      divide W. A rotation then sends (K / devices) (1 + F) numbers from each
      device by one all-to-all (see the note on small blocks there); nothing
      else is sent, and only `ids` is held by all. None means one device.

  Returns:
    `init(key, rows, z0=None) -> State` and
    `step(key, state, rows) -> (State, Info)`, with rows from
    :func:`split_rows`, of which n must be a multiple of `inner_batch`. z0 is
    (N, K), rows on the simplex, drawn from Dirichlet(1) if None.

  Raises:
    ValueError: If an argument is out of its range; from `init`, if `z0` is no
      start, see :func:`model.check_responsibilities`.

  Examples:
    >>> from emc2.topics.mixture import families
    >>> family = families.gaussian_diagonal(1, degrees=1.0, scale=1.0)
    >>> method = esvi(model_lib.make(family, 4), num_blocks=2)
    >>> rows = split_rows(jnp.array([[-1.0], [-1.1], [2.0]]), 2)
    >>> state = method.init(jax.random.key(0), rows)
    >>> state, info = method.step(jax.random.key(0), state, rows)
    >>> responsibilities(state, 3).shape
    (3, 4)

  References:
    Zhang, Raman, Ji, Yu, Vishwanathan, Dhillon, `Extreme Stochastic Variational
    Inference: Distributed Inference for Large Scale Mixture Models
    <https://arxiv.org/abs/1605.09499>`_, 2019, algorithm 4 and appendix D.
  """
  model_lib.check_several(model)
  arguments.check_at_least('num_blocks', num_blocks, 1)
  if model.num_components % num_blocks:
    raise ValueError(
      f'num_blocks must divide the {model.num_components} components, got '
      f'{num_blocks}.'
    )
  if model.num_components < 2 * num_blocks:
    raise ValueError(
      'num_blocks must leave at least 2 components in each, or nothing moves; '
      f'got {num_blocks} for {model.num_components} components.'
    )
  arguments.check_one_of('mixing', mixing, MIXINGS)
  arguments.check_at_least('inner_batch', inner_batch, 1)
  arguments.check_at_least('refresh_every', refresh_every, 1)
  if not 0 < active_prob <= 1:
    raise ValueError(f'active_prob must lie in (0, 1], got {active_prob}.')
  settings = Settings(
    model, num_blocks, mixing, inner_batch, active_prob, refresh_every
  )
  local_init = functools.partial(init, settings=settings)
  step_fn = functools.partial(step, settings=settings)
  if mesh is not None:
    devices = mesh.shape.get(mesh_lib.RING)
    if devices is None or num_blocks % devices:
      raise ValueError(
        f'num_blocks must be a multiple of the axis {mesh_lib.RING!r} of mesh, '
        f'got {num_blocks} and {dict(mesh.shape)}.'
      )
    specs, place = shardings(mesh), jax.sharding.PartitionSpec(mesh_lib.RING)
    everywhere = jax.sharding.PartitionSpec()
    # Scans start from zeros, which are the same everywhere, and end varying.
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    step_fn = shard(
      functools.partial(step_fn, axis_name=mesh_lib.RING),
      in_specs=(everywhere, specs, place),
      out_specs=(specs, place),
    )
    local_init = shard(
      functools.partial(local_init, axis_name=mesh_lib.RING),
      in_specs=(everywhere, place, place),
      out_specs=specs,
    )

  def init_fn(key, rows, z0=None):
    if z0 is not None:
      if not isinstance(z0, jax.core.Tracer):
        model_lib.check_responsibilities(z0, model)
      _check_start(z0, rows)
      z0 = jnp.asarray(z0, rows.data.dtype)
      z0 = _split(z0, num_blocks, rows.valid.shape[1])
    return local_init(key, rows, z0)

  def checked_step(key, state, batch):
    _check_rows(batch, settings)
    return step_fn(key, state, batch)

  return algorithm.Algorithm(init_fn, checked_step)


def shardings(mesh: jax.sharding.Mesh) -> State:
  """How the state lies on a mesh: split over `ring`, but for the ids."""
  del mesh
  split = jax.sharding.PartitionSpec(mesh_lib.RING)
  everywhere = jax.sharding.PartitionSpec()
  return State(
    responsibilities=split,
    statistics=families.Statistics(split, split),
    ids=everywhere,
    count=everywhere,
  )


def row_shardings(mesh: jax.sharding.Mesh) -> Rows:
  """How the rows lie on a mesh: split over `ring`."""
  del mesh
  split = jax.sharding.PartitionSpec(mesh_lib.RING)
  return Rows(split, split)


def elbo(model: model_lib.Model, state: State) -> jax.Array:
  """The bound at a state's responsibilities, exactly; see `model.elbo_at`.

  It reads the statistics, which in float32 drift until they are summed anew.

  Args:
    model: The mixture.
    state: Of :func:`esvi`.

  Returns:
    (), in nats.
  """
  bound = model_lib.evidence_terms(model, state.statistics)
  return bound + model_lib.entropy(state.responsibilities)


def responsibilities(state: State, num_rows: int) -> jax.Array:
  """The responsibilities (N, K), in the order of the data."""
  z = jnp.swapaxes(state.responsibilities, 1, 2)
  return z.reshape(-1, z.shape[2])[:num_rows]


def statistics(state: State) -> families.Statistics:
  """The statistics in the order of the components, not of the slots."""
  order = jnp.argsort(state.ids)
  return jax.tree.map(lambda x: x[order], state.statistics)


def _update(z, statistics, data, active, *, settings):
  """Updates one place: z (Kb, n), its components, its rows (n, D)."""
  model, inner_batch = settings.model, settings.inner_batch
  frozen = model_lib.expect(model, statistics, normalized=False)
  most = inner_batch or model_lib.rows_at_once(z.shape[0])
  num_chunks = -(-z.shape[1] // most)
  height = -(-z.shape[1] // num_chunks)
  # The last chunk may begin within the one before it, whose rows it leaves.
  begins = np.arange(num_chunks) * height
  starts = np.minimum(begins, z.shape[1] - height)

  def body(total, start_and_begin):
    start, begin = start_and_begin
    rows = jax.lax.dynamic_slice_in_dim(data, start, height)
    old = jax.lax.dynamic_slice_in_dim(z, start, height, axis=1)
    expectations = frozen
    if inner_batch is not None:
      now = jax.tree.map(jnp.add, statistics, total)
      expectations = model_lib.expect(model, now, normalized=False)
    features = model.family.features(rows)
    new = model_lib.ascend(old, model_lib.weigh(expectations, features))
    moves = active & (start + jnp.arange(height, dtype=jnp.int32) >= begin)
    new = jnp.where(moves[None, :], new, old)
    change = new - old
    found = model_lib.accumulate(change, features)
    total = jax.tree.map(jnp.add, total, found)
    return total, (new, jnp.sum(jnp.abs(change)) / 2)

  total = jax.tree.map(jnp.zeros_like, statistics)
  starts = jnp.asarray(starts, jnp.int32), jnp.asarray(begins, jnp.int32)
  total, (chunks, moved) = jax.lax.scan(body, total, starts)
  # Not written into z within the loop, which would copy all of z each time.
  head = jnp.swapaxes(chunks[:-1], 0, 1).reshape(z.shape[0], -1)
  tail = chunks[-1][:, head.shape[1] + height - z.shape[1] :]
  z = jnp.concatenate([head, tail], axis=1)
  return z, jax.tree.map(jnp.add, statistics, total), jnp.sum(moved)


def _collect(z, rows, ids, settings, axis_name):
  """Sums the statistics of all rows while the empty blocks go round once."""
  model, num_blocks = settings.model, settings.num_blocks
  places = _places(rows, axis_name)
  ids = ids.reshape(num_blocks, -1)
  shape = places.size, ids.shape[1]
  here = jnp.arange(places.size, dtype=jnp.int32)[:, None]

  part = model._replace(num_components=ids.shape[1])
  add = lambda pair: model_lib.summarize(part, pair[1], pair[0].T)

  def body(number, total):
    block = ids[(places + number) % num_blocks]
    found = jax.lax.map(add, (z[here, block], rows.data))
    total = jax.tree.map(jnp.add, total, found)
    return jax.tree.map(lambda x: _roll(x, axis_name), total)

  total = families.Statistics(
    jnp.zeros(shape, z.dtype),
    jnp.zeros((*shape, model.family.num_features), z.dtype),
  )
  total = jax.lax.fori_loop(0, num_blocks, body, total)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), total)


def _roll(blocks, axis_name):
  """Hands each block (w, ...) to the place before its own."""
  if axis_name is None:
    return jnp.roll(blocks, -1, axis=0)
  devices = jax.lax.axis_size(axis_name)
  back = [(i, (i - 1) % devices) for i in range(devices)]
  last = jax.lax.ppermute(blocks[:1], axis_name, back)
  return jnp.concatenate([blocks[1:], last])


def _places(rows, axis_name):
  """The numbers of this device's places."""
  local = rows.valid.shape[0]
  places = jnp.arange(local, dtype=jnp.int32)
  if axis_name is not None:
    places += jax.lax.axis_index(axis_name) * local
  return places


def _height(num_rows, num_blocks, inner_batch):
  """How many rows a place has."""
  height = -(-num_rows // num_blocks)
  return -(-height // (inner_batch or 1)) * (inner_batch or 1)


def _split(x, num_blocks, height):
  """Rows (N, ...) as (W, n, ...), with zeros at the end."""
  fill = num_blocks * height - x.shape[0]
  x = jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(num_blocks, height, *x.shape[1:])


def _check_start(z0: Any, rows: Rows) -> None:
  """Refuses responsibilities of another number of rows."""
  num_blocks, height = rows.valid.shape
  if not isinstance(rows.valid, jax.core.Tracer):
    num_rows = int(np.sum(jax.device_get(rows.valid)))
    if len(z0) != num_rows:
      raise ValueError(
        f'z0 must have a row for each of {num_rows}, got {len(z0)}.'
      )
  elif len(z0) > num_blocks * height:
    raise ValueError(
      f'z0 must have {num_blocks * height} rows at most, got {len(z0)}.'
    )


def _check_rows(rows: Rows, settings: Settings) -> None:
  """Refuses rows that were split otherwise."""
  places, height = rows.valid.shape
  if places != settings.num_blocks:
    raise ValueError(
      f'rows must lie in {settings.num_blocks} places, got {places}.'
    )
  if settings.inner_batch is not None and height % settings.inner_batch:
    raise ValueError(
      f'rows of a place must be a multiple of inner_batch='
      f'{settings.inner_batch}, got {height}.'
    )
