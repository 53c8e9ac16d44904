"""The decoder is LLaMA's, whole or split, however its layers are run."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from emc2 import mesh as mesh_lib
from emc2.experiments.models import decoder

TINY = decoder.Config(
  vocab_size=24, width=16, num_layers=3, num_heads=4, mlp_width=24
)
GROUPED = dataclasses.replace(TINY, num_kv_heads=2)
DRAWN = decoder.Config(
  vocab_size=500, width=64, num_layers=8, num_heads=4, mlp_width=128
)
P = jax.sharding.PartitionSpec


@functools.cache
def _drawn():
  draw = jax.jit(functools.partial(decoder.draw_params, DRAWN))
  return draw(jax.random.key(0)), draw(jax.random.key(1))


def _apply_fn(config, **kwargs):
  build = lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))
  return decoder.split(nnx.eval_shape(build), **kwargs).apply_fn


def _abstract(config):
  draw = functools.partial(decoder.draw_params, config)
  return jax.eval_shape(draw, jax.random.key(0))


def _params(config, std=0.5, seed=0):
  """Weights large enough that every term of the forward pass shows."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if 'norm' in path[-1].key:
      value = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      value = std * rng.normal(size=leaf.shape)
    return jnp.asarray(value, leaf.dtype)

  return jax.tree.map_with_path(draw, _abstract(config))


def _tokens(batch=2, length=10, vocab_size=24, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(vocab_size, size=(batch, length)), jnp.int32)


def _placements(mesh, specs):
  return jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda x: isinstance(x, P),
  )


def _loss_fn(apply_fn):
  return lambda params, tokens: decoder.next_token_loss(
    apply_fn(params, tokens), tokens
  )


def _count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@functools.cache
def _grad_fn(config):
  """One compiled function for all tests that take gradients on one device."""
  return jax.jit(jax.value_and_grad(_loss_fn(_apply_fn(config))))


