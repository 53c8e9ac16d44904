"""The energy, its identities, and the same over eight devices."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from emc2 import mesh as mesh_lib
from emc2 import sphere
from emc2.sphere import closed_forms, configurations

from tests import processes

P = jax.sharding.PartitionSpec


def draw(n, k=3, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, k))
  return x / np.linalg.norm(x, axis=1, keepdims=True)


class Float64TestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))


class EnergyTest(Float64TestCase):
  @parameterized.parameters(
    ('icosahedron', 1.0, 49.1652530576),
    ('icosahedron', 2.0, 39.0),
    ('600-cell', 1.0, 5796.5764557024),
    ('600-cell', 2.0, 5395.0),
    ('e8_240', 2.0, 16550.0),
  )
  @pytest.mark.slow
  def test_codes(self, name, exponent, want):
    points = configurations.make(name)
    got = float(sphere.energy(points, exponent))
    self.assertAlmostEqual(got / want, 1, delta=1e-12)

  @parameterized.product(n=(2, 5, 100), exponent=(0.0, 1.0, 2.0, 0.7))
  @pytest.mark.slow
  def test_polygons(self, n, exponent):
    points = configurations.polygon(n)
    want = closed_forms.polygon(n, exponent)
    got = float(sphere.energy(points, exponent))
    self.assertAlmostEqual(got, want, delta=1e-12 * abs(want) + 1e-12)
    if exponent == 2:
      self.assertAlmostEqual(want, n * (n * n - 1) / 24, delta=1e-9 * want)

  @parameterized.product(exponent=(0.5, 1.0, 2.0), dim=(2, 3, 5))
  @pytest.mark.slow
  def test_sums_of_the_gradient(self, exponent, dim):
    """Identity 5: no force, no torque, and the radial part is the energy's."""
    x = draw(40, dim)
    energy, gradient = jax.value_and_grad(sphere.energy)(x, exponent)
    size = np.abs(gradient).max()
    np.testing.assert_allclose(gradient.sum(axis=0), 0, atol=1e-10 * size)
    radial = float(jnp.vdot(x, gradient))
    self.assertAlmostEqual(radial / -(exponent * energy), 1, delta=1e-10)
    torque = x.T @ gradient - gradient.T @ x
    np.testing.assert_allclose(torque, 0, atol=1e-10 * size)

  @pytest.mark.slow
  def test_logarithmic_radial_part(self):
    x = draw(40)
    gradient = jax.grad(sphere.energy)(x, 0.0)
    np.testing.assert_allclose(jnp.sum(x * gradient, axis=1), -39 / 2)

  @pytest.mark.slow
  def test_rotations_and_permutations(self):
    """Identity 6."""
    x = draw(30)
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(30)
    energy, gradient = jax.value_and_grad(sphere.energy)(x)
    turned = jax.value_and_grad(sphere.energy)(x @ turn)
    np.testing.assert_allclose(turned[0], energy, rtol=1e-12)
    np.testing.assert_allclose(turned[1], gradient @ turn, rtol=1e-7)
    mixed = jax.value_and_grad(sphere.energy)(x[order])
    np.testing.assert_allclose(mixed[0], energy, rtol=1e-12)
    np.testing.assert_allclose(mixed[1], gradient[order], rtol=1e-7)

  @parameterized.parameters((2, 2), (12, 3))
  @pytest.mark.slow
  def test_curvature_at_a_minimum(self, n, zero_modes):
    """Identity 7: rotations cost nothing, all else does."""
    x = {
      2: np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]),
      6: configurations.cross_polytope(3),
      12: configurations.icosahedron(),
    }[n]
    on_sphere = lambda y: sphere.energy(sphere.normalize(y))
    hessian = jax.hessian(on_sphere)(jnp.asarray(x)).reshape(3 * n, 3 * n)
    # A basis of the tangent spaces, as the radial directions are free too.
    basis = np.zeros((n, 3, n, 2))
    for i in range(n):
      basis[i, :, i] = np.linalg.svd(x[i : i + 1])[2][1:].T
    basis = basis.reshape(3 * n, 2 * n)
    values = np.linalg.eigvalsh(basis.T @ hessian @ basis)
    np.testing.assert_allclose(values[:zero_modes], 0, atol=1e-9)
    self.assertGreater(values[zero_modes], 0.1)
    if n == 2:
      np.testing.assert_allclose(values[2:], 0.25)

  def test_mean_over_uniform_points(self):
    """Identity 12, within five standard errors."""
    draws = jax.vmap(lambda key: sphere.draw_uniform(key, 8, 4, jnp.float64))
    x = draws(jax.random.split(jax.random.key(0), 4000))
    energies = np.asarray(jax.vmap(sphere.energy)(x))
    want = closed_forms.uniform_mean(8, 4, 1.0)
    error = energies.std() / np.sqrt(len(energies))
    self.assertLess(abs(energies.mean() - want), 5 * error)

  @parameterized.parameters(0.0, 0.5, 1.0, 2.0)
  @pytest.mark.slow
  def test_value_beside_the_gradient(self, exponent):
    """Of points spread evenly it has all the digits."""
    x = configurations.make('dodecahedron')
    want = float(sphere.energy(x, exponent))
    value, _ = jax.value_and_grad(sphere.energy)(x, exponent)
    self.assertAlmostEqual(float(value) / want, 1, delta=1e-14)

  @pytest.mark.slow
  def test_dtype_follows_the_points(self):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
      points = jnp.asarray(draw(10), dtype)
      self.assertEqual(sphere.energy(points).dtype, dtype)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'exponent must be positive'):
      sphere.energy(draw(4), -1.0)
    with self.assertRaisesRegex(ValueError, 'is not one of'):
      sphere.energy(draw(4), implementation='fast')


