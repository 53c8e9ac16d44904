"""A decoder-only transformer for language models: LLaMA's, in any size.

Its layers are stacked along a leading axis and run by one `jax.lax.scan`, so a
program does not grow with the number of layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from emc2 import mesh as mesh_lib

REMAT = ('none', 'selective', 'full')
ATTENTION = ('xla', 'cudnn')

_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and settings of a decoder; checks itself.

  Attributes:
    vocab_size: V, the number of tokens.
    width: h, of the residual stream.
    num_layers: L.
    num_heads: n, of the queries; the size of a head is h / n, even.
    num_kv_heads: Of the keys and values, a divisor of n; n if None.
    mlp_width: i, of the gated layer.
    tied: Whether the output layer is the embedding, transposed.
    rope_base: Of the frequencies of the rotary embedding.
    init_std: Standard deviation of the first weights.
    dtype: Of the activations. Statistics, softmax and loss are float32.
    param_dtype: Of the parameters.
    remat: What the backward pass computes again: 'none'; 'selective', the
      attention core and the product of the gate, which are large and cheap;
      'full', whole layers, of which only the inputs are kept.
    attention: As in `jax.nn.dot_product_attention`: 'xla' runs everywhere;
      'cudnn' keeps no scores, but wants a GPU and 16 bits.
    unroll: Layers in one round of the loop. As many as there are make a step of
      'small' some fifth faster on a CPU, and its compilation slower.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  num_kv_heads: int | None = None
  tied: bool = False
  rope_base: float = 10_000.0
  init_std: float = 0.021
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32
  remat: str = 'none'
  attention: str = 'xla'
  unroll: int = 1

  def __post_init__(self):
    sizes = ['vocab_size', 'width', 'num_layers', 'num_heads', 'mlp_width']
    sizes += ['num_kv_heads'] if self.num_kv_heads is not None else []
    for name in (*sizes, 'unroll'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1, got {getattr(self, name)}.'
        )
    if self.width % (2 * self.num_heads):
      raise ValueError(
        'width must be a multiple of 2 num_heads, so that the size of a head '
        f'is even, got width {self.width} and num_heads {self.num_heads}.'
      )
    if self.num_heads % self.kv_heads:
      raise ValueError(
        'num_kv_heads must divide num_heads, got num_kv_heads '
        f'{self.num_kv_heads} and num_heads {self.num_heads}.'
      )
    for name in ('rope_base', 'init_std'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f'{name} must be positive, got {getattr(self, name)}.')
    for name in ('dtype', 'param_dtype'):
      if not jnp.issubdtype(getattr(self, name), jnp.floating):
        raise ValueError(
          f'{name} must be a float dtype, got {getattr(self, name)}.'
        )
    for name, choices in (('remat', REMAT), ('attention', ATTENTION)):
      if getattr(self, name) not in choices:
        raise ValueError(
          f'{name} must be one of {choices}, got {getattr(self, name)!r}.'
        )

  @property
  def kv_heads(self) -> int:
    """The number of heads of the keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def head_size(self) -> int:
    """Of one head: h / n."""
    return self.width // self.num_heads


PRESETS = {
  'small': Config(
    vocab_size=100,
    width=64,
    num_layers=2,
    num_heads=2,
    mlp_width=176,
  ),
  'gpt2_small': Config(
    vocab_size=50_304,
    width=768,
    num_layers=12,
    num_heads=12,
    mlp_width=2048,
    tied=True,
  ),
  'llama_7b': Config(
    vocab_size=32_000,
    width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=11_008,
    dtype=jnp.bfloat16,
    remat='selective',
  ),
}
"""For characters on a CPU; 123,587,328 and 6,738,415,616 parameters."""