def numpy_logits(config, params, row):
  """The forward pass of one row of tokens (s,), one head at a time."""
  p = jax.tree.map(np.float64, params)
  h, n, d = config.width, config.num_heads, config.width // config.num_heads
  group = n // (config.num_kv_heads or n)
  length = len(row)
  angles = np.array(
    [
      [pos * config.rope_base ** (-2 * j / d) for j in range(d // 2)]
      for pos in range(length)
    ]
  )
  angles = np.concatenate([angles, angles], axis=1)

  def norm(x, weight):
    return weight * x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5)

  def rope(z):
    rotated = np.concatenate([-z[:, d // 2 :], z[:, : d // 2]], axis=1)
    return z * np.cos(angles) + rotated * np.sin(angles)

  x = p['embedding'][row]
  for number in range(config.num_layers):
    w = {name: weight[number] for name, weight in p['layers'].items()}
    if group == 1:
      w_q, w_k, w_v = (w['qkv'][:, c] for c in range(3))
    else:
      w_q, w_k, w_v = w['q'], w['kv'][:, 0], w['kv'][:, 1]
    y = norm(x, w['attention_norm'])
    total = np.zeros((length, h))
    for head in range(n):
      q = rope(y @ w_q[:, head])
      k = rope(y @ w_k[:, head // group])
      v = y @ w_v[:, head // group]
      for i in range(length):
        scores = k[: i + 1] @ q[i] / math.sqrt(d)
        weights = np.exp(scores - scores.max())
        total[i] += weights / weights.sum() @ v[: i + 1] @ w['out'][head]
    x = x + total
    y = norm(x, w['mlp_norm'])
    g, u = y @ w['gate_up'][:, 0], y @ w['gate_up'][:, 1]
    x = x + (g / (1 + np.exp(-g)) * u) @ w['down']
  head = p['embedding'].T if config.tied else p['head']
  return norm(x, p['norm']) @ head


class ForwardTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('plain', TINY),
    ('grouped', GROUPED),
    ('tied', dataclasses.replace(TINY, tied=True)),
  )
  def test_matches_numpy(self, config):
    self._check_matches_numpy(config)

  @parameterized.named_parameters(
    ('one_key', dataclasses.replace(TINY, num_kv_heads=1)),
    ('base', dataclasses.replace(TINY, rope_base=50.0)),
    ('unrolled', dataclasses.replace(TINY, unroll=2)),
    ('one_layer', dataclasses.replace(TINY, num_layers=1, unroll=4)),
  )
  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self, config):
    self._check_matches_numpy(config)

  def _check_matches_numpy(self, config):
    params, tokens = _params(config), _tokens()
    got = jax.jit(_apply_fn(config))(params, tokens)
    self.assertEqual((got.shape, got.dtype), ((2, 10, 24), jnp.float32))
    for row in range(2):
      want = numpy_logits(config, params, np.asarray(tokens[row]))
      self.assertGreater(np.ptp(want), 1)
      np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)

  def test_is_causal(self):
    params, tokens = _params(GROUPED), np.array(_tokens(1))
    apply_fn = jax.jit(_apply_fn(GROUPED))
    logits = np.asarray(apply_fn(params, tokens))
    for place in (0, 4, 9):
      other = tokens.copy()
      other[0, place] = (other[0, place] + 1) % 24
      changed = np.asarray(apply_fn(params, other))
      np.testing.assert_array_equal(changed[:, :place], logits[:, :place])
      moved = np.max(np.abs(changed - logits)[0, place:], axis=1)
      self.assertGreater(np.min(moved), 1e-4)

  def test_dtype_of_the_activations(self):
    config = dataclasses.replace(TINY, dtype='bfloat16')
    params, tokens = _params(TINY, std=0.2), _tokens()
    # JAX's own attention promotes bfloat16 inside.
    with jax.numpy_dtype_promotion('standard'):
      got = jax.jit(_apply_fn(config))(params, tokens)
    self.assertEqual(got.dtype, jnp.float32)
    # The last product is rounded before it is widened.
    rounded = np.float32(np.asarray(got).astype(jnp.bfloat16))
    np.testing.assert_array_equal(got, rounded)
    for row in range(2):
      want = numpy_logits(TINY, params, np.asarray(tokens[row]))
      # Sums of some 16 products, each rounded to 8 bits.
      np.testing.assert_allclose(got[row], want, atol=0.1)

  @parameterized.parameters('float32', 'bfloat16')
  def test_dtype_of_the_parameters(self, name):
    config = dataclasses.replace(TINY, param_dtype=name)
    for leaf in jax.tree.leaves(_abstract(config)):
      self.assertEqual(leaf.dtype, jnp.dtype(name))

  @parameterized.parameters(*decoder.ATTENTION)
  def test_attention_is_passed_on(self, name):
    config = dataclasses.replace(TINY, attention=name)
    asked = []

    def attend(q, k, v, *, is_causal, implementation):
      asked.append(implementation)
      return q

    with mock.patch.object(jax.nn, 'dot_product_attention', attend):
      jax.eval_shape(_apply_fn(config), _abstract(config), _tokens())
    self.assertEqual(set(asked), {name})

  def test_a_token_outside_shows(self):
    params, apply_fn = _params(TINY), jax.jit(_apply_fn(TINY))
    for wrong in (24, -25):
      tokens = np.array(_tokens())
      tokens[1, 5] = wrong
      finite = np.isfinite(apply_fn(params, tokens))
      self.assertTrue(finite[0].all())
      self.assertFalse(finite[1, 5:].any())

  @parameterized.parameters(
    ((2, 3, 1), jnp.int32, r'int32 of shape \(2, 3, 1\)'),
    ((2, 3), jnp.float32, 'float32'),
  )
  def test_refuses(self, shape, dtype, message):
    tokens = jax.ShapeDtypeStruct(shape, dtype)
    with self.assertRaisesRegex(ValueError, f'tokens must be .* {message}'):
      jax.eval_shape(_apply_fn(TINY), _abstract(TINY), tokens)


class RotaryTest(parameterized.TestCase):
  def test_depends_on_distance_only(self):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 3, 8))
    repeat = lambda z: jnp.asarray(np.repeat(z, 20, axis=1), jnp.float32)
    tables = decoder.rotary_tables(20, 8)
    q, k = (
      decoder.rotate(repeat(q), *tables),
      decoder.rotate(repeat(k), *tables),
    )
    products = np.einsum('bsnd,btnd->nst', q, k)
    for distance in range(-19, 20):
      diagonal = np.diagonal(products, distance, axis1=1, axis2=2)
      np.testing.assert_allclose(np.ptp(diagonal, axis=1), 0, atol=1e-5)
    self.assertGreater(np.ptp(products[0, 0]), 0.1)

  def test_turns(self):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3, 8)))
    turned = decoder.rotate(z, *decoder.rotary_tables(7, 8))
    np.testing.assert_allclose(
      np.linalg.norm(turned, axis=-1), np.linalg.norm(z, axis=-1), rtol=1e-6
    )
    np.testing.assert_array_equal(turned[:, 0], z[:, 0])

  def test_far_positions_keep_their_angles(self):
    z = jnp.ones((1, 4096, 1, 128), jnp.bfloat16)
    turned = decoder.rotate(z, *decoder.rotary_tables(4096, 128))
    self.assertEqual(turned.dtype, jnp.bfloat16)
    want = np.cos(4095.0) - np.sin(4095.0), np.cos(4095.0) + np.sin(4095.0)
    got = np.float32(turned[0, -1, 0, [0, 64]])
    np.testing.assert_allclose(got, want, atol=0.01)