def _sharded(axes, exponent=1.0):
  """The mesh and the energy of points split over the named axes."""
  mesh = mesh_lib.make(**axes)
  named = {f'{axis}_axis': axis for axis in axes}
  energy = functools.partial(sphere.energy, exponent=exponent, **named)
  spec = P(tuple(axes))
  return jax.shard_map(energy, mesh=mesh, in_specs=spec, out_specs=P())


class ShardedTest(Float64TestCase):
  @parameterized.parameters(({'data': 2, 'ring': 4}, 2.0))
  def test_8_devices_equal_1(self, axes, exponent):
    self.check_devices(axes, exponent)

  @parameterized.parameters(({'ring': 8}, 1.0), ({'data': 8}, 0.0))
  @pytest.mark.slow
  def test_8_devices_equal_1_of_others(self, axes, exponent):
    self.check_devices(axes, exponent)

  def check_devices(self, axes, exponent):
    """Energies and gradients."""
    x = draw(64)
    one = functools.partial(sphere.energy, exponent=exponent)
    many = _sharded(axes, exponent)
    want, got = jax.value_and_grad(one)(x), jax.value_and_grad(many)(x)
    size = np.abs(want[1]).max()
    np.testing.assert_allclose(got[1], want[1], atol=1e-12 * size)
    np.testing.assert_allclose(many(x), one(x), rtol=1e-13)
    # With the gradient it is a sum that cancels, where points are close.
    for value in (got[0], want[0]):
      np.testing.assert_allclose(value, one(x), rtol=1e-9)

  @pytest.mark.slow
  def test_curvature_of_8_devices_equals_1(self):
    x, v = draw(32), draw(32, seed=1)
    curve = lambda fn: jax.jvp(jax.grad(fn), (x,), (v,))[1]
    want = curve(sphere.energy)
    got = curve(_sharded({'data': 2, 'ring': 4}))
    np.testing.assert_allclose(got, want, atol=1e-11 * np.abs(want).max())

  @parameterized.parameters(
    ({'ring': 8}, {'collective_permute': 2, 'all_reduce': 1}),
    ({'data': 8}, {'all_gather': 1, 'all_reduce': 1}),
    (
      {'data': 2, 'ring': 4},
      {'all_gather': 1, 'collective_permute': 2, 'all_reduce': 1},
    ),
  )
  def test_collectives(self, axes, want):
    """One block sent on in each hop (the first before the loop), one sum."""
    step = jax.jit(jax.value_and_grad(_sharded(axes)))
    text = step.lower(draw(64)).as_text()
    kinds = ('all_gather', 'all_reduce', 'all_to_all', 'collective_permute')
    kinds += ('reduce_scatter',)
    found = {kind: text.count(f'stablehlo.{kind}"') for kind in kinds}
    self.assertEqual({k: n for k, n in found.items() if n}, want)

  def test_a_ring_holds_blocks_only(self):
    """No device has all points, let alone all pairs."""
    step = jax.jit(jax.value_and_grad(_sharded({'ring': 8})))
    n = 16_000
    memory = step.lower(jnp.zeros((n, 3))).compile().memory_analysis()
    self.assertLess(memory.temp_size_in_bytes, n * n / 64 * 8 / 4)
    self.assertEqual(memory.argument_size_in_bytes, n // 8 * 3 * 8)

  @pytest.mark.slow
  def test_two_processes_equal_one(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'found.npy'
    processes.run('tests.sphere.sums_energy', 2, str(path))
    energy, gradient = jax.value_and_grad(sphere.energy)(draw(64))
    want = [energy, jnp.linalg.norm(gradient)]
    np.testing.assert_allclose(np.load(path), want, rtol=1e-9)
