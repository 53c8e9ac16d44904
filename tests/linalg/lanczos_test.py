"""A basis of a Krylov space: its identities, its end, and its devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import mesh
from emc2.linalg import lanczos


def _draw(d, values=None, seed=0):
  """A symmetric matrix (d, d) and a start (d,), float64."""
  rng = np.random.default_rng(seed)
  basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
  values = rng.uniform(size=d) ** 2 if values is None else np.asarray(values)
  return basis * values @ basis.T, rng.normal(size=d)


def _tridiagonal(found):
  beside = np.asarray(found.off_diagonal)[:-1]
  return np.diag(found.diagonal) + np.diag(beside, 1) + np.diag(beside, -1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _jitted(matrix, start, num_steps, breakdown_tol):
  matvec = lambda v: jnp.matmul(matrix, v, precision='highest')
  return lanczos.lanczos(matvec, start, num_steps, breakdown_tol=breakdown_tol)


def _run(matrix, start, num_steps, tol=1e-6):
  return jax.tree.map(np.asarray, _jitted(matrix, start, num_steps, tol))


def _off_orthogonal(found):
  """The greatest error of V'V, of the vectors that there are."""
  rows = np.asarray(found.basis, np.float64)[: int(found.num_steps)]
  return np.abs(rows @ rows.T - np.eye(len(rows))).max()


class IdentitiesTest(parameterized.TestCase):
  def test_of_the_basis(self):
    matrix, start = _draw(40)
    with jax.enable_x64(True):
      found = _run(matrix, start, 10)
    rows, small = np.asarray(found.basis), _tridiagonal(found)
    self.assertEqual(found.num_steps, 10)
    self.assertLess(_off_orthogonal(found), 1e-13)
    self.assertLess(np.abs(rows @ matrix @ rows.T - small).max(), 1e-13)
    rest = np.linalg.norm(matrix @ rows.T - rows.T @ small)
    self.assertLess(abs(rest - found.off_diagonal[-1]), 1e-13)
    np.testing.assert_allclose(found.norm, np.linalg.norm(start), rtol=1e-14)
    np.testing.assert_allclose(rows[0] * found.norm, start, rtol=1e-13)

  def test_equals_a_loop(self):
    matrix, start = _draw(15, values=np.linspace(-1, 2, 15))
    with jax.enable_x64(True):
      found = _run(matrix, start, 6)
    vectors = [start / np.linalg.norm(start)]
    for j in range(6):
      w = matrix @ vectors[j]
      np.testing.assert_allclose(found.diagonal[j], vectors[j] @ w, rtol=1e-11)
      for v in vectors * 2:
        w = w - (v @ w) * v
      beta = np.linalg.norm(w)
      np.testing.assert_allclose(found.off_diagonal[j], beta, rtol=1e-11)
      vectors.append(w / beta)
    np.testing.assert_allclose(found.basis, vectors[:6], atol=1e-11)

  @parameterized.parameters(10, 20, 50)
  def test_stays_orthogonal_in_float32(self, num_steps):
    d = 2000
    rng = np.random.default_rng(1)
    spectra = [
      np.arange(1.0, d + 1) ** -2,
      0.5 ** np.arange(d),
      # A vector that is nearly one of the operator's own leaves little.
      np.append(1.0, 1e-4 * rng.uniform(size=d - 1)),
    ]
    start = rng.normal(size=d).astype('f')
    one = lambda values: lanczos.lanczos(lambda v: values * v, start, num_steps)
    found = jax.jit(jax.vmap(one))(np.stack(spectra).astype('f'))
    for i in range(len(spectra)):
      case = jax.tree.map(lambda x, i=i: x[i], found)
      self.assertGreaterEqual(case.num_steps, min(num_steps, 20))
      self.assertLess(_off_orthogonal(case), 1.5e-6)


