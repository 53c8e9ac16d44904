"""Tests of the streaming row log-sum-exp and of its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.test_util import check_grads

from emc2.kernels import hopper, lowering
from emc2.kernels.row_logsumexp import (
  pallas_gpu,
  pallas_tpu,
  reference,
  row_logsumexp,
)
from emc2.kernels.row_logsumexp.specs import SPECS

from tests.kernels import devices

P = jax.sharding.PartitionSpec


def oracle(rows, columns, position, scale, cotangent):
  """Value, mean and gradients of sum(cotangent * value), in float64."""
  rows, columns, scale, cotangent = (
    np.asarray(x, np.float64) for x in (rows, columns, scale, cotangent)
  )
  (n, _), c, position = rows.shape, len(columns), np.asarray(position)
  scale = np.broadcast_to(scale, n)
  value, mean = np.zeros(n), np.zeros(n)
  d_rows, d_columns = np.zeros_like(rows), np.zeros_like(columns)
  image = np.arange(c) % (c // 2)
  for a in range(n):
    negative = image != image[position[a]]
    s = columns @ rows[a]
    top = (scale[a] * s)[negative].max()
    p = np.where(negative, np.exp(np.minimum(scale[a] * s - top, 0)), 0)
    value[a] = top + np.log(p.sum())
    p /= p.sum()
    mean[a] = p @ s
    d_rows[a] = cotangent[a] * scale[a] * (p @ columns)
    d_columns += np.outer(cotangent[a] * scale[a] * p, rows[a])
  return value, mean, d_rows, d_columns, cotangent * mean


def problem(n, c, d, top_scale=20.0, dtype='float32', unit=True, seed=0):
  """Rows, columns, position, scale and cotangent; rows are some columns."""
  rng = np.random.default_rng(seed)
  columns = rng.normal(size=(c, d))
  if unit:
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
  position = np.arange(n) if n == c else rng.permutation(c)[:n]
  columns = jnp.asarray(columns, dtype)
  scale = rng.uniform(0.5, 1, size=n) * top_scale
  return (
    columns[position],
    columns,
    jnp.asarray(position, jnp.int32),
    jnp.asarray(scale, jnp.float32),
    jnp.asarray(rng.normal(size=n), jnp.float32),
  )


def gradients(rows, columns, position, scale, cotangent, **settings):
  """What `oracle` gives, from the code under test."""

  def loss(rows, columns, scale):
    out = row_logsumexp(rows, columns, position, scale, **settings)
    return jnp.sum(cotangent * out.value), out

  argnums = (0, 2) if columns is None else (0, 1, 2)
  grad = jax.jit(jax.grad(loss, argnums, has_aux=True))
  d, out = grad(rows, columns, scale)
  return *out, d[0], None if columns is None else d[1], d[-1]


def assert_close(got, want, tolerance):
  """Compares to a tolerance relative to the largest entry wanted."""
  for name, g, w in zip(
    ('value', 'mean', 'd_rows', 'd_columns', 'd_scale'), got, want, strict=True
  ):
    if g is None:
      continue
    g = np.asarray(g, np.float64)
    bound = tolerance * max(1.0, np.abs(w).max())
    np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=name)


def whole(want):
  """The oracle's gradients where rows are the columns: both roles summed."""
  value, mean, d_rows, d_columns, d_scale = want
  return value, mean, d_rows + d_columns, None, d_scale


class ReferenceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('two_images', 4, 4, 3, 1.0, True),
    ('a_shard', 5, 14, 8, 20.0, True),
    ('not_unit', 12, 12, 8, 3.0, False),
    ('blocks', 600, 4200, 5, 20.0, True),
  )
  def test_matches_float64(self, n, c, d, scale, unit):
    self._check_matches_float64(n, c, d, scale, unit)

  @parameterized.named_parameters(
    ('all_rows', 18, 18, 8, 20.0, True),
    ('one_row', 1, 6, 8, 20.0, True),
    ('cold', 12, 16, 8, 200.0, True),
    ('cold_and_not_unit', 12, 16, 8, 200.0, False),
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n, c, d, scale, unit):
    self._check_matches_float64(n, c, d, scale, unit)

  def _check_matches_float64(self, n, c, d, scale, unit):
    args = problem(n, c, d, scale, unit=unit)
    # Logits of hundreds carry the rounding of float32 into probabilities.
    tolerance = 1e-5 if scale < 100 else 2e-3
    assert_close(gradients(*args), oracle(*args), tolerance)

  @parameterized.named_parameters(
    ('two_images', 4, 3, 1.0),
    ('many', 30, 8, 20.0),
    ('cold', 30, 8, 200.0),
    ('blocks', 1100, 5, 20.0),
  )
  @pytest.mark.slow
  def test_rows_that_are_all_columns(self, n, d, scale):
    rows, _, position, *rest = args = problem(n, n, d, scale)
    got = gradients(rows, None, position, *rest)
    assert_close(got, whole(oracle(*args)), 1e-5 if scale < 100 else 2e-3)

  def test_blocks_are_used_beyond_their_size(self):
    # Guards the two cases above: they must not fit in one block.
    self.assertFalse(reference._fits_one_block(600, 4200))
    self.assertFalse(reference._fits_one_block(1100, 1100))
    self.assertTrue(reference._fits_one_block(512, 512))

  def test_position_is_not_read_without_columns(self):
    rows, _, position, *rest = problem(8, 8, 4)
    got = gradients(rows, None, None, *rest)
    want = gradients(rows, None, position, *rest)
    jax.tree.map(np.testing.assert_array_equal, got, want)

  def test_one_scale_for_all(self):
    rows, columns, position, _, _ = problem(6, 10, 4)
    one = row_logsumexp(rows, columns, position, 7.0)
    each = row_logsumexp(rows, columns, position, jnp.full(6, 7.0))
    np.testing.assert_array_equal(one.value, each.value)
    loss = lambda s: jnp.sum(row_logsumexp(rows, columns, position, s).value)
    np.testing.assert_allclose(
      jax.grad(loss)(jnp.float32(7.0)), jnp.sum(one.mean), rtol=1e-6
    )

  @pytest.mark.slow
  def test_gradients_by_finite_differences(self):
    rows, columns, position, scale, _ = problem(5, 8, 4, 2.0)
    value = lambda r, c, s: row_logsumexp(r, c, position, s).value
    check_grads(value, (rows, columns, scale), 1, ['rev'], rtol=2e-2)
    value = lambda r, s: row_logsumexp(r, None, None, s).value
    check_grads(value, (columns, jnp.full(8, 2.0)), 1, ['rev'], rtol=2e-2)

  def test_no_gradient_flows_through_the_mean(self):
    rows, _, _, scale, _ = problem(8, 8, 4)
    mean = lambda r, s: jnp.sum(row_logsumexp(r, None, None, s).mean)
    for grad in jax.grad(mean, (0, 1))(rows, scale):
      np.testing.assert_array_equal(grad, jnp.zeros_like(grad))

  def test_gradient_in_scale_is_the_mean(self):
    rows, _, _, scale, _ = problem(8, 8, 4)
    out, vjp = jax.vjp(lambda s: row_logsumexp(rows, None, None, s), scale)
    zeros = jnp.zeros_like(out.mean)
    (d_scale,) = vjp(type(out)(jnp.ones_like(out.value), zeros))
    np.testing.assert_array_equal(d_scale, out.mean)

  @pytest.mark.slow
  def test_shards_of_rows_make_up_the_whole(self):
    args = problem(24, 24, 8)
    rows, columns, position, scale, cotangent = args
    parts = [
      gradients(rows[i], columns, position[i], scale[i], cotangent[i])
      for i in (slice(0, 6), slice(6, 13), slice(13, 24))
    ]
    value, mean, d_rows, d_columns, d_scale = zip(*parts, strict=True)
    got = (
      np.concatenate(value),
      np.concatenate(mean),
      np.concatenate(d_rows),
      sum(d_columns),
      np.concatenate(d_scale),
    )
    assert_close(got, oracle(*args), 1e-5)

  def test_columns_given_equal_columns_left_out(self):
    rows, columns, *rest = problem(30, 30, 8)
    value, mean, d_rows, d_columns, d_scale = gradients(rows, columns, *rest)
    got = gradients(rows, None, *rest)
    assert_close(got, (value, mean, d_rows + d_columns, None, d_scale), 1e-6)

  def test_a_maximum_far_below_the_bound_from_norms(self):
    # All negatives lie opposite: a bound |f||f'| would be 400 too high.
    columns = jnp.asarray([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    out = row_logsumexp(columns, None, None, 200.0)
    np.testing.assert_allclose(out.value, np.log(2) - 200, rtol=1e-6)
    np.testing.assert_allclose(out.mean, -1, rtol=1e-6)

  @parameterized.parameters(None, 1)
  def test_ntxent(self, shard):
    rows, columns, position, _, _ = problem(12, 12, 6)
    batch, scale = 6, 1 / 0.07

    def loss(f):
      out = row_logsumexp(f, None if shard is None else f, position, scale)
      positive = scale * jnp.sum(f * jnp.roll(f, batch, 0), axis=1)
      return jnp.mean(jnp.logaddexp(positive, out.value) - positive)

    def peer(f):
      labels = jnp.arange(12) % batch
      # It multiplies booleans with integers, which these tests forbid.
      with jax.numpy_dtype_promotion('standard'):
        return optax.losses.ntxent(f, labels, temperature=1 / scale)

    want, d_want = jax.jit(jax.value_and_grad(peer))(columns)
    got, d_got = jax.jit(jax.value_and_grad(loss))(columns)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # The peer divides by norms, so its gradient lies in the tangent space.
    tangent = d_got - columns * jnp.sum(d_got * columns, 1, keepdims=True)
    np.testing.assert_allclose(tangent, d_want, atol=1e-5)

  @pytest.mark.slow
  def test_decoupled_gradient_scales_ntxent_row_by_row(self):
    # d NT-Xent_a = (1 - p_a^+) d decoupled_a, p^+ that of the positive.
    rows, columns, position, _, _ = problem(8, 8, 6)
    scale = 5.0

    def rowwise(f, coupled):
      value = row_logsumexp(f, None, None, scale).value
      positive = scale * jnp.sum(f * jnp.roll(f, 4, 0), axis=1)
      value = jnp.logaddexp(positive, value) if coupled else value
      return value - positive

    slope = jax.jit(jax.jacrev(rowwise), static_argnums=1)
    coupled, alone = slope(columns, True), slope(columns, False)
    factor = 1 - jnp.exp(-rowwise(columns, True))
    np.testing.assert_allclose(
      coupled, factor[:, None, None] * alone, atol=1e-5
    )

  @parameterized.parameters('bfloat16', 'float16')
  @pytest.mark.slow
  def test_half_precision_errs_no_more_than_plain_jax(self, dtype):
    args = problem(64, 64, 16, 10.0, dtype)
    want = oracle(*args)
    got = gradients(*args)
    rows, columns, position, scale, cotangent = args
    own = position[:, None] % 32 == jnp.arange(64)[None, :] % 32

    def plain(rows, columns):
      logits = scale.astype(dtype)[:, None] * (rows @ columns.T)
      value = jax.nn.logsumexp(logits, axis=1, where=~own)
      return jnp.sum(cotangent.astype(dtype) * value), value

    d, value = jax.grad(plain, (0, 1), has_aux=True)(rows, columns)
    error = lambda x, y: np.abs(np.asarray(x, np.float64) - y).max()
    self.assertLess(error(got[0], want[0]), error(value, want[0]))
    self.assertLessEqual(error(got[2], want[2]), error(d[0], want[2]))
    self.assertLessEqual(error(got[3], want[3]), error(d[1], want[3]))
    self.assertEqual(got[2].dtype, dtype)
    self.assertEqual(got[3].dtype, dtype)
    self.assertEqual(got[0].dtype, jnp.float32)

  def test_seeds_by_vmap(self):
    problems = [problem(10, 10, 4, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    rows, _, _, scale, cotangent = stacked
    run = lambda r, s, g: gradients(r, None, None, s, g)
    got = jax.vmap(run)(rows, scale, cotangent)
    for i, args in enumerate(problems):
      one = jax.tree.map(lambda x, i=i: x[i], got)
      assert_close(one, whole(oracle(*args)), 1e-5)

  @parameterized.parameters(None, 1)
  def test_memory_grows_with_rows_not_with_pairs(self, columns):
    n, d = 16_384, 128
    pairs = 4 * n * n

    def loss(f, position):
      other = f if columns else None
      return jnp.sum(row_logsumexp(f, other, position, 14.0).value)

    compiled = (
      jax.jit(jax.grad(loss))
      .lower(
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
      )
      .compile()
    )
    used = compiled.memory_analysis().temp_size_in_bytes
    self.assertLess(used, pairs / 16)

  def test_similarities_of_small_batches_are_made_once(self):
    # The backward pass asks for them again; XLA must see that they are equal.
    f = jax.ShapeDtypeStruct((512, 128), jnp.float32)
    loss = lambda f: jnp.sum(row_logsumexp(f, None, None, 14.0).value)
    compiled = jax.jit(jax.grad(loss)).lower(f).compile()
    flops = compiled.cost_analysis()['flops']
    self.assertLess(flops, 2.5 * 2 * 512 * 512 * 128)

  def test_mean_is_not_computed_for_those_who_ignore_it(self):
    f = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    value = lambda f: row_logsumexp(f, None, None, 14.0).value
    both = lambda f: tuple(row_logsumexp(f, None, None, 14.0))
    cost = lambda fn: jax.jit(fn).lower(f).compile().cost_analysis()['flops']
    self.assertLess(cost(value), cost(both))


class ShardMapTest(parameterized.TestCase):
  @parameterized.product(
    check_vma=(True, False), implementation=('auto', 'xla')
  )
  def test_eight_devices_equal_one(self, check_vma, implementation):
    args = problem(32, 32, 8)
    _, columns, position, scale, cotangent = args
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ('data',), axis_types=(auto,))

    @jax.jit
    @jax.shard_map(
      mesh=mesh,
      in_specs=(P('data'), P('data'), P(), P('data')),
      out_specs=(P('data'), P('data'), P()),
      check_vma=check_vma,
    )
    def local(f, position, scale, cotangent):
      def loss(f, scale):
        columns = jax.lax.all_gather(f, 'data', tiled=True)
        out = row_logsumexp(
          f, columns, position, scale, implementation=implementation
        )
        return jnp.sum(cotangent * out.value), out.value

      d, value = jax.grad(loss, (0, 1), has_aux=True)(f, scale)
      # Where axes are tracked, what is replicated has its sum already.
      d_scale = d[1] if check_vma else jax.lax.psum(d[1], 'data')
      return value, d[0], d_scale

    scale = jnp.float32(14.0)
    value, d_f, d_scale = local(columns, position, scale, cotangent)
    want = oracle(columns, columns, position, 14.0, cotangent)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    np.testing.assert_allclose(d_f, want[2] + want[3], atol=1e-4)
    np.testing.assert_allclose(d_scale, want[4].sum(), rtol=1e-4)

  @parameterized.parameters('float32', 'bfloat16')
  @pytest.mark.slow
  def test_kernels_lower_inside(self, dtype):
    for platform, kind in lowering.KINDS.items():
      chip = jax.sharding.AbstractDevice(kind, 1, platform)
      mesh = jax.sharding.AbstractMesh(
        (8,),
        ('data',),
        axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=chip,
      )

      @jax.shard_map(
        mesh=mesh, in_specs=(P('data'), P('data')), out_specs=P('data')
      )
      def local(f, position):
        def loss(f):
          columns = jax.lax.all_gather(f, 'data', tiled=True)
          return jnp.sum(row_logsumexp(f, columns, position, 14.0).value)

        return jax.grad(loss)(f)

      f = jax.ShapeDtypeStruct((512, 128), dtype)
      position = jax.ShapeDtypeStruct((512,), jnp.int32)
      with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(local).trace(f, position)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
      found = 'row_logsumexp_pull' in text
      self.assertEqual(found, platform != 'cpu', platform)
      # The gather and its transpose are the caller's; there is no other.
      self.assertEqual(text.count('"stablehlo.all_gather"'), 1)
      self.assertEqual(text.count('"stablehlo.reduce_scatter"'), 1)
      self.assertNotIn('all_reduce', text)


class LoweringTest(parameterized.TestCase):
  """What the real shapes become on chips that are not here."""

  def _text(self, spec, platform, kind=None, **settings):
    *abstract, scale = spec.args()

    def loss(rows, columns, position, scale):
      out = row_logsumexp(rows, columns, position, scale, **settings)
      return jnp.sum(out.value)

    argnums = (0, 3) if abstract[1] is None else (0, 1, 3)
    lowered = lowering.lower_for(
      jax.grad(loss, argnums), *abstract, scale, platform=platform, kind=kind
    )
    return lowered.as_text()

  def _assert_kernels(self, text, target, spec):
    """One kernel forward; back one, or two where columns are apart."""
    back = 1 if spec.rows == 2 * spec.batch else 2
    calls = [line for line in text.splitlines() if target in line]
    count = lambda name: sum(name in line for line in calls)
    self.assertEqual(count('row_logsumexp_forward'), 1)
    self.assertEqual(count('row_logsumexp_pull'), back)
    self.assertLen(calls, 1 + back)

  @parameterized.product(
    name=sorted(SPECS),
    kind=('TPU v6 lite',),
  )
  def test_tpu(self, name, kind):
    spec = SPECS[name]
    text = self._text(spec, 'tpu', kind)
    self._assert_kernels(text, '@tpu_custom_call', spec)

  def test_gpu(self):
    self._check_gpu('imagenet100_resnet50')

  @parameterized.parameters(*sorted(set(SPECS) - {'stl10_resnet18'}))
  @pytest.mark.slow
  def test_gpu_at_all_shapes(self, name):
    self._check_gpu(name)

  def _check_gpu(self, name):
    spec = SPECS[name]
    text = self._text(spec, 'cuda', 'NVIDIA H200')
    self._assert_kernels(text, '@mosaic_gpu', spec)

  @parameterized.named_parameters(
    ('cpu', 'imagenet100_resnet50', 'cpu', None),
    ('gpu_without_these_instructions', 'imagenet100_resnet50', 'cuda', 'A100'),
    ('gpu_too_many_features', 'stl10_resnet18', 'cuda', None),
  )
  def test_auto_takes_the_reference(self, name, platform, kind):
    text = self._text(SPECS[name], platform, kind)
    self.assertNotIn('custom_call @mosaic_gpu', text)
    self.assertNotIn('tpu_custom_call', text)
    self.assertIn('dot_general', text)

  @parameterized.parameters('tpu', 'cuda')
  def test_named_xla_is_no_kernel(self, platform):
    text = self._text(
      SPECS['imagenet100_resnet50'], platform, implementation='xla'
    )
    self.assertNotIn('row_logsumexp_pull', text)
    self.assertIn('dot_general', text)

  def test_gpu_kernel_refuses_a_chip_without_its_instructions(self):
    with self.assertRaisesRegex(NotImplementedError, 'Hopper'):
      self._text(
        SPECS['imagenet100_resnet50'],
        'cuda',
        'NVIDIA A100-SXM4-80GB',
        implementation='pallas_gpu',
      )

  @parameterized.parameters('tpu', 'cuda')
  def test_seeds_share_one_kernel(self, platform):
    f = jax.ShapeDtypeStruct((3, 64, 16), jnp.float32)
    loss = lambda f: jnp.sum(row_logsumexp(f, None, None, 14.0).value)
    text = lowering.lower_for(
      jax.vmap(jax.grad(loss)), f, platform=platform
    ).as_text()
    target = '@tpu_custom_call' if platform == 'tpu' else '@mosaic_gpu'
    self._assert_kernels(text, target, SPECS['imagenet100_resnet50'])

  @parameterized.parameters(('tpu', 'pallas_tpu'), ('cuda', 'pallas_gpu'))
  def test_named_kernel_is_that_kernel(self, platform, implementation):
    spec = SPECS['imagenet100_resnet50']
    text = self._text(spec, platform, implementation=implementation)
    target = '@tpu_custom_call' if platform == 'tpu' else '@mosaic_gpu'
    self._assert_kernels(text, target, spec)


class TpuKernelTest(parameterized.TestCase):
  """Interpreted."""

  def _run(self, rows, columns, position, scale, cotangent):
    c = (rows if columns is None else columns).shape[0]
    image = position % (c // 2)
    forward, backward = (
      jax.jit(functools.partial(function, interpret=True))
      for function in (pallas_tpu.forward, pallas_tpu.backward)
    )
    value, mean = forward(rows, columns, image, scale)
    d_rows, d_columns = backward(rows, columns, image, scale, value, cotangent)
    return value, mean, d_rows, d_columns, cotangent * mean

  @parameterized.named_parameters(
    ('a_shard', 20, 40, 16, 20.0), ('tiles', 300, 1100, 16, 20.0)
  )
  def test_matches_float64(self, n, c, d, scale):
    self._check_matches_float64(n, c, d, scale)

  @parameterized.named_parameters(
    ('two_images', 4, 4, 3, 1.0),
    ('one_tile', 64, 64, 128, 20.0),
    ('cold', 64, 96, 16, 200.0),
    ('many_features', 16, 24, 1100, 20.0),
  )
  @pytest.mark.slow
  def test_matches_float64_elsewhere(self, n, c, d, scale):
    self._check_matches_float64(n, c, d, scale)

  def _check_matches_float64(self, n, c, d, scale):
    args = problem(n, c, d, scale)
    tolerance = 1e-5 if scale < 100 else 2e-3
    assert_close(self._run(*args), oracle(*args), tolerance)

  def test_rows_that_are_all_columns(self):
    self._check_rows_that_are_all_columns(4, 3)

  @pytest.mark.slow
  def test_rows_that_are_all_columns_of_many_tiles(self):
    self._check_rows_that_are_all_columns(600, 16)

  def _check_rows_that_are_all_columns(self, n, d):
    rows, _, position, *rest = args = problem(n, n, d)
    got = self._run(rows, None, position, *rest)
    assert_close(got, whole(oracle(*args)), 1e-5)

  def test_opposite_negatives_do_not_overflow(self):
    columns = jnp.asarray([[1.0, 0], [-1, 0], [1, 0], [-1, 0]])
    ones = jnp.ones(4)
    args = columns, columns, jnp.arange(4), 200 * ones, ones
    assert_close(self._run(*args), oracle(*args), 1e-5)

  @pytest.mark.slow
  def test_bfloat16(self):
    args = problem(64, 96, 32, 10.0, 'bfloat16')
    got, want = self._run(*args), oracle(*args)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for g, w in zip(got[2:4], want[2:4], strict=True):
      self.assertEqual(g.dtype, jnp.bfloat16)
      error = np.abs(np.asarray(g, np.float64) - w).max()
      self.assertLess(error, 2**-8 * np.abs(w).max())

  def test_too_many_features(self):
    rows, columns, position, scale, _ = problem(4, 4, 2049)
    with self.assertRaisesRegex(NotImplementedError, '2048 features, got 2049'):
      row_logsumexp(rows, columns, position, scale, implementation='pallas_tpu')


def gpu_interpreter():
  """Parameters of Mosaic GPU's interpreter, which JAX 0.10 does not export."""
  if hasattr(plgpu, 'InterpretGPUParams'):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


class GpuKernelTest(parameterized.TestCase):
  """Interpreted: all but the matrix instructions themselves."""

  @pytest.mark.slow
  def test_matches_float64(self):
    rows, columns, position, scale, cotangent = args = problem(6, 70, 16)
    stats, interpret = (position % 35, scale), gpu_interpreter()
    value, mean = pallas_gpu.forward(rows, columns, *stats, interpret=interpret)
    d_rows, d_columns = pallas_gpu.backward(
      rows, columns, *stats, value, cotangent, interpret=interpret
    )
    got = value, mean, d_rows, d_columns, cotangent * mean
    # Products of two numbers of 16 bits each.
    assert_close(got, oracle(*args), 2e-4)

  def test_parts_add_up(self):
    x = problem(64, 64, 16)[0]
    high, low = jax.jit(hopper.split, static_argnums=1)(x, 2)
    total = np.asarray(high, np.float64) + np.asarray(low, np.float64)
    np.testing.assert_allclose(total, x, rtol=2**-16)
    # One part alone is much worse: the lower one must not be optimised away.
    self.assertGreater(np.abs(np.asarray(high, np.float64) - x).max(), 2**-12)

  @pytest.mark.slow
  def test_rows_that_are_all_columns(self):
    rows, _, position, scale, cotangent = args = problem(70, 70, 16)
    value, _, want, *_ = whole(oracle(*args))
    got, _ = pallas_gpu.backward(
      rows,
      None,
      position % 35,
      scale,
      jnp.asarray(value, jnp.float32),
      cotangent,
      interpret=gpu_interpreter(),
    )
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())

  def test_too_many_features(self):
    rows, columns, position, scale, _ = problem(4, 4, 257)
    with self.assertRaisesRegex(NotImplementedError, '256 features, got 257'):
      row_logsumexp(rows, columns, position, scale, implementation='pallas_gpu')


class DeviceTest(parameterized.TestCase):
  """Each named implementation, compiled and run where its chip is here."""

  @parameterized.parameters(*devices.runnable())
  def test_matches_float64(self, implementation, platform):
    self._check_float64(implementation, platform, 'float32', 64, 64, 128)

  @parameterized.parameters(
    (name, platform, dtype, *shape)
    for name, platform in devices.runnable()
    for dtype in ('float32', 'bfloat16')
    for shape in ((64, 64, 128), (100, 330, 40), (512, 512, 128), (8, 8, 256))
  )
  @pytest.mark.slow
  def test_matches_float64_at_all_shapes(self, *case):
    self._check_float64(*case)

  def _check_float64(self, implementation, platform, dtype, n, c, d):
    args = problem(n, c, d, 20.0, dtype)
    with jax.default_device(jax.devices(platform)[0]):
      args = jax.device_put(args)
      settings = {'implementation': implementation}
      got = gradients(*args, **settings)
      tolerance = 1e-2 if dtype == 'bfloat16' else 2e-4
      assert_close(got, oracle(*args), tolerance)
      if n == c:
        rows, _, position, *rest = args
        got = gradients(rows, None, position, *rest, **settings)
        assert_close(got, whole(oracle(*args)), tolerance)


class ErrorTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('rows_rank', {'rows': np.ones(4, 'f')}, 'rows must be a float array'),
    ('rows_dtype', {'rows': np.ones((4, 3), 'i')}, 'rows must be a float arr'),
    ('columns_rank', {'columns': np.ones(3, 'f')}, r'columns must be \(c, 3\)'),
    ('features', {'columns': np.ones((4, 2), 'f')}, r'columns must be \(c, 3'),
    ('columns_dtype', {'columns': np.ones((4, 3), 'e')}, 'the dtype of rows'),
    ('odd', {'columns': np.ones((5, 3), 'f')}, 'in pairs of views, got 5'),
    ('one_image', {'columns': np.ones((2, 3), 'f')}, 'at least 2 images'),
    ('no_position', {'position': None}, 'position must be given'),
    ('position_shape', {'position': np.arange(3)}, r'int array of shape \(4,'),
    ('position_dtype', {'position': np.ones(4, 'f')}, 'position must be an in'),
    ('scale_shape', {'scale': np.ones(3, 'f')}, r'one or of shape \(4,\)'),
    ('scale_dtype', {'scale': 3}, 'scale must be a float'),
    ('implementation', {'implementation': 'cuda'}, "'cuda' is not one of auto"),
  )
  def test_wrong_input(self, wrong, message):
    args = {
      'rows': np.ones((4, 3), 'f'),
      'columns': np.ones((4, 3), 'f'),
      'position': np.arange(4, dtype=np.int32),
      'scale': 2.0,
    } | wrong
    with self.assertRaisesRegex(ValueError, message):
      row_logsumexp(**args)

  def test_one_image_without_columns(self):
    with self.assertRaisesRegex(ValueError, 'at least 2 images'):
      row_logsumexp(np.ones((2, 3), 'f'), None, None, 1.0)

  @parameterized.parameters('pallas_tpu', 'pallas_gpu')
  def test_a_kernel_of_another_platform(self, implementation):
    with self.assertRaises(NotImplementedError):
      jax.jit(
        lambda f: row_logsumexp(
          f, None, None, 1.0, implementation=implementation
        )
      ).lower(jax.ShapeDtypeStruct((4, 3), jnp.float32)).as_text()