class NormTest(parameterized.TestCase):
  def test_multiplies_after_the_cast(self):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.bfloat16)
    weight = jnp.asarray(rng.uniform(0.5, 2, 64), jnp.bfloat16)
    wide = np.float64(x)
    unit = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    unit = np.float64(jnp.asarray(unit, jnp.bfloat16))
    want = jnp.asarray(unit * np.float64(weight), jnp.bfloat16)
    got = decoder.rms_norm(x, weight)
    self.assertEqual(got.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(got, want)

  def test_of_small_rows(self):
    x = jnp.full((1, 1, 4), 1e-3)
    want = 1e-3 / np.sqrt(1e-6 + 1e-5)
    np.testing.assert_allclose(
      decoder.rms_norm(x, jnp.ones(4)), np.full((1, 1, 4), want), rtol=1e-5
    )


class LossTest(parameterized.TestCase):
  def test_matches_numpy(self):
    self._check_matches_numpy(7)

  @pytest.mark.slow
  def test_matches_numpy_elsewhere(self):
    self._check_matches_numpy(6)

  def _check_matches_numpy(self, given):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 5)).astype(np.float32)
    tokens = rng.integers(5, size=(2, given))
    losses = []
    for row in range(2):
      for place in range(given - 1):
        z = np.float64(logits[row, place])
        losses.append(np.log(np.exp(z).sum()) - z[tokens[row, place + 1]])
    got = decoder.next_token_loss(
      jnp.asarray(logits), jnp.asarray(tokens, jnp.int32)
    )
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-6)

  def test_is_float32(self):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 9)))
    half = logits.astype(jnp.bfloat16)
    got = decoder.next_token_loss(half, jnp.zeros((1, 4), jnp.int32))
    want = decoder.next_token_loss(
      half.astype(jnp.float32), jnp.zeros((1, 4), jnp.int32)
    )
    self.assertEqual((got.dtype, float(got)), (jnp.float32, float(want)))

  @parameterized.parameters((6, 5), (6, 8), (1, 1))
  def test_refuses(self, length, given):
    with self.assertRaisesRegex(ValueError, f'tokens must .* got {given}'):
      decoder.next_token_loss(
        jnp.zeros((1, length, 3)), jnp.zeros((1, given), jnp.int32)
      )