class EndTest(parameterized.TestCase):
  @parameterized.parameters(3, 10)
  def test_breaks_down_in_few_eigenvalues(self, num_steps):
    """Of 3 distinct ones, at the last index for 3 steps."""
    matrix, start = _draw(50, values=np.resize([1.0, 0.3, 0.05], 50))
    with jax.enable_x64(True):
      found = _run(matrix, start, num_steps)
    self.assertEqual(found.num_steps, 3)
    rows = np.asarray(found.basis)
    self.assertLess(_off_orthogonal(found), 1e-13)
    np.testing.assert_array_equal(rows[3:], 0)
    np.testing.assert_array_equal(found.diagonal[3:], 0)
    np.testing.assert_array_equal(found.off_diagonal[2:], 0)
    # An identity that a vector kept after the breakdown would spoil.
    small = _tridiagonal(found)
    np.testing.assert_allclose(rows @ matrix @ rows.T, small, atol=1e-13)
    np.testing.assert_allclose(
      np.linalg.eigvalsh(small)[-3:], [0.05, 0.3, 1.0], rtol=1e-11
    )

  def test_breaks_down_in_float32(self):
    matrix, start = _draw(50, values=np.resize([1.0, 0.3, 0.05], 50))
    found = _run(matrix.astype('f'), start.astype('f'), 10)
    self.assertEqual(found.num_steps, 3)
    self.assertLess(_off_orthogonal(found), 1e-6)

  @parameterized.parameters(1e-20, 1e20)
  def test_scale_does_not_matter(self, scale):
    matrix, start = _draw(50, values=np.resize([1.0, 0.3, 0.05], 50))
    with jax.enable_x64(True):
      found = _run(scale * matrix, start, 10)
      want = _run(matrix, scale * start, 10)
    self.assertEqual(found.num_steps, 3)
    self.assertEqual(want.num_steps, 3)
    np.testing.assert_allclose(found.diagonal / scale, want.diagonal)

  def test_tolerance(self):
    matrix, start = _draw(50, values=np.resize([1.0, 1.0001], 50))
    with jax.enable_x64(True):
      self.assertEqual(_run(matrix, start, 10).num_steps, 2)
      found = _run(matrix, start, 10, tol=1e-3)
    self.assertEqual(found.num_steps, 1)
    np.testing.assert_array_equal(found.off_diagonal, 0)

  def test_whole_space(self):
    matrix, start = _draw(5, values=[1.0, 2.0, 3.0, 4.0, 5.0])
    with jax.enable_x64(True):
      found = _run(matrix, start, 5)
    self.assertEqual(found.num_steps, 5)
    self.assertEqual(found.off_diagonal[-1], 0)
    np.testing.assert_allclose(
      np.linalg.eigvalsh(_tridiagonal(found)), np.arange(1, 6), rtol=1e-12
    )

  def test_start_of_zero(self):
    found = _run(np.eye(8, dtype='f'), np.zeros(8, 'f'), 5)
    self.assertEqual(found.num_steps, 0)
    self.assertEqual(found.norm, 0)
    for leaf in found[:3]:
      np.testing.assert_array_equal(leaf, 0)

  def test_operator_of_zero(self):
    found = _run(np.zeros((8, 8), 'f'), np.full(8, 2, 'f'), 5)
    self.assertEqual(found.num_steps, 1)
    np.testing.assert_array_equal(found.diagonal, 0)
    np.testing.assert_allclose(found.basis[0], 8**-0.5)

  def test_start_that_is_not_finite(self):
    found = _run(np.eye(8, dtype='f'), np.full(8, np.nan, 'f'), 5)
    self.assertTrue(np.isnan(found.norm))
    self.assertEqual(found.num_steps, 0)


class TreesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    matrix, start = _draw(18)
    self.matrix, self.start = matrix.astype('f'), start.astype('f')

  def _split(self, vector):
    a, b, c = jnp.split(vector, [12, 17])
    return {'a': a.reshape(3, 4), 'b': (b, c[0])}

  def _join(self, tree):
    a, (b, c) = tree['a'], tree['b']
    return jnp.concatenate([a.reshape(-1), b, c[None]])

  def test_equals_flat(self):
    want = _run(self.matrix, self.start, 7)
    got = jax.jit(
      lambda start: lanczos.lanczos(
        lambda v: self._split(self.matrix @ self._join(v)), start, 7
      )
    )(self._split(self.start))
    self.assertEqual(got.basis['a'].shape, (7, 3, 4))
    rows = jax.vmap(self._join)(got.basis)
    np.testing.assert_allclose(rows, want.basis, atol=3e-6)
    np.testing.assert_allclose(got.diagonal, want.diagonal, rtol=1e-5)
    np.testing.assert_allclose(got.off_diagonal, want.off_diagonal, rtol=1e-5)
    self.assertEqual(got.images, ())

  def test_small_types_are_computed_with_in_float32(self):
    seen = []

    def matvec(v):
      seen.append(v.dtype)
      return (self.matrix @ v).astype(jnp.bfloat16)

    start = jnp.asarray(self.start, jnp.bfloat16)
    found = jax.jit(lambda start: lanczos.lanczos(matvec, start, 4))(start)
    self.assertEqual(seen[0], jnp.float32)
    for leaf in (found.basis, found.diagonal, found.off_diagonal, found.norm):
      self.assertEqual(leaf.dtype, jnp.float32)
    self.assertLess(_off_orthogonal(found), 1e-6)

  def test_takes_the_widest_type(self):
    with jax.enable_x64(True):
      start = (jnp.ones(3, jnp.float32), jnp.ones(2, jnp.float64))
      found = jax.eval_shape(
        lambda start: lanczos.lanczos(lambda v: v, start, 2), start
      )
      self.assertEqual(found.basis[0].dtype, jnp.float64)

  def test_keeps_what_products_give_besides(self):
    factor = np.random.default_rng(2).normal(size=(9, 18)).astype('f')

    def matvec(v):
      image = jnp.matmul(factor, v, precision='highest')
      return image @ factor, {'image': image}

    found = jax.jit(
      lambda start: lanczos.lanczos(matvec, start, 6, has_aux=True)
    )(self.start)
    want = found.basis @ factor.T
    np.testing.assert_allclose(found.images['image'], want, atol=1e-5)

  def test_vmap_equals_a_loop(self):
    matrices = np.stack([_draw(8, seed=i)[0] for i in range(4)]).astype('f')
    starts = np.random.default_rng(3).normal(size=(4, 8)).astype('f')
    starts[1], matrices[2] = 0, np.eye(8)
    one = lambda matrix, start: lanczos.lanczos(
      lambda v: jnp.matmul(matrix, v, precision='highest'), start, 5
    )
    got = jax.jit(jax.vmap(one))(matrices, starts)
    np.testing.assert_array_equal(got.num_steps, [5, 0, 1, 5])
    for i, case in enumerate(zip(matrices, starts, strict=True)):
      want = _run(*case, 5)
      for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x[i], y, atol=1e-5)

  def test_traces_the_product_once(self):
    calls = []
    jax.jit(
      lambda start: lanczos.lanczos(
        lambda v: calls.append(1) or 2 * v, start, 9
      )
    )(self.start)
    self.assertLen(calls, 1)

  @parameterized.parameters(
    (dict(num_steps=0), 'num_steps must lie in'),
    (dict(num_steps=19), 'num_steps must lie in'),
    (dict(breakdown_tol=-1.0), 'breakdown_tol'),
    (dict(start=np.arange(18)), 'start must hold floating'),
  )
  def test_refuses(self, wrong, message):
    options = dict(start=jnp.asarray(self.start), num_steps=3) | wrong
    with self.assertRaisesRegex(ValueError, message):
      lanczos.lanczos(lambda v: v, **options)


