"""How workers reduce what they coded, by toy codes with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from emc2 import mesh
from emc2.compression import compressor

NUM_WORKERS = 4
ROWS = np.arange(24, dtype=np.float32).reshape(NUM_WORKERS, 6) ** 2


def _halves(**flags):
  """Sends the first half, and a number that its worker drew."""

  def compress(state, x, key):
    draw = jax.random.uniform(key, (1,))
    return (x[: x.size // 2], draw), state + 1

  def decompress(state, payload, like):
    kept, draw = payload
    return jnp.zeros(like.shape, like.dtype).at[: kept.size].set(kept + draw)

  return compressor.Compressor(
    'halves',
    compress=compress,
    decompress=decompress,
    bits=lambda shape: 32 * (shape[0] // 2 + 1),
    init=lambda shape, dtype, key: jnp.zeros([], jnp.int32),
    **flags,
  )


def _over_workers(code):
  """Reduces each row twice, under two keys, one row a worker."""
  keys = [jax.random.key(1), jax.random.key(2)]

  def run(rows):
    states = [code.init((6,), jnp.float32, keys[0])] * 2
    reduced = compressor.reduce(code, states, [rows[0]] * 2, keys, mesh.DATA)
    return [sent[None] for sent in reduced.sent], reduced.mean, reduced.states

  split, whole = jax.P(mesh.DATA), jax.P()
  fn = jax.shard_map(
    run,
    mesh=mesh.make(jax.devices()[:NUM_WORKERS], data=NUM_WORKERS),
    in_specs=split,
    out_specs=(split, whole, whole),
  )
  return jax.jit(fn)(jnp.asarray(ROWS))


class ReduceTest(parameterized.TestCase):
  @parameterized.parameters(
    {'allreducible': True, 'shared_key': True},
    {'allreducible': False, 'shared_key': True},
    {'allreducible': False, 'shared_key': False},
  )
  def test_mean_of_what_each_sent(self, **flags):
    sent, mean, states = _over_workers(_halves(**flags))
    for i in range(2):
      drawn = np.asarray(sent[i])[:, :3] - ROWS[:, :3]
      distinct = np.unique(np.round(drawn, 3))
      self.assertLen(distinct, 1 if flags['shared_key'] else NUM_WORKERS)
      np.testing.assert_array_equal(np.asarray(sent[i])[:, 3:], 0)
      want = np.asarray(sent[i]).mean(axis=0)
      np.testing.assert_allclose(mean[i], want, rtol=1e-6)
      self.assertEqual(states[i], 1)
    self.assertNotAlmostEqual(float(mean[0][0]), float(mean[1][0]), places=3)

  def test_accumulate_takes_the_place_of_a_loop(self):
    def accumulate(state, payloads, like):
      del state
      return jnp.full(like.shape, jnp.sum(payloads[0]), like.dtype)

    _, mean, _ = _over_workers(_halves(accumulate=accumulate))
    np.testing.assert_allclose(mean[0], np.full(6, ROWS[:, :3].sum() / 4))

  def test_a_code_may_reduce_by_itself(self):
    def own(states, xs, keys, axis_name):
      del keys, axis_name
      return compressor.Reduced(xs, [jnp.ones(3)], states)

    code = _halves(reduce=own)
    reduced = compressor.reduce(code, [()], [jnp.zeros(6)], [jax.random.key(0)])
    np.testing.assert_array_equal(reduced.mean[0], np.ones(3))

  def test_one_worker_needs_no_axis(self):
    key = jax.random.key(0)
    code = _halves(shared_key=False)
    state = code.init((6,), jnp.float32, key)
    x = jnp.asarray(ROWS[1])
    reduced = compressor.reduce(code, [state], [x], [key])
    np.testing.assert_array_equal(reduced.mean[0], reduced.sent[0])

  def test_lists_must_be_as_long(self):
    state, x, key = jnp.zeros([], jnp.int32), jnp.zeros(6), jax.random.key(0)
    with self.assertRaises(ValueError):
      compressor.reduce(_halves(), [state, state], [x], [key])


class WireBitsTest(parameterized.TestCase):
  @parameterized.parameters((jnp.float32, 128), (jnp.float64, 224))
  def test_counts_the_arrays(self, dtype, bits):
    with jax.enable_x64(True):
      self.assertEqual(compressor.wire_bits(_float32_draw(), (6,), dtype), bits)


def _float32_draw():
  """Its three kept entries have the dtype of the array, the fourth has not."""
  code = _halves()

  def compress(state, x, key):
    (kept, draw), state = code.compress(state, x, key)
    return (kept, draw.astype(jnp.float32)), state

  return code._replace(compress=compress)
