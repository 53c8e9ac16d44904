r"""Coulomb, logarithmic and Riesz energies of points on a sphere."""

import functools

import jax
import jax.numpy as jnp

from emc2 import mesh
from emc2.kernels import riesz


def energy(
  points: jax.typing.ArrayLike,
  exponent: float = 1.0,
  *,
  data_axis: str | None = None,
  ring_axis: str | None = None,
  implementation: str = 'auto',
) -> jax.Array:
  r"""The Riesz energy, each pair of points once.

  .. math::
    E_s(X) = \sum_{i < j} \|x_i - x_j\|^{-s}, \qquad
    E_0(X) = -\sum_{i < j} \log \|x_i - x_j\|

  :math:`s = 1` is Coulomb's energy, the Thomson problem on the ordinary sphere.
  Value and gradient come from one pass over the pairs in O(n) memory;
  derivatives of any order are defined.

  .. note::
    In float64 the value that comes with a gradient is
    :math:`-\frac1s \sum_i \langle x_i, G_i \rangle`, and inherits the rounding
    of :func:`emc2.kernels.riesz.riesz`: 1e-15 of points spread evenly, 1e-11
    of random points. The energy alone is the sum of the potentials, to 1e-15.

  Inside `jax.shard_map` each device holds n / W of the points and computes
  their rows. Over `data_axis` the points are gathered. Over `ring_axis` they
  travel: each block, or what was gathered of it, goes once round, while the
  device works on the block that came before, so that no device ever holds more
  than n / ring points or the pairs of n / W rows. Both together split a ring
  into fewer, longer hops.

  Args:
    points: (n, k), unit rows; or this device's (n / W, k). Distinct points: a
      distance of 0 gives infinity or NaN, and :func:`check_points` tells.
    exponent: :math:`s \ge 0`; static.
    data_axis: A mesh axis that splits the points, gathered in one message.
    ring_axis: A mesh axis that splits the points, R messages of one hop each
      where R is its size.
    implementation: As in :func:`emc2.kernels.riesz.riesz`; static.

  Returns:
    (), in the dtype of the points; the whole energy on every device.

  Raises:
    ValueError: if `exponent`, `implementation` or a shape breaks its rule.

  Examples:
    >>> poles = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    >>> energy(poles), jax.grad(energy)(poles)[:, 2]
    (Array(0.5, dtype=float32), Array([-0.25,  0.25], dtype=float32))

  References:
    Thomson, `On the structure of the atom
    <https://doi.org/10.1080/14786440409463107>`_, 1904.
  """
  axes = (data_axis, ring_axis)
  return _energy(float(exponent), axes, implementation, jnp.asarray(points))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _energy(exponent, axes, implementation, points):
  out = _potentials(points, exponent, axes, implementation)
  return _total(jnp.sum(out.potential) / 2, axes)


@_energy.defjvp
def _energy_jvp(exponent, axes, implementation, primals, tangents):
  (points,), (tangent,) = primals, tangents
  out = _potentials(points, exponent, axes, implementation)
  value = _own_share(points, out, exponent)
  slope = jnp.sum(out.gradient * tangent)
  return _total(value, axes), _total(slope, axes)


def _own_share(points, out, exponent):
  """This device's part of the energy, where its gradient is there too."""
  if exponent > 0 and points.dtype == jnp.float64:
    # By Euler, as the energy is homogeneous: on a CPU potentials would take a
    # quarter of the time.
    return -jnp.sum(points * out.gradient) * (1 / exponent)
  return jnp.sum(out.potential) / 2


def _total(part, axes):
  axes = tuple(axis for axis in axes if axis is not None)
  return jax.lax.psum(part, axes) if axes else part


def _potentials(points, exponent, axes, implementation):
  """The kernel's results for this device's points among all."""
  data_axis, ring_axis = axes
  pairs = functools.partial(
    riesz.riesz, exponent=exponent, implementation=implementation
  )
  out = pairs(points)
  block = points
  if data_axis is not None and jax.lax.axis_size(data_axis) > 1:
    blocks = jax.lax.all_gather(points, data_axis)
    block = blocks.reshape(-1, points.shape[1])
    own = jax.lax.axis_index(data_axis)
    others = jnp.roll(blocks, -own, axis=0)[1:]
    out = _add(out, pairs(points, others.reshape(-1, points.shape[1])))
  if ring_axis is None or (size := jax.lax.axis_size(ring_axis)) == 1:
    return out
  ahead = [(i, (i + 1) % size) for i in range(size)]
  send = lambda x: jax.lax.ppermute(x, ring_axis, ahead)

  def hop(carry, _):
    visiting, out = carry
    coming = send(visiting)
    return (coming, _add(out, pairs(points, visiting))), None

  start = tuple(mesh.vary_alike(send(block), *out))
  carry = start[0], riesz.Riesz(*start[1:])
  (_, out), _ = jax.lax.scan(hop, carry, length=size - 1)
  return out


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)