class DevicesTest(parameterized.TestCase):
  """Entries of vectors are split over devices."""

  def _sharded(self, matvec, num_steps, axes, names, **options):
    split = jax.P(names)

    def run(start, *rest):
      return lanczos.lanczos(
        lambda v: matvec(v, *rest),
        start,
        num_steps,
        axis_name=names,
        **options,
      )

    # All but the basis is the same on each device.
    out = lanczos.Lanczos(jax.P(None, names), *[jax.P()] * 5)
    return jax.jit(
      jax.shard_map(
        run,
        mesh=mesh.make(**axes),
        in_specs=(split, jax.P(None, names)),
        out_specs=out,
      )
    )

  @parameterized.parameters(
    (dict(tensor=8), 'tensor'),
    (dict(data=2, tensor=4), ('data', 'tensor')),
  )
  def test_equal_one(self, axes, names):
    rng = np.random.default_rng(4)
    factor = rng.normal(size=(12, 40)).astype('f') / 6
    start = rng.normal(size=40).astype('f')

    def matvec(v, factor):
      image = jax.lax.psum(factor @ v, names)
      return image @ factor, image

    fn = self._sharded(matvec, 8, axes, names, has_aux=True)
    got = fn(start, factor)
    want = _run(factor.T @ factor, start, 8)
    want = want._replace(images=want.basis @ factor.T)
    for x, y in zip(got, want, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    self.assertLess(_off_orthogonal(got), 1e-6)

  @parameterized.parameters(4, 12)
  def test_sums_twice_in_a_step(self, num_steps):
    """And once for the norm of the start."""
    fn = self._sharded(
      lambda v, scale: scale[0] * v, num_steps, dict(tensor=8), 'tensor'
    )
    text = fn.lower(np.ones(40, 'f'), np.ones((1, 40), 'f')).as_text()
    before, *loops = text.split('stablehlo.while')
    self.assertLen(loops, 1)
    count = lambda text: len(re.findall(r'stablehlo\.all_reduce"?\(', text))
    # The body may stand in a function of its own, after the loop.
    self.assertEqual(count(before), 1)
    self.assertEqual(count(loops[0]), 2)

  def test_axis_that_is_not_there(self):
    with self.assertRaisesRegex(ValueError, 'axis_name must be'):
      lanczos.lanczos(lambda v: v, jnp.ones(4), 2, axis_name='tensor')

  def test_as_many_steps_as_entries_on_all_devices(self):
    fn = self._sharded(
      lambda v, scale: scale[0] * v, 8, dict(tensor=8), 'tensor'
    )
    scale = np.arange(1.0, 9.0, dtype='f')[None]
    self.assertEqual(fn(np.ones(8, 'f'), scale).num_steps, 8)

  def test_whole_arrays_that_jit_places(self):
    """Without an axis name, XLA places the sums."""
    devices = mesh.make(tensor=8)
    matrix, start = (x.astype('f') for x in _draw(40))
    want = _run(matrix, start, 8)
    start = mesh.place(start.reshape(5, 8), devices, jax.P(None, 'tensor'))
    found = jax.jit(
      lambda start: lanczos.lanczos(
        lambda v: (matrix @ v.reshape(-1)).reshape(5, 8), start, 8
      )
    )(start)
    rows = np.asarray(found.basis).reshape(8, 40)
    np.testing.assert_allclose(rows, want.basis, atol=2e-5)