class Decoder(nnx.Module):
  r"""Predicts each next token from those before it.

  With :math:`x` the embeddings of the tokens, each of the layers is

  .. math::
    x \leftarrow x + \operatorname{attention}(\operatorname{norm}(x)) W_o,
    \quad
    x \leftarrow x + (\operatorname{silu}(g) \odot u) W_{\text{down}},
    \quad [g, u] = \operatorname{norm}(x) W_{gu},

  and the logits are :math:`\operatorname{norm}(x) W_{\text{head}}`. Queries and
  keys carry rotary embeddings; positions start at 0 in every row. There are no
  biases and there is no dropout. Weights are drawn from
  :math:`N(0, \sigma^2)`, those of the two output projections from
  :math:`N(0, \sigma^2 / 2L)`.

  Args:
    config: Sizes and settings.
    rngs: Where the parameters are drawn from.

  References:
    Touvron et al., "LLaMA: Open and Efficient Foundation Language Models",
    2023, section 2.2, https://arxiv.org/abs/2302.13971. Fan et al., "HLAT:
    High-quality Large Language Model Pre-trained on AWS Trainium", 2024,
    https://arxiv.org/abs/2404.10630: fused projections, initialisation, what
    is computed again.
  """

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    def draw(leaf):
      value = jnp.ones(leaf.shape, jnp.float32)
      if leaf.std is not None:
        value = leaf.std * jax.random.normal(
          rngs.params(), leaf.shape, jnp.float32
        )
      return nnx.Param(value.astype(config.param_dtype))

    leaves = _leaves(config)
    self.embedding = draw(leaves['embedding'])
    self.layers = nnx.Dict(
      {name: draw(leaf) for name, leaf in leaves['layers'].items()}
    )
    self.norm = draw(leaves['norm'])
    if not config.tied:
      self.head = draw(leaves['head'])
    self.config = config

  def __call__(
    self,
    tokens: jax.Array,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    sequence_parallel: bool = False,
  ) -> jax.Array:
    """Maps tokens to logits of their successors.

    Args:
      tokens: (batch, length) integers in [0, vocab_size); one outside of it
        makes the logits of its row NaN.
      mesh: As in `split`.
      sequence_parallel: As in `split`.

    Returns:
      (batch, length, vocab_size), float32.

    Raises:
      ValueError: If the tokens are not integers of two axes.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        'tokens must be integers of shape (batch, length), got '
        f'{tokens.dtype} of shape {tokens.shape}.'
      )
    config = self.config
    dtype = jnp.dtype(config.dtype)
    embedding = self.embedding[...]
    tables = rotary_tables(
      tokens.shape[1], config.head_size, base=config.rope_base
    )
    place = _placer(config, mesh, sequence_parallel)
    layer = functools.partial(_apply_layer, config, tables, place)
    if config.remat == 'full':
      layer = _recompute(config, layer)
    layers = {name: param[...] for name, param in self.layers.items()}
    x = jnp.take(embedding, tokens, axis=0).astype(dtype)
    x = place(x, 'batch', 'length', None)
    x, _ = jax.lax.scan(
      lambda x, weights: (layer(x, weights), None),
      x,
      layers,
      unroll=min(config.unroll, config.num_layers),
    )
    x = place(rms_norm(x, self.norm[...]), 'batch', None, None)
    head = embedding.T if config.tied else self.head[...]
    logits = jnp.einsum('bsh,hv->bsv', x, head.astype(dtype))
    return place(logits, 'batch', None, 'vocab_size').astype(jnp.float32)


def _apply_layer(config, tables, place, x, weights):
  """One layer: x (batch, length, width) and the weights without their axis."""
  w = {name: weight.astype(x.dtype) for name, weight in weights.items()}
  attend = functools.partial(
    jax.nn.dot_product_attention,
    is_causal=True,
    implementation=config.attention,
  )
  project = lambda g, u, down: jnp.einsum(
    'bsi,ih->bsh', jax.nn.silu(g) * u, down
  )
  if config.remat == 'selective':
    # The last product is inside, or it would keep what it multiplies.
    attend, project = _recompute(config, attend), _recompute(config, project)

  y = place(rms_norm(x, w['attention_norm']), 'batch', None, None)
  if 'qkv' in w:
    qkv = jnp.einsum('bsh,hcnd->bscnd', y, w['qkv'])
    q, k, v = (qkv[:, :, i] for i in range(3))
  else:
    q = jnp.einsum('bsh,hnd->bsnd', y, w['q'])
    kv = jnp.einsum('bsh,hcnd->bscnd', y, w['kv'])
    k, v = kv[:, :, 0], kv[:, :, 1]
  q = place(rotate(q, *tables), 'batch', None, 'num_heads', None)
  k = place(rotate(k, *tables), 'batch', None, 'num_kv_heads', None)
  v = place(v, 'batch', None, 'num_kv_heads', None)
  out = place(attend(q, k, v), 'batch', None, 'num_heads', None)
  out = jnp.einsum('bsnd,ndh->bsh', out, w['out'])
  x = x + place(out, 'batch', 'length', None)

  y = place(rms_norm(x, w['mlp_norm']), 'batch', None, None)
  gate_up = jnp.einsum('bsh,hci->bsci', y, w['gate_up'])
  g, u = (place(gate_up[:, :, i], 'batch', None, 'mlp_width') for i in range(2))
  out = project(g, u, w['down'])
  return x + place(out, 'batch', 'length', None)


def _recompute(config, function):
  # A loop of one layer per round cannot merge the second computation with the
  # first; a longer round could.
  prevent_cse = min(config.unroll, config.num_layers) > 1
  return jax.checkpoint(function, prevent_cse=prevent_cse)


def rms_norm(
  x: Float[Array, 'batch length width'], weight: Float[Array, ' width']
) -> Float[Array, 'batch length width']:
  r"""Divides by the root of the mean square, and scales.

  .. math:: w \odot x / \sqrt{\operatorname{mean}(x^2) + 10^{-5}}

  The statistics are float32, and so is the quotient before it is cast to the
  type of `x`; the product with `weight` comes after.

  Args:
    x: (batch, length, width).
    weight: (width,).

  Returns:
    (batch, length, width), of the type of `x`.
  """
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  unit = (wide * jax.lax.rsqrt(square + _EPSILON)).astype(x.dtype)
  return unit * weight.astype(x.dtype)[None, None, :]


def rotary_tables(
  length: int, head_size: int, *, base: float = 10_000.0
) -> tuple[Float[Array, 'length half'], Float[Array, 'length half']]:
  r"""Cosines and sines of the angles of a rotary embedding.

  Position :math:`p` turns pair :math:`j` of :math:`d/2` by
  :math:`p\, \text{base}^{-2j/d}`.

  Args:
    length: Number of positions, static.
    head_size: d, even, static.
    base: Of the frequencies.

  Returns:
    Two arrays (length, d / 2), float32.
  """
  exponents = np.arange(0, head_size, 2) / head_size
  frequencies = jnp.asarray(float(base) ** -exponents, jnp.float32)
  positions = jnp.arange(length, dtype=jnp.float32)
  angles = positions[:, None] * frequencies[None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  z: Float[Array, 'batch length heads size'],
  cos: Float[Array, 'length half'],
  sin: Float[Array, 'length half'],
) -> Float[Array, 'batch length heads size']:
  """Turns each pair of entries (j, j + d/2) by the angle of its position.

  Args:
    z: Queries or keys, (batch, length, heads, d).
    cos: From `rotary_tables`.
    sin: Likewise.

  Returns:
    The same shape and type; the turn itself is computed in float32.

  References:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    2021, https://arxiv.org/abs/2104.09864; with the halves of a head paired,
    as LLaMA's published weights have it.
  """
  cos, sin = cos[None, :, None, :], sin[None, :, None, :]
  first, second = jnp.split(z.astype(cos.dtype), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(z.dtype)


def next_token_loss(
  logits: Float[Array, 'batch length vocab'], tokens: Int[Array, 'batch given']
) -> Float[Array, '']:
  r"""Mean cross-entropy of each next token, in nats.

  .. math:: \frac1{b(m-1)} \sum_{r=1}^b \sum_{j=1}^{m-1}
    -\log \operatorname{softmax}(\ell_{r,j})_{t_{r,j+1}}

  for rows of `m` tokens: logits whose successor is not among them are unused.

  Args:
    logits: (batch, length, vocab).
    tokens: (batch, m) with m either length, or length + 1 where each row holds
      the successor of its last input as well.

  Returns:
    (), float32.

  Raises:
    ValueError: If m is neither.

  Examples:
    >>> tokens = jnp.array([[1, 0, 2]])
    >>> loss = next_token_loss(jnp.zeros((1, 2, 3)), tokens)
    >>> round(float(jnp.exp(loss)), 4)
    3.0
  """
  length, given = logits.shape[1], tokens.shape[1]
  if given not in (length, length + 1) or given < 2:
    raise ValueError(
      'tokens must hold as many tokens in a row as there are logits, '
      f'{length}, or one more, and at least 2, got {given}.'
    )
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, : given - 1].astype(jnp.float32), tokens[:, 1:]
  )
  return jnp.mean(losses)


class PureDecoder(NamedTuple):
  """A decoder after the split.

  Attributes:
    params: Nested dict of arrays, with string keys: for optax, Orbax and
      `jax.tree`, none of which need Flax.
    apply_fn: `(params, tokens) -> logits`, as `Decoder.__call__`.
  """

  params: dict[str, Any]
  apply_fn: Callable[[Any, jax.Array], jax.Array]


def split(
  model: Decoder,
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
  sequence_parallel: bool = False,
) -> PureDecoder:
  """Splits a decoder, once, into its parameters and a pure function.

  The function may be jitted, differentiated and mapped like any other. With
  parameters that lie as `shardings` says it wants the mesh: left alone, XLA
  would split the residual stream as they are, and sum it over all devices,
  where it should gather the weights of one layer at a time.

  Args:
    model: Its parameters may be abstract: those of `nnx.eval_shape`.
    mesh: With automatic axes, as `emc2.mesh.make` has them. The batch is split
      over `mesh.DATA` and `mesh.FSDP`; heads, the gated layer and the logits
      over `mesh.TENSOR`. None leaves all to XLA.
    sequence_parallel: Whether `mesh.TENSOR` splits the residual stream too,
      over positions; their number must be a multiple of the axis.

  Returns:
    The parameters and the function.

  Examples:
    >>> build = lambda: Decoder(PRESETS['small'], rngs=nnx.Rngs(0))
    >>> params, apply_fn = split(nnx.eval_shape(build))
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> jax.eval_shape(apply_fn, params, tokens).shape
    (2, 8, 100)
  """
  graphdef, state = nnx.split(model)

  def apply_fn(params, tokens):
    model = nnx.merge(graphdef, params)
    return model(tokens, mesh=mesh, sequence_parallel=sequence_parallel)

  return PureDecoder(nnx.to_pure_dict(state), apply_fn)


def draw_params(config: Config, key: jax.Array) -> dict[str, Any]:
  """Draws parameters; pure, so that `jax.jit` may place them as it draws.

  Args:
    config: Sizes and settings, static.
    key: PRNG key.

  Returns:
    The parameters, as in `PureDecoder`; the same under any sharding.
  """
  return split(Decoder(config, rngs=nnx.Rngs(key))).params


def shardings(
  config: Config,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  *,
  fsdp: bool = True,
) -> dict[str, Any]:
  """Says how the parameters lie on a mesh.

  Heads, the gated layer and the vocabulary are split over `mesh.TENSOR`, the
  width over `mesh.FSDP`; an axis that the mesh lacks splits nothing. Keys and
  values of fewer heads than the tensor axis has devices are whole on each.
  Moments of an optimiser lie as their parameters do; ZeRO-1 is these for the
  moments and, for the parameters, those with `fsdp=False`.

  .. note::
    The batch is split by the caller, over `mesh.DATA` and `mesh.FSDP`.

  Args:
    config: Sizes and settings.
    mesh: With axes of `emc2.mesh`; may be abstract.
    fsdp: Whether to split the width.

  Returns:
    A tree of `PartitionSpec`, like `PureDecoder.params`.

  Raises:
    ValueError: If an axis of the mesh does not divide what it splits.

  Examples:
    >>> mesh = jax.sharding.AbstractMesh((4, 2), ('fsdp', 'tensor'))
    >>> tuple(shardings(PRESETS['llama_7b'], mesh)['layers']['down'])
    (None, 'tensor', 'fsdp')
  """
  axes = _tensor_axes(config, mesh)
  if fsdp and mesh_lib.FSDP in mesh.shape:
    axes['width'] = mesh_lib.FSDP

  def place(leaf):
    for size, name in zip(leaf.shape, leaf.axes, strict=True):
      axis = axes.get(name)
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f'{name} must be a multiple of mesh axis {axis!r}, '
          f'{mesh.shape[axis]}, got {size}.'
        )
    return jax.sharding.PartitionSpec(*map(axes.get, leaf.axes))

  is_leaf = lambda x: isinstance(x, _Leaf)
  return jax.tree.map(place, _leaves(config), is_leaf=is_leaf)


def _tensor_axes(config, mesh):
  """The axis, or None, for each size that may lie over the tensor axis."""
  names = ('vocab_size', 'num_heads', 'num_kv_heads', 'mlp_width')
  size = mesh.shape.get(mesh_lib.TENSOR)
  if size is None:
    return dict.fromkeys(names)
  axes = dict.fromkeys(names, mesh_lib.TENSOR)
  if size > config.kv_heads and size % config.kv_heads == 0:
    axes['num_kv_heads'] = None
  return axes


def _placer(config, mesh, sequence_parallel):
  """Makes `(x, *names of its axes) -> x`, where it should lie."""
  if mesh is None:
    return lambda x, *names: x
  axes = _tensor_axes(config, mesh)
  rows = (mesh_lib.DATA, mesh_lib.FSDP)
  axes['batch'] = tuple(axis for axis in rows if axis in mesh.shape) or None
  if sequence_parallel and mesh_lib.TENSOR in mesh.shape:
    axes['length'] = mesh_lib.TENSOR

  def place(x, *names):
    spec = jax.sharding.PartitionSpec(*map(axes.get, names))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(x, sharding)

  return place


class _Leaf(NamedTuple):
  """What there is to know of one array of parameters."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]  # The field of `Config` behind each axis.
  std: float | None  # Of the first values; None: they are 1.