class InitTest(parameterized.TestCase):
  def test_loss_is_that_of_a_guess(self):
    loss_fn = jax.jit(_loss_fn(_apply_fn(DRAWN)))
    loss = loss_fn(_drawn()[0], _tokens(4, 33, 500))
    np.testing.assert_allclose(loss, math.log(500), atol=0.05)

  def test_deviations(self):
    params, other = _drawn()
    layers = params['layers']
    plain = (
      params['embedding'],
      params['head'],
      layers['qkv'],
      layers['gate_up'],
    )
    for leaf in plain:
      np.testing.assert_allclose(np.std(leaf), 0.021, rtol=0.02)
      np.testing.assert_allclose(np.mean(leaf), 0, atol=5e-4)
    for leaf in (layers['out'], layers['down']):
      np.testing.assert_allclose(np.std(leaf), 0.021 / 4, rtol=0.02)
    for leaf in (layers['attention_norm'], layers['mlp_norm'], params['norm']):
      np.testing.assert_array_equal(leaf, np.ones_like(leaf))
    values = np.concatenate([np.ravel(leaf)[:100] for leaf in plain])
    self.assertLen(np.unique(values), 400)
    self.assertFalse(np.array_equal(other['embedding'], params['embedding']))

  @parameterized.parameters(
    # 2Vh + h + L (4h^2 + 3hi + 2h), and Vh less where the head is tied.
    ('small', 113_472),
    ('gpt2_small', 123_587_328),
    ('llama_7b', 6_738_415_616),
  )
  def test_size_of_a_preset(self, name, want):
    self.assertEqual(_count(_abstract(decoder.PRESETS[name])), want)

  def test_size_of_llama_70b(self):
    config = decoder.Config(
      vocab_size=32_000,
      width=8192,
      num_layers=80,
      num_heads=64,
      num_kv_heads=8,
      mlp_width=28_672,
    )
    self.assertEqual(_count(_abstract(config)), 68_976_648_192)

  @parameterized.parameters(
    (dict(vocab_size=0), 'vocab_size must be at least 1, got 0'),
    (dict(num_layers=0), 'num_layers must be at least 1'),
    (dict(num_kv_heads=0), 'num_kv_heads must be at least 1'),
    (dict(unroll=0), 'unroll must be at least 1'),
    (dict(num_heads=16), 'width must .* width 16 and num_heads 16'),
    (dict(num_kv_heads=3), 'num_kv_heads must divide num_heads, got .* 3'),
    (dict(init_std=0.0), 'init_std must be positive, got 0.0'),
    (dict(rope_base=math.inf), 'rope_base must be positive, got inf'),
    (dict(dtype='int32'), 'dtype must be a float dtype, got int32'),
    (dict(param_dtype='int8'), 'param_dtype must be a float dtype'),
    (dict(remat='some'), "remat must be one of .*'full'.* got 'some'"),
    (dict(attention='flash'), "attention must be one of .* got 'flash'"),
  )
  def test_refuses(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(TINY, **change)


class LayersTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_remat_changes_nothing(self):
    params, tokens = _params(TINY, std=0.2), _tokens(8)
    loss, grads = _grad_fn(TINY)(params, tokens)
    for change in (dict(remat='selective'), dict(remat='full', unroll=2)):
      config = dataclasses.replace(TINY, **change)
      other_loss, other_grads = _grad_fn(config)(params, tokens)
      np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        other_grads,
        grads,
      )

  def test_remat_keeps_less(self):
    """What the backward pass is handed, layers stacked, by its shapes."""
    kept = {}
    for remat in decoder.REMAT:
      config = dataclasses.replace(TINY, remat=remat)
      apply_fn, tokens = _apply_fn(config), _tokens()
      vjp = jax.eval_shape(
        lambda p, f=apply_fn, t=tokens: jax.vjp(lambda q: f(q, t), p)[1],
        _abstract(config),
      )
      kept[remat] = [leaf.shape for leaf in jax.tree.leaves(vjp)]
    has_scores = {
      remat: any(shape[-2:] == (10, 10) for shape in shapes)
      for remat, shapes in kept.items()
    }
    self.assertEqual(has_scores, dict(none=True, selective=False, full=False))
    count = lambda remat, width: kept[remat].count((3, 2, 10, width))
    self.assertGreater(count('none', 24), 2)
    self.assertEqual(count('selective', 24), 2)  # The gate and its factor.
    self.assertGreater(count('selective', 16), 1)
    self.assertEqual((count('full', 16), count('full', 24)), (1, 0))

  def test_program_does_not_grow(self):
    def lower(**change):
      config = dataclasses.replace(TINY, **change)
      step = jax.jit(jax.grad(_loss_fn(_apply_fn(config))))
      return step.lower(_abstract(config), _tokens()).as_text()

    short, long = lower(num_layers=4), lower(num_layers=64)
    self.assertLess(len(long), 1.02 * len(short))  # The digits of sizes.
    self.assertEqual(short.count('stablehlo.while'), 2)
    whole = lower(num_layers=4, unroll=4)
    self.assertEqual(whole.count('stablehlo.while'), 0)


class ShardingTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_equals_one_device(self):
    self.check(TINY, dict(fsdp=4, tensor=2), sequence_parallel=True)

  @pytest.mark.slow
  def test_equals_one_device_with_few_keys(self):
    config = dataclasses.replace(GROUPED, tied=True)
    self.check(config, dict(fsdp=2, tensor=4), sequence_parallel=False)

  def check(self, config, axes, *, sequence_parallel):
    mesh = mesh_lib.make(**axes)
    specs = decoder.shardings(config, mesh)
    params, tokens = _params(config, std=0.2), _tokens(8)
    want_loss, want = _grad_fn(config)(params, tokens)
    apply_fn = _apply_fn(config, mesh=mesh, sequence_parallel=sequence_parallel)
    run = jax.value_and_grad(_loss_fn(apply_fn))
    out_shardings = (None, _placements(mesh, specs))
    params = mesh_lib.place(params, mesh, specs)
    tokens = mesh_lib.place(tokens, mesh, P('fsdp'))
    step = jax.jit(run, out_shardings=out_shardings)
    step = step.lower(params, tokens).compile()
    loss, grads = step(params, tokens)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      grads,
      want,
    )
    # No device has the residual stream of the whole batch: weights travel.
    self.assertNotIn('f32[8,10,16]', step.as_text())
    # Two in each layer forwards and backwards, the layers in two loops; and the
    # last. Without the option the residual stream is whole on the tensor axis.
    gathers = re.findall(r'f32\[2,10,16\]\S* all-gather\(', step.as_text())
    self.assertLen(gathers, 5 if sequence_parallel else 0)

  def test_draws_the_same_parameters(self):
    mesh = mesh_lib.make(fsdp=4, tensor=2)
    there = _placements(mesh, decoder.shardings(DRAWN, mesh))
    draw = functools.partial(decoder.draw_params, DRAWN)
    split = jax.jit(draw, out_shardings=there)(jax.random.key(0))
    self.assertEqual(split['head'].sharding.shard_shape((64, 500)), (16, 250))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      split,
      _drawn()[0],
    )

  def test_takes_an_abstract_mesh(self):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((4, 2), ('data', 'tensor'), kinds)
    apply_fn = _apply_fn(TINY, mesh=mesh)
    tokens = jax.ShapeDtypeStruct((8, 10), jnp.int32)
    logits = jax.eval_shape(apply_fn, _abstract(TINY), tokens)
    self.assertEqual(logits.shape, (8, 10, 24))

  def test_specs(self):
    mesh = jax.sharding.AbstractMesh((2, 4, 2), ('data', 'fsdp', 'tensor'))
    want = {
      'embedding': P('tensor', 'fsdp'),
      'head': P('fsdp', 'tensor'),
      'norm': P('fsdp'),
      'layers': {
        'attention_norm': P(None, 'fsdp'),
        'mlp_norm': P(None, 'fsdp'),
        'qkv': P(None, 'fsdp', None, 'tensor', None),
        'out': P(None, 'tensor', None, 'fsdp'),
        'gate_up': P(None, 'fsdp', None, 'tensor'),
        'down': P(None, 'tensor', 'fsdp'),
      },
    }
    config = decoder.PRESETS['llama_7b']
    self.assertEqual(decoder.shardings(config, mesh), want)
    without = lambda spec: P(*(None if a == 'fsdp' else a for a in spec))
    is_spec = lambda x: isinstance(x, P)
    self.assertEqual(
      decoder.shardings(config, mesh, fsdp=False),
      jax.tree.map(without, want, is_leaf=is_spec),
    )
    mesh = jax.sharding.AbstractMesh((8,), ('data',))
    for spec in jax.tree.leaves(decoder.shardings(config, mesh)):
      self.assertEqual(set(spec), {None})

  @parameterized.parameters((1, 2, 'tensor'), (2, 2, 'tensor'), (4, 2, None))
  def test_keys_of_groups(self, tensor, num_kv_heads, want):
    config = dataclasses.replace(GROUPED, num_kv_heads=num_kv_heads)
    mesh = jax.sharding.AbstractMesh((tensor,), ('tensor',))
    layers = decoder.shardings(config, mesh)['layers']
    self.assertEqual(layers['kv'], P(None, None, None, want, None))
    self.assertEqual(layers['q'], P(None, None, 'tensor', None))

  @parameterized.parameters(
    (dict(fsdp=3), {}, "width must be a multiple of mesh axis 'fsdp', 3"),
    (dict(tensor=4), dict(vocab_size=30), 'vocab_size must .* 4, got 30'),
    (dict(tensor=8), {}, 'num_heads must .* 8, got 4'),
    (dict(tensor=4), dict(mlp_width=26), 'mlp_width must .* 4, got 26'),
    (
      dict(tensor=3),
      dict(num_heads=6, num_kv_heads=2, width=24),
      'num_kv_heads must .* 3, got 2',
    ),
  )
  def test_refuses(self, axes, change, message):
    config = dataclasses.replace(TINY, **change)
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    with self.assertRaisesRegex(ValueError, message):
      decoder.shardings(config, mesh)