def _leaves(config: Config) -> dict[str, Any]:
  """All arrays of a decoder, in the tree that they make."""
  h, i, d = config.width, config.mlp_width, config.head_size
  n, n_kv = config.num_heads, config.kv_heads
  std = config.init_std
  out_std = std / math.sqrt(2 * config.num_layers)

  # The 3 of `qkv` and the 2 of `kv` and `gate_up` are axes of their own, so
  # that each device of the tensor axis owns whole heads of all three, and
  # columns of the gate that fit its columns of the rest.
  if n == n_kv:
    projections = {
      'qkv': _Leaf((h, 3, n, d), ('width', None, 'num_heads', None), std),
    }
  else:
    projections = {
      'q': _Leaf((h, n, d), ('width', 'num_heads', None), std),
      'kv': _Leaf((h, 2, n_kv, d), ('width', None, 'num_kv_heads', None), std),
    }
  layer = {
    'attention_norm': _Leaf((h,), ('width',), None),
    **projections,
    'out': _Leaf((n, d, h), ('num_heads', None, 'width'), out_std),
    'mlp_norm': _Leaf((h,), ('width',), None),
    'gate_up': _Leaf((h, 2, i), ('width', None, 'mlp_width'), std),
    'down': _Leaf((i, h), ('mlp_width', 'width'), out_std),
  }
  stack = lambda leaf: _Leaf(
    (config.num_layers, *leaf.shape), (None, *leaf.axes), leaf.std
  )
  leaves = {
    'embedding': _Leaf((config.vocab_size, h), ('vocab_size', 'width'), std),
    'layers': {name: stack(leaf) for name, leaf in layer.items()},
    'norm': _Leaf((h,), ('width',), None),
  }
  if not config.tied:
    leaves['head'] = _Leaf((h, config.vocab_size), ('width', 'vocab_size'), std)
  return leaves