class SplitTest(parameterized.TestCase):
  def test_equals_the_module(self):
    model = nnx.eval_shape(lambda: decoder.Decoder(TINY, rngs=nnx.Rngs(0)))
    nnx.update(model, _params(TINY))
    params, apply_fn = decoder.split(model)
    got = jax.jit(apply_fn)(params, _tokens())
    want = jax.jit(lambda tokens: model(tokens))(_tokens())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for path, leaf in jax.tree.leaves_with_path(params):
      self.assertIsInstance(leaf, jax.Array)
      for key in path:
        self.assertIsInstance(key.key, str)

  @pytest.mark.slow
  def test_learns(self):
    # A row counts modulo 24 in steps of its own, which its second token tells.
    starts, steps, places = np.ogrid[:24:6, 1:8:6, :10]
    rows = ((starts + steps * places) % 24).reshape(8, 10)
    tokens, grad_fn = jnp.asarray(rows, jnp.int32), _grad_fn(TINY)
    params = jax.tree.map(np.asarray, _params(TINY, std=0.1))
    sums = jax.tree.map(np.zeros_like, params)
    losses = []
    for _ in range(200):
      loss, grads = grad_fn(params, tokens)
      losses.append(float(loss))
      sums = jax.tree.map(lambda m, g: 0.9 * m + np.asarray(g), sums, grads)
      params = jax.tree.map(lambda p, m: p - np.float32(0.05) * m, params, sums)
    self.assertGreater(losses[0], 3)
    # Which of two steps it is only the second token of a row says.
    least = math.log(2) / 9
    self.assertBetween(losses[-1], least - 1e-3, least + 0.05)

  def test_the_largest_preset_lowers(self):
    self._check_the_largest_preset_lowers('tpu')

  @parameterized.parameters('cpu', 'cuda')
  @pytest.mark.slow
  def test_the_largest_preset_lowers_elsewhere(self, platform):
    self._check_the_largest_preset_lowers(platform)

  def _check_the_largest_preset_lowers(self, platform):
    config = decoder.PRESETS['llama_7b']
    grad_fn = jax.jit(jax.grad(_loss_fn(_apply_fn(config))))
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    # JAX's own attention promotes bfloat16 inside.
    with jax.numpy_dtype_promotion('standard'):
      traced = grad_fn.trace(_abstract(config), tokens)
      lowered = traced.lower(lowering_platforms=(platform,))
    self.assertIn('bf16', lowered.as_text())
